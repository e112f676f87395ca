"""The cut: a new module whose tensors are slices of the old one's, with its own integers fixed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from kirsch.frameworks.pytorch.analysis.provenance import set_integer
from kirsch.frameworks.pytorch.inference.predict import inference
from kirsch.frameworks.pytorch.modules.copying import copy_of, renew_weights
from kirsch.frameworks.pytorch.modules.interpreted import renew

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.labels import Tensor


def cut(model: nn.Module, graph: Graph, keep: NDArray[np.bool_], *, constants: bool = True) -> nn.Module:
    """A new module of the same class without the components that are not kept; the old one is left as it is.

    `constants`: whether the integers of its code are given their new values.

    The copy is made with the slices already in the place of the tensors, so that the full weights are never copied,
    and a tensor that is used twice stays one tensor. Mode, hooks, types, devices and requires_grad are those of the
    original.
    """
    memo: dict[int, Any] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in named:
        if id(value) not in memo:
            kept = sliced(value, graph.tensors[name], graph, keep)
            if kept is not value:
                memo[id(value)] = kept
    pruned = copy_of(model, memo)
    for leaf, number in graph.constants(keep).items() if constants else ():
        set_integer(pruned, leaf, number)
    with inference(pruned), torch.no_grad():  # a parametrization may compute a weight otherwise in training mode
        for module in pruned.modules():
            renew_weights(module)
            tell_widths(module)
            renew(module)
    return pruned


def sliced(value: torch.Tensor, labeled: Tensor, graph: Graph, keep: NDArray[np.bool_]) -> torch.Tensor:
    """The kept part of a tensor, a parameter if it is one; the tensor itself if all of it is kept.

    Rows that make the queries of an attention are scaled so that its scale stays that of the whole width.
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
    """Multiply the rows of a cut tensor, in its place, that the scale of an attention is folded into."""
    for fold in graph.traced.folds:
        for name, rows in fold.rows.items():
            width = graph.kept(fold.width, keep) if graph.tensors[name] is labeled else None
            if width is not None:
                folded = np.zeros(labeled.shape[0], bool)
                folded[list(rows)] = True
                mask = graph.kept(labeled.axes[0], keep)
                left = (folded if mask is None else folded[mask]).nonzero()[0]
                index = torch.from_numpy(left).to(part.device)
                part.index_copy_(0, index, part.index_select(0, index) * float(width.mean()) ** 0.5)


def tell_widths(module: nn.Module) -> None:
    """Give the standard layers the widths of their tensors; they show them and users read them.

    What a forward itself reads (groups, num_groups, normalized_shape) is fixed before, by its provenance.
    """
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001 - the common base of all convolutions has no public name
        first, second = module.weight.shape[:2]
        out, inn = (second, first) if module.transposed else (first, second)
        module.out_channels = out * module.groups if module.transposed else out
        module.in_channels = inn if module.transposed else inn * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - likewise of batch and instance norm
        stated = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if stated is None else stated.shape[0]
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
