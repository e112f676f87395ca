"""Training states on disk. A checkpoint is written completely or not at all, and checked by its hashes when read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import safetensors
import safetensors.numpy

from kirsch import files, strict_json
from kirsch.errors import CheckpointError
from kirsch.frameworks.training import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ARRAYS, VALUES, INPUTS, PREFIX = "arrays.safetensors", "values.json", "inputs", "step-"
KEEP = 2
"""Number of checkpoints of a step that are kept. The older one is used if the newest is damaged."""


def save(folder: Path, state: TrainingState, inputs: str) -> Path:
    """Write a checkpoint to the folder of a step, and remove all checkpoints but the newest two.

    Args:
        folder: folder of the step.
        state: training state.
        inputs: hash over everything that determines the result of the step; see `newest`.
    """
    name = f"{PREFIX}{state.values['epoch']:05d}-{state.values['batch']:06d}"
    with files.new_folder(folder / name) as new:
        (new / ARRAYS).write_bytes(safetensors.numpy.save(state.arrays))
        files.write_json(new / VALUES, state.values | {INPUTS: inputs})
    for old in _all(folder)[:-KEEP]:
        files.remove(old)
    return folder / name


def newest(folder: Path, inputs: str, note: Callable[[str], None]) -> TrainingState | None:
    """Return the newest valid checkpoint of a step; None if the step has no checkpoint with these inputs.

    Args:
        folder: folder of the step.
        inputs: hash over everything that determines the result of the step. Checkpoints with another hash are
            removed: to continue from them would mix two recipes.
        note: function that is called with a sentence for each checkpoint that is skipped.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    damaged = False
    for path in reversed(_all(folder)):
        flaw = files.first_flaw(path)
        if flaw:
            note(f"The checkpoint {path.name} is damaged: {flaw}. It is skipped.")
            damaged = True
            continue
        try:
            arrays = safetensors.numpy.load((path / ARRAYS).read_bytes())
            values = strict_json.read(path / VALUES)
            if not isinstance(values, dict):
                raise ValueError(f"{VALUES} is not a JSON object")  # noqa: TRY004, TRY301 - reported like bad JSON
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            note(f"The checkpoint {path.name} cannot be read: {error}. It is skipped.")
            damaged = True
            continue
        if values.pop(INPUTS, "") == inputs:
            return TrainingState(arrays, values)
        note(f"The checkpoint {path.name} is removed: the inputs of its step have changed.")
        files.remove(path)
    if damaged:
        raise CheckpointError(
            f"All checkpoints in {folder} are damaged.",
            "The step cannot continue from any of them.",
            "Remove the folder to start this step again.",
        )
    return None


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints of a step, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())
