"""Removal of tokens from the vocabulary of a language model, with a map from old to new token ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from kirsch import figures, files
from kirsch.annotations import Kind
from kirsch.arguments import checked
from kirsch.data.annotations import Inputs, Model, is_array
from kirsch.data.arrays import host
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.pruning.vocabulary import tokenizer as tokenizer_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAP_FILE = "token_map.json"
"""File beside the model with old id → new id."""


def _is_list_of_ids(value: Any) -> bool:
    listed = isinstance(value, (list, tuple, range, set, frozenset))
    return listed or (is_array(value) and len(value.shape) > 0)


def _is_tokenizer(value: Any) -> bool:
    return callable(getattr(value, "convert_tokens_to_ids", None)) and callable(getattr(value, "save_pretrained", None))


TokenIds = Annotated[
    Any,
    Kind("a list or an array of token ids", _is_list_of_ids, lambda _: "Give ids, such as `input_ids` of texts."),
]
Tokenizer = Annotated[
    Any, Kind("a tokenizer", _is_tokenizer, lambda _: "Give a fast tokenizer of transformers, or leave it out.")
]


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A model with fewer tokens, and the map between the token ids of the original and its own.

    Args:
        model: the model, built from its changed configuration.
        kept: the id of each token in the original, in the order of the new ids.
        size: number of tokens of the original.
        tokenizer: the tokenizer with the new ids; None if none was given, or if it cannot be rewritten.
        notes: sentences on tokens that are kept beside those asked for, and on the tokenizer.
    """

    model: Any = field(repr=False)
    kept: tuple[int, ...] = field(repr=False)
    size: int
    tokenizer: Any = field(repr=False, default=None)
    notes: tuple[str, ...] = ()

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """Old id → new id of the kept tokens."""
        return {old: new for new, old in enumerate(self.kept)}

    def to_new(self, ids: Any, *, unknown: int | None = None) -> Any:
        """Return the new ids for token ids of the original.

        Args:
            ids: array or tensor of ids, or a list of ids or of lists of equal lengths; the result has the same type.
            unknown: id of the original, such as `tokenizer.unk_token_id`, that replaces tokens that are not kept.

        Raises:
            UsageError: a token is not kept, and `unknown` is not given or not kept.
        """
        table = np.full(self.size, -1)
        table[list(self.kept)] = np.arange(len(self.kept))
        new = table[_checked_ids(ids, self.size, "ids")]
        missing = np.unique(np.asarray(host(ids))[new < 0]).tolist()
        replacement = -1 if unknown is None else self.new_ids.get(unknown, -1)
        if missing and replacement < 0:
            raise UsageError(
                f"`ids` has {figures.counted(len(missing), 'token')} that are not in the vocabulary of the model: "
                f"{figures.listed([str(token) for token in missing])}.",
                fix="Give `unknown`, the id of a kept token that replaces them, or keep these tokens.",
            )
        return self._like(np.where(new < 0, replacement, new), ids)

    def to_old(self, ids: Any) -> Any:
        """Return the token ids of the original for new ids, such as those that `generate` returns."""
        return self._like(np.asarray(self.kept)[_checked_ids(ids, len(self.kept), "ids")], ids)

    def save(self, folder: str | Path) -> Path:
        """Write model, rewritten tokenizer and `token_map.json` (old id → new id) to a folder.

        `from_pretrained` loads model and tokenizer in a process without Kirsch.
        """
        target = Path(folder)
        self.model.save_pretrained(target)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(target)
        files.write_text(target / MAP_FILE, json.dumps(self.new_ids))
        return target

    def _like(self, values: NDArray[Any], ids: Any) -> Any:
        if isinstance(ids, (list, tuple)):
            return values.tolist()
        return (
            values if isinstance(ids, np.ndarray) else framework_of(self.model).inference.from_numpy(values, like=ids)
        )


