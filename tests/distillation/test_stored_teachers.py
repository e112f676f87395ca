"""Training on stored teacher outputs equals training on the outputs of the live teacher for the same views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.data.augment import Noise, sample_seeds
from kirsch.data.batches import ArrayData
from kirsch.distillation.checks import first_samples
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense, TeacherStore, TopK, build_store
from kirsch.errors import DataError, NumericError, ShapeError, StoreError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import TrainingHooks

N, K = 40, 5
INPUTS = np.random.default_rng(0).standard_normal((N, 6)).astype(np.float32)
LABELS = np.arange(N) % K
SHORT = kirsch.Training(epochs=1)
UNLABELED = Objective(Objective.kd().terms, label_weight=0)


def net(classes=K, seed=0, wide=6):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(wide, classes)


def data(augment=None, targets=LABELS, **options):
    return ArrayData(INPUTS, targets, batch_size=16, augment=augment, **options)


def learned(student, teacher, given, temperature=1.0, **options):
    options = {"objective": Objective.kd(temperature=temperature), "check_teacher": False, "training": SHORT} | options
    return kirsch.distill(student, teacher, given, **options)


def predicted(model, inputs):
    with torch.no_grad():
        return model(torch.as_tensor(inputs)).numpy()


# ------------------------------------------------------------------------------------------------ many classes


@pytest.mark.parametrize("classes", [256, 257, 65_536, 65_537])
def test_the_loss_with_a_store_of_many_classes_equals_the_loss_with_its_teacher(tmp_path, classes):
    """Class numbers have as few bytes as possible, and PyTorch supports few operations on unsigned types."""
    teacher, student = net(classes), net(classes, 1)
    store = build_store(tmp_path / "store", teacher, data(), keep=TopK(4), temperature=2.0)
    largest = Objective((kirsch.Term("top-k", 1.0, temperature=2.0, options={"k": 4}),), label_weight=0.0)
    stored, live = (learned(student, source, data(), objective=largest).history[0] for source in (store, teacher))
    assert stored["loss"] == pytest.approx(live["loss"], rel=2e-3)


class Writer(nn.Module):
    """A language model whose logits depend on one token only."""

    def __init__(self, words, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(words, 4), nn.Linear(4, words)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_with_a_store_of_a_language_model_equals_the_loss_with_its_teacher(tmp_path, masked):
    words = np.random.default_rng(1).integers(0, 300, (8, 6))
    labels = words.copy()
    labels[:, 4:] = -100 if masked else labels[:, 4:]
    given = ArrayData({"input_ids": words}, labels, batch_size=4)
    teacher = Writer(300)
    store = build_store(tmp_path / "store", teacher, given, keep=TopK(300))
    objective = Objective((kirsch.Term("kd", 1.0, temperature=1.0),), label_weight=0.0, causal=True)
    stored, live = (
        learned(Writer(300, 1), source, given, objective=objective).history[0] for source in (store, teacher)
    )
    assert stored["loss"] == pytest.approx(live["loss"], rel=2e-3)


# ------------------------------------------------------------------------------------------------ views

SHAKEN = Noise(0.5)


def test_the_seed_of_a_store_is_the_seed_that_its_records_were_built_with(tmp_path):
    """`build_store` takes the seed of the data, if they have one, and refuses another value of its option `seed`."""
    given = data(SHAKEN, seed=5)
    store = build_store(tmp_path / "store", net(), given, keep=Dense(), views=2)
    assert store.specification.seed == 5
    for batch in data(SHAKEN, views=2).epoch(5, 1):
        found = store.read(batch.ids, batch.view)
        live = predicted(net(), batch.inputs)
        np.testing.assert_allclose(found["scores"] + found["maximum"][:, None], live, atol=2e-3)
    with pytest.raises(UsageError, match="seed is 0, and the data has 5"):
        build_store(tmp_path / "other", net(), given, keep=Dense(), views=2, seed=0)
    assert build_store(tmp_path / "none", net(), data(SHAKEN), keep=Dense()).specification.seed == 0


def test_a_store_whose_views_differ_from_the_views_of_the_data_is_refused(tmp_path):
    store = build_store(tmp_path / "store", net(), data(SHAKEN), keep=Dense(), views=2, seed=5)
    for given, sentence in (
        (data(SHAKEN, seed=7), r"the seed of the augmentation \(seed: stored 5, given 7\)"),
        (data(SHAKEN, views=3), r"the number of views \(views: stored 2, given 3\)"),
    ):
        for attempt in (
            lambda given=given: store.require(data=given),
            lambda given=given: learned(net(seed=1), store, given),
        ):
            with pytest.raises(StoreError, match=sentence):
                attempt()
    with pytest.raises(StoreError, match=r"seed: stored 5, given 7"):
        store.check(net(), data(SHAKEN, seed=7))
    learned(net(seed=1), store, data(SHAKEN, views=2, seed=5))
    learned(net(seed=1), store, data(SHAKEN))  # data without seed and views takes both from the store


def bound(store, batch, objective=None):
    return kirsch.Distiller(net(seed=1), store, objective or Objective.kd(temperature=1.0), batch).eval()


def test_batches_of_a_custom_loop_must_have_the_views_of_the_store(tmp_path):
    given = data(SHAKEN, views=2, seed=5)
    store = build_store(tmp_path / "store", net(), given, keep=Dense(), views=2)
    batch = next(given.epoch(0, 1))
    np.testing.assert_array_equal(batch.seeds, sample_seeds(5, 1, batch.ids))
    distiller = bound(store, batch)
    live = bound(net(), batch)(batch).total.item()
    assert distiller(batch).total.item() == pytest.approx(live, rel=2e-3)
    for other in (data(SHAKEN, views=2, seed=6), data(SHAKEN, views=2)):
        with pytest.raises(DataError, match=r"was augmented differently for the teacher\. .*with the seed 5"):
            distiller(next(other.epoch(0, 1)))
    plain = next(data().epoch(0, 0))
    for without_views in (plain, (plain.inputs, plain.targets, plain.ids)):
        with pytest.raises(UsageError, match=r"have no augmentation seeds.*kirsch\.distill.*ArrayData\.epoch"):
            distiller(without_views)
        with pytest.raises(UsageError, match=r"have no augmentation seeds"):
            bound(store, without_views)


def test_a_store_without_augmentation_refuses_augmented_batches(tmp_path):
    store = build_store(tmp_path / "store", net(), data(), keep=Dense())
    distiller = bound(store, next(data().epoch(0, 0)))
    with pytest.raises(
        UsageError, match=r"holds samples without augmentation, and the batches are augmented\. .*Build"
    ):
        distiller(next(data(SHAKEN).epoch(0, 0)))


def test_seeds_stay_with_their_samples_when_a_batch_is_shortened_or_moved_to_a_device():
    batch = next(data(SHAKEN, seed=5).epoch(0, 0))
    some = first_samples(batch)
    np.testing.assert_array_equal(some.seeds, batch.seeds[:8])
    np.testing.assert_array_equal(framework_of(net()).inference.to_device(batch, net()).seeds, batch.seeds)


def scaled(amount, version):
    def changed(batch, _random):
        return batch * np.float32(amount)

    if version:
        changed.version = version
    return changed


def test_a_store_of_another_version_of_a_transform_is_refused(tmp_path):
    store = build_store(tmp_path / "store", net(), data(scaled(1.0, "1")), keep=Dense())
    store.require(data=data(scaled(1.0, "1")))
    with pytest.raises(
        StoreError, match=r"the transform \(transform: stored .*changed version 1, given .*changed version 2\)"
    ):
        learned(net(seed=1), store, data(scaled(3.0, "2")))


def test_a_transform_without_a_version_is_refused_by_a_store(tmp_path):
    given = data(scaled(1.0, None))
    with pytest.raises(UsageError, match=r"changed has no version\. .*Set f\.version = \"1\" after the definition"):
        build_store(tmp_path / "store", net(), given, keep=Dense())
    assert not (tmp_path / "store").exists()


# ------------------------------------------------------------------------------------------------ refused stores


def test_a_flipped_bit_is_detected_before_a_training_step(tmp_path):
    given = data(SHAKEN, views=2)
    build_store(tmp_path / "store", net(), given, keep=TopK(3), views=2)
    path = tmp_path / "store" / "view-0001-range-000000.bin"
    content = bytearray(path.read_bytes())
    content[4 + 3 + 1] ^= 0x80  # the sign of a logarithm
    path.write_bytes(content)
    store = TeacherStore.open(tmp_path / "store")
    learned(net(seed=1), store, given)  # reads only the first view, which is intact
    with pytest.raises(StoreError, match=r"sha256: view-0001-range-000000.bin \(view 1, samples 0 to 39\)"):
        learned(net(seed=1), store, given, training=kirsch.Training(epochs=2))
    distiller = bound(store, next(given.epoch(0, 0)))
    with pytest.raises(StoreError, match=r"is damaged"):
        distiller(next(given.epoch(0, 1)))


def test_a_view_is_verified_once(tmp_path, monkeypatch):
    store, asked = build_store(tmp_path / "store", net(), data(), keep=TopK(3)), []
    monkeypatch.setattr(store, "verify", asked.append)
    for _ in range(2):
        learned(net(seed=1), store, data(), training=kirsch.Training(epochs=2))
    assert asked == [[0]]


@pytest.mark.parametrize("keep", [TopK(3), Dense()], ids=["top-k", "dense"])
@pytest.mark.parametrize("classes", [4, 7])
def test_a_student_with_another_number_of_classes_is_refused_with_a_teacher_and_its_store(tmp_path, keep, classes):
    store = build_store(tmp_path / "store", net(), data(), keep=keep)
    for teacher in (net(), store):
        with pytest.raises(
            ShapeError, match=rf"The student returns {classes} classes; the teacher returns 5 classes\. Soft targets"
        ):
            learned(net(classes, 1), teacher, data(targets=LABELS % 4))


def test_a_student_with_another_vocabulary_than_the_teacher_of_a_store_is_refused(tmp_path):
    words = np.random.default_rng(1).integers(0, 20, (8, 6))
    given = ArrayData({"input_ids": words}, words, batch_size=4)
    store = build_store(tmp_path / "store", Writer(20), given, keep=TopK(2))
    with pytest.raises(ShapeError, match="The student has a vocabulary of 30, the teacher one of 20"):
        learned(Writer(30), store, given, objective=Objective.preset("causal"))


# --------------------------------------------------------------------------------- evaluation of a stored teacher


class Fixed(nn.Module):
    """Predicts the class table[c] for the one-hot row of class c."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(9 * torch.eye(K)[torch.tensor(table)])

    def forward(self, inputs):
        return inputs @ self.table


