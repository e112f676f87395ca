"""Compare an exported file with its model on inputs of several kinds and batch sizes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures
from kirsch.errors import ModelError, NumericError
from kirsch.failures import error_with_location

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.deploy.onnxruntime import OnnxSession
    from kirsch.frameworks.protocols import Exportable

TOLERANCE = 1e-4
"""Largest allowed difference between model and file, relative to the largest output; 1e-6 is usual in float32."""

ROUNDING_FACTOR, ROUNDING_RUNS = 4, 3
"""The tolerance of an output is at least `ROUNDING_FACTOR` times the largest difference that random rounding errors
cause in `ROUNDING_RUNS` runs of the model."""

LARGEST_TOLERANCE = 0.25
"""Largest tolerance with which an output is compared. Rounding errors may change an output so strongly that its
tolerance is larger; a comparison would then show nothing."""

BATCH_SIZES = (1, 3)
"""Batch sizes of the comparison if the batch is free."""

STANDARD_DEVIATIONS = {"normal": 1.0, "zero": 0.0, "large": 100.0}
"""Standard deviations of random values for floating inputs, by the kind of inputs."""

TYPICAL_KINDS = ("example", "normal")
"""Each output must be compared on inputs of one of these kinds. Zeros alone would not show that the weights differ."""

InputArrays = tuple["NDArray[Any]", ...]


@dataclass(frozen=True)
class Trial:
    """One batch of inputs, and the outputs of the model for them.

    Args:
        values: kind of the inputs: "example", "normal", "zero" or "large".
        inputs: one array per input.
        expected: outputs of the model by name.
    """

    values: str
    inputs: InputArrays
    expected: dict[str, NDArray[Any]]

    @property
    def description(self) -> str:
        """Kind and batch size of the inputs, for errors."""
        kind = "the example inputs" if self.values == "example" else f"{self.values} values"
        return f"{kind} in a batch of {len(self.inputs[0])}"


def trials(model: Exportable) -> tuple[list[Trial], str]:
    """Return the inputs and expected outputs of a comparison, and why the batch cannot be free ("" if it can).

    The first trial has the unchanged example inputs. The next ones have the example inputs, cut or repeated to the
    sizes of `BATCH_SIZES`; if the model does not run with one of these, all trials have the batch size of the example.
    The last ones have normally distributed values, zeros and large values for floating inputs. They are left out if
    the model does not run with them.

    Raises:
        ModelError: the model does not run with the example inputs.
        NumericError: the outputs for the example inputs contain NaN, contain no finite number, or differ between runs.
    """
    example = tuple(model.inputs.values())
    first = Trial("example", example, _run(model, example))
    if not first.expected:
        raise ModelError(f"A {model.name} returns no tensor.", fix="Return at least one tensor from its forward.")
    _check_finite(model, first)
    _check_deterministic(model, example)
    lengths = [len(array) for array in example]
    if len(set(lengths)) > 1:
        return fixed_trials(model, first), f"The first axes of its inputs differ: {', '.join(map(str, lengths))}."
    resized = []
    for size in BATCH_SIZES:
        if size == lengths[0]:
            continue
        inputs = tuple(np.resize(array, (size, *array.shape[1:])) for array in example)
        try:
            resized.append(Trial("example", inputs, _run(model, inputs)))
        except ModelError as error:
            return fixed_trials(model, first), f"The model does not run with a batch of {size}: {error.why}"
    return [first, *resized, *_random_trials(model, BATCH_SIZES[-1])], ""


def fixed_trials(model: Exportable, example: Trial) -> list[Trial]:
    """Return trials with the batch size of the example inputs only."""
    return [example, *_random_trials(model, None)]


def _random_trials(model: Exportable, size: int | None) -> list[Trial]:
    """Return trials with random values for floating inputs; without a size, each input keeps its first axis."""
    random, made = np.random.default_rng(0), list[Trial]()
    example = tuple(model.inputs.values())
    if not any(np.issubdtype(array.dtype, np.floating) for array in example):
        return made
    for kind, deviation in STANDARD_DEVIATIONS.items():
        inputs = []
        for array in example:
            shape = (size or len(array), *array.shape[1:])
            values = (deviation * random.standard_normal(shape)).astype(array.dtype)
            inputs.append(values if np.issubdtype(array.dtype, np.floating) else np.resize(array, shape))
        with contextlib.suppress(ModelError):  # the model may reject values, such as floating numbers used as indices
            made.append(Trial(kind, tuple(inputs), _run(model, tuple(inputs))))
    return made


def _run(model: Exportable, inputs: InputArrays) -> dict[str, NDArray[Any]]:
    try:
        return model.outputs(inputs)
    except ModelError:
        raise
    except Exception as error:  # code of the user's model may raise any error
        shapes = ", ".join(str(array.shape) for array in inputs)
        raise ModelError(
            f"A {model.name} does not run with inputs of shape {shapes}.",
            error_with_location(error),
            "Give example inputs that the model accepts.",
        ) from error


def _check_finite(model: Exportable, trial: Trial) -> None:
    """Refuse outputs that contain NaN or no finite number.

    Infinite values beside finite ones are accepted, because some models set the logits of forbidden tokens to -inf.
    """
    for name, array in trial.expected.items():
        if not _is_invalid(array):
            continue
        problem = "NaN" if np.isnan(array).any() else "no finite number"
        infinite_input = next((key for key, value in model.inputs.items() if not _is_finite(value)), "")
        why = f"The input {infinite_input!r} is not finite."
        if not infinite_input:
            tensor = model.not_finite()
            why = f"Its {tensor} is not finite." if tensor else ""
        raise NumericError(
            f"A {model.name} returns {problem} for the example inputs, in its output {name!r}.",
            why,
            "Fix the model, or give example inputs with realistic values.",
        )


def notes_on_infinity(trial: Trial) -> list[str]:
    """Return a sentence for each output that contains infinite values beside finite ones."""
    counts = {
        name: (int(np.isinf(array).sum()), array.size)
        for name, array in trial.expected.items()
        if np.issubdtype(array.dtype, np.inexact)
    }
    return [
        f"{count} of the {size} values of the output {name!r} are infinite for {trial.description}. "
        "The file returns the same values."
        for name, (count, size) in counts.items()
        if count
    ]


def _check_deterministic(model: Exportable, inputs: InputArrays) -> None:
    why, fix = model.nondeterminism(inputs)
    if why:
        message = f"A {model.name} returns different outputs at each run, so a file cannot compute the same outputs."
        raise NumericError(message, why, fix)


def _is_invalid(array: NDArray[Any]) -> bool:
    """Return whether an output contains NaN, or has values and none of them is finite."""
    has_floats = np.issubdtype(array.dtype, np.inexact) and array.size > 0
    return has_floats and bool(np.isnan(array).any() or not np.isfinite(array).any())


def _is_finite(array: NDArray[Any]) -> bool:
    return not np.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(array).all())


def compare(model: Exportable, session: OnnxSession, compared: Sequence[Trial]) -> list[dict[str, Any]]:
    """Compare a file with its model; return one JSON record per trial.

    A record has these keys. "drift" and "allowed" describe the output whose difference is the largest relative to its
    tolerance; they are None if no output is compared.

    - "inputs": kind of the inputs;
    - "batch": batch size;
    - "drift": difference of this output, see `distance`;
    - "allowed": tolerance of this output;
    - "unstable": names of the outputs that are not compared in this trial. Rounding errors change them by more than
      `LARGEST_TOLERANCE`, or the model itself returns NaN or no finite number for zeros or large values, for example
      after a division by a norm of 0.

    Raises:
        NumericError: the outputs of the file differ from those of the model, or an output cannot be compared on any of
            `TYPICAL_KINDS`.
    """
    records, verified = [], set[str]()
    for trial in compared:
        drifts, allowed = _drifts(model, session, trial)
        comparable = [name for name in drifts if allowed[name] <= LARGEST_TOLERANCE]
        verified.update(comparable if trial.values in TYPICAL_KINDS else ())
        worst = max(comparable, key=lambda name: drifts[name] / allowed[name], default="")
        if worst and not drifts[worst] <= allowed[worst]:
            _check_deterministic(model, trial.inputs)  # a random model may pass the first check by chance
            raise _difference(worst, drifts[worst], allowed[worst], trial)
        records.append(
            {
                "inputs": trial.values,
                "batch": len(trial.inputs[0]),
                "drift": drifts[worst] if worst else None,
                "allowed": allowed[worst] if worst else None,
                "unstable": [name for name in drifts if name not in comparable],
            }
        )
    unverified = [name for name in compared[0].expected if name not in verified]
    if unverified:
        share = LARGEST_TOLERANCE / ROUNDING_FACTOR
        raise NumericError(
            f"The output {unverified[0]!r} of a {model.name} cannot be compared with that of the exported file.",
            f"Rounding errors change it by more than {share:.0%} of its largest value for typical inputs.",
            "Export trained weights in float32, with realistic example inputs.",
        )
    return records


def _difference(name: str, drift: float, allowed: float, trial: Trial) -> NumericError:
    why = f"differs by {drift:.1e} of its largest value for {trial.description}; {allowed:.0e} is allowed"
    if np.isinf(drift):
        why = f"has another shape, or NaN or infinity in other places, for {trial.description}"
    return NumericError(
        "The outputs of the exported file are not those of the model.",
        f"The output {name!r} {why}.",
        "Report the model: its export is wrong.",
    )


def _drifts(model: Exportable, session: OnnxSession, trial: Trial) -> tuple[dict[str, float], dict[str, float]]:
    """Return the difference and the tolerance of each output by name."""
    outputs = session.run(*trial.inputs)
    if len(outputs) != len(trial.expected):
        raise NumericError(
            f"The exported file has {figures.counted(len(outputs), 'output')}, the model has {len(trial.expected)}."
        )
    drifts = {
        name: distance(expected, actual)
        for (name, expected), actual in zip(trial.expected.items(), outputs, strict=True)
    }
    allowed = dict.fromkeys(drifts, TOLERANCE)
    if trial.values not in TYPICAL_KINDS:  # an output that is invalid in the model itself is not compared
        allowed |= {
            name: drift for name, drift in drifts.items() if np.isinf(drift) and _is_invalid(trial.expected[name])
        }
    if max(drifts.values(), default=0.0) > TOLERANCE:
        # Some operations, such as torch.cond, cannot run with added rounding errors. Then `TOLERANCE` applies.
        with contextlib.suppress(Exception):
            for seed in range(ROUNDING_RUNS):
                for name, rounded in model.rounded(trial.inputs, seed).items():
                    rounding = distance(trial.expected[name], rounded)
                    allowed[name] = max(allowed[name], ROUNDING_FACTOR * rounding)
    return drifts, allowed


def distance(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Return the largest absolute difference, divided by the largest absolute value of `expected`.

    For integers and booleans, return the fraction of elements that differ. Return infinity if the shapes differ, or if
    NaN and infinities are not the same in both arrays.
    """
    if expected.shape != actual.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    if not np.issubdtype(expected.dtype, np.inexact):
        return float(np.mean(expected != actual))
    a, b = (value.astype(np.result_type(value, np.float64)) for value in (expected, actual))
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    difference, size = np.abs(a[finite] - b[finite]), np.abs(a[finite])
    return float(difference.max() / max(size.max(), 1e-12)) if finite.any() else 0.0
