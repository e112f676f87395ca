"""Small models with a configuration like those of the transformers library."""

from __future__ import annotations

import torch

from kirsch.frameworks.pytorch.transformers.blueprint import with_numbers


class Config:
    """A configuration like those of transformers, whose width must be a multiple of the heads."""

    def __init__(self, width=24, heads=4, ffn=32, depth=3, kinds=("a", "b", "a"), **_):
        self.width, self.heads, self.ffn, self.depth, self.kinds = width, heads, ffn, depth, list(kinds)
        if width % heads or len(self.kinds) != depth:
            raise ValueError("the numbers do not fit")

    def to_dict(self):
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class Layer(torch.nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        self.up, self.down = torch.nn.Linear(config.width, config.ffn), torch.nn.Linear(config.ffn, config.width)
        self.q, self.v = torch.nn.Linear(config.width, config.width), torch.nn.Linear(config.width, config.width)
        self.heads, self.kind, self.scale = config.heads, kind, (config.width // config.heads) ** -0.5

    def forward(self, x):
        shape = (*x.shape[:2], self.heads, -1)
        q, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.v))
        x = x + ((q @ q.transpose(2, 3) * self.scale).sigmoid() @ v).transpose(1, 2).flatten(2) * 0.1
        return x + self.down(self.up(x).relu())


class Small(torch.nn.Module):
    """A model whose head width follows from width and heads, and whose layers have two types."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = torch.nn.Linear(5, config.width)
        self.layers = torch.nn.ModuleList(Layer(config, kind) for kind in config.kinds)
        self.last = torch.nn.Linear(config.width, 3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)

    def save_pretrained(self, folder):
        raise NotImplementedError


class Tied(torch.nn.Module):
    """A model whose configuration states a width that no group of units has by itself."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first, self.last = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3)

    forward = lambda self, x: self.last(self.first(x).relu())  # noqa: E731

    def save_pretrained(self, folder):
        raise NotImplementedError


INPUT = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


def assert_configuration_builds(model):
    built = type(model)(with_numbers(model.config, {})).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(INPUT), model(INPUT))
