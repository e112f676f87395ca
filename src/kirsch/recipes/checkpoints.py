"""Training states on disk: whole or absent, hashed, and never a damaged one in silence."""

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
"""How many checkpoints of a stage are kept, so that a damaged one leaves another to go on from."""


def save(folder: Path, state: TrainingState, inputs: str) -> Path:
    """Add a checkpoint to a stage's folder; the oldest beyond two go.

    Args:
        folder: of the stage.
        state: what to keep.
        inputs: a hash over what the stage follows from; see `newest`.
    """
    name = f"{PREFIX}{state.values['epoch']:05d}-{state.values['batch']:06d}"
    with files.new_folder(folder / name) as new:
        (new / ARRAYS).write_bytes(safetensors.numpy.save(state.arrays))
        files.write_json(new / VALUES, state.values | {INPUTS: inputs})
    for old in _all(folder)[:-KEEP]:
        files.remove(old)
    return folder / name


def newest(folder: Path, inputs: str, tell: Callable[[str], None]) -> TrainingState | None:
    """The newest valid checkpoint of a stage; None if there is none at all.

    Args:
        folder: of the stage.
        inputs: a hash over what the stage follows from: checkpoints with another one are removed, since a training
            that went on from them would be that of neither recipe.
        tell: is given a sentence for each checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged = False
    for path in reversed(_all(folder)):
        wrong = files.first_flaw(path)
        if wrong:
            tell(f"The checkpoint {path.name} is damaged: {wrong}. The one before it is used.")
            damaged = True
            continue
        try:
            arrays = safetensors.numpy.load((path / ARRAYS).read_bytes())
            values = strict_json.read(path / VALUES)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            tell(f"The checkpoint {path.name} cannot be read: {error}. The one before it is used.")
            damaged = True
            continue
        if not isinstance(values, dict):
            tell(
                f"The checkpoint {path.name} cannot be read: {VALUES} is not a JSON object. The one before it is used."
            )
            damaged = True
            continue
        if values.pop(INPUTS, "") == inputs:
            return TrainingState(arrays, values)
        tell(f"The checkpoint {path.name} is removed: the inputs of its stage have changed.")
        files.remove(path)
    if damaged:
        raise CheckpointError(
            f"All checkpoints in {folder} are damaged.",
            "None of them can be gone on from.",
            "Remove the folder to start this stage anew.",
        )
    return None


def _all(folder: Path) -> list[Path]:
    """The checkpoints of a stage, the oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())
