"""A term of an objective with all names resolved, as the distillation loss evaluates it in each step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kirsch.distillation.losses.loss import OUTPUT_KINDS, TOKEN_KINDS, step_arguments
from kirsch.distillation.schedule import at
from kirsch.frameworks.layers import texts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kirsch.distillation.losses.loss import Loss
    from kirsch.distillation.schedule import Number
    from kirsch.frameworks.layers import LayerNames

CROSS_ATTENTION = re.compile(r"cross|encoder_attn|EncDecAttention")
"""In the paths of cross-attention modules of transformers."""

STACK = re.compile(r"encoder|decoder|cross")
"""The first match in a path is the stack of a layer: `decoder.layers.0.encoder_attn` is in the decoder."""


@dataclass(frozen=True)
class BoundTerm:
    """One loss between one layer of the student and one layer of the teacher.

    A term whose layers are a pattern is bound to several pairs of layers.

    Args:
        name: of the term in records. A second term of the same name has "#2" appended.
        adapter_name: unique in an objective; the key of the adapter and of the features.
        loss: the loss function.
        weight: of the term, at least 0.
        options: keywords of the loss.
        temperature: of the loss; None if it has none.
        student_layer, teacher_layer: concrete layers, see `kirsch.frameworks.layers`.
        teacher: index of the teacher; None: all teachers, combined.
        adapter: module that brings both features to one shape; None if they are compared directly.
        shapes: of one sample of the student's and the teacher's feature, as text.
    """

    name: str
    adapter_name: str
    loss: Loss
    weight: Number
    options: Mapping[str, Any]
    temperature: Number | None
    student_layer: LayerNames
    teacher_layer: LayerNames
    teacher: int | None
    adapter: Any
    shapes: tuple[str, str]

    def keywords(self, epoch: float) -> dict[str, Any]:
        """Return the keywords of the loss after `epoch` epochs."""
        options = dict(self.options)
        return options if self.temperature is None else {**options, "temperature": at(self.temperature, epoch)}

    @cached_property
    def step_keywords(self) -> frozenset[str]:
        """Keywords of the loss that depend on the batch: "labels", "mask" and "epoch"."""
        return frozenset(step_arguments(self.loss))

    @property
    def on_logits(self) -> bool:
        """Whether the term compares outputs (logits or predicted numbers), to which the labels belong."""
        return self.loss.takes in OUTPUT_KINDS

    @property
    def on_tokens(self) -> bool:
        """Whether the term compares hidden states or attention of a sequence, whose padding is masked."""
        return self.loss.takes in TOKEN_KINDS

    @cached_property
    def of_cross_attention(self) -> bool:
        """Whether the term compares the attention of a decoder to its encoder."""
        return self.loss.takes == "attention" and bool(CROSS_ATTENTION.search(texts(self.student_layer)[0]))

    @cached_property
    def stack(self) -> str:
        """The stack of the student's layer: "encoder", "decoder" or "cross"; empty for a model with one stack."""
        match = STACK.search(texts(self.student_layer)[0])
        return match[0] if match else ""

    @cached_property
    def mean_over(self) -> str:
        """Items over which the mean of the loss goes; the batches of a step are weighted by their number.

        "labels" (samples, or positions with a label), "samples", or positions or pairs of positions of a stack.
        """
        if self.on_logits:
            return "labels"
        if not self.on_tokens or self.loss.over == "samples":
            return "samples"
        across = " across" if self.of_cross_attention else ""
        return f"{self.loss.over} of {self.stack or 'tokens'}{across}"
