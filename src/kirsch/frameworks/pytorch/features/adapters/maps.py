"""Adapters of what convolutions put out."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter, Shape, check_spatial, leveled, map_of

if TYPE_CHECKING:
    from torch import Tensor

LEAST_VARIANCE = 1e-5
"""What the loss "vid" adds to log(1 + exp(scale))."""


@ADAPTERS.register("conv")
class Convolution(Adapter):
    """Brings the student's channels to the teacher's by a convolution of 1 × 1 without bias.

    Args:
        student, teacher: shape (N, C, H, W).
        norm: batch normalization follows.
        spatial: how two sizes become one: "pool" averages the larger map; "interpolate" brings the student's to the
            size of the teacher's.

    Raises:
        ShapeError: a value is no map.
        UsageError: there is no such way to one size.
    """

    def __init__(self, student: Shape, teacher: Shape, *, norm: bool = False, spatial: str = "pool") -> None:
        super().__init__()
        check_spatial(spatial)
        own, its = map_of(student, "student", "conv")[0], map_of(teacher, "teacher", "conv")[0]
        self.spatial = spatial
        self.conv = nn.Conv2d(own, its, 1, bias=False)
        self.norm = nn.BatchNorm2d(its) if norm else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Maps of the teacher's channels, and the teacher's, at one size."""
        student, teacher = leveled(self.taken(student), teacher, self.spatial)
        return self.norm(self.conv(student)), teacher


@ADAPTERS.register("fitnet")
class Regressor(Adapter):
    """Brings the student's map to channels and size of the teacher's by one convolution, normalized and rectified.

    Twice the teacher's size takes a convolution of 3 × 3 with stride 2, half of it a transposed one of 4 × 4; any other
    larger size a kernel that leaves as much as the teacher has.

    Args:
        student, teacher: shape (N, C, H, W).
        relu: rectified at the end, for a teacher's value after its rectifier.

    Raises:
        ShapeError: the student's map is smaller than the teacher's, and not by half.

    Source: Romero et al. 2015, arXiv:1412.6550, as RepDistiller builds it.
    """

    def __init__(self, student: Shape, teacher: Shape, *, relu: bool = True) -> None:
        super().__init__()
        channels, *own = map_of(student, "student", "fitnet")
        wanted, *its = map_of(teacher, "teacher", "fitnet")
        self.conv: nn.Module
        if own == [2 * size for size in its]:
            self.conv = nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
        elif its == [2 * size for size in own]:
            self.conv = nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
        elif all(a >= b for a, b in zip(own, its, strict=True)):
            self.conv = nn.Conv2d(channels, wanted, (1 + own[0] - its[0], 1 + own[1] - its[1]))
        else:
            raise ShapeError(
                f"The student's map is {own[0]} × {own[1]}, the teacher's {its[0]} × {its[1]}.",
                "The adapter 'fitnet' makes maps smaller, or twice as large.",
                "Choose an earlier layer of the student, or the adapter 'conv'.",
            )
        self.norm = nn.BatchNorm2d(wanted)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """A map like the teacher's, and the teacher's."""
        return self.relu(self.norm(self.conv(self.taken(student)))), teacher


@ADAPTERS.register("residual")
class Connector(Adapter):
    """Brings the student's map before its rectifier to the teacher's channels: 1 × 1 without bias, and normalized.

    The teacher's value is to be that before its rectifier, too. Where margins are given it is cut off below at them,
    here; the loss "ofd" may then be given the same margins again, by `margins`, or any that lie lower.

    Args:
        student, teacher: shape (N, C, H, W).
        margins: <= 0, one for each of the teacher's channels: the mean of what is negative behind its batch
            normalization, as `kirsch.distillation.losses.maps.margins` computes it from offset and scale.

    Raises:
        ShapeError: there is another number of margins than of channels.
        UsageError: a margin is above 0.

    Source: Heo et al. 2019, arXiv:1904.01866.
    """

    margins: Tensor | None

    def __init__(self, student: Shape, teacher: Shape, *, margins: Any = None) -> None:
        super().__init__()
        own, its = map_of(student, "student", "residual")[0], map_of(teacher, "teacher", "residual")[0]
        self.conv = nn.Conv2d(own, its, 1, bias=False)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / its))
        self.norm = nn.BatchNorm2d(its)
        cut = None if margins is None else torch.as_tensor(margins).detach().to(self.conv.weight)
        if cut is not None and cut.shape != (its,):
            raise ShapeError(f"There are {cut.numel()} margins; the teacher's value has {its} channels.")
        if cut is not None and cut.device.type != "meta" and bool((cut > 0).any()):
            raise UsageError(f"A margin is {float(cut.max())}; margins are 0 or less.")
        self.register_buffer("margins", cut)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Maps of the teacher's channels, and the teacher's, cut off at the margins."""
        student, teacher = leveled(self.taken(student), teacher)
        if self.margins is not None:
            teacher = torch.maximum(teacher, self.margins.to(teacher.dtype).reshape(1, -1, 1, 1))
        return self.norm(self.conv(student)), teacher


@ADAPTERS.register("mgd")
class Generator(Adapter):
    """Makes the teacher's map from the student's, of which most places are hidden.

    The places are drawn from PyTorch's generator, for each sample anew and for all channels at once; in inference mode
    nothing is hidden.

    Args:
        student, teacher: shape (N, C, H, W). Other channels are joined by a convolution of 1 × 1 before.
        masked_fraction: of the places, 0 <= fraction < 1.
        spatial: see "conv".

    Source: Yang et al. 2022, arXiv:2205.01529. Places, not channels, are hidden there; 0.65 of them.
    """

    def __init__(self, student: Shape, teacher: Shape, *, masked_fraction: float = 0.65, spatial: str = "pool") -> None:
        super().__init__()
        check_spatial(spatial)
        if not 0 <= masked_fraction < 1:
            raise UsageError(f"The masked fraction is {masked_fraction}; a share of at least 0, below 1, is needed.")
        own, its = map_of(student, "student", "mgd")[0], map_of(teacher, "teacher", "mgd")[0]
        self.masked_fraction, self.spatial = masked_fraction, spatial
        self.align = nn.Identity() if own == its else nn.Conv2d(own, its, 1)
        self.generate = nn.Sequential(nn.Conv2d(its, its, 3, padding=1), nn.ReLU(), nn.Conv2d(its, its, 3, padding=1))

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """What is generated, and the teacher's maps."""
        student, teacher = leveled(self.taken(student), teacher, self.spatial)
        student = self.align(student)
        if self.training:
            drawn = torch.rand(len(student), 1, *student.shape[2:], device=student.device)
            student = student * (drawn >= self.masked_fraction)
        return self.generate(student), teacher