@checked
def trim_vocabulary(
    model: Model, keep: TokenIds, *, tokenizer: Tokenizer | None = None, example_inputs: Inputs | None = None
) -> TrimmedVocabulary:
    """Return a copy of a transformers model that has only some of its tokens.

    The rows of the embedding and of the output layer are removed, tied layers stay tied, and the configuration states
    the new number of tokens. The special ids of configuration and `generation_config` are rewritten. The tokens keep
    their order. The outputs for the kept tokens are compared with those of the original.

    Args:
        model: model of transformers; it is not changed. Prune it before or afterwards by plans that its configuration
            can state.
        keep: ids of the tokens to keep, for example those that occur in calibration texts. The special tokens of model
            and tokenizer are always kept.
        tokenizer: a fast tokenizer, which is rewritten in a copy, or None. A text of tokens that are all kept has the
            same tokens as before. For this, tokens from which BPE builds kept tokens are kept, too.
        example_inputs: keyword arguments with ids of kept tokens, for the comparison of the outputs; None for random
            token ids.

    Returns:
        The model, the map of the token ids, and the tokenizer.

    Raises:
        ModelError: the configuration of the model does not state the number of its tokens, or the model does not run.
        UsageError: `keep` has no ids, or ids outside of the vocabulary; or a setting has ids that cannot be rewritten.
        VerificationError: the outputs for the kept tokens differ from those of the original.
    """
    if example_inputs is not None and not isinstance(example_inputs, Mapping):
        raise UsageError(
            f"`example_inputs` of kirsch.trim_vocabulary is a {type(example_inputs).__name__}.",
            "The names show which inputs are token ids.",
            "Give a dict of the keyword arguments of the model: example_inputs={'input_ids': ids}.",
        )
    surgery = framework_of(model).surgery
    size = surgery.vocabulary_size(model)
    asked = set(_checked_ids(keep, size, "keep").ravel().tolist())
    if not asked:
        raise UsageError("`keep` of kirsch.trim_vocabulary is empty.", fix="Give the ids of the tokens to keep.")
    kept = asked | surgery.special_tokens(model)
    serialized, notes = _serialized(tokenizer)
    if serialized is not None:
        kept = tokenizer_json.needed(serialized, kept & set(range(size)))
        _require_rows(kept, size)
    order = sorted(number for number in kept if number < size)
    if len(order) > len(asked):
        more = len(order) - len(asked)
        notes += (
            f"{figures.counted(more, 'token')} are kept beside `keep`: special tokens, and parts of kept tokens.",
        )
    trimmed = surgery.trim_vocabulary(model, order, example_inputs)
    new_ids = {old: new for new, old in enumerate(order)}
    new_tokenizer = None if serialized is None else _with_ids(tokenizer, serialized, new_ids)
    return TrimmedVocabulary(trimmed, tuple(order), size, new_tokenizer, notes)


def _checked_ids(ids: Any, size: int, argument: str) -> NDArray[np.int64]:
    """Return token ids as an integer array."""
    try:
        values = host(ids)
    except (TypeError, ValueError):  # lists of different lengths
        values = np.array("lists of different lengths")
    if isinstance(ids, range | set | frozenset):
        values = np.array(sorted(ids))
    if values.dtype.kind not in "iu" and (values.size or values.ndim == 0):
        raise UsageError(
            f"`{argument}` is not an array of token ids, but a {type(ids).__name__} of the type {values.dtype}.",
            "Token ids are integers.",
            "Give a list or an array of ids, such as the `input_ids` of a tokenizer.",
        )
    wrong = values[(values < 0) | (values >= size)] if values.size else values
    if wrong.size:
        raise UsageError(
            f"`{argument}` has the token id {wrong.ravel()[0]}; the vocabulary has the ids 0 to {size - 1}.",
            fix="Remove ids outside of the vocabulary, such as the label -100.",
        )
    return values.astype(np.int64)


def _serialized(tokenizer: Any) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return a tokenizer as JSON, None if it cannot be rewritten, and notes."""
    if tokenizer is None:
        return None, ()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    serialized = json.loads(backend.to_str()) if backend is not None else None
    if serialized is not None and tokenizer_json.can_be_rewritten(serialized):
        return serialized, ()
    note = (
        f"The {type(tokenizer).__name__} cannot be rewritten: it is not a fast tokenizer. Use it with the original "
        "ids, and convert them with to_new and to_old, or with token_map.json."
    )
    return None, (note,)


def _require_rows(kept: set[int], size: int) -> None:
    """Raise an error if the tokenizer needs tokens for which the model has no rows."""
    missing = sorted(number for number in kept if number >= size)
    if missing:
        raise UsageError(
            f"The tokenizer has the token id {missing[0]}; the vocabulary of the model has the ids 0 to {size - 1}.",
            fix="Give the tokenizer of the model, or call model.resize_token_embeddings(len(tokenizer)) first.",
        )


def _with_ids(tokenizer: Any, serialized: Mapping[str, Any], new_ids: Mapping[int, int]) -> Any:
    """Return a copy of a tokenizer with new ids."""
    new = copy.deepcopy(tokenizer)
    text = json.dumps(tokenizer_json.rewritten(serialized, new_ids), ensure_ascii=False)
    new._tokenizer = type(tokenizer.backend_tokenizer).from_str(text)  # noqa: SLF001 - the only way to replace it
    return new