def sorted_rows(count=2000):
    labels = np.sort(np.arange(count) % K)
    return ArrayData(np.eye(K, dtype=np.float32)[labels], labels, batch_size=64)


@pytest.mark.parametrize("keep", [None, TopK(2), Dense()], ids=["live", "top-k", "dense"])
def test_a_live_or_stored_teacher_is_compared_with_chance_on_samples_of_all_classes(tmp_path, keep):
    """The data is sorted by label: its first 1,024 samples are of only three of the five classes."""
    given, events = sorted_rows(), []
    hooks = TrainingHooks(event=events.append)

    def taught(table, name):
        teacher = Fixed(table)
        source = teacher if keep is None else build_store(tmp_path / name, teacher, given, keep=keep)
        learned(net(wide=K), source, given, check_teacher=True, hooks=hooks)

    with pytest.raises(NumericError, match=r"The teacher is no better than chance: 0\.0% of 1024 samples are correct"):
        taught([1, 2, 3, 4, 0], "wrong")
    taught([1, 2, 0, 3, 4], "late")
    assert events[0] == {"event": "teacher", "accuracy": pytest.approx(0.4, abs=0.01), "classes": K}


def test_a_stored_teacher_is_not_evaluated_on_data_without_labels(tmp_path):
    given = data(targets=None)
    store = build_store(tmp_path / "store", net(), given, keep=Dense())
    events = []
    hooks = TrainingHooks(event=events.append)
    learned(net(seed=1), store, given, objective=UNLABELED, check_teacher=True, hooks=hooks)
    assert events[0] == {"event": "teacher"}  # without metrics
    assert [event["event"] for event in events[1:]] == ["first_batch", "epoch"]


