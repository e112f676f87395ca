"""Before training, each term gets layers of student and teacher and an adapter; hooks are removed after training."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distillation.examples import image_data, trained
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill
from kirsch.distillation.losses import LOSSES, loss
from kirsch.distillation.objective import Objective
from kirsch.distillation.presets import PRESETS
from kirsch.distillation.store import Dense, TopK, build_store
from kirsch.distillation.term import Ramp, Term
from kirsch.errors import DataError, ModelError, ShapeError, StoreError, UnknownNameError, UsageError
from kirsch.frameworks.pytorch.features.capture import FeatureCapture, dry_run
from kirsch.frameworks.pytorch.features.layers import expand
from kirsch.frameworks.training import Training, TrainingHooks
from training_runs import assert_same_bits

K = 3
IMAGES = ("kd", "dkd", "dist", "lskd", "wsld", "at", "reviewkd", "crd", "rkd", "ofa", "funmatch", "fitnet")


class Net(nn.Module):
    """A network with three stages, whose activations are called in `forward`."""

    def __init__(self, width, classes=K):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.down(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.deep(torch.relu(x)))
        return self.head(x.mean((2, 3)))


data = partial(image_data, size=8)


@pytest.mark.parametrize("name", IMAGES)
def test_every_preset_for_images_trains(name):
    found = trained(Net(4), Net(6), data(), Objective.preset(name), hooks=TrainingHooks(event=lambda _event: None))
    assert type(found.model) is Net
    assert [record["epoch"] for record in found.history] == [1, 2]
    assert np.isfinite([record["loss"] for record in found.history]).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.model.modules())


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(IMAGES)))
def test_every_other_preset_is_used_in_another_test_file(name):
    others = set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)}
    assert any(f'preset("{name}"' in path.read_text() or f'"{name}",' in path.read_text() for path in others)


def test_every_preset_can_be_stored_as_json():
    for name in PRESETS:
        objective = Objective.preset(name)
        stored = json.loads(json.dumps(objective.to_dict()))
        assert Objective.from_dict(stored) == objective


def test_the_returned_student_has_no_adapters():
    found = trained(Net(4), Net(6), data(), Objective((Term("fitnet", 1.0, student_layer="down"),)))
    assert set(found.model.state_dict()) == set(Net(4).state_dict())


def test_the_event_attached_has_the_names_and_shapes_of_the_compared_layers():
    events = []
    trained(
        Net(4),
        Net(6),
        data(),
        Objective((Term("fitnet", 1.0, student_layer="down"),)),
        hooks=TrainingHooks(event=events.append),
    )
    (event,) = (event for event in events if event["event"] == "attached")
    (row,) = event["pairs"]
    assert (row["student"], row["teacher"], row["student_shape"], row["teacher_shape"]) == (
        "down",
        "down",
        "8 × 4 × 4",
        "12 × 4 × 4",
    )


def test_stages_are_matched_by_the_size_of_their_maps():
    events = []
    trained(
        Net(4),
        Net(6),
        data(),
        Objective((Term("at", 1.0, student_layer="auto"),)),
        hooks=TrainingHooks(event=events.append),
    )
    (event,) = (event for event in events if event["event"] == "attached")
    assert [(row["student"], row["teacher"]) for row in event["pairs"]] == [(n, n) for n in ("norm", "down", "deep")]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("down", lambda net, x: net.down(torch.relu(net.norm(net.stem(x))))),
        ("down:in", lambda net, x: torch.relu(net.norm(net.stem(x)))),
        ("/relu#0", lambda net, x: torch.relu(net.norm(net.stem(x)))),
        ("logits", lambda net, x: net(x)),
    ],
)
def test_a_layer_name_selects_the_input_or_output_of_the_layer(layer, expected):
    net, x = Net(4).eval(), torch.randn(2, 1, 8, 8)
    (concrete,) = expand(net, layer, x)
    assert torch.equal(dry_run(net, [concrete], x)[concrete], expected(net, x))


def test_the_penultimate_layer_is_the_input_of_the_head():
    net, x = Net(4).eval(), torch.randn(2, 1, 8, 8)
    (concrete,) = expand(net, "penultimate", x)
    assert torch.equal(net.head(dry_run(net, [concrete], x)[concrete]), net(x))


def test_in_after_the_number_of_a_call_is_not_a_layer_name():
    """The input of the second call of relu is named /relu:in#1."""
    net, x = Net(4).eval(), torch.randn(2, 1, 8, 8)
    with pytest.raises(UsageError, match="is not a layer name"):
        expand(net, "/relu#1:in", x)
    (concrete,) = expand(net, "/relu:in#1", x)
    assert torch.equal(dry_run(net, [concrete], x)[concrete], net.down(torch.relu(net.norm(net.stem(x)))))


