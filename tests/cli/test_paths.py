"""Checks of the paths on the command line."""

from __future__ import annotations

import errno
import os

import pytest

from kirsch.cli.paths import check_paths
from kirsch.errors import UsageError


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EILSEQ])
def test_a_path_that_the_system_refuses_is_shown_with_the_reason(monkeypatch, number):
    def refuse(path):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(UsageError) as caught:
        check_paths({"run": "a?b"})
    assert caught.value.what == "RUN 'a?b' is not a possible path."
    assert caught.value.why == f"{os.strerror(number)}."
    assert caught.value.fix == "Give another name."


def test_a_long_name_in_a_folder_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match=r"--output 'absent/a+….*' is not a possible path\. File name too long\."):
        check_paths({"output": f"absent/{'a' * 300}"})
