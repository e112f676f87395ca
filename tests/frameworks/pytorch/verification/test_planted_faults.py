"""Each rule of the library broken on purpose, one at a time and where shapes still fit: the proof sees all of them."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch.analysis import trace as tracing
from kirsch.frameworks.pytorch.analysis.attention import Fold
from kirsch.frameworks.pytorch.analysis.operators import RULES, contraction, recurrent
from kirsch.frameworks.pytorch.framework import PyTorch
from kirsch.frameworks.pytorch.surgery import cut as surgery
from kirsch.frameworks.pytorch.verification import verify as verifying
from kirsch.graph import coupling, group, relations
from kirsch.graph.facts import Facts
from kirsch.graph.graph import Graph
from kirsch.graph.labels import Tensor
from proving import half_of_everything, shaken

if TYPE_CHECKING:
    from collections.abc import Callable


IMAGE, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 3)


class Net(nn.Module):
    """What is done with layers, as a function of the module and its input."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.rest = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.rest(self, x)


def image(width, between, head, **parts):
    """Channels of an image, something between, and a convolution that reads it."""
    first = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, width, 3, padding=1))
    last = nn.Conv2d(head, 4, 3, padding=1)
    return Net(lambda s, x: s.last(between(s, s.first(x))), first=first, last=last, **parts), IMAGE


def tokens(width, between, head, inputs=TOKENS, **parts):
    """Numbers of tokens, something between, and a linear layer that reads it."""
    first, last = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, width)), nn.Linear(head, 4)
    return Net(lambda s, x: s.last(between(s, s.first(x))), first=first, last=last, **parts), inputs


def attended(s, x, queries=lambda q: q):
    q, k, v = (layer(x).unflatten(-1, (s.heads, -1)).transpose(1, 2) for layer in (s.q, s.k, s.v))
    return F.scaled_dot_product_attention(queries(q), k, v).transpose(1, 2).flatten(2)


def unit_length(s, x):
    return attended(s, x, lambda q: F.normalize(q, dim=-1))  # not linear, so that no scale folds through it


