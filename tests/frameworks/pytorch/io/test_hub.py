"""Models of timm by name, and the errors if timm is missing, broken, or lacks the name."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from torch import nn

from kirsch.errors import LoadError, MissingExtraError, RequirementError
from kirsch.frameworks.pytorch.io import hub
from kirsch.frameworks.pytorch.io.hub import from_timm


@pytest.fixture
def timm(monkeypatch):
    """Return a stand-in for timm with two models. `created` records the calls; the next call raises `error`, if set."""
    names = ["resnet18", "resnet50"]
    fake = SimpleNamespace(is_model=names.__contains__, list_models=lambda: names, created=[])

    def create_model(name, *, pretrained):
        fake.created.append((name, pretrained))
        if isinstance(fake.error, Exception):
            raise fake.error
        return nn.Linear(2, 2)

    fake.create_model, fake.error = create_model, None
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_model_is_created_by_its_name(timm, pretrained):
    assert isinstance(from_timm("resnet18", pretrained=pretrained), nn.Linear)
    assert timm.created == [("resnet18", pretrained)]


def test_the_error_for_an_unknown_name_proposes_the_nearest(timm):
    with pytest.raises(LoadError, match=r"no timm model 'resnet81'.*Did you mean 'resnet18'\?"):
        from_timm("resnet81", pretrained=False)


def test_the_error_for_weights_that_cannot_be_downloaded_has_one_line(timm):
    timm.error = OSError("no route to host.\nand forty more lines")
    with pytest.raises(
        LoadError, match=r"^The weights of timm:resnet18 cannot be downloaded\. OSError: no route to host\. "
    ):
        from_timm("resnet18", pretrained=True)


def test_the_error_for_a_model_that_cannot_be_built_does_not_mention_the_network(timm):
    timm.error = AssertionError()
    with pytest.raises(LoadError, match=r"^timm:resnet18 cannot be built\. AssertionError without a message\.$"):
        from_timm("resnet18", pretrained=False)


def test_the_error_for_a_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"'timm' is not installed.*kirsch\[zoo\]"):
        from_timm("resnet18", pretrained=False)


def test_the_error_for_a_broken_timm_gives_the_cause(monkeypatch):
    def broken(name):
        raise RuntimeError("operator x::y is not there")

    monkeypatch.setattr(hub, "import_beside", broken)
    with pytest.raises(
        RequirementError, match=r"cannot be imported\. RuntimeError: operator x::y is not there\. Reinstall"
    ):
        from_timm("resnet18", pretrained=False)
