"""A distillation loss with its weight and layers, as data (`Term`) and bound to two models (`BoundTerm`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar

from kirsch.annotations import Fix
from kirsch.arguments import checked
from kirsch.distillation.losses.loss import OUTPUT_KINDS, TOKEN_KINDS, Loss, get_loss, loss_options, step_arguments
from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.adapters import ADAPTER_OPTIONS, complete_options
from kirsch.frameworks.layers import LayerName, LayerNames, texts
from kirsch.keywords import wrong_types

CROSS_ATTENTION = re.compile(r"cross|encoder_attn|EncDecAttention")
"""Pattern in the paths of the cross-attention modules of the library transformers."""

KD_WEIGHT, KD_TEMPERATURE = 0.9, 4.0
"""Default weight and temperature of the soft-target loss, from the CIFAR-100 benchmark of Tian et al. 2020."""

STACK = re.compile(r"encoder|decoder|cross")
"""The first match in a path is the stack of a layer: `decoder.layers.0.encoder_attn` is in the decoder."""


@checked
@dataclass(frozen=True)
class Ramp:
    """A number that changes linearly from `start` to `end` over some epochs, and then stays at `end`.

    Args:
        start: value before the change, finite.
        end: value after the change, finite.
        epochs: number of epochs of the change, > 0.
        after: number of epochs before the change, >= 0.
    """

    made_by: ClassVar[str] = "kirsch.Ramp(start, end, epochs)"

    start: float
    end: float
    epochs: float
    _: KW_ONLY
    after: float = 0.0

    def at(self, epoch: float) -> float:
        """Return the value after `epoch` epochs."""
        progress = min(max((epoch - self.after) / self.epochs, 0.0), 1.0)
        return self.start + (self.end - self.start) * progress


Number = float | Ramp
"""A constant, or a ramp."""


def value_at(number: Number, epoch: float) -> float:
    """Return the value of a number after `epoch` epochs."""
    return number.at(epoch) if isinstance(number, Ramp) else float(number)


def end_values(number: Number) -> tuple[float, ...]:
    """Return the first and the last value of a ramp, or the constant."""
    return (number.start, number.end) if isinstance(number, Ramp) else (number,)


def problem(name: str, number: Number, *, above: float | None = None, least: float | None = None) -> str | None:
    """Return the problem as text if the number is not finite or out of range, else None."""
    if isinstance(number, Ramp) and not (number.epochs > 0 and number.after >= 0 and math.isfinite(number.epochs)):
        return (
            f"{name} is a Ramp with epochs={number.epochs} and after={number.after}; `epochs` must be above 0, and "
            "`after` must be at least 0"
        )
    for value in end_values(number):
        if not isinstance(value, (int, float)):
            return f"{name} is {value!r}; a number is needed, or a Ramp"
        if above is not None and not (math.isfinite(value) and value > above):
            return f"{name} is {value}; a number above {above:g} is needed"
        if least is not None and not (math.isfinite(value) and value >= least):
            return f"{name} is {value}; a number of at least {least:g} is needed"
    return None


LossName = Annotated[
    str,
    Fix(
        "Give the name of a loss, such as 'kd'. To register a function, write "
        "`from kirsch.distillation.losses import loss`, and the decorator @loss('my-loss') before the function."
    ),
]


@checked
@dataclass(frozen=True)
class Term:
    """One distillation loss with its weight, and the layers that it compares.

    Args:
        loss: name of a distillation loss, such as "kd"; the command `kirsch methods` lists all losses.
        weight: weight of the loss, >= 0, or a `Ramp`.
        temperature: temperature of the loss, > 0, or a `Ramp`; None for the default of the loss.
        student_layer: layer of the student, see `kirsch.frameworks.layers`: "logits", "layer3", "hidden[2]", "auto".
        teacher_layer: layer of the teacher; None for the same name as in the student.
        adapter: name of the adapter that brings both features to one shape; "auto" adds one only where the shapes
            differ, "none" adds none.
        options: keyword arguments of the loss.
        adapter_options: keyword arguments of the adapter.
        name: name of the term in events and in the history; by default the name of the loss.
        teacher: index of the teacher to compare with. None: all teachers combined for losses on outputs, the first
            teacher for other losses.

    Raises:
        UsageError: an argument has the wrong type, or a number is out of range.
    """

    made_by: ClassVar[str] = 'kirsch.Term("kd", weight=0.9)'

    loss: LossName = "kd"
    weight: Number = KD_WEIGHT
    _: KW_ONLY
    temperature: Number | None = None
    student_layer: LayerNames = "logits"
    teacher_layer: LayerNames | None = None
    adapter: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    adapter_options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    teacher: int | None = None

    def __post_init__(self) -> None:
        found = [problem(f"the weight of {self.record_name!r}", self.weight, least=0)]
        if self.temperature is not None:
            found.append(problem(f"the temperature of {self.record_name!r}", self.temperature, above=0))
        problems = [text for text in found if text]
        if problems:
            raise UsageError(f"The term is invalid: {'; '.join(problems)}.", fix="Change these values.")

    @property
    def record_name(self) -> str:
        """Name of the term in events, in the history and in messages."""
        return self.name or self.loss

    @property
    def layers(self) -> tuple[Any, Any]:
        """Layers of the student and of the teacher."""
        return self.student_layer, self.student_layer if self.teacher_layer is None else self.teacher_layer

    def resolved(self) -> tuple[dict[str, Any], Number | None]:
        """Return the keyword arguments of the loss without the temperature, and the temperature, if there is one."""
        known, options = loss_options(get_loss(self.loss)), dict(self.options)
        if "attention" in known and self._attention_weights:
            options.setdefault("attention", "weights")
        return options, known.get("temperature") if self.temperature is None else self.temperature

    @property
    def _attention_weights(self) -> list[str]:
        """Layers of the term whose features are the attention that a model returns: weights, after the softmax."""
        names = [LayerName.read(text) for text in texts([*self.layers])]
        return [name.text for name in names if name.layered and name.layered[2] == "attention"]

    @property
    def may_have_adapter(self) -> bool:
        """Whether the features may pass through an adapter.

        By default, outputs get none, so that different numbers of classes raise an error.
        """
        outputs = (*OUTPUT_KINDS, "sets")
        return self.adapter != "none" and not (self.adapter == "auto" and get_loss(self.loss).takes in outputs)

    def problems(self) -> list[str]:
        """Return one clause for each invalid option, for the error of the objective.

        Raises:
            UnknownNameError: the loss or an option is unknown.
            UsageError: an option of the adapter is unknown, or has a wrong type or value.
        """
        known = loss_options(get_loss(self.loss))
        for text in texts([*self.layers]):
            LayerName.read(text)
        found = []
        if self.temperature is not None and "temperature" not in known:
            found.append(f"{self.loss!r} has no temperature")
        for name in self.options:
            if name == "temperature":
                found.append(
                    f"`options` of {self.record_name!r} contain the temperature; pass it as "
                    "kirsch.Term(..., temperature=...)"
                )
            elif name not in known:
                raise UnknownNameError(f"option of the loss {self.loss!r} named", name, known)
        found += wrong_types(get_loss(self.loss), self.options, f"the loss {self.loss!r}")
        if self.adapter_options and not self.may_have_adapter:
            found.append(
                f"`adapter_options` of {self.record_name!r} has no effect: with adapter={self.adapter!r}, the loss "
                f"{self.loss!r} has no adapter"
            )
        elif self.adapter in ADAPTER_OPTIONS:  # an adapter of one framework only is checked when it is built
            complete_options(self.adapter, self.adapter_options)
        if self._attention_weights and self.options.get("attention") == "scores":
            found.append(
                f"{self.record_name!r} takes attention scores, but {self._attention_weights[0]!r} returns attention "
                "weights, after the softmax"
            )
        return found


@dataclass(frozen=True)
class BoundTerm:
    """One loss, with the concrete layers of student and teacher that it compares.

    A term with several pairs of layers gives one bound term for each pair, unless its loss compares all layers at once.

    Args:
        name: name of the term in events and in the history. A second term of the same name has "#2" appended.
        adapter_name: key of the adapter and of the features that are compared, unique in an objective.
        loss: the loss function.
        weight: weight of the term, at least 0.
        options: keyword arguments of the loss.
        temperature: temperature of the loss; None if the loss has no temperature.
        student_layer, teacher_layer: concrete layers, see `kirsch.frameworks.layers`.
        teacher: index of the teacher; None: all teachers, combined.
        adapter: module that brings both features to one shape; None if they are compared directly.
        shapes: shapes of the student's and the teacher's feature for one sample, as text.
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
        return options if self.temperature is None else {**options, "temperature": value_at(self.temperature, epoch)}

    @cached_property
    def step_keywords(self) -> frozenset[str]:
        """Those of the keywords "labels", "mask" and "epoch" that the loss takes; the training step passes them."""
        return frozenset(step_arguments(self.loss))

    @property
    def on_logits(self) -> bool:
        """Whether the term compares outputs of the models, to which labels belong: logits, or predicted numbers."""
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
        """The first of "encoder", "decoder" and "cross" in the name of the student's layer; empty if there is none."""
        match = STACK.search(texts(self.student_layer)[0])
        return match[0] if match else ""

    @cached_property
    def mean_over(self) -> str:
        """Name of the items over which the loss is averaged, by whose number each batch of a step is weighted.

        - "labels": for losses on outputs, the samples, or the positions with a label
        - "samples": for other losses that are averaged over samples
        - "positions of decoder", "pairs of tokens", ...: for other losses on sequences, `Loss.over` and the stack, or
          "tokens" if the stack is empty, with " across" appended for cross-attention
        """
        if self.on_logits:
            return "labels"
        if not self.on_tokens or self.loss.over == "samples":
            return "samples"
        across = " across" if self.of_cross_attention else ""
        return f"{self.loss.over} of {self.stack or 'tokens'}{across}"
