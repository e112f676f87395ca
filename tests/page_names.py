"""Variables that the code on a page uses and does not define, such as the model and the data, by page and section."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import kirsch
from kirsch.frameworks.pytorch.io.vision import import_beside

import_beside("torchvision")  # imported by timm, transformers and Lightning

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = 10


def build_my_model() -> nn.Module:
    """Return a model with fixed weights that separates bright and dark images, before and after pruning."""
    model = nn.Sequential(nn.Conv2d(3, 8, 7, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.fill_(1 / 147).mul_(torch.linspace(1, 2, 8).view(8, 1, 1, 1))
        model[4].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 8))
        model[4].bias.copy_(torch.tensor([2.0, -2.0]))
    return model


MODEL = """
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 4), nn.ReLU(), nn.Conv2d(16, 16, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )


build.example_shape = (1, 3, 64, 64)
"""


def readme() -> dict[str, Any]:
    Path("model.py").write_text(MODEL)
    labels = np.arange(16) % 2
    # Two labels differ from the teacher's predictions, so both terms have a gradient.
    brightness = labels ^ (np.arange(16) < 2)
    images = np.random.default_rng(0).normal(brightness[:, None, None, None], 1, (16, 3, 224, 224)).astype(np.float32)
    batches = torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(labels))
    return {
        "build_my_model": build_my_model,
        "train_loader": torch.utils.data.DataLoader(batches, batch_size=8),
        "images": images,
        "labels": labels,
        "validation": (images, labels),
        "test": (images, labels),
    }


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.ReLU(), nn.Linear(width, CLASSES))


def samples() -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(32) % CLASSES
    images = np.random.default_rng(0).normal(0, 1, (32, 3, 4, 4)).astype(np.float32)
    return images, labels


def own_loop() -> dict[str, Any]:
    images, labels = samples()
    return {
        "kirsch": kirsch,
        "torch": torch,
        "student": network(8),
        "teacher": network(32),
        "objective": kirsch.Objective.kd(),
        "loader": [(torch.tensor(images), torch.tensor(labels))],
        "epochs": 2,
    }


def store() -> dict[str, Any]:
    images, labels = samples()
    return {"inputs": images, "labels": labels, "teacher": network(32)}


def trainer() -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    def build(width: int) -> nn.Module:
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=width, n_layer=1, n_head=2))

    tokens = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (8, 8))]
    return {
        "student": build(8),
        "teacher": build(16),
        "args": TrainingArguments("trained", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True),
        "train": tokens,
        "validation": tokens,
    }


def module() -> dict[str, Any]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network(8)

        def training_step(self, batch: Any) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            images, labels = samples()
            return torch.utils.data.DataLoader(list(zip(torch.tensor(images), torch.tensor(labels), strict=True)), 8)

    return {"lightning": lightning, "module": Module(), "teacher": network(32)}


def flowers() -> dict[str, Any]:
    def read(size: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((1200, 3, size, size), np.float32), np.arange(1200) % 3

    return {"numpy": np, "read": read}


def bright_images(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Return images that are brighter for higher class numbers."""
    labels = np.arange(count) % 3
    return np.random.default_rng(0).normal(labels[:, None, None, None], 0.1, (count, 1, 4, 4)).astype(
        np.float32
    ), labels


def brightness_model() -> nn.Module:
    """Return a trained model for `bright_images`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(64, 3))
    training = kirsch.Training(epochs=15, optimizer="adamw", learning_rate=0.01)
    return kirsch.fit(model, kirsch.ArrayData(*bright_images(), batch_size=8), training=training).model


def loaders() -> dict[str, Any]:
    images, labels = bright_images()
    samples = torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(labels))
    names = ("train_loader", "validation_loader", "test_loader")
    return {"model": brightness_model(), **{name: torch.utils.data.DataLoader(samples, 16) for name in names}}


def job() -> dict[str, Any]:
    part = kirsch.Split(*bright_images())
    return {
        "model": brightness_model(),
        "data": kirsch.DataSet("brightness", part, part, part, classes=("a", "b", "c")),
    }


def calibration() -> dict[str, Any]:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    return {"model": model.eval(), "images": torch.randn(8, 3, 9, 9), "labels": torch.arange(8) % 2}


def sparse() -> dict[str, Any]:
    images, labels = torch.randn(16, 8, 4, 4), torch.arange(16) % 3
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    return {"kirsch": kirsch, "torch": torch, "model": model.eval(), "loader": [(images, labels)] * 3}


def normalized() -> dict[str, Any]:
    """Return a convolutional model with batch normalization whose statistics are those of the images."""
    torch.manual_seed(0)
    images, norm = torch.randn(64, 3, 9, 9), nn.BatchNorm2d(16, momentum=1.0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(400, 2))
    model(images)
    return {"model": model.eval(), "images": images}


def stages() -> dict[str, Any]:
    layers = {
        "layer3": nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        "layer4": nn.Sequential(OrderedDict([("0", nn.Sequential(OrderedDict(conv1=nn.Conv2d(16, 64, 3))))])),
        "tail": nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "fc1": nn.Linear(64, 16),
        "act": nn.ReLU(),
        "fc": nn.Linear(16, 4),
    }
    images = torch.randn(4, 3, 12, 12)
    return {"graph": kirsch.trace(nn.Sequential(OrderedDict(layers)).eval(), images[:1]), "images": images}


def rounds() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)
    )
    images, labels = samples()
    return {
        "model": model,
        "inputs": torch.tensor(images[:1]),
        "data": kirsch.ArrayData(images, labels, batch_size=16),
    }


def classified() -> dict[str, Any]:
    """Return a classifier of bright and dark images by its hidden units, of which two are enough."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.outer(torch.linspace(1, 0, 16), torch.ones(12)))
        model[1].bias.zero_()
        model[3].weight.copy_(torch.stack([torch.zeros(16), torch.ones(16)]))
        model[3].bias.copy_(torch.tensor([0.5, 0.0]))
    labels = np.arange(32) % 2
    images = np.ones((32, 3, 2, 2), np.float32) * (2 * labels - 1)[:, None, None, None].astype(np.float32)
    return {"graph": kirsch.trace(model, torch.tensor(images[:1])), "images": images, "labels": labels}


NAMES: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
    ("README.md", "Your own model"): readme,
    ("docs/importances.md", "Importances"): calibration,
    ("docs/allocation.md", "Widths by measured output changes"): stages,
    ("docs/allocation.md", "Several rounds"): rounds,
    ("docs/allocation.md", "Widths by hand"): stages,
    ("docs/sparsity.md", "A growing sparsity"): sparse,
    ("docs/allocation.md", "A largest drop of accuracy"): classified,
    ("docs/compensation.md", "Compensation without training"): normalized,
    ("docs/learned_pruning.md", "Widths by search"): calibration,
    ("docs/learned_pruning.md", "Regularizers"): calibration,
    ("docs/store.md", "The teacher store"): store,
    ("docs/training.md", "A loop of your own"): own_loop,
    ("docs/training.md", "transformers"): trainer,
    ("docs/training.md", "Lightning"): module,
    ("docs/training.md", "Data of `kirsch.compress`"): loaders,
    ("docs/training.md", "Data of a recipe"): flowers,
    ("docs/recipes.md", "Steps in Python"): job,
}
"""Page and section → function that returns the variables for the code blocks of this section and later ones."""
