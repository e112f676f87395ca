"""Whether an exported file computes what its model computes, on inputs of several kinds and batch sizes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import ModelError, NumericError
from kirsch.failures import error_with_location

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.deploy.onnxruntime import OnnxSession
    from kirsch.frameworks.protocols import Exportable

DRIFT = 1e-4
"""Largest difference between model and file, as a share of the largest output; 1e-6 is usual in float32."""

ROUNDING, RUNS = 4, 3
"""A file may differ by this many times what rounding alone moves the outputs, at most, of this many runs."""

TELLING = 0.25
"""Where rounding moves outputs by so much of the largest, a comparison says nothing."""

SIZES = (1, 3)
"""Batch sizes that are tried where the batch is free."""

SCALES = {"normal": 1.0, "zero": 0.0, "large": 100.0}
"""Kinds of random values for floating inputs, with their standard deviation."""

ORDINARY = ("example", "normal")
"""Kinds of inputs of which one at least must tell; zeros may agree where nothing else does."""

Arrays = tuple["NDArray[Any]", ...]


@dataclass(frozen=True)
class Trial:
    """One batch of inputs.

    Args:
        values: "example", "normal", "zero" or "large".
        inputs: one array for each input.
        expected: what the model returns, by name.
    """

    values: str
    inputs: Arrays
    expected: dict[str, NDArray[Any]]

    @property
    def text(self) -> str:
        """In words, for errors."""
        size = len(self.inputs[0])
        kind = "the example inputs" if self.values == "example" else f"{self.values} values"
        return f"{kind} in a batch of {size}"


def trials(model: Exportable) -> tuple[list[Trial], str]:
    """Return what a file is compared on, and why its batch cannot be free, "" if it can.

    The example inputs come first, as they are. Then they are cut or repeated to the batch sizes of `SIZES`; where the
    model refuses one, all trials have the batch size of the example. Random values follow, where there are floating
    inputs and the model takes such values: normal ones, zeros, and large ones.

    Raises:
        ModelError: the model does not run with the example inputs.
        NumericError: it gives NaN or no finite number for them, or other outputs at each run.
    """
    example = tuple(model.inputs.values())
    found = [Trial("example", example, _run(model, example))]
    if not found[0].expected:
        raise ModelError(f"A {model.name} returns no tensor.", fix="Let its forward return what the file shall give.")
    _check_finite(model, found[0])
    _check_steady(model, example)
    count, fixed = len(example[0]), ""
    lengths = {len(array) for array in example}
    if len(lengths) > 1:
        fixed = f"The first axes of its inputs differ: {', '.join(str(len(array)) for array in example)}."
    others = [] if fixed else [size for size in SIZES if size != count]
    for size in others:
        inputs = tuple(np.resize(array, (size, *array.shape[1:])) for array in example)
        try:
            found.append(Trial("example", inputs, _run(model, inputs)))
        except ModelError as error:
            fixed = f"The model does not run with a batch of {size}: {error.why}"
            break
    if fixed:
        return fixed_trials(model, found[0]), fixed
    return found + _random_trials(model, SIZES[-1]), ""


def fixed_trials(model: Exportable, example: Trial) -> list[Trial]:
    """Return trials of the batch size of the example alone."""
    return [example, *_random_trials(model, None)]


def _random_trials(model: Exportable, size: int | None) -> list[Trial]:
    """Trials with random values for floating inputs, of this batch size, by default that of each input."""
    random, found = np.random.default_rng(0), []
    example = tuple(model.inputs.values())
    for values, scale in SCALES.items() if any(np.issubdtype(a.dtype, np.floating) for a in example) else ():
        inputs = []
        for array in example:
            shape = (size or len(array), *array.shape[1:])
            drawn = (scale * random.standard_normal(shape)).astype(array.dtype)
            inputs.append(drawn if np.issubdtype(array.dtype, np.floating) else np.resize(array, shape))
        try:
            found.append(Trial(values, tuple(inputs), _run(model, tuple(inputs))))
        except ModelError:  # such as positions given as floating numbers
            continue
    return found


def _run(model: Exportable, inputs: Arrays) -> dict[str, NDArray[Any]]:
    try:
        return model.outputs(inputs)
    except ModelError:
        raise
    except Exception as error:  # a foreign model is run, which may raise anything
        shapes = ", ".join(str(array.shape) for array in inputs)
        raise ModelError(
            f"A {model.name} does not run with inputs of shape {shapes}.",
            error_with_location(error),
            "Give example inputs that the model takes.",
        ) from error


def _check_finite(model: Exportable, trial: Trial) -> None:
    """Refuse NaN in any output for the example inputs, and an output without a finite number.

    Infinite numbers beside finite ones are taken: the logits of a token that must not come are -inf.
    """
    for name, array in trial.expected.items():
        if _broken(array):
            cause = next((key for key, value in model.inputs.items() if not _finite(value)), "")
            broken = model.not_finite()
            raise NumericError(
                f"A {model.name} gives {'NaN' if np.isnan(array).any() else 'no finite number'} for the example inputs,"
                f" in its output {name!r}.",
                f"The input {cause!r} is not finite." if cause else f"Its {broken} is not finite." if broken else "",
                "Repair the model, or give example inputs as they occur.",
            )


def infinite(trial: Trial) -> list[str]:
    """Return a sentence for each output that holds infinite numbers beside finite ones."""
    counts = {
        name: (int(np.isinf(array).sum()), array.size)
        for name, array in trial.expected.items()
        if np.issubdtype(array.dtype, np.inexact)
    }
    return [
        f"The output {name!r} holds infinite numbers for {trial.text}: {count} of {size}. The file returns the same."
        for name, (count, size) in counts.items()
        if count
    ]


def _check_steady(model: Exportable, inputs: Arrays) -> None:
    why, fix = model.nondeterminism(inputs)
    if why:
        raise NumericError(f"A {model.name} gives other outputs at each run, so no file can equal it.", why, fix)


def _broken(array: NDArray[Any]) -> bool:
    """Whether an output holds NaN, or not one finite number."""
    floating = np.issubdtype(array.dtype, np.inexact) and array.size > 0
    return floating and bool(np.isnan(array).any() or not np.isfinite(array).any())


def _finite(array: NDArray[Any]) -> bool:
    return not np.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(array).all())


def compare(model: Exportable, session: OnnxSession, made: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return how far a file lies from its model in each trial, as JSON.

    "drift" is the largest difference as a share of the largest output, or for whole numbers and truth values the share
    that differs; "allowed" is its limit. Outputs that rounding alone moves by more than `TELLING` say nothing in a
    trial and are named under "unstable"; where these are all, "drift" is None. So are those that differ
    where the model itself gives NaN or no finite number for zeros or large values, as in a division by a norm of 0.

    Raises:
        NumericError: the file computes something else in a trial, or an output says nothing for ordinary inputs.
    """
    records, seen = [], set[str]()
    for trial in made:
        drifts, allowed = _drifts(model, session, trial)
        telling = [name for name in drifts if allowed[name] <= TELLING]
        seen.update(telling if trial.values in ORDINARY else ())
        worst = max(telling, key=lambda name: drifts[name] / allowed[name], default="")
        if worst and not drifts[worst] <= allowed[worst]:
            _check_steady(model, trial.inputs)  # a choice among few may have been the same at first
            apart = f"differ by {drifts[worst]:.1e} of the largest, {allowed[worst]:.0e} is allowed,"
            if np.isinf(drifts[worst]):
                apart = "differ in their shape, or in which numbers are finite,"
            raise NumericError(
                "The exported file does not compute what the model computes.",
                f"The outputs {apart} in {worst!r} for {trial.text}.",
                "Report the model: its export is wrong.",
            )
        records.append(
            {
                "inputs": trial.values,
                "batch": len(trial.inputs[0]),
                "drift": drifts[worst] if worst else None,
                "allowed": allowed[worst] if worst else None,
                "unstable": [name for name in drifts if name not in telling],
            }
        )
    hidden = [name for name in made[0].expected if name not in seen]
    if hidden:
        raise NumericError(
            f"Whether the exported file computes the output {hidden[0]!r} of a {model.name} cannot be seen.",
            f"Rounding alone moves it by more than {TELLING / ROUNDING:.0%} of its largest value for ordinary inputs.",
            "Export trained weights with example inputs as they occur, in float32.",
        )
    return records


