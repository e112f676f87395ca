"""The code in the READMEs runs as written, and both READMEs show the same code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import kirsch

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def build_my_model():
    """Return a model with fixed weights that tells bright from dark images, also after pruning."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 7, 16),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 2),
    )
    with torch.no_grad():
        model[0].weight.fill_(1 / 147).mul_(torch.linspace(1, 2, 8).view(8, 1, 1, 1))
        model[4].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 8))
        model[4].bias.copy_(torch.tensor([2.0, -2.0]))
    return model


def test_the_snippets_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labels = np.arange(16) % 2
    brightness = labels ^ (np.arange(16) < 2)  # two labels differ from the teacher, so both terms have a gradient
    images = np.random.default_rng(0).normal(brightness[:, None, None, None], 1, (16, 3, 224, 224)).astype(np.float32)
    batches = torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(labels))
    names = {
        "build_my_model": build_my_model,
        "train_loader": torch.utils.data.DataLoader(batches, batch_size=8),
        "images": images,
        "labels": labels,
        "validation": (images, labels),
        "test": (images, labels),
    }
    for snippet in snippets(ENGLISH):
        exec(compile(snippet, "README.md", "exec"), names)
    assert kirsch.load("small", build_my_model)
    assert names["result"].artifact.path.exists()
    assert str(names["result"].report) in capsys.readouterr().out


def test_both_languages_show_the_same_code_commands_and_numbers():
    def shown(text):
        blocks = re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        code = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
        return code, re.findall(r"\d[\d.,]*\d", "".join(line for line in text.splitlines(True) if line.startswith("|")))

    assert shown(ENGLISH) == shown(CHINESE)
