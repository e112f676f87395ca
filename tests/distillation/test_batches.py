"""Batches in the common formats are accepted; others are refused before training, with the fix."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.errors import DataError, KirschError, ModelError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks

N, K = 12, 3
ONCE = Training(epochs=2, learning_rate=0.05)
X = torch.from_numpy(np.random.default_rng(0).standard_normal((N, 1, 6, 6)).astype(np.float32))
Y = torch.arange(N) % K


class Net(nn.Module):
    def __init__(self, width=4, *, norm=False):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, width, 3), nn.Linear(width, K)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, image):
        return self.head(self.norm(self.conv(image).relu().mean((2, 3))))


def teacher():
    torch.manual_seed(1)
    return Net(5)


@pytest.fixture
def net():
    return Net()


def distilled(model, data, **options):
    hooks = TrainingHooks(event=lambda event: None)
    return distill(model, teacher(), data, training=ONCE, check_teacher=False, hooks=hooks, **options)


class ImageLabel(NamedTuple):
    label: torch.Tensor
    image: torch.Tensor


class Plain(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    target: torch.Tensor


class Encoding:
    """Has keys without being a mapping, like the encodings of tokenizers."""

    def __init__(self, **values):
        self.values = values

    def keys(self):
        return self.values.keys()

    def __getitem__(self, name):
        return self.values[name]


FORMS = {
    "a dict": {"image": X, "labels": Y},
    "another name of the input": {"x": X, "label": Y},
    "pixel_values": {"pixel_values": X, "label_ids": Y},
    "target": {"image": X, "target": Y},
    "targets": {"image": X, "targets": Y},
    "y": {"x": X, "y": Y},
    "a pair of inputs and a dict": (X, {"labels": Y}),
    "a pair of dicts": ({"image": X}, {"label": Y}),
    "an input dict": ({"image": X}, Y),
    "a list": [X, Y],
    "a named tuple": ImageLabel(Y, X),
    "a named tuple without known names": Plain(X, Y),
    "a dataclass": Sample(X, Y),
    "an encoding": Encoding(image=X, label=Y),
    "arrays": (X.numpy(), Y.numpy()),
    "labels as a list": (X, Y.tolist()),
    "labels as a tuple": (X, tuple(Y.tolist())),
    "small labels": (X, Y.to(torch.uint8)),
    "paths of files": (X, Y, [f"{number}.png" for number in range(N)]),
    "ids": (X, Y, torch.arange(N)),
    "ids in the dict": (X, {"label": Y, "ids": torch.arange(N)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_and_targets_of_common_formats_are_recognized(form, net):
    expected = distilled(net, [(X, Y)])
    found = distilled(net, [FORMS[form]], validation=[FORMS[form]])
    assert set(found.history[-1]["terms"]) == {"label", "kd"}
    assert "accuracy" in found.history[-1]
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_a_distiller_takes_the_same_formats(form, net):
    found = Distiller(net, Net(5), Objective.kd(), FORMS[form])
    plain, in_this_form = found((X, Y)), found(FORMS[form])
    assert set(in_this_form.terms) == {"label", "kd"}
    assert torch.equal(in_this_form.total, plain.total)


def test_targets_can_be_none(net):
    assert set(distilled(net, [(X, None)], objective=Objective.kd(weight=1.0)).history[0]["terms"]) == {"kd"}


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, views):
        return self.net(views["one"]["image"]) + self.net(views["other"])


def test_inputs_can_be_nested():
    batch = {"views": {"one": {"image": X}, "other": X}, "labels": Y}
    assert len(fit(Nested(), [batch], training=ONCE).history) == ONCE.epochs


class Images:
    """Not an array, like an image of PIL."""


class Rows(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y.tolist(), strict=True)


class Exhausted:
    """Returns the same iterator each time."""

    def __init__(self):
        self.batches = iter([(X, Y)] * 3)

    def __iter__(self):
        return self.batches


WRONG = {
    "a dataset": (Rows(), DataError, r"The data is a Rows, which yields single samples.*DataLoader\(dataset"),
    "tensors of a dataset": (TensorDataset(X, Y), DataError, "The data is a TensorDataset, which yields single"),
    "a stream of samples": (Stream(), DataError, r"The target of a batch is a number.* looks like a single sample"),
    "samples in a list": (
        [[{"image": X[0], "label": 1}, {"image": X[1], "label": 2}]],
        DataError,
        "a list of samples that are not collated: a list of 2 dict.* default collate_fn",
    ),
    "pairs in a list": ([[(X[0], 1), (X[1], 2)]], DataError, "samples that are not collated"),
    "columns of samples": (
        [(tuple(X), tuple(Y.tolist()))],
        DataError,
        "1 samples and 12 targets.* stack the samples in",
    ),
    "boxes and labels": (
        [(X, {"boxes": X, "labels": Y})],
        DataError,
        r"second part of a batch is a dict with boxes: float32 .*labels: int64.* \(inputs, batch\[1\]\['labels'\]\)",
    ),
    "four parts": ([(X, Y, Y, Y)], DataError, r"A batch has 4 parts: it is a tuple of \(float32 of shape"),
    "weights as a third": ([(X, Y, torch.rand(N))], DataError, r"third part of a batch is float32 of shape \(12,\)"),
    "labels as a third": (
        [(X, Y, Y)],
        DataError,
        r"third part of a batch contains 0 more than once.* \(inputs, targets, ids\).* \(\(first, second\), labels\)",
    ),
    "two names of targets": ([{"image": X, "label": Y, "target": Y}], DataError, "has 'label' and 'target'"),
    "targets alone": ([{"labels": Y}], DataError, "A batch has no inputs"),
    "names of classes": ([(X, ["cat"] * N)], DataError, "a list of 12 str, the first 'cat'.* to class numbers"),
    "pictures": ([([Images()] * N, Y)], DataError, "a list of 12 Images.* not a Images"),
    "texts": ([(["a", "b"] * 6, Y)], DataError, "not strings.* Tokenize"),
    "texts in a dict": ([{"image": X, "path": ["a"] * N, "label": Y}], DataError, "not strings"),
    "ragged lists": ([([X[:3], X[:4]], Y[:3])], DataError, "differ in their number of samples"),
    "ragged targets": ([(X, [[1], [1, 2]] * 6)], DataError, "The targets of a batch are a list of 12 list"),
    "fewer targets than inputs": ([(X, Y[:7])], DataError, "These are 12 samples and 7 targets"),
    "entries that the model does not take": (
        [{"image": X, "size": Y, "label": Y}],
        UsageError,
        "The forward of Net takes image; the batches have image, size by name.* Rename or remove the entries",
    ),
    "two inputs": ([((X, X), Y)], UsageError, "The forward of Net takes image; the batches have 2 positional"),
    "bytes": (
        [((X * 255).to(torch.uint8), Y)],
        UsageError,
        r"First 8 samples of a batch: .* in float32, .* uint8 of shape \(8, 1, 6, 6\), with values .* / 255",
    ),
    "double precision": (
        [(X.double(), Y)],
        UsageError,
        r"Net computes in float32, and its inputs are float64.*astype\(numpy\.float32\)",
    ),
    "channels last": (
        [(X.permute(0, 2, 3, 1), Y)],
        ModelError,
        r"Net takes images with channels first, .* inputs are float32 of shape \(8, 6, 6, 1\), with channels last",
    ),
    "nothing": ([], DataError, "The data is empty"),
    "an empty loader": (DataLoader(TensorDataset(X[:0], Y[:0])), DataError, "The data is empty"),
    "a generator": (((X, Y) for _ in range(2)), DataError, "iterated only once"),
    "an exhausted iterable": (Exhausted(), DataError, "iterated only once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unsupported_batches_are_refused_before_training(case, net):
    data, error, sentence = WRONG[case]
    with pytest.raises(error, match=sentence):
        distilled(net, data)
    if case not in ("a generator", "an exhausted iterable"):
        with pytest.raises(error, match=sentence):
            fit(net, data, training=ONCE)
        with pytest.raises(KirschError, match=sentence):
            distill_mutually([net, Net(5)], data, training=ONCE)


def test_the_error_for_a_missing_entry_of_a_batch_says_to_add_the_entry():
    class Two(Net):
        def forward(self, image, mask, scale=1.0):
            return super().forward(image * mask * scale)

    sentence = (
        "The forward of Two takes image, mask, scale; the batches have image by name.* Add the missing entries: mask"
    )
    with pytest.raises(UsageError, match=f"{sentence}\\."):
        fit(Two(4), [{"image": X, "label": Y}], training=ONCE)


@pytest.mark.parametrize("data", [[{"image": X, "labels": Y}], [(X, Y)]], ids=["a dict", "a pair"])
def test_the_error_for_a_model_that_requires_its_labels_asks_for_a_default(data):
    class Labeled(Net):
        def forward(self, image, labels):
            return super().forward(image)

    sentence = r"The labels of a batch are not passed to the model.* Give the argument a default: labels=None\."
    with pytest.raises(UsageError, match=sentence):
        fit(Labeled(4), data, training=ONCE)


def test_ids_that_are_given_by_name_may_repeat(net):
    assert len(fit(net, [{"image": X, "labels": Y, "ids": Y}], training=ONCE).history) == ONCE.epochs


def test_the_error_names_the_model_that_does_not_run(net):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, K, 6)

        def forward(self, x):
            return self.conv(x).flatten(1)

    with pytest.raises(ModelError, match=r"Large does not run on a batch whose"):
        distill(net, Large(), [(X, Y)], training=ONCE)


def test_array_data_can_be_tensors_or_lists(net):
    expected = fit(net, ArrayData(X.numpy(), Y.numpy()), training=ONCE).model.head.weight
    for inputs, targets in ((X, Y), (X.numpy(), Y.tolist()), ({"image": X}, Y)):
        assert torch.equal(fit(net, ArrayData(inputs, targets), training=ONCE).model.head.weight, expected)
    assert ArrayData(X.tolist(), Y.tolist()).inputs.shape == X.shape
    for inputs, sentence in (
        (DataLoader(TensorDataset(X, Y)), "inputs of ArrayData are a DataLoader.* in place of ArrayData"),
        ([[1.0], [1.0, 2.0]], "inputs of ArrayData are a list of 2 list.* pad or resize"),
        (["a", "b"], "The inputs of ArrayData are <U1 of shape .* numbers"),
        (np.array([None, Images()]), "The inputs of ArrayData are object of shape"),
    ):
        with pytest.raises(DataError, match=sentence):
            ArrayData(inputs, None)


# ------------------------------------------------------------------------------------------------ one last sample


ALONE = r"A batch has one sample, and Net normalizes over the samples of a batch\..* drop_last=True"
ROWS = TensorDataset(torch.cat([X, X[:1]]), torch.cat([Y, Y[:1]]))


@pytest.mark.parametrize(
    "data",
    [DataLoader(ROWS, 4), DataLoader(ROWS, 4, shuffle=True), [(X, Y), (X[:1], Y[:1])]],
    ids=["in order", "shuffled", "a list"],
)
def test_a_last_batch_of_one_sample_is_refused_before_training_with_batch_normalization(data):
    events = []
    with pytest.raises(DataError, match=ALONE):
        fit(Net(norm=True), data, training=ONCE, hooks=TrainingHooks(event=events.append))
    with pytest.raises(DataError, match=ALONE):
        distilled(Net(norm=True), data)
    assert not events
    assert len(fit(Net(), data, training=ONCE).history) == ONCE.epochs  # without batch normalization


@pytest.mark.parametrize(
    "data",
    [DataLoader(ROWS, 1), DataLoader(ROWS, 1, drop_last=True), ArrayData(X.numpy(), Y.numpy(), batch_size=1)],
    ids=["a loader", "a loader with drop_last", "an array"],
)
def test_batches_of_one_sample_are_refused_before_training_with_batch_normalization(data):
    events = []
    with pytest.raises(DataError, match=r"normalizes over the samples .*Give batches of at least two samples"):
        fit(Net(norm=True), data, training=ONCE, hooks=TrainingHooks(event=events.append))
    assert not events
    assert len(fit(Net(), data, training=ONCE).history) == ONCE.epochs  # without batch normalization


def test_a_batch_of_one_sample_from_a_loader_without_a_length_is_refused_when_it_occurs():
    class Loader:
        def __iter__(self):
            return iter([(X, Y), (X[:1], Y[:1])])

    with pytest.raises(DataError, match=ALONE):
        fit(Net(norm=True), Loader(), training=Training(epochs=2, schedule="constant"))


def test_data_without_a_batch_of_one_sample_is_accepted_with_batch_normalization():
    for data in (
        DataLoader(ROWS, 4, drop_last=True),
        DataLoader(ROWS, 13),
        ArrayData(X.numpy(), Y.numpy(), batch_size=11),
    ):
        assert len(fit(Net(norm=True), data, training=ONCE).history) == ONCE.epochs


# ------------------------------------------------------------------------------------------------ entries of a dict


class WithKeywords(nn.Module):
    """A model that takes any keyword argument."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, input_ids=None, pixel_values=None, **kwargs):
        return self.net(pixel_values)


def test_unknown_entries_give_a_warning_if_there_are_no_targets():
    batch = {"pixel_values": X, "class": Y}
    events = []
    hooks = TrainingHooks(event=events.append)
    distill(WithKeywords(), WithKeywords(), [batch], training=ONCE, check_teacher=False, hooks=hooks)
    sentences = [event["text"] for event in events if event["event"] == "warning"]
    assert any(
        "They contain class, which WithKeywords does not take. If one of these entries holds the targets" in s
        for s in sentences
    )
    with pytest.raises(DataError, match="The data has no targets, and there is no teacher"):
        fit(WithKeywords(), [batch], training=ONCE)


def test_entries_are_passed_as_keyword_arguments():
    assert len(fit(WithKeywords(), [{"pixel_values": X, "labels": Y}], training=ONCE).history) == ONCE.epochs


@pytest.mark.parametrize("data", [(X, Y), [X, Y], (X, X)], ids=["a tuple", "a list", "a tuple of floats"])
def test_a_pair_of_arrays_is_refused_as_data(data):
    with pytest.raises(
        UsageError, match=r"`data` of kirsch\.distill is a (tuple|list) with 2 elements; .*ArrayData\(inputs, targets\)"
    ):
        distill(Net(), Net(), data)
