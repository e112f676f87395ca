"""Notes of a pruned model on its configuration."""

from __future__ import annotations

import re


def config_notes(pruned):
    """Return the notes on the configuration of a `Pruned`."""
    return [note for note in pruned.notes if "config" in note]


def assert_one_note(notes, pattern):
    """Check that there is one note, and that the pattern occurs in it."""
    (note,) = notes
    assert re.search(pattern, note), note
