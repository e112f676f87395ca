"""Reading a store returns the teacher's outputs for the requested samples and view, or raises an error.

A record contains the outputs for one view of one sample. A range file contains the records of successive samples.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distillation.stores import AUGMENT, IDS, K, N, data, images, logits_of_view, network, tiny_store, versioned
from kirsch import ops
from kirsch.data.augment import apply, sample_seeds
from kirsch.data.batches import ArrayData
from kirsch.distillation.store import Dense, TeacherStore, TopK, build_store, reading
from kirsch.distillation.store.record import fields_of, index_type, pack_records, values_of
from kirsch.errors import DataError, ShapeError, UsageError


@pytest.mark.parametrize("view", [0, 1])
def test_the_store_contains_the_most_probable_classes_of_each_view(store_folder, view):
    store = TeacherStore.open(store_folder)
    log_p = ops.log_softmax(logits_of_view(network(), 5, view).astype(np.float64))
    order = np.argsort(-log_p, axis=1)
    result = store.read(IDS, view)
    np.testing.assert_array_equal(result["indices"], order[:, :4])
    kept = np.take_along_axis(log_p, order, 1)
    np.testing.assert_allclose(result["log_p"], kept[:, :4], rtol=2**-11, atol=1e-6)
    np.testing.assert_allclose(result["tail"], np.log(np.exp(kept[:, 4:]).sum(1)), rtol=2**-11, atol=1e-6)
    assert {name: (array.dtype, array.shape) for name, array in result.items()} == {
        "indices": (np.uint8, (N, 4)),
        "log_p": (np.float16, (N, 4)),
        "tail": (np.float16, (N,)),
    }


def test_records_are_returned_in_the_order_of_the_ids_with_repetition(store_folder):
    store, all_records = TeacherStore.open(store_folder), TeacherStore.open(store_folder).read(IDS, 1)
    indices = np.array([3, 0, 20, 3, 7])
    for name, array in store.read(IDS[indices], 1).items():
        np.testing.assert_array_equal(array, all_records[name][indices])
        assert array.flags.c_contiguous
    assert len(store.read(np.array([], int), 0)["tail"]) == 0


@pytest.mark.parametrize("mapped", [1, 2, 256])
@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint64])
def test_records_are_found_in_many_range_files_of_which_few_are_memory_mapped(tmp_path, monkeypatch, mapped, kind):
    monkeypatch.setattr(reading, "MAX_MAPPED", mapped)
    store = tiny_store(tmp_path / "many", inputs=data(ids=None), range_size=2)
    single = tiny_store(tmp_path / "single", inputs=data(ids=None), range_size=N)
    indices = np.random.default_rng(3).integers(0, N, 100).astype(kind)
    for view in range(2):
        expected = single.read(indices, view)
        for name, array in store.read(indices, view).items():
            np.testing.assert_array_equal(array, expected[name])


def test_every_training_batch_is_found(store_folder):
    store, model = TeacherStore.open(store_folder), network().eval()
    batches = data(views=2)
    for epoch in range(3):
        for batch in batches.epoch(5, epoch):
            result = store.read(batch.ids, batch.view, sample_seeds(5, batch.view, batch.ids))
            with torch.no_grad():
                logits = model(torch.from_numpy(batch.inputs)).numpy()
            np.testing.assert_array_equal(result["indices"][:, 0], logits.argmax(1))


def test_dense_stores_the_maximum_and_the_differences_of_the_logits_from_it(tmp_path):
    big = nn.Sequential(network(), nn.Linear(K, K))
    with torch.no_grad():
        big[1].bias += 3000  # where adjacent float16 numbers differ by 2
    store = tiny_store(tmp_path / "s", big, keep=Dense())
    logits = logits_of_view(big, 5, 0)
    result = store.read(IDS, 0)
    assert (result["scores"].dtype, result["maximum"].dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(result["maximum"], logits.max(1), rtol=1e-6)
    np.testing.assert_allclose(result["scores"], logits - logits.max(1, keepdims=True), rtol=2**-11, atol=1e-3)
    assert store.record_bytes == 4 + 2 * K + 4


def test_features_are_stored_with_or_without_logits(tmp_path):
    model = network().eval()

    @versioned
    def outputs(inputs):
        with torch.no_grad():
            inner = model[:4](torch.from_numpy(inputs))
            return {"logits": model[4](inner), "inner": inner.to(torch.bfloat16), "maps": inner.reshape(-1, 4, 2, 2)}

    store = tiny_store(tmp_path / "both", model, outputs=outputs)
    result = store.read(IDS, 1)
    seen = apply(AUGMENT, images(), sample_seeds(5, 1, IDS))
    with torch.no_grad():
        inner = model[:4](torch.from_numpy(seen)).numpy()
    np.testing.assert_allclose(result["inner"], inner, atol=2**-8)
    np.testing.assert_allclose(result["maps"], inner.reshape(-1, 4, 2, 2), atol=2**-11)
    np.testing.assert_array_equal(result["indices"], tiny_store(tmp_path / "plain", model).read(IDS, 1)["indices"])
    assert store.record_bytes == 4 + 4 * 3 + 2 + 2 * 16 + 2 * 16
    assert store.check(model, data(), outputs=outputs).agrees

    @versioned
    def features(inputs):
        return {"inner": outputs(inputs)["inner"]}

    only = tiny_store(tmp_path / "only", model, outputs=features, keep=None)
    assert only.read(IDS, 1).keys() == {"inner"}
    assert only.check(model, data(), outputs=features).top1_agreement is None


def test_every_position_of_a_sequence_is_stored(tmp_path):
    words = np.random.default_rng(0).integers(0, 50, (6, 5))
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 300))
    store = build_store(tmp_path / "s", model, ArrayData(words, None), keep=TopK(3), temperature=2.0)
    with torch.no_grad():
        log_p = (model(torch.from_numpy(words)) / 2).log_softmax(-1).numpy()
    result = store.read(np.arange(6))
    assert result["indices"].dtype == np.uint16
    assert (result["indices"].shape, result["tail"].shape) == ((6, 5, 3), (6, 5))
    np.testing.assert_array_equal(result["indices"], np.argsort(-log_p, -1)[..., :3])
    np.testing.assert_allclose(result["log_p"], -np.sort(-log_p, -1)[..., :3], rtol=2**-10)
    assert store.check(model, ArrayData(words, None)).agrees


@pytest.mark.parametrize(("classes", "size"), [(200, 1), (256, 1), (257, 2), (300, 2)])
def test_indices_use_the_smallest_sufficient_type(tmp_path, classes, size):
    store = tiny_store(tmp_path / "s", network(classes), keep=TopK(10))
    assert store.record_bytes == 4 + 10 * (size + 2) + 2
    sizes = [path.stat().st_size for path in (tmp_path / "s").glob("view-0001-*.bin")]
    assert sum(sizes) == N * store.record_bytes + 32 * len(sizes)
    assert store.read(IDS, 1)["indices"].dtype.itemsize == size
    logits = logits_of_view(network(classes), 5, 1)
    np.testing.assert_array_equal(store.read(IDS, 1)["indices"][:, 0], logits.argmax(1))


def test_the_last_classes_of_a_large_vocabulary_are_stored(tmp_path):
    assert [index_type(classes) for classes in (65_536, 65_537, 2**32)] == ["<u2", "<u4", "<u4"]
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 70_000))
    with torch.no_grad():
        model[1].bias[69_990:] += 50
    store = build_store(tmp_path / "s", model, data(None), keep=TopK(5))
    result = store.read(IDS)["indices"]
    assert result.dtype == np.uint32
    assert (result >= 69_990).all()
    assert store.record_bytes == 4 + 5 * 6 + 2


def test_the_probability_of_the_tail_is_0_if_all_classes_are_kept(tmp_path):
    tail = tiny_store(tmp_path / "s", keep=TopK(K)).read(IDS)["tail"]
    assert (tail == -65504).all()
    assert not np.exp(tail.astype(np.float64)).any()


def test_records_of_extreme_logits_are_finite():
    scores = np.array([[0.0, -1e6, 3e5, -np.float32(3e38)]], np.float32)
    for keep in (TopK(1), TopK(3), TopK(4), Dense()):
        fields = fields_of(keep, 4, (), {})
        record = pack_records(np.dtype(fields), values_of(keep, {"logits": scores}, 1.0), np.zeros(1, np.uint64))
        assert all(np.isfinite(record[name]).all() for name in record.dtype.names)


def test_classes_with_equal_logits_are_stored_in_ascending_order():
    result = values_of(TopK(3), {"logits": np.zeros((2, 3), np.float32)}, 1.0)
    assert result["indices"].tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(result["log_p"], -np.log(3), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 20.0])
def test_the_divergence_from_stored_outputs_has_the_rounding_error_of_16_bits(temperature, sharpness):
    """A relative error of 2⁻¹¹ in log p changes p (log p - log q) by at most p |log p| 2⁻¹¹ (|log p - log q| + 1)."""
    random = np.random.default_rng(2)
    teacher, student = (sharpness * random.standard_normal((64, 50)) for _ in range(2))
    kind = np.dtype(fields_of(TopK(6), 50, (), {}))
    record = pack_records(kind, values_of(TopK(6), {"logits": teacher}, temperature), np.zeros(64, np.uint64))
    log_t, log_s = ops.log_softmax(teacher / temperature), ops.log_softmax(student / temperature)

    def with_tail(log_p, indices):
        inside = np.take_along_axis(log_p, indices, 1)
        outside = log_p.copy()
        np.put_along_axis(outside, indices, -np.inf, 1)
        return np.concatenate([inside, np.logaddexp.reduce(outside, 1)[:, None]], 1)

    exact_t, exact_s = (with_tail(log_p, np.argsort(-log_t, 1)[:, :6]) for log_p in (log_t, log_s))
    stored_t = np.concatenate([record["log_p"], record["tail"][:, None]], 1).astype(np.float64)
    stored_s = with_tail(log_s, record["indices"].astype(int))
    exact = (np.exp(exact_t) * (exact_t - exact_s)).sum(1)
    stored = (np.exp(stored_t) * (stored_t - stored_s)).sum(1)
    error = np.abs(exact_t) * 2.0**-11 + 2.0**-24
    bound = (np.exp(exact_t) * error * (np.abs(exact_t - exact_s) + 1)).sum(1)
    assert (np.abs(stored - exact) <= 1.1 * bound + 1e-6).all()
    assert abs(stored.mean() - exact.mean()) < 5e-4 * max(1, exact.mean())


# ------------------------------------------------------------------------------------------------ errors in reading


def test_the_error_names_a_sample_that_is_not_in_the_store(store_folder, tmp_path):
    store = TeacherStore.open(store_folder)
    with pytest.raises(DataError, match=r"Sample 5000 is not in the store .*The store has 21 samples"):
        store.read(np.array([IDS[0], 5000]), 0)
    store = tiny_store(tmp_path / "s", inputs=data(ids=None))
    assert not (tmp_path / "s" / "ids.bin").exists()
    for sample in (-1, N):
        with pytest.raises(DataError, match=f"Sample {sample} is not in the store"):
            store.read(np.array([0, sample]), 0)


def test_the_error_names_a_view_that_is_not_in_the_store(store_folder):
    with pytest.raises(DataError, match=r"View 2 is not in the store .*, which has the views 0 to 1\. .*views=2\)"):
        TeacherStore.open(store_folder).read(IDS, 2)
    with pytest.raises(UsageError, match=r"`view` .* is -1; expected a whole number of at least 0"):
        TeacherStore.open(store_folder).read(IDS, -1)


def test_views_with_other_augmentation_seeds_are_refused(store_folder):
    store = TeacherStore.open(store_folder)
    store.read(IDS, 1, sample_seeds(5, 1, IDS))
    for seed, view in ((6, 1), (5, 0)):
        with pytest.raises(DataError, match=r"was augmented differently for the teacher\. .*with the seed 5"):
            store.read(IDS, 1, sample_seeds(seed, view, IDS))
    with pytest.raises(ShapeError, match="There are 21 ids and 20 seeds"):
        store.read(IDS, 1, sample_seeds(5, 1, IDS[1:]))


def test_ids_that_are_not_integers_are_refused(store_folder):
    with pytest.raises(DataError, match=r"The ids have shape \(2,\) and type float64"):
        TeacherStore.open(store_folder).read(np.array([1.0, 2.0]))


def test_without_a_transform_every_view_is_the_same(tmp_path):
    store = tiny_store(tmp_path / "s", inputs=data(None), views=1)
    batches = list(data(None).epoch(seed=99, epoch=7))
    for batch in batches:
        result = store.read(batch.ids, batch.view, sample_seeds(99, 7, batch.ids))
        np.testing.assert_array_equal(result["tail"], store.read(batch.ids)["tail"])
    with pytest.raises(UsageError, match="views is 2, but without a transform all views are equal"):
        tiny_store(tmp_path / "two", inputs=data(None))
