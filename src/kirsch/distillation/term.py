"""One distillation loss of an objective, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kirsch.arguments import checked
from kirsch.distillation.losses.loss import get_loss, loss_options
from kirsch.distillation.schedule import Number, problem
from kirsch.errors import UnknownNameError
from kirsch.frameworks.layers import LayerName, LayerNames, texts


@checked
@dataclass(frozen=True)
class Term:
    """One distillation loss: what it compares, and how much it counts.

    Args:
        loss: its name among `LOSSES`.
        weight: >= 0, or a `Ramp`.
        temperature: > 0, or a `Ramp`; None is the loss's own.
        student: where in the student, as `kirsch.frameworks.layers` says: "logits", "layer3", "hidden[2]", "auto".
        teacher: where in the teacher; None where it is the same.
        adapter: what joins two sides whose shapes differ, by its name; "auto" takes one only where it is needed, "none"
            never.
        options: keywords of the loss.
        adapter_options: keywords of the adapter.
        name: what the term is called in records; its loss by default.
        of: of several teachers the one that it is compared with; None takes all for scores, and the first otherwise.
    """

    made_by: ClassVar[str] = 'kirsch.Term("kd", weight=0.9)'

    loss: str = "kd"
    weight: Number = 0.9
    temperature: Number | None = None
    student: LayerNames = "logits"
    teacher: LayerNames | None = None
    adapter: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    adapter_options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    of: int | None = None

    @property
    def called(self) -> str:
        """Its name in records."""
        return self.name or self.loss

    @property
    def there(self) -> Any:
        """Where in the teacher."""
        return self.student if self.teacher is None else self.teacher

    def resolved(self) -> tuple[dict[str, Any], Number | None]:
        """Return the keywords of the loss but for its temperature, and its temperature or None if it has none."""
        known, options = loss_options(get_loss(self.loss)), dict(self.options)
        if "given" in known and self._weights:
            options.setdefault("given", "weights")
        return options, known.get("temperature") if self.temperature is None else self.temperature

    @property
    def _weights(self) -> bool:
        """Whether it compares what models put out as attention, which are weights behind a softmax."""
        layers = [LayerName.read(text) for text in texts([self.student, self.there])]
        return any(layer.layered and layer.layered[2] == "attention" for layer in layers)

    def problems(self) -> list[str]:
        """What is wrong with its numbers and options, one sentence each; an unknown loss is an error."""
        known = loss_options(get_loss(self.loss))
        for text in texts([self.student, self.there]):
            LayerName.read(text)
        wrong = [problem(f"the weight of {self.called!r}", self.weight, least=0)]
        if self.temperature is not None:
            wrong.insert(0, problem(f"the temperature of {self.called!r}", self.temperature, above=0))
        if self.temperature is not None and "temperature" not in known:
            wrong.append(f"{self.loss!r} has no temperature")
        for name in self.options:
            if name == "temperature":
                wrong.append(f"the temperature of {self.called!r} is stated among its options; give it as temperature=")
            elif name not in known:
                raise UnknownNameError(f"option of the loss {self.loss!r}", name, known)
        if self._weights and self.options.get("given") == "scores":
            wrong.append(f"{self.called!r} takes scores, and {self.student!r} has weights, behind the softmax")
        return [sentence for sentence in wrong if sentence]
