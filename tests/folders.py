"""Contents of folders, for tests that compare a folder before and after a call."""

from __future__ import annotations


def contents(folder):
    """Return relative path → content of each file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
