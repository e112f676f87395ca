"""A transform is described by its fields, a callable of the user by its declared version; others are refused."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from distillation.stores import versioned
from kirsch.data.augment import Chain, Crop, Flip
from kirsch.distillation.store.specification import description
from kirsch.errors import UsageError


def louder(batch, random):
    return batch * random.uniform(0.5, 2)


@versioned
def quieter(batch, random):
    return batch * random.uniform(0, 0.5)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A transform of the user, with settings."""

    amount: object = 1.0
    version: ClassVar[str] = "1"

    def __call__(self, batch, random):
        return batch * self.amount


class Shared:
    """A transform whose objects have different settings but share the version of the class."""

    version = "1"

    def __init__(self, amount):
        self.amount = amount

    def __call__(self, batch, random):
        return batch * self.amount


class Stated:
    """A transform whose objects state their own version."""

    def __init__(self, amount):
        self.version = f"1 amount={amount}"
        self.amount = amount

    def __call__(self, batch, random):
        return batch * self.amount

    def double(self, batch, random):
        return 2 * batch * self.amount


class Computed(Shared):
    """A transform whose version is a property."""

    @property
    def version(self):
        return f"1 amount={self.amount}"


class Stateless:
    version = 3

    def __call__(self, batch, random):
        return batch


def test_transform_of_kirsch_is_described_by_its_fields():
    chain = Chain(Crop(2), Flip(), quieter)
    name = f"{__name__}.quieter"
    assert description(chain) == f"Chain(stages=(Crop(padding=2), Flip(probability=0.5), {name} version 1))"
    assert description(None) is None


def test_callable_of_the_user_is_described_by_its_name_and_version():
    assert description(quieter) == f"{__name__}.quieter version 1"
    assert description(Stateless()) == f"{__name__}.Stateless version 3"
    assert description(Stated(2)) == f"{__name__}.Stated version 1 amount=2"
    assert description(Scaled(2.5)) == f"{__name__}.Scaled(amount=2.5) version 1"


def partial(version, **options):
    return versioned(functools.partial(louder, **options), version)


def test_different_settings_or_versions_have_different_descriptions():
    first, second = nn.Identity(), nn.Identity()
    first.version, second.version = "1", "2"
    values = [
        None,
        *(Crop(1), Crop(2), Flip(), Chain(Flip()), Chain(Flip(), Flip()), Chain(Flip(), quieter)),
        *(quieter, Scaled(1.0), Scaled(2.0), Scaled((1, 2)), Scaled("1.0"), Scaled(None), Scaled(quieter)),
        *(Stated(1), Stated(2), Stated(1).double, Stated(2).double, Computed(1), Computed(2)),
        *(partial("1"), partial("2"), first, second),
    ]
    described = [description(value) for value in values]
    assert len(set(described)) == len(values)
    assert described == [description(value) for value in values]


@pytest.mark.parametrize(
    "value",
    [louder, Chain(Flip(), louder), Scaled(louder), functools.partial(quieter), nn.Identity(), nn.Identity().forward],
)
def test_callable_without_a_version_is_refused_with_the_fix(value):
    with pytest.raises(
        UsageError, match=r'has no version\. .* not by its code\. .* f\.version = "1" after .*self\.version'
    ):
        description(value)


@pytest.mark.parametrize("version", [True, "", 1.5, ["1"]])
def test_version_is_a_text_or_a_whole_number(version):
    with pytest.raises(UsageError, match=r"Identity has .* as version; expected a text or a whole number"):
        description(versioned(nn.Identity(), version))


def test_version_shared_by_objects_with_different_attributes_is_refused():
    with pytest.raises(UsageError, match=r"for all objects, which may differ in `amount`\. .*f\"1 amount={amount}\""):
        description(Shared(1))


@pytest.mark.parametrize("amount", [np.ones(3), torch.ones(3), {"a": 1}])
def test_field_that_cannot_be_described_is_named(amount):
    with pytest.raises(UsageError, match=r"The field `amount` of .*Scaled is .*, which a store cannot describe\. Use"):
        description(Scaled(amount))
