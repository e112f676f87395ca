"""Importances: scores that rank the units of a group, larger for units that should be kept; one file for each."""

from kirsch.pruning.importance.activation import activation
from kirsch.pruning.importance.apoz import apoz
from kirsch.pruning.importance.bn_scale import bn_scale
from kirsch.pruning.importance.fisher import fisher
from kirsch.pruning.importance.flap import flap
from kirsch.pruning.importance.fpgm import fpgm
from kirsch.pruning.importance.grasp import grasp
from kirsch.pruning.importance.hessian import hessian
from kirsch.pruning.importance.importance import (
    IMPORTANCES,
    Importance,
    as_importance,
    importance,
    importance_of,
)
from kirsch.pruning.importance.lamp import lamp
from kirsch.pruning.importance.leave_one_out import leave_one_out
from kirsch.pruning.importance.magnitude import magnitude
from kirsch.pruning.importance.random import random
from kirsch.pruning.importance.snip import snip
from kirsch.pruning.importance.taylor import taylor
from kirsch.pruning.importance.taylor_weights import taylor_weights
from kirsch.pruning.importance.thinet import thinet
from kirsch.pruning.importance.wanda import wanda

__all__ = [
    "IMPORTANCES",
    "Importance",
    "activation",
    "apoz",
    "as_importance",
    "bn_scale",
    "fisher",
    "flap",
    "fpgm",
    "grasp",
    "hessian",
    "importance",
    "importance_of",
    "lamp",
    "leave_one_out",
    "magnitude",
    "random",
    "snip",
    "taylor",
    "taylor_weights",
    "thinet",
    "wanda",
]
