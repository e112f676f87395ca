"""Losses on logits equal the results of reference code."""

from __future__ import annotations

import numpy as np
import pytest

from distillation.golden import VALUES, y, z_s, z_t
from kirsch import ops
from kirsch.distillation.losses import LOSSES, hard_label
from kirsch.distillation.losses.top_k import stored_top_k

N, K = z_s.shape

# Name of the golden value → (loss, options, factor by which the loss is multiplied to give the value).
PLAIN = {
    f"KD/{name.format(f'T={t}')}": ("kd", {"temperature": t, "convention": convention}, 1)
    for t in (1.0, 4.0)
    for name, convention in (
        ("RepDistiller {}", "repdistiller"),
        ("mdistiller {}", "mdistiller"),
        ("mmrazor KLDivergence {} batchmean", "mmrazor"),
        ("torchdistill KDLoss {} alpha=0 (no T^2)", "torchdistill"),
        ("ModelOpt LogitsDistillationLoss default(mean) {}", "modelopt"),
        ("ModelOpt reduction=batchmean {}", "kirsch"),
        ("DeiT soft (numel) {}", "deit"),
        ("TextBrewer kd_ce_loss {}", "textbrewer"),
        ("NeuralCompressor KL*T^2 (mean) {}", "neural-compressor"),
    )
}
SQUARED = {
    f"KD/TextBrewer kd_mse_loss T={t}": ("logit-l2", {"temperature": t, "convention": "textbrewer"}, 1)
    for t in (1.0, 4.0)
}
DECOUPLED = {
    f"DKD/{name} T={t}": ("dkd", {"labels": y, "alpha": 1.0, "beta": 8.0, "temperature": t}, factor)
    for t in (1.0, 4.0)
    for name, factor in (
        ("mdistiller a=1 b=8", 1),
        ("mmrazor a=1 b=8 batchmean", 1),
        ("mmrazor a=1 b=8 reduction=mean (as its config)", N),  # the old argument `size_average` turns it into a sum
    )
}
CORRELATED = {
    f"DIST/{name} tau={t}": ("dist", {"temperature": t, "convention": convention}, 1)
    for t in (1.0, 4.0)
    for name, convention in (("OFAKD", "ofakd"), ("torchdistill", "torchdistill"), ("mmrazor", "mmrazor"))
} | {"DIST/DIST_KD repo (tau=1)": ("dist", {"convention": "dist-kd"}, 1)}
WEIGHTED = {f"WSLD/mmrazor tau={t}": ("wsld", {"labels": y, "temperature": t}, 1) for t in (1.0, 4.0)}
STANDARDIZED = {
    name: (loss, {"temperature": t, "standardize": True, **options}, 1)
    for t in (2.0, 3.0)
    for name, loss, options in (
        (f"LSKD/KD logit_stand T={t}", "kd", {}),
        (f"LSKD/DKD logit_stand a=1 b=8 T={t}", "dkd", {"labels": y, "alpha": 1.0, "beta": 8.0}),
    )
}
MULTI_LEVEL = {
    "MLKD/kd_loss T=4": ("kd", {"temperature": 4.0}, 1),
    "MLKD/bc_loss T=4": ("batch-correlation", {"temperature": 4.0}, 1),
    "MLKD/cc_loss T=4": ("class-correlation", {"temperature": 4.0}, 1),
}
ONE_FOR_ALL = {f"OFA/ofa_loss eps={power} T=1": ("ofa", {"labels": y, "power": power}, 1) for power in (1.0, 1.5)}
MIXED = {
    f"GKD/TRL generalized_jsd beta={beta} T=1 batchmean": ("jsd", {"beta": beta, "convention": "trl"}, 1)
    for beta in (0.0, 0.001, 0.1, 0.5, 0.9, 1.0)
} | {
    "GKD/TRL generalized_jsd beta=0 T=4 (no T^2)": ("jsd", {"beta": 0.0, "temperature": 4.0, "convention": "trl"}, 1),
}
RESTRICTED = {
    "TopK/ModelOpt Megatron TopKLogitsKL k=4 T=1 (restrict both)": ("top-k", {"k": 4, "tail": "renormalized"}, 1),
}
SINGLE_PRECISION = {
    f"KD/DistillKit dense_kl_div*T^2/ntok T={t}": ("kd", {"temperature": t, "convention": "distillkit"}, 1)
    for t in (1.0, 4.0)
} | {
    f"TopK/DistillKit k=4 ZERO T={t} (/ntok, no T^2)": (
        "top-k",
        {"k": 4, "tail": "zero", "temperature": t},
        1 / t**2,
    )
    for t in (1.0, 2.0)
}
"""Values that the reference code computes in float32."""

