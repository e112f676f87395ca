"""Random inputs of adapters and a loss of their outputs, shared by the tests of adapters."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def random_values(shapes, **more):
    """Return a tensor of normal random numbers, or a list of tensors for a list of shapes."""
    if isinstance(shapes, list):
        return [random_values(shape, **more) for shape in shapes]
    return torch.randn(shapes, **more)


def density(student_out, teacher_out):
    """Return the negative log-likelihood of variational information distillation, up to a constant."""
    variance = F.softplus(student_out["scale"]).reshape(1, -1, 1, 1) + 1e-5
    return 0.5 * ((student_out["mean"] - teacher_out) ** 2 / variance + variance.log()).mean()
