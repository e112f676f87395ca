"""What the tests of the core share: trace a network, remove a random half of everything, and hold it to the proof."""

from __future__ import annotations

import numpy as np
import torch

from kirsch.frameworks.pytorch.analysis.trace import trace
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.verification.verify import verify


def shaken(model, seed=0):
    """The model with no parameter or statistic left at zero or one, in inference mode."""
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


def half_of_everything(graph, seed=0, share=0.5):
    """Group name → units to remove, so that at least one unit and one index of every axis stay."""
    random = np.random.default_rng(seed)
    removed = {}
    for group in graph.groups:
        number = min(int(group.size * share), group.size - 1)
        trial = {**removed, group.name: tuple(sorted(random.choice(group.size, number, replace=False).tolist()))}
        if graph.emptied(graph.keep(trial)) is None:
            removed = trial
    return removed


def assert_cut_is_right(model, inputs, *, sizes=None, share=0.5, seed=0, power=1e-3):
    """Trace, cut half of every group, and prove it; gives the graph and the pruned model.

    `sizes`: the group sizes that the analysis must find, so that a rule that freezes everything fails.
    """
    shaken(model)
    graph = trace(model, inputs)
    if sizes is not None:
        assert sorted(group.size for group in graph.groups) == sorted(sizes), [
            (group.name, group.kind, group.size) for group in graph.groups
        ] + [(b.reason, b.where) for b in graph.blockers]
    keep = graph.keep(half_of_everything(graph, seed, share))
    pruned = cut(model, graph, keep)
    proof = verify(pruned, model, graph, keep)
    assert proof.passed
    if graph.groups:
        assert proof.power > power, "the mask hardly moved the output, so the check proves nothing"
    assert sum(p.numel() for p in pruned.parameters()) == graph.prices.price(keep).parameters
    return graph, pruned
