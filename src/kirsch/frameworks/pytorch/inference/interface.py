"""`Inference` of PyTorch, see `kirsch.frameworks.protocols`."""

from kirsch.frameworks.pytorch.analysis.randomness import nondeterminism
from kirsch.frameworks.pytorch.inference.calling import named_arguments, unknown_arguments
from kirsch.frameworks.pytorch.inference.check import check_runs, check_training_outputs
from kirsch.frameworks.pytorch.inference.outputs import class_names
from kirsch.frameworks.pytorch.inference.placement import from_numpy, frozen_copy, inference_mode, to_device
from kirsch.frameworks.pytorch.inference.predict import infer, predict
from kirsch.frameworks.pytorch.io.export import exportable
from kirsch.frameworks.pytorch.io.fingerprint import fingerprint
from kirsch.frameworks.pytorch.io.hub import from_hub
from kirsch.frameworks.pytorch.io.weights import load_weights, match_dtypes, parameter_shapes, save_weights

__all__ = [
    "check_runs",
    "check_training_outputs",
    "class_names",
    "exportable",
    "fingerprint",
    "from_hub",
    "from_numpy",
    "frozen_copy",
    "infer",
    "inference_mode",
    "load_weights",
    "match_dtypes",
    "named_arguments",
    "nondeterminism",
    "parameter_shapes",
    "predict",
    "save_weights",
    "to_device",
    "unknown_arguments",
]
