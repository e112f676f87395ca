"""Comparison of a store with its teacher, and invalid options of a build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distillation.stores import IDS, K, data, network, tiny_store, versioned
from kirsch.distillation.store import Dense, TeacherStore, TopK, specification
from kirsch.distillation.store.record import fields_of
from kirsch.errors import NumericError, StoreError, UsageError


@pytest.mark.parametrize("samples", [1, 7, 42, 1000])
@pytest.mark.parametrize("keep", [TopK(4), Dense()])
def test_stored_and_current_outputs_agree(tmp_path, keep, samples):
    result = tiny_store(tmp_path / "s", keep=keep).check(network(), data(), samples=samples, batch_size=5)
    assert result.agrees
    assert result.samples == min(samples, 42)
    assert result.top1_agreement == 1
    assert max(result.differences.values()) < 2**-10


def test_check_detects_another_teacher(store_folder):
    result = TeacherStore.open(store_folder).check(network(seed=1), data())
    assert not result.agrees
    assert result.top1_agreement < 0.6
    assert result.differences["log_p"] > 0.1


def test_check_detects_a_slightly_changed_record(store_copy):
    store = TeacherStore.open(store_copy)
    path = store_copy / "view-0000-range-000000.bin"
    records = np.memmap(path, store.record_type, "r+", shape=(8,))
    records["log_p"][4, 2] *= np.float16(1.02)
    records.flush()
    result = TeacherStore.open(store_copy).check(network(), data(), samples=42)
    assert not result.agrees
    assert result.differences["tail"] < 2**-10 < 0.015 < result.differences["log_p"] < 0.025


def test_the_error_of_check_names_missing_features(tmp_path):
    model = network().eval()

    @versioned
    def outputs(inputs):
        with torch.no_grad():
            inner = model[:4](torch.from_numpy(inputs))
            return {"logits": model[4](inner), "inner": inner}

    store = tiny_store(tmp_path / "s", model, outputs=outputs)
    message = (
        r"the features \(features: stored {'inner': \(16,\)}, given {}\)\. Pass the values that the store was built"
    )
    with pytest.raises(StoreError, match=message):
        store.check(model, data())
    with pytest.raises(StoreError, match=r"the features \(features: stored {}, given {'inner': \(16,\)}\)"):
        tiny_store(tmp_path / "plain", model).check(model, data(), outputs=outputs)


def test_check_refuses_outputs_of_other_shapes(store_folder):
    store = TeacherStore.open(store_folder)
    with pytest.raises(StoreError, match=r"the number of classes \(classes: stored 12, given 9\)"):
        store.check(network(9), data())
    with pytest.raises(StoreError, match=r"the logits without the classes \(positions: stored \(\), given \(1,\)\)"):
        store.check(network(), data(), outputs=lambda inputs: {"logits": np.zeros((len(inputs), 1, K))})
    with pytest.raises(UsageError, match=r"`samples` .* is 0; expected a whole number of at least 1"):
        store.check(network(), data(), samples=0)


# ------------------------------------------------------------------------------------------------ options and outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "`views` .* is 0; expected a whole number of at least 1"),
        ({"seed": -1}, "`seed` .* is -1; expected a whole number"),
        ({"temperature": 0.0}, "`temperature` .* is 0.0; expected a number above 0"),
        ({"temperature": float("nan")}, "`temperature` .* is nan; expected a finite number"),
        ({"temperature": 2.0, "keep": Dense()}, r"temperature is 2.0, but Dense\(\) stores no probabilities"),
        ({"inputs": data(None), "temperature": 2.0, "keep": Dense()}, "without a transform .*; temperature is 2.0"),
        ({"ranges": (2, 2)}, r"`ranges` is \(2, 2\); expected \(i, n\) with 0 <= i < n"),
        ({"range_size": 0}, "`range_size` .* is 0; expected a whole number of at least 1"),
        ({"inputs": data(views=3)}, "views is 2, and the data has 3"),
        ({"views": 0, "range_size": 0}, "`views` .* is 0; .* `range_size` .* is 0"),
        ({"batch_size": 0}, "`batch_size` .* is 0; expected a whole number of at least 1"),
        ({"keep": TopK(13)}, r"TopK\(13\) needs 13 classes, and there are 12"),
        ({"keep": None}, "The outputs have 'logits', and `keep` is None"),
        ({"outputs": lambda x: {"a": x}}, r"The outputs have no 'logits', and `keep` is TopK\(k=4\)"),
        (
            {"outputs": versioned(lambda x: {"tail": x}), "keep": None},
            "the feature name 'tail' is reserved, as are seed",
        ),
        ({"outputs": lambda x: x}, "The callable `outputs` returned ndarray. Return a dict"),
        ({"outputs": lambda x: {}}, "The callable `outputs` returned an empty dict"),
        ({"outputs": lambda x: {"a": x[:1]}}, r"The output 'a' has shape \(1, 2, 4, 4\) for 3 samples"),
        ({"outputs": lambda x: {"a": x[:, :0]}, "keep": None}, r"has shape \(3, 0, 4, 4\) for 3 samples"),
        (
            {"model": nn.Flatten(0)},
            r"'logits' has shape .* for 3 samples\. .*last axis of 'logits' that of the classes",
        ),
        ({"outputs": lambda x: {"logits": x[:, 0, 0, 0]}}, r"'logits' has shape \(3,\) for 3 samples"),
    ],
)
def test_invalid_options_are_errors_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        tiny_store(tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_record_beyond_the_size_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(specification, "LARGEST_RECORD", 17)
    with pytest.raises(UsageError, match=r"a record has 18 bytes, and the limit is 17; store less"):
        tiny_store(tmp_path / "s")


def test_top_k_needs_a_positive_k():
    with pytest.raises(UsageError, match=r"`k` of .*TopK is 0; expected a whole number of at least 1"):
        TopK(0)


def test_outputs_that_16_bits_cannot_represent_are_errors(tmp_path):
    def outputs(name, value):
        @versioned
        def compute(inputs):
            array = np.zeros((len(inputs), K))
            array[-1, 3] = value
            return {name: array}

        return compute

    with pytest.raises(
        NumericError, match=rf"The teacher's output 'logits' contains NaN or infinity for sample {IDS[2]} in view 0"
    ):
        tiny_store(tmp_path / "a", outputs=outputs("logits", np.nan))
    for value, problem in ((np.inf, "NaN or infinity"), (7e4, "values beyond ±65504")):
        with pytest.raises(NumericError, match=rf"The teacher's output 'inner' contains {problem} for sample"):
            tiny_store(tmp_path / "b", outputs=outputs("inner", value), keep=None)


def test_building_does_not_change_the_teacher(tmp_path):
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tiny_store(tmp_path / "s", model)
    assert model.training
    assert model[2].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_docs_store_md_states_the_size_of_records(tmp_path):
    """Bytes of a record: TopK(k) with i bytes per index, and Dense() with K classes."""
    page = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    assert "| 4 + k (i + 2) + 2 |" in page
    assert "| 4 + 2 K + 4 |" in page
    for k, classes, width in ((1, 10, 1), (10, 1000, 2), (100, 70_000, 4)):
        assert np.dtype(fields_of(TopK(k), classes, (), {})).itemsize == 4 + k * (width + 2) + 2
        assert np.dtype(fields_of(Dense(), classes, (), {})).itemsize == 4 + 2 * classes + 4
