"""Run models on batches, and return their outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.data.annotations import ONLY_NUMBERS
from kirsch.errors import DataError, KirschError, UsageError, error_text
from kirsch.failures import lacks_memory
from kirsch.frameworks.predictions import logits_output
from kirsch.frameworks.pytorch.inference.calling import (
    UNFIT,
    by_position,
    explained_error,
    fitted_arguments,
    not_running,
    one_sample,
)
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.modules.modes import set_modes
from kirsch.frameworks.pytorch.modules.unsupported import check_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Call:
    """Example inputs that consist of both positional and keyword arguments, such as those of a submodule."""

    args: tuple[Any, ...]
    options: dict[str, Any]


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments; numpy arrays become tensors."""
    if isinstance(example_inputs, Call):
        return example_inputs.args, dict(example_inputs.options)
    if isinstance(example_inputs, Mapping):  # a tokenizer returns a UserDict, which is not a dict
        return (), _tensors_for_numpy(dict(example_inputs))
    return _tensors_for_numpy(
        tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    ), {}


def arguments_of(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as arguments of the `forward` of a model; see `arguments` and `by_position`."""
    return by_position(model, *arguments(example_inputs))


def _tensors_for_numpy(inputs: Any) -> Any:
    return tree_map(lambda value: _from_numpy(value) if isinstance(value, np.ndarray) else value, inputs)


def _from_numpy(array: NDArray[Any]) -> torch.Tensor:
    native = array.dtype.newbyteorder("=")  # PyTorch has no other byte order, which files of other machines may have
    try:
        return torch.from_numpy(np.ascontiguousarray(array, native) if array.ndim else array.astype(native))
    except TypeError:
        what = f"An input is an array of dtype {array.dtype} and shape {array.shape}."
        raise UsageError(what, fix=ONLY_NUMBERS) from None


def copied(inputs: Any) -> Any:
    """Return inputs with cloned tensors, which a model may change in place."""
    return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, inputs)


def call_model(model: nn.Module, args: Any, options: Any, extra: Any = MappingProxyType({})) -> Any:
    """Call a model and return its outputs.

    Args:
        model: the model.
        args, options: positional and keyword arguments.
        extra: keyword arguments that `forward` is known to take.

    Raises:
        UsageError: the inputs have another dtype than the model or unknown names, or a decoder lacks its inputs.
        DataError: the model has batch normalization in training mode, and the batch has one sample.
        ModelError: the model does not run for another reason, such as the shapes of the inputs.
    """
    args, options = fitted_arguments(model, args, options, extra)
    try:
        return model(*args, **options)
    except UNFIT as error:
        if lacks_memory(error):  # the caller may try a smaller batch
            raise
        raise _call_error(model, args, options, extra, error) from error


def _call_error(model: nn.Module, args: Any, options: Any, extra: Any, error: Exception) -> KirschError:
    """Return the error for a model that raises an exception on these arguments."""
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return one_sample(model, error)
    decoder = isinstance(error, ValueError) and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decoder and not any(name.startswith("decoder_input") for name in options):
        return UsageError(
            f"{type(model).__name__} has a decoder, and the batches have no decoder_input_ids.",
            error_text(error),
            "Pass the model to DataCollatorForSeq2Seq, or add "
            "model.prepare_decoder_input_ids_from_labels(labels=labels) to the batches.",
        )
    explanation = explained_error(model, args, options, error) if isinstance(error, (RuntimeError, TypeError)) else None
    if explanation is not None:
        return explanation
    named_inputs = {name: value for name, value in options.items() if name not in extra}
    return not_running(model, named_inputs or (args[0] if len(args) == 1 else args), error)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Set a model to inference mode within the block, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
    except NotImplementedError:  # raised by modules of torch.export, whose mode is fixed
        model.training = False
    try:
        yield
    finally:
        set_modes(modes)


def run(model: nn.Module, args: Any, options: Any) -> list[torch.Tensor]:
    """Return all output tensors of a model in its current mode, without gradient. The inputs are copied."""
    args, options = copied((args, options))
    with torch.no_grad():
        return list(named(model(*args, **options)).values())


def logits_of(outputs: Any) -> Any:
    """Return the logits among the outputs of a model, a tensor; see `logits_output`.

    Raises:
        UsageError: there are no tensors, or the logits cannot be identified by name.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    direct = getattr(outputs, "logits", None)
    if isinstance(direct, torch.Tensor):  # saves the search of all outputs for most models
        return direct
    by_path = named(outputs)
    if not by_path:
        raise UsageError(
            f"The model returns a {type(outputs).__name__} without tensors, so there are no logits.",
            fix="Give a model that returns its logits in inference and in training mode.",
        )
    return by_path[logits_output(list(by_path))]


def logits_of_each(models: Iterable[nn.Module], args: Any, options: Any) -> list[Any]:
    """Return the logits of several models. Each model gets a copy of the inputs, which the model may change."""
    logits = []
    for model in models:
        model_args, model_options = copied((args, options))
        logits.append(logits_of(call_model(model, model_args, model_options)))
    return logits


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of a model."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def tensors(inputs: Any, model: nn.Module) -> Any:
    """Return a batch of numpy arrays or tensors as tensors on the device of a model."""
    device = device_of(model)
    return tree_map(lambda value: array_to_device(device, value), inputs)


def array_to_device(device: torch.device, array: Any) -> Any:
    """Return a numpy array or a tensor as a tensor on a device; anything else unchanged."""
    if isinstance(array, np.ndarray):
        return _from_numpy(array).to(device)
    return array.to(device) if isinstance(array, torch.Tensor) else array


def infer(run: Any, inputs: Any) -> Any:
    """Return the logits of a model, or the features of a `FeatureCapture`, without gradient.

    The model runs in its current mode, and is moved to the device of the inputs.
    """
    first = next(value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor))
    getattr(run, "model", run).to(first.device)
    with torch.no_grad():
        if isinstance(run, nn.Module):
            args, options = arguments(copied(inputs))
            return logits_of(call_model(run, args, options))
        return run(inputs)


def predict(model: nn.Module, inputs: Any, *, batch_size: int = 256) -> NDArray[Any]:
    """Return the logits of a classifier in inference mode.

    Args:
        model: the classifier; its mode is kept.
        inputs: numpy array or tensor of shape (N, ...), or a tuple or dict of these.
        batch_size: number of samples in one forward pass.

    Returns:
        Array of shape (N, K), float32.

    Raises:
        DataError: there are no samples.
        ModelError: a parameter is on the meta device.
    """
    check_values(model)
    count = len(next(leaf for leaf in tree_leaves(inputs) if hasattr(leaf, "shape")))
    if not count:
        raise DataError("The inputs have no samples, so there is nothing to predict.")
    logits = []
    with inference(model):
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            part = tree_map(lambda value, rows=rows: value[rows] if hasattr(value, "shape") else value, inputs)
            logits.append(infer(model, tensors(part, model)).float().cpu().numpy())
    return np.concatenate(logits)
