"""One mechanism for everything that users choose by name."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType

import pytest

from kirsch import registry
from kirsch.errors import SurroundingsError, UnknownNameError, UsageError
from kirsch.registry import Registry


@pytest.fixture
def fruits() -> Registry[int]:
    found: Registry[int] = Registry("fruit")
    found.register("cherry")(1)
    found.register("apple")(2)
    return found


@pytest.fixture
def install(monkeypatch):
    """Installs packages with entry points of the group kirsch.fruit, given as name → module:attribute."""

    def put(*entries: tuple[str, str]) -> None:
        installed = EntryPoints(EntryPoint(name, value, "kirsch.fruit") for name, value in entries)
        monkeypatch.setattr(registry, "entry_points", lambda **wanted: installed.select(**wanted))

    foreign = ModuleType("foreign_fruits")
    foreign.plum = 7
    monkeypatch.setitem(sys.modules, "foreign_fruits", foreign)
    return put


def test_a_registered_thing_is_found_by_its_name(fruits):
    assert fruits["cherry"] == 1
    assert "cherry" in fruits


def test_registering_gives_the_thing_back(fruits):
    def plum() -> None: ...

    assert fruits.register("plum")(plum) is plum


def test_names_are_listed_in_order(fruits):
    assert list(fruits) == ["apple", "cherry"]


def test_a_name_is_taken_once(fruits):
    with pytest.raises(UsageError, match=r"The fruit 'cherry' is registered already\. Choose another name\."):
        fruits.register("cherry")(3)
    assert fruits["cherry"] == 1


def test_an_unknown_name_is_answered_with_the_known_ones_and_the_nearest(fruits):
    sentence = r"There is no fruit 'chery'\. Known: apple, cherry\. Did you mean 'cherry'\?"
    with pytest.raises(UnknownNameError, match=sentence):
        fruits["chery"]


def test_an_unknown_name_that_is_near_to_none_proposes_none(fruits):
    with pytest.raises(UnknownNameError, match=r"Known: apple, cherry\. Give one of these\.$"):
        fruits["zzz"]


def test_an_empty_registry_says_so():
    with pytest.raises(UnknownNameError, match=r"There is no fruit 'plum'\. There are none\."):
        Registry("fruit")["plum"]


def test_another_package_adds_its_thing_by_entry_point(fruits, install):
    install(("plum", "foreign_fruits:plum"))
    assert "plum" in fruits
    assert list(fruits) == ["apple", "cherry", "plum"]
    assert fruits["plum"] == 7


def test_entry_points_of_another_kind_are_not_taken(fruits, monkeypatch):
    installed = EntryPoints([EntryPoint("plum", "foreign_fruits:plum", "kirsch.stone")])
    monkeypatch.setattr(registry, "entry_points", lambda **wanted: installed.select(**wanted))
    with pytest.raises(UnknownNameError, match="There is no fruit 'plum'"):
        fruits["plum"]


def test_an_entry_point_whose_module_registers_itself_is_no_duplicate(fruits, install, monkeypatch):
    """The module of an entry point will often use the decorator too."""

    def load(_self: EntryPoint) -> int:
        return fruits.register("plum")(7)

    install(("plum", "foreign_fruits:plum"))
    monkeypatch.setattr(EntryPoint, "load", load)
    assert fruits["plum"] == 7


def test_a_broken_package_costs_nothing_to_those_who_do_not_use_it(fruits, install):
    install(("rotten", "no_such_module:rotten"))
    assert fruits["cherry"] == 1
    assert list(fruits) == ["apple", "cherry", "rotten"]
    with pytest.raises(UnknownNameError, match="There is no fruit 'plum'"):
        fruits["plum"]


def test_a_broken_package_is_named_to_those_who_use_it(fruits, install):
    install(("rotten", "no_such_module:rotten"))
    sentence = r"The fruit 'rotten' cannot be loaded from no_such_module:rotten\. ModuleNotFoundError: No module"
    with pytest.raises(SurroundingsError, match=sentence):
        fruits["rotten"]


def test_two_packages_that_bring_one_name_are_both_named(fruits, install):
    install(("plum", "foreign_fruits:plum"), ("plum", "other_fruits:plum"))
    with pytest.raises(UsageError, match=r"It comes from foreign_fruits:plum and other_fruits:plum\."):
        fruits["plum"]


def test_own_names_win_over_those_of_other_packages(fruits, install):
    install(("cherry", "foreign_fruits:plum"))
    assert fruits["cherry"] == 1
