"""The `Framework` of PyTorch: a module of functions for each protocol."""

from __future__ import annotations

import torch

from kirsch.frameworks.protocols import Framework
from kirsch.frameworks.pytorch.analysis import interface as analysis
from kirsch.frameworks.pytorch.calibration import interface as calibration
from kirsch.frameworks.pytorch.features import interface as features
from kirsch.frameworks.pytorch.inference import interface as inference
from kirsch.frameworks.pytorch.masking import interface as masking
from kirsch.frameworks.pytorch.models import MODELS
from kirsch.frameworks.pytorch.surgery import interface as surgery
from kirsch.frameworks.pytorch.training import interface as training
from kirsch.ops import load_implementation

PYTORCH = Framework("pytorch", analysis, calibration, surgery, masking, features, training, inference, MODELS)

load_implementation(torch.Tensor, torch.nn.Parameter)  # torch.compile cannot import it while it traces a loss
