"""The training loop: steps in closed form, resuming in the same bits, and numbers that went wrong."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from kirsch.errors import CheckpointError, DataError, Interrupted, NumericError, UsageError
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.pytorch.features.student import student_of
from kirsch.frameworks.pytorch.training.optimizer import learning_rate
from kirsch.frameworks.pytorch.training.train import train
from kirsch.frameworks.training import LossOutput, Training, TrainingHooks, TrainingState

N, D, K = 14, 5, 3
QUIET = TrainingHooks()


def samples():
    random = np.random.default_rng(0)
    return random.standard_normal((N, D)).astype(np.float32), np.arange(N) % K


def batches(batch_size=4):
    return ArrayData(*samples(), batch_size)


def pairs():
    return [(batch.inputs, batch.targets) for batch in batches().epoch(0, 0)]


def network(dtype=torch.float32):
    """State in running statistics, chance in dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, K)
        return nn.Sequential(*layers).to(dtype)


def plain_linear():
    model = nn.Linear(D, K, bias=False)
    model.weight.data.copy_(torch.linspace(-1, 1, D * K).reshape(K, D))
    return model


def cross_entropy(model, inputs, targets):
    loss = F.cross_entropy(model(inputs), targets)
    return loss, {"label": loss}


class Plain:
    """A function (student, inputs, targets) → (total, parts) as a training step calls it."""

    def __init__(self, function):
        self.function, self.norms = function, []

    def __call__(self, model, batch, epoch, of):
        total, parts = self.function(student_of(model), batch.inputs, batch.targets)
        share = len(batch) / of["labels"]
        return LossOutput(share * total, {name: share * part for name, part in parts.items()})

    def counts(self, batches):
        return {"labels": sum(len(batch) for batch in batches)}

    def check(self, batch):
        """Takes any targets."""
        return []

    def balance(self, norms):
        self.norms.append(norms)

    def state(self):
        return {}

    def restore(self, state):
        assert state == {}


def trained(data=None, *, training=None, model=None, loss=cross_entropy, **hooks):
    training, data = training or Training(epochs=3, learning_rate=0.1), batches() if data is None else data
    return train(model or network(), data, Plain(loss), training, TrainingHooks(**hooks))


def assert_same_bits(first, second):
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


# ------------------------------------------------------------------------------------------------ the learning rate


def rates(training, length=None):
    """The rate at the start of each epoch, or at each of `length` batches an epoch."""
    return [learning_rate(training, step / (length or 1)) for step in range(training.epochs * (length or 1))]


def test_the_cosine_schedule_in_closed_form():
    found = rates(Training(epochs=6, learning_rate=0.8, schedule="cosine"))
    third = math.sqrt(3) / 2  # cos 30°
    wanted = [0.8, 0.4 * (1 + third), 0.6, 0.4, 0.2, 0.4 * (1 - third)]
    assert found == pytest.approx(wanted, rel=1e-12)
    for beyond in (6, 6.5, 9):  # of data that gives more batches than it says
        assert learning_rate(Training(epochs=6, schedule="cosine"), beyond) == pytest.approx(0, abs=1e-15)


def test_the_multistep_schedule_falls_at_its_milestones():
    found = rates(Training(epochs=8, learning_rate=1.0, schedule="multistep", milestones=(0.5, 0.75)))
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_milestones_count_from_the_end_of_the_warmup():
    training = Training(epochs=10, learning_rate=1.0, schedule="multistep", milestones=(0.5,), warmup_epochs=2)
    assert rates(training)[2:] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])


def test_the_constant_schedule_is_constant():
    assert rates(Training(epochs=5, learning_rate=0.3, schedule="constant")) == [0.3] * 5


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "constant"])
def test_the_warmup_rises_in_a_line_to_the_peak(schedule):
    found = rates(Training(epochs=6, learning_rate=0.4, schedule=schedule, warmup_epochs=2), length=2)
    # The first step is a thousandth of an epoch ahead, so that it is a step at all.
    assert found[:4] == pytest.approx([0.4 * (epoch + 1e-3) / 2 for epoch in (0, 0.5, 1, 1.5)], rel=1e-12)
    assert found[4] == 0.4


