"""Kirsch distills, prunes, exports, measures and verifies neural networks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kirsch.version import __version__ as __version__

if TYPE_CHECKING:
    from kirsch.data.batches import ArrayData, Batch
    from kirsch.data.dataset import DataSet, Split
    from kirsch.data.generated import GeneratedData
    from kirsch.deploy.export import Artifact, export
    from kirsch.deploy.measure import Measurement, measure
    from kirsch.distillation.chain import born_again, distill_chain, ensemble
    from kirsch.distillation.distill import distill, fit
    from kirsch.distillation.distiller import Distiller
    from kirsch.distillation.mutual import distill_mutually
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.store.building import build_store
    from kirsch.distillation.store.reading import TeacherStore
    from kirsch.distillation.store.record import Dense, TopK
    from kirsch.distillation.term import Ramp, Term
    from kirsch.errors import KirschError
    from kirsch.frameworks.model_generator import ModelGenerator
    from kirsch.frameworks.trace import trace
    from kirsch.frameworks.training import Trained, Training, TrainingHooks
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal, Plan
    from kirsch.graph.verification import Verification
    from kirsch.pruning.choose import plan
    from kirsch.pruning.compensation import Compensation
    from kirsch.pruning.learned.gates import LearnedGates, read_gates, with_gates
    from kirsch.pruning.learned.movement import Movement
    from kirsch.pruning.prune import Pruned, prune, prune_with_verification
    from kirsch.pruning.regularizers.group_lasso import GroupLasso
    from kirsch.pruning.regularizers.growing import GrowingRegularization
    from kirsch.pruning.regularizers.l1 import L1
    from kirsch.pruning.regularizers.slimming import Slimming
    from kirsch.pruning.sensitivity import sensitivity
    from kirsch.pruning.sensitivity_table import Sensitivity
    from kirsch.pruning.sparsity.schedule import SparsitySchedule
    from kirsch.pruning.sparsity.sparsified import Sparsified
    from kirsch.pruning.sparsity.sparsify import fold_masks, sparsify
    from kirsch.pruning.store import load, save
    from kirsch.pruning.vocabulary.trim import TrimmedVocabulary, trim_vocabulary
    from kirsch.recipes.compress import Compressed, compress
    from kirsch.recipes.gates import learn_gates
    from kirsch.recipes.recovery import recovery

__all__ = [
    "L1",
    "ArrayData",
    "Artifact",
    "Batch",
    "Compensation",
    "Compressed",
    "DataSet",
    "Dense",
    "Distiller",
    "GeneratedData",
    "Goal",
    "Graph",
    "GroupLasso",
    "GrowingRegularization",
    "KirschError",
    "LearnedGates",
    "Measurement",
    "ModelGenerator",
    "Movement",
    "Objective",
    "Plan",
    "Pruned",
    "Ramp",
    "Sensitivity",
    "Slimming",
    "Sparsified",
    "SparsitySchedule",
    "Split",
    "TeacherStore",
    "Term",
    "TopK",
    "Trained",
    "Training",
    "TrainingHooks",
    "TrimmedVocabulary",
    "Verification",
    "born_again",
    "build_store",
    "compress",
    "distill",
    "distill_chain",
    "distill_mutually",
    "ensemble",
    "export",
    "fit",
    "fold_masks",
    "learn_gates",
    "load",
    "measure",
    "plan",
    "prune",
    "prune_with_verification",
    "read_gates",
    "recovery",
    "save",
    "sensitivity",
    "sparsify",
    "trace",
    "trim_vocabulary",
    "with_gates",
]

# Module of each public name. Names are imported at first use, so that `import kirsch` loads no framework.
_MODULES = {
    "ArrayData": "kirsch.data.batches",
    "Artifact": "kirsch.deploy.export",
    "Batch": "kirsch.data.batches",
    "Compensation": "kirsch.pruning.compensation",
    "Compressed": "kirsch.recipes.compress",
    "DataSet": "kirsch.data.dataset",
    "Dense": "kirsch.distillation.store.record",
    "Distiller": "kirsch.distillation.distiller",
    "GeneratedData": "kirsch.data.generated",
    "Goal": "kirsch.graph.plan",
    "Graph": "kirsch.graph.graph",
    "GroupLasso": "kirsch.pruning.regularizers.group_lasso",
    "GrowingRegularization": "kirsch.pruning.regularizers.growing",
    "KirschError": "kirsch.errors",
    "L1": "kirsch.pruning.regularizers.l1",
    "LearnedGates": "kirsch.pruning.learned.gates",
    "Measurement": "kirsch.deploy.measure",
    "ModelGenerator": "kirsch.frameworks.model_generator",
    "Movement": "kirsch.pruning.learned.movement",
    "Objective": "kirsch.distillation.objective",
    "Plan": "kirsch.graph.plan",
    "Pruned": "kirsch.pruning.prune",
    "Ramp": "kirsch.distillation.term",
    "Sensitivity": "kirsch.pruning.sensitivity_table",
    "Slimming": "kirsch.pruning.regularizers.slimming",
    "Sparsified": "kirsch.pruning.sparsity.sparsified",
    "SparsitySchedule": "kirsch.pruning.sparsity.schedule",
    "Split": "kirsch.data.dataset",
    "TeacherStore": "kirsch.distillation.store.reading",
    "Term": "kirsch.distillation.term",
    "TopK": "kirsch.distillation.store.record",
    "Trained": "kirsch.frameworks.training",
    "Training": "kirsch.frameworks.training",
    "TrainingHooks": "kirsch.frameworks.training",
    "TrimmedVocabulary": "kirsch.pruning.vocabulary.trim",
    "Verification": "kirsch.graph.verification",
    "born_again": "kirsch.distillation.chain",
    "build_store": "kirsch.distillation.store.building",
    "compress": "kirsch.recipes.compress",
    "distill": "kirsch.distillation.distill",
    "distill_chain": "kirsch.distillation.chain",
    "distill_mutually": "kirsch.distillation.mutual",
    "ensemble": "kirsch.distillation.chain",
    "export": "kirsch.deploy.export",
    "fit": "kirsch.distillation.distill",
    "fold_masks": "kirsch.pruning.sparsity.sparsify",
    "learn_gates": "kirsch.recipes.gates",
    "load": "kirsch.pruning.store",
    "measure": "kirsch.deploy.measure",
    "plan": "kirsch.pruning.choose",
    "prune": "kirsch.pruning.prune",
    "prune_with_verification": "kirsch.pruning.prune",
    "read_gates": "kirsch.pruning.learned.gates",
    "recovery": "kirsch.recipes.recovery",
    "save": "kirsch.pruning.store",
    "sparsify": "kirsch.pruning.sparsity.sparsify",
    "sensitivity": "kirsch.pruning.sensitivity",
    "trace": "kirsch.frameworks.trace",
    "trim_vocabulary": "kirsch.pruning.vocabulary.trim",
    "with_gates": "kirsch.pruning.learned.gates",
}


def __getattr__(name: str) -> Any:
    if name == "steps":  # a module, for `kirsch.compress(..., steps=[kirsch.steps.Prune(), ...])`
        return import_module("kirsch.steps")
    if name not in _MODULES:
        raise AttributeError(f"module 'kirsch' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
