"""Teacher outputs on disk: what is read is what the teacher said of that very look of the sample, or an error."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kirsch import files
from kirsch.distillation.arrays import log_softmax
from kirsch.distillation.store import Dense, TeacherStore, TopK, build, building, finish, specification
from kirsch.distillation.store.record import fields_of, index_type, packed, record_type, values
from kirsch.distillation.store.specification import SAID
from kirsch.errors import DataError, NumericError, OutputError, ShapeError, StoreError, UsageError
from kirsch.frameworks.augment import Chain, Crop, Flip, Noise, apply, sample_seeds
from kirsch.frameworks.data import ArrayData

N, K = 21, 12
SHAKEN = Chain(Crop(1), Flip(), Noise(0.3))
IDS = np.random.default_rng(1).permutation(1000)[:N] - 200


def images(count=N):
    return np.random.default_rng(0).standard_normal((count, 2, 4, 4)).astype(np.float32)


def data(transform=SHAKEN, ids=IDS, **options):
    return ArrayData(images(), None, 4, transform, ids, **options)


def network(classes=K, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, classes))


def scores_of(model, seed, view, places=slice(None)):
    """What the model says of the samples as this view shows them, without a store."""
    seen = apply(SHAKEN, images()[places], sample_seeds(seed, view, IDS[places]))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(seen)).numpy()


def built(folder, model=None, given=None, **options):
    options = {"keep": TopK(4), "views": 2, "seed": 5, "range_size": 8, "batch_size": 3} | options
    return build(folder, network() if model is None else model, data() if given is None else given, **options)


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "store.lock"
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished store that no test changes."""
    folder = tmp_path_factory.mktemp("store") / "made"
    built(folder)
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A finished store to break."""
    shutil.copytree(made, tmp_path / "copied")
    return tmp_path / "copied"


def change(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


# ------------------------------------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("view", [0, 1])
def test_the_store_holds_the_most_likely_classes_of_each_look(made, view):
    store = TeacherStore.open(made)
    log_p = log_softmax(scores_of(network(), 5, view).astype(np.float64))
    order = np.argsort(-log_p, axis=1)
    found = store.read(IDS, view)
    np.testing.assert_array_equal(found["indices"], order[:, :4])
    kept = np.take_along_axis(log_p, order, 1)
    np.testing.assert_allclose(found["log_p"], kept[:, :4], rtol=2**-11, atol=1e-6)
    np.testing.assert_allclose(found["tail"], np.log(np.exp(kept[:, 4:]).sum(1)), rtol=2**-11, atol=1e-6)
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        "indices": (np.uint8, (N, 4)),
        "log_p": (np.float16, (N, 4)),
        "tail": (np.float16, (N,)),
    }


def test_records_come_in_the_order_asked_and_as_often_as_asked(made):
    store, whole = TeacherStore.open(made), TeacherStore.open(made).read(IDS, 1)
    places = np.array([3, 0, 20, 3, 7])
    for name, array in store.read(IDS[places], 1).items():
        np.testing.assert_array_equal(array, whole[name][places])
        assert array.flags.c_contiguous
    assert len(store.read(np.array([], int), 0)["tail"]) == 0


def test_a_training_finds_each_of_its_batches(made):
    store, model = TeacherStore.open(made), network().eval()
    batches = data(views=2)
    for epoch in range(3):
        for batch in batches.epoch(5, epoch):
            found = store.read(batch.ids, batch.view, sample_seeds(5, batch.view, batch.ids))
            with torch.no_grad():
                live = model(torch.from_numpy(batch.inputs)).numpy()
            np.testing.assert_array_equal(found["indices"][:, 0], live.argmax(1))


def test_dense_scores_come_back_with_their_maximum(tmp_path):
    big = nn.Sequential(network(), nn.Linear(K, K))
    with torch.no_grad():
        big[1].bias += 3000  # where 16 bits are two apart
    store = built(tmp_path / "s", big, keep=Dense())
    live = scores_of(big, 5, 0)
    found = store.read(IDS, 0)
    assert (found["scores"].dtype, found["maximum"].dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(found["maximum"], live.max(1), rtol=1e-6)
    np.testing.assert_allclose(found["scores"], live - live.max(1, keepdims=True), rtol=2**-11, atol=1e-3)
    assert store.record_bytes == 4 + 2 * K + 4


def test_features_are_kept_beside_or_without_scores(tmp_path):
    model = network().eval()

    def outputs(inputs):
        with torch.no_grad():
            inner = model[:4](torch.from_numpy(inputs))
            return {"logits": model[4](inner), "inner": inner.to(torch.bfloat16), "maps": inner.reshape(-1, 4, 2, 2)}

    store = built(tmp_path / "both", model, outputs=outputs)
    found = store.read(IDS, 1)
    seen = apply(SHAKEN, images(), sample_seeds(5, 1, IDS))
    with torch.no_grad():
        inner = model[:4](torch.from_numpy(seen)).numpy()
    np.testing.assert_allclose(found["inner"], inner, atol=2**-8)
    np.testing.assert_allclose(found["maps"], inner.reshape(-1, 4, 2, 2), atol=2**-11)
    np.testing.assert_array_equal(found["indices"], built(tmp_path / "plain", model).read(IDS, 1)["indices"])
    assert store.record_bytes == 4 + 4 * 3 + 2 + 2 * 16 + 2 * 16
    assert store.check(model, data(), outputs=outputs).agrees

    def features(inputs):
        return {"inner": outputs(inputs)["inner"]}

    only = built(tmp_path / "only", model, outputs=features, keep=None)
    assert only.read(IDS, 1).keys() == {"inner"}
    assert only.check(model, data(), outputs=features).top1_agreement is None


def test_positions_of_sequences_are_kept_each(tmp_path):
    words = np.random.default_rng(0).integers(0, 50, (6, 5))
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 300))
    store = build(tmp_path / "s", model, ArrayData(words, None), keep=TopK(3), temperature=2.0)
    with torch.no_grad():
        log_p = (model(torch.from_numpy(words)) / 2).log_softmax(-1).numpy()
    found = store.read(np.arange(6))
    assert found["indices"].dtype == np.uint16
    assert (found["indices"].shape, found["tail"].shape) == ((6, 5, 3), (6, 5))
    np.testing.assert_array_equal(found["indices"], np.argsort(-log_p, -1)[..., :3])
    np.testing.assert_allclose(found["log_p"], -np.sort(-log_p, -1)[..., :3], rtol=2**-10)
    assert store.check(model, ArrayData(words, None)).agrees


@pytest.mark.parametrize(("classes", "kind", "size"), [(200, "u1", 1), (256, "u1", 1), (257, "u2", 2), (300, "u2", 2)])
def test_indices_are_as_wide_as_the_classes_need(tmp_path, classes, kind, size):
    assert index_type(classes) == kind
    store = built(tmp_path / "s", network(classes), keep=TopK(10))
    assert store.record_bytes == 4 + 10 * (size + 2) + 2
    assert (tmp_path / "s" / "view-0001.bin").stat().st_size == N * store.record_bytes
    live = scores_of(network(classes), 5, 1)
    np.testing.assert_array_equal(store.read(IDS, 1)["indices"][:, 0], live.argmax(1))


def test_a_wide_vocabulary_keeps_its_last_words(tmp_path):
    assert [index_type(classes) for classes in (65_536, 65_537, 2**32)] == ["u2", "u4", "u4"]
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 70_000))
    with torch.no_grad():
        model[1].bias[69_990:] += 50
    store = build(tmp_path / "s", model, data(None), keep=TopK(5))
    found = store.read(IDS)["indices"]
    assert found.dtype == np.uint32
    assert (found >= 69_990).all()
    assert store.record_bytes == 4 + 5 * 6 + 2


def test_all_classes_may_be_kept_and_then_nothing_remains(tmp_path):
    tail = built(tmp_path / "s", keep=TopK(K)).read(IDS)["tail"]
    assert (tail == -65504).all()
    assert not np.exp(tail.astype(np.float64)).any()


def test_scores_of_any_size_stay_finite():
    scores = np.array([[0.0, -1e6, 3e5, -np.float32(3e38)]], np.float32)
    for keep in (TopK(1), TopK(3), TopK(4), Dense()):
        fields = fields_of(keep, {"logits": scores})
        record = packed(fields, values(keep, {"logits": scores}, 1.0), np.zeros(1, np.uint64))
        assert all(np.isfinite(record[name]).all() for name in record.dtype.names)


def test_classes_that_are_alike_come_in_their_order():
    found = values(TopK(3), {"logits": np.zeros((2, 3), np.float32)}, 1.0)
    assert found["indices"].tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(found["log_p"], -np.log(3), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 20.0])
def test_the_divergence_from_the_store_is_exact_up_to_the_rounding_of_16_bits(temperature, sharpness):
    """A relative error of 2⁻¹¹ in log p moves p (log p - log q) by p |log p| 2⁻¹¹ (|log p - log q| + 1) at most."""
    random = np.random.default_rng(2)
    teacher, student = (sharpness * random.standard_normal((64, 50)) for _ in range(2))
    fields = fields_of(TopK(6), {"logits": teacher})
    record = packed(fields, values(TopK(6), {"logits": teacher}, temperature), np.zeros(64, np.uint64))
    log_t, log_s = log_softmax(teacher / temperature), log_softmax(student / temperature)

    def buckets(log_p, indices):
        inside = np.take_along_axis(log_p, indices, 1)
        outside = log_p.copy()
        np.put_along_axis(outside, indices, -np.inf, 1)
        return np.concatenate([inside, np.logaddexp.reduce(outside, 1)[:, None]], 1)

    exact_t, exact_s = (buckets(log_p, np.argsort(-log_t, 1)[:, :6]) for log_p in (log_t, log_s))
    stored_t = np.concatenate([record["log_p"], record["tail"][:, None]], 1).astype(np.float64)
    stored_s = buckets(log_s, record["indices"].astype(int))
    exact = (np.exp(exact_t) * (exact_t - exact_s)).sum(1)
    stored = (np.exp(stored_t) * (stored_t - stored_s)).sum(1)
    apart = np.abs(exact_t) * 2.0**-11 + 2.0**-24
    bound = (np.exp(exact_t) * apart * (np.abs(exact_t - exact_s) + 1)).sum(1)
    assert (np.abs(stored - exact) <= 1.1 * bound + 1e-6).all()
    assert abs(stored.mean() - exact.mean()) < 5e-4 * max(1, exact.mean())


# ------------------------------------------------------------------------------------------------ refused at reading


def test_a_sample_that_is_not_there_is_named(made, tmp_path):
    store = TeacherStore.open(made)
    with pytest.raises(DataError, match=r"Sample 5000 is not in the store .*It holds 21 samples"):
        store.read(np.array([IDS[0], 5000]), 0)
    counted = built(tmp_path / "s", given=data(ids=None))
    assert not (tmp_path / "s" / "ids.bin").exists()
    for wrong in (-1, N):
        with pytest.raises(DataError, match=f"Sample {wrong} is not in the store"):
            counted.read(np.array([0, wrong]), 0)


def test_a_view_that_is_not_there_is_named(made):
    with pytest.raises(DataError, match=r"has the views 0 to 1; view 2 is asked for\. .*views=2\)"):
        TeacherStore.open(made).read(IDS, 2)
    with pytest.raises(UsageError, match=r"`view` .* is -1; expected a whole number of at least 0"):
        TeacherStore.open(made).read(IDS, -1)


def test_a_look_that_the_teacher_did_not_see_is_refused(made):
    store = TeacherStore.open(made)
    store.read(IDS, 1, sample_seeds(5, 1, IDS))
    for seed, view in ((6, 1), (5, 0)):
        with pytest.raises(DataError, match=r"was augmented otherwise when the teacher saw it\. .*that of the seed 5"):
            store.read(IDS, 1, sample_seeds(seed, view, IDS))
    with pytest.raises(ShapeError, match="There are 21 ids and 20 seeds"):
        store.read(IDS, 1, sample_seeds(5, 1, IDS[1:]))


def test_ids_are_whole_numbers(made):
    with pytest.raises(DataError, match=r"The ids have shape \(2,\) and type float64"):
        TeacherStore.open(made).read(np.array([1.0, 2.0]))


def test_without_a_transform_one_view_stands_for_all(tmp_path):
    store = built(tmp_path / "s", given=data(None), views=1)
    batches = list(data(None).epoch(seed=99, epoch=7))
    for batch in batches:
        found = store.read(batch.ids, batch.view, sample_seeds(99, 7, batch.ids))
        np.testing.assert_array_equal(found["tail"], store.read(batch.ids)["tail"])
    with pytest.raises(UsageError, match="views is 2, but without a transform all views are the same"):
        built(tmp_path / "two", given=data(None))


# ------------------------------------------------------------------------------------------------ building in pieces


class EnoughError(Exception):
    pass


def test_a_build_that_is_stopped_goes_on_and_ends_in_the_same_bits(made, tmp_path):
    folder, seen = tmp_path / "s", []
    for wanted in range(1, 6):
        with pytest.raises(EnoughError):
            built(folder, event=seen.append, stop=EnoughError)
        assert len(seen) == wanted
        with pytest.raises(StoreError, match=rf"is partial\. {6 - wanted} of 6 ranges are missing"):
            TeacherStore.open(folder)
        with pytest.raises(StoreError, match="is partial"):
            finish(folder)
    built(folder, event=seen.append)
    assert [(e["view"], e["range"]) for e in seen] == [(v, r) for v in range(2) for r in range(3)]
    assert content(folder) == content(made)


def test_a_partial_store_says_what_is_missing_first(tmp_path):
    with pytest.raises(EnoughError):
        built(tmp_path, stop=EnoughError)
    with pytest.raises(StoreError, match=r"the first of view 0, samples 8 to 15\. Build it again with the same arg"):
        TeacherStore.open(tmp_path)


def test_a_built_store_is_not_built_again(copied):
    before = content(copied)
    built(copied, event=lambda event: pytest.fail("nothing is left to do"))
    assert content(copied) == before


def test_the_size_of_batches_and_ranges_does_not_change_the_records(made, tmp_path):
    other = built(tmp_path / "s", batch_size=256, range_size=None)
    for name, array in other.read(IDS, 1).items():
        wanted = TeacherStore.open(made).read(IDS, 1)[name]
        np.testing.assert_allclose(array.astype(float), wanted.astype(float), rtol=2**-10)


def test_ranges_have_at_most_64_mebibytes(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 2**20))
    with pytest.raises(EnoughError):
        build(tmp_path, model, data(None), keep=Dense(), stop=EnoughError, batch_size=4)
    assert json.loads((tmp_path / "building.json").read_text())["range_size"] == 31


PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}]
import test_store as t
from kirsch import files
from kirsch.distillation.store import building
folder, plant = Path(sys.argv[1]), sys.argv[2]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after(count, function, early=False):
    left = [count]

    def counted(*given, **options):
        left[0] -= 1
        if early and left[0] == 0:
            die()
        found = function(*given, **options)
        if left[0] == 0:
            die()
        return found

    return counted


if plant == "in a range":
    building.packed = after(5, building.packed)
elif plant == "before a range has its name":
    os.fsync = after(6, os.fsync)
elif plant == "before the views are made":
    building.finish = after(1, building.finish, early=True)
elif plant == "between two views":
    building._finish_view = after(1, building._finish_view)
elif plant == "before the ranges of a view are removed":
    building.shutil.rmtree = after(1, building.shutil.rmtree, early=True)
elif plant == "before the manifest":
    building._finish_view = after(2, building._finish_view)
elif plant == "after the manifest":
    building.shutil.rmtree = after(3, building.shutil.rmtree, early=True)
share = tuple(int(part) for part in plant.split("/")) if "/" in plant else (0, 1)
t.built(folder, ranges=share)
"""