def test_a_warmup_shorter_than_a_step_does_not_rise_above_the_peak():
    training = Training(epochs=1, learning_rate=0.4, warmup_epochs=1e-3)
    assert [learning_rate(training, epoch) for epoch in (0, 5e-4, 9e-4)] == pytest.approx([0.4] * 3)


def test_each_batch_is_taken_at_the_rate_of_its_place():
    """SGD on a loss of slope one moves by the rate itself, times what momentum has gathered."""
    model = nn.Linear(1, 1, bias=False)
    seen = []

    def slope_one(model, inputs, targets):
        seen.append(float(model.weight.detach()))
        return model.weight.sum(), {"slope": model.weight.sum()}

    training = Training(epochs=2, learning_rate=0.1, weight_decay=0.0, warmup_epochs=0.5)
    data = ArrayData(np.zeros((4, 1), np.float32), np.zeros(4, int), batch_size=2)
    found = trained(data, training=training, model=model, loss=slope_one)
    seen.append(float(found.model.weight.detach()))
    velocity, moves = 0.0, []
    for place in (0.0, 0.5, 1.0, 1.5):
        velocity = 0.9 * velocity + 1
        moves.append(-learning_rate(training, place) * (1 + 0.9 * velocity))
    np.testing.assert_allclose(np.diff(seen), moves, rtol=1e-5, atol=1e-7)  # float32
    assert [record["learning_rate"] for record in found.history] == [learning_rate(training, e) for e in (0.5, 1.5)]


# ------------------------------------------------------------------------------------------------ the optimizer


@pytest.mark.filterwarnings("ignore:The term 'flat' is 0 on the first batch")
@pytest.mark.parametrize(("optimizer", "gain"), [("sgd", 1.9), ("adamw", 1.0)])
def test_weights_decay_and_biases_and_scales_do_not(optimizer, gain):
    """Where nothing has a slope, a step is the decay alone: lr · decay · w, times 1 + 0.9 under Nesterov."""
    model = network()
    training = Training(epochs=1, learning_rate=0.1, optimizer=optimizer, weight_decay=0.5, schedule="constant")

    def flat(model, inputs, targets):
        loss = sum((p * 0).sum() for p in model.parameters())
        return loss, {"flat": loss}

    found = trained(batches(N), training=training, model=model, loss=flat).model
    for (name, before), after in zip(model.named_parameters(), found.parameters(), strict=True):
        wanted = before * (1 - 0.1 * 0.5 * gain) if before.dim() > 1 else before
        np.testing.assert_allclose(after.detach(), wanted.detach(), rtol=1e-6, err_msg=name)


def test_the_first_step_of_adamw_has_the_size_of_the_rate():
    """Both moments of one gradient cancel: g / √(g²) is its sign."""
    model = plain_linear()
    training = Training(epochs=1, learning_rate=0.01, optimizer="adamw", weight_decay=0.0, schedule="constant")
    found = trained(batches(N), training=training, model=model).model
    moved = (found.weight - model.weight).detach().abs()
    np.testing.assert_allclose(moved, np.full((K, D), 0.01), rtol=1e-4)  # eps of 1e-8 beside gradients of 1e-3


