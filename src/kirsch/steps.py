"""Steps of a job, for `kirsch.compress` and recipes. Importing this module registers the built-in ones."""

from kirsch.deploy.steps import Export, Measure
from kirsch.distillation.steps import Distill, Evaluate, Recover, Train
from kirsch.jobs.job import Job, Record
from kirsch.jobs.step import STEPS, Step
from kirsch.pruning.sparsity.step import Sparsify
from kirsch.pruning.step import Prune

__all__ = [
    "STEPS",
    "Distill",
    "Evaluate",
    "Export",
    "Job",
    "Measure",
    "Prune",
    "Record",
    "Recover",
    "Sparsify",
    "Step",
    "Train",
]
