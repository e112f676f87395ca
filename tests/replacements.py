"""Replacement of a file by something that is not a regular file."""

from __future__ import annotations

import contextlib
import os
import socket


def link(path):
    """Rename a file, and link its old name to it. Names that start with ".tmp-" do not count as files of a folder."""
    path.rename(path.with_name(".tmp-moved"))
    path.symlink_to(".tmp-moved")


def pipe(path):
    """Replace a file by a named pipe."""
    path.unlink()
    os.mkfifo(path)


def unix_socket(path):
    """Replace a file by a socket."""
    path.unlink()
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):  # the path of a socket must be short
        made.bind(path.name)


def folder(path):
    """Replace a file by an empty folder."""
    path.unlink()
    path.mkdir()


REPLACEMENTS = {link: "a symbolic link", pipe: "a named pipe", unix_socket: "a socket", folder: "a folder"}
"""Function that replaces a file → kind of the replacement, as messages name it."""
