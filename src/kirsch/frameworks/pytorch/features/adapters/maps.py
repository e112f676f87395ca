"""Adapters of feature maps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.adapters.options import SMALLEST_VARIANCE
from kirsch.frameworks.adapters.shapes import Shape, map_size
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter, match_sizes

if TYPE_CHECKING:
    from torch import Tensor


@ADAPTERS.register("conv")
class Convolution(Adapter):
    """The adapter "conv": a 1 × 1 convolution of the student's maps.

    Args:
        student, teacher: shape (N, C, H, W).
        options: see `ConvolutionOptions`.

    Raises:
        ShapeError: a value is not (N, C, H, W).
    """

    def __init__(self, student: Shape, teacher: Shape, *, norm: bool, spatial: str) -> None:
        super().__init__()
        channels_s, channels_t = map_size(student, "student", "conv")[0], map_size(teacher, "teacher", "conv")[0]
        self.spatial = spatial
        self.conv = nn.Conv2d(channels_s, channels_t, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels_t) if norm else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the converted maps and the teacher's maps, at the same size."""
        student, teacher = match_sizes(self.cast(student), teacher, self.spatial)
        return self.norm(self.conv(student)), teacher


@ADAPTERS.register("fitnet")
class Regressor(Adapter):
    """The adapter "fitnet": one convolution of the student's maps to the teacher's channels and size.

    Args:
        student, teacher: shape (N, C, H, W).
        options: see `RegressorOptions`.

    Raises:
        ShapeError: the student's map is smaller than the teacher's, and not half its size.
    """

    def __init__(self, student: Shape, teacher: Shape, *, relu: bool) -> None:
        super().__init__()
        channels_s, *size_s = map_size(student, "student", "fitnet")
        channels_t, *size_t = map_size(teacher, "teacher", "fitnet")
        self.conv: nn.Module
        if size_s == [2 * size for size in size_t]:
            self.conv = nn.Conv2d(channels_s, channels_t, 3, stride=2, padding=1)
        elif size_t == [2 * size for size in size_s]:
            self.conv = nn.ConvTranspose2d(channels_s, channels_t, 4, stride=2, padding=1)
        elif all(a >= b for a, b in zip(size_s, size_t, strict=True)):
            self.conv = nn.Conv2d(channels_s, channels_t, (1 + size_s[0] - size_t[0], 1 + size_s[1] - size_t[1]))
        else:
            raise ShapeError(
                f"The student's map is {size_s[0]} × {size_s[1]}, the teacher's {size_t[0]} × {size_t[1]}.",
                "The adapter 'fitnet' can only reduce the size, or double it.",
                "Choose an earlier layer of the student, or the adapter 'conv'.",
            )
        self.norm = nn.BatchNorm2d(channels_t)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return maps of the teacher's shape, and the teacher's maps."""
        return self.relu(self.norm(self.conv(self.cast(student)))), teacher


@ADAPTERS.register("residual")
class Connector(Adapter):
    """The adapter "residual": a 1 × 1 convolution and a batch norm, applied to maps that are the input of a ReLU.

    Args:
        student, teacher: shape (N, C, H, W).
        options: see `ConnectorOptions`.

    Raises:
        ShapeError: the number of margins is not the number of channels.
        UsageError: a margin is above 0.
    """

    margins: Tensor | None

    def __init__(self, student: Shape, teacher: Shape, *, margins: Any) -> None:
        super().__init__()
        channels_s, channels_t = (
            map_size(student, "student", "residual")[0],
            map_size(teacher, "teacher", "residual")[0],
        )
        self.conv = nn.Conv2d(channels_s, channels_t, 1, bias=False)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / channels_t))
        self.norm = nn.BatchNorm2d(channels_t)
        lowest = None if margins is None else torch.as_tensor(margins).detach().to(self.conv.weight)
        if lowest is not None and lowest.shape != (channels_t,):
            raise ShapeError(f"There are {lowest.numel()} margins; the teacher's value has {channels_t} channels.")
        if lowest is not None and lowest.device.type != "meta" and bool((lowest > 0).any()):
            raise UsageError(f"A margin is {float(lowest.max())}; margins of at most 0 are needed.")
        self.register_buffer("margins", lowest)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the converted maps, and the teacher's maps clipped at the margins."""
        student, teacher = match_sizes(self.cast(student), teacher)
        if self.margins is not None:
            teacher = torch.maximum(teacher, self.margins.to(teacher.dtype).reshape(1, -1, 1, 1))
        return self.norm(self.conv(student)), teacher


