"""The public callables of Kirsch, each with valid arguments, for tests that replace one argument by a wrong value."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from torch import nn

import kirsch
from kirsch.data import augment


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x).relu())


class WordsConfig:
    def __init__(self, vocab_size=12, eos_token_id=0):
        self.vocab_size, self.eos_token_id = vocab_size, eos_token_id

    def to_dict(self):
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class Words(nn.Module):
    """A model with a vocabulary, like those of transformers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, 4)
        self.head = nn.Linear(4, config.vocab_size)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))

    def save_pretrained(self, folder):
        raise NotImplementedError


def public_calls(folder):
    """Return name → (public callable, valid arguments). Files are written to the folder."""
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(8, 4), torch.arange(8) % 3
    graph, goal = kirsch.trace(model, x), kirsch.Goal(macs=0.6)
    plan = kirsch.plan(graph, goal, round_to=1)
    small = kirsch.prune(model, plan)
    kirsch.save(small, folder / "saved")
    artifact = kirsch.export(model, folder / "model.onnx", example_inputs=x)
    data = kirsch.ArrayData(x.numpy(), y.numpy(), batch_size=4)
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
        "Goal": (
            kirsch.Goal,
            {"macs": 0.5, "parameters": 0.5, "size": 0.5, "memory": 0.5, "of": graph.cost},
        ),
        "Goal.rounds": (goal.rounds, {"count": 3, "of": graph.cost, "spacing": "cubic"}),
        "steps.repeat": (
            kirsch.steps.repeat,
            {"steps": [kirsch.steps.Prune()], "goal": goal, "times": 2, "spacing": "cubic"},
        ),
        "plan": (
            kirsch.plan,
            {
                "graph": graph,
                "goal": goal,
                "importance": "magnitude",
                "loss": "cross-entropy",
                "keep": None,
                "ranking": "global",
                "round_to": "auto",
                "exclude": (),
                "keep_outputs": (),
                "kinds": None,
                "uniform": False,
                "loadable": None,
                "norm": 2,
                "data": None,
                "min_keep": 0.1,
                "max_drop": None,
                "validation": None,
                "metric": None,
                "class_weights": None,
                "minimize": None,
                "seed": 0,
                "evaluations": 200,
                "quality": None,
                "progress": None,
            },
        ),
        "sensitivity": (
            kirsch.sensitivity,
            {
                "graph": graph,
                "data": data,
                "fractions": (0.5,),
                "importance": "magnitude",
                "metric": None,
                "class_weights": None,
                "kinds": None,
                "exclude": (),
                "samples": 8,
                "loss": "cross-entropy",
                "seed": 0,
                "progress": None,
            },
        ),
        "prune": (
            kirsch.prune,
            {"model": model, "plan": plan, "example_inputs": x, "verify": True, "compensate": "bias", "data": x},
        ),
        "prune_with_verification": (
            kirsch.prune_with_verification,
            {"model": model, "plan": plan, "example_inputs": x, "verify": True, "compensate": "bias", "data": x},
        ),
        "sparsify": (
            kirsch.sparsify,
            {
                "model": model,
                "sparsity": 0.5,
                "pattern": "unstructured",
                "importance": "magnitude",
                "ranking": "global",
                "data": None,
                "exclude": (),
                "seed": 0,
            },
        ),
        "fold_masks": (kirsch.fold_masks, {"model": model}),
        "trim_vocabulary": (
            kirsch.trim_vocabulary,
            {"model": Words(WordsConfig()), "keep": [3, 4, 5], "tokenizer": None, "example_inputs": None},
        ),
        "SparsitySchedule": (
            kirsch.SparsitySchedule,
            {"final": 0.9, "steps": 10, "initial": 0.0, "begin": 0, "every": 1, "kind": "cubic"},
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
                "threads": 1,
                "rounds": 6,
            },
        ),
        "Training": (kirsch.Training, settings),
        "TrainingHooks": (
            kirsch.TrainingHooks,
            {
                "validate": None,
                "event": None,
                "stop": None,
                "save": None,
                "resume": None,
                "batch": None,
                "close": None,
                "before_step": None,
            },
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
        "Distiller.__call__": (
            distiller,
            {"batch": (x, y), "epoch": 0.0, "step_counts": None, "batch_counts": None, "module": None},
        ),
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
        "Sensitivity.keep": (kirsch.sensitivity(graph, data).keep, {"max_drop": 0.1}),
        "Plan.from_json": (kirsch.Plan.from_json, {"text": plan.to_json()}),
        "L1": (kirsch.L1, {"strength": 1e-4}),
        "Slimming": (kirsch.Slimming, {"strength": 1e-4}),
        "Movement": (kirsch.Movement, {"graph": graph}),
        "with_gates": (
            kirsch.with_gates,
            {
                "graph": graph,
                "goal": goal,
                "steps": 2,
                "train_weights": True,
                "gate_speed": 50.0,
                "kinds": None,
                "exclude": (),
                "keep_outputs": (),
            },
        ),
        "read_gates": (
            kirsch.read_gates,
            {
                "model": kirsch.with_gates(graph, goal, steps=2),
                "graph": graph,
                "goal": goal,
                "kinds": None,
                "exclude": (),
                "keep_outputs": (),
                "round_to": 1,
                "min_keep": 0.1,
            },
        ),
        "learn_gates": (
            kirsch.learn_gates,
            {
                "graph": graph,
                "goal": goal,
                **common,
                "objective": None,
                "teacher": None,
                "train_weights": True,
                "gate_speed": 50.0,
                "kinds": None,
                "exclude": (),
                "keep_outputs": (),
                "round_to": 1,
                "min_keep": 0.1,
            },
        ),
        "GroupLasso": (
            kirsch.GroupLasso,
            {"graph": graph, "strength": 1e-4, "alpha": 4.0, "kinds": None, "exclude": (), "keep_outputs": ()},
        ),
        "GrowingRegularization": (
            kirsch.GrowingRegularization,
            {"graph": graph, "plan": plan, "strength": 1.0, "epochs": 2.0, "increments": 10},
        ),
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
