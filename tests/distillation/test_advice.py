"""The advice of each error about targets is followed, until the model is trained: it must not lead in circles."""

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
    """A model with outputs of a shape."""

    def __init__(self, shape, change=""):
        super().__init__()
        self.shape, self.change, self.linear = shape, change, nn.Linear(4, math.prod(shape))

    def forward(self, x):
        outputs = self.linear(x).reshape(len(x), *self.shape)
        return eval(self.change) if self.change else outputs


@dataclasses.dataclass
class Call:
    """What is given to `distill`."""

    shape: tuple[int, ...]
    targets: torch.Tensor
    label_loss: str
    term: str
    change: str = ""

    def run(self):
        """Distill; the error that is raised, if one is."""
        options = {"student_layer": "logits"} if self.term == "fitnet" else {}
        objective = Objective((Term(self.term, 0.5, **options),), 0.5, label_loss=self.label_loss)
        student, teacher = Net(self.shape, self.change), Net(self.shape, self.change)
        hooks = TrainingHooks(event=lambda _event: None)
        data, settings = [(X, self.targets)], {"training": ONCE, "check_teacher": False, "hooks": hooks}
        try:
            distill(student, teacher, data, objective=objective, **settings)
        except KirschError as error:
            return error
        return None

    def follow(self, advice):
        """Do what an error advises; true if that is anything."""
        before = dataclasses.replace(self)
        if named := re.search(r'label_loss="([\w-]+)"', advice):
            self.label_loss = named[1]
        if named := re.search(r"(?<!_loss=)[\"'](binary-kd|pixel-kd|kd|fitnet)[\"']", advice):
            self.term = named[1]
        if named := re.search(r"outputs\.(flatten|transpose)\([\d, ]+\)", advice):
            self.change = named[0]
        if named := re.search(r"outputs (?:of|have) shape \(([\d, ]*)\)", advice):
            self.shape = tuple(int(size) for size in named[1].replace(" ", "").split(",") if size)
        if named := re.search(r"give the model as many outputs", advice):
            self.shape = tuple(self.targets.shape[1:])
        if "nn.Flatten()" in advice:
            self.shape = self.shape[:1]
        if named := re.search(r"\(?targets[^,;:]*?(?:\(-?\d[\d, ]*\)|long\(\)|\[[^\]]+\]|[/+-] \d+)", advice):
            self.targets = eval(named[0], {"targets": self.targets})
            self.targets = self.targets.long() if "int64" in advice else self.targets
        return any(getattr(before, field.name) is not getattr(self, field.name) for field in dataclasses.fields(self))


def drawn(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def one_hot(*shape):
    return F.one_hot(drawn(C, *shape), C)


def soft(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)).softmax(-1)


PIXELS, POSITIONS = (N, H, W), (N, L)
TARGETS = {
    (C, H, W): {
        "classes": drawn(C, *PIXELS),
        "floats": drawn(C, *PIXELS).float(),
        "an axis of 1": drawn(C, N, 1, H, W),
        "a last axis of 1": drawn(C, *PIXELS, 1),
        "one-hot": one_hot(*PIXELS).permute(0, 3, 1, 2),
        "one-hot, classes last": one_hot(*PIXELS),
        "one-hot floats, classes last": one_hot(*PIXELS).float(),
        "shares, classes last": soft(*PIXELS, C),
        "yes or no": drawn(2, N, C, H, W),
        "yes or no, classes last": drawn(2, *PIXELS, C).float(),
        "numbers": X.new_ones(N, C, H, W) * 1.5,
        "numbers, classes last": X.new_ones(*PIXELS, C) * 1.5,
        "one number a pixel": X.new_ones(*PIXELS) * 0.5,
        "labels of samples": drawn(C, N),
    },
    (1, H, W): {
        "yes or no": drawn(2, *PIXELS),
        "masks": drawn(2, *PIXELS) * 255,
        "a last axis of 1": drawn(2, *PIXELS, 1),
        "numbers": X.new_ones(*PIXELS) * 1.5,
        "numbers, a last axis of 1": X.new_ones(*PIXELS, 1) * 1.5,
    },
    (C, 1, 1): {
        "classes": drawn(C, N),
        "one-hot": one_hot(N),
        "pixels": drawn(C, N, 1, 1),
        "yes or no": drawn(2, N, C, 1, 1),
    },
    (L, C): {
        "classes": drawn(C, *POSITIONS),
        "one-hot": one_hot(*POSITIONS),
        "a last axis of 1": drawn(C, *POSITIONS, 1),
        "yes or no": drawn(2, *POSITIONS, C),
        "numbers": X.new_ones(*POSITIONS, C) * 1.5,
    },
    (C, L): {"classes, which lie on axis 1": drawn(C, *POSITIONS)},
    (L, 1): {
        "yes or no": drawn(2, *POSITIONS),
        "a last axis of 1": drawn(2, *POSITIONS, 1),
        "numbers": X.new_ones(*POSITIONS) * 1.5,
    },
    (C,): {
        "classes": drawn(C, N),
        "columns": drawn(C, N, 1),
        "one-hot": one_hot(N),
        "yes or no": drawn(2, N, C),
        "five answers": drawn(2, N, 5),
        "numbers": X.new_ones(N) * 1.5,
    },
    (1,): {"yes or no": drawn(2, N), "five answers": drawn(2, N, 5), "numbers": X.new_ones(N) * 1.5},
    (): {"yes or no": drawn(2, N), "numbers": X.new_ones(N) * 1.5},
}
CASES = [(shape, name) for shape, named in TARGETS.items() for name in named]
STARTS = [("cross-entropy", "kd"), ("cross-entropy", "pixel-kd"), ("binary", "binary-kd"), ("squared-error", "fitnet")]
MOST_STEPS = 6


@pytest.mark.parametrize("start", STARTS, ids=" ".join)
@pytest.mark.parametrize(("shape", "name"), CASES, ids=str)
def test_the_advice_of_errors_leads_to_a_run(shape, name, start):
    call, told = Call(shape, TARGETS[shape][name], *start), []
    while (error := call.run()) is not None and len(told) < MOST_STEPS and call.follow(error.fix):
        told.append(str(error))
    assert error is None, [*told, str(error)]
