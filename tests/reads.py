"""Record which lines of Kirsch read values of tensors. On an accelerator, each such line waits for the device."""

from __future__ import annotations

import traceback
from pathlib import Path

from torch.overrides import TorchFunctionMode

READING = {"__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "nonzero"}


class RecordReads(TorchFunctionMode):
    """Records the lines of Kirsch that read values of tensors."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READING:
            frames = [(Path(f.filename), f.lineno) for f in traceback.extract_stack() if "/src/kirsch/" in f.filename]
            self.lines += [f"{path.parent.name}/{path.name}:{line}" for path, line in frames[-1:]]
        return func(*args, **(kwargs or {}))
