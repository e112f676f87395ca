"""One distillation loss of an objective, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

from kirsch.arguments import checked
from kirsch.distillation.losses.loss import get_loss, loss_options
from kirsch.distillation.schedule import Number, problem
from kirsch.errors import UnknownNameError
from kirsch.frameworks.layers import LayerName, LayerNames, texts


@checked
@dataclass(frozen=True)
class Term:
    """One distillation loss with its weight, and the layers that it compares.

    Args:
        loss: name of a loss in `LOSSES`.
        weight: >= 0, or a `Ramp`.
        temperature: > 0, or a `Ramp`; None for the default of the loss.
        student_layer: layer of the student, see `kirsch.frameworks.layers`: "logits", "layer3", "hidden[2]", "auto".
        teacher_layer: layer of the teacher; None for the same name as in the student.
        adapter: name of the adapter that brings both features to one shape; "auto" adds one only where the shapes
            differ, "none" adds none.
        options: keyword arguments of the loss.
        adapter_options: keyword arguments of the adapter.
        name: name of the term in records; by default the name of the loss.
        teacher: index of the teacher to compare with. None: all teachers combined for losses on outputs, the first
            teacher for other losses.

    Raises:
        UsageError: an argument has the wrong type.
    """

    made_by: ClassVar[str] = 'kirsch.Term("kd", weight=0.9)'

    loss: str = "kd"
    weight: Number = 0.9
    _: KW_ONLY
    temperature: Number | None = None
    student_layer: LayerNames = "logits"
    teacher_layer: LayerNames | None = None
    adapter: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    adapter_options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    teacher: int | None = None

    @property
    def record_name(self) -> str:
        """Name of the term in records."""
        return self.name or self.loss

    @property
    def layers(self) -> tuple[Any, Any]:
        """Layers of the student and of the teacher."""
        return self.student_layer, self.student_layer if self.teacher_layer is None else self.teacher_layer

    def resolved(self) -> tuple[dict[str, Any], Number | None]:
        """Return the keyword arguments of the loss without the temperature, and the temperature if it has one."""
        known, options = loss_options(get_loss(self.loss)), dict(self.options)
        if "attention" in known and self._on_attention_weights:
            options.setdefault("attention", "weights")
        return options, known.get("temperature") if self.temperature is None else self.temperature

    @property
    def _on_attention_weights(self) -> bool:
        """Whether a side is attention that a model returns, which is after the softmax."""
        names = [LayerName.read(text) for text in texts([*self.layers])]
        return any(name.layered and name.layered[2] == "attention" for name in names)

    def problems(self) -> list[str]:
        """Return one sentence for each invalid number and option.

        Raises:
            UnknownNameError: the loss or an option is unknown.
        """
        known = loss_options(get_loss(self.loss))
        for text in texts([*self.layers]):
            LayerName.read(text)
        found = [problem(f"the weight of {self.record_name!r}", self.weight, least=0)]
        if self.temperature is not None:
            found.insert(0, problem(f"the temperature of {self.record_name!r}", self.temperature, above=0))
        if self.temperature is not None and "temperature" not in known:
            found.append(f"{self.loss!r} has no temperature")
        for name in self.options:
            if name == "temperature":
                found.append(
                    f"`options` of {self.record_name!r} contain the temperature; give temperature= of the term"
                )
            elif name not in known:
                raise UnknownNameError(f"option of the loss {self.loss!r}", name, known)
        if self._on_attention_weights and self.options.get("attention") == "scores":
            found.append(
                f"{self.record_name!r} takes attention scores, but {self.student_layer!r} returns attention weights, "
                "after the softmax"
            )
        return [sentence for sentence in found if sentence]
