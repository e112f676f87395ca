"""A stale or damaged store raises an error that names the differences."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distillation.stores import AUGMENT, IDS, K, N, data, images, network, tiny_store, versioned
from folders import contents
from kirsch.data.augment import Flip
from kirsch.data.batches import ArrayData
from kirsch.distillation.store import Dense, TeacherStore, TopK
from kirsch.distillation.store.specification import DESCRIPTIONS
from kirsch.errors import StoreError


def change(folder, **values):
    path = folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_require_accepts_matching_arguments(store_folder):
    store = TeacherStore.open(store_folder)
    store.require(teacher=network().train(), data=data(), temperature=1.0, seed=5)
    store.require(data=data(views=2))
    store.require()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"teacher": network(seed=1)}, ["the teacher's weights (teacher_sha256"]),
        ({"data": data(ids=IDS[::-1].copy())}, ["the data (inputs and ids) (data_sha256"]),
        (
            {"data": ArrayData(images() + 1, None, batch_size=4, augment=AUGMENT, ids=IDS)},
            ["the data (inputs and ids) (data_sha256"],
        ),
        (
            {"data": data(Flip())},
            ["the transform (transform: stored Chain(stages=(Crop(padding=1), Flip(probability=0.5), "],
        ),
        (
            {"data": data(None)},
            ["the transform (transform: stored Chain(stages=(Crop(padding=1), Flip(probability=0.5), "],
        ),
        ({"data": data(views=3)}, ["the number of views (views: stored 2, given 3)"]),
        ({"temperature": 4.0}, ["the temperature (temperature: stored 1.0, given 4.0)"]),
        ({"seed": 6}, ["the seed of the augmentation (seed: stored 5, given 6)"]),
        ({"teacher": network(seed=1), "seed": 6}, ["the teacher's weights", "the seed of the augmentation"]),
    ],
)
def test_the_error_of_a_stale_store_names_exactly_the_differences(store_folder, arguments, names):
    with pytest.raises(StoreError, match=r"is stale\. It was built with another value of") as caught:
        TeacherStore.open(store_folder).require(**arguments)
    named = [word for word in DESCRIPTIONS.values() if f"{word} (" in str(caught.value)]
    assert len(named) == len(names)
    assert all(name in str(caught.value) for name in names)


def test_a_build_with_other_options_does_not_overwrite_a_store(store_copy):
    for options, word in (
        ({"keep": TopK(5)}, r"the format of the logits \(keep: stored TopK\(k=4\), given TopK\(k=5\)\)"),
        ({"keep": Dense()}, r"the format of the logits \(keep: stored TopK\(k=4\), given Dense\(\)\)"),
        ({"temperature": 2.0}, "the temperature"),
        ({"seed": 6}, "the seed"),
        ({"views": 1}, "the number of views"),
        ({"inputs": data(Flip())}, "the transform"),
        (
            {"outputs": versioned(lambda inputs: {"logits": np.zeros((len(inputs), K))})},
            r"the callable that returns the outputs \(outputs: stored None, given .*<lambda> version 1\)",
        ),
    ):
        with pytest.raises(StoreError, match=rf"is stale\. .* another value of .*{word}.* in another folder"):
            tiny_store(store_copy, **options)
    TeacherStore.open(store_copy).verify()


@pytest.mark.parametrize("position", [0, 3, 100, -33, -1])
@pytest.mark.parametrize("number", [0, 2])
def test_verify_detects_a_flipped_bit_and_names_the_samples(store_copy, position, number):
    path = store_copy / f"view-0001-range-{number:06d}.bin"
    store = TeacherStore.open(store_copy)
    store.verify()
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    samples = f"view 1, samples {8 * number} to {min(8 * number + 7, N - 1)}"
    with pytest.raises(StoreError, match=rf"is damaged\. .* sha256: view-0001-range-00000{number}.bin \({samples}\)\."):
        TeacherStore.open(store_copy).verify()


def test_the_error_counts_further_damaged_ranges(store_copy):
    for path in store_copy.glob("view-*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StoreError, match=r"view-0001-range-000000.bin \(view 1, samples 0 to 7\) and 2 more\. Delete"):
        TeacherStore.open(store_copy).verify()


def test_a_damaged_range_is_built_again_after_its_file_is_deleted(store_folder, store_copy):
    damaged = store_copy / "view-0001-range-000001.bin"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    damaged.unlink()
    events = []
    tiny_store(store_copy, event=events.append).verify()
    assert [(event["view"], event["range"]) for event in events] == [(1, 1)]
    assert contents(store_copy) == contents(store_folder)


@pytest.mark.parametrize("options", [{"model": network(seed=1)}, {"inputs": data(Flip())}, {"seed": 6}], ids=str)
def test_verify_detects_a_range_of_another_store(store_copy, tmp_path, options):
    tiny_store(tmp_path / "other", **options)
    name = "view-0000-range-000001.bin"
    (store_copy / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(StoreError, match=r"do not match their sha256: view-0000-range-000001.bin"):
        TeacherStore.open(store_copy).verify()


def test_verify_detects_a_range_file_with_the_content_of_another(store_copy):
    first, second = (store_copy / f"view-000{view}-range-000001.bin" for view in range(2))
    first.write_bytes(second.read_bytes())
    with pytest.raises(StoreError, match=r"sha256: view-0000-range-000001.bin \(view 0, samples 8 to 15\)\."):
        TeacherStore.open(store_copy).verify()


def test_reading_detects_records_of_other_samples(store_copy):
    path, size = store_copy / "view-0000-range-000000.bin", TeacherStore.open(store_copy).record_bytes
    records, digest = path.read_bytes()[:-32], path.read_bytes()[-32:]
    path.write_bytes(records[size:] + records[:size] + digest)
    with pytest.raises(StoreError, match=rf"the record of sample {IDS[0]} in view 0 has the seed of another"):
        TeacherStore.open(store_copy).read(IDS, 0)


LAST = "view-0001-range-000002.bin"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / LAST).unlink(), "1 of 6 ranges are missing, the first is view 1, samples 16 to 20"),
        (lambda f: (f / LAST).write_bytes(b"1234"), f"{LAST} has 4 bytes, expected 122"),
        (lambda f: (f / "ids.bin").unlink(), "ids.bin is missing, or does not match its size"),
        (
            lambda f: (f / "ids.bin").write_bytes(bytes(8 * N)),
            "ids.bin is missing, or does not match its size",
        ),
        (lambda f: (f / "store.json").write_text("{"), "store.json is damaged"),
        (lambda f: (f / "store.json").write_bytes(b"\xff\xfe"), "store.json is damaged"),
        (lambda f: (f / "store.json").write_text("[" * 100_000), "store.json is damaged"),
        (lambda f: (f / "store.json").unlink(), "There is no store in"),
        (lambda f: change(f, kirsch_store=1), "store.json is damaged.*kirsch_store"),
        (lambda f: change(f, kirsch_store=True), "store.json is damaged.*kirsch_store"),
        (lambda f: change(f, temperature=True), "temperature: "),
        (lambda f: change(f, transform=3), "transform: "),
        (
            lambda f: (f / "store.json").write_text((f / "store.json").read_text().replace("{", '{"seed": 1,', 1)),
            "store.json is damaged.*the key 'seed' is given twice",
        ),
        (lambda f: change(f, samples=10**9), "range-000002.bin has 122 bytes, expected 176"),
        (lambda f: change(f, samples=2**40, range_size=1, views=10**6), "has 176 bytes, expected 50"),
        (lambda f: change(f, samples=2**80), "samples: "),
        (lambda f: change(f, samples=-1), "samples: "),
        (lambda f: change(f, samples=True), "samples: "),
        (lambda f: change(f, samples="21"), "samples: "),
        (lambda f: change(f, samples=20), "range-000002.bin has 122 bytes, expected 104"),
        (lambda f: change(f, views=10**9), "views: "),
        (lambda f: change(f, views=10**6), "of 3000000 ranges are missing, the first is view 2, samples 0 to 7"),
        (lambda f: change(f, range_size=0), "range_size: "),
        (lambda f: change(f, temperature=0), "temperature: "),
        (lambda f: change(f, k=13), r"TopK\(13\) needs 13 classes, and there are 12"),
        (lambda f: change(f, transform=None), "views is 2, but without a transform all views are equal"),
        (lambda f: change(f, k=None, temperature=2.0), r"temperature is 2.0, but Dense\(\) stores no probabilities"),
        (lambda f: change(f, k=None), "has 176 bytes, expected 288"),
        (lambda f: change(f, classes=2**33), "has 176 bytes, expected 400"),
        (lambda f: change(f, classes=None), r"TopK\(4\) needs 4 classes, and there are None"),
        (lambda f: change(f, k=None, classes=None), "there are neither logits nor features"),
        (lambda f: change(f, ids_sha256="../../etc/passwd"), "ids_sha256: "),
        (lambda f: change(f, path="../elsewhere"), "path: "),
        (lambda f: change(f, features={"tail": []}), "the feature name 'tail' is reserved"),
        (lambda f: change(f, features={"": []}), "features..*: "),
        (lambda f: change(f, features={"x": "many"}), "features.x: "),
        (lambda f: change(f, features={"x": [2**40] * 8}), "a record has .* bytes, and the limit is 2147483647"),
        (lambda f: change(f, features={"x": [2**41]}), "features.x.0: "),
        (lambda f: change(f, features={"x": [-1]}), "features.x.0: "),
    ],
)
def test_a_damaged_or_hostile_store_is_refused(store_copy, damage, message):
    damage(store_copy)
    with pytest.raises(StoreError, match=message):
        TeacherStore.open(store_copy)


@pytest.mark.parametrize("change_of_origin", [{"seed": 6}, {"temperature": 2.0}, {"teacher_sha256": "0" * 64}], ids=str)
def test_verify_detects_a_changed_specification(store_copy, change_of_origin):
    change(store_copy, **change_of_origin)
    with pytest.raises(StoreError, match=r"do not match their sha256: view-0000-range-000000.bin"):
        TeacherStore.open(store_copy).verify()


def test_a_link_to_a_file_outside_the_folder_is_refused(store_copy, tmp_path):
    (store_copy / LAST).rename(tmp_path / "elsewhere.bin")
    (store_copy / LAST).symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(StoreError, match=f"{LAST} is a link"):
        TeacherStore.open(store_copy)


def test_a_store_can_be_moved(store_copy, tmp_path):
    expected = TeacherStore.open(store_copy).read(IDS)["tail"]
    store_copy.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for name in ("moved", "link"):
        np.testing.assert_array_equal(TeacherStore.open(tmp_path / name).read(IDS)["tail"], expected)


def test_a_folder_without_a_store_is_an_error(tmp_path):
    with pytest.raises(StoreError, match=r"There is no store in .*\. Build one"):
        TeacherStore.open(tmp_path)
