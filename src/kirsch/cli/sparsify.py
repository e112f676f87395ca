"""The subcommand sparsify."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.cli.networks import RANDOM_NOTE, output_file
from kirsch.data.sources import load_data
from kirsch.pruning.sparsity.sparsify import fold_masks
from kirsch.pruning.sparsity.sparsify import sparsify as sparsified
from kirsch.pruning.sparsity.step import CALIBRATION
from kirsch.tables import Piece, Table, notes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.cli.networks import LoadedModel
    from kirsch.cli.terminal import Terminal

WEIGHTS_FILE = re.compile(rb".{8}\{", re.DOTALL)  # length of the header, and the header, which is a JSON object


def show_sparsify(
    load: Callable[[], LoadedModel], options: dict[str, Any], data: str, output: str, terminal: Terminal
) -> int:
    """Set weights of a model to zero, and write the weights to a file, which is checked before the model is loaded.

    Args:
        load: returns the model.
        options: options of `kirsch.sparsify`.
        data: name or reference of a data source; empty for none. Samples of its training part are used.
        output: the safetensors file.
        terminal: shows the result.
    """
    target = output_file(output, WEIGHTS_FILE, "a safetensors file")
    loaded = load()
    if data:
        source = load_data(data, {}, seed=options["seed"], base=Path())
        options = options | {"data": source.calibration_batches(CALIBRATION)}
    result = sparsified(loaded.model, **options)
    loaded.framework.inference.save_weights(fold_masks(result.model), target)
    texts = [RANDOM_NOTE] if loaded.random and options.get("importance") != "random" else []
    saved = Table([["weights", [Piece(output), Piece("   read them with --weights", "faint")]]])
    terminal.result(
        [*result.parts(), notes(texts), saved],
        {**result.to_dict(), "notes": [*result.notes, *texts], "file": output, "weights": loaded.weights},
    )
    return 0
