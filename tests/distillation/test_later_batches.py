"""An error about a later batch has the number of the batch and the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.errors import DataError, ModelError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks

N, K = 12, 3
X, Y = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % K
ONCE = Training(epochs=2, learning_rate=0.05)


class Fixed(nn.Module):
    """A model for images of one size."""

    def __init__(self, width=4):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, width, 3), nn.Linear(width * 16, K)

    def forward(self, image):
        return self.head(self.conv(image).relu().flatten(1))


class Stream:
    """An iterable without a length."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def loader(*batches):
    """Return a DataLoader that yields these batches."""
    return DataLoader(list(batches), batch_size=1, collate_fn=lambda items: items[0])


CONSTANT = Training(epochs=2, schedule="constant")
TRAINING_CALLS = {
    "fit": lambda data: fit(Fixed(), data, training=CONSTANT),
    "distill": lambda data: distill(Fixed(), Fixed(5), data, training=CONSTANT, check_teacher=False),
    "mutual": lambda data: distill_mutually([Fixed(), Fixed(5)], data, training=CONSTANT),
}
EVALUATING_CALLS = {
    "teacher": lambda data: distill(Fixed(), Fixed(5), data, training=CONSTANT),
    "validation": lambda data: fit(Fixed(), [(X, Y)], validation=data, training=CONSTANT),
}
LATER = {
    "another size": (
        (X[..., :5], Y),
        ModelError,
        r"Fixed does not run on .* float32 of shape \(12, 1, 6, 5\)\. .*padded or resized to its input size",
    ),
    "another type": ((X.double(), Y), UsageError, "computes in float32, and its inputs are float64"),
    "none": (None, DataError, "A batch is None"),
    "texts": ((["a"] * N, Y), DataError, "A model takes arrays, not strings"),
    "too few targets": ((X, Y[:7]), DataError, "These are 12 samples and 7 targets"),
    "other targets": ((X, Y + K), DataError, "Sample 0 has the label 3"),
}


@pytest.mark.parametrize("case", LATER)
@pytest.mark.parametrize(
    "form", [Stream, loader, lambda *batches: list(batches)], ids=["a stream", "a loader", "a list"]
)
@pytest.mark.parametrize("call", [*TRAINING_CALLS, *EVALUATING_CALLS])
def test_a_later_batch_that_does_not_fit_raises_an_error_with_the_number_of_the_batch(call, form, case):
    batch, error, sentence = LATER[case]
    with pytest.raises(error, match=rf"Batch 2 of (epoch 1:|the data:|the validation( does not fit\.|:)) .*{sentence}"):
        {**TRAINING_CALLS, **EVALUATING_CALLS}[call](form((X, Y), batch))


@pytest.mark.parametrize("case", sorted(LATER.keys() - {"none"}))
def test_a_distiller_refuses_a_later_batch_that_does_not_fit(case):
    batch, error, sentence = LATER[case]
    distiller = Distiller(Fixed(), Fixed(5), Objective.kd(), (X, Y))
    distiller((X, Y))
    with pytest.raises(error, match=sentence):
        distiller(batch)


class Pooled(Fixed):
    """A model for images of any size."""

    def forward(self, image):
        return super().forward(nn.functional.adaptive_avg_pool2d(image, 6))


def test_batches_of_several_sizes_are_accepted_if_the_model_takes_them():
    batches = [(X, Y), (X[..., :5], Y), (X[:5], Y[:5])]
    found = distill(Pooled(), Pooled(5), batches, training=ONCE, check_teacher=False, validation=batches)
    assert len(found.history) == ONCE.epochs
    assert set(Distiller(Pooled(), Pooled(5), Objective.kd(), batches[0])(batches[1]).terms) == {"label", "kd"}


