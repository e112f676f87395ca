"""Each argument of each public callable refuses objects of the wrong kind with an error that names the argument."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.data import augment

VALUES = {
    "None": lambda: None,
    "flag": lambda: True,
    "integer": lambda: 3,
    "negative": lambda: -1,
    "number": lambda: 0.5,
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "huge": lambda: 2**70,
    "complex": lambda: 1j,
    "text": lambda: "text",
    "empty text": lambda: "",
    "bytes": lambda: b"text",
    "path": lambda: Path("nowhere"),
    "empty list": list,
    "texts": lambda: ["text"],
    "numbers": lambda: [1, 2],
    "models": lambda: [nn.Linear(2, 2)],
    "set": lambda: {object()},
    "dict": lambda: {"text": 0.5},
    "object": object,
    "function": lambda: lambda: None,
    "class": lambda: nn.Linear,
    "model": lambda: nn.Linear(2, 2),
    "generator": lambda: (x for x in ()),
    "array": lambda: np.ones(3),
    "text array": lambda: np.array(["a"]),
    "scalar": lambda: torch.ones(()),
    "numpy flag": lambda: np.True_,
    "device": lambda: torch.device("cpu"),
}
FLAGS = {"flag", "numpy flag"}
POSITIVE = {"integer", "number", "huge"}
NUMBERS = {*POSITIVE, "negative"}
TEXTS = {"text", "empty text"}


def each(names, kinds):
    return dict.fromkeys(names.split(), kinds)


ACCEPTED = {
    **each("as_graph causal check_teacher mode uniform verify", FLAGS),
    "progress": FLAGS | {"None"},
    "compress.batch_size": {"None", "integer"},
    **each("gradient_accumulation_steps epochs generations k padding samples size", {"integer"}),
    **each("batch_size round_to view", {"integer"}),
    **each("views range_size seed", {"None", "integer"}),
    **each("learning_rate weight_decay brightness scale strength weight", POSITIVE),
    **each("label_smoothing probability contrast min_keep warmup_epochs", {"number"}),
    **each("macs parameters ema_decay max_drop", {"None", "number"}),
    **each("event save validate listen", {"None", "model"}),
    **each("objective training hooks teacher recover distill", {"None"}),
    "validation": {"None", "model"},
    **each("data resume kinds at step_counts module noise student", {"None"}),
    **each("augment ids targets seeds temperature", {"None"}),
    **each("terms milestones exclude keep_outputs regularizers", {"empty list"}),
    **each("start end after epoch", NUMBERS),
    **each("options adapter_options", {"dict"}),
    **each("loss adapter name", TEXTS),
    "outputs": {"None", "empty list"},
    "student_outputs": {"None"},
    "teacher_outputs": {"None", "empty list"},
    **each("stop close", {"None", "function", "model"}),
    "batch": {"None", "class", "model"},
    "max_grad_norm": {"None", *POSITIVE},
    "label_weight": POSITIVE,
    "ignore_index": {"integer", "negative", "huge"},
    "example_inputs": {"None", "array"},
    "folder": {*TEXTS, "path", "None"},
    "views of": {"None", "empty list", "numbers"},
}
"""Argument → kinds of values that are accepted, in any callable. Their effects are tested elsewhere."""

ACCEPTED_BY_CALLABLE = {
    "trace.module": {"empty text"},
    "trace.example_inputs": set(),
    "export.example_inputs": set(),
    "export.path": {"text", "path"},
    "measure.example_inputs": set(),
    "plan.seed": {"integer"},
    "Training.seed": {"integer"},
    "Distiller.seed": {"integer"},
    "plan.importance": {"None"},
    "distill.student": set(),
    "Distiller.student": set(),
    "Distiller.teacher": set(),
    "distill.teacher": set(),
    "distill.data": set(),
    "fit.data": set(),
    "distill_chain.data": set(),
    "distill_chain.objective": {"None", "empty list"},
    "distill_chain.training": {"None", "empty list"},
    "born_again.data": set(),
    "distill_mutually.data": set(),
    "ensemble.models": {"models"},
    "Term.weight": NUMBERS,
    "Term.temperature": {"None", *NUMBERS},
    "Term.teacher": {"None", "integer", "negative", "huge"},
    "Term.teacher_layer": {"None", "texts", *TEXTS},
    "Term.student_layer": {"texts", *TEXTS},
    "Ramp.epochs": NUMBERS,
    "Objective.kd.temperature": POSITIVE,
    "Objective.kd.weight": {"number"},
    "Objective.preset.name": set(),
    "fit.label_smoothing": NUMBERS | {"None"},
    "Distiller.warn": {"model"},
    "Distiller.counts.batches": {"empty list", "generator"},
    "Distiller.check_labels.targets": {"None", "numbers"},
    "Distiller.__call__.module": {"None", "function", "class", "model"},
    "ArrayData.ids": {"None", "numbers"},
    "ArrayData.targets": {"None", "numbers"},
    "Split.inputs": {"array", "numbers", "empty list"},
    "Split.labels": {"array", "numbers", "empty list"},
    "DataSet.augment": {"None", "class", "model"},
    "ModelGenerator.model": {"model"},
    "ModelGenerator.noise": {"empty list", "numbers"},
    "compress.batch_size": {"None", "integer"},  # None is the batch size of a loader
    "DataSet.classes": {"empty list", "texts"},  # the task checks them against the labels
    "compress.name": {"text", "None"},
    "compress.steps": {"None"},
    "compress.seed": {"integer"},
    "compress.speedup": {"None", *POSITIVE},
    "compress.data": set(),
    "save.folder": {*TEXTS, "path"},
    "load.folder": {*TEXTS, "path"},
    "build_store.folder": {*TEXTS, "path"},
    "build_store.data": set(),
    "build_store.teacher": set(),
    "build_store.temperature": POSITIVE,
    "build_store.ranges": {"numbers"},
    "build_store.outputs": {"None", "model"},
    "store.open.folder": {*TEXTS, "path"},
    "store.read.ids": {"numbers"},
    "store.read.seeds": {"None", "array", "text array"},
    "store.require.teacher": {"None"},
    "store.check.teacher": set(),
    "store.check.data": set(),
    "store.check.outputs": {"None", "model"},
    "store.verify.views": {"None", "empty list", "numbers"},
}
"""Argument of one callable → kinds of values that are accepted."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Return name → a public callable and valid arguments."""
    folder = tmp_path_factory.mktemp("arguments")
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(8, 4), torch.arange(8) % 3
    graph, goal = kirsch.trace(model, x), kirsch.Goal(macs=0.6)
    plan = kirsch.plan(graph, goal, round_to=1)
    small = kirsch.prune(model, plan)
    kirsch.save(small, folder / "saved")
    artifact = kirsch.export(model, folder / "model.onnx", example_inputs=x)
    data = kirsch.ArrayData(x.numpy(), y.numpy(), 4)
    split = kirsch.Split(x.numpy(), y.numpy())
    parts = {"train": split, "validation": split, "test": split}
    dataset = kirsch.DataSet("data", **parts, classes=("a", "b", "c"))
    store = kirsch.build_store(folder / "store", model, data, keep=kirsch.TopK(2))
    objective, training = kirsch.Objective.kd(), kirsch.Training(epochs=1)
    distiller = kirsch.Distiller(Net(), model, objective, (x, y))
    common = {
        "data": data,
        "objective": objective,
        "training": training,
        "validation": (x, y),
        "hooks": kirsch.TrainingHooks(),
        "regularizers": [kirsch.L1(1e-4)],
        "progress": None,
    }
    mutual = {**common, "objective": kirsch.Objective.preset("dml")}
    settings = {name: getattr(training, name) for name in inspect.signature(kirsch.Training).parameters}
    terms = {name: getattr(kirsch.Term(), name) for name in inspect.signature(kirsch.Term).parameters}
    fields = {name: getattr(objective, name) for name in inspect.signature(kirsch.Objective).parameters}

    def generate(count, generator):
        return generator.standard_normal((count, 4), dtype=np.float32)

    return {
        "trace": (
            kirsch.trace,
            {
                "model": model,
                "example_inputs": x,
                "outputs": (),
                "decisions": "refuse",
                "module": "",
                "softmax": "freeze",
                "as_graph": False,
            },
        ),
        "Goal": (kirsch.Goal, {"macs": 0.5, "parameters": 0.5}),
        "plan": (
            kirsch.plan,
            {
                "graph": graph,
                "goal": goal,
                "importance": "magnitude",
                "ranking": "global",
                "round_to": "auto",
                "exclude": (),
                "keep_outputs": (),
                "kinds": None,
                "uniform": False,
                "norm": 2,
                "data": None,
                "min_keep": 0.1,
                "seed": 0,
            },
        ),
        "prune": (kirsch.prune, {"model": model, "plan": plan, "example_inputs": x, "verify": True}),
        "prune_with_verification": (
            kirsch.prune_with_verification,
            {"model": model, "plan": plan, "example_inputs": x, "verify": True},
        ),
        "save": (kirsch.save, {"model": small, "folder": folder / "again"}),
        "load": (kirsch.load, {"folder": folder / "saved", "build": Net, "example_inputs": x}),
        "export": (
            kirsch.export,
            {"model": model, "path": folder / "again.onnx", "example_inputs": x, "format": "onnx"},
        ),
        "measure": (
            kirsch.measure,
            {
                "model_or_artifact": artifact,
                "example_inputs": x,
                "data": (x, y),
                "runtime": "onnxruntime",
                "threads": 1,
                "rounds": 6,
            },
        ),
        "Training": (kirsch.Training, settings),
        "TrainingHooks": (
            kirsch.TrainingHooks,
            {"validate": None, "event": None, "stop": None, "save": None, "resume": None, "batch": None, "close": None},
        ),
        "Objective": (kirsch.Objective, fields),
        "Term": (kirsch.Term, terms),
        "Objective.kd": (kirsch.Objective.kd, {"temperature": 4.0, "weight": 0.9}),
        "Objective.labels": (kirsch.Objective.labels, {"label_smoothing": 0.0}),
        "Objective.preset": (kirsch.Objective.preset, {"name": "kd", "label_weight": 0.5}),
        "Objective.from_dict": (kirsch.Objective.from_dict, {"values": objective.to_dict()}),
        "Ramp": (kirsch.Ramp, {"start": 0.0, "end": 1.0, "epochs": 1.0, "after": 0.0}),
        "distill": (kirsch.distill, {"student": Net(), "teacher": model, "check_teacher": False, **common}),
        "fit": (kirsch.fit, {"model": Net(), **common, "label_smoothing": None, "objective": None}),
        "distill_chain": (
            kirsch.distill_chain,
            {"models": [model, Net()], "learn_from": "previous", "check_teacher": False, **common},
        ),
        "born_again": (kirsch.born_again, {"build": Net, "generations": 1, "teacher": None, **common}),
        "distill_mutually": (kirsch.distill_mutually, {"students": [Net(), Net()], **mutual}),
        "ensemble": (
            kirsch.ensemble,
            {"models": [model], "combine": "probabilities", "activation": "softmax", "outputs": None},
        ),
        "Distiller": (
            kirsch.Distiller,
            {
                "student": Net(),
                "teacher": model,
                "objective": objective,
                "example_batch": (x, y),
                "seed": 0,
                "regularizers": (),
                "warn": print,
            },
        ),
        "Distiller.__call__": (distiller, {"batch": (x, y), "epoch": 0.0, "step_counts": None, "module": None}),
        "Distiller.counts": (distiller.counts, {"batches": [(x, y)]}),
        "Distiller.check_labels": (distiller.check_labels, {"targets": y}),
        "Distiller.train": (distiller.train, {"mode": True}),
        "Distiller.load_state_dict": (distiller.load_state_dict, {"state": distiller.state_dict()}),
        "GeneratedData": (
            kirsch.GeneratedData,
            {"generate": generate, "samples": 8, "batch_size": 4, "noise": None, "views": None, "seed": None},
        ),
        "ArrayData": (
            kirsch.ArrayData,
            {
                "inputs": x.numpy(),
                "targets": y.numpy(),
                "batch_size": 4,
                "augment": None,
                "ids": None,
                "views": None,
                "seed": None,
            },
        ),
        "Split": (kirsch.Split, {"inputs": x.numpy(), "labels": y.numpy()}),
        "DataSet": (kirsch.DataSet, {"name": "data", **parts, "classes": ("a", "b", "c"), "augment": None}),
        "DataSet.batches": (dataset.batches, {"batch_size": 4}),
        "ModelGenerator": (kirsch.ModelGenerator, {"model": model, "noise": (3,)}),
        "compress": (
            kirsch.compress,
            {
                "model": model,
                "data": dataset,
                "goal": goal,
                "student": None,
                "steps": None,
                "distill": None,
                "recover": training,
                "objective": None,
                "max_drop": 0.5,
                "speedup": None,
                "task": "classification",
                "batch_size": 4,
                "seed": 0,
                "folder": folder / "run",
                "name": "model",
                "listen": lambda event: None,
                "progress": None,
            },
        ),
        "recovery": (
            kirsch.recovery,
            {"small": small, "original": model, "inputs": x, "at": "body", "weight": 1.0, "objective": None},
        ),
        "Graph.explain": (graph.explain, {"layer": "body"}),
        "Plan.from_json": (kirsch.Plan.from_json, {"text": plan.to_json()}),
        "L1": (kirsch.L1, {"strength": 1e-4}),
        "Slimming": (kirsch.Slimming, {"strength": 1e-4}),
        "build_store": (
            kirsch.build_store,
            {
                "folder": folder / "again",
                "teacher": model,
                "data": data,
                "keep": kirsch.TopK(2),
                "outputs": None,
                "views": 1,
                "seed": None,
                "temperature": 1.0,
                "batch_size": 4,
                "ranges": (0, 1),
                "range_size": None,
                "event": None,
                "stop": None,
            },
        ),
        "store.open": (kirsch.TeacherStore.open, {"folder": folder / "store"}),
        "store.read": (store.read, {"ids": np.arange(2), "view": 0, "seeds": None}),
        "store.require": (store.require, {"teacher": model, "data": data, "temperature": 1.0, "seed": 0}),
        "store.check": (
            store.check,
            {"teacher": model, "data": data, "samples": 2, "outputs": None, "batch_size": 4},
        ),
        "store.verify_once": (store.verify_once, {"view": 0}),
        "store.verify": (store.verify, {"views": [0]}),
        "TopK": (kirsch.TopK, {"k": 2}),
        "Crop": (augment.Crop, {"padding": 1}),
        "Flip": (augment.Flip, {"probability": 0.5}),
        "Erase": (augment.Erase, {"size": 2, "probability": 0.5}),
        "Jitter": (augment.Jitter, {"brightness": 0.1, "contrast": 0.1}),
        "Noise": (augment.Noise, {"scale": 0.1}),
    }


