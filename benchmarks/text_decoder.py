"""Multi30k: a Llama of characters, trained on the English captions."""

from __future__ import annotations

import gzip
import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

import kirsch
from kirsch.data.sources.cifar10 import data_folder
from kirsch.frameworks.pytorch.io.vision import import_beside

if TYPE_CHECKING:
    from torch import nn

import_beside("torchvision")
transformers = import_beside("transformers")

LENGTH, WIDTH, HIDDEN, BATCH, CALIBRATION = 64, 64, 176, 32, 128
"""Characters of a sequence, hidden size, FFN width, sequences of a batch, sequences of the importances."""
SHORT = 1_600
"""Sequences of the recovery, each of which is read once."""
COST, GOALS, MULTIPLE = "parameters", (0.8, 0.65, 0.5), 8
"""Cost that the goals limit, the goals, and a number that divides all hidden sizes of small models."""
IMPORTANCES = ("magnitude", "taylor", "fisher", "wanda", "activation", "flap", "random")
LOADABLE = ("magnitude", "taylor", "random")
RANKINGS = ("per_cost", "isomorphic", "local", "milp")
TRAINING = kirsch.Training(
    epochs=1, learning_rate=4e-3, optimizer="adamw", weight_decay=0.01, warmup_epochs=0.1, max_grad_norm=1.0
)
RECOVERY = TRAINING.changed(epochs=1, learning_rate=2e-3)
PARTS = TRAIN, TEST = "train", "test_2016_flickr"
NEXT_TOKEN = kirsch.Objective(causal=True)
DISTILLATION = kirsch.Objective.preset("causal")


@cache
def sequences(part: str) -> torch.Tensor:
    """Return the captions of a part as sequences of characters, shape (N, L)."""
    texts = {name: gzip.decompress((data_folder() / f"multi30k/{name}.en.gz").read_bytes()).decode() for name in PARTS}
    characters = {character: number for number, character in enumerate(sorted(set("".join(texts.values()))))}
    text = texts[part]
    return torch.tensor([characters[c] for c in text[: len(text) // LENGTH * LENGTH]]).reshape(-1, LENGTH)


def network(width: int = WIDTH, hidden: int = HIDDEN) -> nn.Module:
    """Return a Llama with four layers, four query heads and two key and value heads."""
    config = transformers.LlamaConfig(
        vocab_size=int(max(sequences(part).max() for part in PARTS)) + 1,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def example() -> dict[str, torch.Tensor]:
    """Return the inputs of one sequence."""
    return {"input_ids": sequences(TRAIN)[:1]}


def samples(rows: torch.Tensor | slice = slice(None)) -> kirsch.ArrayData:
    """Return training sequences, which are their own labels."""
    tokens = sequences(TRAIN)[rows]
    return kirsch.ArrayData({"input_ids": tokens}, tokens, batch_size=BATCH)


def train(model: nn.Module, seed: int, **_unused: Any) -> nn.Module:
    """Return the model, trained to predict the next character."""
    training = TRAINING.changed(seed=seed)
    return kirsch.fit(model, samples(), objective=NEXT_TOKEN, training=training, progress=False).model


def recover(student: nn.Module, teacher: nn.Module, seed: int, *, rate: float = RECOVERY.learning_rate) -> nn.Module:
    """Return the student after a short distillation from the dense model."""
    rows = torch.randperm(len(sequences(TRAIN)), generator=torch.Generator().manual_seed(seed))[:SHORT]
    training = RECOVERY.changed(seed=seed, learning_rate=rate)
    data = samples(rows)
    return kirsch.distill(student, teacher, data, objective=DISTILLATION, training=training, progress=False).model


def calibration(seed: int) -> dict[str, Any]:
    """Return data and loss for importances that run the model."""
    rows = torch.randperm(len(sequences(TRAIN)), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    tokens = sequences(TRAIN)[rows]
    return {"data": [({"input_ids": tokens}, tokens)], "loss": "next-token"}


@torch.no_grad()
def quality(model: nn.Module) -> float:
    """Return the perplexity of a character of the test captions."""
    losses = [
        F.cross_entropy(model(input_ids=part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        for part in sequences(TEST).split(256)
    ]
    return math.exp(float(sum(losses)) / (len(sequences(TEST)) * (LENGTH - 1)))


TITLE = "A Llama of characters, on the English captions of Multi30k"
ABOUT = (
    "Perplexity of a character of the 1,000 test captions, lower is better; mean of {seeds} seeds ± standard "
    f"deviation. The dense model has {{parameters}} parameters (hidden size {WIDTH}, FFN width {HIDDEN}, 4 layers, "
    "4 query heads, 2 key and value heads). It reads the 1.8 million characters of the training captions once, in "
    f"sequences of {LENGTH}, and reaches {{quality}}. The recovery is `kirsch.distill` with "
    f'`Objective.preset("causal")` on {SHORT:,} sequences, read once: {SHORT // BATCH} steps of {BATCH} sequences. '
    f"Importances that run the model use {CALIBRATION} sequences. CPU time of all rows: {{minutes:.0f}} minutes of one "
    "core."
)
