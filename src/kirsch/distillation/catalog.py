"""Lists of presets and losses, read from the code, for `kirsch methods` and `docs/methods.md`."""

from __future__ import annotations

import inspect
import json
import re
from typing import TYPE_CHECKING, Any

from kirsch.distillation.losses import LOSSES
from kirsch.distillation.losses.loss import SHAPES, get_loss, loss_options
from kirsch.distillation.objective import Objective, formula, option_text
from kirsch.distillation.presets import PRESETS

if TYPE_CHECKING:
    from collections.abc import Sequence

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")

HEAD = """# Methods

<!-- written by `kirsch methods --markdown`; do not edit -->

`kirsch methods NAME` shows one preset or loss with its options and their source. An objective of your own is a sum of
terms: `Objective((Term("kd", 0.9), Term("at", 1000.0, student_layer="auto")), label_weight=0.1)`. In a recipe:

```yaml
objective:
  terms:
  - {loss: kd, weight: 0.9, temperature: 4}
  - {loss: at, weight: 1000, student_layer: auto}
  label_weight: 0.1
```
"""

PRESETS_HEAD = """## Presets

`Objective.preset("dkd")`, or `objective: dkd` in a recipe. The number before a loss is its weight, and
"labels" is the label loss. The parentheses show the temperature T, the layers, the adapter, and options of the loss.
The layers are `auto` (all stages), `auto[-2]` (the second-to-last stage), `penultimate` (the input of the classifier),
`hidden[-1]` (the last hidden states), or a path with wildcards. "→" shows a number that changes during training; "↔"
connects a layer of the student with a different layer of the teacher.
"""

LOSSES_HEAD = """## Losses

The column "takes" names the kind of values that a loss compares; [the last table](#kinds-of-values) has their shapes.
Options are shown with their defaults. The option `convention` selects the scaling of a paper or of another library;
`kirsch methods NAME` describes the choices.
"""


KINDS_HEAD = """## Kinds of values

N samples, K classes, C channels, L positions, D features, Q queries.
"""


def presets() -> list[dict[str, Any]]:
    """Return for each preset its name, formula, summary, source, and the objective as data."""
    rows = []
    for name in PRESETS:
        objective = Objective.preset(name)
        rows.append(
            {"name": name, "formula": formula(objective), **_summary(PRESETS[name]), "objective": objective.to_dict()}
        )
    return rows


def losses() -> list[dict[str, Any]]:
    """Return for each loss its name, the kind of tensors it takes, options with defaults, summary and source."""
    return [
        {
            "name": name,
            "takes": get_loss(name).takes,
            "widths": get_loss(name).widths,
            "options": loss_options(get_loss(name)),
            **_summary(get_loss(name)),
        }
        for name in LOSSES
    ]


def page() -> str:
    """Return both lists as a page of Markdown."""
    rows = [[f"`{preset['name']}`", preset["formula"], preset["what"], preset["source"]] for preset in presets()]
    lines = [HEAD, PRESETS_HEAD, *_table(("preset", "formula", "description", "source"), rows), "", LOSSES_HEAD]
    rows = [[f"`{loss['name']}`", loss["takes"], loss["what"], _options(loss), loss["source"]] for loss in losses()]
    lines += [*_table(("loss", "takes", "description", "options", "source"), rows), "", KINDS_HEAD]
    return "\n".join([*lines, *_table(("kind", "values and shape"), list(SHAPES.items()))]) + "\n"


def _options(loss: dict[str, Any]) -> str:
    """Return the options of a loss with their defaults as code: `margin=1`, `convention="mean"`."""
    values = {
        name: json.dumps(value) if isinstance(value, str) else option_text(value)
        for name, value in loss["options"].items()
    }
    return ", ".join(f"`{name}={value}`" for name, value in values.items())


def _summary(function: Any) -> dict[str, str]:
    """Return the first line of the docstring of a function, and the first of its sources."""
    text = inspect.getdoc(function) or ""
    sources = re.search(r"^Source: (.*?)(?=\n\s*\n|\Z)", text, re.MULTILINE | re.DOTALL)
    source = " ".join(sources[1].split()) if sources else ""
    first = re.match(rf".*?{ARXIV.pattern}|[^.;]*\d{{4}}[^.;]*", source)
    summary = text.partition("\n")[0]
    for prefix in ("Return the ", "Return "):
        summary = summary.removeprefix(prefix)
    return {"what": summary[:1].upper() + summary[1:], "source": (first[0] if first else source).rstrip(".")}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [
            ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", cell.replace("|", r"\|").replace("*", r"\*"))
            for cell in row
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
