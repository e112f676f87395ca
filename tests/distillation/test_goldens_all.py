"""Each value that another code base gave is claimed by a test that names it."""

from __future__ import annotations

from pathlib import Path

from distillation import test_goldens_features, test_goldens_logits, test_goldens_tokens
from distillation.golden import VALUES


def test_every_golden_value_is_claimed():
    claimed: set[str] = set()
    for module in (test_goldens_features, test_goldens_logits, test_goldens_tokens):
        text = Path(module.__file__).read_text()
        claimed |= {name for name in VALUES if f'"{name}"' in text}
        for thing in vars(module).values():
            if isinstance(thing, dict):
                claimed |= {name for name in thing if name in VALUES}
    assert set(VALUES) - claimed == set()
