"""Outputs that the objective does not use give a warning; the suggested term keeps them, as does the step `recover`."""

from __future__ import annotations

import copy
import json
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.data.batches import ArrayData
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.steps import Prune, Recover

WARNING = r"The objective does not use these outputs of (Two|Both): {names}\. They are not trained"


class Two(nn.Module):
    """Model that returns class logits and a number, `age`; with names, also outputs that need no training."""

    def __init__(self, width=16, named=True):
        super().__init__()
        self.named = named
        self.body = nn.Sequential(nn.Linear(6, width), nn.ReLU())
        self.cls, self.age = nn.Linear(width, 3), nn.Linear(width, 1)

    def forward(self, x):
        hidden = self.body(x)
        logits, age = self.cls(hidden), self.age(hidden).squeeze(-1)
        if not self.named:
            return logits, age
        others = {"hidden_states": (hidden,), "anchors": torch.ones(5), "classes": logits.argmax(-1)}
        return {"age": age, "logits": logits, **others}


def model(seed=0, **options):
    torch.manual_seed(seed)
    return Two(**options)


def data(targets=True):
    inputs = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    return ArrayData(inputs, inputs[:, :3].argmax(1) if targets else None, batch_size=32)


def warned(objective, teacher=None, *, student=None, batch=None):
    """Return the warnings of a distiller."""
    found = []
    first = next((data() if batch is None else batch).epoch(0, 0))
    student = student or model()
    kirsch.Distiller(student, model(1) if teacher is None else teacher, objective, first, warn=found.append).close()
    return found


def test_an_output_that_the_objective_does_not_use_gives_a_warning_with_a_term_that_uses_it():
    (text,) = warned(Objective.kd())
    assert re.match(WARNING.format(names="age"), text)
    code = re.search(r"add to the terms of the objective: (.*)\.$", text)[1]
    term = eval(code, {"kirsch": kirsch})
    assert term.student_layer == "output.age"
    assert warned(Objective((Term("kd"), term))) == []


def test_an_output_of_a_tuple_is_named_by_its_number():
    (text,) = warned(Objective.kd(), model(1, named=False), student=model(named=False))
    assert re.match(WARNING.format(names="1"), text)
    assert 'student_layer="output.1"' in text
    assert warned(Objective.labels(), model(1, named=False), student=model(named=False)) == [text]


def test_a_term_on_the_module_that_computes_an_output_uses_the_output():
    assert warned(Objective((Term("kd"), Term("fitnet", student_layer="age")))) == []


def test_logits_that_the_objective_does_not_use_are_named():
    objective = Objective((Term("fitnet", student_layer="output.age"),), label_weight=0)
    (text,) = warned(objective)
    assert re.match(WARNING.format(names="logits"), text)


@pytest.mark.parametrize(
    "function",
    [
        nn.Softmax(-1),
        nn.LogSoftmax(-1),
        nn.Sigmoid(),
        nn.LogSigmoid(),
        lambda logits: logits.unsqueeze(1),
    ],
)
def test_an_output_that_is_computed_from_the_logits_gives_no_warning(function):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            logits = self.layer(x)
            return {"logits": logits, "other": function(logits)}

    assert warned(Objective.kd(), Both(), student=Both()) == []


def test_an_output_from_which_the_logits_are_computed_gives_no_warning():
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            embedding = self.body(x)
            return {"embedding": embedding, "logits": self.head(embedding), "second": embedding.mean(1)}

    (text,) = warned(Objective.kd(), Embedding(), student=Embedding())
    assert text.startswith("The objective does not use these outputs of Embedding: second.")


def test_probabilities_of_other_logits_give_a_warning():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return {"logits": self.layer(x), "other": self.second(x).softmax(-1)}

    (text,) = warned(Objective.kd(), Both(), student=Both())
    assert re.match(WARNING.format(names="other"), text)


def test_if_the_teacher_lacks_the_output_or_its_values_are_constant_the_warning_shows_an_example_of_a_term():
    plain = nn.Linear(6, 3)
    (text,) = warned(Objective.kd(), plain)
    assert text.endswith(
        'distill from a model that returns them, with a term such as kirsch.Term("fitnet", student_layer="output.age").'
    )
    constant = model(1)
    nn.init.zeros_(constant.age.weight)
    assert warned(Objective.kd(), constant) == [text]


def weight_of(text):
    """Return the weight of the term that a warning suggests."""
    return float(re.search(r'Term\("fitnet", ([^,]*),', text)[1])


def scaled(net, factor, shift=0.0):
    """Multiply the output `age` of a model by a factor, and add a number."""
    with torch.no_grad():
        net.age.weight.mul_(factor)
        net.age.bias.mul_(factor).add_(shift)
    return net


def test_the_weight_of_the_suggested_term_is_1_divided_by_a_large_variance_of_the_teachers_output():
    teacher = scaled(model(1), 1000, shift=1e6)
    (text,) = warned(Objective.kd(), teacher)
    first = next(data().epoch(0, 0))
    variance = teacher(torch.from_numpy(first.inputs))["age"].var(correction=0).item()
    assert weight_of(text) == pytest.approx(1 / variance, rel=0.01)


def test_the_weight_of_the_suggested_term_limits_its_curvature():
    student = model()
    (text,) = warned(Objective.kd(), scaled(model(1), 0.01), student=student)
    inputs = torch.from_numpy(next(data().epoch(0, 0)).inputs[:8])
    student(inputs)["age"].mean().backward()
    squared = sum(float((p.grad**2).sum()) for p in student.parameters() if p.grad is not None)
    assert weight_of(text) == pytest.approx(10 / (2 * squared), rel=0.01)
    (unlimited,) = warned(Objective.kd(), scaled(model(1), 0.01), student=model().requires_grad_(requires_grad=False))
    assert weight_of(unlimited) > 100 * weight_of(text)