def test_gradients_are_clipped_to_their_norm():
    training = Training(epochs=1, learning_rate=1.0, weight_decay=0.0, schedule="constant", clip_norm=0.25)
    model = plain_linear()
    found = trained(batches(N), training=training, model=model, loss=scaled(1e3)).model
    moved = torch.cat([(a - b).ravel() for a, b in zip(found.parameters(), model.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1.9 * 0.25, rel=1e-4)  # PyTorch adds 1e-6 to the norm


def scaled(factor):
    def loss(model, inputs, targets):
        value = factor * F.cross_entropy(model(inputs), targets)
        return value, {"label": value}

    return loss


def test_a_model_of_which_nothing_can_be_trained_is_refused():
    with pytest.raises(UsageError, match=r"Nothing of Sequential can be trained\. All its parameters have req"):
        trained(model=network().requires_grad_(requires_grad=False))


# ------------------------------------------------------------------------------------------------ resuming


class Noisy(TensorDataset):
    """Augmentation in the dataset, from PyTorch's own generator, as torchvision does it."""

    def __getitem__(self, place):
        inputs, targets = super().__getitem__(place)
        return inputs + 0.1 * torch.randn(inputs.shape), targets


class Endless(IterableDataset):
    """Samples without a length, in an order drawn anew at each pass."""

    def __iter__(self):
        inputs, targets = map(torch.from_numpy, samples())
        return iter([(inputs[place], targets[place]) for place in torch.randperm(N)])


class Drawn:
    """Batches in an order drawn anew when a pass begins, without a loader."""

    def __len__(self):
        return 4

    def __iter__(self):
        inputs, targets = samples()
        order = np.array_split(torch.randperm(N).numpy(), 4)
        return iter([(inputs[chosen], targets[chosen]) for chosen in order])


def shaken(batch, random):
    return batch + 0.1 * random.standard_normal(batch.shape).astype(np.float32)


def loader(kind):
    """A fresh one at each call, as a new process makes it."""
    dataset = TensorDataset(*map(torch.from_numpy, samples()))
    noisy = Noisy(*map(torch.from_numpy, samples()))
    own = torch.Generator().manual_seed(5)
    return {
        "arrays": lambda: ArrayData(*samples(), 4, shaken),
        "list": lambda: pairs(),
        "passes": Drawn,
        "in order": lambda: DataLoader(dataset, 4),
        "shuffled": lambda: DataLoader(dataset, 4, shuffle=True),
        "shuffled, augmented": lambda: DataLoader(noisy, 4, shuffle=True, drop_last=True),
        "own generator": lambda: DataLoader(dataset, 4, shuffle=True, generator=own),
        "generator of the sampler": lambda: DataLoader(dataset, 4, sampler=RandomSampler(dataset, generator=own)),
        "batch sampler": lambda: DataLoader(
            dataset, batch_sampler=BatchSampler(RandomSampler(dataset, generator=own), 4, drop_last=False)
        ),
        "no length": lambda: DataLoader(Endless(), 4),
    }[kind]()


def stopped_everywhere(data, training):
    """The run in as many pieces as it can be cut into, each as in a new process, and the states between them."""
    states = []
    while not states or states[-1].values["epoch"] < training.epochs:
        assert len(states) < 12, "the run does not come forward"
        model, resume = network(), states[-1] if states else None
        if resume:
            model[0].weight.data.zero_()  # the state brings its own

        def save(state):
            states.append(TrainingState(state.arrays, json.loads(json.dumps(state.values))))

        hooks = TrainingHooks(stop=lambda: Interrupted("enough"), save=save, resume=resume)
        with torch.random.fork_rng():
            torch.manual_seed(len(states))  # whatever the random state of the process is
            with pytest.raises(Interrupted):
                train(model, loader(data), Plain(cross_entropy), training, hooks)
    return train(network(), loader(data), Plain(cross_entropy), training, TrainingHooks(resume=states[-1])), states


LOADERS = ["in order", "shuffled", "own generator", "generator of the sampler", "batch sampler"]


@pytest.mark.parametrize(
    ("data", "optimizer"),
    [
        *itertools.product(["arrays", "shuffled, augmented"], ["sgd", "adamw"]),
        *itertools.product(["list", "passes", *LOADERS], ["sgd"]),
        ("no length", "adamw"),
    ],
)
def test_a_run_that_is_stopped_wherever_it_can_be_ends_in_the_same_bits(data, optimizer):
    """Each saved state is gone on from: after each batch, and after each epoch."""
    schedule = "constant" if data == "no length" else "cosine"
    training = Training(epochs=2, learning_rate=0.02, optimizer=optimizer, schedule=schedule)
    whole = train(network(), loader(data), Plain(cross_entropy), training, QUIET)
    again, states = stopped_everywhere(data, training)
    steps = 3 if data == "shuffled, augmented" else 4
    places = [(state.values["epoch"], state.values["batch"]) for state in states]
    assert places == [(e, b) for e in range(2) for b in range(steps + 1) if e or b] + [(2, 0)]
    assert_same_bits(whole.model, again.model)
    assert plain(again.history) == plain(whole.history)
    assert again.first_batch == whole.first_batch


def plain(history):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_in_bfloat16_goes_on_in_the_same_bits(optimizer):
    """numpy has no bfloat16; neither weights nor moments may lose their meaning on the way."""
    inputs, targets = (torch.from_numpy(part) for part in samples())
    data = [(inputs[part].bfloat16(), targets[part]) for part in (slice(0, 7), slice(7, 14))]
    training = Training(epochs=2, learning_rate=0.02, optimizer=optimizer)
    states = []
    whole = trained(data, model=network(torch.bfloat16), training=training, save=states.append)
    again = trained(data, model=network(torch.bfloat16), training=training, resume=states[0])
    assert_same_bits(whole.model, again.model)


def test_orders_differ_between_epochs_and_seeds():
    seen = []

    def noted(model, inputs, targets):
        seen.append(tuple(targets.tolist()))
        return cross_entropy(model, inputs, targets)

    for seed in (0, 1):
        trained(loader("shuffled"), training=Training(epochs=2, seed=seed), loss=noted)
    epochs = [tuple(seen[start : start + 4]) for start in range(0, 16, 4)]
    assert len(set(epochs)) == 4
    assert all(sorted(sum(epoch, ())) == sorted(samples()[1].tolist()) for epoch in epochs)


def test_the_seed_is_all_the_chance_there_is():
    def run(seed, state):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            return trained(training=Training(epochs=1, learning_rate=0.1, seed=seed)).model

    assert_same_bits(run(3, 0), run(3, 1))
    assert not torch.equal(run(3, 0)[0].weight, run(4, 0)[0].weight)


def test_dropout_differs_from_batch_to_batch():
    masks = []

    def noted(model, inputs, targets):
        masks.append(tuple((model[3](torch.ones(64)) == 0).tolist()))
        return cross_entropy(model, inputs, targets)

    trained(loss=noted, training=Training(epochs=2))
    assert len(set(masks)) == len(masks) == 8


def test_a_state_is_not_changed_by_the_run_that_made_it():
    states, kept = [], []

    def save(state):
        states.append(state)
        kept.append(copy.deepcopy(state))

    trained(save=save)
    for state, wanted in zip(states, kept, strict=True):
        assert state.values == wanted.values
        assert all(np.array_equal(state.arrays[name], array) for name, array in wanted.arrays.items())
    assert [len(state.values["history"]) for state in states] == [1, 2, 3]


def test_a_state_of_another_model_is_refused():
    states = []
    trained(save=states.append)
    other = nn.Sequential(nn.Linear(D, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, K))
    for model in (other, nn.Linear(D, K)):
        with pytest.raises(CheckpointError, match=r"The checkpoint is of another model\. Start the run anew"):
            trained(model=model, resume=states[0])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"optimizer": "adamw"}, "optimizer is 'adamw', and was 'sgd'"),
        ({"ema": 0.9}, "ema is 0.9, and was None"),
        ({"seed": 4, "learning_rate": 0.5}, "learning_rate is 0.5, and was 0.1; seed is 4, and was 0"),
        ({"milestones": (0.2,)}, r"milestones is \[0\.2\], and was \[0\.5, 0\.75\]"),
        ({"epochs": 5}, "epochs is 5, and was 3"),
    ],
)
def test_a_state_is_not_gone_on_from_with_other_settings(changed, sentence):
    states, settings = [], {"epochs": 3, "learning_rate": 0.1}
    trained(training=Training(**settings), save=states.append)
    state = TrainingState(states[0].arrays, json.loads(json.dumps(states[0].values)))
    sentence = rf"The run was begun with other settings: {sentence}\. .* the schedule follows"
    with pytest.raises(CheckpointError, match=sentence):
        trained(training=Training(**settings | changed), resume=state)


