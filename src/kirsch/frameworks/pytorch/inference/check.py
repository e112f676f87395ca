"""Check whether a model runs on its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from kirsch import ops
from kirsch.data.images import AXES, has_channels_last, order_fix
from kirsch.data.structure import summary
from kirsch.errors import KirschError, ModelError, UsageError
from kirsch.frameworks.pytorch.inference.calling import not_running
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.inference.predict import arguments, call_model, copied, inference, logits_of, tensors
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.modes import set_modes


def check_runs(model: nn.Module, inputs: Any, *, training: bool = False) -> None:
    """Raise an error that describes the inputs if a model does not run on them; the model is not changed.

    Args:
        model: any model.
        inputs: one batch.
        training: run a copy of the model in training mode.

    Raises:
        KirschError: the model does not run.
    """
    given = tensors(inputs, model)
    try:
        _run(model, given, training=training)
    except (MemoryError, OSError):  # the cause may be the machine, which the caller reports
        raise
    except (ModelError, UsageError) as error:
        raise _error_of_layout(model, given, error) or error from error.__cause__
    except KirschError:
        raise
    except Exception as error:  # the code of the model can raise any exception
        raise not_running(model, inputs, error) from error


def _run(model: nn.Module, inputs: Any, *, training: bool) -> None:
    args, options = arguments(copied(inputs))
    if not training:
        with inference(model), torch.no_grad():
            call_model(model, args, options)
        return
    with torch.random.fork_rng(), torch.no_grad():
        call_model(copy_of(model).train(), args, options)


def check_training_outputs(model: nn.Module, inputs: Any) -> None:
    """Refuse a model whose logits in training mode are another output than its logits in inference mode.

    Modules of PyTorch stay in inference mode, so that dropout and batch normalization do not change the values: only
    the branches in the code of the model run as in training. Further outputs after the logits are accepted.

    Args:
        model: the model to train, which runs on the inputs in inference mode; it is not changed.
        inputs: one batch.

    Raises:
        UsageError: the first output in training mode has another number of classes or axes, or a later one equals the
            logits.
    """
    args, options = arguments(tensors(inputs, model))
    copy = copy_of(model, {id(parameter): parameter for parameter in model.parameters()})  # parameters need no copy
    with torch.random.fork_rng(), torch.no_grad(), inference(copy):
        expected = logits_of(call_model(copy, *copied((args, options))))
        set_modes([(module, not type(module).__module__.startswith("torch.nn.")) for module in copy.modules()])
        try:
            outputs = call_model(copy, *copied((args, options)))
        except Exception:  # noqa: BLE001 - the first training step raises it, if these few samples are not the cause
            return
    logits = logits_of(outputs)
    if logits is outputs and logits.shape == expected.shape:
        return
    others = [name for name, value in named(outputs).items() if value is not logits and _equal(value, expected)]
    same_classes = logits.ndim == expected.ndim and _classes(logits) == _classes(expected)
    if same_classes and (not others or _equal(logits, expected)):
        return
    found = f" They are its output {others[0]!r} in training mode." if others else ""
    raise UsageError(
        f"{type(model).__name__} returns an output of shape {tuple(logits.shape)} first in training mode, and "
        f"logits of shape {tuple(expected.shape)} in inference mode.{found}",
        "The losses would train the first output, and not the logits.",
        'Return the logits first in training mode, too, or return a dict with the logits as "logits".',
    )


def _equal(output: torch.Tensor, expected: torch.Tensor) -> bool:
    return output.shape == expected.shape and torch.allclose(output.float(), expected.float(), rtol=1e-3)


def _classes(logits: torch.Tensor) -> int:
    return int(ops.classes_last(logits).shape[-1])


def _error_of_layout(model: nn.Module, inputs: Any, error: KirschError) -> KirschError | None:
    """Return the error for images with channels last if the model takes them with channels first; None otherwise."""
    images = [part for part in tree_leaves(inputs) if has_channels_last(getattr(part, "shape", ()))]
    if not images:
        return None
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)

    def channels_first(part: Any) -> Any:
        if not isinstance(part, torch.Tensor) or not has_channels_last(part.shape):
            return part
        return part.permute(AXES).to(dtype if part.dtype == torch.uint8 else part.dtype)

    try:
        _run(model, tree_map(channels_first, inputs), training=False)
    except Exception:  # noqa: BLE001 - the code of the model can raise any exception: the order of the axes is not the cause
        return None
    return type(error)(
        f"{type(model).__name__} takes images with channels first, (N, C, H, W); its inputs are {summary(inputs)}, "
        "with channels last.",
        error.why,
        order_fix(uint8=any(image.dtype == torch.uint8 for image in images)),
    )
