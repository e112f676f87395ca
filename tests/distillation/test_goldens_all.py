"""Every golden value is used by a test."""

from __future__ import annotations

from pathlib import Path

from distillation import test_goldens_features, test_goldens_logits, test_goldens_tokens
from distillation.golden import VALUES


def test_every_golden_value_is_used():
    used: set[str] = set()
    for module in (test_goldens_features, test_goldens_logits, test_goldens_tokens):
        text = Path(module.__file__).read_text()
        used |= {name for name in VALUES if f'"{name}"' in text}
        for value in vars(module).values():
            if isinstance(value, dict):
                used |= {name for name in value if name in VALUES}
    assert set(VALUES) - used == set()