class Failing(Fixed):
    """A model that raises an error on the second batch in training."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, image):
        self.calls += self.training
        if self.calls > 1:
            raise self.error
        return super().forward(image)


def test_the_message_of_an_error_in_the_model_has_the_line_of_code():
    with pytest.raises(
        ModelError, match=r"Batch 2 of epoch 1: .*ValueError: wrong \(test_later_batches\.py:\d+, in forward\)"
    ) as caught:
        fit(Failing(ValueError("wrong")), [(X, Y)] * 2, training=ONCE)
    assert isinstance(caught.value.__cause__.__cause__, ValueError)


def test_errors_that_the_shape_of_a_batch_cannot_cause_are_not_wrapped():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), KeyError("wrong")):
        with pytest.raises(type(error)):
            fit(Failing(error), [(X, Y)] * 2, training=ONCE)


@pytest.mark.parametrize(
    "batch", [(X,), (X, None), X, {"image": X}], ids=["inputs alone", "None", "an array", "a dict"]
)
def test_a_later_batch_without_targets_is_refused_or_gives_one_warning(batch):
    with pytest.raises(DataError, match=r"Batch 2 of epoch 1: A batch has no targets, and there is no teacher"):
        TRAINING_CALLS["fit"]([(X, Y), batch])
    events = []
    hooks = TrainingHooks(event=events.append)
    data = [(X, Y), batch, batch]
    distill(Fixed(), Fixed(5), data, training=ONCE, check_teacher=False, hooks=hooks)
    texts = [event["text"] for event in events if event["event"] == "warning"]
    assert len(texts) == 1
    assert texts[0].startswith("Batch 2 of epoch 1: A batch has no targets, unlike earlier batches")
    distiller = Distiller(Fixed(), Fixed(5), Objective.kd(), (X, Y))  # a distiller does not warn
    assert [set(distiller(item).terms) for item in ((X, Y), batch)] == [{"label", "kd"}, {"kd"}]


def test_batches_without_targets_give_no_warning_if_no_term_uses_labels():
    objective = Objective(Objective.kd().terms, label_weight=0)
    events = []
    hooks = TrainingHooks(event=events.append)
    for data in ([(X, Y), (X,)], [(X,), (X,)]):
        distill(Fixed(), Fixed(5), data, objective=objective, training=ONCE, check_teacher=False, hooks=hooks)
    assert not [event for event in events if event["event"] == "warning"]


# ------------------------------------------------------------------------------------------------ ids, mask, labels


class Masked(nn.Module):
    """A model of tokens with a required mask."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, K)

    def forward(self, words, mask):
        return self.head((self.words(words) * mask[..., None]).mean(1))


class Optional(Masked):
    """A model of tokens with an optional mask."""

    def forward(self, words, mask=None):
        return super().forward(words, torch.ones(words.shape) if mask is None else mask)


WORDS = torch.randint(0, 9, (N, 6), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(6) < 4).expand(N, 6)


@pytest.mark.parametrize("mask", [MASK.float(), MASK.long(), MASK], ids=["float", "int", "bool"])
@pytest.mark.parametrize(
    ("model", "error", "sentence"),
    [
        (
            Masked,
            UsageError,
            r'takes words, mask; .* as a dict .*: \{"words": \.\.\., "mask": \.\.\., "labels": \.\.\.\}',
        ),
        (Optional, DataError, r'If they are a mask of the inputs, give a dict .*"labels": \.\.\.\}'),
    ],
)
def test_a_tuple_of_inputs_mask_and_labels_is_refused_and_the_error_shows_the_dict(model, error, sentence, mask):
    with pytest.raises(error, match=sentence):
        fit(model(), [(WORDS[:K], mask[:K], Y[:K])], training=ONCE)
    with pytest.raises(DataError, match=r"contains 0 more than once.* \(\(first, second\), labels\)"):
        fit(model(), [(WORDS, mask, Y)], training=ONCE)
    with pytest.raises(DataError, match=r"third part of a batch is int64 of shape \(12, 6\).* or a dict"):
        fit(model(), [(WORDS, mask, WORDS)], training=ONCE)
    found = fit(model(), [{"words": WORDS, "mask": mask, "labels": Y}], training=ONCE)
    assert len(found.history) == ONCE.epochs
