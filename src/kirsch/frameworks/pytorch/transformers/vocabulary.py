"""Transformers models with fewer tokens in their vocabulary."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import ModelError, UsageError, VerificationError, error_text
from kirsch.frameworks.pytorch.inference.predict import run
from kirsch.frameworks.pytorch.modules.modes import set_modes
from kirsch.frameworks.pytorch.modules.tuners import has_tuners
from kirsch.frameworks.pytorch.transformers.blueprint import build, has_configuration, numbers
from kirsch.frameworks.pytorch.verification.distance import distance
from kirsch.frameworks.pytorch.verification.noise import named_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

SPECIAL = ("_token_id", "_token_ids", "_token_index")
"""Ends of the names of settings whose tokens are always kept."""
LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of tokens that are never generated; tokens that are not kept are removed from them."""
REFUSED = ("forced_decoder_ids", "force_words_ids", "sequence_bias", "lang_to_id", "task_to_id", "bad_words_ids")
"""Settings with ids in other forms."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of the outputs relative to the largest output, by dtype; 2e-2 for others."""


def special_tokens(model: nn.Module) -> set[int]:
    """Return the ids in the settings of a model, such as `eos_token_id`, of the configurations and of generation."""
    found = set[int]()
    for owner in _settings(model):
        for name, value in vars(owner).items():
            if name.endswith(SPECIAL):
                found.update(item for item in _listed(value) if type(item) is int and item >= 0)
    return found


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of rows of the embedding of tokens.

    Raises:
        ModelError: the model has no configuration with the size of its vocabulary.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)
    try:
        table: Any = embedding()
    except Exception:  # noqa: BLE001 - models without tokens raise different exceptions
        table = None
    weight = getattr(table, "weight", None)
    if (
        not has_configuration(model)
        or has_tuners(model)
        or weight is None
        or not _vocabulary_numbers(model, len(weight))
    ):
        raise ModelError(
            f"The vocabulary of this {type(model).__name__} cannot be trimmed.",
            "It has no configuration of transformers that states the number of its tokens, or has adapters.",
            "Give the model of transformers itself; merge its adapters first.",
        )
    return len(weight)


def trim_vocabulary(model: nn.Module, keep: Sequence[int], inputs: Mapping[str, Any] | None) -> nn.Module:
    """Return a model built from the configuration with the tokens `keep` alone, verified on these tokens.

    Args:
        model: the model; it is not changed.
        keep: old ids of the kept tokens, ascending, with the special tokens.
        inputs: keyword arguments whose ids are kept; None for random token ids.

    Raises:
        ModelError: the model does not run, or its configuration builds other sizes.
        UsageError: a setting of the model has ids in a form that cannot be rewritten.
        VerificationError: the outputs for the kept tokens differ.
    """
    size = vocabulary_size(model)
    new_ids = {old: new for new, old in enumerate(keep)}
    config = copy.deepcopy(model.config)
    for owner in _configurations(config):
        _rewrite(owner, new_ids)
    device = next(model.parameters()).device
    changes = dict.fromkeys(_vocabulary_numbers(model, size), len(keep))
    try:
        built = build(model, changes, device, config=config)
    except Exception as error:
        raise ModelError(
            f"No {type(model).__name__} can be built for {len(keep)} tokens.", error_text(error)
        ) from error
    _copy_tensors(model, built, torch.tensor(keep, device=device), size)
    modes = {path: module.training for path, module in model.named_modules()}
    set_modes((module, modes.get(path, model.training)) for path, module in built.named_modules())
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        new_generation = copy.deepcopy(generation)
        _rewrite(new_generation, new_ids)
        built.generation_config = new_generation
    _verify(model, built, keep, size, inputs)
    return built


def _settings(model: nn.Module) -> Iterator[Any]:
    yield from _configurations(model.config)
    if getattr(model, "generation_config", None) is not None:
        yield model.generation_config