def test_a_layer_that_the_store_does_not_hold_is_named_with_the_argument_that_stores_it(tmp_path):
    store = build_store(tmp_path / "store", net(), data(), keep=Dense())
    term = kirsch.Term("fitnet", student_layer="logits", teacher_layer="stage")
    expected = r"needs the teacher's layer 'stage', and the store holds only logits\..*outputs=\.\.\."
    with pytest.raises(UsageError, match=expected):
        learned(net(seed=1), store, data(), objective=Objective((term,)))


def test_a_path_in_place_of_a_teacher_suggests_to_open_the_store():
    with pytest.raises(UsageError, match=r"`teacher` .* is 'st'; .* give kirsch\.TeacherStore\.open\('st'\)\."):
        learned(net(), "st", data())


def test_the_repr_of_a_store_is_one_line(tmp_path):
    store = build_store(tmp_path / "store", net(), data(augment=Noise(0.1)), keep=TopK(2), views=2)
    assert repr(store) == (
        f"<kirsch.TeacherStore: 40 samples, 2 views, 5 classes, records logits, in {tmp_path / 'store'}>"
    )


def test_warnings_point_to_the_line_of_the_call():
    with pytest.warns(UserWarning, match="not evaluated, since no sample has a label") as caught:
        kirsch.distill(net(), net(seed=1), data(targets=None), objective=UNLABELED, training=SHORT)
    assert {record.filename for record in caught} == {__file__}