def _drifts(model: Exportable, session: OnnxSession, trial: Trial) -> tuple[dict[str, float], dict[str, float]]:
    """How far each output differs, and what is allowed."""
    outputs = session.run(*trial.inputs)
    if len(outputs) != len(trial.expected):
        raise NumericError(f"The exported file has {len(outputs)} outputs, the model has {len(trial.expected)}.")
    drifts = {
        name: distance(expected, found) for (name, expected), found in zip(trial.expected.items(), outputs, strict=True)
    }
    allowed = dict.fromkeys(drifts, DRIFT)
    if trial.values not in ORDINARY:  # the model fails there itself
        allowed |= {name: drift for name, drift in drifts.items() if np.isinf(drift) and _broken(trial.expected[name])}
    if max(drifts.values(), default=0.0) > DRIFT:
        with contextlib.suppress(Exception):  # some operations, such as torch.cond, cannot be run so: no allowance
            for seed in range(RUNS):
                for name, value in model.rounded(trial.inputs, seed).items():
                    allowed[name] = max(allowed[name], ROUNDING * distance(trial.expected[name], value))
    return drifts, allowed


def distance(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return the largest difference as a share of the largest value; of whole numbers, the share that differs.

    What is not finite must be the same in both.
    """
    if expected.shape != found.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    if not np.issubdtype(expected.dtype, np.inexact):
        return float(np.mean(expected != found))
    a, b = (value.astype(np.result_type(value, np.float64)) for value in (expected, found))
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    difference, size = np.abs(a[finite] - b[finite]), np.abs(a[finite])
    return float(difference.max() / max(size.max(), 1e-12)) if finite.any() else 0.0
