"""SST-2: a BERT with two layers, trained from random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from distill_text import FIRST, LENGTH, PADDING, accuracy, bag_of_words, encoded, transformers, vocabulary

import kirsch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

WIDTH, HIDDEN, BATCH, CALIBRATION, SHORT = 64, 256, 64, 256, 3_200
"""Hidden size, FFN width, sentences of a batch, of the importances and of the recovery, which reads each once."""
COST, GOALS, MULTIPLE = "macs", (0.8, 0.65, 0.5, 0.3), 4
"""Cost that the goals limit, the goals, and a number that divides all hidden sizes of small models."""
IMPORTANCES = ("magnitude", "taylor", "fisher", "wanda", "activation", "flap", "movement", "random")
LOADABLE = ("magnitude", "taylor")
RANKINGS = ("per_cost", "milp")
TRAINING = kirsch.Training(
    epochs=6, learning_rate=1e-3, optimizer="adamw", weight_decay=0.01, warmup_epochs=0.5, max_grad_norm=1.0
)
RECOVERY = TRAINING.changed(epochs=1, learning_rate=5e-4, warmup_epochs=0.1)
DISTILLATION = kirsch.Objective.kd(temperature=2.0)

__all__ = ["bag_of_words"]


def config(width: int = WIDTH, hidden: int = HIDDEN) -> Any:
    """Return the configuration of a BERT with two layers and four heads."""
    return transformers.BertConfig(
        vocab_size=len(vocabulary()) + FIRST + 1,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=hidden,
        max_position_embeddings=LENGTH,
        num_labels=2,
        pad_token_id=PADDING,
        hidden_dropout_prob=0.2,
    )


def network(width: int = WIDTH, hidden: int = HIDDEN) -> nn.Module:
    """Return a BERT classifier."""
    model: nn.Module = transformers.BertForSequenceClassification(config(width, hidden))
    return model


def example() -> dict[str, torch.Tensor]:
    """Return the inputs of one sentence."""
    return {name: torch.from_numpy(values[:1]) for name, values in encoded("train")[0].items()}


def samples(rows: np.ndarray | slice = slice(None)) -> kirsch.ArrayData:
    """Return training sentences with their classes."""
    inputs, labels = encoded("train")
    return kirsch.ArrayData({name: values[rows] for name, values in inputs.items()}, labels[rows], batch_size=BATCH)


def train(model: nn.Module, seed: int, *, scores_file: Path | None = None) -> nn.Module:
    """Return the trained model. The scores of "movement" in this training are written to `scores_file`."""
    movement = kirsch.Movement(kirsch.trace(model.eval(), example()))
    hooks = kirsch.TrainingHooks(before_step=movement)
    trained = kirsch.fit(model, samples(), training=TRAINING.changed(seed=seed), hooks=hooks, progress=False).model
    if scores_file is not None:
        scores_file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(scores_file, **movement.scores())
    return trained


def recover(student: nn.Module, teacher: nn.Module, seed: int, *, rate: float = RECOVERY.learning_rate) -> nn.Module:
    """Return the student after a short distillation from the dense model."""
    rows = np.random.default_rng(seed).permutation(len(encoded("train")[1]))[:SHORT]
    training = RECOVERY.changed(seed=seed, learning_rate=rate)
    data = samples(rows)
    return kirsch.distill(student, teacher, data, objective=DISTILLATION, training=training, progress=False).model


def calibration(seed: int) -> dict[str, Any]:
    """Return data and loss for importances that run the model."""
    chosen = np.random.default_rng(seed).permutation(len(encoded("train")[1]))[:CALIBRATION]
    inputs, labels = encoded("train")
    batch = {name: torch.from_numpy(values[chosen]) for name, values in inputs.items()}
    return {"data": [(batch, torch.from_numpy(labels[chosen]))], "loss": "cross-entropy"}


def quality(model: nn.Module) -> float:
    """Return the accuracy on the test sentences, in percent."""
    return 100 * accuracy(model)


TITLE = "A BERT, on SST-2"
ABOUT = (
    "Accuracy on the 1,821 test sentences in percent; mean of {seeds} seeds ± standard deviation. The standard error "
    "of one accuracy from the number of sentences is 0.9 points. The goals are on the MACs, because most of the "
    "{parameters} parameters are in the embedding table. The dense model has {macs} MACs per sentence (hidden size "
    f"{WIDTH}, FFN width {HIDDEN}, 2 layers, 4 heads). It is trained from random weights on the 6,920 training "
    f"sentences for {TRAINING.epochs} epochs, and reaches {{quality}}. `movement` is `kirsch.Movement` during this "
    "training. The recovery is `kirsch.distill` with `Objective.kd(temperature=2.0)` on "
    f"{SHORT:,} sentences, read once: {SHORT // BATCH} steps of {BATCH} sentences. Importances that run the model use "
    f"{CALIBRATION} sentences. CPU time of all rows: {{minutes:.0f}} minutes of one core."
)
