"""The subcommand sensitivity."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.cli.networks import output_file
from kirsch.data.sources import load_data
from kirsch.files import write_text
from kirsch.frameworks.trace import trace
from kirsch.pruning.sensitivity import sensitivity as measured
from kirsch.tables import Table
from kirsch.tasks.metrics import class_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.cli.networks import LoadedModel
    from kirsch.cli.terminal import Terminal

RESULT_FILE = re.compile(rb'\s*\{\s*"kirsch_sensitivity"')


def show_sensitivity(
    load: Callable[[], LoadedModel], options: dict[str, Any], data: str, seed: int, output: str, terminal: Terminal
) -> int:
    """Show the sensitivity of each group and residual block, and write it to a file if one is named.

    Args:
        load: returns the model.
        options: options of `kirsch.sensitivity`.
        data: name or reference of a data source, whose validation part is used.
        seed: seed of the data and of random importances.
        output: file for the result; empty for none.
        terminal: shows the result.
    """
    target = output_file(output, RESULT_FILE, "a result of kirsch sensitivity") if output else None
    loaded = load()
    source = load_data(data, {}, seed=seed, base=Path())
    options = options | {"class_weights": class_numbers(options.get("class_weights"), source.classes)}
    found = measured(trace(loaded.model, loaded.inputs), source.validation, **options, seed=seed)
    parts = [*found.parts(), *loaded.weights_parts()]
    if target is not None:
        write_text(target, found.to_json())
        parts.append(Table([["result", output]]))
    terminal.result(parts, {**found.to_dict(), "file": output or None, "weights": loaded.weights})
    return 0
