"""`kirsch.prune(..., compensate="batch_norm")`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UsageError
from trace_and_cut import with_noise

BATCHES = [torch.randn(12, 3, 6, 6), 2 + torch.randn(5, 3, 6, 6)]


def build():
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    return with_noise(nn.Sequential(*layers, nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, 4)))


@pytest.fixture
def case(removing):
    model = build()
    return model, removing(model, BATCHES[0][:2], {"0": [1, 6], "3": [0]})


def estimated(model, plan):
    """Return the pruned model without the warning that random statistics of the original give."""
    return kirsch.prune_with_verification(model, plan, compensate="batch_norm", data=BATCHES).model


def test_statistics_are_the_means_over_the_samples_of_the_statistics_of_their_batches(case):
    model, plan = case
    plain, small = kirsch.prune(model, plan), estimated(model, plan)

    def normalized(x, norm):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    maps = [plain[0](x) for x in BATCHES]
    for index, layer in ((1, plain[3]), (4, None)):
        for name, statistic in (
            ("running_mean", lambda x: x.mean((0, 2, 3))),
            ("running_var", lambda x: x.var((0, 2, 3))),
        ):
            expected = sum(len(x) * statistic(x) for x in maps) / 17
            torch.testing.assert_close(getattr(small[index], name), expected, rtol=1e-4, atol=1e-5)
        if layer is not None:
            maps = [layer(normalized(x, plain[index]).relu()) for x in maps]
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), plain.parameters(), strict=True))


def test_settings_and_modes_of_batch_normalization_are_restored(case):
    model, plan = case
    model[1].momentum, model[4].momentum = None, 0.3
    model[1].num_batches_tracked.fill_(7)
    small = estimated(model, plan)
    assert (small[1].momentum, small[4].momentum, int(small[1].num_batches_tracked)) == (None, 0.3, 7)
    assert not any(module.training for module in small.modules())


def test_layers_without_running_statistics_are_not_changed(removing):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.plain, self.free = nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)
            self.instance = nn.InstanceNorm2d(8, track_running_stats=True)

        def forward(self, x):
            return self.head(self.instance(self.free(self.plain(self.stem(x)))))

    model = with_noise(Norms())
    plan = removing(model, BATCHES[0][:2], {"stem": [0]})
    found = kirsch.prune_with_verification(model, plan, compensate="batch_norm", data=BATCHES)
    assert found.compensation.batch_norms == ("plain",)
    assert torch.equal(found.model.instance.running_mean, model.instance.running_mean[1:])


def test_a_plan_of_blocks_can_be_followed_by_an_estimate_of_the_statistics():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return x + self.norm(self.conv(x)).relu()

    model = with_noise(nn.Sequential(*(Block() for _ in range(3)), nn.Conv2d(3, 2, 1)))
    plan = kirsch.plan(kirsch.trace(model, BATCHES[0][:2]), kirsch.Goal(macs=0.8), kinds="block", data=BATCHES)
    found = kirsch.prune_with_verification(model, plan, compensate="batch_norm", data=BATCHES)
    assert len(found.compensation.batch_norms) == 2


def test_padding_is_refused(removing):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.norm(self.embed(input_ids).mT).mT)

    ids = torch.randint(0, 9, (4, 5))
    model, mask = with_noise(Net()), torch.ones(4, 5)
    mask[0, 3:] = 0
    plan = removing(model, {"input_ids": ids}, {"norm": [0]})
    with pytest.raises(UsageError, match="batches with padding"):
        kirsch.prune(model, plan, compensate="batch_norm", data=[{"input_ids": ids, "attention_mask": mask}])
