"""If the fix in each error about targets is applied, one after the other, training finally runs."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.distillation.distill import distill
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import KirschError
from kirsch.frameworks.training import Training, TrainingHooks

N, C, H, W, L = 8, 3, 4, 5, 6
ONCE = Training(epochs=1, schedule="constant")
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A linear model with outputs of a given shape."""

    def __init__(self, shape, change=""):
        super().__init__()
        self.shape, self.change, self.linear = shape, change, nn.Linear(4, math.prod(shape))

    def forward(self, x):
        outputs = self.linear(x).reshape(len(x), *self.shape)
        return eval(self.change) if self.change else outputs


@dataclasses.dataclass
class Call:
    """Arguments of `distill`."""

    shape: tuple[int, ...]
    targets: torch.Tensor
    label_loss: str
    term: str
    change: str = ""

    def run(self):
        """Run `distill` and return the error that it raises, or None."""
        options = {"student_layer": "logits"} if self.term == "fitnet" else {}
        objective = Objective((Term(self.term, 0.5, **options),), label_weight=0.5, label_loss=self.label_loss)
        student, teacher = Net(self.shape, self.change), Net(self.shape, self.change)
        hooks = TrainingHooks(event=lambda _event: None)
        data, settings = [(X, self.targets)], {"training": ONCE, "check_teacher": False, "hooks": hooks}
        try:
            distill(student, teacher, data, objective=objective, **settings)
        except KirschError as error:
            return error
        return None

    def follow(self, advice):
        """Change the arguments as a fix says; return whether anything changed."""
        before = dataclasses.replace(self)
        if match := re.search(r'label_loss="([\w-]+)"', advice):
            self.label_loss = match[1]
        if match := re.search(r"(?<!_loss=)[\"'](binary-kd|pixel-kd|kd|fitnet)[\"']", advice):
            self.term = match[1]
        if match := re.search(r"outputs\.(flatten|transpose)\([\d, ]+\)", advice):
            self.change = match[0]
        if match := re.search(r"outputs (?:of|have) shape \(([\d, ]*)\)", advice):
            self.shape = tuple(int(size) for size in match[1].replace(" ", "").split(",") if size)
        if match := re.search(r"give the model as many outputs", advice):
            self.shape = tuple(self.targets.shape[1:])
        if "nn.Flatten()" in advice:
            self.shape = self.shape[:1]
        if match := re.search(r"\(?targets[^,;:]*?(?:\(-?\d[\d, ]*\)|long\(\)|\[[^\]]+\]|[/+-] \d+)", advice):
            self.targets = eval(match[0], {"targets": self.targets})
            self.targets = self.targets.long() if "int64" in advice else self.targets
        return any(getattr(before, field.name) is not getattr(self, field.name) for field in dataclasses.fields(self))


def integers(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def one_hot(*shape):
    return F.one_hot(integers(C, *shape), C)


def soft(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)).softmax(-1)


PIXELS, POSITIONS = (N, H, W), (N, L)
TARGETS = {
    (C, H, W): {
        "classes": integers(C, *PIXELS),
        "floats": integers(C, *PIXELS).float(),
        "an axis of 1": integers(C, N, 1, H, W),
        "a last axis of 1": integers(C, *PIXELS, 1),
        "one-hot": one_hot(*PIXELS).permute(0, 3, 1, 2),
        "one-hot, classes last": one_hot(*PIXELS),
        "one-hot floats, classes last": one_hot(*PIXELS).float(),
        "probabilities, classes last": soft(*PIXELS, C),
        "binary": integers(2, N, C, H, W),
        "binary, classes last": integers(2, *PIXELS, C).float(),
        "real numbers": X.new_ones(N, C, H, W) * 1.5,
        "real numbers, classes last": X.new_ones(*PIXELS, C) * 1.5,
        "one real number per pixel": X.new_ones(*PIXELS) * 0.5,
        "labels of samples": integers(C, N),
    },
    (1, H, W): {
        "binary": integers(2, *PIXELS),
        "masks": integers(2, *PIXELS) * 255,
        "a last axis of 1": integers(2, *PIXELS, 1),
        "real numbers": X.new_ones(*PIXELS) * 1.5,
        "real numbers, a last axis of 1": X.new_ones(*PIXELS, 1) * 1.5,
    },
    (C, 1, 1): {
        "classes": integers(C, N),
        "one-hot": one_hot(N),
        "pixels": integers(C, N, 1, 1),
        "binary": integers(2, N, C, 1, 1),
    },
    (L, C): {
        "classes": integers(C, *POSITIONS),
        "one-hot": one_hot(*POSITIONS),
        "a last axis of 1": integers(C, *POSITIONS, 1),
        "binary": integers(2, *POSITIONS, C),
        "numbers": X.new_ones(*POSITIONS, C) * 1.5,
    },
    (C, L): {"classes, which lie on axis 1": integers(C, *POSITIONS)},
    (L, 1): {
        "binary": integers(2, *POSITIONS),
        "a last axis of 1": integers(2, *POSITIONS, 1),
        "numbers": X.new_ones(*POSITIONS) * 1.5,
    },
    (C,): {
        "classes": integers(C, N),
        "columns": integers(C, N, 1),
        "one-hot": one_hot(N),
        "binary": integers(2, N, C),
        "five labels": integers(2, N, 5),
        "numbers": X.new_ones(N) * 1.5,
    },
    (1,): {"binary": integers(2, N), "five labels": integers(2, N, 5), "numbers": X.new_ones(N) * 1.5},
    (): {"binary": integers(2, N), "numbers": X.new_ones(N) * 1.5},
}
CASES = [(shape, name) for shape, targets in TARGETS.items() for name in targets]
STARTS = [("cross-entropy", "kd"), ("cross-entropy", "pixel-kd"), ("binary", "binary-kd"), ("squared-error", "fitnet")]
MAX_STEPS = 6


@pytest.mark.parametrize("start", STARTS, ids=" ".join)
@pytest.mark.parametrize(("shape", "name"), CASES, ids=str)
def test_training_runs_after_the_fixes_in_the_errors_are_applied(shape, name, start):
    call, errors = Call(shape, TARGETS[shape][name], *start), []
    while (error := call.run()) is not None and len(errors) < MAX_STEPS and call.follow(error.fix):
        errors.append(str(error))
    assert error is None, [*errors, str(error)]
