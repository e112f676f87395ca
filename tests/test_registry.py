"""Registration, entry points and unknown names of a registry."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType

import pytest

from kirsch import registry
from kirsch.errors import RequirementError, UnknownNameError, UsageError
from kirsch.registry import Registry


@pytest.fixture
def fruits() -> Registry[int]:
    found: Registry[int] = Registry("fruit")
    found.register("cherry")(1)
    found.register("apple")(2)
    return found


@pytest.fixture
def install(monkeypatch):
    """Return a function that installs entry points of the group kirsch.fruit, each a pair (name, module:attribute)."""

    def put(*entries: tuple[str, str]) -> None:
        installed = EntryPoints(EntryPoint(name, value, "kirsch.fruit") for name, value in entries)
        monkeypatch.setattr(registry, "entry_points", lambda **wanted: installed.select(**wanted))

    foreign = ModuleType("foreign_fruits")
    foreign.plum = 7
    monkeypatch.setitem(sys.modules, "foreign_fruits", foreign)
    return put


def test_a_registered_object_is_found_by_name(fruits):
    assert fruits["cherry"] == 1
    assert "cherry" in fruits


def test_register_returns_the_object(fruits):
    def plum() -> None: ...

    assert fruits.register("plum")(plum) is plum


def test_names_are_sorted(fruits):
    assert list(fruits) == ["apple", "cherry"]


def test_a_duplicate_name_is_refused(fruits):
    with pytest.raises(UsageError, match=r"The fruit 'cherry' is registered already\. Choose another name\."):
        fruits.register("cherry")(3)
    assert fruits["cherry"] == 1


def test_an_unknown_name_lists_the_known_names_and_the_nearest(fruits):
    sentence = r"There is no fruit 'chery'\. Known: apple, cherry\. Did you mean 'cherry'\?"
    with pytest.raises(UnknownNameError, match=sentence):
        fruits["chery"]


def test_an_unknown_name_without_a_near_name_has_no_suggestion(fruits):
    with pytest.raises(UnknownNameError, match=r"Known: apple, cherry\. Give one of these\.$"):
        fruits["zzz"]


def test_an_unknown_name_of_an_empty_registry_lists_no_names():
    with pytest.raises(UnknownNameError, match=r"There is no fruit 'plum'\. No names are known\."):
        Registry("fruit")["plum"]


def test_an_object_of_another_package_is_loaded_from_its_entry_point(fruits, install):
    install(("plum", "foreign_fruits:plum"))
    assert "plum" in fruits
    assert list(fruits) == ["apple", "cherry", "plum"]
    assert fruits["plum"] == 7


def test_entry_points_of_another_group_are_ignored(fruits, monkeypatch):
    installed = EntryPoints([EntryPoint("plum", "foreign_fruits:plum", "kirsch.stone")])
    monkeypatch.setattr(registry, "entry_points", lambda **wanted: installed.select(**wanted))
    with pytest.raises(UnknownNameError, match="There is no fruit 'plum'"):
        fruits["plum"]


def test_the_entry_point_group_of_a_kind_of_two_words_has_an_underscore(install, monkeypatch):
    installed = EntryPoints([EntryPoint("plum", "foreign_fruits:plum", "kirsch.stone_fruit")])
    install()
    monkeypatch.setattr(registry, "entry_points", lambda **wanted: installed.select(**wanted))
    assert Registry("stone fruit")["plum"] == 7


def test_an_entry_point_whose_module_uses_the_decorator_is_not_a_duplicate(fruits, install, monkeypatch):
    def load(_self: EntryPoint) -> int:
        return fruits.register("plum")(7)

    install(("plum", "foreign_fruits:plum"))
    monkeypatch.setattr(EntryPoint, "load", load)
    assert fruits["plum"] == 7


def test_an_object_that_cannot_be_loaded_does_not_affect_other_names(fruits, install):
    install(("rotten", "no_such_module:rotten"))
    assert fruits["cherry"] == 1
    assert list(fruits) == ["apple", "cherry", "rotten"]
    with pytest.raises(UnknownNameError, match="There is no fruit 'plum'"):
        fruits["plum"]


def test_an_object_that_cannot_be_loaded_is_named_when_it_is_used(fruits, install):
    install(("rotten", "no_such_module:rotten"))
    sentence = r"The fruit 'rotten' cannot be loaded from no_such_module:rotten\. ModuleNotFoundError: No module"
    with pytest.raises(RequirementError, match=sentence):
        fruits["rotten"]


def test_two_packages_with_the_same_name_are_both_listed(fruits, install):
    install(("plum", "foreign_fruits:plum"), ("plum", "other_fruits:plum"))
    with pytest.raises(UsageError, match=r"The entry points are foreign_fruits:plum and other_fruits:plum\."):
        fruits["plum"]


def test_registered_names_take_precedence_over_entry_points(fruits, install):
    install(("cherry", "foreign_fruits:plum"))
    assert fruits["cherry"] == 1