def attended_at_once(s, x):
    q, k, v = s.qkv(x).view(2, 5, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def shared_keys(s, x):
    q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (s.q, s.k, s.v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def heads_by_number(_, x):
    x = x.view(2, 5, 4, -1)
    return (x / x.norm(dim=-1, keepdim=True)).flatten(2)


def every_statistic(_, x):
    far = 2 + x.abs()  # where a removed channel, a 2, would be the smallest, and a -2 the largest
    found = [x.sigmoid().mean(1), x.sigmoid().sum(1), far.neg().amax(1), far.amin(1), x.var(1), x.std(1)]
    return x * torch.stack([*found, torch.linalg.vector_norm(far, dim=1)]).sum(0).unsqueeze(1)


def tied():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[4].weight = model[2].weight
    return model, TOKENS


NETS = {
    "linear": (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), TOKENS),
    "batch norm": image(8, lambda s, x: s.norm(x).relu(), 8, norm=nn.BatchNorm2d(8)),
    "residual": image(8, lambda s, x: x + s.inner(x.relu()), 8, inner=nn.Conv2d(8, 8, 3, padding=1)),
    "tied": tied(),
    "repeat": image(8, lambda _, x: x.repeat(1, 2, 1, 1), 16),
    "repeat_interleave": image(8, lambda _, x: x.repeat_interleave(2, 1), 16),
    "flip": image(8, lambda _, x: x.flip(1), 8),
    "cat": image(8, lambda s, x: torch.cat([x, s.other(x.relu())], 1), 16, other=nn.Conv2d(8, 8, 1)),
    "split": image(12, lambda s, x: torch.cat(x.split([s.one, s.two], 1)[::-1], 1), 12, one=6, two=6),
    "slice": image(12, lambda s, x: torch.cat([x[:, s.at :], x[:, : s.at]], 1), 12, at=6),
    "glu": image(12, lambda _, x: F.glu(x, 1), 6),
    "pad": image(8, lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 3)), 12),
    "sum of a grid": tokens(16, lambda s, x: x.unflatten(-1, (s.rows, -1)).tanh().sum(-2), 4, rows=4),
    "transposed grid": tokens(16, lambda s, x: x.unflatten(-1, (s.rows, -1)).transpose(-2, -1).flatten(2), 16, rows=4),
    "scaled grid": tokens(
        16,
        lambda s, x: (x.unflatten(-1, (s.rows, -1)) * s.gain).flatten(-2),
        16,
        TOKENS[0, 0],
        rows=4,
        gain=nn.Parameter(torch.randn(4)),
    ),
    "heads": tokens(12, attended, 16, heads=4, q=nn.Linear(12, 16), k=nn.Linear(12, 16), v=nn.Linear(12, 16)),
    "heads at once": tokens(12, attended_at_once, 16, heads=4, qkv=nn.Linear(12, 48)),
    "heads of unit length": tokens(
        12, unit_length, 16, heads=4, q=nn.Linear(12, 16), k=nn.Linear(12, 16), v=nn.Linear(12, 16)
    ),
    "heads that share": tokens(12, shared_keys, 12, q=nn.Linear(12, 12), k=nn.Linear(12, 6), v=nn.Linear(12, 6)),
    "heads by a number": tokens(32, heads_by_number, 32),
    "LSTM": tokens(6, lambda s, x: s.cell(x)[0], 8, cell=nn.LSTM(6, 8, batch_first=True)),
    "two ways": tokens(6, lambda s, x: s.cell(x)[0], 16, cell=nn.GRU(6, 8, batch_first=True, bidirectional=True)),
    "groups": image(8, lambda s, x: s.grouped(x), 8, grouped=nn.Conv2d(8, 8, 1, groups=2)),
    "depthwise": image(4, lambda s, x: s.each(x), 16, each=nn.Conv2d(4, 16, 1, groups=4)),
    "transposed convolution": image(8, lambda s, x: s.up(x), 8, up=nn.ConvTranspose2d(8, 8, 2)),
    "group norm": image(24, lambda s, x: s.norm(x), 24, norm=nn.GroupNorm(6, 24)),
    "norms": tokens(8, lambda s, x: s.rms(s.norm(x).tanh()), 8, norm=nn.LayerNorm(8), rms=nn.RMSNorm(8)),
    "statistics": image(8, every_statistic, 8),
    "softmax": image(8, lambda _, x: x.softmax(1), 8),
    "roll": image(8, lambda _, x: x.roll(1, 1), 8),
    "every second": image(8, lambda _, x: x * x[:, ::2].mean(1, keepdim=True), 8),
    "one index": image(8, lambda _, x: x * x[:, 2].unsqueeze(1), 8),
    "some indices": image(8, lambda _, x: x * x[:, [3, 0, 2, 1]].mean(1, keepdim=True), 8),
    "channel shuffle": image(12, lambda s, x: F.channel_shuffle(x, s.groups), 12, groups=4),
    "pixel shuffle": image(16, lambda _, x: F.pixel_shuffle(x, 2), 4),
    "pixel unshuffle": image(4, lambda _, x: F.pixel_unshuffle(x, 2), 16),
    "windows": image(4, lambda _, x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 16),
    "embedding": (
        nn.Sequential(nn.Embedding(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)),
        torch.arange(4).view(2, 2),
    ),
    "a width as a divisor": tokens(8, lambda s, x: x.view(2, 5, s.channels) / s.channels, 8, channels=8),
}


SEED = 3  # of plans without symmetry: the same units of both axes of a grid may be mistaken for one another
UNEQUAL, STUCK = "is not equal to the masked original", "does not run"


STATISTICS = {
    "norms": ["layer_norm", "rms_norm"],
    "group norm": ["group_norm"],
    "statistics": ["mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm"],
}
"""The networks that take some over channels, and their operators."""