def test_a_state_is_not_gone_on_from_with_other_batches():
    states = []
    trained(save=states.append)
    with pytest.raises(CheckpointError, match=r"other settings: batches of an epoch is 2, and was 4\."):
        trained(batches(7), resume=states[0])


def test_a_stop_saves_once_and_raises_what_it_was_given():
    states, error = [], Interrupted("enough")
    with pytest.raises(Interrupted, match="enough") as caught:
        trained(stop=lambda: error, save=states.append)
    assert caught.value is error
    assert [(state.values["epoch"], state.values["batch"]) for state in states] == [(0, 1)]


def test_a_stop_after_the_last_epoch_finds_its_state_saved_already():
    states, hooks = [], {}
    hooks["stop"] = lambda: Interrupted("enough") if states else None
    with pytest.raises(Interrupted):
        trained(save=states.append, **hooks)
    assert [(state.values["epoch"], state.values["batch"]) for state in states] == [(1, 0)]


# ------------------------------------------------------------------------------------------------ data


class Unsized:
    def __iter__(self):
        return iter(Drawn())


@pytest.mark.parametrize("data", [DataLoader(Endless(), 4), Unsized()], ids=["loader", "iterable"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "'cosine' follows the part of the run that is done"),
        ({"schedule": "multistep"}, "'multistep' follows"),
        ({"schedule": "constant", "warmup_epochs": 1}, r"'constant' with 1 warmup_epochs follows"),
    ],
)
def test_data_without_a_length_is_refused_where_the_rate_depends_on_it(data, options, sentence):
    sentence = (
        rf"has no length\. The schedule {sentence}.* Give the data a __len__, or train with schedule=\"constant\""
    )
    with pytest.raises(DataError, match=sentence):
        trained(data, training=Training(**options), loss=lambda *_: pytest.fail("a step was made"))


