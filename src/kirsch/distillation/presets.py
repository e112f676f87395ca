"""Published objectives with their standard hyperparameters, by name; each returns the fields of an `Objective`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.distillation.term import KD_TEMPERATURE, KD_WEIGHT, Ramp, Term
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

PRESETS: Registry[Callable[[], dict[str, Any]]] = Registry("preset")

WARM_UP = 20.0
"""Epochs of the linear warm-up of DKD and ReviewKD."""


def kd_fields(temperature: float = KD_TEMPERATURE, weight: float = KD_WEIGHT) -> dict[str, Any]:
    """Return the fields of weight · soft-target loss + (1 - weight) · label loss."""
    return {"terms": (Term("kd", weight, temperature=temperature),), "label_weight": 1 - weight}


@PRESETS.register("kd")
def kd() -> dict[str, Any]:
    """Soft-target loss (`kd`) with temperature 4 and weight 0.9, and label loss with weight 0.1.

    Source: Hinton et al. 2015, arXiv:1503.02531; hyperparameters of the CIFAR-100 benchmark of Tian et al. 2020,
        arXiv:1910.10699.
    """
    return kd_fields()


@PRESETS.register("dkd")
def dkd() -> dict[str, Any]:
    """Decoupled knowledge distillation (`dkd`) with α 1 and β 8, and label loss.

    β is 8 for confident teachers in the paper, 2 or 6 for others.

    Source: Zhao et al. 2022, arXiv:2203.08679, section 4 and appendix; 20 epochs of linear warm-up.
    """
    return {"terms": (Term("dkd", Ramp(0.0, 1.0, WARM_UP), temperature=4.0, options={"alpha": 1.0, "beta": 8.0}),)}


@PRESETS.register("dist")
def dist() -> dict[str, Any]:
    """Correlations within samples and within classes (`dist`) with weight 2 and temperature 1, and label loss.

    Source: Huang et al. 2022, arXiv:2205.10536, section 4.
    """
    return {"terms": (Term("dist", 2.0, temperature=1.0),)}


@PRESETS.register("lskd")
def lskd() -> dict[str, Any]:
    """Soft-target loss of standardized logits with temperature 2 and weight 9, and label loss with weight 0.1.

    Source: Sun et al. 2024, arXiv:2403.01427, section 4.
    """
    return {
        "terms": (Term("kd", 9.0, temperature=2.0, options={"standardize": True}, name="lskd"),),
        "label_weight": 0.1,
    }


@PRESETS.register("wsld")
def wsld() -> dict[str, Any]:
    """Weighted soft labels (`wsld`) with temperature 2 and weight 2.25, the values for CIFAR-100, and label loss.

    Source: Zhou et al. 2021, arXiv:2102.00650, section 5.
    """
    return {"terms": (Term("wsld", 2.25, temperature=2.0),)}


@PRESETS.register("fitnet")
def fitnet() -> dict[str, Any]:
    """Squared difference of the feature maps of the second-to-last stage (`fitnet`), weight 100, and label loss.

    The student's maps pass through a trained regressor. The paper first trains with this term only; here it is added to
    the label loss, as in Tian et al. 2020, arXiv:1910.10699.

    Source: Romero et al. 2015, arXiv:1412.6550.
    """
    return {"terms": (Term("fitnet", 100.0, student_layer="auto[-2]", adapter="fitnet"),)}


@PRESETS.register("at")
def at() -> dict[str, Any]:
    """Attention transfer (`at`) of all stages with weight 1000, soft-target loss and label loss.

    Source: Zagoruyko, Komodakis 2017, arXiv:1612.03928; the weight as in Tian et al. 2020, arXiv:1910.10699.
    """
    soft_targets = kd_fields()
    return {**soft_targets, "terms": (*soft_targets["terms"], Term("at", 1000.0, student_layer="auto"))}


@PRESETS.register("reviewkd")
def reviewkd() -> dict[str, Any]:
    """Knowledge review (`reviewkd`) of all stages with weight 5 after a warm-up of 20 epochs, and label loss.

    Weight 5 is the paper's value for CIFAR-100; its value for ImageNet is 1.

    Source: Chen et al. 2021, arXiv:2104.09044, section 4.
    """
    return {"terms": (Term("reviewkd", Ramp(0.0, 5.0, WARM_UP), student_layer="auto", adapter="review"),)}


@PRESETS.register("crd")
def crd() -> dict[str, Any]:
    """Contrastive loss of embeddings (`crd-batch`) with weight 0.8, soft-target loss and label loss.

    The paper draws 16,384 negatives from a memory of all samples; here the other samples of the batch are the
    negatives. The loss "crd" with `adapter="crd-bank"` implements the paper.

    Source: Tian et al. 2020, arXiv:1910.10699, section 4.
    """
    contrast = Term("crd-batch", 0.8, student_layer="penultimate", adapter="embed", adapter_options={"normalize": True})
    return {"terms": (Term("kd", 1.0, temperature=4.0), contrast)}


@PRESETS.register("rkd")
def rkd() -> dict[str, Any]:
    """Relational distillation (`rkd`): distances (weight 25) and angles (weight 50) of samples, and label loss.

    Source: Park et al. 2019, arXiv:1904.05068, section 4.
    """
    return {"terms": (Term("rkd", 1.0, student_layer="penultimate"),)}


@PRESETS.register("ofa")
def ofa() -> dict[str, Any]:
    """One-for-all loss (`ofa`) of the logits, and of classification heads at all stages, and label loss.

    For student and teacher of different kinds, such as a convolutional network and a transformer.

    Source: Hao et al. 2023, arXiv:2310.19444, section 4: ε = 1.5, or 1.0 for teachers with confident predictions.
    """
    power = {"power": 1.5}
    stages = Term(
        "ofa",
        1.0,
        temperature=None,
        student_layer="auto",
        teacher_layer="logits",
        adapter="ofa",
        options=power,
        name="ofa-stages",
    )
    return {"terms": (Term("ofa", 1.0, options=power), stages)}


@PRESETS.register("cwd")
def cwd() -> dict[str, Any]:
    """Channel-wise distillation of the logits of a segmentation network (`cwd-pixels`) with weight 5, and label loss.

    Source: Shu et al. 2021, arXiv:2011.13256, section 4.
    """
    return {"terms": (Term("cwd-pixels", 5.0, temperature=1.0, name="cwd"),)}


@PRESETS.register("distilbert")
def distilbert() -> dict[str, Any]:
    """Soft-target loss (weight 5), label loss (2) and cosine distance of the last hidden states (1).

    Source: Sanh et al. 2019, arXiv:1910.01108, and its training code.
    """
    return {
        "terms": (
            Term("kd", 5.0, temperature=2.0),
            Term("hidden-cosine", 1.0, student_layer="hidden[-1]", teacher_layer="hidden[-1]"),
        ),
        "label_weight": 2.0,
    }


@PRESETS.register("tinybert")
def tinybert() -> dict[str, Any]:
    """Squared differences of hidden states and attention scores at the same relative depth (eager attention only).

    For models of the library transformers with `attn_implementation="eager"`. The hidden states include the
    embeddings. The second stage of the paper, on the logits, is the soft-target loss with temperature 1.

    Source: Jiao et al. 2020, arXiv:1909.10351, equations 7 to 10.
    """
    return {
        "terms": (
            Term("hidden-mse", 1.0, student_layer="hidden[*]", name="hidden"),
            Term("attention-mse", 1.0, student_layer="**.attention.self/softmax:in", name="attention"),
        ),
        "label_weight": 0.0,
    }


@PRESETS.register("minilm")
def minilm() -> dict[str, Any]:
    """Relations of positions (`minilm`) in the queries, keys and values of the last layer; widths may differ.

    The numbers of attention heads may differ, too.

    Source: Wang et al. 2021, arXiv:2012.15828 (MiniLMv2), section 3; 48 relation heads for large teachers, else 12.
    """
    last = [f"**.attention.self.{name}[-1]" for name in ("query", "key", "value")]
    return {"terms": (Term("minilm", 1.0, student_layer=last),), "label_weight": 0.0}


@PRESETS.register("funmatch")
def funmatch() -> dict[str, Any]:
    """Soft-target loss with temperature 1 and no labels, for long training on strongly augmented samples.

    Source: Beyer et al. 2022, arXiv:2106.05237: student and teacher receive the same crop and the same mixup.
    """
    return {"terms": (Term("kd", 1.0, temperature=1.0),), "label_weight": 0.0}


@PRESETS.register("dml")
def dml() -> dict[str, Any]:
    """Deep mutual learning: soft-target loss with temperature 1, and label loss; for `kirsch.distill_mutually`.

    Source: Zhang et al. 2018, arXiv:1706.00384, equations 4 to 9.
    """
    return {"terms": (Term("kd", 1.0, temperature=1.0),)}


@PRESETS.register("causal")
def causal() -> dict[str, Any]:
    """Soft-target loss of the next token with temperature 1 and weight 0.5, and label loss with weight 0.5.

    Source: word-level distillation, Kim, Rush 2016, arXiv:1606.07947, section 3.1.
    """
    return {"terms": (Term("kd", 0.5, temperature=1.0),), "label_weight": 0.5, "causal": True}


@PRESETS.register("seqkd")
def seqkd() -> dict[str, Any]:
    """Label loss on sequences that the teacher has generated; see `kirsch.distillation.losses.sequences`.

    Source: Kim, Rush 2016, arXiv:1606.07947, section 3.2.
    """
    return {"label_weight": 1.0}
