"""Parameters and multiply-accumulates of a real model, counted while it runs."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kirsch.frameworks.pytorch.predict import inference
from kirsch.frameworks.pytorch.trace import arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


def count(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one forward run.

    Args:
        model: any mode; it keeps it.
        example_inputs: a tensor, a tuple of positional, or a dict of keyword arguments.

    Source: torch.utils.flop_counter counts two floating operations a multiply-accumulate. The fast paths of attention
        and of oneDNN are off, because it does not see into them.
    """
    args, options = arguments(example_inputs)
    counter = FlopCounterMode(display=False)
    with inference(model), torch.no_grad(), torch.random.fork_rng(), _plain_kernels(), counter:
        model(*args, **options)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # setting this flag warns of Intel GPUs that are not there
            with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