RECORDS = {
    "Artifact",
    "Batch",
    "Compressed",
    "Graph",
    "Measurement",
    "Plan",
    "Pruned",
    "TeacherStore",
    "Trained",
    "Verification",
}
"""Public classes that Kirsch returns, and users do not create."""

WITHOUT_OPTIONS = {"Dense", "KirschError"}
"""Public classes that users create or catch, without an argument to check."""


def test_the_table_has_each_public_callable_and_each_argument(calls):
    assert {name for name in kirsch.__all__ if name not in RECORDS | WITHOUT_OPTIONS} <= calls.keys()
    for name, (function, values) in calls.items():
        parameters = inspect.signature(function).parameters.values()
        named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        assert named <= values.keys(), name


RIGHT_TYPE = {"bytes", "model", "models", "array", "dict", "function", "text", "empty text", "path"}
"""Kinds of values that can have the right type and a wrong content; the error may name the content instead."""

NAMES = [
    "trace",
    "Goal",
    "plan",
    "prune",
    "prune_with_verification",
    "save",
    "load",
    "export",
    "measure",
    "Training",
    "TrainingHooks",
    "Objective",
    "Term",
    "Objective.kd",
    "Objective.labels",
    "Objective.preset",
    "Objective.from_dict",
    "Ramp",
    "distill",
    "fit",
    "distill_chain",
    "born_again",
    "distill_mutually",
    "ensemble",
    "Distiller",
    "Distiller.__call__",
    "Distiller.counts",
    "Distiller.check_labels",
    "Distiller.train",
    "Distiller.load_state_dict",
    "GeneratedData",
    "ArrayData",
    "Split",
    "DataSet",
    "DataSet.batches",
    "ModelGenerator",
    "compress",
    "recovery",
    "Graph.explain",
    "Plan.from_json",
    "L1",
    "Slimming",
    "build_store",
    "store.open",
    "store.read",
    "store.require",
    "store.check",
    "store.verify_once",
    "store.verify",
    "TopK",
    "Crop",
    "Flip",
    "Erase",
    "Jitter",
    "Noise",
]


