"""Copy a module with only the kept units: slice its tensors and update its integer attributes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from kirsch.frameworks.pytorch.analysis.attention_scale import attribute_scale
from kirsch.frameworks.pytorch.analysis.provenance import set_integer
from kirsch.frameworks.pytorch.inference.predict import inference
from kirsch.frameworks.pytorch.modules.copying import copy_of, recompute_weights
from kirsch.frameworks.pytorch.modules.interpreted import refresh_graphs
from kirsch.frameworks.pytorch.modules.tuners import update_tuner_widths

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.labels import Tensor


def cut(model: nn.Module, graph: Graph, keep: NDArray[np.bool_], *, constants: bool = True) -> nn.Module:
    """Return a copy of a module without the removed components. The original is not changed.

    The slices replace the tensors while the module is copied. The full weights are therefore never copied, and tied
    tensors stay tied. The copy keeps mode, hooks, dtypes, devices and `requires_grad`.

    Args:
        model: the original.
        graph: graph of the original.
        keep: mask of the components (sets of coupled labels) that stay, bool of shape (components,).
        constants: whether to update the integer attributes that `forward` reads.
    """
    memo: dict[int, Any] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in named:
        if id(value) not in memo:
            part = sliced(value, graph.tensors[name], graph, keep)
            if part is not value:
                memo[id(value)] = part
    pruned = copy_of(model, memo)
    for leaf, number in graph.constants(keep).items() if constants else ():
        set_integer(pruned, leaf, number)
    _set_scales(pruned, graph, keep)
    with inference(pruned), torch.no_grad():  # a parametrization may change its state in training mode
        for module in pruned.modules():
            recompute_weights(module)
            update_widths(module)
            refresh_graphs(module)
        update_tuner_widths(pruned)
    return pruned


def sliced(value: torch.Tensor, labeled: Tensor, graph: Graph, keep: NDArray[np.bool_]) -> torch.Tensor:
    """Return the kept entries of a tensor, or the tensor itself if all entries are kept.

    A slice of a parameter is a parameter. Rows that compute attention queries are scaled so that the attention scale
    stays that of the original width.
    """
    part = value.detach()
    for axis, labels in enumerate(labeled.axes):
        mask = graph.kept(labels, keep)
        if mask is not None:
            index = torch.from_numpy(mask.nonzero()[0]).to(value.device)
            part = part.index_select(axis, index)
    if part.shape == value.shape:
        return value
    _scale(part, labeled, graph, keep)
    last = torch.channels_last
    if value.dim() == 4 and value.is_contiguous(memory_format=last) and not value.is_contiguous():  # noqa: PLR2004 - NCHW
        part = part.contiguous(memory_format=last)
    if not isinstance(value, nn.Parameter):
        return part
    parameter = nn.Parameter(part, requires_grad=value.requires_grad)
    parameter.__dict__.update(copy.deepcopy(value.__dict__))
    return parameter


def _scale(part: torch.Tensor, labeled: Tensor, graph: Graph, keep: NDArray[np.bool_]) -> None:
    """Multiply in place the rows of a cut tensor that must be scaled to keep the scale of attention."""
    for scaling in graph.traced.query_scalings:
        for name, rows in scaling.rows.items():
            width = graph.kept(scaling.width, keep) if graph.tensors[name] is labeled else None
            if width is not None:
                is_scaled = np.zeros(labeled.shape[0], bool)
                is_scaled[list(rows)] = True
                mask = graph.kept(labeled.axes[0], keep)
                kept_rows = (is_scaled if mask is None else is_scaled[mask]).nonzero()[0]
                index = torch.from_numpy(kept_rows).to(part.device)
                part.index_copy_(0, index, part.index_select(0, index) * float(width.mean()) ** 0.5)


def _set_scales(pruned: nn.Module, graph: Graph, keep: NDArray[np.bool_]) -> None:
    """Set the attributes with the scale of attention to their values for the new widths; see `QueryScaling`."""
    for scaling in graph.traced.query_scalings:
        width = graph.kept(scaling.width, keep)
        if width is not None and scaling.attribute is not None:
            path, name = scaling.attribute
            module = pruned.get_submodule(path)
            setattr(module, name, attribute_scale(int(width.sum()), getattr(module, name), len(width)))


def update_widths(module: nn.Module) -> None:
    """Set the width attributes of a standard layer, such as `in_features`, to the shapes of its tensors.

    These attributes appear in the `repr` of the layer and are read by users. Attributes that `forward` reads
    (`groups`, `num_groups`, `normalized_shape`) are updated by `cut`, from the requirements that the trace recorded.
    """
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001 - the common base of all convolutions has no public name
        first, second = module.weight.shape[:2]
        if module.transposed:  # weight: (in, out / groups, ...)
            module.in_channels, module.out_channels = first, second * module.groups
        else:  # weight: (out, in / groups, ...)
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - the common base of batch and instance norm, likewise
        per_channel = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if per_channel is None else per_channel.shape[0]
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        rows, module.input_size = module.get_parameter("weight_ih_l0").shape
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        module.hidden_size = rows // gates
        if module.proj_size:
            module.proj_size = module.get_parameter("weight_hr_l0").shape[0]
