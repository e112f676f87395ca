"""Losses with conventions and options other than the defaults pass the conformance checks, too."""

from __future__ import annotations

import numpy as np
import pytest

from distillation.examples import with_options
from distillation.golden import a1, b1, es, et5, g1, g2
from kirsch.distillation.losses import LOSSES
from kirsch.errors import UnknownNameError
from kirsch.testing import LOSS_CHECKS

OPTIONS = [
    ("at", {"convention": "paper"}),
    ("at", {"power": 3.0}),
    ("ab", {"convention": "torchdistill"}),
    ("ft", {"convention": "paper"}),
    ("ft", {"power": 2.0}),
    ("ofd", {"convention": "mmrazor"}),
    ("ofd", {"margin": [-0.1, -0.5, -1.0, -2.0]}),
    ("hcl", {"sizes": (3, 2)}),
    ("mgd", {"convention": "modelopt"}),
    ("sp", {"convention": "torchdistill"}),
    ("rkd", {"unit": True}),
    ("cc-kernel", {"kernel": "bilinear"}),
    ("cc-kernel", {"convention": "torchdistill"}),
    ("fsp", {"convention": "torchdistill"}),
    ("kd-svd", {"convention": "repdistiller"}),
    ("kd-svd", {"convention": "mdistiller"}),
    ("kd-svd", {"count": 2}),
]


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[f"{name} {options}" for name, options in OPTIONS])
def test_losses_conform_with_other_options(name, options, check):
    check(with_options(name, **options))


@pytest.mark.parametrize("name", ["at", "ab", "ft", "ofd", "mgd", "sp", "cc-kernel", "fsp", "kd-svd"])
def test_an_unknown_convention_is_refused(name):
    inputs = {"stages": [g1, g2], "features": es}.get(LOSSES[name].takes, a1)
    with pytest.raises(UnknownNameError, match="convention 'torchdistil'"):
        LOSSES[name](inputs, inputs, convention="torchdistil")


def test_an_unknown_kernel_is_refused():
    with pytest.raises(UnknownNameError, match=r"kernel 'gaussain'.*gaussian"):
        LOSSES["cc-kernel"](es, et5, kernel="gaussain")


@pytest.mark.parametrize(
    ("name", "first", "second", "ratio"),
    [
        ("ab", "torchdistill", "repdistiller", 1000 / 3),
        ("ofd", "sum", "mmrazor", 1000),
        ("mgd", "sum", "modelopt", np.prod(a1.shape[1:])),
    ],
)
def test_conventions_differ_by_the_documented_factor(name, first, second, ratio):
    values = [float(LOSSES[name](a1, b1, convention=convention)) for convention in (first, second)]
    assert values[0] / values[1] == pytest.approx(ratio, rel=1e-12)
