"""Models learn one after the other, and a chain that is cut loses none of its finished links."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from kirsch.data.batches import ArrayData
from kirsch.distillation.chain import born_again, distill_chain, ensemble
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense
from kirsch.distillation.store import build as build_store
from kirsch.distillation.term import Term
from kirsch.errors import CheckpointError, Interrupted, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks

N, D, K = 24, 6, 3
SHORT = Training(epochs=2, learning_rate=0.1)
QUIET = TrainingHooks(event=lambda _event: None)


def samples():
    random = np.random.default_rng(0)
    targets = np.arange(N) % K
    return np.eye(D)[targets] * 2 + 0.3 * random.standard_normal((N, D)), targets


def data():
    return ArrayData(*samples(), batch_size=6)


def build(width=5):
    layers = nn.Linear(D, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, K)
    return nn.Sequential(*layers).double()


def net(width, seed):
    torch.manual_seed(seed)
    return build(width)


def models():
    """Teacher, two assistants, student: the widths fall."""
    return [net(width, seed) for seed, width in enumerate((12, 9, 6, 3))]


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(mine, other) for mine, other in pairs)


def without_time(history):
    return [{**record, "seconds": 0} for record in history]


def chain(**options):
    return distill_chain(models(), data(), **{"training": SHORT, "check_teacher": False, **options})


def test_each_link_is_a_distillation_from_the_model_before_it():
    given = models()
    before = copy.deepcopy(given)
    found = distill_chain(given, data(), training=SHORT, check_teacher=False)
    teacher = given[0]
    for trained, student in zip(found, given[1:], strict=True):
        alone = distill(student, teacher, data(), training=SHORT, check_teacher=False)
        assert same(trained.model, alone.model)
        assert without_time(trained.history) == without_time(alone.history)
        teacher = trained.model
    assert all(same(now, then) for now, then in zip(given, before, strict=True))


def test_each_link_may_learn_from_all_before_it_with_the_nearest_first():
    objective = Objective(
        (Term("kd", 0.5, temperature=2.0), Term("l2-normalized", 0.1, student_layer="0", adapter="linear"))
    )
    given = models()
    found = chain(learn_from="all", objective=objective)
    guides = [[given[0]], [found[0].model, given[0]], [found[1].model, found[0].model, given[0]]]
    for trained, student, teacher_source in zip(found, given[1:], guides, strict=True):
        alone = distill(student, teacher_source, data(), objective=objective, training=SHORT, check_teacher=False)
        assert same(trained.model, alone.model)


def test_links_may_have_objectives_and_settings_of_their_own():
    trainings = [Training(epochs=epochs, learning_rate=0.1) for epochs in (1, 2, 3)]
    found = chain(training=trainings, objective=[Objective.kd(), Objective.preset("wsld"), Objective.labels(0.1)])
    assert [len(trained.history) for trained in found] == [1, 2, 3]
    assert [set(trained.history[-1]["terms"]) for trained in found] == [{"label", "kd"}, {"label", "wsld"}, {"label"}]


def test_events_say_which_link_they_are_of():
    told = []
    chain(hooks=TrainingHooks(event=told.append))
    assert [(event["event"], event["link"]) for event in told] == [
        (name, link) for link in (1, 2, 3) for name in ("first_batch", "epoch", "epoch")
    ]


def test_a_chain_may_begin_with_a_store(tmp_path):
    store = build_store(tmp_path / "store", models()[0], data(), keep=Dense())
    found = distill_chain([store, *models()[1:]], data(), training=SHORT, hooks=QUIET)
    assert len(found) == 3
    with pytest.raises(UsageError, match="A store cannot be combined with the models that come after it"):
        distill_chain([store, *models()[1:]], data(), learn_from="all")


def loader():
    """It shuffles by a generator of its own, whose state goes on from link to link."""
    dataset = TensorDataset(*map(torch.from_numpy, samples()))
    return DataLoader(dataset, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("make", "stop_at"), [(data, 3), (data, 10), (data, 30), (loader, 12), (loader, 20)])
def test_a_chain_that_is_cut_anywhere_ends_in_the_same_bits(make, stop_at):
    """Each link asks ten times: after each of 4 batches, and after each of 2 epochs; at 10 and 30 a link is done."""
    training, asked, states, told = Training(epochs=2, learning_rate=0.1, ema_decay=0.9), [], [], []

    def run(**hooks):
        return chain_of(make(), learn_from="all", training=training, hooks=TrainingHooks(**hooks))

    def chain_of(given, **options):
        return distill_chain(models(), given, check_teacher=False, **options)

    def stop():
        asked.append(1)
        return Interrupted("enough") if len(asked) == stop_at else None

    whole = run()
    with pytest.raises(Interrupted):
        run(stop=stop, save=states.append)
    rest = run(resume=states[-1], event=told.append, save=states.append)
    for wanted, found in zip(whole, rest, strict=True):
        assert same(wanted.model, found.model)
        assert without_time(wanted.history) == without_time(found.history)
        assert wanted.first_batch == found.first_batch
    trained_again = {event["link"] for event in told if event["event"] == "epoch"}
    assert trained_again == {link for link in (1, 2, 3) if link > stop_at // 10}
    assert [state.values["epoch"] for state in states] == sorted(state.values["epoch"] for state in states)
    assert all(same(a.model, b.model) for a, b in zip(run(resume=states[-1]), whole, strict=True))


def test_the_state_of_a_chain_drops_the_optimizers_of_what_is_done():
    states = []
    chain(hooks=TrainingHooks(save=states.append))
    links = [{name.split(".")[0] for name in state.arrays if ".optimizer." in name} for state in states]
    assert links == [{"0"}] * 2 + [{"1"}] * 2 + [{"2"}] * 2


def test_a_state_that_is_of_no_chain_or_a_longer_one_is_refused():
    states = []
    distill(net(3, 1), net(5, 2), data(), training=SHORT, check_teacher=False, hooks=TrainingHooks(save=states.append))
    with pytest.raises(CheckpointError, match=r"The checkpoint holds no links of a chain; this one has 3\. .*anew"):
        chain(hooks=TrainingHooks(resume=states[-1]))
    chain(hooks=TrainingHooks(save=states.append))
    with pytest.raises(CheckpointError, match="The checkpoint holds 3 links of a chain; this one has 1"):
        distill_chain(models()[:2], data(), hooks=TrainingHooks(resume=states[-1]))
    with pytest.raises(CheckpointError, match="of another model"):
        distill_chain(models()[::-1], data(), check_teacher=False, hooks=TrainingHooks(resume=states[-1]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"training": [SHORT]}, "There are 1 for 'training' and 3 links"),
        ({"objective": [Objective.kd()] * 4}, "There are 4 for 'objective' and 3 links"),
        ({"learn_from": "first"}, "`learn_from` .* is 'first'; expected 'previous' or 'all'"),
    ],
)
def test_what_does_not_fit_the_links_is_refused(options, sentence):
    with pytest.raises((UsageError, UnknownNameError), match=sentence):
        chain(**options)


def test_a_chain_of_one_model_or_of_one_twice_is_refused():
    with pytest.raises(UsageError, match="needs a teacher and a student; there are 1 models"):
        distill_chain(models()[:1], data())
    one, other = models()[:2]
    with pytest.raises(UsageError, match=r"Models 0 and 2 are the same object\. .*copy\.deepcopy"):
        distill_chain([one, other, one], data())


# ------------------------------------------------------------------------------------------------ born again


def test_generations_begin_with_fresh_weights_and_learn_from_the_last():
    training = Training(epochs=2, learning_rate=0.1, seed=7)
    state = torch.get_rng_state()
    found = born_again(build, data(), generations=2, training=training, hooks=QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    first = fit(net(5, 7), data(), training=training)
    assert same(found[0].model, first.model)
    teacher = first.model
    for number in (1, 2):
        alone = distill(
            net(5, 7 + number),
            teacher,
            data(),
            training=Training(epochs=2, learning_rate=0.1, seed=7 + number),
            check_teacher=False,
        )
        assert same(found[number].model, alone.model)
        teacher = alone.model
    assert [set(trained.history[0]["terms"]) for trained in found] == [{"label"}, {"label", "kd"}, {"label", "kd"}]


def test_generations_may_begin_from_a_teacher_that_is_there():
    teacher = fit(net(5, 3), data(), training=Training(epochs=8)).model
    found = born_again(build, data(), generations=2, teacher=teacher, training=SHORT, objective=Objective.kd(1.0, 1.0))
    assert [set(trained.history[0]["terms"]) for trained in found] == [{"kd"}, {"kd"}]


def test_generations_that_are_cut_end_in_the_same_bits():
    asked, states = [], []

    def run(**hooks):
        return born_again(build, data(), generations=2, training=SHORT, hooks=TrainingHooks(event=QUIET.event, **hooks))

    def stop():
        asked.append(1)
        return Interrupted("enough") if len(asked) == 14 else None

    whole = run()
    with pytest.raises(Interrupted):
        run(stop=stop, save=states.append)
    rest = run(resume=states[-1])
    assert all(same(a.model, b.model) for a, b in zip(whole, rest, strict=True))


def test_a_build_without_chance_is_refused():
    def seeded():
        return net(5, 0)

    with pytest.raises(UsageError, match=r"`build` gives the same weights each time\. .*set no seed"):
        born_again(seeded, data())
    one = build()
    with pytest.raises(UsageError, match="are the same object"):
        born_again(lambda: one, data())
    with pytest.raises(UsageError, match=r"`generations` .* is 0; expected a whole number of at least 1"):
        born_again(build, data(), generations=0)


# ------------------------------------------------------------------------------------------------ several as one


def test_an_ensemble_says_the_mean_of_what_its_models_say(tmp_path):
    members = models()[:3]
    inputs = torch.from_numpy(samples()[0])
    found = ensemble(members)
    assert not found.training
    assert all(member.training for member in members)
    with torch.no_grad():
        wanted = sum(copy.deepcopy(member).eval()(inputs).softmax(-1) for member in members) / 3
        torch.testing.assert_close(found(inputs).softmax(-1), wanted, rtol=1e-10, atol=1e-14)
        logits = sum(copy.deepcopy(member).eval()(inputs) for member in members) / 3
        torch.testing.assert_close(ensemble(members, "logits")(inputs), logits, rtol=1e-12, atol=1e-14)


def test_models_that_write_into_their_inputs_do_not_change_what_others_see():
    class Centered(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.model = net(5, seed)

        def forward(self, x):
            x -= 1.0
            return self.model(x)

    members, inputs = (
        [Centered(1).eval(), Centered(1).eval()],
        torch.zeros(4, *data().inputs.shape[1:], dtype=torch.float64),
    )
    alone = members[0](inputs.clone())
    torch.testing.assert_close(ensemble(members)(inputs).log_softmax(-1), alone.log_softmax(-1))
    assert not inputs.any()
    distill_mutually([Centered(1), Centered(2)], data(), training=SHORT)


def test_an_ensemble_teaches_as_its_models_do_together():
    members = models()[:2]
    objective = Objective((Term("kd", 0.5, temperature=1.0),))
    options = {"objective": objective, "training": SHORT, "check_teacher": False}
    one, several = (distill(net(3, 9), teacher, data(), **options) for teacher in (ensemble(members), members))
    assert one.history[-1]["loss"] == pytest.approx(several.history[-1]["loss"], rel=1e-9)


def test_an_ensemble_is_exported_as_any_model(tmp_path):
    members = [member.float().eval() for member in models()[:2]]
    inputs = torch.from_numpy(samples()[0].astype(np.float32))
    artifact = kirsch.export(ensemble(members), tmp_path / "both.onnx", example_inputs=inputs)
    assert artifact.path.is_file()


def test_an_ensemble_of_nothing_or_in_an_unknown_way_is_refused():
    with pytest.raises(UsageError, match="An ensemble of no models has no scores"):
        ensemble([])
    with pytest.raises(UsageError, match=r"`combine` .* is 'sum'; expected 'probabilities', 'logits'"):
        ensemble(models(), "sum")
    five = nn.Linear(D, 5).double()
    with pytest.raises(ShapeError, match="The models of the ensemble have 5, 3 classes"):
        ensemble([five, models()[0]])(torch.from_numpy(samples()[0]))
