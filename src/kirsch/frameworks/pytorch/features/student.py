"""A student and its adapters in one module, so that one forward pass computes all inputs of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kirsch.errors import NumericError
from kirsch.frameworks.layers import at_layers
from kirsch.frameworks.pytorch.features.adapters import Adapter
from kirsch.frameworks.pytorch.features.capture import FeatureCapture
from kirsch.frameworks.pytorch.features.gradients import gradients_of, norm_of
from kirsch.frameworks.students import StudentOutputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class StudentWithAdapters(nn.Module):
    """A student, the layers that are captured, and the adapters between student and teacher.

    Implements the protocol `kirsch.frameworks.students.StudentWithAdapters`.

    Args:
        student: the model to train.
        layers: names of the layers to capture, without wildcards.
        adapters: adapters by name.
        pairs: adapter name → the student's layer that is the input of the adapter: a layer name, or a list or dict of
            layer names.
        logits: function from the values by layer to the same values, with probabilities converted to logits. None if no
            value holds probabilities.
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
        self._layers, self._pairs = tuple(layers), dict(pairs or {})
        self._logits = logits
        self._capture: FeatureCapture | None = None

    def forward(
        self, inputs: Any, teacher_features: Mapping[str, Any] | None = None, ids: Any = None
    ) -> StudentOutputs:
        """Run the student and the adapters.

        Args:
            inputs: one batch.
            teacher_features: the teacher's values by name of the adapter.
            ids: ids of the samples, for adapters that store values by sample.
        """
        if self._capture is None:  # not in __init__: copies of the module would share the hooks
            self._capture = FeatureCapture(self.student, self._layers)
        values = self._capture(inputs)
        values = values if self._logits is None else self._logits(values)
        adapted, adapter_losses = {}, {}
        for name, teacher in (teacher_features or {}).items():
            adapter = self.adapters[name]
            adapted[name] = adapter(at_layers(values, self._pairs[name]), teacher, ids=ids)
            extra_loss = adapter.extra_loss() if isinstance(adapter, Adapter) else None
            if extra_loss is not None:
                adapter_losses[name] = extra_loss
        return StudentOutputs(values, adapted, adapter_losses)

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return the arrays of all adapters by name."""
        return dict(self.adapters.state_dict())

    def load_adapter_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load arrays of `adapter_state`; names and shapes must agree."""
        self.adapters.load_state_dict(state)

    def close(self) -> None:
        """Remove the hooks."""
        if self._capture is not None:
            self._capture.close()
            self._capture = None


def with_adapters(
    model: nn.Module,
    layers: Sequence[str],
    adapters: Mapping[str, nn.Module],
    pairs: Mapping[str, Any],
    logits: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> StudentWithAdapters:
    """Return a student and its adapters as one module; see `StudentWithAdapters`."""
    return StudentWithAdapters(model, layers, adapters, pairs, logits)


def student_of(model: nn.Module) -> nn.Module:
    """Return the student of a plain or wrapped (DDP, compiled) `StudentWithAdapters`, and other models unchanged."""
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
    """Return the norm of the gradient of each loss term for the student's parameters, without parameters of adapters.

    The graph is retained for the training step. The result is empty if gradients are disabled.

    Args:
        student: the student with its adapters.
        parts: loss terms by name.
        summed: function that sums the gradients of all processes; None for a single process.

    Raises:
        NumericError: no gradient of a term reaches the student.
        UsageError: the student uses reentrant activation checkpoints, which do not support the gradient of one term.
    """
    if not torch.is_grad_enabled():
        return {}
    adapter_ids = {id(p) for p in student.adapters.parameters()}  # they may also be registered in the student
    parameters = [p for p in student.student.parameters() if p.requires_grad and id(p) not in adapter_ids]
    norms: dict[str, float] = {}
    for name, part in parts.items():
        gradients: Sequence[torch.Tensor | None] = [None] * len(parameters)
        if part.requires_grad and parameters:
            gradients = gradients_of(student.student, part, parameters)
        if summed is not None:
            gradients = [
                summed(p.new_zeros(p.shape) if g is None else g) for p, g in zip(parameters, gradients, strict=True)
            ]
        norm = norm_of([g for g in gradients if g is not None])
        if all(g is None for g in gradients) or (norm == 0.0 and abs(float(part.detach())) > 1e-9):  # noqa: PLR2004 - zero up to rounding
            raise NumericError(
                f"No gradient of the loss term {name!r} reaches the model.",
                f"Its value on the first batch of the epoch is {float(part.detach()):.3g}.",
                "Compute the term from the outputs of the trained model. Activation checkpoints in this model need "
                "use_reentrant=False.",
            )
        norms[name] = norm
    return norms
