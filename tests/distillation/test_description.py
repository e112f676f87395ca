"""Callables that do something else are described by something else, or they are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import threading
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.augment import Chain, Flip
from kirsch.distillation.store.description import described
from kirsch.errors import UsageError


def told(value):
    return json.dumps(described(value), sort_keys=True)


class Options:
    def __init__(self, amount):
        self.amount = amount


class Slotted:
    __slots__ = ("amount",)

    def __init__(self, amount):
        self.amount = amount

    def __call__(self, batch, _random):
        return batch * self.amount


class Derived(Slotted):
    __slots__ = ("further",)

    def __init__(self, amount):
        super().__init__(1)
        self.further = amount


@dataclasses.dataclass
class Numbers:
    amount: object


class Kind(Enum):
    ONE = 1
    TWO = 2


class Layer(nn.Module):
    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def forward(self, batch):
        return batch * self.amount


class Listed(nn.Module):
    """As torchvision's Compose, which does not register what it calls."""

    def __init__(self, *stages):
        super().__init__()
        self.stages = list(stages)


class Buffered(nn.Module):
    def __init__(self, amount):
        super().__init__()
        self.register_buffer("amount", torch.tensor(float(amount)), persistent=False)


def enclosing(value):
    def scaled(batch, _random):
        return batch, value

    return scaled


def marked(amount):
    def scaled(batch, _random):
        return batch

    scaled.amount = amount
    return scaled


def wrapping(amount):
    def outer(function):
        @functools.wraps(function)
        def inner(batch, random):
            return amount * function(batch, random)

        return inner

    return outer(marked(0))


def looped(amount):
    found = Options(amount)
    found.own = found
    found.listed = [found]
    return found


MADE = {
    "an object": Options,
    "slots": Slotted,
    "slots of a derived class": Derived,
    "a method": lambda amount: Slotted(amount).__call__,
    "a dataclass": Numbers,
    "a number deep within": lambda amount: Options([{"a": (Numbers(amount),)}]),
    "a tensor": lambda amount: torch.tensor([float(amount)]),
    "a tensor of 16 bits": lambda amount: torch.tensor([amount], dtype=torch.bfloat16),
    "an array of objects": lambda amount: np.array([Options(amount)], object),
    "a set": lambda amount: {f"a{amount}", "b", "c"},
    "bytes": lambda amount: bytes([amount]),
    "a choice": Kind,
    "a pattern": lambda amount: re.compile(f"a{amount}"),
    "a path": lambda amount: Path(f"a{amount}"),
    "a generator of numbers": np.random.default_rng,
    "a type of numbers": lambda amount: [torch.float16, torch.float32][amount - 1],
    "a module's setting": Layer,
    "a module within one": lambda amount: nn.Sequential(Layer(amount)),
    "a module in a list of one": lambda amount: Listed(Layer(amount)),
    "a function in a list of a module": lambda amount: Listed(enclosing(amount)),
    "a buffer beside the weights": Buffered,
    "weights": lambda amount: (
        nn.utils.skip_init(nn.Linear, 1, 1)
        .requires_grad_(requires_grad=False)
        .apply(lambda layer: (layer.weight.fill_(amount), layer.bias.fill_(0)))
    ),
    "an attribute of a function": marked,
    "a decorator": wrapping,
    "what caches a function": lambda amount: functools.lru_cache(enclosing(amount)),
    "an object that holds itself": looped,
    "a lambda of one line": lambda amount: [lambda b, _: b * 1, lambda b, _: b * 3][amount - 1],
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_what_differs_is_described_otherwise_and_what_is_alike_alike(make):
    one, again, other = (told(enclosing(make(amount))) for amount in (1, 1, 2))
    assert one == again
    assert one != other


def test_functions_and_values_of_all_bases_count_as_they_are_now(monkeypatch):
    class Base:
        amount = 1

        def __call__(self, batch, _random):
            return batch * self.amount

    class Mine(Base):
        pass

    seen = [told(Mine())]
    monkeypatch.setattr(Base, "amount", 2)
    seen.append(told(Mine()))
    monkeypatch.setattr(Base, "__call__", lambda _self, batch, _random: batch * 3)
    seen.append(told(Mine()))
    assert len(set(seen)) == 3


def test_who_else_holds_an_object_does_not_count():
    flip, options = Flip(), Options(1)
    assert told(Chain(flip, flip)) == told(Chain(Flip(), Flip()))
    assert told(enclosing([options, options])) == told(enclosing([Options(1), Options(1)]))


def test_a_web_of_objects_is_described_in_no_time():
    """Each of 60 holds the one before twice: 2⁶⁰ ways lead to the first."""
    found = Options(1)
    for _ in range(60):
        found = Options([found, found])
    assert len(told(enclosing(found))) < 1000


def test_the_weights_of_a_model_may_be_watched(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2))
    before = told(enclosing(model))
    handle = model[0].register_forward_hook(lambda *_: None)
    assert told(enclosing(model)) == told(enclosing(model.train())) == before
    told(enclosing(handle))


@contextlib.contextmanager
def quietly():
    yield


class Decorated(nn.Module):
    """As models of transformers: what decorates them holds generators."""

    @quietly()
    def forward(self, batch):
        return super().forward(batch)


def test_what_decorates_a_model_is_no_reason_to_refuse_it(monkeypatch):
    before = told(enclosing(Decorated()))
    assert before == told(enclosing(Decorated()))
    monkeypatch.setattr(Decorated, "forward", lambda _self, batch: batch)
    assert told(enclosing(Decorated())) != before


def test_what_cannot_be_described_is_refused_and_named(tmp_path):
    with (tmp_path / "file").open("w") as file:
        for held, kind, path in (
            (file, "_io.TextIOWrapper", "value"),
            (Options({"a": [threading.Lock()]}), r"_thread\.lock", r"value\.amount\.a\.0"),
            ((number for number in range(3)), "builtins.generator", "value"),
        ):
            sentence = rf"enclosing.* holds a {kind} as `{path}`, which cannot be described\. .*Let it hold numbers"
            with pytest.raises(UsageError, match=sentence):
                described(enclosing(held))
