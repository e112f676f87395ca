"""Losses on feature maps, stages, vectors and relations equal the results of reference code."""

from __future__ import annotations

import numpy as np
import pytest

from distillation.golden import VALUES, a1, a2, b1, b2, es, et, et5, fs, ft, ft3, ft4, g1, g2, h1, h2
from kirsch import ops
from kirsch.distillation.losses import LOSSES

GOLDEN = {
    "AT/RepDistiller p=2": ("at", fs, ft, {}),
    "AT/mdistiller p=2": ("at", fs, ft, {}),
    "AT/mdistiller p=2, teacher 3x3": ("at", fs, ft3, {}),
    "AT/torchdistill code": ("at", fs, ft, {}),
    "AT/torchdistill paper (/B)": ("at", fs, ft, {"convention": "paper"}),
    "AT/mmrazor": ("at", fs, ft, {}),
    "NST/RepDistiller": ("nst", fs, ft, {}),
    "NST/mdistiller": ("nst", fs, ft, {}),
    "SP/RepDistiller": ("sp", fs, ft, {}),
    "SP/torchdistill batchmean": ("sp", fs, ft, {"convention": "torchdistill"}),
    "RKD/RepDistiller w_d=25 w_a=50": ("rkd", es, et, {}),
    "RKD/mdistiller d only (w_d=1,w_a=0)": ("rkd-distance", es, et, {}),
    "RKD/mdistiller a only (w_d=0,w_a=1)": ("rkd-angle", es, et, {}),
    "RKD/torchdistill d=1 a=2": ("rkd", es, et, {"distance_weight": 1.0, "angle_weight": 2.0}),
    "RKD/mmrazor dist w=25 l2norm": ("rkd", es, et, {"angle_weight": 0.0, "unit": True}),
    "RKD/mmrazor angle w=50 l2norm": ("rkd", es, et, {"distance_weight": 0.0, "unit": True}),
    "PKT/RepDistiller": ("pkt", es, et, {}),
    "CC/RepDistiller (embedded, equal dims)": ("cc", es, et5, {}),
    "CC/torchdistill CCKD gaussian gamma=.4 P=2": ("cc-kernel", es, et5, {"convention": "torchdistill"}),
    "CC/torchdistill CCKD bilinear gamma=.4 P=2": (
        "cc-kernel",
        es,
        et5,
        {"kernel": "bilinear", "convention": "torchdistill"},
    ),
    "FitNet/MSE": ("fitnet", fs, ft4, {}),
    "FSP/RepDistiller (avgpool, mse)": ("fsp", [g1, g2], [h1, h2], {}),
    "FSP/torchdistill (maxpool, norm)": ("fsp", [g1, g2], [h1, h2], {"convention": "torchdistill"}),
    "AB/RepDistiller 1 stage": ("ab", fs, ft4, {}),
    "AB/torchdistill (mean)": ("ab", fs, ft4, {"convention": "torchdistill"}),
    "FT/RepDistiller p1=2 p2=1 (on factors)": ("ft", fs, ft4, {}),
    "FT/torchdistill p=1": ("ft", fs, ft4, {"convention": "paper"}),
    "FT/mmrazor": ("ft", fs, ft4, {"convention": "paper"}),
    "KDSVD/RepDistiller k=1": ("kd-svd", [a1, a2], [b1, b2], {"convention": "repdistiller"}),
    "KDSVD/mdistiller k=1": ("kd-svd", [a1, a2], [b1, b2], {"convention": "mdistiller"}),
    "OFD/mdistiller margin=-0.5": ("ofd", fs, ft4, {"margin": -0.5}),
    "OFD/mmrazor (/1000)": ("ofd", fs, ft4, {"margin": -0.5, "convention": "mmrazor"}),
    "ReviewKD/mdistiller hcl": ("hcl", fs, ft4, {}),
    "CWD/mmrazor tau=1": ("cwd", fs, ft4, {"temperature": 1.0}),
    "CWD/mmrazor tau=4": ("cwd", fs, ft4, {"temperature": 4.0}),
    "L2Loss/mmrazor normalize": ("l2-normalized", fs, ft4, {}),
    "PKD/mmrazor": ("pkd", fs, ft4, {}),
}

IN_32_BITS = {"KDSVD/mdistiller k=1": 1e-6}
"""Name → relative tolerance, if the reference computes in float32: the `svd` of mdistiller calls `.float()` first."""


@pytest.mark.parametrize("golden", GOLDEN)
def test_feature_losses_equal_the_golden_values(golden, framework):
    name, student, teacher, options = GOLDEN[golden]
    value = float(LOSSES[name](ops.map_arrays(framework, student), ops.map_arrays(framework, teacher), **options))
    tolerance = IN_32_BITS.get(golden, 1e-9)
    assert value == pytest.approx(VALUES[golden], rel=tolerance, abs=1e-9)


def test_every_golden_value_of_feature_losses_is_tested():
    methods = {key.partition("/")[0] for key in GOLDEN}
    assert {key for key in VALUES if key.partition("/")[0] in methods} == set(GOLDEN)
    assert len(methods) == 16
    assert np.isfinite(list(VALUES.values())).all()
