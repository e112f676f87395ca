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
from public_calls import public_calls

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
    **each("as_graph causal check_teacher mode train_weights uniform verify", FLAGS),
    "progress": FLAGS | {"None"},
    **each("gradient_accumulation_steps epochs generations k padding samples size", {"integer"}),
    **each("batch_size round_to view", {"integer"}),
    **each("views range_size seed", {"None", "integer"}),
    **each("gate_speed learning_rate weight_decay brightness scale strength weight", POSITIVE),
    **each("label_smoothing probability contrast min_keep warmup_epochs", {"number"}),
    **each("macs parameters ema_decay max_drop", {"None", "number"}),
    **each("event save validate listen before_step", {"None", "model"}),
    **each("objective training hooks teacher recover distill", {"None"}),
    "validation": {"None", "model"},
    **each("data resume kinds at batch_counts step_counts noise student", {"None"}),
    **each("augment temperature metric class_weights minimize", {"None"}),
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
    "quality": {"None"},
}
"""Argument → kinds of values that a callable accepts for it, unless it has an entry in ACCEPTED_BY_CALLABLE.

What the accepted values do is tested elsewhere.
"""

ACCEPTED_BY_CALLABLE = {
    "trace.module": {"empty text"},
    "trace.example_inputs": set(),
    "export.example_inputs": set(),
    "export.path": {"text", "path"},
    "measure.example_inputs": set(),
    "Goal.of": {"None"},
    "Goal.rounds.count": {"integer"},
    "steps.repeat.times": {"integer"},
    "plan.seed": {"integer"},
    "plan.validation": {"None"},
    "sensitivity.data": set(),
    "sensitivity.seed": {"integer"},
    "Sensitivity.keep.max_drop": POSITIVE,
    "Training.seed": {"integer"},
    "Distiller.seed": {"integer"},
    "plan.importance": {"None"},
    "plan.loss": {"function", "model"},
    "plan.goal": {"None"},
    "plan.keep": {"None"},
    "plan.loadable": {"None"},
    "sparsify.model": {"model"},
    "sparsify.sparsity": {"number"},
    "sparsify.ranking": {"None"},
    "fold_masks.model": {"model"},
    "trim_vocabulary.model": {"model"},
    "trim_vocabulary.tokenizer": {"None"},
    "trim_vocabulary.keep": {"numbers"},
    "SparsitySchedule.final": {"number"},
    "SparsitySchedule.initial": {"number"},
    **each("SparsitySchedule.steps SparsitySchedule.begin SparsitySchedule.every", {"integer"}),
    "Goal.size": {"None", "number"},
    "Goal.memory": {"None", "number"},
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
    "with_gates.steps": {"integer"},
    "learn_gates.data": set(),
    "GroupLasso.alpha": {"integer", "number"},
    "GrowingRegularization.epochs": POSITIVE,
    "GrowingRegularization.increments": {"integer"},
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
    "compress.batch_size": {"None", "integer"},  # None: the batch size of the training loader, or 64 for arrays
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
"""Argument of one callable → kinds of values that the callable accepts for it."""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    return public_calls(tmp_path_factory.mktemp("arguments"))


RECORDS = {
    "Artifact",
    "Batch",
    "Compensation",
    "Compressed",
    "Graph",
    "LearnedGates",
    "Measurement",
    "Plan",
    "Pruned",
    "Sensitivity",
    "Sparsified",
    "TeacherStore",
    "Trained",
    "TrimmedVocabulary",
    "Verification",
}
"""Public classes that Kirsch returns, and users do not create."""

WITHOUT_OPTIONS = {"Dense", "KirschError"}
"""Public classes that users create or catch, and that have no argument to check."""


def test_the_table_has_each_public_callable_and_each_argument(calls):
    assert list(calls) == NAMES
    assert {name for name in kirsch.__all__ if name not in RECORDS | WITHOUT_OPTIONS} <= calls.keys()
    for name, (function, values) in calls.items():
        parameters = inspect.signature(function).parameters.values()
        named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        assert named <= values.keys(), name


RIGHT_TYPE = {"bytes", "model", "models", "array", "dict", "function", "text", "empty text", "path"}
"""Kinds of values that can have the right type and a wrong content; the error may name the content instead."""

NAMES = [  # the keys of `public_calls`, for the parameters of a test
    "trace",
    "Goal",
    "Goal.rounds",
    "steps.repeat",
    "plan",
    "sensitivity",
    "prune",
    "prune_with_verification",
    "sparsify",
    "fold_masks",
    "trim_vocabulary",
    "SparsitySchedule",
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
    "Sensitivity.keep",
    "Plan.from_json",
    "L1",
    "Slimming",
    "Movement",
    "with_gates",
    "read_gates",
    "learn_gates",
    "GroupLasso",
    "GrowingRegularization",
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


@pytest.mark.filterwarnings("ignore")  # a call may train before it refuses a value, and the training may warn
@pytest.mark.parametrize("name", NAMES)
def test_an_argument_of_the_wrong_kind_is_named_with_the_fix(calls, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, arguments = calls[name]
    assert [failure for argument in arguments for failure in unclear_errors(name, function, arguments, argument)] == []


def unclear_errors(name, function, arguments, argument):
    """Try each kind of value that the argument should refuse.

    Yield a text for each kind that the callable accepts, or for which the error is not clear.
    """
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
