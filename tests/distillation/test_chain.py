"""Chains, born-again networks and ensembles; an interrupted chain keeps its finished links."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from distillation.examples import samples
from kirsch.data.batches import ArrayData
from kirsch.distillation.chain import born_again, distill_chain, ensemble
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense, build_store
from kirsch.distillation.term import Term
from kirsch.errors import CheckpointError, Interrupted, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks
from training_networks import normalized_network
from training_runs import equal_weights

N, D, K = 24, 6, 3
SHORT = Training(epochs=2, learning_rate=0.1)
QUIET = TrainingHooks(event=lambda _event: None)


def data():
    return ArrayData(*samples(N), batch_size=6)


def build(width=5, seed=None):
    return normalized_network(width, seed, D, nn.ReLU).double()


def models():
    """Return a teacher, two assistants and a student, of falling width."""
    return [build(width, seed) for seed, width in enumerate((12, 9, 6, 3))]


def without_time(history):
    return [{**record, "seconds": 0} for record in history]


def chain(**options):
    return distill_chain(models(), data(), **{"training": SHORT, "check_teacher": False, **options})


def test_each_link_is_a_distillation_from_the_model_before_it():
    networks = models()
    before = copy.deepcopy(networks)
    found = distill_chain(networks, data(), training=SHORT, check_teacher=False)
    teacher = networks[0]
    for trained, student in zip(found, networks[1:], strict=True):
        alone = distill(student, teacher, data(), training=SHORT, check_teacher=False)
        assert equal_weights(trained.model, alone.model)
        assert without_time(trained.history) == without_time(alone.history)
        teacher = trained.model
    assert all(equal_weights(now, then) for now, then in zip(networks, before, strict=True))


def test_with_learn_from_all_each_model_learns_from_all_previous_models_the_latest_first():
    objective = Objective(
        (Term("kd", 0.5, temperature=2.0), Term("l2-normalized", 0.1, student_layer="0", adapter="linear"))
    )
    networks = models()
    found = chain(learn_from="all", objective=objective)
    teachers = [[networks[0]], [found[0].model, networks[0]], [found[1].model, found[0].model, networks[0]]]
    for trained, student, nearest_first in zip(found, networks[1:], teachers, strict=True):
        alone = distill(student, nearest_first, data(), objective=objective, training=SHORT, check_teacher=False)
        assert equal_weights(trained.model, alone.model)


def test_each_link_can_have_its_own_objective_and_training():
    trainings = [Training(epochs=epochs, learning_rate=0.1) for epochs in (1, 2, 3)]
    found = chain(
        training=trainings, objective=[Objective.kd(), Objective.preset("wsld"), Objective.labels(label_smoothing=0.1)]
    )
    assert [len(trained.history) for trained in found] == [1, 2, 3]
    assert [set(trained.history[-1]["terms"]) for trained in found] == [{"label", "kd"}, {"label", "wsld"}, {"label"}]


def test_events_have_the_number_of_their_link():
    events = []
    chain(hooks=TrainingHooks(event=events.append))
    assert [(event["event"], event["link"]) for event in events] == [
        (name, link) for link in (1, 2, 3) for name in ("first_batch", "epoch", "epoch")
    ]


def test_the_first_teacher_of_a_chain_can_be_a_store(tmp_path):
    store = build_store(tmp_path / "store", models()[0], data(), keep=Dense())
    found = distill_chain([store, *models()[1:]], data(), training=SHORT, hooks=QUIET)
    assert len(found) == 3
    with pytest.raises(UsageError, match="A store cannot be combined with other teachers"):
        distill_chain([store, *models()[1:]], data(), learn_from="all")


def loader():
    """Return a loader that shuffles with its own generator, which is not reset between links."""
    dataset = TensorDataset(*map(torch.from_numpy, samples(N)))
    return DataLoader(dataset, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("make", "stop_at"), [(data, 3), (data, 10), (data, 30), (loader, 12), (loader, 20)])
def test_a_resumed_chain_is_bit_identical_to_an_uninterrupted_chain(make, stop_at):
    """Each link calls `stop` ten times, after each batch and each epoch, so that links end at calls 10, 20 and 30."""
    training, calls, states, events = Training(epochs=2, learning_rate=0.1, ema_decay=0.9), [], [], []

    def run(**hooks):
        options = {"learn_from": "all", "training": training, "check_teacher": False}
        return distill_chain(models(), make(), hooks=TrainingHooks(**hooks), **options)

    def stop():
        calls.append(1)
        return Interrupted("stopped") if len(calls) == stop_at else None

    uninterrupted = run()
    with pytest.raises(Interrupted):
        run(stop=stop, save=states.append)
    resumed = run(resume=states[-1], event=events.append, save=states.append)
    for expected, result in zip(uninterrupted, resumed, strict=True):
        assert equal_weights(expected.model, result.model)
        assert without_time(expected.history) == without_time(result.history)
        assert expected.first_batch == result.first_batch
    trained_again = {event["link"] for event in events if event["event"] == "epoch"}
    assert trained_again == {link for link in (1, 2, 3) if link > stop_at // 10}
    assert [state.values["epoch"] for state in states] == sorted(state.values["epoch"] for state in states)
    assert all(equal_weights(a.model, b.model) for a, b in zip(run(resume=states[-1]), uninterrupted, strict=True))


def test_the_state_of_a_chain_has_no_optimizer_state_of_finished_links():
    states = []
    chain(hooks=TrainingHooks(save=states.append))
    links = [{name.split(".")[0] for name in state.arrays if ".optimizer." in name} for state in states]
    assert links == [{"0"}] * 2 + [{"1"}] * 2 + [{"2"}] * 2


def test_a_state_of_another_run_or_of_a_longer_chain_is_refused():
    states = []
    distill(
        build(3, 1), build(5, 2), data(), training=SHORT, check_teacher=False, hooks=TrainingHooks(save=states.append)
    )
    with pytest.raises(
        CheckpointError, match=r"The checkpoint has no links of a chain; this chain has 3\. .*from the beginning"
    ):
        chain(hooks=TrainingHooks(resume=states[-1]))
    chain(hooks=TrainingHooks(save=states.append))
    with pytest.raises(CheckpointError, match="The checkpoint has 3 links of a chain; this chain has 1"):
        distill_chain(models()[:2], data(), hooks=TrainingHooks(resume=states[-1]))
    with pytest.raises(CheckpointError, match="of another model"):
        distill_chain(models()[::-1], data(), check_teacher=False, hooks=TrainingHooks(resume=states[-1]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"training": [SHORT]}, "`training` has 1 item, and the chain has 3 links"),
        ({"objective": [Objective.kd()] * 4}, "`objective` has 4 items, and the chain has 3 links"),
        ({"learn_from": "first"}, "`learn_from` .* is 'first'; expected 'previous' or 'all'"),
    ],
)
def test_a_list_of_options_that_is_not_as_long_as_the_chain_is_refused(options, sentence):
    with pytest.raises((UsageError, UnknownNameError), match=sentence):
        chain(**options)


def test_a_chain_of_one_model_or_with_a_repeated_model_is_refused():
    with pytest.raises(UsageError, match="needs a teacher and a student; found 1 model\\."):
        distill_chain(models()[:1], data())
    one, other = models()[:2]
    with pytest.raises(UsageError, match=r"Models 0 and 2 are the same object\. .*copy\.deepcopy"):
        distill_chain([one, other, one], data())


# ------------------------------------------------------------------------------------------------ born again


def test_each_generation_has_new_weights_and_learns_from_the_previous_generation():
    training = Training(epochs=2, learning_rate=0.1, seed=7)
    state = torch.get_rng_state()
    found = born_again(build, data(), generations=2, training=training, hooks=QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    first = fit(build(5, 7), data(), training=training)
    assert equal_weights(found[0].model, first.model)
    teacher = first.model
    for number in (1, 2):
        alone = distill(
            build(5, 7 + number),
            teacher,
            data(),
            training=Training(epochs=2, learning_rate=0.1, seed=7 + number),
            check_teacher=False,
        )
        assert equal_weights(found[number].model, alone.model)
        teacher = alone.model
    assert [set(trained.history[0]["terms"]) for trained in found] == [{"label"}, {"label", "kd"}, {"label", "kd"}]


def test_with_the_option_teacher_the_first_generation_learns_from_this_teacher():
    teacher = fit(build(5, 3), data(), training=Training(epochs=8)).model
    found = born_again(
        build,
        data(),
        generations=2,
        teacher=teacher,
        training=SHORT,
        objective=Objective.kd(temperature=1.0, weight=1.0),
    )
    assert [set(trained.history[0]["terms"]) for trained in found] == [{"kd"}, {"kd"}]


def test_resumed_generations_are_bit_identical_to_uninterrupted_generations():
    calls, states = [], []

    def run(**hooks):
        return born_again(build, data(), generations=2, training=SHORT, hooks=TrainingHooks(event=QUIET.event, **hooks))

    def stop():
        calls.append(1)
        return Interrupted("stopped") if len(calls) == 14 else None

    uninterrupted = run()
    with pytest.raises(Interrupted):
        run(stop=stop, save=states.append)
    resumed = run(resume=states[-1])
    assert all(equal_weights(a.model, b.model) for a, b in zip(uninterrupted, resumed, strict=True))


def test_a_function_build_that_returns_the_same_weights_or_model_twice_is_refused():
    def seeded():
        return build(5, 0)

    with pytest.raises(UsageError, match=r"`build` returns the same weights each time\. .*Remove the seed"):
        born_again(seeded, data())
    one = build()
    with pytest.raises(UsageError, match="are the same object"):
        born_again(lambda: one, data())
    with pytest.raises(UsageError, match=r"`generations` .* is 0; expected a whole number of at least 1"):
        born_again(build, data(), generations=0)


# ------------------------------------------------------------------------------------------------ ensembles


def test_an_ensemble_returns_the_mean_probabilities_or_logits_of_its_models():
    members = models()[:3]
    inputs = torch.from_numpy(samples(N)[0])
    found = ensemble(members)
    assert not found.training
    assert all(member.training for member in members)
    with torch.no_grad():
        expected = sum(copy.deepcopy(member).eval()(inputs).softmax(-1) for member in members) / 3
        torch.testing.assert_close(found(inputs).softmax(-1), expected, rtol=1e-10, atol=1e-14)
        logits = sum(copy.deepcopy(member).eval()(inputs) for member in members) / 3
        torch.testing.assert_close(ensemble(members, combine="logits")(inputs), logits, rtol=1e-12, atol=1e-14)


def test_a_model_that_modifies_its_inputs_does_not_affect_the_others():
    class Centered(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.model = build(5, seed)

        def forward(self, x):
            x -= 1.0
            return self.model(x)

    members = [Centered(1).eval(), Centered(1).eval()]
    inputs = torch.zeros(4, *data().inputs.shape[1:], dtype=torch.float64)
    alone = members[0](inputs.clone())
    torch.testing.assert_close(ensemble(members)(inputs).log_softmax(-1), alone.log_softmax(-1))
    assert not inputs.any()
    distill_mutually([Centered(1), Centered(2)], data(), training=SHORT)


def test_an_ensemble_as_teacher_equals_its_models_as_teachers():
    members = models()[:2]
    objective = Objective((Term("kd", 0.5, temperature=1.0),))
    options = {"objective": objective, "training": SHORT, "check_teacher": False}
    one, several = (distill(build(3, 9), teacher, data(), **options) for teacher in (ensemble(members), members))
    assert one.history[-1]["loss"] == pytest.approx(several.history[-1]["loss"], rel=1e-9)


def test_an_exported_ensemble_returns_the_mean_probabilities_of_its_models(tmp_path):
    members = [member.float().eval() for member in models()[:2]]
    inputs = torch.from_numpy(samples(N)[0].astype(np.float32))
    artifact = kirsch.export(ensemble(members), tmp_path / "both.onnx", example_inputs=inputs)
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.no_grad():
        expected = sum(member(inputs).softmax(-1) for member in members) / 2
    torch.testing.assert_close(torch.from_numpy(logits).softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_an_ensemble_without_models_or_with_an_unknown_combination_is_refused():
    with pytest.raises(UsageError, match=r"`models` of kirsch.ensemble is empty"):
        ensemble([])
    with pytest.raises(UsageError, match=r"`combine` .* is 'sum'; expected 'probabilities', 'logits'"):
        ensemble(models(), combine="sum")
    five = nn.Linear(D, 5).double()
    with pytest.raises(ShapeError, match="The models of the ensemble have 5, 3 classes"):
        ensemble([five, models()[0]])(torch.from_numpy(samples(N)[0]))
