"""Length, generators and epochs of data loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def length_of(batches: Any) -> int | None:
    """Return the number of batches of an epoch; None if the data has no length."""
    try:
        return len(batches)
    except TypeError:  # no __len__, or a DataLoader over an IterableDataset, whose __len__ raises
        return None


def generators_of(loader: torch.utils.data.DataLoader[Any]) -> list[torch.Generator]:
    """Return the generators of a loader and its samplers, each once."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    generators = [getattr(owner, "generator", None) for owner in (loader, loader.sampler, loader.batch_sampler, inner)]
    return list({id(generator): generator for generator in generators if generator is not None}.values())


def set_epoch(batches: Any, epoch: int) -> None:
    """Call `set_epoch` of the data, its samplers and its dataset, if they have this method."""
    sampler = getattr(batches, "batch_sampler", None)
    owners: tuple[Any, ...] = batches, sampler, getattr(sampler, "sampler", None), getattr(batches, "dataset", None)
    for owner in owners:
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