def start(folder, plant):
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", program, str(folder), plant], env=environment)


@pytest.mark.parametrize(
    "plants",
    [
        ["in a range", "before a range has its name", "before the views are made"],
        ["between two views"],
        ["before the ranges of a view are removed", "before the manifest"],
        ["after the manifest"],
    ],
    ids=lambda plants: plants[0],
)
def test_a_build_that_is_killed_goes_on_and_ends_in_the_same_bits(made, tmp_path, plants):
    for plant in plants:
        assert start(tmp_path / "s", plant).wait() == -signal.SIGKILL
        if plant != "after the manifest":
            with pytest.raises(StoreError, match=r"is partial|is not finished\. All its ranges are built"):
                TeacherStore.open(tmp_path / "s")
    if plants == ["after the manifest"]:
        TeacherStore.open(tmp_path / "s").verify()
        finish(tmp_path / "s")
    built(tmp_path / "s").verify()
    found, wanted = content(tmp_path / "s"), content(made)
    assert {name: found[name] for name in wanted} == wanted
    assert not list((tmp_path / "s").rglob(f"{files.TEMPORARY}*"))


def test_processes_share_a_build(made, tmp_path):
    folder = tmp_path / "s"
    running = [start(folder, f"{share}/2") for share in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert not (folder / "manifest.json").exists()
    with pytest.raises(StoreError, match=r"is not finished\. All its ranges are built\. Finish it"):
        TeacherStore.open(folder)
    finish(folder).verify()
    assert content(folder) == content(made)


def test_shares_do_not_overlap(tmp_path):
    seen = []
    for share in range(3):
        assert built(tmp_path, ranges=(share, 3), event=seen.append) is None
    assert sorted((e["view"], e["range"]) for e in seen) == [(v, r) for v in range(2) for r in range(3)]
    finish(tmp_path).verify()
    assert built(tmp_path, ranges=(0, 3)) is None


def test_processes_with_other_teachers_do_not_share_a_build(tmp_path):
    built(tmp_path, ranges=(0, 2))
    with pytest.raises(StoreError, match=r"holds another store\. It differs in the teacher's weights \(teacher_sha256"):
        built(tmp_path, network(seed=1), ranges=(1, 2))


def test_a_range_that_was_damaged_before_the_end_is_named(tmp_path):
    built(tmp_path, ranges=(0, 2))
    built(tmp_path, ranges=(1, 2))
    path = tmp_path / "parts" / "view-0001" / "range-000002.bin"
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    with pytest.raises(StoreError, match=r"range-000002.bin is damaged.*Remove it, build again"):
        finish(tmp_path)
    path.unlink()
    built(tmp_path).verify()


def test_a_view_that_was_damaged_before_the_manifest_is_named(made, tmp_path, monkeypatch):
    """The hashes are those of what was built, and not of what is found when the build goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(building.files, "write_text", stopped_at("manifest.json"))
        with pytest.raises(EnoughError):
            built(tmp_path / "s")
    path = tmp_path / "s" / "view-0001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes([whole[50] ^ 64]) + whole[51:])
    with pytest.raises(StoreError, match=r"view-0001.bin is damaged.*Remove it, build again"):
        built(tmp_path / "s")
    path.unlink()
    built(tmp_path / "s").verify()
    assert content(tmp_path / "s") == content(made)


def stopped_at(name):
    real = files.write_text

    def write(path, text):
        if path.name == name:
            raise EnoughError
        real(path, text)

    return write


def test_a_process_that_another_overtakes_ends_well(made, tmp_path, monkeypatch):
    def overtaken(*given):
        monkeypatch.setattr(building, "packed", packed)
        built(tmp_path / "s")
        return packed(*given)

    monkeypatch.setattr(building, "packed", overtaken)
    built(tmp_path / "s").verify()
    assert content(tmp_path / "s") == content(made)


def test_only_one_process_finishes(tmp_path):
    import filelock

    built(tmp_path, ranges=(0, 2))
    with filelock.FileLock(tmp_path / "store.lock"), pytest.raises(OutputError, match="finished by another process"):
        finish(tmp_path)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    real, left = os.fsync, [4]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"cannot be written\. No space left on device\. Free space"):
            built(tmp_path / "s")
    assert not list(tmp_path.rglob(f"{files.TEMPORARY}*"))
    built(tmp_path / "s").verify()


def test_room_is_looked_for_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
    with pytest.raises(OutputError, match=r"has 0 MB free; the work needs about"):
        built(tmp_path / "s")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file"):
        built(tmp_path / "file")


# ------------------------------------------------------------------------------------------------ stale and damaged


def test_a_store_that_fits_is_let_through(made):
    store = TeacherStore.open(made)
    store.require(teacher=network().train(), data=data(), temperature=1.0, seed=5)
    store.require(data=data(views=2))
    store.require()


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"teacher": network(seed=1)}, ["the teacher's weights (teacher_sha256"]),
        ({"data": data(ids=IDS[::-1].copy())}, ["the data (inputs and ids) (data_sha256"]),
        ({"data": ArrayData(images() + 1, None, 4, SHAKEN, IDS)}, ["the data (inputs and ids) (data_sha256"]),
        ({"data": data(Flip())}, ["the transform (transform_sha256"]),
        ({"data": data(None)}, ["the transform (transform_sha256"]),
        ({"data": data(views=3)}, ["the number of views (views: stored 2, given 3)"]),
        ({"temperature": 4.0}, ["the temperature (temperature: stored 1.0, given 4.0)"]),
        ({"seed": 6}, ["the seed of the augmentation (seed: stored 5, given 6)"]),
        ({"teacher": network(seed=1), "seed": 6}, ["the teacher's weights", "the seed of the augmentation"]),
    ],
)
def test_a_stale_store_says_what_differs_and_nothing_else(made, asked, names):
    with pytest.raises(StoreError, match=r"is stale\. It was built with another value of") as caught:
        TeacherStore.open(made).require(**asked)
    said = [word for word in SAID.values() if f"{word} (" in str(caught.value)]
    assert len(said) == len(names)
    assert all(name in str(caught.value) for name in names)


def test_a_store_is_not_built_over_another(copied):
    for options, word in (
        (
            {"keep": TopK(5)},
            r"the fields of a record \(fields: stored seed u4, indices 4 × u1, log_p 4 × f2, tail f2, given s",
        ),
        ({"keep": Dense()}, r"what is kept \(keep: stored top-k, given dense\)"),
        ({"temperature": 2.0}, "the temperature"),
        ({"seed": 6}, "the seed"),
        ({"views": 1}, "the number of views"),
        ({"given": data(Flip())}, "the transform"),
        ({"outputs": lambda inputs: {"logits": np.zeros((len(inputs), K))}}, "the callable that gives the outputs"),
    ):
        with pytest.raises(StoreError, match=rf"holds another store\. It differs in .*{word}.*Choose another folder"):
            built(copied, **options)
    TeacherStore.open(copied).verify()


@pytest.mark.parametrize("place", [0, 3, 200, -1])
def test_a_flipped_bit_is_seen_and_its_samples_are_named(copied, place):
    path = copied / "view-0001.bin"
    store = TeacherStore.open(copied)
    store.verify()
    whole = bytearray(path.read_bytes())
    whole[place] ^= 4
    path.write_bytes(whole)
    number = (place % len(whole)) // (8 * store.record_bytes)
    samples = f"samples {8 * number} to {min(8 * number + 7, N - 1)}"
    with pytest.raises(StoreError, match=rf"is damaged\. view-0001.bin \({samples}\) does not have the sha256"):
        TeacherStore.open(copied).verify()


def test_many_damaged_ranges_are_counted(copied):
    for view in range(2):
        path = copied / f"view-000{view}.bin"
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StoreError, match=r"view-0001.bin \(samples 0 to 7\), and 2 more does not"):
        TeacherStore.open(copied).verify()


def test_records_of_other_samples_are_seen_at_reading(copied):
    path = copied / "view-0000.bin"
    size = len(path.read_bytes()) // N
    path.write_bytes(path.read_bytes()[size:] + path.read_bytes()[:size])
    with pytest.raises(StoreError, match=rf"the record of sample {IDS[0]} in view 0 has the seed of another"):
        TeacherStore.open(copied).read(IDS, 0)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda f: (f / "view-0001.bin").unlink(), "view-0001.bin is missing"),
        (lambda f: (f / "view-0001.bin").write_bytes(b"1234"), "view-0001.bin has 4 bytes; the manifest speaks of 378"),
        (lambda f: (f / "ids.bin").unlink(), "ids.bin is missing"),
        (lambda f: (f / "ids.bin").write_bytes(bytes(8 * N)), "ids.bin does not have the sha256 of the manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").unlink(), "holds no store"),
        (lambda f: change(f, kirsch_store=2), "manifest.json is damaged.*kirsch_store"),
        (lambda f: change(f, kirsch_store=True), "manifest.json is damaged.*kirsch_store"),
        (lambda f: change(f, temperature=True), "temperature: "),
        (lambda f: change(f, augmented="yes"), "augmented: "),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace("{", '{"seed": 1,', 1)
            ),
            "manifest.json is damaged.*the key 'seed' is given twice",
        ),
        (lambda f: change(f, samples=10**9), "sha256: 2 views of 125000000 ranges each are needed"),
        (lambda f: change(f, samples=2**80), "samples: "),
        (lambda f: change(f, samples=-1), "samples: "),
        (lambda f: change(f, samples=True), "samples: "),
        (lambda f: change(f, samples="21"), "samples: "),
        (lambda f: change(f, samples=20), "has 378 bytes; the manifest speaks of 360"),
        (lambda f: change(f, views=10**9), "views: "),
        (lambda f: change(f, views=1), "sha256: 1 views of 3 ranges"),
        (lambda f: change(f, range_size=0), "range_size: "),
        (lambda f: change(f, temperature=0), "temperature: "),
        (lambda f: change(f, keep="all"), "keep: "),
        (lambda f: change(f, keep="dense"), "fields: scores, maximum are needed"),
        (lambda f: change(f, sha256=[["../../etc/passwd"] * 3] * 2), "sha256.0.0: "),
        (lambda f: change(f, path="../elsewhere"), "path: "),
        (lambda f: change(f, fields=[]), "fields: "),
        (lambda f: change(f, fields=[{"name": "seed", "type": "O", "shape": []}]), "fields.0.type: "),
        (
            lambda f: change(f, fields=[{"name": "tail", "type": "f2", "shape": []}]),
            "they must differ in name and begin",
        ),
        (
            lambda f: change(f, keep=None, fields=fields_with([2**40] * 8)),
            "a record has .* bytes; 2147483647 is the most",
        ),
        (lambda f: change(f, keep=None, fields=fields_with([2**41])), "fields.1.shape.0: "),
        (lambda f: change(f, keep=None, fields=fields_with([-1])), "fields.1.shape.0: "),
    ],
)
def test_a_damaged_or_hostile_store_is_refused(copied, harm, sentence):
    harm(copied)
    with pytest.raises(StoreError, match=sentence):
        TeacherStore.open(copied)


def fields_with(shape):
    return [{"name": "seed", "type": "u4", "shape": []}, {"name": "x", "type": "f2", "shape": shape}]


def test_a_view_that_leads_out_of_the_folder_is_refused(copied, tmp_path):
    (copied / "view-0000.bin").rename(tmp_path / "elsewhere.bin")
    (copied / "view-0000.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(StoreError, match=r"view-0000.bin leads out of the folder"):
        TeacherStore.open(copied)


def test_a_store_may_be_moved(copied, tmp_path):
    wanted = TeacherStore.open(copied).read(IDS)["tail"]
    copied.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for place in ("moved", "link"):
        np.testing.assert_array_equal(TeacherStore.open(tmp_path / place).read(IDS)["tail"], wanted)


def test_a_folder_without_a_store_is_named(tmp_path):
    for attempt in (TeacherStore.open, finish):
        with pytest.raises(StoreError, match=r"holds no store\. Build one"):
            attempt(tmp_path)


# ------------------------------------------------------------------------------------------------ stored against live


@pytest.mark.parametrize("samples", [1, 7, 42, 1000])
@pytest.mark.parametrize("keep", [TopK(4), Dense()])
def test_stored_and_live_outputs_agree(tmp_path, keep, samples):
    found = built(tmp_path / "s", keep=keep).check(network(), data(), samples=samples, batch_size=5)
    assert found.agrees
    assert found.samples == min(samples, 42)
    assert found.top1_agreement == 1
    assert max(found.differences.values()) < 2**-10


def test_another_teacher_is_seen_by_the_check(made):
    found = TeacherStore.open(made).check(network(seed=1), data())
    assert not found.agrees
    assert found.top1_agreement < 0.6
    assert found.differences["log_p"] > 0.1


def test_a_slightly_changed_record_is_seen_by_the_check(copied):
    store = TeacherStore.open(copied)
    records = np.fromfile(copied / "view-0000.bin", store.manifest.record_type)
    records["log_p"][4, 2] *= np.float16(1.02)
    records.tofile(copied / "view-0000.bin")
    found = TeacherStore.open(copied).check(network(), data(), samples=42)
    assert not found.agrees
    assert found.differences["tail"] < 2**-10 < 0.015 < found.differences["log_p"] < 0.025


def test_features_that_the_check_is_not_given_are_named(tmp_path):
    model = network().eval()

    def outputs(inputs):
        with torch.no_grad():
            inner = model[:4](torch.from_numpy(inputs))
            return {"logits": model[4](inner), "inner": inner}

    store = built(tmp_path / "s", model, outputs=outputs)
    sentence = (
        r"features: stored 'inner' of shape \(16,\), live none\. Give .*store\.check\(teacher, data, outputs=\.\.\.\)"
    )
    with pytest.raises(StoreError, match=sentence):
        store.check(model, data())
    with pytest.raises(StoreError, match=r"features: stored none, live 'inner' of shape \(16,\)"):
        built(tmp_path / "plain", model).check(model, data(), outputs=outputs)


def test_the_check_is_held_against_outputs_of_the_same_kind(made):
    store = TeacherStore.open(made)
    with pytest.raises(StoreError, match=r"puts out other arrays than the store .*Classes: stored 12, live 9"):
        store.check(network(9), data())
    with pytest.raises(UsageError, match=r"`samples` .* is 0; expected a whole number of at least 1"):
        store.check(network(), data(), samples=0)


# ------------------------------------------------------------------------------------------------ options and outputs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"views": 0}, "`views` .* is 0; expected a whole number of at least 1"),
        ({"seed": -1}, "`seed` .* is -1; expected a whole number"),
        ({"temperature": 0.0}, "temperature is 0.0; a number above 0"),
        ({"temperature": float("nan")}, "`temperature` .* is nan; expected a finite number"),
        ({"temperature": 2.0, "keep": Dense()}, r"temperature is 2.0, but what Dense\(\) keeps knows none"),
        ({"ranges": (2, 2)}, r"ranges is \(2, 2\); \(i, n\) with 0 <= i < n"),
        ({"range_size": 0}, "`range_size` .* is 0; expected a whole number of at least 1"),
        ({"given": data(views=3)}, "views is 2, and the data has 3"),
        ({"views": 0, "range_size": 0}, "`views` .* is 0; .* `range_size` .* is 0"),
        ({"batch_size": 0}, "`batch_size` .* is 0; expected a whole number of at least 1"),
        ({"keep": TopK(13)}, r"TopK\(13\) is asked of 12 classes"),
        ({"keep": None}, "The outputs have 'logits', and keep is None"),
        ({"outputs": lambda x: {"a": x}}, r"The outputs have no 'logits', and keep is TopK\(k=4\)"),
        ({"outputs": lambda x: {"tail": x}, "keep": None}, "A feature is named 'tail'. Taken: seed, indices"),
        ({"outputs": lambda x: x}, "The outputs are a ndarray. Give a dict"),
        ({"outputs": lambda x: {}}, "The outputs are a dict"),
        ({"outputs": lambda x: {"a": x[:1]}}, r"The output 'a' has shape \(1, 2, 4, 4\) for 2 samples"),
        ({"outputs": lambda x: {"a": x[:, :0]}, "keep": None}, r"has shape \(2, 0, 4, 4\); there is nothing to keep"),
        ({"outputs": lambda x: {"logits": x[:, 0, 0, 0]}}, r"'logits' has shape \(2,\); there is nothing to keep"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        built(tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_record_that_no_file_could_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(specification, "LARGEST_RECORD", 17)
    with pytest.raises(UsageError, match=r"fields: a record has 18 bytes; 17 is the most.*Keep less of each sample"):
        built(tmp_path / "s")


def test_top_k_keeps_at_least_one():
    with pytest.raises(UsageError, match=r"`k` of .*TopK is 0; expected a whole number of at least 1"):
        TopK(0)


def test_what_is_not_finite_or_too_large_for_16_bits_is_named(tmp_path):
    def outputs(name, value):
        def found(inputs):
            array = np.zeros((len(inputs), K))
            array[-1, 3] = value
            return {name: array}

        return found

    with pytest.raises(NumericError, match=rf"The teacher's logits are not finite for sample {IDS[1]} in view 0"):
        built(tmp_path / "a", outputs=outputs("logits", np.nan))
    for value in (np.inf, 7e4):
        with pytest.raises(NumericError, match=r"The teacher's inner are not finite, or beyond ±65504 for sample"):
            built(tmp_path / "b", outputs=outputs("inner", value), keep=None)


def test_the_teacher_keeps_its_mode_and_its_weights(tmp_path):
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    built(tmp_path / "s", model)
    assert model.training
    assert model[2].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_the_page_shows_works_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    names = {"inputs": images(), "labels": np.arange(N) % K, "teacher": network()}
    for snippet in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(snippet, "store.md", "exec"), names)
    assert names["found"].keys() == {"indices", "log_p", "tail"}
    assert (names["store"].manifest.views, names["store"].manifest.temperature) == (8, 4.0)


def test_the_page_states_the_bytes_that_records_have(tmp_path):
    """4 + k (i + 2) + 2 and 4 + 2 K + 4, as docs/store.md has it."""
    page = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    assert "| 4 + k (i + 2) + 2 |" in page
    assert "| 4 + 2 K + 4 |" in page
    for k, classes, width in ((1, 10, 1), (10, 1000, 2), (100, 70_000, 4)):
        logits = {"logits": np.zeros((1, classes), np.float32)}
        assert record_type(fields_of(TopK(k), logits)).itemsize == 4 + k * (width + 2) + 2
        assert record_type(fields_of(Dense(), logits)).itemsize == 4 + 2 * classes + 4
