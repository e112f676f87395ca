"""Stale and damaged stores are errors that name the differences."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distillation.stores import AUGMENT, IDS, K, N, build_store, data, images, network
from kirsch.data.augment import Flip
from kirsch.data.batches import ArrayData
from kirsch.distillation.store import Dense, TeacherStore, TopK, finish
from kirsch.distillation.store.specification import DESCRIPTIONS
from kirsch.errors import StoreError


def change_manifest(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


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
        ({"data": ArrayData(images() + 1, None, 4, AUGMENT, IDS)}, ["the data (inputs and ids) (data_sha256"]),
        ({"data": data(Flip())}, ["the transform (transform_sha256"]),
        ({"data": data(None)}, ["the transform (transform_sha256"]),
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


def test_a_store_is_not_overwritten_by_another(store_copy):
    for options, word in (
        (
            {"keep": TopK(5)},
            r"the fields of a record \(fields: stored seed u4, indices 4 × u1, log_p 4 × f2, tail f2, given s",
        ),
        ({"keep": Dense()}, r"the format of the logits \(keep: stored top-k, given dense\)"),
        ({"temperature": 2.0}, "the temperature"),
        ({"seed": 6}, "the seed"),
        ({"views": 1}, "the number of views"),
        ({"inputs": data(Flip())}, "the transform"),
        ({"outputs": lambda inputs: {"logits": np.zeros((len(inputs), K))}}, "the callable that returns the outputs"),
    ):
        with pytest.raises(StoreError, match=rf"has another store\. It differs in .*{word}.*Choose another folder"):
            build_store(store_copy, **options)
    TeacherStore.open(store_copy).verify()


@pytest.mark.parametrize("position", [0, 3, 200, -1])
def test_verify_detects_a_flipped_bit_and_names_the_samples(store_copy, position):
    path = store_copy / "view-0001.bin"
    store = TeacherStore.open(store_copy)
    store.verify()
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    number = (position % len(content)) // (8 * store.record_bytes)
    samples = f"samples {8 * number} to {min(8 * number + 7, N - 1)}"
    with pytest.raises(StoreError, match=rf"is damaged\. view-0001.bin \({samples}\) does not have the sha256"):
        TeacherStore.open(store_copy).verify()


def test_the_error_counts_further_damaged_ranges(store_copy):
    for view in range(2):
        path = store_copy / f"view-000{view}.bin"
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StoreError, match=r"view-0001.bin \(samples 0 to 7\), and 2 more does not"):
        TeacherStore.open(store_copy).verify()


def test_reading_detects_records_of_other_samples(store_copy):
    path = store_copy / "view-0000.bin"
    size = len(path.read_bytes()) // N
    path.write_bytes(path.read_bytes()[size:] + path.read_bytes()[:size])
    with pytest.raises(StoreError, match=rf"the record of sample {IDS[0]} in view 0 has the seed of another"):
        TeacherStore.open(store_copy).read(IDS, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "view-0001.bin").unlink(), "view-0001.bin is missing"),
        (lambda f: (f / "view-0001.bin").write_bytes(b"1234"), "view-0001.bin has 4 bytes; the manifest requires 378"),
        (lambda f: (f / "ids.bin").unlink(), "ids.bin is missing"),
        (lambda f: (f / "ids.bin").write_bytes(bytes(8 * N)), "ids.bin does not have the sha256 of the manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").unlink(), "There is no store in"),
        (lambda f: change_manifest(f, kirsch_store=2), "manifest.json is damaged.*kirsch_store"),
        (lambda f: change_manifest(f, kirsch_store=True), "manifest.json is damaged.*kirsch_store"),
        (lambda f: change_manifest(f, temperature=True), "temperature: "),
        (lambda f: change_manifest(f, augmented="yes"), "augmented: "),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace("{", '{"seed": 1,', 1)
            ),
            "manifest.json is damaged.*the key 'seed' is given twice",
        ),
        (lambda f: change_manifest(f, samples=10**9), "sha256: 2 views of 125000000 ranges each are needed"),
        (lambda f: change_manifest(f, samples=2**80), "samples: "),
        (lambda f: change_manifest(f, samples=-1), "samples: "),
        (lambda f: change_manifest(f, samples=True), "samples: "),
        (lambda f: change_manifest(f, samples="21"), "samples: "),
        (lambda f: change_manifest(f, samples=20), "has 378 bytes; the manifest requires 360"),
        (lambda f: change_manifest(f, views=10**9), "views: "),
        (lambda f: change_manifest(f, views=1), "sha256: 1 views of 3 ranges"),
        (lambda f: change_manifest(f, range_size=0), "range_size: "),
        (lambda f: change_manifest(f, temperature=0), "temperature: "),
        (lambda f: change_manifest(f, keep="all"), "keep: "),
        (lambda f: change_manifest(f, keep="dense"), "fields: scores, maximum are needed"),
        (lambda f: change_manifest(f, sha256=[["../../etc/passwd"] * 3] * 2), "sha256.0.0: "),
        (lambda f: change_manifest(f, path="../elsewhere"), "path: "),
        (lambda f: change_manifest(f, fields=[]), "fields: "),
        (lambda f: change_manifest(f, fields=[{"name": "seed", "type": "O", "shape": []}]), "fields.0.type: "),
        (
            lambda f: change_manifest(f, fields=[{"name": "tail", "type": "f2", "shape": []}]),
            "names must be unique",
        ),
        (
            lambda f: change_manifest(f, keep=None, fields=fields_with([2**40] * 8)),
            "a record has .* bytes; the limit is 2147483647",
        ),
        (lambda f: change_manifest(f, keep=None, fields=fields_with([2**41])), "fields.1.shape.0: "),
        (lambda f: change_manifest(f, keep=None, fields=fields_with([-1])), "fields.1.shape.0: "),
    ],
)
def test_a_damaged_or_hostile_store_is_refused(store_copy, damage, message):
    damage(store_copy)
    with pytest.raises(StoreError, match=message):
        TeacherStore.open(store_copy)


def fields_with(shape):
    return [{"name": "seed", "type": "u4", "shape": []}, {"name": "x", "type": "f2", "shape": shape}]


def test_a_link_to_a_file_outside_the_folder_is_refused(store_copy, tmp_path):
    (store_copy / "view-0000.bin").rename(tmp_path / "elsewhere.bin")
    (store_copy / "view-0000.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(StoreError, match=r"view-0000.bin is a link to a file outside the folder"):
        TeacherStore.open(store_copy)


def test_a_store_can_be_moved(store_copy, tmp_path):
    expected = TeacherStore.open(store_copy).read(IDS)["tail"]
    store_copy.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for name in ("moved", "link"):
        np.testing.assert_array_equal(TeacherStore.open(tmp_path / name).read(IDS)["tail"], expected)


def test_a_folder_without_a_store_is_an_error(tmp_path):
    for function in (TeacherStore.open, finish):
        with pytest.raises(StoreError, match=r"There is no store in .*\. Build one"):
            function(tmp_path)