def test_hooks_are_removed_after_an_exception():
    net = Net(4)
    watch = FeatureCapture(net, ["down"])
    with pytest.raises(ModelError):
        watch(torch.randn(2, 5, 8, 8))
    watch.close()
    assert not any(module._forward_hooks for module in net.modules())


def test_an_unknown_layer_raises_an_error_that_suggests_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"no layer in Net named 'dwn'.*Did you mean 'down'"):
        trained(Net(4), Net(6), data(), Objective((Term("fitnet", 1.0, student_layer="dwn"),)))


def test_a_function_that_is_called_several_times_needs_an_index():
    with pytest.raises(UsageError, match=r"calls relu 3 times in one forward pass.*Append #0 for the first"):
        dry_run(Net(4), ["/relu"], torch.randn(2, 1, 8, 8))


def test_different_numbers_of_classes_are_refused_before_training():
    with pytest.raises(ShapeError, match="The student returns 3 classes; the teacher returns 5 classes"):
        trained(Net(4), Net(6, classes=5), data(), Objective.kd())


def test_layers_whose_shapes_no_adapter_can_convert_are_refused():
    with pytest.raises(ShapeError, match="No adapter fits the student's value"):
        trained(Net(4), Net(6), data(), Objective((Term("fitnet", 1.0, student_layer="down", teacher_layer="logits"),)))


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(UsageError, match="the temperature of 'kd' is 0; a number above 0 is needed"):
        Objective((Term("kd", 1.0, temperature=0),))


def test_an_option_that_a_loss_lacks_is_refused():
    with pytest.raises(UnknownNameError, match="no option of the loss 'dkd' named 'betta'"):
        Objective((Term("dkd", 1.0, options={"betta": 2}),))


def test_a_ramp_is_linear_and_then_constant():
    ramp = Ramp(0.0, 5.0, epochs=20)
    assert [ramp.at(epoch) for epoch in (0, 10, 20, 99)] == [0, 2.5, 5, 5]


def test_with_balance_gradient_the_shares_of_the_gradient_are_proportional_to_the_weights_of_the_terms():
    objective = Objective((Term("kd", 1.0, temperature=4.0),), label_weight=1.0, balance="gradient")
    one_batch = ArrayData(data().inputs, data().targets, batch_size=24)
    training = Training(epochs=5, learning_rate=1e-6)
    found = distill(Net(4), Net(6), one_batch, objective=objective, training=training, check_teacher=False)
    for record in [found.first_batch, *found.history]:
        assert record["gradient_shares"] == pytest.approx({"label": 0.5, "kd": 0.5}, abs=0.01)
    assert sum(found.first_batch["loss_shares"].values()) == pytest.approx(1)


def test_a_small_term_whose_gradient_is_balanced_gives_no_warning(monkeypatch):
    monkeypatch.setattr(LOSSES, "_objects", dict(LOSSES._objects))

    @loss("tiny")
    def tiny(student, teacher):
        return 1e-6 * ((student - teacher) ** 2).mean()

    events = []
    objective = Objective((Term("tiny", 1.0),), balance="gradient")
    trained(Net(4), Net(6), data(), objective, hooks=TrainingHooks(event=events.append))
    assert [event for event in events if event["event"] == "warning"] == []


def test_samples_without_a_label_have_no_label_loss():
    labeled = data()
    labels = labeled.targets.copy()
    labels[::2] = -100
    half = ArrayData(labeled.inputs, labels, batch_size=12)
    found = distill(Net(4), Net(6), half, training=Training(epochs=1), check_teacher=False)
    assert set(found.history[0]["terms"]) == {"label", "kd"}
    unlabeled = ArrayData(labeled.inputs, None, batch_size=12)
    with (
        pytest.warns(UserWarning, match="not evaluated, since no sample has a label to compare with"),
        pytest.warns(UserWarning, match="the label loss, weight 0.1, is left out"),
    ):
        found = distill(Net(4), Net(6), unlabeled, training=Training(epochs=1))
    assert set(found.history[0]["terms"]) == {"kd"}


