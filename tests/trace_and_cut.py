"""Functions for several test folders: trace a network, remove random units of all groups, and verify the result."""

from __future__ import annotations

import numpy as np
import torch

from kirsch.frameworks.pytorch.analysis.trace import trace
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.verification.verify import verify


def with_noise(model, seed=0):
    """Return the model in inference mode, with noise on all parameters and statistics, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def randomly_removed(graph, seed=0, share=0.5):
    """Return group name → random units to remove, such that each group and each axis keeps at least one unit."""
    random = np.random.default_rng(seed)
    removed = {}
    for group in graph.groups:
        number = min(int(group.size * share), group.size - 1)
        trial = {**removed, group.name: tuple(sorted(random.choice(group.size, number, replace=False).tolist()))}
        if graph.too_small(graph.keep(trial)) is None:
            removed = trial
    return removed


def assert_pruned_correctly(model, inputs, *, sizes=None, share=0.5, seed=0, power=1e-3):
    """Trace a model, cut a share of each group, and assert that the pruned model equals the masked one.

    Args:
        model, inputs: model to trace, and its inputs.
        sizes: expected sizes of all groups; without them, a rule that freezes too many axes would pass.
        share: fraction of the units to remove.
        seed: seed of the choice of the units.
        power: smallest allowed relative change of the outputs by the mask. A smaller change would not show a wrong cut.

    Returns:
        The graph and the pruned model.
    """
    with_noise(model)
    graph = trace(model, inputs)
    if sizes is not None:
        assert sorted(group.size for group in graph.groups) == sorted(sizes), [
            (group.name, group.kind, group.size) for group in graph.groups
        ] + [(b.reason, b.where) for b in graph.blockers]
    keep = graph.keep(randomly_removed(graph, seed, share))
    pruned = cut(model, graph, keep)
    verification = verify(pruned, model, graph, keep)
    assert verification.passed
    if graph.groups:
        assert verification.power > power, "masking changes the output too little to show a wrong cut"
    assert sum(p.numel() for p in pruned.parameters()) == graph.prices.price(keep).parameters
    return graph, pruned


def verified(model, inputs, fault=lambda model: None):
    """Return the verification of a model without random units of all groups; `fault` changes the pruned model."""
    graph = trace(model, inputs)
    keep = graph.keep(randomly_removed(graph))
    pruned = cut(model, graph, keep)
    fault(pruned)
    return verify(pruned, model, graph, keep)
