"""Data sources are called with their options. If a source fails, the error names it."""

from __future__ import annotations

import re

import pytest

from kirsch.data.sources import load_data
from kirsch.errors import DataError, KirschError, LoadError, UnknownNameError, UsageError

SOURCES = """
import numpy as np

from kirsch.errors import LoadError, UsageError
from kirsch.data.dataset import DataSet, Split


def good(*, seed, classes=2):
    part = Split(np.full((classes, 1), seed, np.float32), np.arange(classes))
    return DataSet("good", part, part, part, classes=tuple("abcdef"[:classes]))


def broken(*, seed):
    raise ValueError("the disk is gone")


def mistyped(*, seed):
    return 1 + "a"


def missing(*, seed):
    raise LoadError("The archive is missing.")


def plain(classes=2):
    part = Split(np.zeros((classes, 1), np.float32), np.arange(classes))
    return DataSet("plain", part, part, part, classes=tuple("abcdef"[:classes]))


def demanding(path, size):
    return plain()


def demanding_and_open(path, **options):
    return plain()


def open_to_all(**options):
    return good(**options)


def other(*, seed):
    return [1, 2]
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "sources.py").write_text(SOURCES)
    return tmp_path


def test_source_takes_the_seed_and_its_options(base):
    data = load_data("sources.py:good", {"classes": 3}, seed=7, base=base)
    assert data.classes == ("a", "b", "c")
    assert (data.train.inputs == 7).all()


def test_source_without_seed_parameter_is_called_without_seed(base):
    assert load_data("sources.py:plain", {"classes": 3}, seed=7, base=base).classes == ("a", "b", "c")
    assert (load_data("sources.py:open_to_all", {}, seed=7, base=base).train.inputs == 7).all()
    for options, sentence in (
        ({"seed": 3}, r"got an unexpected keyword argument 'seed'\. Use only classes in data\.options"),
        ({"colors": 3}, r"'colors'\. Use only classes"),
    ):
        with pytest.raises(UsageError, match=sentence):
            load_data("sources.py:plain", options, seed=0, base=base)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "The data source 'sources.py:demanding' needs the options 'path' and 'size'. Add them to data.options."),
        ({"size": 3}, "The data source 'sources.py:demanding' needs the option 'path'. Add it to data.options."),
        ({"size": 3, "paths": "a"}, "does not take these options. missing a required argument: 'path'."),
    ],
)
def test_required_options_that_are_missing_are_named(base, options, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        load_data("sources.py:demanding", options, seed=0, base=base)
    with pytest.raises(UsageError, match=r"'sources\.py:demanding_and_open' needs the option 'path'\."):
        load_data("sources.py:demanding_and_open", {"size": 3}, seed=0, base=base)


@pytest.mark.parametrize(
    ("source", "options", "error", "sentence"),
    [
        (
            "sources.py:good",
            {"colors": 3},
            UsageError,
            "does not take these options. got an unexpected keyword argument 'colors'.",
        ),
        (
            "sources.py:good",
            {"seed": 3},
            UsageError,
            "data.options contains `seed`, which 'sources.py:good' receives",
        ),
        (
            "sources.py:broken",
            {},
            DataError,
            "The data source 'sources.py:broken' failed. ValueError: the disk is gone (sources.py:",
        ),
        (
            "sources.py:mistyped",
            {},
            DataError,
            "The data source 'sources.py:mistyped' failed. TypeError: unsupported operand",
        ),
        ("sources.py:missing", {}, LoadError, "The archive is missing."),
        (
            "sources.py:other",
            {},
            DataError,
            "sources.py:other returns a list; expected a kirsch.DataSet. Return kirsch.DataSet(name, train=",
        ),
        ("sources.py:goood", {}, LoadError, "There is no callable of sources.py named 'goood'."),
        ("digit", {}, UnknownNameError, "There is no data 'digit'. Known: cifar10, digits. Did you mean 'digits'?"),
    ],
)
def test_failing_source_is_named(base, source, options, error, sentence):
    with pytest.raises(KirschError, match=re.escape(sentence)) as caught:
        load_data(source, options, seed=0, base=base)
    assert type(caught.value) is error
