"""Places in a model whose values a loss compares, as text: the same for every framework.

A layer is written as text:

- `logits`: the scores among what the model puts out; `output.boxes`: another of its outputs, by name
- `layer3`: what a module puts out; `layer3:in`: what it is given; `layer3@1`: the second of several that it puts out
- `layer1.0.relu#1`: the second call of a module that runs several times
- `encoder.0/softmax:in`: what the code of `encoder.0` itself gives to the function `softmax`; `encoder.0/add#1`: what
  the second addition there gives, `x += y` counted, and not those of modules within
- `hidden[2]`, `attention[-1]`: states (0 is the embedding) and weights of layers, as models of transformers put them
  out; `encoder.hidden[2]`, `decoder.attention[0]`, `cross.attention[0]` where a model has both
- `penultimate`: what the last layer is given
- `layer*`, `**.attention.self.value`: all modules that fit (`*` within one part of a path, `**` over several);
  `hidden[*]`; `**.conv2[-1]`: the last of them
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from kirsch.annotations import Kind
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping


def _names_sites(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return bool(value) and all(map(_names_sites, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


LayerNames = Annotated[
    Any, Kind("a path as text, or a list or dict of these", _names_sites, lambda _: 'Give "layer3", say.')
]
"""A layer as text; a list of them for losses of stages or relations, a dict for sets; "auto" to have stages matched."""

Key = tuple[str, str, bool]
"""Path of a module, function that its forward calls or "", and whether what it is given is meant."""

GRAMMAR = re.compile(
    r"(?P<path>[^/:#@\[\]]*)(?:/(?P<function>\w+))?(?P<given>:in)?(?:#(?P<call>\d+))?(?:@(?P<item>\w+))?"
    r"(?:\[(?P<index>-?\d+|\*)\])?"
)
LAYERED = re.compile(r"(?:(encoder|decoder|cross)\.)?(hidden|attention)")


@dataclass(frozen=True)
class LayerName:
    """One place, taken apart.

    Args:
        text: as it was written.
        path: of the module, or "logits", "output.NAME", "hidden", "attention".
        function: name of a function that the module's own code calls; empty for the module itself.
        given: the place before it, not after it.
        call: which of several calls; None where there must be one alone.
        item: which of several things it puts out.
        index: of a layer, or of the modules that fit a pattern: a number, "*" or empty.
    """

    text: str
    path: str
    function: str = ""
    given: bool = False
    call: int | None = None
    item: str = ""
    index: str = ""

    @classmethod
    def read(cls, text: str) -> LayerName:
        """A layer from its text.

        Raises:
            UsageError: it is none.
        """
        found = GRAMMAR.fullmatch(text)
        if found is None or not (found["path"] or found["function"]):
            raise UsageError(
                f"{text!r} names no place in a model.",
                "A place is a path of modules, with :in, #call, /function or [layer] behind it.",
                'Write "layer3", "layer3:in", "hidden[2]" or "logits".',
            )
        call = None if found["call"] is None else int(found["call"])
        return cls(
            text,
            found["path"],
            found["function"] or "",
            bool(found["given"]),
            call,
            found["item"] or "",
            found["index"] or "",
        )

    @property
    def key(self) -> Key:
        """The place, whichever call and item of it is meant."""
        return self.path, self.function, self.given

    @property
    def of_outputs(self) -> bool:
        """Whether it is among what the whole model puts out."""
        return self.path == "logits" or self.path.startswith("output.")

    @property
    def layered(self) -> re.Match[str] | None:
        """The parts of "encoder.hidden" and the like; None for other layers."""
        return LAYERED.fullmatch(self.path) if self.index else None


def pattern(path: str) -> str:
    """A regular expression for a path in which * stands for a part of one name, and ** for any names."""
    pieces = re.split(r"(\*\*|\*)", path)
    return "".join({"**": r".*", "*": r"[^.]*"}.get(piece, re.escape(piece)) for piece in pieces)


def at_layers(values: Mapping[str, Any], layers: LayerNames) -> Any:
    """The values at a layer, or at each of a list or dict of layers."""
    if isinstance(layers, dict):
        return {name: values[layer] for name, layer in layers.items()}
    return [values[layer] for layer in layers] if isinstance(layers, list) else values[layers]


def texts(layers: Any) -> list[str]:
    """All layers in a structure of them."""
    if isinstance(layers, str):
        return [layers]
    return [text for part in (layers.values() if isinstance(layers, dict) else layers) for text in texts(part)]
