"""`distill` and `fit` equal closed forms and do not change their arguments. Events, validation and its errors."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distillation.examples import Watched, samples, softmax
from distillation.linear_models import NESTEROV, ONE_STEP, D, K, N, linear, one_batch, weight
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses import LOSSES, hard_label, loss, soft_target
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import Interrupted, NumericError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.pruning.regularizers import L1


def gradients(student, teacher, temperature):
    """Return the gradients of label loss and soft targets for the weight of a linear student, each (K, D)."""
    inputs, targets = samples(N)
    logits, teacher_logits = inputs @ weight(student).T, inputs @ weight(teacher).T
    label = (softmax(logits) - np.eye(K)[targets]).T @ inputs / N
    soft = temperature * (softmax(logits / temperature) - softmax(teacher_logits / temperature)).T @ inputs / N
    return label, soft


def test_one_step_of_distillation_equals_its_closed_form(student, teacher):
    label, soft = gradients(student, teacher, 3.0)
    found = distill(
        student, teacher, one_batch(), objective=Objective.kd(temperature=3.0, weight=0.7), training=ONE_STEP
    )
    expected = weight(student) - 0.1 * NESTEROV * (0.3 * label + 0.7 * soft)
    np.testing.assert_allclose(weight(found.model), expected, rtol=1e-12)


def test_the_loss_and_gradient_shares_of_the_first_batch_equal_their_closed_form(student, teacher):
    label, soft = gradients(student, teacher, 3.0)
    found = distill(
        student, teacher, one_batch(), objective=Objective.kd(temperature=3.0, weight=0.7), training=ONE_STEP
    ).first_batch
    inputs, targets = samples(N)
    logits, teacher_logits = inputs @ weight(student).T, inputs @ weight(teacher).T
    losses = 0.3 * hard_label(logits, targets), 0.7 * soft_target(logits, teacher_logits, temperature=3.0)
    norms = 0.3 * np.linalg.norm(label), 0.7 * np.linalg.norm(soft)
    for shares, parts in (("loss_shares", losses), ("gradient_shares", norms)):
        # 1e-6: norms are summed in float32
        assert found[shares] == pytest.approx({"label": parts[0] / sum(parts), "kd": parts[1] / sum(parts)}, rel=1e-6)
        assert sum(found[shares].values()) == pytest.approx(1)


def test_the_history_has_the_weighted_terms_and_their_sum(student, teacher):
    (record,) = distill(
        student, teacher, one_batch(), objective=Objective.kd(temperature=3.0, weight=0.7), training=ONE_STEP
    ).history
    inputs, targets = samples(N)
    logits, teacher_logits = inputs @ weight(student).T, inputs @ weight(teacher).T
    parts = {
        "label": 0.3 * hard_label(logits, targets),
        "kd": 0.7 * soft_target(logits, teacher_logits, temperature=3.0),
    }
    assert record["terms"] == pytest.approx(parts)
    assert record["loss"] == pytest.approx(sum(parts.values()))


def test_the_loss_in_the_history_is_a_mean_over_samples(student):
    """Batches of 20 and 16 samples; the learning rate is too small to change the weights."""
    slow = Training(epochs=1, learning_rate=1e-12, schedule="constant", weight_decay=0.0)
    (record,) = fit(student, ArrayData(*samples(N), batch_size=20), training=slow).history
    inputs, targets = samples(N)
    assert record["loss"] == pytest.approx(hard_label(inputs @ weight(student).T, targets), rel=1e-9)


def test_a_student_of_equal_capacity_converges_to_its_teacher(student, teacher):
    """The soft-target loss of a linear student has one minimum: the teacher, up to a shift of all classes."""
    training = Training(epochs=60, learning_rate=1.0, schedule="constant", weight_decay=0.0)
    found = distill(
        student, teacher, one_batch(), objective=Objective.kd(temperature=2.0, weight=1.0), training=training
    ).model
    inputs, _ = samples(N)
    probabilities, expected = (softmax(inputs @ weight(model).T / 2) for model in (found, teacher))
    np.testing.assert_allclose(probabilities, expected, atol=1e-2)  # 60 steps of gradient descent


def test_a_student_that_equals_its_teacher_has_a_loss_of_0_and_does_not_change(teacher):
    found = distill(
        copy.deepcopy(teacher),
        teacher,
        one_batch(),
        objective=Objective.kd(temperature=4.0, weight=1.0),
        training=ONE_STEP,
    )
    assert found.history[0]["terms"] == {"kd": 0.0}
    assert found.first_batch["loss_shares"] == {"kd": 0.0}
    np.testing.assert_allclose(weight(found.model), weight(teacher), atol=1e-16)  # rounding of p - p


def test_several_terms_of_one_loss_are_all_computed(student, teacher):
    terms = (Term("kd", 0.5, temperature=1.0), Term("kd", 0.25, temperature=4.0), Term("kd", 0.25, temperature=8.0))
    found = distill(student, teacher, one_batch(), objective=Objective(terms, label_weight=0.0), training=ONE_STEP)
    assert set(found.history[0]["terms"]) == {"kd", "kd#2", "kd#3"}
    step = sum(term.weight * gradients(student, teacher, term.temperature)[1] for term in terms)
    np.testing.assert_allclose(weight(found.model), weight(student) - 0.1 * NESTEROV * step, rtol=1e-12)


def test_several_regularizers_of_one_class_are_all_computed(student):
    """The gradient of s Σ|w| is s sign(w); 0.01 and 0.02 sum to 0.03."""
    plain = fit(student, one_batch(), training=ONE_STEP)
    found = fit(student, one_batch(), training=ONE_STEP, regularizers=(L1(0.01), L1(0.02)))
    assert {"L1", "L1#2"} < set(found.history[0]["terms"])
    difference = weight(found.model) - weight(plain.model)
    np.testing.assert_allclose(difference, -0.1 * NESTEROV * 0.03 * np.sign(weight(student)), rtol=1e-9)


def test_fit_smooths_labels(student):
    inputs, targets = samples(N)
    (record,) = fit(student, one_batch(), training=ONE_STEP, label_smoothing=0.2).history
    assert record["loss"] == pytest.approx(hard_label(inputs @ weight(student).T, targets, label_smoothing=0.2))


def test_a_term_of_weight_0_is_not_computed(student, teacher, monkeypatch):
    monkeypatch.setattr(LOSSES, "_objects", dict(LOSSES._objects))

    @loss("broken")
    def broken(student, teacher, *, temperature=1.0):
        raise ZeroDivisionError

    objective = Objective((Term("broken", 0.0),), label_weight=1.0)
    assert set(distill(student, teacher, one_batch(), objective=objective, training=ONE_STEP).history[0]["terms"]) == {
        "label"
    }


# ------------------------------------------------------------------------------------------------ unchanged arguments


def test_a_teacher_in_training_mode_is_run_in_inference_mode(student, teacher, monkeypatch):
    monkeypatch.setattr(Watched, "calls", [])
    watched = Watched(nn.Sequential(teacher, nn.Dropout(0.9))).train()
    found = distill(
        student, watched, one_batch(), objective=Objective.kd(temperature=3.0, weight=0.7), training=ONE_STEP
    )
    assert Watched.calls
    assert all(call["training"] == {False} and not call["gradient"] for call in Watched.calls)
    assert all(module.training for module in watched.modules())
    plain = distill(
        student, teacher, one_batch(), objective=Objective.kd(temperature=3.0, weight=0.7), training=ONE_STEP
    )
    np.testing.assert_array_equal(weight(found.model), weight(plain.model))


def test_student_and_teacher_keep_weights_modes_and_gradients():
    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, K)).double()
        model[3].bias.requires_grad_(requires_grad=False)
        model[1].eval()
        return model

    def state(model):
        return (
            {name: value.clone() for name, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
        )

    with torch.random.fork_rng():
        models = build(0), build(1)
    before = [state(model) for model in models]
    found = distill(*models, ArrayData(*samples(N), batch_size=8), training=Training(epochs=2), check_teacher=False)
    for model, (values, modes, gradients_) in zip(models, before, strict=True):
        now = state(model)
        assert all(torch.equal(values[name], now[0][name]) for name in values)
        assert now[1:] == (modes, gradients_)
    assert not found.model.training
    assert not torch.equal(found.model[0].weight, models[0][0].weight)
    assert torch.equal(found.model[3].bias, models[0][3].bias)


@pytest.mark.parametrize("kind", ["arrays", "list", "loader", "own generator"])
def test_the_random_state_of_the_caller_does_not_change(student, teacher, kind):
    inputs, targets = (torch.from_numpy(part) for part in samples(N))
    dataset = TensorDataset(inputs, targets)
    data = {
        "arrays": one_batch(),
        "list": [(inputs, targets)],
        "loader": DataLoader(dataset, batch_size=8, shuffle=True),
        "own generator": DataLoader(dataset, batch_size=8, shuffle=True, generator=torch.Generator()),
    }[kind]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global state of the caller
    distill(student, teacher, data, training=Training(epochs=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002 - the same


def test_lists_of_arrays_lists_of_tensors_and_loaders_give_the_same_weights(student, teacher):
    inputs, targets = samples(N)
    parts = [slice(0, 16), slice(16, 36)]
    arrays = [(inputs[part], targets[part]) for part in parts]
    tensors = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in arrays]
    loader = DataLoader(TensorDataset(*map(torch.from_numpy, (inputs[:32], targets[:32]))), batch_size=16)
    training = Training(epochs=2)
    first, second = (distill(student, teacher, data, training=training) for data in (arrays, tensors))
    np.testing.assert_array_equal(weight(first.model), weight(second.model))
    halves = [(x[:16], y[:16]) for x, y in arrays]
    third, fourth = (distill(student, teacher, data, training=training) for data in (loader, halves))
    np.testing.assert_array_equal(weight(third.model), weight(fourth.model))


# ------------------------------------------------------------------------------------------------ events and validation


def test_the_teacher_the_first_batch_and_each_epoch_have_an_event(student, teacher):
    events = []
    found = distill(
        student, teacher, one_batch(), training=Training(epochs=2), hooks=TrainingHooks(event=events.append)
    )
    assert [event["event"] for event in events] == ["teacher", "first_batch", "epoch", "epoch"]
    assert events[0] == {"event": "teacher", "accuracy": 1.0, "classes": K}
    assert events[1] == {"event": "first_batch", **found.first_batch}
    assert events[3] == {"event": "epoch", "epochs": 2, **found.history[1]}


def test_a_validation_can_be_arrays_batches_or_a_callable(student, teacher):
    inputs, targets = samples(30, seed=5)
    targets[:10] = (targets[:10] + 1) % K  # a third of the labels is wrong, so that the best accuracy is 20 / 30
    training = Training(epochs=8, learning_rate=0.5)

    def accuracy(validation):
        return distill(student, teacher, one_batch(), training=training, validation=validation).history[-1]["accuracy"]

    assert accuracy((inputs, targets)) == pytest.approx(20 / 30)
    assert accuracy(ArrayData(inputs, targets)) == pytest.approx(20 / 30)
    assert accuracy((torch.from_numpy(inputs), torch.from_numpy(targets))) == pytest.approx(20 / 30)
    assert accuracy(lambda model: {"accuracy": float(model.training)}) == 0.0
    rows = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(targets))
    loader = DataLoader(rows, 7, shuffle=True)
    assert accuracy(loader) == pytest.approx(20 / 30)
    assert accuracy([(inputs[:12], targets[:12]), (inputs[12:], targets[12:])]) == pytest.approx(20 / 30)


def test_all_batches_up_to_1024_samples_are_read_for_a_teacher_that_is_no_better_than_chance(student, teacher):
    inputs, targets = samples(60, seed=5)
    batches = [(inputs[i : i + 10], (targets[i : i + 10] + 1) % K) for i in range(0, 60, 10)]
    with pytest.raises(NumericError, match=r"no better than chance: 0\.0% of 60 samples"):
        distill(student, teacher, one_batch(), validation=batches)
    with pytest.raises(NumericError, match=r"no better than chance: 0\.0% of 60 samples"):
        distill(student, teacher, batches)


def test_training_without_targets_warns_that_the_label_loss_is_left_out(student, teacher):
    inputs, _ = samples(N)
    sentence = r"The batches have no targets, so the label loss, weight 0\.1, is left out\. Give \(inputs, targets\)"
    with pytest.warns(UserWarning, match=sentence):
        distill(student, teacher, [inputs], training=ONE_STEP, check_teacher=False)
    without = Objective(Objective.kd().terms, label_weight=0)
    distill(student, teacher, [inputs], objective=without, training=ONE_STEP, check_teacher=False)


def test_a_teacher_that_is_not_significantly_better_than_chance_gives_a_warning(student, teacher):
    """16 of 36 are correct: 44.4%; two standard deviations above 1/3 are 49%."""
    inputs, targets = samples(N)
    correct = np.arange(36) < 16
    sentence = r"not measurably better than chance: 44\.4% of 36 samples are correct, chance is 33\.3%"
    with pytest.warns(UserWarning, match=sentence):
        distill(student, teacher, one_batch(), validation=(inputs, np.where(correct, targets, (targets + 1) % K)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"validation": linear()}, r"`validation` is a model\. Give \(inputs, labels\), batches, or a function"),
        ({"validation": 3}, r"`validation` is 3\. Give ArrayData, \(inputs, labels\), a DataLoader"),
        ({"validation": iter([])}, r"`validation` is a list_iterator\. Give ArrayData"),
        ({"validation": (1, 2, 3)}, r"`validation` is a tuple with 3 elements\. Give ArrayData"),
        ({"training": {"epochs": 2}}, r"`training` .* is a dict with 1 element; .* Give kirsch\.Training\(epochs=10\)"),
        ({"training": 2}, r"`training` .* is 2; .* Give kirsch\.Training\(epochs=10\)"),
        ({"hooks": {"event": print}}, r"`hooks` .* is a dict with 1 element; .*Give kirsch\.TrainingHooks"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused(student, teacher, options, sentence):
    for call in (
        lambda: distill(student, teacher, one_batch(), **options),
        lambda: fit(student, one_batch(), **options),
        lambda: distill_mutually([student, linear(seed=5)], one_batch(), **options),
    ):
        with pytest.raises(UsageError, match=sentence):
            call()


def test_the_hook_validate_is_refused_beside_the_option_validation(student, teacher):
    hooks = TrainingHooks(validate=lambda _model: {"metric": 7.0})
    for call in (partial(distill, student, teacher), partial(fit, student)):
        with pytest.raises(UsageError, match=r"Both `validation` and `hooks\.validate` are given"):
            call(one_batch(), training=ONE_STEP, hooks=hooks, validation=samples(N))


def test_fit_refuses_terms_and_label_smoothing_beside_an_objective(student):
    with pytest.raises(UsageError, match=r"has the terms kd, and kirsch\.fit has no teacher"):
        fit(student, one_batch(), objective=Objective.kd())
    with pytest.raises(UsageError, match=r"`label_smoothing` of kirsch\.fit has no effect together with `objective`"):
        fit(student, one_batch(), objective=Objective.labels(), label_smoothing=0.1)


def test_a_run_with_validation_can_be_stopped_and_resumed(student, teacher):
    states, training = [], Training(epochs=2)
    data = one_batch()
    complete = distill(student, teacher, data, training=training, validation=samples(N))
    hooks = TrainingHooks(stop=lambda: Interrupted("stopped"), save=states.append)
    with pytest.raises(Interrupted, match="stopped"):
        distill(student, teacher, data, training=training, validation=samples(N), hooks=hooks)
    hooks = TrainingHooks(resume=states[0])
    again = distill(linear(seed=2), teacher, data, training=training, validation=samples(N), hooks=hooks)
    np.testing.assert_array_equal(weight(again.model), weight(complete.model))
    assert [record["accuracy"] for record in again.history] == [record["accuracy"] for record in complete.history]
