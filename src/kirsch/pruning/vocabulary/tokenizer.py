"""Fast tokenizers with fewer tokens, as the JSON of the tokenizers library.

A text whose tokens are all kept must have the same tokens as before. The longest match of WordPiece, the lookup of
WordLevel and the best segmentation of Unigram stay the same if other tokens are removed. BPE builds a token from
shorter ones, which must then be kept, too: every merge that the full tokenizer makes in such a text is still possible,
and none is added, so that the same merges are made in the same order.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

MODELS = ("WordLevel", "WordPiece", "BPE", "Unigram")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""Token of one byte, which stands for a part of a text that has no other token."""


def can_be_rewritten(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer, as JSON, is of a type whose vocabulary can be reduced."""
    return tokenizer["model"].get("type") in MODELS


def ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return token → id of the model of a tokenizer, without added tokens."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {token: number for number, (token, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def needed(tokenizer: Mapping[str, Any], keep: Collection[int]) -> set[int]:
    """Return the ids to keep so that texts of the tokens `keep` have the same tokens as before.

    These are `keep`, the added tokens, the token for unknown texts and the tokens of bytes. For BPE, these are also all
    tokens that are not the result of a merge, since texts without them would disappear, and the parts of kept tokens.
    """
    model, of_token = tokenizer["model"], ids(tokenizer)
    found = set(keep) | {token["id"] for token in tokenizer.get("added_tokens", ())}
    found |= {number for token, number in of_token.items() if BYTE.fullmatch(token)}
    if model.get("unk_token") in of_token:
        found.add(of_token[model["unk_token"]])
    if model.get("unk_id") is not None:
        found.add(model["unk_id"])
    if model["type"] != "BPE":
        return found
    parts: dict[str, list[tuple[str, str]]] = {}
    for first, second, result in _merges(model):
        parts.setdefault(result, []).append((first, second))
    found |= {number for token, number in of_token.items() if token not in parts}
    token_of = {number: token for token, number in of_token.items()}
    pending = [token_of[number] for number in found if number in token_of]
    while pending:
        for pair in parts.get(pending.pop(), ()):
            for token in pair:
                if of_token[token] not in found:
                    found.add(of_token[token])
                    pending.append(token)
    return found


def rewritten(tokenizer: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Return a tokenizer without the tokens that have no new id.

    Args:
        tokenizer: the tokenizer as JSON.
        new_ids: old id → new id, in the order of the old ids; it contains the ids of `needed`.
    """
    new = copy.deepcopy(dict(tokenizer))
    model = new["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new_ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids}
    if model["type"] == "BPE":
        triples = zip(model["merges"], _merges(model), strict=True)
        model["merges"] = [merge for merge, tokens in triples if all(token in model["vocab"] for token in tokens)]
    for token in new.get("added_tokens", ()):
        token["id"] = new_ids[token["id"]]
    if new.get("padding"):
        new["padding"]["pad_id"] = new_ids[new["padding"]["pad_id"]]
    _renumber(new.get("post_processor"), new_ids)
    return new


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the two tokens and the result of each merge, in order."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second, first + second.removeprefix(prefix)


def _renumber(processor: Any, new_ids: Mapping[int, int]) -> None:
    """Replace the ids of the tokens that a processor adds to each text, in place."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        _renumber(inner, new_ids)
    for key in ("sep", "cls"):
        if key in processor:
            token, old = processor[key]
            processor[key] = [token, new_ids[old]]
    special = processor.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else ():
        token["ids"] = [new_ids[old] for old in token["ids"]]