@pytest.mark.parametrize("max_drop", [1, -0.1, 3])
def test_an_accuracy_drop_in_percentage_points_is_refused(calls, max_drop):
    function, arguments = calls["compress"]
    message = r"`max_drop` .* of at least 0 and below 1\. .* write max_drop=0\.01\."
    with pytest.raises(kirsch.KirschError, match=message):
        function(**{**arguments, "max_drop": max_drop})


@pytest.mark.filterwarnings("ignore")  # some values are valid, and their effects may warn
@pytest.mark.parametrize("name", NAMES)
def test_an_argument_of_the_wrong_kind_is_named_with_the_fix(calls, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, arguments = calls[name]
    assert [failure for argument in arguments for failure in unclear_errors(name, function, arguments, argument)] == []


def unclear_errors(name, function, arguments, argument):
    """Yield a text for each kind of value that an argument accepts or refuses without a clear error."""
    accepted = ACCEPTED_BY_CALLABLE.get(f"{name}.{argument}", ACCEPTED.get(argument, set()))
    for kind in sorted(VALUES.keys() - accepted):
        value = VALUES[kind]()
        try:
            function(**{**arguments, argument: value})
        except kirsch.KirschError as error:
            message = str(error)
            shown = value[0] if kind == "texts" else value
            named = re.search(rf"\b{argument}\b", message) or (isinstance(shown, str) and repr(shown) in message)
            if not named and kind not in RIGHT_TYPE:
                yield f"{argument} is {kind}: not named in {message!r}"
            if not error.fix and "needed" not in message and "Known" not in message:
                yield f"{argument} is {kind}: no fix in {message!r}"
        except Exception as error:  # noqa: BLE001 - must not happen
            yield f"{argument} is {kind}: {type(error).__name__}: {error}"
        else:
            yield f"{argument} is {kind}: accepted"
