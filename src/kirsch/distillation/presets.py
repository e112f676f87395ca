"""Published objectives with their standard hyperparameters, by name; each is the fields of an `Objective`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.distillation.schedule import Ramp
from kirsch.distillation.term import Term
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

PRESETS: Registry[Callable[[], dict[str, Any]]] = Registry("preset")

WARM_UP = 20.0
"""Epochs over which DKD and ReviewKD come to their full weight."""


@PRESETS.register("kd")
def kd() -> dict[str, Any]:
    """Soft targets at temperature 4, nine parts to one part of labels.

    Source: Hinton et al. 2015, arXiv:1503.02531; the numbers are those of the CIFAR-100 benchmark of Tian et al. 2020,
        arXiv:1910.10699.
    """
    return {"terms": (Term("kd", 0.9, temperature=4.0),), "label_weight": 0.1}


@PRESETS.register("dkd")
def dkd() -> dict[str, Any]:
    """Decoupled knowledge distillation for small images; β is 8 for teachers that are sure, 2 or 6 for others.

    Source: Zhao et al. 2022, arXiv:2203.08679, section 4 and appendix; 20 epochs of linear warm-up.
    """
    return {"terms": (Term("dkd", Ramp(0.0, 1.0, WARM_UP), temperature=4.0, options={"alpha": 1.0, "beta": 8.0}),)}


@PRESETS.register("dist")
def dist() -> dict[str, Any]:
    """Correlations of a sample's classes and of a class's samples, β = γ = 1, τ = 1, weight 2.

    Source: Huang et al. 2022, arXiv:2205.10536, section 4.
    """
    return {"terms": (Term("dist", 2.0, temperature=1.0),)}


@PRESETS.register("lskd")
def lskd() -> dict[str, Any]:
    """Soft targets of standardized scores: temperature 2, weight 9, and a tenth of the labels.

    Source: Sun et al. 2024, arXiv:2403.01427, section 4.
    """
    return {
        "terms": (Term("kd", 9.0, temperature=2.0, options={"standardize": True}, name="lskd"),),
        "label_weight": 0.1,
    }


@PRESETS.register("wsld")
def wsld() -> dict[str, Any]:
    """Soft targets weighed by how much the teacher is better at a sample, temperature 2, weight 2.25 on CIFAR-100.

    Source: Zhou et al. 2021, arXiv:2102.00650, section 5.
    """
    return {"terms": (Term("wsld", 2.25, temperature=2.0),)}


@PRESETS.register("fitnet")
def fitnet() -> dict[str, Any]:
    """The features of the last stage but one, which is the middle one of three, through a regressor, weight 100.

    The paper trains with it alone first; here it stands beside the labels, as in Tian et al. 2020, arXiv:1910.10699.

    Source: Romero et al. 2015, arXiv:1412.6550.
    """
    return {"terms": (Term("fitnet", 100.0, student_layer="auto[-2]", adapter="fitnet"),)}


@PRESETS.register("at")
def at() -> dict[str, Any]:
    """Attention maps of all stages, weight 1000, with soft targets beside them.

    Source: Zagoruyko, Komodakis 2017, arXiv:1612.03928; the weight as in Tian et al. 2020, arXiv:1910.10699.
    """
    return {"terms": (Term("kd", 0.9, temperature=4.0), Term("at", 1000.0, student_layer="auto")), "label_weight": 0.1}


@PRESETS.register("reviewkd")
def reviewkd() -> dict[str, Any]:
    """Fused stages against those of the teacher, weight 5 on CIFAR-100 (1 on ImageNet), with warm-up.

    Source: Chen et al. 2021, arXiv:2104.09044, section 4.
    """
    return {"terms": (Term("reviewkd", Ramp(0.0, 5.0, WARM_UP), student_layer="auto", adapter="review"),)}


@PRESETS.register("crd")
def crd() -> dict[str, Any]:
    """Contrast of embeddings with those of other samples of the batch, weight 0.8, beside soft targets of weight 1.

    The paper draws 16,384 negatives from a memory of all samples; this takes the batch. `adapter="crd-bank"` and the
    loss "crd" are the paper's.

    Source: Tian et al. 2020, arXiv:1910.10699, section 4.
    """
    contrast = Term("crd-batch", 0.8, student_layer="penultimate", adapter="embed", adapter_options={"normalize": True})
    return {"terms": (Term("kd", 1.0, temperature=4.0), contrast)}


@PRESETS.register("rkd")
def rkd() -> dict[str, Any]:
    """Distances and angles between the samples of a batch, weights 25 and 50.

    Source: Park et al. 2019, arXiv:1904.05068, section 4.
    """
    return {"terms": (Term("rkd", 1.0, student_layer="penultimate"),)}


@PRESETS.register("ofa")
def ofa() -> dict[str, Any]:
    """Heads at all stages that predict what the teacher says of the classes: for networks of different kinds.

    Source: Hao et al. 2023, arXiv:2310.19444, section 4: ε = 1.5, or 1.0 for teachers whose scores are near to labels.
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
    """Channels of a segmentation network's scores as distributions over places, weight 5 at temperature 1.

    Source: Shu et al. 2021, arXiv:2011.13256, section 4.
    """
    return {"terms": (Term("cwd-pixels", 5.0, temperature=1.0, name="cwd"),)}


@PRESETS.register("distilbert")
def distilbert() -> dict[str, Any]:
    """Soft targets at temperature 2, labels, and the direction of the last hidden states: 5 : 2 : 1.

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
    """Scores of attention, hidden states and the embedding, each layer with the teacher's at the same depth.

    For models of transformers with `attn_implementation="eager"`; the second stage of the paper, on what the models put
    out, is soft targets at temperature 1.

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
    """Relations of queries, keys and values of the last layer, each with itself; widths and heads may differ.

    Source: Wang et al. 2021, arXiv:2012.15828 (MiniLMv2), section 3; 48 relation heads for large teachers, else 12.
    """
    last = [f"**.attention.self.{name}[-1]" for name in ("query", "key", "value")]
    return {"terms": (Term("minilm", 1.0, student_layer=last),), "label_weight": 0.0}


@PRESETS.register("funmatch")
def funmatch() -> dict[str, Any]:
    """Soft targets alone at temperature 1, without labels: for long training on strongly augmented samples.

    Source: Beyer et al. 2022, arXiv:2106.05237: both see the same crop and the same mixture.
    """
    return {"terms": (Term("kd", 1.0, temperature=1.0),), "label_weight": 0.0}


@PRESETS.register("dml")
def dml() -> dict[str, Any]:
    """The labels and what the peers say, each in full, at temperature 1: for `kirsch.distill_mutually`.

    Source: Zhang et al. 2018, arXiv:1706.00384, equations 4 to 9.
    """
    return {"terms": (Term("kd", 1.0, temperature=1.0),)}


@PRESETS.register("causal")
def causal() -> dict[str, Any]:
    """Soft targets of each next token, half and half with the tokens themselves.

    Source: word-level distillation, Kim, Rush 2016, arXiv:1606.07947, section 3.1.
    """
    return {"terms": (Term("kd", 0.5, temperature=1.0),), "label_weight": 0.5, "causal": True}


@PRESETS.register("seqkd")
def seqkd() -> dict[str, Any]:
    """Cross-entropy alone, on sequences that the teacher has generated: see `kirsch.distillation.losses.sequences`.

    Source: Kim, Rush 2016, arXiv:1606.07947, section 3.2.
    """
    return {"label_weight": 1.0}