class Fault(NamedTuple):
    """The network that shows it, how it is planted, and how it is refused."""

    network: str
    plant: Callable[[pytest.MonkeyPatch], None]
    match: str = UNEQUAL


def broken(owner, name, make):
    """Plants in the place of a function what `make` makes of it."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def broken_rule(name, make):
    """The same for the rule of an operator."""
    return lambda patch: patch.setitem(RULES, name, make(RULES[name]))


def without(plain):
    return lambda *_, **__: None


def reordered(axis, order):
    """A rule whose first result has the labels of one axis in another order."""

    def make(plain):
        def rule(step):
            found = plain(step)
            first, *others = found if isinstance(found, list) else [found]
            axes = list(first.axes)
            axes[axis] = axes[axis][order]
            return [Tensor.of(first.shape, axes), *others]

        return rule

    return make


def columns(*shape):
    """The order of a grid of this shape that is read column by column."""
    return np.arange(np.prod(shape)).reshape(shape).ravel(order="F")


def unfrozen(reason):
    """What would be frozen for a reason stays free."""

    def make(plain):
        def freeze(self, axis, why, **options):
            return self.reduce(axis) if reason in why else plain(self, axis, why, **options)

        return freeze

    return broken(Facts, "freeze", make)


def forgotten_statistic(operator):
    """One operator does not tell that it averages over channels."""

    def make(plain):
        return lambda self, axes: plain(self, [] if self.operation.name == operator else axes)

    return broken(Facts, "statistic", make)


def as_transposed(plain):
    def relate(facts, operands, result, shape):
        square = [own == "OI" and x.shape[0] == x.shape[1] for x, own in operands]
        turned = [(x, own[::-1] if turn else own) for (x, own), turn in zip(operands, square, strict=True)]
        return plain(facts, turned, result, shape)

    return relate


def from_the_left(plain):
    def elementwise(facts, tensors, shape):
        spare = [len(shape) - len(x.shape) for x in tensors]
        filled = [Tensor.of([*x.shape, *[1] * n], [*x.axes, *[None] * n]) for x, n in zip(tensors, spare, strict=True)]
        return plain(facts, filled, shape)

    return elementwise


def without_ties(plain):
    """A sum whose parts may lose different units."""

    def rule(step):
        first, second = step.tensors()
        for axis in second.axes:
            step.facts.reduce(axis)
        return first

    return rule


def interleaved_gates(plain):
    def gated(step, hidden, weights):
        gates = recurrent.GATES[step.name]
        order = columns(weights[0].shape[0] // gates, gates)
        return plain(step, hidden, [Tensor.of(w.shape, [w.axes[0][order], *w.axes[1:]]) for w in weights])

    return gated


def labels_for_each_name(plain):
    def labeled(model, facts):
        out = plain(model, facts)
        return {
            name: Tensor.of(x.shape, [None if axis is None else facts.fresh(len(axis)) for axis in x.axes])
            for name, x in out.items()
        }

    return labeled


def split_by_columns(kind):
    """A reshape of one kind, (A * B) to (A, B), reads as if B came first."""

    def make(plain):
        def split(self, cells, found):
            turned = cells.ravel()[columns(*cells.shape)].reshape(cells.shape)
            return plain(self, turned if found == kind else cells, found)

        return split

    return broken(Facts, "split", make)


def interleaved_outputs(plain):
    def channels(step, given, size, weight, *, transposed):
        groups = step.arg(6, "groups", 1)
        out = weight.axes[0]
        turned = Tensor.of(weight.shape, [out[columns(len(out) // groups, groups)], *weight.axes[1:]])
        found = plain(step, given, size, weight if groups == 1 else turned, transposed=transposed)
        return found if groups == 1 else out

    return channels


def interleaved_halves(plain):
    def glu(step):
        x, count = step.args[0], step.args[0].shape[1]
        halves = [relations.gather(step.facts, x, 1, np.arange(first, count, 2)) for first in (0, 1)]
        return relations.elementwise(step.facts, halves, step.shape)

    return glu


def words_for_columns(plain):
    def embedding(step):
        table, indices = step.args
        relations.freeze(step.facts, [table], "a tensor of indices chooses from it", [1])
        return Tensor.of(step.shape, [*indices.axes, table.axes[0]])

    return embedding


def without_cells(plain):
    """The grids without what ties the cells along an axis that is frozen."""

    def collapse(*given):
        kept, ties, fixed = plain(*given)
        return kept, [(one[:0], two[:0]) for one, two in ties], fixed

    return collapse


def folded(change):
    """The scale of attention is folded into other rows than those that make the queries."""
    return broken(tracing, "fold", lambda plain: lambda *given: Fold(plain(*given).width, change(plain(*given).rows)))


def of_first_axis(plain):
    def sliced(value, labeled, *more):
        return plain(value, Tensor(labeled.shape, (*labeled.axes[:1], *[None] * (value.dim() - 1))), *more)

    return sliced


def of_the_other_axis(plain):
    def sliced(value, labeled, *more):
        square = value.dim() == 2 and value.shape[0] == value.shape[1]
        return plain(value, Tensor(labeled.shape, labeled.axes[::-1]) if square else labeled, *more)

    return sliced


def buffers(change):
    """The surgery does something else to buffers."""

    def make(plain):
        def sliced(value, *more):
            kept = plain(value, *more)
            return change(value, kept) if value.dim() and not isinstance(value, nn.Parameter) else kept

        return sliced

    return broken(surgery, "sliced", make)


def in_both(make):
    """The function that slices tensors is broken; the proof cuts its noise with it as well."""

    def plant(patch):
        for module in (surgery, verifying):
            broken(module, "sliced", make)(patch)

    return plant


def sliced_by(change):
    """The surgery takes other places of each axis than the mask says."""

    def make(plain):
        def sliced(value, labeled, graph, keep):
            def kept(labels, keep):
                mask = graph.kept(labels, keep)
                return None if mask is None else change(mask)

            return plain(value, labeled, SimpleNamespace(traced=graph.traced, tensors=graph.tensors, kept=kept), keep)

        return sliced

    return in_both(make)


def untied(plain):
    def cut(*args):
        pruned = plain(*args)
        for module in pruned.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(value.detach().clone()))
        return pruned

    return cut


FAULTS = {
    # The relations.
    "gather takes the next index": Fault(
        "repeat_interleave",
        broken(
            relations, "gather", lambda plain: lambda f, x, dim, index: plain(f, x, dim, (index + 1) % x.shape[dim])
        ),
    ),
    "permute leaves the axes as they are": Fault(
        "transposed grid", broken(relations, "permute", lambda plain: lambda x, order: plain(x, sorted(order)))
    ),
    "concat lays the parts in the other order": Fault(
        "cat", broken(relations, "concat", lambda plain: lambda f, parts, *more: plain(f, parts[::-1], *more))
    ),
    "relate takes a matrix for its transpose": Fault("linear", broken(relations, "relate", as_transposed)),
    "elementwise aligns from the left": Fault("scaled grid", broken(relations, "elementwise", from_the_left)),
    "drop takes the axis beside": Fault(
        "sum of a grid",
        broken(relations, "drop", lambda plain: lambda f, x, dims, **more: plain(f, x, [d + 1 for d in dims], **more)),
    ),
    "a reshape splits column by column": Fault("sum of a grid", split_by_columns("view")),
    "a reshape gives the marginals to each other's axes": Fault(
        "sum of a grid", broken(Facts, "split", lambda plain: lambda *given: plain(*given)[::-1])
    ),
    "a reshape merges column by column": Fault(
        "transposed grid",
        broken(Facts, "merge", lambda plain: lambda s, axes, sizes, kind: plain(s, axes, sizes, kind)[columns(*sizes)]),
    ),
    "labels are equal to those beside": Fault(
        "linear",
        broken(
            Facts,
            "equate",
            lambda plain: lambda s, one, two: plain(s, one, two if one is None or two is None else np.roll(two, 1)),
        ),
    ),
    # Rules of operators.
    "a sum ties nothing": Fault("residual", broken_rule("add", without_ties)),
    "repeat is taken for repeat_interleave": Fault("repeat", broken_rule("repeat", reordered(1, columns(2, 8)))),
    "repeat_interleave is taken for repeat": Fault(
        "repeat_interleave", broken_rule("repeat_interleave", reordered(1, columns(8, 2)))
    ),
    "flip leaves the order": Fault("flip", broken_rule("flip", reordered(1, slice(None, None, -1)))),
    "split gives its parts in the other order": Fault(
        "split", broken_rule("split_with_sizes", lambda plain: lambda step: plain(step)[::-1])
    ),
    "a slice is one place off": Fault("slice", broken_rule("slice", reordered(1, np.roll(np.arange(6), 1)))),
    "halves that gate are interleaved": Fault("glu", broken_rule("glu", interleaved_halves)),
    "channels are padded on the other side": Fault("pad", broken_rule("pad", reordered(1, np.roll(np.arange(12), 2)))),
    "a shuffle leaves the order": Fault("channel shuffle", broken_rule("channel_shuffle", reordered(1, columns(3, 4)))),
    "a pixel shuffle takes places before channels": Fault("pixel shuffle", split_by_columns("pixel shuffle")),
    "a pixel unshuffle takes places before channels": Fault(
        "pixel unshuffle", broken_rule("pixel_unshuffle", reordered(1, columns(4, 4)))
    ),
    "windows take places before channels": Fault("windows", broken_rule("im2col", reordered(1, columns(4, 4)))),
    "channels of groups are interleaved": Fault("groups", split_by_columns("conv groups")),
    "outputs of groups are interleaved": Fault("groups", broken(contraction, "_channels", interleaved_outputs)),
    "outputs of a depthwise convolution are interleaved": Fault(
        "depthwise", broken(contraction, "_channels", interleaved_outputs)
    ),
    "a transposed convolution is taken for a plain one": Fault(
        "transposed convolution",
        broken(contraction, "_channels", lambda plain: lambda *given, transposed: plain(*given, transposed=False)),
    ),
    "groups of a norm are interleaved": Fault("group norm", split_by_columns("norm groups")),
    "an embedding puts out words for columns": Fault("embedding", broken_rule("embedding", words_for_columns), STUCK),
    "gates are interleaved": Fault("LSTM", broken(recurrent, "_gated", interleaved_gates)),
    "two directions are interleaved": Fault("two ways", broken_rule("gru", reordered(2, columns(2, 8)))),
    "shared keys serve the heads in turn": Fault(
        "heads that share",
        broken(
            contraction,
            "_repeated",
            lambda plain: lambda step, x, _: relations.gather(step.facts, x, 1, np.tile(np.arange(2), 2)),
        ),
    ),
    # What must be frozen, followed or pinned.
    "a softmax lets channels go": Fault("softmax", unfrozen("a softmax spans it")),
    "a roll lets channels go": Fault("roll", unfrozen("it is rolled by a number")),
    "a stride lets channels go": Fault("every second", unfrozen("it is sliced with a stride")),
    "an index lets channels go": Fault("one index", unfrozen("an index of it is taken by number")),
    "indices let channels go": Fault("some indices", unfrozen("a tensor of indices chooses from it")),
    "a number in the code lets heads go": Fault("heads by a number", unfrozen("is a number in the code")),
    "a kernel lets its places go": Fault("batch norm", unfrozen("it is a kernel axis")),
    "an output lets its classes go": Fault("linear", unfrozen("it is an output of the model")),
    "attention lets go of the width that scales it": Fault("heads of unit length", unfrozen("the scale of attention")),
    "a size asks nothing of its attribute": Fault("heads", broken(Facts, "demand", without)),
    "a divisor is not pinned": Fault("a width as a divisor", broken(Facts, "pin", without)),
    # Units and components.
    "a frozen axis of a grid ties nothing": Fault("heads by a number", broken(coupling, "_collapse", without_cells)),
    "a unit goes without its cells": Fault(
        "scaled grid", broken(group._Closure, "of", lambda plain: lambda self, seed: np.array([seed])), STUCK
    ),
    "components of a unit are those beside": Fault(
        "heads",
        broken(
            group.Group,
            "of",
            lambda plain: lambda self, units: np.roll(self.components, -1)[np.isin(self.unit_of(), units)],
        ),
        STUCK,
    ),
    "tied tensors have labels of their own": Fault("tied", broken(tracing, "_labelled", labels_for_each_name), STUCK),
    # Statistics.
    **{
        f"{name} spans what is removed": Fault(network, forgotten_statistic(f"aten.{name}"))
        for network, names in STATISTICS.items()
        for name in names
    },
    # The scale of attention.
    "the scale of attention is not kept": Fault("heads", folded(lambda rows: {})),
    "the scale of attention is folded into weights alone": Fault(
        "heads", folded(lambda rows: {name: rows[name] for name in rows if name.endswith("weight")})
    ),
    "the scale of attention is folded into keys and values too": Fault(
        "heads at once", folded(lambda rows: dict.fromkeys(rows, tuple(range(48))))
    ),
    "the scale of attention is folded twice": Fault(
        "heads", broken(surgery, "_scale", lambda plain: lambda part, *more: (plain(part, *more), plain(part, *more)))
    ),
    # The cut.
    "what is removed is kept": Fault("linear", sliced_by(np.logical_not)),
    "what is kept is one place off": Fault("linear", sliced_by(lambda mask: np.roll(mask, 1))),
    "the first are kept": Fault("linear", sliced_by(lambda mask: np.sort(mask)[::-1])),
    "one axis is cut alone": Fault("linear", in_both(of_first_axis), STUCK),
    "a matrix is cut on the other axis": Fault("linear", in_both(of_the_other_axis)),
    "statistics of a batch norm stay whole": Fault("batch norm", buffers(lambda value, kept: value), STUCK),
    "statistics of a batch norm are the first": Fault("batch norm", buffers(lambda value, kept: value[: len(kept)])),
    "tied weights are cut apart": Fault("tied", broken(surgery, "cut", untied), "does not share the tensors"),
    "a recurrent layer keeps its old width": Fault("LSTM", broken(surgery, "update_widths", without), STUCK),
    **{
        f"integers of {name} keep their old values": Fault(
            name, broken(Graph, "constants", lambda plain: lambda *_: {})
        )
        for name in ("heads", "slice", "channel shuffle", "group norm")
    },
}


EXPORTED = {}


@pytest.fixture(autouse=True)
def _exported_once(monkeypatch):
    """Each network is exported once, which takes most of the time; all faults are planted behind that."""
    plain = tracing.export

    def export(model, args, options, calls, decisions, *, training):
        key = id(model), training
        if key not in EXPORTED:
            EXPORTED[key] = plain(model, args, options, calls, decisions, training=training), calls
        program, known = EXPORTED[key]
        vars(calls).update(vars(known))
        return program

    monkeypatch.setattr(tracing, "export", export)


def proven(name):
    """The proof of a network of which a half of everything is cut."""
    model, inputs = NETS[name]
    graph = tracing.trace(model, inputs)
    keep = graph.keep(half_of_everything(graph, SEED))
    return PyTorch()._verify(surgery.cut(model, graph, keep), model, graph, keep)


@functools.cache
def unbroken(name):
    """The same before anything is planted, once for all faults."""
    shaken(NETS[name][0])
    return proven(name)


@pytest.mark.parametrize("name", FAULTS)
def test_the_proof_sees_that(name, monkeypatch):
    network, plant, match = FAULTS[name]
    assert unbroken(network).passed
    assert unbroken(network).power > 1e-3, "the mask hardly moved the output, so the check proves nothing"
    plant(monkeypatch)
    with pytest.raises(VerificationError, match=match):
        proven(network)
