"""Adapters of feature maps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.pytorch.features.adapters.adapter import (
    ADAPTERS,
    Adapter,
    Shape,
    check_spatial,
    map_size,
    match_sizes,
)

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_VARIANCE = 1e-5
"""Constant that the loss "vid" adds to log(1 + exp(scale))."""


@ADAPTERS.register("conv")
class Convolution(Adapter):
    """Converts the student's maps to the teacher's channels by a 1 × 1 convolution without bias.

    Args:
        student, teacher: shape (N, C, H, W).
        norm: add a batch norm.
        spatial: for maps of different sizes, "pool" averages the larger map, "interpolate" resizes the student's map to
            the size of the teacher's.

    Raises:
        ShapeError: a value is not (N, C, H, W).
        UsageError: `spatial` is unknown.
    """

    def __init__(self, student: Shape, teacher: Shape, *, norm: bool = False, spatial: str = "pool") -> None:
        super().__init__()
        check_spatial(spatial)
        channels_s, channels_t = map_size(student, "student", "conv")[0], map_size(teacher, "teacher", "conv")[0]
        self.spatial = spatial
        self.conv = nn.Conv2d(channels_s, channels_t, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels_t) if norm else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the converted maps and the teacher's, at the same size."""
        student, teacher = match_sizes(self.cast(student), teacher, self.spatial)
        return self.norm(self.conv(student)), teacher


@ADAPTERS.register("fitnet")
class Regressor(Adapter):
    """Converts the student's maps to the teacher's channels and size by one convolution, batch norm and ReLU.

    For twice the teacher's size this is a 3 × 3 convolution with stride 2, for half the size a transposed 4 × 4
    convolution; for another larger size, a convolution without padding whose kernel reduces it to the teacher's size.

    Args:
        student, teacher: shape (N, C, H, W).
        relu: end with a ReLU, for a teacher's value after its ReLU.

    Raises:
        ShapeError: the student's map is smaller than the teacher's, and not half its size.

    Source: Romero et al. 2015, arXiv:1412.6550, as RepDistiller builds it.
    """

    def __init__(self, student: Shape, teacher: Shape, *, relu: bool = True) -> None:
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
    """Converts the student's maps before a ReLU to the teacher's channels by a 1 × 1 convolution and a batch norm.

    The teacher's maps must be those before its ReLU, too. With `margins` they are clipped from below; the loss "ofd"
    then takes the same margins, or lower ones.

    Args:
        student, teacher: shape (N, C, H, W).
        margins: <= 0, one for each of the teacher's channels: the mean of the negative values after its batch norm, as
            computed by `kirsch.distillation.losses.maps.margins` from bias and weight.

    Raises:
        ShapeError: the number of margins is not the number of channels.
        UsageError: a margin is above 0.

    Source: Heo et al. 2019, arXiv:1904.01866.
    """

    margins: Tensor | None

    def __init__(self, student: Shape, teacher: Shape, *, margins: Any = None) -> None:
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
    """Generates the teacher's maps from the student's maps, of which most positions are masked.

    The masked positions are drawn from PyTorch's generator, for each sample separately and for all channels together.
    In inference mode nothing is masked.

    Args:
        student, teacher: shape (N, C, H, W). If the channels differ, a 1 × 1 convolution precedes.
        masked_fraction: fraction of the positions, 0 <= fraction < 1.
        spatial: as in "conv".

    Source: Yang et al. 2022, arXiv:2205.01529. There, too, positions are masked, not channels; 65 % of them.
    """

    def __init__(self, student: Shape, teacher: Shape, *, masked_fraction: float = 0.65, spatial: str = "pool") -> None:
        super().__init__()
        check_spatial(spatial)
        if not 0 <= masked_fraction < 1:
            raise UsageError(f"`masked_fraction` is {masked_fraction}; a number of at least 0 and below 1 is needed.")
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
    """Predicts a normal distribution of the teacher's maps, with means from the student's and one scale a channel.

    The student's value is {"mean": maps, "scale": (C,)}; the variance is log(1 + exp(scale)) + 1e-5.

    Args:
        student, teacher: shape (N, C, H, W).
        hidden: channels between the three 1 × 1 convolutions; by default those of the teacher.
        norm: add a batch norm before both ReLUs, unlike the authors' code.
        variance: > 1e-5, initial variance of every channel.

    Source: Ahn et al. 2019, arXiv:1904.05835, and the authors' code.
    """

    def __init__(
        self, student: Shape, teacher: Shape, *, hidden: int | None = None, norm: bool = False, variance: float = 5.0
    ) -> None:
        super().__init__()
        if not variance > SMALLEST_VARIANCE:
            raise UsageError(f"`variance` is {variance}; a number above {SMALLEST_VARIANCE} is needed.")
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
    """Computes factors of both maps, the teacher's by a paraphraser, the student's by a translator.

    The paraphraser is trained as an autoencoder: `extra_loss` is the mean squared error between the teacher's maps and
    their reconstruction from the factor. No other gradient flows to the teacher's factor. To train in two phases like
    the authors, first train on `extra_loss` alone, then freeze `paraphraser` and `restore`.

    Args:
        student, teacher: shape (N, C, H, W).
        rate: channels of a factor divided by the teacher's channels, > 0.

    Source: Kim et al. 2018, arXiv:1802.04977; rate 0.5, and the layers of both, as in RepDistiller.
    """

    def __init__(self, student: Shape, teacher: Shape, *, rate: float = 0.5) -> None:
        super().__init__()
        channels_s, channels_t = map_size(student, "student", "factor")[0], map_size(teacher, "teacher", "factor")[0]
        factors = int(rate * channels_t)
        if factors < 1:
            raise UsageError(f"`rate` is {rate}, which gives no channels of {channels_t}.", fix="Use a larger rate.")
        self.paraphraser = _leaky(nn.Conv2d, (channels_t, channels_t, factors, factors), norm=False)
        self.restore = _leaky(nn.ConvTranspose2d, (factors, factors, channels_t, channels_t), norm=False)
        self.translator = _leaky(nn.Conv2d, (channels_s, channels_s, factors, factors), norm=True)
        self._error: Tensor | None = None

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the factors of both, at the same size."""
        target = self.cast(teacher.detach())
        factor = self.paraphraser(target)
        dtype = next(self.restore.parameters()).dtype  # also under autocast
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
