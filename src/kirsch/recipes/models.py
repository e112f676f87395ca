"""Models by reference: `package.module:callable`, `file.py:callable`, `timm:NAME`, and built-in `digits:teacher`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.annotations import value_phrase
from kirsch.errors import KirschError, ModelError, UsageError
from kirsch.failures import error_with_location
from kirsch.frameworks.find import framework_of, pytorch
from kirsch.frameworks.formats import describe
from kirsch.graph.inputs import InputSpec
from kirsch.references import FAILURES, preserved_process_state, resolve

if TYPE_CHECKING:
    from collections.abc import Callable


def build(reference: str, *, base: Path | None = None, seed: int = 0, weights: str = "random") -> Any:
    """Build the model of a reference.

    Args:
        reference: "package.module:callable", "file.py:callable", "timm:NAME", or a built-in model such as
            "digits:teacher". The callable takes no arguments and returns the model, with its weights if it has any.
        base: folder that files are relative to; the working folder by default.
        seed: seed of random initial weights.
        weights: for timm models: "random", "pretrained" (downloaded by timm), or a safetensors file.

    Raises:
        UsageError: the reference has another form.
        LoadError: the file, module, callable or timm model does not exist.
        ModelError: the reference names a file without a callable, a model, or a callable that needs arguments; or the
            callable fails, or does not return a model.
    """
    kind, colon, name = reference.rpartition(":")
    _refuse_files(reference, base or Path())
    if not colon or not kind or not name:
        raise UsageError(
            f"{reference!r} is not a reference to a model.",
            "A reference is package.module:callable, file.py:callable or timm:NAME.",
            f"For example, give {_example(reference)}.",
        )
    if kind == "timm":
        from_file = weights not in ("random", "pretrained")
        model = pytorch().training.seeded(
            lambda: pytorch().inference.from_hub("timm", name, pretrained=weights == "pretrained"), seed
        )
        if from_file:
            pytorch().inference.load_weights(model, Path(weights))
        return model
    maker = _maker(reference, base)
    _check_takes_no_arguments(maker, reference)
    try:
        with preserved_process_state():
            model = pytorch().training.seeded(maker, seed)
    except KirschError:
        raise
    except FAILURES as error:
        raise ModelError(f"{reference} failed.", error_with_location(error), "Fix the callable.") from error
    if not _is_model(model):
        missing = "Add the missing `return`. " if model is None else ""
        raise ModelError(
            f"{reference} returns {value_phrase(model)}; expected a model.",
            fix=f"{missing}The callable must return a torch.nn.Module.",
        )
    return model


def _example(reference: str) -> str:
    """Return a valid reference as an example; if the user gave a Python file, the example names this file."""
    return f"{reference.rstrip(':')}:build" if reference.rstrip(":").endswith(".py") else "timm:resnet18"


def _maker(reference: str, base: Path | None) -> Callable[[], Any]:
    """Return the callable of a reference, or the built-in model of this name."""
    built_in = pytorch().models
    return built_in[reference] if reference in built_in else resolve(reference, base=base)


def _check_takes_no_arguments(builder: Any, reference: str) -> None:
    """Refuse a model, or a callable with arguments, in place of a callable that builds a model."""
    kind, _, name = reference.rpartition(":")
    if _is_model(builder):
        raise ModelError(
            f"{reference} is a model; expected a function that returns a model.",
            fix=f"Add `def build(): return {name}` to the file, and give {kind}:build.",
        )
    try:
        inspect.signature(builder).bind()
    except TypeError as error:
        raise ModelError(
            f"{reference} cannot be called without arguments: {error}.",
            fix=f"Add `def build(): return {name}(...)` to the file, and give {kind}:build.",
        ) from None
    except ValueError:  # a callable written in C without a signature
        return


def _is_model(value: Any) -> bool:
    try:
        framework_of(value)
    except ModelError:
        return False
    return True


def _refuse_files(reference: str, base: Path) -> None:
    """Refuse a file or folder in place of a reference to a model.

    Raises:
        ModelError: the reference is a file or folder, other than a Python file with a callable. The message describes
            the format of the file.
    """
    kind = reference.rpartition(":")[0]
    for text in (reference, kind):
        # The part before the colon may also be a package in the working folder.
        named = text and not text.endswith(".py") and (text == reference or not (base / text).is_dir())
        found = describe(base / text) if named else None
        if found is not None:
            raise ModelError(f"{text!r} is not a model: it is {found.what}.", found.why, found.as_model)


def is_random(reference: str | None) -> bool:
    """Return whether a reference certainly builds an untrained model: a model of timm, or a built-in one."""
    return reference is not None and (reference.startswith("timm:") or reference in pytorch().models)


def random_weights(reference: str, seed: int) -> str:
    """Return a note if a reference builds an untrained model; otherwise an empty string."""
    if not reference.startswith("timm:"):
        return ""
    name = reference.partition(":")[2]
    return (
        f"The weights of {reference} are random (seed {seed}), and the recipe does not train the model. For trained "
        f'weights write a callable that returns timm.create_model("{name}", pretrained=True), and refer to it: '
        "model: file.py:callable."
    )


def example_shape(reference: str, model: Any, *, base: Path | None = None) -> tuple[int, ...] | None:
    """Return the input shape that a model states: `example_shape` of the model or callable, or timm's default.

    Raises:
        ModelError: `example_shape` is not a shape.
    """
    stated = getattr(model, "example_shape", None)
    if stated is None and not reference.startswith("timm:"):
        stated = getattr(_maker(reference, base), "example_shape", None)
    default = getattr(model, "default_cfg", None)
    if stated is None and isinstance(default, dict) and default.get("input_size"):
        stated = (1, *default["input_size"])
    if stated is None:
        return None
    sizes = list(stated) if isinstance(stated, Iterable) and not isinstance(stated, str) else []
    if not sizes or not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
        raise ModelError(
            f"The example_shape of {reference} is {stated!r}.",
            "Expected the shape of one batch of inputs: positive integers, the first of which is the batch size.",
            "Write, for example, example_shape = (1, 3, 224, 224).",
        )
    return tuple(int(size) for size in sizes)


def stated_inputs(reference: str, model: Any, *, base: Path | None = None) -> Any:
    """Return example inputs in the form that a model states; None if the model states no form.

    If the model has an `example_shape`, the inputs are random numbers of this shape. Otherwise they are the model's
    `dummy_inputs` (a dict, an array or a tuple of arrays), or, for a vision model of transformers, images of the size
    in its configuration.
    """
    framework = framework_of(model)
    sizes = example_shape(reference, model, base=base)
    if sizes is not None:
        return framework.analysis.inputs_like([InputSpec("", sizes, "float32")], model)
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        side = getattr(config, "image_size", None)
        if not side:
            return None
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        image = (1, getattr(config, "num_channels", 3), height, width)
        return framework.analysis.inputs_like([InputSpec(main, image, "float32")], model)
    dummies = getattr(model, "dummy_inputs", None)
    if isinstance(dummies, Mapping):
        named = main in dummies or not hasattr(model, "main_input_name")  # other names may belong to a submodel
        return {name: _one_sample(value) for name, value in dummies.items()} if named and dummies else None
    arrays = dummies if isinstance(dummies, (tuple, list)) else (dummies,)
    return tuple(map(_one_sample, arrays)) if arrays and all(hasattr(array, "shape") for array in arrays) else None


def _one_sample(value: Any) -> Any:
    return value[:1] if getattr(value, "ndim", 0) else value