def test_accumulated_batches_equal_one_large_batch():
    """An optimizer step has one batch of 24 samples, or four batches of 6.

    Batch normalization is removed, because its result depends on the batch.
    """

    def student():
        torch.manual_seed(1)
        net = Net(4).double()
        net.norm = nn.Identity()
        return net

    teacher = Net(6).double()
    inputs, targets = data().inputs.astype(np.float64), data().targets
    found = [
        distill(
            student(),
            teacher,
            ArrayData(inputs, targets, batch_size=size),
            training=Training(epochs=1, gradient_accumulation_steps=24 // size, schedule="constant"),
            check_teacher=False,
        ).model
        for size in (24, 6)
    ]
    for first, second in zip(*(model.parameters() for model in found), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


def test_with_ema_decay_the_averaged_weights_are_returned():
    plain = trained(_seeded(), Net(6), data(), Objective.kd(), training=Training(epochs=1, seed=3)).model
    slow = trained(
        _seeded(), Net(6), data(), Objective.kd(), training=Training(epochs=1, seed=3, ema_decay=0.999)
    ).model
    start = _seeded()
    moved = [(a - b).abs().sum().item() for a, b in zip(plain.parameters(), start.parameters(), strict=True)]
    little = [(a - b).abs().sum().item() for a, b in zip(slow.parameters(), start.parameters(), strict=True)]
    assert sum(little) < 0.01 * sum(moved)


def _seeded():
    torch.manual_seed(5)
    return Net(4)


@pytest.mark.parametrize("keep", [TopK(3), Dense()], ids=["top-k", "dense"])
def test_a_store_gives_the_losses_of_its_teacher(tmp_path, keep):
    """The losses differ by the rounding of the stored logits to 16 bits."""
    torch.manual_seed(2)
    teacher, objective = Net(6), Objective((Term("kd", 0.9, temperature=2.0),), label_weight=0.1)
    teacher.head.weight.data *= 20  # confident predictions
    training = Training(epochs=2, learning_rate=0.01)
    store = build_store(
        tmp_path / "store", teacher, data(), keep=keep, temperature=2.0 if isinstance(keep, TopK) else 1.0
    )
    live, stored = (
        distill(_seeded(), source, data(), objective=objective, training=training, check_teacher=False).history
        for source in (teacher, store)
    )
    assert stored[-1]["terms"] == pytest.approx(live[-1]["terms"], rel=2e-3, abs=1e-4)


def test_a_store_of_other_data_or_temperature_is_refused(tmp_path):
    store = build_store(tmp_path / "store", Net(6), data(), keep=TopK(2))
    with pytest.raises(StoreError, match="temperature"):
        distill(Net(4), store, data(), objective=Objective.kd(temperature=4.0))
    other = ArrayData(data().inputs + 1, data().targets)
    with pytest.raises(StoreError, match="data"):
        distill(Net(4), store, other, objective=Objective.kd(temperature=1.0))


def test_an_optimizer_step_whose_targets_are_all_masked_is_refused():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 7, (4, 5))
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    labels = np.full((4, 5), -100)
    with pytest.raises(DataError, match="All targets"):
        distill(
            model,
            nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)),
            ArrayData(tokens, labels),
            objective=Objective.preset("causal"),
            check_teacher=False,
        )


def test_different_vocabularies_are_refused_with_a_fix():
    tokens = np.random.default_rng(0).integers(0, 7, (4, 5))
    student, teacher = (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, k)) for k in (7, 9))
    with pytest.raises(ShapeError, match=r"vocabulary of 7, the teacher one of 9.*one tokenizer for both"):
        distill(student, teacher, ArrayData(tokens, tokens), objective=Objective.preset("causal"))