def test_training_on_labels_and_mutual_learning_warn_once():
    options = {"training": Training(epochs=1), "progress": False}
    with pytest.warns(UserWarning, match=WARNING.format(names="age")) as caught:
        kirsch.fit(model(), data(), **options)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=WARNING.format(names="age")) as caught:
        kirsch.distill_mutually([model(), model(1)], data(), **options)
    assert len(caught) == 1


# ------------------------------------------------------------------------------------------------ pruned models


@pytest.fixture(scope="module")
def pair():
    """A teacher whose logits fit the labels, and its pruned copy."""
    training = Training(epochs=30, learning_rate=0.01, optimizer="adamw")
    hooks = TrainingHooks(event=lambda _event: None)
    original = kirsch.fit(model(width=32), data(), training=training, hooks=hooks, progress=False).model
    graph = kirsch.trace(original, torch.zeros(1, 6))
    return original, kirsch.prune(original, kirsch.plan(graph, kirsch.Goal(macs=0.5)))


def fit_to_age(trained, original):
    """Return R² of the second output of a model, compared with that of the original."""
    with torch.no_grad():
        age, truth = (net(torch.from_numpy(data().inputs))["age"] for net in (trained, original))
    return float(1 - ((age - truth) ** 2).mean() / truth.var(correction=0))


TRAINING = Training(epochs=40, learning_rate=0.01, optimizer="adamw")


def test_the_suggested_term_keeps_an_output_of_a_pruned_model(pair):
    original, small = pair
    (text,) = warned(Objective.kd(), original, student=small)
    term = eval(re.search(r"objective: (.*)\.$", text)[1], {"kirsch": kirsch})
    results = []
    for terms in ((Term("kd"),), (Term("kd"), term)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kirsch.distill(small, original, data(), objective=Objective(terms), training=TRAINING)
        results.append(fit_to_age(found.model, original))
    assert results[0] < 0.9
    assert results[1] > 0.97


@pytest.mark.parametrize("learning_rate", [0.05, 0.01])
def test_an_output_with_a_small_variance_does_not_make_the_training_diverge(pair, learning_rate):
    original = scaled(copy.deepcopy(pair[0]), 0.01)
    small = kirsch.prune(original, kirsch.plan(kirsch.trace(original, torch.zeros(1, 6)), kirsch.Goal(macs=0.5)))
    objective = kirsch.recovery(small, original, data().inputs, at="body.1")
    training = Training(epochs=40, learning_rate=learning_rate)
    hooks = TrainingHooks(event=lambda _event: None)
    trained = kirsch.distill(small, original, data(), objective=objective, training=training, hooks=hooks).model
    assert fit_to_age(trained, original) > 0.9
    assert Objective.from_dict(json.loads(json.dumps(objective.to_dict()))) == objective


def toy():
    """The data as a data set whose parts are equal."""
    inputs, labels = data().inputs, data().targets
    parts = [kirsch.Split(inputs, labels) for _ in ("train", "validation", "test")]
    return kirsch.DataSet("toy", *parts, classes=("a", "b", "c"))


def compressed(original, folder, **options):
    """Prune a model to half of its MACs and retrain it; return the result and the events."""
    events = []
    steps = [Prune(goal=kirsch.Goal(macs=0.5)), Recover(optimizer="adamw", **options)]
    return kirsch.compress(original, toy(), steps=steps, folder=folder, listen=events.append), events


def test_compress_keeps_all_outputs_by_default(pair, tmp_path):
    original, _ = pair
    result, events = compressed(original, tmp_path / "run", epochs=40, learning_rate=0.01)
    assert fit_to_age(result.model, original) > 0.9
    epoch = next(event for event in reversed(events) if event["event"] == "epoch")
    assert set(epoch["terms"]) == {"label", "kd", "output.age"}
    assert not [event for event in events if event["event"] == "warning"]
    assert result.metrics["warnings"] == []


def test_the_report_lists_the_warnings_of_training(pair, tmp_path):
    result, _ = compressed(pair[0], tmp_path / "run", epochs=1, objective=Objective.kd())
    (warning,) = result.metrics["warnings"]
    assert warning["step"] == "recover"
    assert re.match(WARNING.format(names="age"), warning["text"])
    assert "recover: The objective does not use these outputs" in result.report.read_text(encoding="utf-8")


def test_without_listener_and_progress_each_warning_of_a_run_is_one_python_warning(pair, tmp_path):
    steps = [Prune(goal=kirsch.Goal(macs=0.5)), Recover(epochs=1, objective=Objective.kd())]
    with pytest.warns(UserWarning, match=WARNING.format(names="age")) as caught:
        kirsch.compress(pair[0], toy(), steps=steps, folder=tmp_path / "run", progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_recovery_compares_all_outputs_by_default(pair):
    original, small = pair
    inputs = torch.from_numpy(data().inputs)
    default = kirsch.recovery(small, original, inputs, at="body.1")
    assert [term.record_name for term in default.terms] == ["kd", "output.age", "kept.body.1"]
    given = kirsch.recovery(small, original, inputs, at="body.1", objective=Objective.kd())
    assert [term.record_name for term in given.terms] == ["kd", "kept.body.1"]
