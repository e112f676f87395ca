"""Watching a model leaves it as it was."""

from __future__ import annotations

import pytest
from torch import nn

from kirsch.errors import UnknownNameError
from kirsch.frameworks.pytorch.sites import Watch


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("sites", [["0", "absent"], ["0/linear", "0", "absent"]])
def test_a_site_that_the_model_lacks_leaves_no_hook(sites):
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(UnknownNameError, match="There is no site in Sequential 'absent'"):
        Watch(model, sites)
    assert hooks(model) == 0
