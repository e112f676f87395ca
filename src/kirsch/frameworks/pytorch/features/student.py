"""A student with what is trained beside it: one module, so that one forward computes all that a step needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kirsch.errors import NumericError, UsageError
from kirsch.frameworks.layers import at_layers
from kirsch.frameworks.pytorch.features.adapters import Adapter
from kirsch.frameworks.pytorch.features.capture import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class StudentOutputs:
    """What one forward gives.

    Args:
        values: by layer of the student.
        joined: by name of a adapter, the student's and the teacher's side as its loss takes them.
        extra: by name of a adapter, what trains the adapter itself.
    """

    values: dict[str, Any]
    joined: dict[str, tuple[Any, Any]]
    extra: dict[str, Any]


class StudentWithAdapters(nn.Module):
    """A student, the layers at which it is watched, and the adapters between it and its teacher.

    Args:
        student: the model that learns.
        layers: concrete ones.
        adapters: adapters by name.
        pairs: by the same names, where the student's side comes from: a layer, or a list or dict of them.
        logits: makes logits of probabilities among the values by layer; None leaves all as they are.
    """

    def __init__(
        self,
        student: nn.Module,
        layers: Sequence[str] = ("logits",),
        adapters: Mapping[str, nn.Module] | None = None,
        pairs: Mapping[str, Any] | None = None,
        logits: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.adapters = nn.ModuleDict(adapters or {})
        self._sites, self._pairs = tuple(layers), dict(pairs or {})
        self._logits = logits
        self._watch: Watch | None = None

    def forward(self, inputs: Any, teacher_source: Mapping[str, Any] | None = None, ids: Any = None) -> StudentOutputs:
        """One run of the student.

        Args:
            inputs: one batch.
            teacher_source: the teacher's side of each adapter.
            ids: numbers of the samples, for adapters that remember them.
        """
        if self._watch is None:  # not in __init__: hooks would be copied along, and write into the original
            self._watch = Watch(self.student, self._sites)
        values = self._watch(inputs)
        values = values if self._logits is None else self._logits(values)
        joined, extra = {}, {}
        for name, theirs in (teacher_source or {}).items():
            adapter = self.adapters[name]
            joined[name] = adapter(at_layers(values, self._pairs[name]), theirs, ids=ids)
            beside = adapter.extra_loss() if isinstance(adapter, Adapter) else None
            if beside is not None:
                extra[name] = beside
        return StudentOutputs(values, joined, extra)

    def close(self) -> None:
        """Take the hooks away."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def student_of(model: nn.Module) -> nn.Module:
    """The student within a student, also where distribution or compilation wraps it; any other model itself."""
    while not isinstance(model, StudentWithAdapters):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner
    return model.student


def gradient_norms(
    student: StudentWithAdapters,
    parts: Mapping[str, torch.Tensor],
    summed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """How long the gradient of each part of a loss is for the student, without adapters; the graph stays for the step.

    Args:
        student: with the student.
        parts: by name.
        summed: what the processes of a run make of the gradients that each has of its share.

    Raises:
        NumericError: a part gives the student no gradient.
        UsageError: the student is checkpointed in a way that gives the gradient of the whole loss alone.
    """
    beside = {id(p) for p in student.adapters.parameters()}  # a student may hold them too, so that others find them
    parameters = [p for p in student.student.parameters() if p.requires_grad and id(p) not in beside]
    norms: dict[str, float] = {}
    for name, part in parts.items():
        found: Sequence[torch.Tensor | None] = (
            _gradients(student, part, parameters) if part.requires_grad and parameters else [None] * len(parameters)
        )
        if summed is not None:
            found = [summed(p.new_zeros(p.shape) if g is None else g) for p, g in zip(parameters, found, strict=True)]
        norm = math.sqrt(sum(float((g.detach().float() ** 2).sum()) for g in found if g is not None))
        if all(g is None for g in found) or (norm == 0.0 and abs(float(part.detach())) > 1e-9):  # noqa: PLR2004 - zero up to rounding
            raise NumericError(
                f"The loss term {name!r} gives the model no gradient.",
                f"Its value on the first batch of the epoch is {float(part.detach()):.3g}.",
                "It must be computed from the outputs of the model that is trained; what is checkpointed in it needs "
                "use_reentrant=False.",
            )
        norms[name] = norm
    return norms


def _gradients(
    student: StudentWithAdapters, part: torch.Tensor, parameters: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    try:
        return torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UsageError(
            f"{type(student.student).__name__} is checkpointed with use_reentrant=True.",
            "That way gives the gradient of the whole loss alone, and none of one term.",
            "Set use_reentrant=False, in models of transformers by "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).',
        ) from error
