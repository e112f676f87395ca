"""The output with the logits is found by the names of the outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.data.batches import ArrayData
from kirsch.errors import UsageError
from kirsch.frameworks.predictions import logits_output


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["output"], "output"),
        (["0", "1.0"], "0"),
        (["output_0", "output_1"], "output_0"),
        (["embedding", "logits"], "logits"),
        (["loss", "cls_logits", "hidden_states_0"], "cls_logits"),
        (["out", "aux"], "out"),
        (["aux", "out"], "out"),
        (["loss", "reconstruction", "hidden_states.0", "attentions.0"], "reconstruction"),
        (["prediction"], "prediction"),
        (["loss", "prediction", "cache.layers.0.keys"], "prediction"),
    ],
)
def test_the_logits_are_found_by_the_names_of_the_outputs(names, expected):
    assert logits_output(names) == expected


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["embedding", "scores"],
            r"returns embedding, scores, and none of them is named logits\..* Name the output",
        ),
        (["start_logits", "end_logits"], "returns start_logits, end_logits, and none of them is named logits"),
        (["last_hidden_state", "pooler_output"], "returns last_hidden_state and no logits: it has no head"),
    ],
)
def test_output_names_that_do_not_identify_the_logits_raise_an_error(names, sentence):
    with pytest.raises(UsageError, match=sentence):
        logits_output(names)


class Embedding(nn.Module):
    """Model that returns an embedding, and logits under the given name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.body, self.head = name, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        embedding = torch.relu(self.body(x))
        return {"embedding": embedding, self.name: self.head(embedding)}


def test_a_dict_without_logits_is_not_distilled_by_its_first_output():
    data = ArrayData(np.random.default_rng(0).random((8, 4)).astype(np.float32), np.arange(8) % 3)
    with pytest.raises(UsageError, match="returns embedding, scores, and none of them is named logits"):
        kirsch.distill(Embedding("scores"), Embedding("scores"), data)
    options = {"training": kirsch.Training(epochs=1), "check_teacher": False}
    assert kirsch.distill(Embedding("logits"), Embedding("logits"), data, **options).history