def test_a_batch_without_labels_does_not_change_its_optimizer_step():
    """An optimizer step has two batches; all positions of the first batch are masked."""
    tokens = np.random.default_rng(0).integers(0, 7, (4, 5))
    labels = tokens.copy()
    first = next(ArrayData(tokens, labels, batch_size=2).epoch(0, 0)).ids
    labels[first] = -100

    def train(data, accumulate):
        torch.manual_seed(3)
        models = [nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double() for _ in range(2)]
        training = Training(epochs=1, gradient_accumulation_steps=accumulate, schedule="constant", weight_decay=0.0)
        return distill(*models, data, objective=Objective.preset("causal"), training=training, check_teacher=False)

    both = train(ArrayData(tokens, labels, batch_size=2), 2).model
    rest = np.setdiff1d(np.arange(4), first)
    alone = train(ArrayData(tokens[rest], labels[rest], batch_size=2), 1).model
    for a, b in zip(both.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_term_can_have_weight_0_in_the_first_step():
    objective = Objective((Term("kd", Ramp(0.0, 1.0, epochs=1), temperature=2.0),), label_weight=0.0)
    assert trained(Net(4), Net(6), data(), objective).history[-1]["terms"].keys() == {"kd"}


def test_teachers_with_different_numbers_of_classes_are_refused():
    with pytest.raises(ShapeError, match=r"The teachers return logits of the shapes \(3,\), \(5,\) per sample"):
        trained(Net(4), [Net(6), Net(6, classes=5)], data(), Objective.kd())


def test_an_adapter_takes_the_combined_teachers():
    """The mean probabilities of two equal teachers are the probabilities of one teacher."""
    teacher, objective = Net(6), Objective.preset("ofa")
    one, two = (trained(_seeded(), t, data(), objective).history for t in (teacher, [teacher, teacher]))
    assert two[0]["terms"] == pytest.approx(one[0]["terms"], rel=1e-5)
    with pytest.raises(UsageError, match="has an adapter for one teacher, but compares with each of 2 teachers"):
        trained(Net(4), [teacher, teacher], data(), Objective.preset("ofa", combine_teachers="sum"))


def test_terms_that_need_more_than_the_top_k_logits_of_a_store_are_refused(tmp_path):
    store = build_store(tmp_path / "store", Net(6), data(), keep=TopK(2))
    for term, sentence in (
        (Term("dkd", 1.0, temperature=1.0), "needs all logits of the teacher"),
        (Term("kd", 1.0, temperature=1.0, options={"standardize": True}), "has the options standardize"),
        (Term("top-k", 1.0, temperature=1.0, options={"k": 3}), "takes the 3 largest logits; the store holds 2"),
    ):
        with pytest.raises(UsageError, match=sentence):
            distill(Net(4), store, data(), objective=Objective((term,)))


def test_an_unknown_label_loss_or_an_invalid_layer_name_is_refused_before_any_work():
    with pytest.raises(UnknownNameError, match="no label loss 'crossentropy'"):
        Objective(label_loss="crossentropy")
    with pytest.raises(UsageError, match="is not a layer name"):
        Term("fitnet", student_layer="layer[").problems()


def test_a_term_with_a_tiny_share_of_the_gradient_gives_one_warning():
    objective = Objective((Term("kd", 1e-7, temperature=2.0),))
    with pytest.warns(UserWarning, match="of the gradient") as caught:
        trained(Net(4), Net(6), data(), objective)
    label, kd = sorted((str(warning.message) for warning in caught), reverse=True)
    assert "The term 'kd' is " in kd
    assert "has almost no effect" in kd
    assert "The term 'label' is " in label
    assert "the other terms have almost no effect" in label
    events = []
    trained(Net(4), Net(6), data(), objective, hooks=TrainingHooks(event=events.append))
    assert len([event for event in events if event["event"] == "warning"]) == 2


def test_a_run_resumed_within_an_epoch_is_bit_identical_to_an_uninterrupted_run():
    """The adapter, averaged weights, balanced gradients, accumulation and the ramp all have state to restore."""

    class Stop(Exception):  # noqa: N818 - not an error
        pass

    terms = (Term("kd", Ramp(0.1, 1.0, 2), temperature=2.0), Term("fitnet", 0.5, student_layer="down"))
    objective = Objective(terms, balance="gradient")
    training = Training(epochs=3, learning_rate=0.01, ema_decay=0.9, gradient_accumulation_steps=2)
    many = ArrayData(data(48).inputs, data(48).targets, batch_size=6)

    def run(**hooks):
        return distill(_seeded(), _teacher(), many, objective=objective, training=training, check_teacher=False,
                       hooks=TrainingHooks(event=lambda event: None, **hooks))  # fmt: skip

    uninterrupted, states, calls = run(), [], []

    def stop():
        calls.append(1)
        return Stop() if len(calls) == 7 else None

    with pytest.raises(Stop):
        run(save=states.append, stop=stop)
    assert states[-1].values["batch"] not in (0, 8)
    resumed = run(resume=states[-1])
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in uninterrupted.history]
    assert_same_bits(uninterrupted.model, resumed.model)


def _teacher():
    torch.manual_seed(9)
    return Net(6)


def test_a_ramp_that_does_not_end_within_the_run_gives_a_warning():
    events = []
    ramp = Ramp(0.0, 2.0, epochs=4, after=1)
    objective = Objective((Term("kd", ramp, temperature=2.0),), label_weight=ramp)
    trained(Net(4), Net(6), data(), objective, hooks=TrainingHooks(event=events.append))
    texts = [event["text"] for event in events if event["event"] == "warning"]
    end = r"reaches 2 after 5 epochs, but the run ends after \d epochs"
    assert any(re.search(rf"weight of the term 'kd' {end}.* in the term: weight=kirsch\.Ramp", text) for text in texts)
    assert any(re.search(rf"weight of the labels {end}.* objective: label_weight=kirsch\.Ramp", text) for text in texts)
