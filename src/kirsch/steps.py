"""Steps of a job, for `kirsch.compress` and recipes. Importing this module registers the built-in ones."""

from kirsch.deploy.steps import Export, Measure
from kirsch.distillation.steps import Distill, Evaluate, Recover, Train
from kirsch.jobs.job import Job, Record
from kirsch.jobs.step import STEPS, Step
from kirsch.pruning.repeat import repeat
from kirsch.pruning.sensitivity_step import MeasureSensitivity
from kirsch.pruning.sparsity.step import Sparsify
from kirsch.pruning.step import Prune

__all__ = [
    "STEPS",
    "Distill",
    "Evaluate",
    "Export",
    "Job",
    "Measure",
    "MeasureSensitivity",
    "Prune",
    "Record",
    "Recover",
    "Sparsify",
    "Step",
    "Train",
    "repeat",
]
