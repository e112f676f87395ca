"""A student learns what the formulas say, nothing of the caller changes, and what cannot work is refused at once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kirsch import ops
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses import LOSSES, hard_label, loss, soft_target
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import DataError, Interrupted, NumericError, ShapeError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.pruning.regularizers import L1

N, D, K = 36, 6, 3
ONE_STEP = Training(epochs=1, learning_rate=0.1, schedule="constant", weight_decay=0.0)
NESTEROV = 1.9
"""The first step of SGD with Nesterov momentum 0.9 is 1.9 times the gradient."""


def samples(n=N, seed=0):
    """Three classes around three corners, float64."""
    random = np.random.default_rng(seed)
    targets = np.arange(n) % K
    return np.eye(D)[targets] * 2 + 0.3 * random.standard_normal((n, D)), targets


def linear(classes=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(D, classes, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(torch.randn(classes, D, generator=generator))
    return nn.Sequential(layer)


@pytest.fixture
def teacher():
    """A linear layer that reads the corners off."""
    model = linear()
    model[0].weight.data.copy_(2 * torch.eye(K, D))
    return model


@pytest.fixture
def student():
    return linear(seed=1)


def whole():
    """All samples as one batch."""
    return ArrayData(*samples(), batch_size=N)


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def weight(model):
    return model[0].weight.detach().numpy()


def gradients(student, teacher, temperature):
    """Of the labels and of the soft targets for the weight of a linear student, worked out: (K, D) each."""
    inputs, targets = samples()
    scores, teacher_source = inputs @ weight(student).T, inputs @ weight(teacher).T
    label = (softmax(scores) - np.eye(K)[targets]).T @ inputs / N
    soft = temperature * (softmax(scores / temperature) - softmax(teacher_source / temperature)).T @ inputs / N
    return label, soft


def test_one_step_of_distillation_in_closed_form(student, teacher):
    label, soft = gradients(student, teacher, 3.0)
    found = distill(student, teacher, whole(), objective=Objective.kd(3.0, 0.7), training=ONE_STEP)
    wanted = weight(student) - 0.1 * NESTEROV * (0.3 * label + 0.7 * soft)
    np.testing.assert_allclose(weight(found.model), wanted, rtol=1e-12)


def test_the_first_batch_shares_in_closed_form(student, teacher):
    label, soft = gradients(student, teacher, 3.0)
    found = distill(student, teacher, whole(), objective=Objective.kd(3.0, 0.7), training=ONE_STEP).first_batch
    inputs, targets = samples()
    scores, teacher_source = inputs @ weight(student).T, inputs @ weight(teacher).T
    losses = 0.3 * hard_label(scores, targets), 0.7 * soft_target(scores, teacher_source, temperature=3.0)
    norms = 0.3 * np.linalg.norm(label), 0.7 * np.linalg.norm(soft)
    for shares, parts in (("loss_shares", losses), ("gradient_shares", norms)):
        # 1e-6: norms are summed in float32
        assert found[shares] == pytest.approx({"label": parts[0] / sum(parts), "kd": parts[1] / sum(parts)}, rel=1e-6)
        assert sum(found[shares].values()) == pytest.approx(1)


def test_the_history_holds_the_weighted_parts_and_their_sum(student, teacher):
    (record,) = distill(student, teacher, whole(), objective=Objective.kd(3.0, 0.7), training=ONE_STEP).history
    inputs, targets = samples()
    scores, teacher_source = inputs @ weight(student).T, inputs @ weight(teacher).T
    parts = {
        "label": 0.3 * hard_label(scores, targets),
        "kd": 0.7 * soft_target(scores, teacher_source, temperature=3.0),
    }
    assert record["terms"] == pytest.approx(parts)
    assert record["loss"] == pytest.approx(sum(parts.values()))


def test_the_history_is_a_mean_over_samples_and_not_over_batches(student):
    """Batches of 20 and 16: each sample counts once. The rate is so small that the weights stand still."""
    slow = Training(epochs=1, learning_rate=1e-12, schedule="constant", weight_decay=0.0)
    (record,) = fit(student, ArrayData(*samples(), batch_size=20), training=slow).history
    inputs, targets = samples()
    assert record["loss"] == pytest.approx(hard_label(inputs @ weight(student).T, targets), rel=1e-9)


def test_a_student_that_may_equal_its_teacher_comes_to(student, teacher):
    """Of soft targets alone, a linear student has one minimum: the teacher, up to a shift of all classes."""
    training = Training(epochs=60, learning_rate=1.0, schedule="constant", weight_decay=0.0)
    found = distill(student, teacher, whole(), objective=Objective.kd(2.0, 1.0), training=training).model
    inputs, _ = samples()
    learned, wanted = (softmax(inputs @ weight(model).T / 2) for model in (found, teacher))
    np.testing.assert_allclose(learned, wanted, atol=1e-2)  # gradient descent ends where it is stopped


def test_a_student_that_equals_its_teacher_is_charged_nothing_and_stays(teacher):
    found = distill(copy.deepcopy(teacher), teacher, whole(), objective=Objective.kd(4.0, 1.0), training=ONE_STEP)
    assert found.history[0]["terms"] == {"kd": 0.0}
    assert found.first_batch["loss_shares"] == {"kd": 0.0}
    np.testing.assert_allclose(weight(found.model), weight(teacher), atol=1e-16)  # rounding of p - p


def test_terms_of_one_loss_are_all_charged(student, teacher):
    terms = (Term("kd", 0.5, temperature=1.0), Term("kd", 0.25, temperature=4.0), Term("kd", 0.25, temperature=8.0))
    found = distill(student, teacher, whole(), objective=Objective(terms, label_weight=0.0), training=ONE_STEP)
    assert set(found.history[0]["terms"]) == {"kd", "kd#2", "kd#3"}
    step = sum(term.weight * gradients(student, teacher, term.temperature)[1] for term in terms)
    np.testing.assert_allclose(weight(found.model), weight(student) - 0.1 * NESTEROV * step, rtol=1e-12)


def test_regularizers_of_one_class_are_all_charged(student):
    """The slope of s Σ|w| is s sign(w); 0.01 and 0.02 make 0.03."""
    plain = fit(student, whole(), training=ONE_STEP)
    found = fit(student, whole(), training=ONE_STEP, regularizers=(L1(0.01), L1(0.02)))
    assert {"L1", "L1#2"} < set(found.history[0]["terms"])
    difference = weight(found.model) - weight(plain.model)
    np.testing.assert_allclose(difference, -0.1 * NESTEROV * 0.03 * np.sign(weight(student)), rtol=1e-9)


def test_labels_are_smoothed_by_fit(student):
    inputs, targets = samples()
    (record,) = fit(student, whole(), training=ONE_STEP, label_smoothing=0.2).history
    assert record["loss"] == pytest.approx(hard_label(inputs @ weight(student).T, targets, label_smoothing=0.2))


def test_a_term_without_weight_is_not_computed(student, teacher, monkeypatch):
    monkeypatch.setattr(LOSSES, "_objects", dict(LOSSES._objects))

    @loss("broken")
    def broken(student, teacher, *, temperature=1.0):
        raise ZeroDivisionError

    objective = Objective((Term("broken", 0.0),), label_weight=1.0)
    assert set(distill(student, teacher, whole(), objective=objective, training=ONE_STEP).history[0]["terms"]) == {
        "label"
    }


# ------------------------------------------------------------------------------------------------ what must not change


class Watched(nn.Module):
    """A teacher that notes how it is run."""

    seen: list = []  # noqa: RUF012 - copies of the module write to one list

    def __init__(self, inner):
        super().__init__()
        self.inner, self.drop = inner, nn.Dropout(0.9)

    def forward(self, x):
        self.seen.append((self.training, self.drop.training, torch.is_grad_enabled()))
        return self.drop(self.inner(x))


def test_a_teacher_in_training_mode_teaches_in_inference_mode(student, teacher, monkeypatch):
    monkeypatch.setattr(Watched, "seen", [])
    watched = Watched(teacher).train()
    found = distill(student, watched, whole(), objective=Objective.kd(3.0, 0.7), training=ONE_STEP)
    assert Watched.seen
    assert set(Watched.seen) == {(False, False, False)}
    assert watched.training
    assert watched.drop.training
    plain = distill(student, teacher, whole(), objective=Objective.kd(3.0, 0.7), training=ONE_STEP)
    np.testing.assert_array_equal(weight(found.model), weight(plain.model))


def test_both_models_given_keep_bits_modes_and_gradients():
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
    found = distill(*models, ArrayData(*samples(), batch_size=8), training=Training(epochs=2), check_teacher=False)
    for model, (values, modes, gradients_) in zip(models, before, strict=True):
        now = state(model)
        assert all(torch.equal(values[name], now[0][name]) for name in values)
        assert now[1:] == (modes, gradients_)
    assert not found.model.training
    assert not torch.equal(found.model[0].weight, models[0][0].weight)
    assert torch.equal(found.model[3].bias, models[0][3].bias)


@pytest.mark.parametrize("kind", ["arrays", "list", "loader", "own generator"])
def test_the_random_state_of_the_caller_is_left_as_it_is(student, teacher, kind):
    inputs, targets = (torch.from_numpy(part) for part in samples())
    dataset = TensorDataset(inputs, targets)
    data = {
        "arrays": whole(),
        "list": [(inputs, targets)],
        "loader": DataLoader(dataset, batch_size=8, shuffle=True),
        "own generator": DataLoader(dataset, batch_size=8, shuffle=True, generator=torch.Generator()),
    }[kind]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the caller's may be the old one
    distill(student, teacher, data, training=Training(epochs=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002 - the same


def test_lists_of_arrays_lists_of_tensors_and_loaders_train_the_same(student, teacher):
    inputs, targets = samples()
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


# ------------------------------------------------------------------------------------------------ what is told


def test_events_tell_teacher_first_batch_and_each_epoch(student, teacher):
    told = []
    found = distill(student, teacher, whole(), training=Training(epochs=2), hooks=TrainingHooks(event=told.append))
    assert [event["event"] for event in told] == ["teacher", "first_batch", "epoch", "epoch"]
    assert told[0] == {"event": "teacher", "accuracy": 1.0, "classes": K}
    assert told[1] == {"event": "first_batch", **found.first_batch}
    assert told[3] == {"event": "epoch", "epochs": 2, **found.history[1]}


def test_validation_may_be_a_pair_arrays_or_a_callable(student, teacher):
    inputs, targets = samples(30, seed=5)
    targets[:10] = (targets[:10] + 1) % K  # a third is wrong on purpose: 20 of 30 is the best there is
    training = Training(epochs=8, learning_rate=0.5)

    def accuracy(validation):
        return distill(student, teacher, whole(), training=training, validation=validation).history[-1]["accuracy"]

    assert accuracy((inputs, targets)) == pytest.approx(20 / 30)
    assert accuracy(ArrayData(inputs, targets)) == pytest.approx(20 / 30)
    assert accuracy((torch.from_numpy(inputs), torch.from_numpy(targets))) == pytest.approx(20 / 30)
    assert accuracy(lambda model: {"accuracy": float(model.training)}) == 0.0
    rows = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(targets))
    loader = DataLoader(rows, 7, shuffle=True)
    assert accuracy(loader) == pytest.approx(20 / 30)
    assert accuracy([(inputs[:12], targets[:12]), (inputs[12:], targets[12:])]) == pytest.approx(20 / 30)


def test_a_teacher_is_judged_on_as_many_batches_as_have_samples_enough(student, teacher):
    inputs, targets = samples(60, seed=5)
    batches = [(inputs[i : i + 10], (targets[i : i + 10] + 1) % K) for i in range(0, 60, 10)]
    with pytest.raises(NumericError, match=r"no better than chance: 0\.0% of 40 samples"):
        distill(student, teacher, whole(), validation=batches)
    with pytest.raises(NumericError, match=r"no better than chance: 0\.0% of 40 samples"):
        distill(student, teacher, batches)


def test_a_teacher_that_is_not_told_from_chance_is_doubted(student, teacher):
    """16 of 36 are right, of three classes: 44.4%; two standard deviations above a third are 49%."""
    inputs, targets = samples()
    right = np.arange(36) < 16
    sentence = r"not measurably better than chance: 44\.4% of 36 samples are correct, chance is 33\.3%"
    with pytest.warns(UserWarning, match=sentence):
        distill(student, teacher, whole(), validation=(inputs, np.where(right, targets, (targets + 1) % K)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"validation": 3}, r"`validation` is 3\. Give ArrayData, \(inputs, labels\), a DataLoader"),
        ({"validation": iter([])}, r"`validation` is a list_iterator\. Give ArrayData"),
        ({"validation": (1, 2, 3)}, r"`validation` is a tuple of 3\. Give ArrayData"),
        ({"training": {"epochs": 2}}, r"`training` .* is a dict of 1; .* Give kirsch\.Training\(epochs=10\)"),
        ({"training": 2}, r"`training` .* is 2; .* Give kirsch\.Training\(epochs=10\)"),
        ({"hooks": {"event": print}}, r"`hooks` .* is a dict of 1; .*Give kirsch\.frameworks\.training\.TrainingHooks"),
    ],
)
def test_an_argument_of_another_kind_is_named(student, teacher, options, sentence):
    for attempt in (
        lambda: distill(student, teacher, whole(), **options),
        lambda: fit(student, whole(), **options),
        lambda: distill_mutually([student, linear(seed=5)], whole(), **options),
    ):
        with pytest.raises(UsageError, match=sentence):
            attempt()


def test_hooks_that_validate_themselves_are_asked_first(student, teacher):
    hooks = TrainingHooks(validate=lambda model: {"mine": 7.0})
    (record,) = distill(student, teacher, whole(), training=ONE_STEP, validation=samples(), hooks=hooks).history
    assert record["mine"] == 7.0
    assert "accuracy" not in record


def test_a_run_that_is_validated_obeys_its_other_hooks_too(student, teacher):
    states, training = [], Training(epochs=2)
    data = whole()
    complete = distill(student, teacher, data, training=training, validation=samples())
    hooks = TrainingHooks(stop=lambda: Interrupted("enough"), save=states.append)
    with pytest.raises(Interrupted, match="enough"):
        distill(student, teacher, data, training=training, validation=samples(), hooks=hooks)
    hooks = TrainingHooks(resume=states[0])
    again = distill(linear(seed=2), teacher, data, training=training, validation=samples(), hooks=hooks)
    np.testing.assert_array_equal(weight(again.model), weight(complete.model))
    assert [record["accuracy"] for record in again.history] == [record["accuracy"] for record in complete.history]


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_student_that_is_its_teacher_is_refused(teacher):
    with pytest.raises(UsageError, match=r"same object\. Give the student as a copy: copy\.deepcopy\(teacher\)"):
        distill(teacher, teacher, whole())


def test_other_classes_are_refused_with_both_numbers(student):
    with pytest.raises(ShapeError, match=r"student puts out 3 classes, the teacher 4 classes\. Soft targets need"):
        distill(student, linear(classes=4), whole())


def test_scores_of_another_rank_are_refused_with_both_shapes(student):
    per_position = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, K, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"puts out 3 classes, the teacher scores of shape \(2, 3\) a sample"):
        distill(student, per_position, whole())


either = pytest.mark.parametrize(
    "learn", [fit, lambda model, data: distill(model, linear(), data, check_teacher=False)], ids=["fit", "distill"]
)


@either
def test_no_batches_are_refused(student, learn):
    with pytest.raises(DataError, match=r"The data is empty\. Give at least one batch"):
        learn(student, [])


@either
def test_data_for_one_pass_is_refused(student, learn):
    sentence = r"iterated only once\. Each epoch iterates over it again\. Give a list or a DataLoader"
    with pytest.raises(DataError, match=sentence):
        learn(student, (samples() for _ in range(2)))


@either
@pytest.mark.parametrize("label", [K, -1])
def test_a_label_that_no_class_has_is_refused_with_its_sample(student, learn, label):
    inputs, targets = samples()
    targets[7] = label
    sentence = rf"Sample 7 has the label {label}\. The model puts out 3 classes, so labels go from 0 to 2"
    later = [tuple(map(torch.from_numpy, samples())), (torch.from_numpy(inputs), torch.from_numpy(targets))]
    for data in (ArrayData(inputs, targets, batch_size=4), [(inputs, targets)], later):
        with pytest.raises(DataError, match=sentence):
            learn(student, data)


@either
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda y: np.eye(K)[y], r"\(36, 3\) and type float64, values 0 to 1\. .* one-hot: give targets\.argmax\(-1\)"),
        (lambda y: y + 0.5, r"\(36,\) .*values 0\.5 to 2\.5.* numbers to come near to .* label_loss=\"squared-error\""),
        (lambda y: y[:, None], r"\(36, 1\) and type int64, .* Take out the axis of length 1: targets\[:, 0\]"),
        (lambda y: y.astype(np.float32), r"type float32, .* whole numbers stored as floats: .*targets\.long\(\)"),
        (lambda y: y > 0, r"type bool, .* Give whole numbers: targets\.astype"),
        (lambda y: np.eye(K)[y] * 0.8 + 0.2 / K, "They are soft labels.* label_weight=0"),
        (lambda y: (y[:, None] >= np.arange(K)).astype(int), r"yes or no for each class .* label_loss=\"binary\""),
        (lambda y: np.where(y, y, np.nan), "and NaN or infinity.* Leave out samples whose target is NaN"),
        (lambda y: y[:, None] + 0.25, r"\(36, 1\) .* label_loss=\"squared-error\""),
    ],
    ids=["one-hot", "halves", "column", "floats", "bool", "soft", "several", "nan", "numbers"],
)
def test_targets_that_are_no_class_numbers_are_refused_by_what_they_look_like(student, learn, change, sentence):
    inputs, targets = samples()
    for data in (ArrayData(inputs, change(targets)), [(inputs, change(targets))]):
        with pytest.raises(DataError, match=sentence):
            learn(student, data)


def inverted(model):
    """A teacher that likes each class the less the more it should."""
    model[0].weight.data.neg_()
    return model


def test_a_teacher_no_better_than_chance_is_refused(student, teacher):
    sentence = r"no better than chance: 0\.0% of 36 samples are correct, chance is 33\.3%"
    with pytest.raises(NumericError, match=sentence) as caught:
        distill(student, inverted(teacher), whole())
    assert caught.value.exit_code == 6


def test_a_teacher_that_says_one_class_is_no_better_than_chance(student, teacher):
    teacher[0].weight.data.zero_()
    with pytest.raises(NumericError, match=r"33\.3% of 36 samples are correct, chance is 33\.3%"):
        distill(student, teacher, whole())


def test_a_teacher_is_judged_on_the_validation_where_there_is_one(student, teacher):
    inputs, targets = samples()
    with pytest.raises(NumericError, match="no better than chance"):
        distill(student, teacher, whole(), validation=(inputs, (targets + 1) % K))


def test_a_bad_teacher_is_let_through_where_it_is_asked_for_or_too_few_samples_speak(student, teacher):
    told = []
    hooks = TrainingHooks(event=told.append)
    distill(student, inverted(teacher), whole(), training=ONE_STEP, check_teacher=False, hooks=hooks)
    assert "teacher" not in [event["event"] for event in told]
    distill(student, teacher, ArrayData(*samples(31)), training=ONE_STEP, hooks=hooks)
    assert {"event": "teacher", "accuracy": 0.0, "classes": K} in told
    assert any("0.0% of 31 samples are correct" in event.get("text", "") for event in told)


def test_a_teacher_with_nan_is_refused_by_its_name(student, teacher):
    teacher[0].weight.data[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"The teacher's outputs are not finite\. .* Check the teacher's weights"):
        distill(student, teacher, whole())


@pytest.mark.parametrize(
    "formula",
    [
        lambda student, teacher, *, temperature=1.0: ((ops.detach(student) - teacher) ** 2).mean(),
        lambda student, teacher, *, temperature=1.0: (student - student + 1).mean(),
    ],
    ids=["cut off", "flat"],
)
def test_a_term_without_gradient_is_refused(student, teacher, formula, monkeypatch):
    monkeypatch.setattr(LOSSES, "_objects", dict(LOSSES._objects))
    loss("flat")(formula)
    sentence = r"No gradient of the loss term 'flat' reaches the model\. Its value on the first batch of the epoch is"
    with pytest.raises(NumericError, match=sentence):
        distill(student, teacher, whole(), objective=Objective((Term("flat"),)), training=ONE_STEP)


def test_a_regularizer_of_another_model_is_refused(student):
    other = linear()
    with pytest.raises(NumericError, match="No gradient of the loss term 'function' reaches the model"):
        fit(student, whole(), training=ONE_STEP, regularizers=[lambda _model: other[0].weight.abs().sum()])
