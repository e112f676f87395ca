"""SST-2: distill a BERT with six layers, without pretraining, into one with two layers."""

from __future__ import annotations

import collections
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import kirsch
from kirsch import figures
from kirsch.data.batches import ArrayData
from kirsch.data.sources.cifar10 import data_folder
from kirsch.distillation.distill import fit
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.pytorch.io.vision import import_beside
from kirsch.frameworks.training import TrainingHooks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

import_beside("torchvision")
transformers = import_beside("transformers")

ROOT = Path(__file__).parents[1]
LENGTH, WORDS, WIDTH, HEADS = 32, 8_000, 64, 4
"""Tokens per sentence, largest size of the vocabulary, hidden size, number of heads."""
PADDING, UNKNOWN, FIRST = 0, 1, 2
"""Token ids of padding, of a word that is not in the vocabulary, and of the first token, whose output is classified."""
TRAINING = kirsch.Training(
    epochs=6, learning_rate=1e-3, optimizer="adamw", weight_decay=0.01, warmup_epochs=0.5, max_grad_norm=1.0
)
TITLES = {"sst2": "SST-2, six layers into two"}


def objectives(_task: str) -> dict[str, Objective]:
    """Return the compared objectives. MiniLM does not train the classifier, so soft targets are added."""
    minilm = dataclasses.replace(Objective.preset("minilm").terms[0], options={"heads": 8})
    return {
        "labels only": Objective.labels(),
        "kd": Objective.kd(temperature=2.0, weight=0.9),
        "distilbert": Objective.preset("distilbert"),
        "minilm, with kd": Objective((Term("kd", 0.9, temperature=2.0), minilm), label_weight=0.1),
    }


@cache
def sentences(part: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the sentences of a part and their classes."""
    lines = (data_folder() / "sst2" / f"{part}.tsv").read_text().splitlines()
    pairs = [line.rsplit("\t", 1) for line in lines]
    return [text for text, _ in pairs], np.array([int(label) for _, label in pairs])


@cache
def vocabulary() -> dict[str, int]:
    """Return the token ids of words that occur at least twice in the training sentences, by frequency."""
    counts = collections.Counter(word for text in sentences("train")[0] for word in words(text))
    kept = [word for word, count in counts.most_common(WORDS) if count > 1]
    return {word: number for number, word in enumerate(kept, FIRST + 1)}


def words(text: str) -> list[str]:
    """Return the words and punctuation marks of a sentence."""
    return re.findall(r"[a-z']+|[^\sa-z]", text.lower())


@cache
def encoded(part: str) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Return tokens (N, L) with their mask, and classes (N,)."""
    texts, labels = sentences(part)
    tokens = np.full((len(texts), LENGTH), PADDING)
    for row, text in zip(tokens, texts, strict=True):
        numbers = [FIRST, *(vocabulary().get(word, UNKNOWN) for word in words(text))][:LENGTH]
        row[: len(numbers)] = numbers
    return {"input_ids": tokens, "attention_mask": (tokens != PADDING).astype(np.int64)}, labels


def network(layers: int) -> nn.Module:
    """Return a BERT classifier with the given number of layers."""
    config = transformers.BertConfig(
        vocab_size=len(vocabulary()) + FIRST + 1,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        num_labels=2,
        pad_token_id=PADDING,
        hidden_dropout_prob=0.2,
        attn_implementation="eager",
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


@cache
def teacher() -> nn.Module:
    """Return the teacher, which is trained once and stored as safetensors."""
    torch.manual_seed(0)
    model, file = network(6), ROOT / "build" / "distillation" / "teacher-text.safetensors"
    framework = framework_of(model)
    if file.is_file():
        framework.inference.load_weights(model, file)
        return model.eval()
    inputs, labels = encoded("train")
    model = fit(
        model, ArrayData(inputs, labels, batch_size=64), training=TRAINING, hooks=TrainingHooks(event=print)
    ).model
    file.parent.mkdir(parents=True, exist_ok=True)
    framework.inference.save_weights(model, file)
    return model


def accuracy(model: nn.Module) -> float:
    """Return the accuracy on the 1,821 test sentences."""
    inputs, labels = encoded("test")
    return float((framework_of(model).inference.predict(model, inputs).argmax(-1) == labels).mean())


def bag_of_words() -> float:
    """Return the test accuracy of logistic regression on the set of words of a sentence."""
    vectorizer = CountVectorizer(tokenizer=words, token_pattern=None, binary=True)
    model = LogisticRegression(max_iter=1000).fit(
        vectorizer.fit_transform(sentences("train")[0]), sentences("train")[1]
    )
    return float(model.score(vectorizer.transform(sentences("test")[0]), sentences("test")[1]))


def prepare() -> None:
    """Train the teacher."""
    teacher()


def about(_task: str) -> str:
    """Return a description of teacher, students, data and training."""
    counts = [figures.count(sum(p.numel() for p in network(layers).parameters())) for layers in (6, 2)]
    return (
        f"Teacher and students are BERT models of width {WIDTH}, trained on 6,920 sentences for {TRAINING.epochs} "
        f"epochs with AdamW, without pretraining. The teacher has 6 layers ({counts[0]} parameters) and classifies "
        f"{accuracy(teacher()):.1%} of the 1,821 test sentences correctly. The students have 2 layers ({counts[1]} "
        f"parameters). Logistic regression on the words of a sentence reaches {bag_of_words():.1%}."
    )


def run(task: str, objective: str, seed: int) -> dict[str, Any]:
    """Train a student; return its test accuracy, gradient shares and warnings."""
    torch.manual_seed(seed)
    student, (inputs, labels) = network(2), encoded("train")
    training = TRAINING.changed(seed=seed)
    warnings: list[str] = []
    hooks = TrainingHooks(event=lambda event: warnings.append(event["text"]) if "text" in event else None)
    trained = kirsch.distill(
        student,
        teacher(),
        ArrayData(inputs, labels, batch_size=64),
        objective=objectives(task)[objective],
        training=training,
        hooks=hooks,
    )
    return {
        "accuracy": accuracy(trained.model),
        "shares": trained.history[-1]["gradient_shares"],
        "warnings": warnings,
    }