@pytest.mark.parametrize("data", [DataLoader(Endless(), 4), Unsized()], ids=["loader", "iterable"])
def test_data_without_a_length_trains_at_a_constant_rate(data):
    found = trained(data, training=Training(epochs=2, learning_rate=0.1, schedule="constant"))
    assert [record["learning_rate"] for record in found.history] == [0.1, 0.1]
    assert not torch.equal(found.model[0].weight, network()[0].weight)


def test_data_that_runs_dry_is_refused():
    class Once:
        def __init__(self):
            self.rest = iter(pairs())

        def __len__(self):
            return 4

        def __iter__(self):
            return self.rest

    with pytest.raises(DataError, match=r"An epoch had no batches\. Give data that can be gone through more than once"):
        trained(Once(), training=Training(epochs=2))


def test_a_batch_of_one_sample_that_is_left_over_is_no_trouble():
    """BatchNorm refuses a batch of one; 13 = 4 + 4 + 5."""
    inputs, targets = samples()
    found = trained(ArrayData(inputs[:13], targets[:13], 4), training=Training(epochs=1))
    assert int(found.model[1].num_batches_tracked) == 3


def test_terms_may_be_called_as_the_sums_are():
    def loss(model, inputs, targets):
        half = cross_entropy(model, inputs, targets)[0] / 2
        return half + half, {"loss": half, "samples": half}

    (record,) = trained(loss=loss, training=Training(epochs=1, learning_rate=0.1)).history
    assert record["parts"] == pytest.approx({"loss": record["loss"] / 2, "samples": record["loss"] / 2})


def test_what_validation_gives_replaces_nothing():
    with pytest.raises(UsageError, match=r"`validate` gives 'loss', a name that the record of an epoch has already"):
        trained(validate=lambda model: {"accuracy": 1.0, "loss": 0.0})


def test_the_model_is_validated_in_inference_mode_after_each_epoch_and_trains_on():
    modes, training_modes = [], []

    def validate(model):
        modes.append([module.training for module in model.modules()])
        torch.manual_seed(0)  # whatever a validation draws
        return {"accuracy": len(modes) / 10}

    def noted(model, inputs, targets):
        training_modes.append(all(module.training for module in model.modules()))
        return cross_entropy(model, inputs, targets)

    found = trained(loss=noted, validate=validate, model=network().eval())
    assert [any(each) for each in modes] == [False] * 3
    assert all(training_modes)
    assert [record["accuracy"] for record in found.history] == [0.1, 0.2, 0.3]
    assert_same_bits(found.model, trained().model)


