"""What each ATen operator does to labels, in terms of the relations of `kirsch.graph.relations`.

A rule takes a `Step` and gives the `Tensor`s of its results. An operator without a rule freezes whatever it touches.
"""

from __future__ import annotations

import itertools
import string
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.frameworks.pytorch.provenance import TracedInt
from kirsch.frameworks.pytorch.step import FOLLOWS, axes_of, unlabelled
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.frameworks.pytorch.step import Step
    from kirsch.graph.labels import Axis

    Rule = Callable[[Step], Tensor | list[Tensor]]

RULES: dict[str, Rule] = {}

# Calls of user code whose sizes PyTorch computes from the tensor itself.
SELF_SIZED = frozenset(
    ["flatten", "ravel", "view_as", "reshape_as", "expand_as", "normalize", "squeeze", "unsqueeze", "instance_norm"]
)

ELEMENTWISE = """
add sub rsub mul div pow neg abs exp expm1 log log1p sqrt rsqrt square reciprocal sigmoid tanh relu relu6 gelu silu mish
elu selu celu softplus softsign leaky_relu hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink threshold
log_sigmoid logsigmoid clamp clamp_min clamp_max maximum minimum where masked_fill eq ne lt le gt ge logical_and
logical_or logical_not floor ceil round trunc sign sin cos erf lerp addcmul addcdiv atan2 fmod remainder
to _to_copy clone detach contiguous alias lift_fresh_copy dropout feature_dropout alpha_dropout native_dropout bernoulli
ones_like zeros_like empty_like full_like rand_like randn_like nan_to_num type_as fill copy
"""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: this function is the rule of these operators."""

    def put(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return put


def apply(step: Step) -> list[Tensor]:
    """The results of one operation; whatever it loses without a word is an error of its rule.

    Raises:
        RuntimeError: a label entered the operation and is not accounted for.
    """
    known = RULES.get(step.name)
    if known is None:
        relations.freeze(step.facts, step.tensors(), f"there is no rule for {step.facts.operation.name}")
        return [Tensor.of(shape) for shape in step.shapes]
    found = known(step)
    results = found if isinstance(found, list) else [found, *(Tensor.of(shape) for shape in step.shapes[1:])]
    lost = step.facts.lost(step.tensors(), results)
    if len(lost):
        raise RuntimeError(f"the rule of {step.name} loses {len(lost)} labels at {step.facts.operation}")
    for tensor, shape in zip(results, step.shapes, strict=True):
        if tensor.shape != tuple(shape):
            raise RuntimeError(f"the rule of {step.name} gives {tensor.shape}, the operator {tuple(shape)}")
    return results


# ---------------------------------------------------------------------------------------------- elementwise


@rule(*ELEMENTWISE.split())
def _elementwise(step: Step) -> Tensor:
    return relations.elementwise(step.facts, step.tensors(), step.shape)


@rule("prelu")
def _prelu(step: Step) -> Tensor:
    x, weight = step.args
    if weight.shape[0] == 1:
        return Tensor.of(step.shape, x.axes)
    return relations.relate(step.facts, [(x, _letters(x)), (weight, _letters(x)[1])], _letters(x), step.shape)


@rule("glu")
def _glu(step: Step) -> Tensor:
    x = step.args[0]
    dim = step.arg(1, "dim", -1) % len(x.shape)
    half = step.shape[dim]
    first = relations.gather(step.facts, x, dim, np.arange(half))
    second = relations.gather(step.facts, x, dim, np.arange(half, 2 * half))
    return relations.elementwise(step.facts, [first, second], step.shape)


# ---------------------------------------------------------------------------------------------- contraction


@rule("linear")
def _linear(step: Step) -> Tensor:
    x, weight, bias = step.args[0], step.args[1], step.arg(2, "bias")
    lead = _letters(x)[:-1]
    operands = [(x, lead + "I"), (weight, "OI")] + ([(bias, "O")] if bias is not None else [])
    out = relations.relate(step.facts, operands, lead + "O", step.shape)
    _multiply_accumulates(step, x, range(len(x.shape) - 1), weight)
    return out


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(step: Step) -> Tensor:
    x, weight, bias = step.args[0], step.args[1], step.arg(2, "bias")
    transposed = step.name.startswith("conv_transpose")
    rank = len(weight.shape) - 2
    at = len(x.shape) - rank - 1  # the channel axis: 1, or 0 without a batch axis
    groups = step.arg(6, "groups", 1)
    spatial = range(at + 1, len(x.shape))
    relations.freeze(step.facts, [x], "a convolution slides along it", spatial)
    for dim in range(2, rank + 2):
        step.facts.freeze(weight.axes[dim], "it is a kernel axis", boundary=True)
    lead, space, kernel = "N"[:at], "xyz"[:rank], "uvw"[:rank]
    one = 1 if x.shape[at] == 1 else groups  # one input channel in one group is a plain convolution
    if one == 1:
        shape = "IO" if transposed else "OI"
        operands = [(x, lead + "I" + space), (weight, shape + kernel)]
    elif groups == x.shape[at] == weight.shape[0] and weight.shape[1] == 1:
        step.follow(x.axes[at], step.given(6, "groups"))
        operands = [(x, lead + "O" + space), (weight, "O1" + kernel)]
    else:
        relations.freeze(step.facts, step.tensors(), f"{groups} groups of channels are not analysed yet")
        operands = []
    if bias is not None and operands:
        operands.append((bias, "O"))
    out = relations.relate(step.facts, operands, lead + "O" + "abc"[:rank], step.shape)
    positions = x if transposed else out
    _multiply_accumulates(step, positions, [*range(at), *range(at + 1, len(positions.shape))], weight)
    return out


def _multiply_accumulates(step: Step, positions: Tensor, dims: Sequence[int], weight: Tensor) -> None:
    """Each kept number of the weight is used once at each kept position."""
    coefficient = unlabelled(positions, dims) * unlabelled(weight, range(len(weight.shape)))
    factors = [*(positions.axes[dim] for dim in dims), *weight.axes]
    step.facts.cost("macs", coefficient, factors)


# ---------------------------------------------------------------------------------------------- normalisation


@rule(
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "batch_norm",
    "instance_norm",
)
def _per_channel_norm(step: Step) -> Tensor:
    x = step.args[0]
    own = [(t, _letters(x)[1]) for t in step.args[1:5] if isinstance(t, Tensor)]
    return relations.relate(step.facts, [(x, _letters(x)), *own], _letters(x), step.shape)


@rule("layer_norm")
def _layer_norm(step: Step) -> Tensor:
    x, sizes = step.args[0], step.args[1]
    own = [t for t in (step.arg(2, "weight"), step.arg(3, "bias")) if t is not None]
    letters = _letters(x)[-len(sizes) :]
    out = relations.relate(step.facts, [(x, _letters(x)), *((t, letters) for t in own)], _letters(x), step.shape)
    normalized = out.axes[-len(sizes) :]
    given = step.given(1, "normalized_shape")
    known = given if isinstance(given, (tuple, list)) and len(given) == len(sizes) else [None] * len(sizes)
    for axis, size in zip(normalized, known, strict=True):
        step.follow(axis, size)
    step.facts.statistic(normalized)
    return out


@rule("group_norm")
def _group_norm(step: Step) -> Tensor:
    x, groups = step.args[0], step.args[1]
    own = [(t, _letters(x)[1]) for t in (step.arg(2, "weight"), step.arg(3, "bias")) if t is not None]
    out = relations.relate(step.facts, [(x, _letters(x)), *own], _letters(x), step.shape)
    channels = out.axes[1]
    if channels is None:
        return out
    given = step.given(1, "num_groups")
    if groups == len(channels):
        step.follow(channels, given)
    elif groups > 1:
        rows = step.facts.split(channels.reshape(groups, -1), "norm groups")[0]
        step.follow(rows, given)
    if groups < len(channels):
        step.facts.statistic([channels])
    return out


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(step: Step) -> Tensor:
    x = step.args[0]
    relations.freeze(step.facts, [x], "a softmax spans it", axes_of(step.arg(1, "dim"), len(x.shape)))
    return Tensor.of(step.shape, x.axes)


@rule("mean", "sum", "amax", "amin", "linalg_vector_norm")
def _reduction(step: Step) -> Tensor:
    x = step.args[0]
    place = 2 if step.name == "linalg_vector_norm" else 1
    dims = axes_of(step.arg(place, "dim"), len(x.shape))
    keepdim = len(step.shape) == len(x.shape)
    step.facts.statistic([x.axes[dim] for dim in dims])
    return relations.drop(step.facts, x, dims, keepdim=keepdim)


# ---------------------------------------------------------------------------------------------- movement


@rule("view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze")
def _reshape(step: Step) -> Tensor:
    out = relations.reshape(step.facts, step.args[0], step.shape)
    if step.name not in ("squeeze", "unsqueeze", "flatten"):
        for axis, given in zip(out.axes, _given_sizes(step), strict=True):
            step.follow(axis, given)
    return out


def _given_sizes(step: Step) -> list[Any]:
    """For each axis of the result the size as the code gives it, `FOLLOWS`, or None where that is unknown."""
    rank = len(step.shape)
    name = step.call.name if step.call is not None else ""
    if name in SELF_SIZED or (name == "__getitem__" and step.name == "view"):
        return [FOLLOWS] * rank
    if name == "unflatten":
        dim, sizes = step.given(1, "dim"), step.given(2, "sizes")
        if isinstance(dim, int) and isinstance(sizes, tuple):
            start = dim % (rank - len(sizes) + 1)
            return [FOLLOWS] * start + list(sizes) + [FOLLOWS] * (rank - start - len(sizes))
    if name in ("view", "reshape", "expand", "broadcast_to", "zeros", "ones", "empty", "full", "rand", "randn") or (
        name.startswith("new_")
    ):
        # Creation calls have no tensor before their sizes; `_without_tensors` has put None in a tensor's place.
        rest = [argument for argument in step.call.arguments if argument is not None] if step.call else []
        rest += [step.call.options[key] for key in ("shape", "size") if step.call and key in step.call.options]
        sizes = (
            _flat(rest[0]) if rest and isinstance(rest[0], (tuple, list)) else [x for x in rest if type(x) is not float]
        )
        if len(sizes) == rank:
            return list(sizes)
    return [None] * rank


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, (tuple, list)) else [value]


@rule("permute")
def _permute(step: Step) -> Tensor:
    return relations.permute(step.args[0], [dim % len(step.shape) for dim in step.args[1]])


@rule("transpose", "t", "numpy_T")
def _transpose(step: Step) -> Tensor:
    x = step.args[0]
    order = list(range(len(x.shape)))
    first, second = (step.args[1], step.args[2]) if len(step.args) > 2 else (-2, -1)  # noqa: PLR2004 - x and two axes
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return relations.permute(x, order)


@rule("expand", "broadcast_to", "expand_as")
def _expand(step: Step) -> Tensor:
    x = step.args[0]
    new = len(step.shape) - len(x.shape)
    axes: list[Axis] = []
    for position, (size, given) in enumerate(zip(step.shape, _given_sizes(step), strict=True)):
        old = position - new
        stays = old >= 0 and x.shape[old] == size
        # An expanded axis is constant along itself, so it can follow whatever it meets, if its size can.
        free = given is FOLLOWS or isinstance(given, TracedInt)
        axis = x.axes[old] if stays else step.facts.fresh(size) if free and size > 1 else None
        axes.append(step.follow(axis, given))
    return Tensor.of(step.shape, axes)


@rule("full", "zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty")
def _create(step: Step) -> Tensor:
    axes: list[Axis] = []
    for size, given in zip(step.shape, _given_sizes(step), strict=True):
        free = isinstance(given, TracedInt) and size > 1
        axes.append(step.follow(step.facts.fresh(size), given) if free else None)
    for tensor in step.tensors():
        for axis in tensor.axes:
            step.facts.reduce(axis)  # `new_*` take only type and device from their tensor
    return Tensor.of(step.shape, axes)


@rule("cat")
def _cat(step: Step) -> Tensor:
    parts = [t for t in step.args[0] if t.shape != (0,)]
    return relations.concat(step.facts, parts, step.arg(1, "dim", 0) % len(step.shape), step.shape)


@rule("stack")
def _stack(step: Step) -> Tensor:
    parts = step.args[0]
    dim = step.arg(1, "dim", 0) % len(step.shape)
    axes = list(relations.elementwise(step.facts, parts, parts[0].shape).axes)
    return Tensor.of(step.shape, [*axes[:dim], None, *axes[dim:]])


@rule("select")
def _select(step: Step) -> Tensor:
    x = step.args[0]
    dim = step.args[1] % len(x.shape)
    relations.freeze(step.facts, [x], "an index of it is taken by number", [dim])
    return relations.drop(step.facts, x, [dim], keepdim=False)


@rule("slice")
def _slice(step: Step) -> Tensor:
    x = step.args[0]
    dim = step.arg(1, "dim", 0) % len(x.shape)
    start, end, stride = slice(step.arg(2, "start"), step.arg(3, "end"), step.arg(4, "step", 1)).indices(x.shape[dim])
    index = np.arange(start, end, stride)
    axis = x.axes[dim]
    if axis is not None and stride != 1:
        step.facts.freeze(axis, "it is sliced with a stride")
    elif axis is not None:
        for border in (start, end):
            if 0 < border < x.shape[dim]:
                # The number of indices kept before the border must be the number that the code says.
                step.follow(axis[:border], _given_border(step, border))
            given_from_end = step.arg(2 if border == start else 3, "")
            if isinstance(given_from_end, int) and given_from_end < 0:
                step.facts.freeze(axis, "it is sliced from its end by a number")
    return relations.gather(step.facts, x, dim, index)


def _given_border(step: Step, border: int) -> Any:
    """The border of a slice as the code gives it: the one integer of the call with that value, if it has a past."""
    integers = step.call.integers() if step.call is not None else []
    matching = [x for x in integers if x == border]
    traced = [x for x in matching if isinstance(x, TracedInt)]
    return traced[0] if traced and len(traced) == len(matching) and len({x.leaves for x in traced}) == 1 else border


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def _split(step: Step) -> list[Tensor]:
    x = step.args[0]
    dim = step.arg(2, "dim", 0) % len(x.shape)
    axis = x.axes[dim]
    borders = np.cumsum([0, *(shape[dim] for shape in step.shapes)])
    name = step.call.name if step.call is not None else ""
    given = step.given(1, "split_size_or_sections") if name == "split" else step.given(1, "split_sizes")
    parts = [np.arange(a, b) for a, b in itertools.pairwise(borders)]
    if axis is not None:
        if name in ("split", "split_with_sizes") and isinstance(given, tuple) and len(given) == len(parts):
            for part, size in zip(parts, given, strict=True):
                step.follow(axis[part], size)
        elif len({len(part) for part in parts}) > 1:
            step.facts.freeze(axis, "it is split into unequal parts that the code computes")
        else:  # parts that must stay equal
            for part in parts[1:]:
                step.facts.equate(axis[parts[0]], axis[part])
            if name not in ("chunk", "tensor_split"):
                step.follow(axis[parts[0]], given)
    return [relations.gather(step.facts, x, dim, part) for part in parts]


@rule("pad", "constant_pad_nd")
def _pad(step: Step) -> Tensor:
    x: Tensor = step.args[0]
    amounts = step.args[1]
    given = step.given(1, "pad")
    known = given if isinstance(given, (tuple, list)) and len(given) == len(amounts) else [None] * len(amounts)
    constant = step.arg(2, "mode", "constant") == "constant" or step.name == "constant_pad_nd"
    out = x
    for pair in range(len(amounts) // 2):
        dim = len(x.shape) - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        if not before and not after:
            continue
        if min(before, after) < 0 or (not constant and out.axes[dim] is not None):
            relations.freeze(step.facts, [out], "it is cropped, or padded with its own values", [dim])
        size = out.shape[dim] + before + after
        shape = [size if position == dim else n for position, n in enumerate(out.shape)]
        if out.axes[dim] is None or min(before, after) < 0:
            out = Tensor.of(shape, [None if position == dim else a for position, a in enumerate(out.axes)])
        else:
            sides = [_padding(step, n, known[2 * pair + k]) for k, n in enumerate((before, after))]
            axis = np.concatenate([sides[0], out.axes[dim], sides[1]])
            out = Tensor.of(shape, [axis if position == dim else a for position, a in enumerate(out.axes)])
    return out


def _padding(step: Step, amount: int, given: Any) -> Any:
    """Labels of the padding of one side: free where the amount is an attribute, else such that cannot go."""
    if not isinstance(given, TracedInt) or amount == 0:
        return np.zeros(amount, np.int64)
    return step.follow(step.facts.fresh(amount), given)


@rule("pixel_shuffle")
def _pixel_shuffle(step: Step) -> Tensor:
    x = step.args[0]
    channels = x.axes[-3]
    if channels is None:
        return Tensor.of(step.shape, [*x.axes[:-3], None, None, None])
    relations.freeze(step.facts, [x], "it becomes space", [-2, -1])
    cells = channels.reshape(step.shape[-3], -1)
    rows, positions = step.facts.split(cells, "pixel shuffle")
    step.facts.freeze(positions, "it becomes space", boundary=True)
    return Tensor.of(step.shape, [*x.axes[:-3], rows, None, None])


@rule("pixel_unshuffle")
def _pixel_unshuffle(step: Step) -> Tensor:
    x = step.args[0]
    relations.freeze(step.facts, [x], "it is unfolded into channels", [-2, -1])
    times = step.shape[-3] // x.shape[-3]
    channels = relations.gather(step.facts, x, len(x.shape) - 3, np.repeat(np.arange(x.shape[-3]), times)).axes[-3]
    return Tensor.of(step.shape, [*x.axes[:-3], channels, None, None])


# ---------------------------------------------------------------------------------------------- space


def _spatial(rank: int) -> Rule:
    def pooled(step: Step) -> list[Tensor]:
        x = step.args[0]
        dims = range(len(x.shape) - rank, len(x.shape))
        relations.freeze(step.facts, [x], "it is pooled or resized", dims)
        return [Tensor.of(shape, [*x.axes[: len(x.shape) - rank], *[None] * rank]) for shape in step.shapes]

    return pooled


for _rank in (1, 2, 3):
    for _pool in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool"):
        RULES[f"{_pool}{_rank}d"] = RULES[f"{_pool}{_rank}d_with_indices"] = _spatial(_rank)
    for _mode in ("upsample_nearest", "_upsample_nearest_exact"):
        RULES[f"{_mode}{_rank}d"] = _spatial(_rank)
RULES["upsample_linear1d"] = _spatial(1)
RULES["upsample_bilinear2d"] = RULES["upsample_bicubic2d"] = _spatial(2)
RULES["upsample_trilinear3d"] = _spatial(3)


def _letters(tensor: Tensor) -> str:
    """A different lower-case letter for each axis; capitals are left for weights."""
    return string.ascii_lowercase[: len(tensor.shape)]
