"""Operators that take parts of an axis, or concatenate, pad and repeat parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from frameworks.pytorch.analysis.networks import IMAGE, assert_cut_between_convolutions, conv


def cat_with_image(_, x):
    return torch.cat([x, IMAGE[:, :2]], 1)


CASES = {
    "cat on channels": (lambda _, x: torch.cat([x, x * 2], 1), conv(16, 4), {}, [8]),
    "cat with the image": (cat_with_image, conv(10, 4), {}, [8]),
    "cat on a spatial axis": (lambda _, x: torch.cat([x, x * 2], -1), conv(8, 4), {}, [8]),
    "stack and sum": (lambda _, x: torch.stack([x, x.tanh()], 1).sum(1), conv(8, 4), {}, [8]),
    "chunk": (lambda _, x: torch.mul(*x.chunk(2, 1)), conv(4, 4), {}, [4]),
    "chunk on the last axis": (
        lambda _, x: torch.mul(*x.permute(0, 2, 3, 1).chunk(2, -1)).permute(0, 3, 1, 2),
        conv(4, 4),
        {},
        [4],
    ),
    "split by a number freezes": (lambda _, x: torch.mul(*x.split(4, 1)), conv(4, 4), {}, []),
    "split by an attribute": (lambda s, x: torch.mul(*x.split(s.half, 1)), conv(4, 4), {"half": 4}, [4]),
    "split by attributes": (
        lambda s, x: torch.cat(list(reversed(x.split([s.first, s.second], 1))), 1),
        conv(8, 4),
        {"first": 2, "second": 6},
        [8],
    ),
    "split by a tuple attribute": (
        lambda s, x: torch.cat(list(reversed(torch.split(x, s.parts, 1))), 1),
        conv(8, 4),
        {"parts": (3, 5)},
        [8],
    ),
    "slice by a number keeps the channels before it": (
        lambda _, x: torch.cat([x[:, 3:], x[:, :3]], 1),
        conv(8, 4),
        {},
        [5],
    ),
    "slice by an attribute": (
        lambda s, x: torch.cat([x[:, s.at :], x[:, : s.at]], 1),
        conv(8, 4),
        {"at": 3},
        [8],
    ),
    "slice by an expression": (
        lambda s, x: torch.cat([x[:, s.at // 2 :], x[:, : s.at // 2]], 1),
        conv(8, 4),
        {"at": 6},
        [8],
    ),
    "slice from the end freezes": (lambda _, x: torch.cat([x[:, -3:], x[:, :-3]], 1), conv(8, 4), {}, []),
    "slice with a stride freezes": (lambda _, x: torch.cat([x[:, ::2], x[:, 1::2]], 1), conv(8, 4), {}, []),
    "slice of spatial axes": (lambda _, x: x[:, :, ::2, 1:], conv(8, 4), {}, [8]),
    "slice of length one": (lambda _, x: x * x[:, :1].sigmoid(), conv(8, 4), {}, [7]),
    "narrow": (lambda s, x: x.narrow(1, 0, s.at) + 1, conv(6, 4), {"at": 6}, [6, 2]),
    "narrow to the full width, given by an attribute": (
        lambda s, x: x.narrow(1, 0, s.width),
        conv(8, 4),
        {"width": 8},
        [8],
    ),
    "narrow to the full width, given by a number, freezes": (lambda _, x: x.narrow(1, 0, 8), conv(8, 4), {}, []),
    "narrow from the middle": (
        lambda s, x: torch.cat([x.narrow(1, s.at, s.rest), x.narrow(1, 0, s.at)], 1),
        conv(8, 4),
        {"at": 3, "rest": 5},
        [8],
    ),
    "slice to the full width, given by an attribute": (lambda s, x: x[:, : s.width], conv(8, 4), {"width": 8}, [8]),
    "tensor_split freezes": (lambda _, x: torch.mul(*x.tensor_split(2, 1)), conv(4, 4), {}, []),
    "chunk into fewer parts than requested freezes": (
        lambda _, x: torch.cat(list(reversed(x.chunk(5, 1))), 1),
        conv(8, 4),
        {},
        [],
    ),
    "split by keyword": (lambda s, x: torch.mul(*x.split(split_size=s.half, dim=1)), conv(4, 4), {"half": 4}, [4]),
    "select freezes the axis": (lambda _, x: x * x[:, 0:1] + x[:, 2].unsqueeze(1), conv(8, 4), {}, []),
    "pad on channels by attributes": (
        lambda s, x: F.pad(x, (0, 0, 0, 0, s.left, s.right)),
        conv(12, 4),
        {"left": 1 + 1, "right": 2},
        [8, 4],
    ),
    "channels padded by constant numbers are kept": (lambda _, x: F.pad(x, (0, 0, 0, 0, 2, 2)), conv(12, 4), {}, [8]),
    "pad on spatial axes": (lambda _, x: F.pad(x, (1, 1, 2, 0), mode="reflect"), conv(8, 4), {}, [8]),
    "pad by one attribute twice ties both sides": (
        lambda s, x: F.pad(x, (0, 0, 0, 0, s.side, s.side)),
        conv(12, 4),
        {"side": 2},
        [8, 2],
    ),
    "flip": (lambda _, x: x + x.flip(1), conv(8, 4), {}, [4]),
    "flip of spatial axes": (lambda _, x: x + x.flip((2, -1)), conv(8, 4), {}, [8]),
    "roll of spatial axes": (lambda _, x: x + x.roll((1, 2), (2, 3)), conv(8, 4), {}, [8]),
    "roll of channels freezes": (lambda _, x: x + x.roll(1, 1), conv(8, 4), {}, []),
    "roll of all elements freezes": (lambda _, x: x + x.roll(1), conv(8, 4), {}, []),
    "repeat": (lambda _, x: x.repeat(1, 2, 1, 1), conv(16, 4), {}, [8]),
    "repeat with a new axis": (lambda _, x: x.repeat(2, 1, 1, 2, 1)[0], conv(8, 4), {}, [8]),
    "repeat of one channel": (
        lambda s, x: x * s.gate(x).repeat(1, x.shape[1], 1, 1),
        conv(8, 4),
        {"gate": conv(8, 1)},
        [8],
    ),
    "repeat of one channel by a number": (
        lambda s, x: x * s.gate(x).repeat(1, 8, 1, 1),
        conv(8, 4),
        {"gate": conv(8, 1)},
        [],
    ),
    "tile": (lambda _, x: x.tile(2, 1, 1), conv(16, 4), {}, [8]),
    "repeat_interleave": (lambda _, x: x.repeat_interleave(2, 1), conv(16, 4), {}, [8]),
    "repeat_interleave by keyword": (lambda _, x: x.repeat_interleave(repeats=2, dim=1), conv(16, 4), {}, [8]),
    "repeat_interleave of all elements freezes": (
        lambda _, x: x.repeat_interleave(2).view(2, 8, 8, 16),
        conv(8, 4),
        {},
        [],
    ),
    "unbind of a spatial axis": (lambda _, x: torch.stack(x.unbind(2)[::-1], 2), conv(8, 4), {}, [8]),
    "unbind of channels freezes": (lambda _, x: torch.stack(x.unbind(1), 1), conv(8, 4), {}, []),
    "space to depth": (
        lambda _, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1),
        conv(32, 4),
        {},
        [8],
    ),
    "stack and flatten": (lambda _, x: torch.stack([x, x.tanh()], 1).flatten(1, 2), conv(16, 4), {}, [8]),
    "stack and flatten, interleaved": (lambda _, x: torch.stack([x, x.tanh()], 2).flatten(1, 2), conv(16, 4), {}, [8]),
}
"""Name → (function between two convolutions, called with the module and the output of the first convolution; the second
convolution; further attributes of the module; expected sizes of the groups)."""


@pytest.mark.parametrize("name", CASES)
def test_a_network_with_the_operator_is_pruned_correctly(name):
    assert_cut_between_convolutions(*CASES[name])