# ------------------------------------------------------------------------------------------------ numbers gone wrong


def test_nan_in_the_weights_given_is_refused_by_name_before_any_step():
    model = network()
    model[4].weight.data[0, 0] = math.nan
    sentence = r"The parameter `4\.weight` of the model given is not finite\. .* Load or initialize its weights anew"
    with pytest.raises(NumericError, match=sentence) as caught:
        trained(model=model, loss=lambda *_: pytest.fail("a step was made"))
    assert caught.value.exit_code == 6


def test_nan_in_the_inputs_is_said():
    inputs, targets = samples()
    bad = inputs.copy()
    bad[2, 1] = math.nan
    with pytest.raises(NumericError, match=r"The inputs hold NaN or infinity at epoch 1, batch 2\. Repair") as e:
        trained([(inputs, targets), (bad, targets)])
    assert e.value.exit_code == 6


class Root(nn.Module):
    """√x: NaN below zero."""

    def forward(self, x):
        return x.sqrt()


def test_the_first_layer_whose_output_is_not_finite_is_named():
    model = nn.Sequential(plain_linear(), Root(), nn.Linear(K, K))
    with pytest.raises(NumericError, match=r"The output of `1` is not finite at epoch 1, batch 1") as caught:
        trained(model=model)
    assert caught.value.exit_code == 6


def test_a_loss_term_that_is_not_finite_is_named():
    def loss(model, inputs, targets):
        label, bad = F.cross_entropy(model(inputs), targets), model[0].weight.sum() * math.inf
        return label + bad, {"label": label, "bad": bad}

    with pytest.raises(NumericError, match=r"The loss term bad is not finite at epoch 1, batch 1, while all that"):
        trained(loss=loss)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (1e30, r"The labels are finite and reach 1e\+30, whose square is beyond .* Scale the labels"),
        (math.nan, r"^The labels hold NaN or infinity at epoch 1, batch 1\. Repair"),
        (-math.inf, r"^The labels hold NaN or infinity at epoch 1, batch 1\. Repair"),
        (2.0, r"The labels are finite; .* the outputs of the teacher, if there is one"),
    ],
)
def test_labels_that_make_a_loss_infinite_are_told_from_the_loss_and_the_teacher(label, sentence):
    def loss(model, inputs, targets):
        value = F.mse_loss(model(inputs), targets) / (0 if label == 2 else 1)
        return value, {"label": value}

    inputs, _ = samples()
    with pytest.raises(NumericError, match=sentence):
        trained([(inputs, np.full((len(inputs), K), label, np.float32))], loss=loss)


def test_weights_that_leave_the_numbers_are_named_at_the_next_step():
    with pytest.raises(NumericError, match=r"The parameter `\d\.\w+` is no longer finite at epoch 1, batch 2\. Lower"):
        trained(loss=exploding(at=1))


def exploding(at):
    """A loss whose gradient is infinite at one of the batches, while its value is finite."""
    calls = itertools.count(1)

    def loss(model, inputs, targets):
        value = F.cross_entropy(model(inputs), targets)
        if next(calls) == at:
            bias = model[4].bias
            value = value + ((bias - bias.detach()).abs() ** 0.5).sum()  # √0 = 0, of infinite slope
        return value, {"label": value}

    return loss


def outside(*_):
    pytest.fail("weights that are not finite were handed out")


def test_weights_that_leave_the_numbers_in_the_last_step_of_an_epoch_are_neither_judged_nor_saved_nor_given_back():
    """Four batches an epoch; the second epoch ends with the eighth."""
    saved, judged, told = [], [], []
    with pytest.raises(NumericError, match=r"The parameter `4\.bias` is no longer finite in epoch 2\. Lower the") as e:
        trained(
            loss=exploding(at=8),
            training=Training(epochs=2),
            save=saved.append,
            validate=lambda model: judged.append(model) or {},
            event=told.append,
        )
    assert e.value.exit_code == 6
    assert (len(saved), len(judged), [event["event"] for event in told]) == (1, 1, ["first_batch", "epoch"])
    assert all(np.isfinite(array).all() for array in saved[0].arrays.values())


