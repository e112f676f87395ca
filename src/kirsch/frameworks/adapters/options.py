"""Options of the adapters that an objective can name: one class for each adapter, the same for every framework.

A framework implements an adapter under the same name. Shapes have the batch first, and channels before positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from kirsch.errors import UsageError, listing, nearest
from kirsch.keywords import wrong_types
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SPATIAL = ("pool", "interpolate")

SMALLEST_VARIANCE = 1e-5
"""Constant that the loss "vid" adds to log(1 + exp(scale))."""

MOMENTUM = 0.5
"""Default of the option `momentum` of "crd-bank", if `size` is not set."""


class AdapterOptions:
    """Options of an adapter, with their defaults; a subclass checks the values.

    Attributes:
        stages: whether the adapter takes lists of features, one for each stage. Any other adapter is built once for
            each stage.
    """

    stages: ClassVar[bool] = False


ADAPTER_OPTIONS: Registry[type[AdapterOptions]] = Registry("adapter options")
"""Options by the name of the adapter; the first line of the docstring describes the adapter."""


def complete_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of an adapter: the given ones, and the defaults of the others.

    Raises:
        UsageError: the adapter does not have a given option, or an option has a wrong type or is out of range.
    """
    declared: Any = ADAPTER_OPTIONS[name]
    known = [field.name for field in fields(declared)]
    check_known(name, options, known)
    if wrong := wrong_types(declared, options, f"the adapter {name!r}"):
        raise UsageError(f"{'; '.join(wrong)}.", fix="Change these options.")
    complete = declared(**options)
    return {option: getattr(complete, option) for option in known}


