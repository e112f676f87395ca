"""Random small networks of layers, norms, sums, joins and splits: a cut never fails nor differs."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from proving import assert_cut_is_right

WIDTHS = st.sampled_from([2, 4, 6, 8])
STEPS = ("conv", "depthwise", "norm", "group norm", "relu", "add", "cat", "chunk", "split", "gate", "pool", "linear")


class RandomNet(nn.Module):
    """Steps over a list of activations; each step takes one or two of them and adds one."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.parts = [], nn.ModuleList()
        widths = [3]
        for name, first, second, width in steps:
            a, b = first % len(widths), second % len(widths)
            out = self._add(name, widths[a], widths[b], width)
            if out is not None:
                self.steps.append((name, a, b, len(self.parts) - 1))
                widths.append(out)
        self.head = nn.Linear(widths[-1], 3)

    def _add(self, name, here, there, width):
        part, out = nn.Identity(), here
        if name == "conv":
            part, out = nn.Conv2d(here, width, 3, padding=1), width
        elif name == "linear":
            part, out = nn.Linear(here, width), width
        elif name == "depthwise":
            part = nn.Conv2d(here, here, 3, padding=1, groups=here)
        elif name == "norm":
            part = nn.BatchNorm2d(here)
        elif name == "group norm":
            part = nn.GroupNorm(2 if here % 2 == 0 else 1, here)
        elif name == "gate" or (name == "add" and here != there):
            part = nn.Conv2d(there, here, 1)
        elif name == "cat":
            out = here + there
        elif name in ("chunk", "split"):
            if here % 2:
                return None
            out = here // 2
            part.half = out
        self.parts.append(part)
        return out

    def forward(self, x):
        values = [x]
        for name, a, b, place in self.steps:
            here, there, part = values[a], values[b], self.parts[place]
            if name in ("conv", "depthwise", "norm", "group norm"):
                value = part(here)
            elif name == "linear":
                value = part(here.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            elif name == "relu":
                value = here.relu()
            elif name == "add":
                value = here + part(there)
            elif name == "cat":
                value = torch.cat([here, there], 1)
            elif name == "chunk":
                left, right = here.chunk(2, 1)
                value = left * right.sigmoid()
            elif name == "split":
                left, right = here.split([part.half, part.half], 1)
                value = left + right
            elif name == "gate":
                value = here * part(there.mean((2, 3), keepdim=True)).sigmoid()
            else:
                value = nn.functional.avg_pool2d(here, 3, 1, 1)
            values.append(value)
        return self.head(values[-1].mean((2, 3)))


step = st.tuples(st.sampled_from(STEPS), st.integers(0, 99), st.integers(0, 99), WIDTHS)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(step, min_size=2, max_size=9), st.sampled_from([0.3, 0.5, 0.8]))
def test_a_random_network_is_cut_right(steps, share):
    torch.manual_seed(0)
    assert_cut_is_right(RandomNet(steps), torch.randn(2, 3, 5, 5), share=share, power=-1.0)
