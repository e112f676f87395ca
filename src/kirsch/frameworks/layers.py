"""Layer names: the features that a loss compares, written as text in the same way for every framework.

- `logits`: the logits among the model's outputs; `output.boxes`: another output, by name; `output.*`: all outputs
- `layer3`: output of a module; `layer3:in`: its input; `layer3@1`: the second of several outputs
- `layer1.0.relu#1`: the second call of a module that is called several times
- `encoder.0/softmax:in`: input of the function `softmax` in the code of `encoder.0`; `encoder.0/add#1`: output of the
  second addition in that code, including `x += y`, and excluding the code of submodules
- `hidden[2]`, `attention[-1]`: hidden states (0 is the embedding) and attention weights of layers, as returned by
  models of the transformers library; `encoder.hidden[2]`, `decoder.attention[0]`, `cross.attention[0]` for
  encoder-decoder models
- `penultimate`: input of the last layer
- `layer*`, `**.attention.self.value`: all matching modules (`*` matches within one name of a path, `**` across names);
  `hidden[*]`: all layers; `**.conv2[-1]`: the last match
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from kirsch.annotations import Kind
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping


def _is_layer_names(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return bool(value) and all(map(_is_layer_names, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


LayerNames = Annotated[
    Any,
    Kind("a layer name, or a list or dict of layer names", _is_layer_names, lambda _: 'Give, for example, "layer3".'),
]
"""A layer name; a list of names for losses that compare stages or relations between layers; a dict of names for losses
that compare sets of predictions, such as those of detectors; or "auto", which matches the stages of both models."""

Key = tuple[str, str, bool]
"""Path of a module; name of a function that the module's `forward` calls, or ""; whether the feature is an input."""

GRAMMAR = re.compile(
    r"(?P<path>[^/:#@\[\]]*)(?:/(?P<function>\w+))?(?P<is_input>:in)?(?:#(?P<call>\d+))?(?:@(?P<item>\w+))?"
    r"(?:\[(?P<index>-?\d+|\*)\])?"
)
OUTPUT = "output."
"""Beginning of the layer names of outputs; the name of the output follows."""

LAYERED = re.compile(r"(?:(encoder|decoder|cross)\.)?(hidden|attention)")


@dataclass(frozen=True)
class LayerName:
    """Parts of a layer name.

    Args:
        text: name as written.
        path: path of the module, or "logits", "output.NAME", "hidden", "attention".
        function: name of a function that the module's code calls; empty for the module itself.
        is_input: whether the feature is the input of the module or function, not the output.
        call: number of the call, from 0. None if it is not stated: the module must then be called exactly once.
        item: number or name of one of several outputs; empty for the first one.
        index: index of the hidden state or attention layer, or index among the modules that match a pattern: a number,
            "*" or empty.
    """

    text: str
    path: str
    function: str = ""
    is_input: bool = False
    call: int | None = None
    item: str = ""
    index: str = ""

    @classmethod
    def read(cls, text: str) -> LayerName:
        """Parse a layer name.

        Raises:
            UsageError: the text is not a layer name.
        """
        if text.startswith(OUTPUT):  # the name of an output may contain any character
            return cls(text, text)
        match = GRAMMAR.fullmatch(text)
        if match is None or not (match["path"] or match["function"]):
            raise UsageError(
                f"{text!r} is not a layer name.",
                "A layer name is a module path, optionally followed by :in, #call, /function or [index].",
                'Write, for example, "layer3", "layer3:in", "hidden[2]" or "logits".',
            )
        call = None if match["call"] is None else int(match["call"])
        return cls(
            text,
            match["path"],
            match["function"] or "",
            bool(match["is_input"]),
            call,
            match["item"] or "",
            match["index"] or "",
        )

    @property
    def key(self) -> Key:
        """Return path, function, and whether the feature is an input, without the numbers of call and output."""
        return self.path, self.function, self.is_input

    @property
    def of_outputs(self) -> bool:
        """Return whether the layer is an output of the model."""
        return self.path == "logits" or self.path.startswith(OUTPUT)

    @property
    def layered(self) -> re.Match[str] | None:
        """Return the parts of names such as "encoder.hidden"; None for other layers."""
        return LAYERED.fullmatch(self.path) if self.index else None


def pattern(path: str) -> str:
    """Return a regular expression for a path pattern: * matches within one name, ** across names."""
    pieces = re.split(r"(\*\*|\*)", path)
    return "".join({"**": r".*", "*": r"[^.]*"}.get(piece, re.escape(piece)) for piece in pieces)


def at_layers(values: Mapping[str, Any], layers: LayerNames) -> Any:
    """Return the feature of a layer, or a list or dict of features for a list or dict of layers."""
    if isinstance(layers, dict):
        return {name: values[layer] for name, layer in layers.items()}
    return [values[layer] for layer in layers] if isinstance(layers, list) else values[layers]


def texts(layers: Any) -> list[str]:
    """Return all layer names in a list or dict of names."""
    if isinstance(layers, str):
        return [layers]
    return [text for part in (layers.values() if isinstance(layers, dict) else layers) for text in texts(part)]