def check_known(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise a UsageError for an option that the adapter does not have."""
    for option in options:
        if option not in known:
            raise UsageError(
                f"The adapter {name!r} has no option {option!r}.", listing(sorted(known)), nearest(option, known)
            )


def check_spatial(spatial: str) -> None:
    """Raise a UsageError if the option `spatial` is unknown."""
    if spatial not in SPATIAL:
        raise UsageError(f"The option 'spatial' is {spatial!r}.", fix="Use 'pool' or 'interpolate'.")


# ------------------------------------------------------------------------------------------------ maps


@ADAPTER_OPTIONS.register("conv")
@dataclass(frozen=True, kw_only=True)
class ConvolutionOptions(AdapterOptions):
    """Convert the student's maps to the teacher's channels by a 1 × 1 convolution without bias.

    Args:
        norm: add a batch norm.
        spatial: for maps of different sizes, "pool" averages the larger map, "interpolate" resizes the student's map to
            the size of the teacher's.
    """

    norm: bool = False
    spatial: str = "pool"

    def __post_init__(self) -> None:
        check_spatial(self.spatial)


@ADAPTER_OPTIONS.register("fitnet")
@dataclass(frozen=True, kw_only=True)
class RegressorOptions(AdapterOptions):
    """Convert the student's maps to the teacher's channels and size by one convolution, batch norm and ReLU.

    If the student's maps have twice the size of the teacher's, the convolution is 3 × 3 with stride 2. If they have
    half the size, it is a transposed 4 × 4 convolution. If they have another size, which must not be smaller, the
    convolution has no padding, and a kernel that reduces the maps to the teacher's size.

    Args:
        relu: apply a ReLU at the end. Set it to False if the teacher's maps have negative values.

    Source: Romero et al. 2015, arXiv:1412.6550, as RepDistiller builds it.
    """

    relu: bool = True


@ADAPTER_OPTIONS.register("residual")
@dataclass(frozen=True, kw_only=True)
class ConnectorOptions(AdapterOptions):
    """Convert the student's maps to the teacher's channels by a 1 × 1 convolution and a batch norm.

    The maps of both models must be the input of a ReLU. With `margins`, the teacher's maps are clipped from below; the
    loss "ofd" then needs the same margins, or lower ones.

    Args:
        margins: one value <= 0 for each of the teacher's channels: the mean of the negative values after the teacher's
            batch norm, as `kirsch.distillation.losses.maps.margins` computes it from the bias and weight of the batch
            norm.

    Source: Heo et al. 2019, arXiv:1904.01866.
    """

    margins: Any = None


@ADAPTER_OPTIONS.register("mgd")
@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(AdapterOptions):
    """Mask positions of the student's maps, and generate the teacher's maps from the other positions.

    The masked positions are drawn for each sample separately and for all channels together. In inference mode nothing
    is masked. If the numbers of channels differ, a 1 × 1 convolution is applied first.

    Args:
        masked_fraction: fraction of the positions that are masked, 0 <= fraction < 1.
        spatial: as in "conv".

    Source: Yang et al. 2022, arXiv:2205.01529. The default is that of the paper, which masks 65 % of the positions.
    """

    masked_fraction: float = 0.65
    spatial: str = "pool"

    def __post_init__(self) -> None:
        check_spatial(self.spatial)
        if not 0 <= self.masked_fraction < 1:
            raise UsageError(
                f"`masked_fraction` is {self.masked_fraction}; a number of at least 0 and below 1 is needed."
            )


@ADAPTER_OPTIONS.register("vid")
@dataclass(frozen=True, kw_only=True)
class DensityOptions(AdapterOptions):
    """Predict a normal distribution of the teacher's maps: means from the student's maps, and one scale per channel.

    The adapted value of the student is {"mean": maps, "scale": (C,)}; the variance is log(1 + exp(scale)) + 1e-5.

    Args:
        hidden: number of channels between the three 1 × 1 convolutions; by default as many as the teacher has.
        norm: add a batch norm before both ReLUs, unlike the authors' code.
        variance: > 1e-5, initial variance of every channel.

    Source: Ahn et al. 2019, arXiv:1904.05835, and the authors' code.
    """

    hidden: int | None = None
    norm: bool = False
    variance: float = 5.0

    def __post_init__(self) -> None:
        if not self.variance > SMALLEST_VARIANCE:
            raise UsageError(f"`variance` is {self.variance}; a number above {SMALLEST_VARIANCE} is needed.")


@ADAPTER_OPTIONS.register("factor")
@dataclass(frozen=True, kw_only=True)
class FactorOptions(AdapterOptions):
    """Compute a factor of the teacher's maps by a paraphraser, and a factor of the student's maps by a translator.

    A factor is a compressed representation of the maps. The paraphraser is trained as an autoencoder: its loss is the
    mean squared error between the teacher's maps and their reconstruction from the factor. No other gradient flows to
    the teacher's factor. To train in two phases like the authors, first train on this loss alone, then freeze the
    paraphraser.

    Args:
        rate: number of channels of a factor, divided by the number of the teacher's channels, > 0.

    Source: Kim et al. 2018, arXiv:1802.04977; rate 0.5, and the layers of paraphraser and translator, as in
        RepDistiller.
    """

    rate: float = 0.5


@ADAPTER_OPTIONS.register("review")
@dataclass(frozen=True, kw_only=True)
class ReviewOptions(AdapterOptions):
    """Fuse the student's stages from the deepest to the first, and convert each to the shape of the teacher's stage.

    The adapted values of student and teacher are lists of maps. The loss is the sum of a loss of maps ("hcl" in the
    paper) over the stages.

    Args:
        hidden: number of channels passed from stage to stage; by default that of the student's last stage, at most 512.

    Source: Chen et al. 2021, arXiv:2104.09044, and the authors' code.
    """

    stages: ClassVar[bool] = True

    hidden: int | None = None


@ADAPTER_OPTIONS.register("kept")
@dataclass(frozen=True, kw_only=True)
class KeptChannelsOptions(AdapterOptions):
    """Select the channels of the teacher that the pruned student has kept. There are no parameters.

    Student and teacher have shapes that differ only in one axis.

    Args:
        indices: indices of the teacher's channels, in the order of the student's channels.
        axis: axis of the channels; axis 0 is the batch.
    """

    indices: Sequence[int] | None = None
    axis: int = 1

    def __post_init__(self) -> None:
        if not self.indices:
            raise UsageError(
                "The adapter 'kept' needs the option `indices`, the channels that are kept.",
                fix='Use the terms of kirsch.recovery, or set adapter_options={"indices": [0, 2, 5]}.',
            )


# ------------------------------------------------------------------------------------------------ tokens


@ADAPTER_OPTIONS.register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearOptions(AdapterOptions):
    """Convert the last axis of the student's value to the teacher's width by a linear layer.

    Student and teacher have shapes (N, ..., D) with at least two axes. All axes except the last must agree.

    Args:
        bias: add a bias.

    Source: Jiao et al. 2020, arXiv:1909.10351, equation 8, which has no bias; TinyBERT's code has one.
    """

    bias: bool = True


@ADAPTER_OPTIONS.register("tokens-to-map")
@dataclass(frozen=True, kw_only=True)
class TokensToMapOptions(AdapterOptions):
    """Arrange the student's tokens as maps, row by row, and convert them to the teacher's channels.

    Args:
        prefix: number of tokens at the start that are not positions of the map, such as a class token; they are left
            out. By default 0 or 1, by the shapes.
    """

    prefix: int | None = None


@ADAPTER_OPTIONS.register("map-to-tokens")
@dataclass(frozen=True, kw_only=True)
class MapToTokensOptions(AdapterOptions):
    """Flatten the student's maps to tokens, row by row, and convert them to the teacher's width.

    Args:
        prefix: number of tokens at the start that are not positions of the map, such as a class token; they are left
            out. By default 0 or 1, by the shapes.
    """

    prefix: int | None = None


# ------------------------------------------------------------------------------------------------ vectors


@ADAPTER_OPTIONS.register("embed")
@dataclass(frozen=True, kw_only=True)
class EmbedOptions(AdapterOptions):
    """Compute an embedding of each value by a linear layer. Losses with `learned=True` also train the teacher's layer.

    Args:
        size: width of the embeddings.
        pool: average tokens and maps over their positions; else they are flattened.
        normalize: scale embeddings to norm 1, as CRD does and CC does not.

    Source: Peng et al. 2019, arXiv:1904.01802, and Tian et al. 2020, arXiv:1910.10699; width 128 in both.
    """

    size: int = 128
    pool: bool = True
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"`size` of an embedding is {self.size}; at least 1 is needed.")


@ADAPTER_OPTIONS.register("ofa")
@dataclass(frozen=True, kw_only=True)
class ProjectorOptions(AdapterOptions):
    """Compute logits from a stage of the student, to compare with the teacher's logits.

    The height and width of maps are halved by pairs of separable convolutions until both are at most 7, as in the last
    stage of most networks for 224 × 224 images. The maps are then averaged over positions, and so are tokens.

    Args:
        classes: number of classes; by default as many as the teacher has.
        width: channels after the last convolution; by default doubled with each halving.

    Source: Hao et al. 2023, arXiv:2310.19444. The paper uses transformer blocks for tokens, and sets `width` to the
        larger of the last widths of student and teacher.
    """

    classes: int | None = None
    width: int | None = None


@ADAPTER_OPTIONS.register("crd-bank")
@dataclass(frozen=True, kw_only=True)
class MemoryBankOptions(AdapterOptions):
    """Contrast the embedding of each sample with stored embeddings of the other network.

    Args:
        samples: number of samples in the data; ids must be from 0 to samples - 1. Optional if `size` is set; without
            `samples`, any ids are accepted.
        size: number of rows of a queue of the most recent embeddings, which replaces the table of one row per sample.
        negatives: number of negatives for each sample and direction.
        temperature: > 0.
        momentum: weight of the stored embedding when it is updated, 0 <= momentum < 1; 0.5 by default. Not available
            with `size`.
        width: width of the embeddings.

    Source: Tian et al. 2020, arXiv:1910.10699, section 3.2, and the authors' code: 16384 negatives, temperature 0.07,
        momentum 0.5, width 128. In that code, a sample itself may be drawn as a negative. The queue is from He et al.
        2020, arXiv:1911.05722.
    """

    samples: int | None = None
    size: int | None = None
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float | None = None
    width: int = 128

    def __post_init__(self) -> None:
        is_queue = self.size is not None
        rows = self.size if is_queue else self.samples
        if rows is None:
            raise UsageError(
                "The adapter 'crd-bank' needs the number of samples.",
                "It stores one embedding of each sample.",
                "Set the option `samples`, or `size` for a queue.",
            )
        if is_queue and self.momentum is not None:
            raise UsageError(
                "The adapter 'crd-bank' has no 'momentum' if 'size' is set.", "A queue stores embeddings unchanged."
            )
        minimum = 1 if is_queue else 2  # without a queue: the row of the sample, and a negative
        for name, value, is_valid, needed in (
            ("size" if is_queue else "samples", rows, rows >= minimum, f"at least {minimum}"),
            ("negatives", self.negatives, self.negatives >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature > 0, "a number above 0"),
            ("momentum", self.momentum, 0 <= (self.momentum or 0) < 1, "a number of at least 0 and below 1"),
        ):
            if not is_valid:
                raise UsageError(f"The option {name!r} of 'crd-bank' is {value}; {needed} is needed.")