def _configurations(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict"):
            yield from _configurations(value)


def _vocabulary_numbers(model: nn.Module, size: int) -> list[str]:
    """Return the paths in the configuration that state the number of tokens."""
    stated = numbers(model.config)
    return [path for path, value in stated.items() if path.rpartition(".")[2].endswith("vocab_size") and value == size]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _rewrite(owner: Any, new_ids: Mapping[int, int]) -> None:
    """Replace the ids in a configuration, in place."""
    for name, value in list(vars(owner).items()):
        if name in REFUSED and value:
            raise UsageError(
                f"The vocabulary cannot be trimmed: `{name}` of the {type(owner).__name__} has ids of tokens.",
                "Kirsch rewrites single ids and lists of ids alone.",
                f"Set {name} to None, and set it again with the new ids of the result.",
            )
        if name.endswith(SPECIAL):
            new = [new_ids.get(item, item) if type(item) is int else item for item in _listed(value)]
            setattr(owner, name, type(value)(new) if isinstance(value, (list, tuple)) else new[0])
        elif name in LISTS and value:
            setattr(owner, name, [new_ids[old] for old in value if old in new_ids])


def _copy_tensors(model: nn.Module, built: nn.Module, keep: torch.Tensor, size: int) -> None:
    """Set the tensors of a built model to those of the model, with the rows of the kept tokens alone."""
    old, new = named_tensors(model), named_tensors(built)
    if old.keys() != new.keys():
        name = next(iter(old.keys() ^ new.keys()))
        raise ModelError(
            f"The configuration of the {type(model).__name__} builds a model with other tensors: {name}.",
            "The trimmed model is built from the configuration, as from_pretrained builds it.",
            "Trim the vocabulary before you prune, or use a plan that the configuration can state.",
        )
    with torch.no_grad():
        for name, value in old.items():
            part = value.detach()
            for axis, (before, after) in enumerate(zip(value.shape, new[name].shape, strict=True)):
                if before != after and (before, after) == (size, len(keep)):
                    part = part.index_select(axis, keep)
            if part.shape != new[name].shape:
                raise ModelError(
                    f"{name} of the {type(model).__name__} has the shape {tuple(value.shape)}, and its configuration "
                    f"builds {tuple(new[name].shape)}.",
                    "The trimmed model is built from the configuration, as from_pretrained builds it.",
                    "Trim the vocabulary before you prune, or use a plan that the configuration can state.",
                )
            new[name].data = part.to(value.dtype).clone()
            new[name].requires_grad_(value.requires_grad)


def _verify(
    model: nn.Module, built: nn.Module, keep: Sequence[int], size: int, inputs: Mapping[str, Any] | None
) -> None:
    """Raise an error if the outputs of a trimmed model differ from those of the model for the kept tokens."""
    device = next(model.parameters()).device
    index = torch.tensor(keep, device=device)
    new_of_old = torch.full((size,), -1, device=device)
    new_of_old[index] = torch.arange(len(keep), device=device)
    if inputs is None:
        drawn = torch.randint(0, len(keep), (2, 8), generator=torch.Generator().manual_seed(0)).to(device)
        names = ["input_ids", *["decoder_input_ids"] * bool(getattr(model.config, "is_encoder_decoder", False))]
        inputs = dict.fromkeys(names, index[drawn])
    renumbered = {
        name: new_of_old[value] if name.endswith("input_ids") and isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    expected = [_of_kept(value, index, size) for value in _outputs(model, inputs)]
    found = _outputs(built, renumbered)
    limit = TOLERANCES.get(next(model.parameters()).dtype, 2e-2)
    difference = distance(expected, found) if [a.shape for a in expected] == [b.shape for b in found] else float("inf")
    if not difference <= limit:
        raise VerificationError(
            f"The {type(model).__name__} with {len(keep)} tokens returns other outputs, by {difference:.2g}.",
            "A part of the model may depend on the numbers of tokens, such as the number of the padding token.",
            "Keep all tokens up to the largest id of a special token.",
        )


def _of_kept(value: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Return the part of an output that belongs to the kept tokens, if its last axis has all tokens."""
    return value.index_select(-1, index) if value.dim() and value.shape[-1] == size else value


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        return run(model, (), dict(inputs))
    except Exception as error:
        raise ModelError(
            f"The {type(model).__name__} does not run on token ids.",
            error_text(error),
            "Give the keyword arguments of the model, with ids of kept tokens: example_inputs={...}.",
        ) from error
    finally:
        set_modes(modes)