@ADAPTERS.register("vid")
class Density(Adapter):
    """A normal distribution of the teacher's map: means from the student's, a scale of its own for each channel.

    Gives {"mean": maps, "scale": (C,)}, where log(1 + exp(scale)) + 1e-5 is the variance.

    Args:
        student, teacher: shape (N, C, H, W).
        hidden: channels between the three convolutions of 1 × 1; as many as the teacher has if left out.
        norm: batch normalization before the two rectifiers, which the authors' code has not.
        variance: > 1e-5, that every channel begins with.

    Source: Ahn et al. 2019, arXiv:1904.05835, and the authors' code.
    """

    def __init__(
        self, student: Shape, teacher: Shape, *, hidden: int | None = None, norm: bool = False, variance: float = 5.0
    ) -> None:
        super().__init__()
        if not variance > LEAST_VARIANCE:
            raise UsageError(f"The variance is {variance}; a number above {LEAST_VARIANCE} is needed.")
        own, its = map_of(student, "student", "vid")[0], map_of(teacher, "teacher", "vid")[0]
        widths = [own, hidden or its, hidden or its, its]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 1, bias=False), *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]
        self.mean = nn.Sequential(*layers[: -2 if norm else -1])
        self.scale = nn.Parameter(torch.full((its,), math.log(math.expm1(variance - LEAST_VARIANCE))))

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Mean and scale, and the teacher's maps at the size of the mean."""
        student, teacher = leveled(self.taken(student), teacher)
        return {"mean": self.mean(student), "scale": self.scale}, teacher


@ADAPTERS.register("factor")
class Factor(Adapter):
    """Factors of both maps: the teacher's from a paraphraser, the student's from a translator.

    The paraphraser learns by itself to give the teacher's map back from its factor: `extra_loss` is the mean squared
    error of that. The teacher's factor is constant. To train in two phases as the authors do, first train on
    `extra_loss` alone, then freeze `paraphraser` and `restore`.

    Args:
        student, teacher: shape (N, C, H, W).
        rate: channels of a factor, as a share of the teacher's, > 0.

    Source: Kim et al. 2018, arXiv:1802.04977; rate 0.5, and the layers of both, as RepDistiller has them.
    """

    def __init__(self, student: Shape, teacher: Shape, *, rate: float = 0.5) -> None:
        super().__init__()
        own, its = map_of(student, "student", "factor")[0], map_of(teacher, "teacher", "factor")[0]
        factors = int(rate * its)
        if factors < 1:
            raise UsageError(f"A rate of {rate} leaves no factor of {its} channels.", fix="Choose a larger one.")
        self.paraphraser = _leaky(nn.Conv2d, (its, its, factors, factors), norm=False)
        self.restore = _leaky(nn.ConvTranspose2d, (factors, factors, its, its), norm=False)
        self.translator = _leaky(nn.Conv2d, (own, own, factors, factors), norm=True)
        self._error: Tensor | None = None

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """The factors of both, at one size."""
        target = self.taken(teacher.detach())
        factor = self.paraphraser(target)
        exact = next(self.restore.parameters()).dtype  # also under autocast
        self._error = (self.restore(factor).to(exact) - target.to(exact)).square().mean()
        return leveled(self.translator(self.taken(student)), factor.detach())

    def extra_loss(self) -> Tensor | None:
        """Mean squared error of the teacher's map as it is given back from its factor."""
        error, self._error = self._error, None
        return error

    def __getstate__(self) -> dict[str, Any]:
        """Without the error of the last forward: no copy can be made of a tensor within a graph."""
        return {**self.__dict__, "_error": None}


def _leaky(layer: type[nn.Module], widths: tuple[int, ...], *, norm: bool) -> nn.Sequential:
    """Layers of 3 × 3, each with a leaky rectifier of slope 0.1."""
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [layer(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if norm else []), nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts)
