"""What there is to choose from, read from the code: presets with what they charge, losses with what they take."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from kirsch.distillation.losses import LOSSES
from kirsch.distillation.losses.loss import get_loss, loss_options
from kirsch.distillation.objective import Objective
from kirsch.distillation.presets import PRESETS
from kirsch.distillation.schedule import Ramp
from kirsch.frameworks.layers import texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.distillation.schedule import Number
    from kirsch.distillation.term import Term

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")

HEAD = """# Methods

<!-- written by `kirsch methods --markdown`; do not edit -->

`kirsch methods NAME` shows one of them with its options and the source of its numbers. Your own objective is a sum of
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

`Objective.preset("dkd")`, or `objective: dkd` in a recipe. Weights stand before the losses, T is the temperature,
"labels" the loss on the labels of the data; an arrow is a number that changes.
"""

LOSSES_HEAD = """## Losses

What a loss takes is a kind of values: `kirsch.distillation.losses.loss` says the shape of each. An option is shown with
its default.
"""


def presets() -> list[dict[str, Any]]:
    """Each preset by name: what is charged in words and as data, what it is, and its source."""
    found = []
    for name in PRESETS:
        objective = Objective.preset(name)
        found.append(
            {"name": name, "charged": charged(objective), **_words(PRESETS[name]), "objective": objective.to_dict()}
        )
    return found


def losses() -> list[dict[str, Any]]:
    """Each loss by name: what it takes, its options with their defaults, what it is, and its source."""
    return [
        {
            "name": name,
            "takes": get_loss(name).takes,
            "widths": get_loss(name).widths,
            "options": loss_options(get_loss(name)),
            **_words(get_loss(name)),
        }
        for name in LOSSES
    ]


def page() -> str:
    """Both as a page of Markdown."""
    rows = [[f"`{one['name']}`", one["charged"], one["what"], one["source"]] for one in presets()]
    lines = [HEAD, PRESETS_HEAD, *_table(("preset", "what is charged", "what it is", "source"), rows), "", LOSSES_HEAD]
    rows = [[f"`{one['name']}`", one["takes"], one["what"], _options(one), one["source"]] for one in losses()]
    return "\n".join([*lines, *_table(("loss", "takes", "what it is", "options", "source"), rows)]) + "\n"


def charged(objective: Objective) -> str:
    """What an objective charges, as a sum: "0.9 kd (T 4) + 0.1 labels"."""
    parts = []
    for term in objective.terms:
        weight = f"{_number(term.weight)}{' ·' if isinstance(term.weight, Ramp) else ''}"
        parts.append(f"{weight} {term.loss}{_brackets(term)}")
    if objective.label_weight:
        parts.append(f"{_number(objective.label_weight)} labels")
    return " + ".join(parts) + (", of the next token" if objective.causal else "")


def _brackets(term: Term) -> str:
    """What of a term is not as usual."""
    found = []
    _, temperature = term.resolved()
    if temperature is not None:
        found.append(f"T {_number(temperature)}")
    places = [", ".join(texts(side)) for side in term.layers]
    if places != ["logits", "logits"]:
        found.append(places[0] if places[0] == places[1] else f"{places[0]} ↔ {places[1]}")
    if term.adapter != "auto":
        found.append(f"adapter {term.adapter}")
    found += [f"{name} {_shown(value)}" for name, value in term.options.items()]
    return f" ({'; '.join(found)})" if found else ""


def _number(number: Number) -> str:
    if isinstance(number, Ramp):
        return f"{number.start:g} → {number.end:g} over {number.epochs:g} epochs"
    return f"{number:g}"


def _options(one: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in one["options"].items())


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _words(thing: Any) -> dict[str, str]:
    """The first line of what is said of it, and the first of its sources."""
    text = inspect.getdoc(thing) or ""
    found = re.search(r"^Source: (.*?)(?=\n\s*\n|\Z)", text, re.MULTILINE | re.DOTALL)
    source = " ".join(found[1].split()) if found else ""
    first = re.match(rf".*?{ARXIV.pattern}|[^.;]*\d{{4}}[^.;]*", source)
    summary = text.partition("\n")[0]
    for prefix in ("Return the ", "Return "):
        summary = summary.removeprefix(prefix)
    return {"what": summary[:1].upper() + summary[1:], "source": (first[0] if first else source).rstrip(".")}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [
            ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", cell.replace("|", r"\|").replace("*", r"\*"))
            for cell in row
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