@ADAPTERS.register("mgd")
class Generator(Adapter):
    """The adapter "mgd": generates the teacher's maps from the student's masked maps.

    The masked positions are drawn from PyTorch's generator.

    Args:
        student, teacher: shape (N, C, H, W).
        options: see `GeneratorOptions`.

    Raises:
        ShapeError: a value is not (N, C, H, W).
    """

    def __init__(self, student: Shape, teacher: Shape, *, masked_fraction: float, spatial: str) -> None:
        super().__init__()
        channels_s, channels_t = map_size(student, "student", "mgd")[0], map_size(teacher, "teacher", "mgd")[0]
        self.masked_fraction, self.spatial = masked_fraction, spatial
        self.align = nn.Identity() if channels_s == channels_t else nn.Conv2d(channels_s, channels_t, 1)
        first, last = (nn.Conv2d(channels_t, channels_t, 3, padding=1) for _ in range(2))
        self.generate = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the generated maps and the teacher's maps."""
        student, teacher = match_sizes(self.cast(student), teacher, self.spatial)
        student = self.align(student)
        if self.training:
            drawn = torch.rand(len(student), 1, *student.shape[2:], device=student.device)
            student = student * (drawn >= self.masked_fraction)
        return self.generate(student), teacher


@ADAPTERS.register("vid")
class Density(Adapter):
    """The adapter "vid": a normal distribution of the teacher's maps.

    Args:
        student, teacher: shape (N, C, H, W).
        options: see `DensityOptions`.

    Raises:
        ShapeError: a value is not (N, C, H, W).
    """

    def __init__(self, student: Shape, teacher: Shape, *, hidden: int | None, norm: bool, variance: float) -> None:
        super().__init__()
        channels_s, channels_t = map_size(student, "student", "vid")[0], map_size(teacher, "teacher", "vid")[0]
        widths = [channels_s, hidden or channels_t, hidden or channels_t, channels_t]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 1, bias=False), *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]
        self.mean = nn.Sequential(*layers[: -2 if norm else -1])
        self.scale = nn.Parameter(torch.full((channels_t,), math.log(math.expm1(variance - SMALLEST_VARIANCE))))

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return mean and scale, and the teacher's maps at the size of the mean."""
        student, teacher = match_sizes(self.cast(student), teacher)
        return {"mean": self.mean(student), "scale": self.scale}, teacher


@ADAPTERS.register("factor")
class Factor(Adapter):
    """The adapter "factor": factors of both maps; `extra_loss` is the loss of the autoencoder of the teacher's maps.

    To train in two phases, first train on `extra_loss` alone, then freeze `paraphraser` and `restore`.

    Args:
        student, teacher: shape (N, C, H, W).
        options: see `FactorOptions`.

    Raises:
        UsageError: the factor would have no channels.
    """

    def __init__(self, student: Shape, teacher: Shape, *, rate: float) -> None:
        super().__init__()
        channels_s, channels_t = map_size(student, "student", "factor")[0], map_size(teacher, "teacher", "factor")[0]
        factors = int(rate * channels_t)
        if factors < 1:
            raise UsageError(f"`rate` is {rate}, which leaves 0 of {channels_t} channels.", fix="Use a larger rate.")
        self.paraphraser = _leaky(nn.Conv2d, (channels_t, channels_t, factors, factors), norm=False)
        self.restore = _leaky(nn.ConvTranspose2d, (factors, factors, channels_t, channels_t), norm=False)
        self.translator = _leaky(nn.Conv2d, (channels_s, channels_s, factors, factors), norm=True)
        self._error: Tensor | None = None

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the factors of student and teacher, at the same size."""
        target = self.cast(teacher.detach())
        factor = self.paraphraser(target)
        dtype = next(self.restore.parameters()).dtype  # the error is computed in this dtype, also under autocast
        self._error = (self.restore(factor).to(dtype) - target.to(dtype)).square().mean()
        return match_sizes(self.translator(self.cast(student)), factor.detach())

    def extra_loss(self) -> Tensor | None:
        """Return the mean squared error of the reconstruction of the teacher's maps."""
        error, self._error = self._error, None
        return error

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the last error, because a tensor within a graph cannot be copied."""
        return {**self.__dict__, "_error": None}


def _leaky(layer: type[nn.Module], widths: tuple[int, ...], *, norm: bool) -> nn.Sequential:
    """Return 3 × 3 convolutions, each followed by a leaky ReLU of slope 0.1."""
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [layer(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if norm else []), nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts)
