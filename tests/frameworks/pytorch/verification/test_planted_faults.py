"""Each rule of the library is broken on purpose, one at a time: the verification must reject every such fault."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from frameworks.pytorch.verification.fault_networks import NETS
from frameworks.pytorch.verification.fault_plants import (
    FAILING,
    Fault,
    aligned_left,
    buffers,
    columns,
    cutting_first_axis_only,
    cutting_the_other_axis,
    doing_nothing,
    forgotten_statistic,
    in_both,
    interleaved_gates,
    interleaved_halves,
    interleaved_outputs,
    labels_for_each_name,
    reordered,
    replaced,
    replaced_rule,
    rows_for_columns,
    scaled_rows,
    sliced_by,
    split_by_columns,
    unfrozen,
    untied,
    with_square_weights_transposed,
    without_cells,
    without_ties,
)
from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch.analysis import trace as tracing
from kirsch.frameworks.pytorch.analysis.operators import contraction, recurrent
from kirsch.frameworks.pytorch.surgery import cut as surgery
from kirsch.frameworks.pytorch.surgery.prune import verify_cut
from kirsch.graph import coupling, group, relations
from kirsch.graph.facts import Facts
from kirsch.graph.graph import Graph
from trace_and_cut import randomly_removed, with_noise

SEED = 3  # removes different units from both axes of each grid, so that exchanged axes are detected

STATISTICS = {
    "layer norm and RMS norm": ["layer_norm", "rms_norm"],
    "group norm": ["group_norm"],
    "reductions": ["mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm"],
}
"""Network → its operators that compute statistics over channels."""

FAULTS = {
    # Relations.
    "gather takes the next index": Fault(
        "repeat_interleave",
        replaced(
            relations, "gather", lambda plain: lambda f, x, dim, index: plain(f, x, dim, (index + 1) % x.shape[dim])
        ),
    ),
    "permute keeps the order of the axes": Fault(
        "transposed grid", replaced(relations, "permute", lambda plain: lambda x, order: plain(x, sorted(order)))
    ),
    "concat reverses its parts": Fault(
        "cat", replaced(relations, "concat", lambda plain: lambda f, parts, *more: plain(f, parts[::-1], *more))
    ),
    "relate treats a square matrix as its transpose": Fault(
        "linear", replaced(relations, "relate", with_square_weights_transposed)
    ),
    "elementwise aligns axes from the left": Fault("scaled grid", replaced(relations, "elementwise", aligned_left)),
    "drop takes the next axis": Fault(
        "sum of a grid",
        replaced(
            relations, "drop", lambda plain: lambda f, x, dims, **more: plain(f, x, [d + 1 for d in dims], **more)
        ),
    ),
    "a reshape splits in column-major order": Fault("sum of a grid", split_by_columns("view")),
    "a reshape swaps the labels of its new axes": Fault(
        "sum of a grid", replaced(Facts, "split", lambda plain: lambda *args: plain(*args)[::-1])
    ),
    "a reshape merges in column-major order": Fault(
        "transposed grid",
        replaced(
            Facts, "merge", lambda plain: lambda s, axes, sizes, kind: plain(s, axes, sizes, kind)[columns(*sizes)]
        ),
    ),
    "labels are tied to those of the neighboring indices": Fault(
        "linear",
        replaced(
            Facts,
            "equate",
            lambda plain: lambda s, one, two: plain(s, one, two if one is None or two is None else np.roll(two, 1)),
        ),
    ),
    # Rules of operators.
    "a sum ties nothing": Fault("residual", replaced_rule("add", without_ties)),
    "repeat is treated as repeat_interleave": Fault("repeat", replaced_rule("repeat", reordered(1, columns(2, 8)))),
    "repeat_interleave is treated as repeat": Fault(
        "repeat_interleave", replaced_rule("repeat_interleave", reordered(1, columns(8, 2)))
    ),
    "flip keeps the order": Fault("flip", replaced_rule("flip", reordered(1, slice(None, None, -1)))),
    "split reverses its parts": Fault(
        "split", replaced_rule("split_with_sizes", lambda plain: lambda op: plain(op)[::-1])
    ),
    "a slice is off by one": Fault("slice", replaced_rule("slice", reordered(1, np.roll(np.arange(6), 1)))),
    "glu takes interleaved halves": Fault("glu", replaced_rule("glu", interleaved_halves)),
    "channels are padded on the other side": Fault(
        "pad", replaced_rule("pad", reordered(1, np.roll(np.arange(12), 2)))
    ),
    "channel_shuffle keeps the order": Fault(
        "channel shuffle", replaced_rule("channel_shuffle", reordered(1, columns(3, 4)))
    ),
    "pixel_shuffle takes positions before channels": Fault("pixel shuffle", split_by_columns("pixel shuffle")),
    "pixel_unshuffle takes positions before channels": Fault(
        "pixel unshuffle", replaced_rule("pixel_unshuffle", reordered(1, columns(4, 4)))
    ),
    "unfold takes positions before channels": Fault("unfold", replaced_rule("im2col", reordered(1, columns(4, 4)))),
    "channels of groups are interleaved": Fault("grouped convolution", split_by_columns("conv groups")),
    "outputs of groups are interleaved": Fault(
        "grouped convolution", replaced(contraction, "_channels", interleaved_outputs)
    ),
    "outputs of a depthwise convolution are interleaved": Fault(
        "depthwise convolution", replaced(contraction, "_channels", interleaved_outputs)
    ),
    "a transposed convolution is treated as a plain one": Fault(
        "transposed convolution",
        replaced(contraction, "_channels", lambda plain: lambda *args, transposed: plain(*args, transposed=False)),
    ),
    "groups of a normalization are interleaved": Fault("group norm", split_by_columns("norm groups")),
    "an embedding uses the labels of its rows as those of its columns": Fault(
        "embedding", replaced_rule("embedding", rows_for_columns), FAILING
    ),
    "gates are interleaved": Fault("LSTM", replaced(recurrent, "_gated", interleaved_gates)),
    "two directions are interleaved": Fault("bidirectional GRU", replaced_rule("gru", reordered(2, columns(2, 8)))),
    "shared keys are repeated for the wrong heads": Fault(
        "grouped-query attention",
        replaced(
            contraction,
            "_repeat_heads",
            lambda plain: lambda op, x, _: relations.gather(op.facts, x, 1, np.tile(np.arange(2), 2)),
        ),
    ),
    # Frozen axes, and integers in the code that must equal a size or keep their value.
    "channels under a softmax are removed": Fault("softmax", unfrozen("a softmax is computed over the axis")),
    "rolled channels are removed": Fault("roll", unfrozen("the axis is rolled by a fixed offset")),
    "channels sliced with a stride are removed": Fault("strided slice", unfrozen("the axis is sliced with a stride")),
    "channels beside a selected one are removed": Fault(
        "selected channel", unfrozen("a fixed index of the axis is selected")
    ),
    "indexed channels are removed": Fault("indexed channels", unfrozen("the axis is indexed by a tensor")),
    "heads are removed although their number is in the code": Fault(
        "constant number of heads", unfrozen("is a number in the code")
    ),
    "kernel positions are removed": Fault("batch norm", unfrozen("the axis is a kernel axis")),
    "outputs are removed": Fault("linear", unfrozen("the axis is part of an output of the model")),
    "the width that sets the scale of attention is reduced": Fault(
        "attention with normalized queries", unfrozen("the scale of attention")
    ),
    "an attribute need not equal the size of an axis": Fault("attention", replaced(Facts, "demand", doing_nothing)),
    "a divisor need not keep its value": Fault("width as a divisor", replaced(Facts, "pin", doing_nothing)),
    # Units and components.
    "a frozen axis of a grid ties nothing": Fault(
        "constant number of heads", replaced(coupling, "_collapse", without_cells)
    ),
    "a unit is removed without its cells": Fault(
        "scaled grid", replaced(group._Closure, "close", lambda plain: lambda self, seed: np.array([seed])), FAILING
    ),
    "a unit has the components of its neighbor": Fault(
        "attention",
        replaced(
            group.Group,
            "components_of",
            lambda plain: lambda self, units: np.roll(self.components, -1)[np.isin(self.unit_of(), units)],
        ),
        FAILING,
    ),
    "tied tensors have different labels": Fault(
        "tied weights", replaced(tracing, "_labeled_tensors", labels_for_each_name), FAILING
    ),
    # Statistics.
    **{
        f"{name} includes removed channels": Fault(network, forgotten_statistic(f"aten.{name}"))
        for network, names in STATISTICS.items()
        for name in names
    },
    # The scale of attention.
    "the scale of attention is not kept": Fault("attention", scaled_rows(lambda rows: {})),
    "the scale of attention multiplies weights but not biases": Fault(
        "attention", scaled_rows(lambda rows: {name: rows[name] for name in rows if name.endswith("weight")})
    ),
    "the scale of attention multiplies keys and values, too": Fault(
        "fused attention", scaled_rows(lambda rows: dict.fromkeys(rows, tuple(range(48))))
    ),
    "the scale of attention is applied twice": Fault(
        "attention",
        replaced(surgery, "_scale", lambda plain: lambda part, *more: (plain(part, *more), plain(part, *more))),
    ),
    # The cut.
    "removed units are kept": Fault("linear", sliced_by(np.logical_not)),
    "the mask is off by one": Fault("linear", sliced_by(lambda mask: np.roll(mask, 1))),
    "the first units are kept": Fault("linear", sliced_by(lambda mask: np.sort(mask)[::-1])),
    "only the first axis is cut": Fault("linear", in_both(cutting_first_axis_only), FAILING),
    "a matrix is cut on the other axis": Fault("linear", in_both(cutting_the_other_axis)),
    "statistics of a batch norm are not cut": Fault("batch norm", buffers(lambda value, kept: value), FAILING),
    "the first statistics of a batch norm are kept": Fault(
        "batch norm", buffers(lambda value, kept: value[: len(kept)])
    ),
    "tied weights are cut apart": Fault("tied weights", replaced(surgery, "cut", untied), "does not share the tensors"),
    "a recurrent layer keeps its old width": Fault("LSTM", replaced(surgery, "update_widths", doing_nothing), FAILING),
    **{
        f"integers of {name} keep their old values": Fault(
            name, replaced(Graph, "constants", lambda plain: lambda *_: {})
        )
        for name in ("attention", "slice", "channel shuffle", "group norm")
    },
}


EXPORTED = {}


@pytest.fixture(autouse=True)
def _exported_once(monkeypatch):
    """Export each network once, since the export takes most of the time; the faults are planted after the export."""
    plain = tracing.export

    def export(model, args, options, recorded, decisions, *, training):
        key = id(model), training
        if key not in EXPORTED:
            EXPORTED[key] = plain(model, args, options, recorded, decisions, training=training), recorded
        program, first = EXPORTED[key]
        vars(recorded).update(vars(first))
        return program

    monkeypatch.setattr(tracing, "export", export)


def verified_cut(name):
    """Cut half of all units of a network, and return its verification."""
    model, inputs = NETS[name]
    graph = tracing.trace(model, inputs)
    keep = graph.keep(randomly_removed(graph, SEED))
    return verify_cut(surgery.cut(model, graph, keep), model, graph, keep)


@functools.cache
def verified_without_fault(name):
    with_noise(NETS[name][0])
    return verified_cut(name)


@pytest.mark.parametrize("name", FAULTS)
def test_the_verification_rejects_a_planted_fault(name, monkeypatch):
    network, plant, error = FAULTS[name]
    assert verified_without_fault(network).passed
    assert verified_without_fault(network).power > 1e-3, "masking changes the output too little to show a wrong cut"
    plant(monkeypatch)
    with pytest.raises(VerificationError, match=error):
        verified_cut(network)