DOUBLE = PLAIN | SQUARED | DECOUPLED | CORRELATED | WEIGHTED | STANDARDIZED | MULTI_LEVEL | ONE_FOR_ALL | MIXED
DOUBLE |= RESTRICTED


def loss_value(framework, loss, options):
    options = {name: framework(value) if name == "labels" else value for name, value in options.items()}
    return float(LOSSES[loss](framework(z_s), framework(z_t), **options))


@pytest.mark.parametrize("name", DOUBLE)
def test_losses_equal_the_golden_values(name, framework):
    loss, options, factor = DOUBLE[name]
    assert factor * loss_value(framework, loss, options) == pytest.approx(VALUES[name], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", SINGLE_PRECISION)
def test_losses_equal_the_golden_values_of_reference_code_in_float32(name, framework):
    loss, options, factor = SINGLE_PRECISION[name]
    # Adjacent float32 numbers near 2.8 differ by 2e-7; a sum of ten has an error of a few times that.
    assert factor * loss_value(framework, loss, options) == pytest.approx(VALUES[name], rel=1e-6)


BUCKET_TAIL = {f"TopK/DistillKit k=4 SYMMETRIC_UNIFORM T={t} (/ntok, no T^2)": t for t in (1.0, 2.0)}


@pytest.mark.parametrize(("name", "temperature"), BUCKET_TAIL.items())
def test_a_tail_as_one_class_equals_the_golden_values(name, temperature, framework):
    """DistillKit stores log-probabilities at temperature 1 and softens them again with the tail as a single class."""
    log_t = ops.log_softmax(z_t)
    indices = np.argsort(-log_t, axis=-1)[:, :4]
    kept = np.take_along_axis(log_t, indices, axis=-1)
    stored = indices, kept, np.log1p(-np.exp(kept).sum(-1))
    value = stored_top_k(framework(z_s), *(framework(part) for part in stored), temperature=temperature)
    assert float(value) / temperature**2 == pytest.approx(VALUES[name], rel=1e-6)


def test_a_uniform_tail_equals_the_golden_value(framework):
    """TinyViT computes the cross-entropy, which is the divergence plus the entropy of the targets."""
    name = "TopK/TinyViT k=4 uniform tail soft CE"
    p = np.exp(ops.log_softmax(z_t))
    kept = -np.sort(-p, axis=-1)[:, :4]
    rest = 1 - kept.sum(-1)
    entropy = -(kept * np.log(kept)).sum(-1) - rest * np.log(rest / (K - 4))
    value = loss_value(framework, "top-k", {"k": 4, "tail": "uniform"})
    assert value + entropy.mean() == pytest.approx(VALUES[name], rel=1e-9)


WITH_LABELS = {
    f"KD/torchdistill KDLoss T={t} alpha={text}": (share, 1 - share, {"temperature": t})
    for t in (1.0, 4.0)
    for text, share in (("1e-9", 1e-9), ("0.5 (incl. CE)", 0.5))
} | {
    f"LSKD/torchdistill alpha=0.5 beta=1 (incl CE) T={t}": (0.5, 1.0, {"temperature": t, "standardize": True})
    for t in (2.0, 3.0)
}


@pytest.mark.parametrize("name", WITH_LABELS)
def test_soft_targets_with_labels_equal_the_golden_values(name, framework):
    """With alpha above 0 torchdistill computes alpha · cross-entropy + beta · soft targets · temperature²."""
    alpha, beta, options = WITH_LABELS[name]
    label = float(hard_label(framework(z_s), framework(y)))
    assert alpha * label + beta * loss_value(framework, "kd", options) == pytest.approx(VALUES[name], rel=1e-9)


def test_every_golden_value_of_logits_is_tested():
    families = ("KD/", "DKD/", "DIST/", "WSLD/", "LSKD/", "MLKD/", "OFA/", "GKD/", "TopK/")
    tested = {*DOUBLE, *SINGLE_PRECISION, *WITH_LABELS, *BUCKET_TAIL, "TopK/TinyViT k=4 uniform tail soft CE"}
    assert tested == {name for name in VALUES if name.startswith(families)}
