"""`Distiller` in a custom training loop gives the result of `kirsch.distill`."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from distillation.examples import Watched, image_data
from hooks import assert_no_hooks
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense, TopK, build_store
from kirsch.distillation.term import Ramp, Term
from kirsch.errors import CheckpointError, DataError, ModelError, NumericError, ShapeError, StoreError, UsageError
from kirsch.frameworks.training import Training

K, SIZE = 3, 6
LENGTH = 24 // SIZE
OBJECTIVE = Objective(
    (
        Term("kd", Ramp(0.2, 1.0, epochs=1), temperature=2.0),
        Term("fitnet", 0.5, student_layer="1"),
        Term("rkd-distance", 0.3, student_layer="penultimate"),
    ),
    balance="gradient",
)


def net(width, seed, classes=K):
    """Return a network with dropout and batch statistics, which show whether a teacher is in training mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(width, classes),
    )


def deterministic(width, seed):
    """Return a network without dropout and batch statistics, in double precision."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, K)).double()


data = partial(image_data, size=8, batch_size=SIZE)


def distiller(objective=OBJECTIVE, **options):
    return kirsch.Distiller(net(4, 1), net(6, 2), objective, next(data().epoch(0, 0)), **options)


def test_a_printed_distiller_shows_the_objective_and_the_compared_layers():
    found = distiller(Objective((Term("kd", 0.9), Term("fitnet", 0.5, student_layer="1")), label_weight=0.1))
    found.close()
    assert str(found).splitlines() == [
        "student  Sequential",
        "loss     0.9 kd (T 1) + 0.5 fitnet (1) + 0.1 labels",
        "term         student        teacher        adapter",
        "kd           logits (3)     logits (3)",
        "fitnet       1 (4 × 8 × 8)  1 (6 × 8 × 8)  Convolution",
    ]


def sgd(found):
    return torch.optim.SGD(found.parameters(), lr=0.01, momentum=0.9, nesterov=True)


def steps(found, optimizer, start, stop):
    """Train in a plain loop on the batches from `start` up to, but without, `stop`.

    Batches are numbered across epochs: batch `LENGTH` is the first one of epoch 1.
    """
    found.train()
    for step in range(start, stop):
        epoch, number = divmod(step, LENGTH)
        batch = next(data().epoch(0, epoch, number))
        torch.default_generator.manual_seed(step)
        optimizer.zero_grad()
        found(batch, epoch + number / LENGTH).total.backward()
        optimizer.step()


def assert_close_states(one, two):
    for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:The term:UserWarning")
def test_a_plain_loop_gives_the_weights_of_kirsch_distill():
    """The objective has a ramp, an adapter, the penultimate layer and balance.

    Dropout is removed, because this loop and `kirsch.distill` seed the random generator differently.
    """
    models = [net(4, 1), net(6, 2)]
    for model in models:
        model[5] = nn.Identity()
    training = Training(epochs=2, learning_rate=0.01, schedule="constant", weight_decay=0.0)
    trained = kirsch.distill(*models, data(), objective=OBJECTIVE, training=training, check_teacher=False)
    student = copy.deepcopy(models[0])
    with kirsch.Distiller(student, models[1], OBJECTIVE, next(data().epoch(0, 0))) as found:
        steps(found, sgd(found), 0, 2 * LENGTH)
    assert_close_states(trained.model, student)
    assert found.shares == pytest.approx(trained.history[-1]["gradient_shares"], rel=1e-3)
    assert_no_hooks(student, models[1])


@pytest.mark.filterwarnings("ignore:The term:UserWarning")
def test_a_resumed_loop_is_bit_identical_to_an_uninterrupted_loop():
    uninterrupted = distiller()
    steps(uninterrupted, sgd(uninterrupted), 0, 7)
    first = distiller()
    optimizer = sgd(first)
    steps(first, optimizer, 0, 5)
    states = copy.deepcopy([first.state_dict(), first.student.state_dict(), optimizer.state_dict()])
    resumed = distiller(seed=5)
    optimizer = sgd(resumed)
    for stateful, state in zip((resumed, resumed.student, optimizer), states, strict=True):
        stateful.load_state_dict(state)
    steps(resumed, optimizer, 5, 7)
    for expected, parameter in zip(uninterrupted.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, parameter)


def test_a_state_of_another_objective_is_refused():
    state = distiller(Objective((Term("fitnet", 1.0, student_layer="1"),))).state_dict()
    with pytest.raises(CheckpointError, match=r"adapters of the state differ .*: adapter0\..*Build the distiller with"):
        distiller(Objective.kd()).load_state_dict(state)


def test_hooks_are_removed_after_an_exception_and_added_by_the_next_call():
    student, teacher = net(4, 1), net(6, 2)
    with pytest.raises(ModelError), kirsch.Distiller(student, teacher, OBJECTIVE, data().inputs[:2]) as found:
        found((torch.zeros(2, 5, 8, 8), torch.zeros(2, dtype=torch.long)))
    assert_no_hooks(student, teacher)
    assert found((data().inputs[:3], data().targets[:3]), 0.5).terms.keys() == {"label", "kd", "fitnet", "rkd-distance"}
    found.close()
    assert_no_hooks(student, teacher)


def test_the_teacher_stays_in_inference_mode_and_does_not_change(monkeypatch):
    monkeypatch.setattr(Watched, "calls", [])
    teacher = net(6, 2)
    before = copy.deepcopy(teacher.state_dict())
    found = kirsch.Distiller(net(4, 1), Watched(teacher).train(), Objective.kd(), next(data().epoch(0, 0)))
    Watched.calls.clear()
    steps(found, sgd(found), 0, 3)
    assert found.student.training
    assert found.module.training
    assert [call["training"] for call in Watched.calls] == [{False}] * 3
    for call in Watched.calls:
        assert all(torch.equal(before[name], value) for name, value in call["state"].items())
    assert teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list], ids=["numpy", "torch", "list of labels"])
def test_batches_can_be_tuples_dicts_or_inputs_of_numpy_or_torch(kind):
    found = distiller(Objective.kd()).eval()
    inputs, labels = torch.as_tensor(data().inputs[:4]), kind(data().targets[:4])
    value = found((inputs, labels)).total
    assert found((inputs, labels, np.arange(4))).total == value
    assert found({"input": inputs, "labels": labels}).total == value
    assert found(inputs).terms.keys() == {"kd"}


def test_the_gradients_of_the_batches_of_an_optimizer_step_sum_to_the_gradient_of_one_large_batch():
    objective, inputs, labels = Objective.kd(), data().inputs.astype(np.float64), data().targets
    found = kirsch.Distiller(deterministic(4, 1), deterministic(6, 2), objective, (inputs, labels))
    window = [(inputs[part], labels[part]) for part in (slice(0, 5), slice(5, 24))]
    counts = found.counts(window)
    for batch in window:
        found(batch, step_counts=counts).total.backward()
    summed = [p.grad.clone() for p in found.parameters()]
    found.module.zero_grad()
    found((inputs, labels)).total.backward()
    for expected, parameter in zip(summed, found.parameters(), strict=True):
        torch.testing.assert_close(expected, parameter.grad, rtol=1e-10, atol=1e-12)


def test_a_module_wrapped_by_ddp_has_the_same_gradients():
    """One process is enough here; tests/frameworks/pytorch/training/test_processes.py runs two."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = distiller(Objective((Term("fitnet", 1.0, student_layer="1"),))).eval()
        batch = next(data().epoch(0, 0))
        found(batch).total.backward()
        unwrapped = [p.grad.clone() for p in found.parameters()]
        found.module.zero_grad()
        found(batch, module=nn.parallel.DistributedDataParallel(found.module)).total.backward()
        for expected, parameter in zip(unwrapped, found.parameters(), strict=True):
            torch.testing.assert_close(expected, parameter.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_calling_the_student_itself_stores_no_features():
    found = distiller(Objective((Term("fitnet", 1.0, student_layer="1"),)))
    batch = next(data().epoch(0, 0))
    found(batch)
    found.student(torch.as_tensor(batch.inputs))
    assert not found.module._capture._values


def test_a_term_without_gradient_for_the_student_raises_an_error():
    found = distiller(Objective.kd())
    found.student.requires_grad_(requires_grad=False)
    with pytest.raises(NumericError, match="No gradient of the loss term 'label' reaches the model"):
        found(next(data().epoch(0, 0)))


def test_under_no_grad_the_loss_is_computed_and_the_gradient_shares_are_not():
    found = distiller(Objective.kd()).eval()
    with torch.no_grad():
        assert found(next(data().epoch(0, 0))).total > 0
    assert found.shares == {}
    found.train()(next(data().epoch(0, 0)))
    assert found.shares.keys() == {"label", "kd"}


def test_a_term_with_a_tiny_share_of_the_gradient_gives_one_warning():
    found = distiller(Objective((Term("kd", 1e-7, temperature=2.0),)))
    with pytest.warns(UserWarning, match="of the gradient") as caught:
        found(next(data().epoch(0, 0)), 0)
    assert [str(warning.message).split(" is ")[0] for warning in caught] == ["The term 'label'", "The term 'kd'"]
    found(next(data().epoch(0, 0)), 1)


@pytest.mark.parametrize("keep", [TopK(3), Dense()], ids=["top-k", "dense"])
def test_a_store_gives_the_loss_of_its_teacher(tmp_path, keep):
    torch.manual_seed(2)
    teacher, objective = net(6, 2), Objective((Term("kd", 0.9, temperature=2.0),), label_weight=0.1)
    store = build_store(
        tmp_path / "store", teacher, data(), keep=keep, temperature=2.0 if isinstance(keep, TopK) else 1.0
    )
    batch = next(data().epoch(0, 0))
    live, stored = (
        kirsch.Distiller(net(4, 1), source, objective, batch).eval()(batch).total.item() for source in (teacher, store)
    )
    assert stored == pytest.approx(live, rel=2e-3)
    if isinstance(keep, TopK):
        with pytest.raises(StoreError, match="temperature"):
            kirsch.Distiller(net(4, 1), store, Objective.kd(temperature=4.0), batch)
    with pytest.raises(UsageError, match="the batches have none"):
        kirsch.Distiller(net(4, 1), store, objective, (batch.inputs, batch.targets))


def test_a_distiller_of_incompatible_models_objective_and_batch_is_refused_at_construction():
    student, inputs = net(4, 1), data().inputs[:4]
    for teacher, objective, batch, error, sentence in (
        (student, OBJECTIVE, inputs, UsageError, "same object.*copy.deepcopy"),
        (net(6, 2, classes=5), OBJECTIVE, inputs, ShapeError, "returns 3 classes; the teacher returns 5 classes"),
        (net(6, 2), "kd", inputs, UsageError, "`objective` .* is 'kd'; .*kirsch.Objective.preset"),
        (net(6, 2), OBJECTIVE, (inputs, np.array([0, 1, 2, 3])), DataError, "Sample 3 has the label 3"),
        (
            None,
            OBJECTIVE,
            inputs,
            UsageError,
            "`teacher` of kirsch.Distiller is None, and the terms of the objective need one",
        ),
    ):
        with pytest.raises(error, match=sentence):
            kirsch.Distiller(student, teacher, objective, batch)
    assert_no_hooks(student)


def test_an_objective_of_labels_needs_no_teacher():
    found = kirsch.Distiller(net(4, 1), None, Objective.labels(), next(data().epoch(0, 0)))
    assert found.rows == []
    assert found(next(data().epoch(0, 0))).terms.keys() == {"label"}