def test_weights_that_left_the_numbers_are_not_saved_by_a_stop():
    with pytest.raises(NumericError, match=r"The parameter `4\.bias` is no longer finite in epoch 1"):
        trained(loss=exploding(at=1), save=outside, stop=lambda: Interrupted("enough"))


def test_statistics_that_leave_the_numbers_are_named():
    """One sample's size overflows the variance, which a forward in training mode does not read."""
    inputs, targets = samples()
    model = nn.Sequential(nn.BatchNorm1d(D, affine=False), nn.Linear(D, K))
    model[0].running_var.fill_(3e38)

    def loss(model, inputs, targets):
        model[0].running_var.mul_(10)
        return cross_entropy(model, inputs, targets)

    with pytest.raises(NumericError, match=r"The buffer `0\.running_var` is no longer finite in epoch 1"):
        trained([(inputs, targets)], model=model, loss=loss, save=outside)


def test_a_buffer_that_is_infinite_on_purpose_is_none_that_went_wrong():
    model = network()
    model.register_buffer("mask", torch.full((3,), -math.inf))
    assert len(trained(model=model).history) == 3


# ------------------------------------------------------------------------------------------------ the first batch


def test_the_shares_of_the_first_batch_in_closed_form():
    """Slopes 3 and 4 along two weights: gradients of norm 3 and 4 share 3/7 and 4/7; values 3·2 and 4·1 share 0.6 and
    0.4."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[2.0, 1.0]]))

    def loss(model, inputs, targets):
        parts = {"first": 3 * model.weight[0, 0], "second": 4 * model.weight[0, 1]}
        return parts["first"] + parts["second"], parts

    found = trained(model=model, loss=loss, training=Training(epochs=1)).first_batch
    assert found["loss_shares"] == pytest.approx({"first": 0.6, "second": 0.4})
    assert found["gradient_shares"] == pytest.approx({"first": 3 / 7, "second": 4 / 7})


def test_a_term_that_is_zero_may_have_no_slope_and_one_that_is_not_may_not():
    def loss(value):
        def with_flat_term(model, inputs, targets):
            label, flat = F.cross_entropy(model(inputs), targets), (model[0].weight * 0).sum() + value
            return label + flat, {"label": label, "flat": flat}

        return with_flat_term

    with pytest.warns(UserWarning, match="The term 'flat' is 0 on the first batch, and has no gradient") as told:
        assert trained(loss=loss(0.0)).first_batch["gradient_shares"]["flat"] == 0
    assert len(told) == 1  # and not in each epoch
    with pytest.raises(NumericError, match=r"The loss term 'flat' gives the model no gradient\. Its value .* is 0\.5"):
        trained(loss=loss(0.5))


def test_a_term_that_does_not_reach_the_model_is_refused_even_at_zero():
    def loss(model, inputs, targets):
        label, other = F.cross_entropy(model(inputs), targets), torch.zeros((), requires_grad=True)
        return label + other, {"label": label, "other": other}

    with pytest.raises(NumericError, match="The loss term 'other' gives the model no gradient"):
        trained(loss=loss)


# ------------------------------------------------------------------------------------------------ precision


def test_runs_of_one_process_have_each_a_precision_of_their_own():
    """Accelerate holds one for the whole process; the caller's own is what it was afterwards."""
    mine = Accelerator(mixed_precision="bf16")
    weights = [
        train(
            network(), batches(), Plain(cross_entropy), Training(epochs=1, precision=precision), TrainingHooks()
        ).model
        for precision in ("fp32", "bf16", "fp32")
    ]
    assert mine.mixed_precision == "bf16"
    AcceleratorState._reset_state()
    full, half, again = ([p.detach() for p in model.parameters()] for model in weights)
    assert all(map(torch.equal, full, again))
    assert not all(map(torch.equal, full, half))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_a_precision_that_the_machine_lacks_is_refused():
    sentence = r"precision is 'fp16', which this machine cannot train in\. .*fp16.* Take \"bf16\" or \"fp32\""
    with pytest.raises(UsageError, match=sentence):
        train(network(), batches(), Plain(cross_entropy), Training(epochs=1, precision="fp16"), TrainingHooks())
