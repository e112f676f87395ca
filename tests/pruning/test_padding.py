"""Padding does not count, whether the attention mask is given by name or by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch.errors import DataError
from kirsch.pruning.quality import Quality
from kirsch.tasks.padding import counted_tokens, token_mask

WORDS, WIDTH = 11, 8


class Causal(nn.Module):
    """A small causal language model without biases, whose outputs for padding depend on the tokens there."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        x = x + self.down(torch.relu(self.up(x)))
        if attention_mask is not None:
            x = x + 0 * attention_mask[..., None]
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Causal().eval()


@pytest.fixture(scope="module")
def graph(model):
    ids = torch.zeros(2, 6, dtype=torch.long)
    return kirsch.trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def ids_and_mask(padding):
    """Return tokens of five sequences, of which two to six count, with a token in the place of padding."""
    ids = torch.randint(0, WORDS, (5, 6), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6) < torch.tensor([2, 3, 4, 5, 6])[:, None]).long()
    return torch.where(mask == 1, ids, padding), mask


def by_name(ids, mask):
    return {"input_ids": ids, "attention_mask": mask}


def by_position(ids, mask):
    return ids, mask


FORMS = [(by_name, 3), (by_position, 3), (by_name, 7), (by_position, 7)]
"""Forms of the inputs, and the token of the padding; all must give the same result."""


def batches(*, labels):
    """Return the same calibration data in each of the `FORMS`."""
    pairs = [(form(*ids_and_mask(padding)), ids_and_mask(padding)[0]) for form, padding in FORMS]
    return [[(inputs, ids if labels else None)] for inputs, ids in pairs]


def weights(model):
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("importance", ["wanda", "sparsegpt"])
def test_sparsity_does_not_depend_on_padding(model, importance):
    found = [
        weights(kirsch.fold_masks(kirsch.sparsify(model, sparsity=0.5, importance=importance, data=data).model))
        for data in batches(labels=False)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_compensation_does_not_depend_on_padding(model, graph, method):
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.8), round_to=1)
    found = [kirsch.prune_with_verification(model, plan, compensate=method, data=d) for d in batches(labels=False)]
    for other in found[1:]:
        torch.testing.assert_close(weights(other.model), weights(found[0].model))
        assert other.compensation.output_errors == pytest.approx(found[0].compensation.output_errors, rel=1e-5)


@pytest.mark.parametrize("importance", ["taylor", "fisher", "snip", "wanda", "activation", "thinet"])
def test_importances_do_not_depend_on_padding(graph, importance):
    options = {"loss": "next-token"} if importance in ("taylor", "fisher", "snip") else {}
    found = [
        kirsch.plan(graph, kirsch.Goal(parameters=0.8), round_to=1, importance=importance, data=data, **options).groups
        for data in batches(labels=True)
    ]
    assert all(groups == found[0] for groups in found)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("ranking", ["milp", "legr"])
def test_rankings_that_run_the_model_do_not_depend_on_padding(graph, ranking, labels):
    options = {"evaluations": 6} if ranking == "legr" else {}
    found = [
        kirsch.plan(
            graph, kirsch.Goal(parameters=0.8), round_to=1, ranking=ranking, loss="next-token", data=data, **options
        )
        for data in batches(labels=labels)
    ]
    assert all(plan.groups == found[0].groups for plan in found)
    if ranking == "legr":
        for plan in found[1:]:
            assert plan.method["search"]["improvements"] == found[0].method["search"]["improvements"]


@pytest.mark.parametrize("metric", ["kl", "agreement", "output_r2", "next_token_accuracy"])
def test_the_quality_of_pruned_models_does_not_depend_on_padding(graph, metric):
    removal = kirsch.plan(graph, kirsch.Goal(parameters=0.8), round_to=1).groups
    found = [Quality(graph, data, metric).without(removal) for data in batches(labels=metric.startswith("next"))]
    count = sum(range(2, 7)) - (5 if metric.startswith("next") else 0)
    for each in found:
        assert each.value == pytest.approx(found[0].value, rel=1e-6)
        assert len(each.sample) == count


def test_the_tokens_of_inputs_without_labels_are_the_labels_of_next_tokens(graph):
    options = {"importance": "taylor", "loss": "next-token", "metric": "next_token_log_likelihood", "fractions": [0.5]}
    labeled, *found = (kirsch.sensitivity(graph, d, **options) for d in (*batches(labels=True), *batches(labels=False)))
    for other in found:
        assert other.original == pytest.approx(labeled.original)
        assert [point.quality for point in other.rows[0].points] == pytest.approx([labeled.rows[0].points[0].quality])
    with pytest.raises(DataError, match=r"Batch 1 of `data` has no labels\..*'accuracy' compares outputs with labels"):
        kirsch.sensitivity(graph, batches(labels=False)[0], metric="accuracy")


@pytest.mark.parametrize("importance", ["wanda", "activation", "thinet"])
def test_data_of_padding_alone_is_refused(model, graph, importance):
    ids, mask = ids_and_mask(3)
    with pytest.raises(DataError, match=r"contains only padding: the attention masks of all samples are 0"):
        kirsch.plan(graph, kirsch.Goal(parameters=0.8), importance=importance, data=[((ids, 0 * mask), ids)])
    with pytest.raises(DataError, match="contains only padding"):
        kirsch.sparsify(model, sparsity=0.5, importance="wanda", data=[((ids, 0 * mask), ids)])
    with pytest.raises(DataError, match="contains only padding"):
        kirsch.plan(graph, kirsch.Goal(parameters=0.8), ranking="legr", evaluations=4, data=[((ids, 0 * mask), None)])


# ------------------------------------------------------------------------------------------------ encoder-decoders


class Seq2Seq(nn.Module):
    """An encoder and a decoder; the outputs belong to the tokens of the decoder."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        mask = attention_mask[..., None].float()
        context = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        x = self.embedding(decoder_input_ids) + context[:, None] + 0 * decoder_attention_mask[..., None]
        return self.head(x + self.down(torch.relu(self.up(x))))


def sequences(padding):
    """Return inputs whose encoder and decoder have different padding of the same length."""
    ids, mask = ids_and_mask(padding)
    other = mask.flip(0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": torch.where(other == 1, ids.flip(0).clamp(max=WORDS - 1), padding),
        "decoder_attention_mask": other,
    }


@pytest.mark.parametrize("ranking", ["milp", "legr"])
def test_the_mask_of_the_decoder_tells_which_outputs_count(ranking):
    torch.manual_seed(0)
    graph = kirsch.trace(Seq2Seq().eval(), sequences(3))
    options = {"evaluations": 6} if ranking == "legr" else {}
    found = [
        kirsch.plan(
            graph, kirsch.Goal(parameters=0.8), round_to=1, ranking=ranking, data=[sequences(padding)], **options
        )
        for padding in (3, 7)
    ]
    assert found[0].groups == found[1].groups
    if ranking == "legr":
        first, second = (np.array(plan.method["search"]["improvements"], float) for plan in found)
        np.testing.assert_allclose(first, second, rtol=1e-5)


def test_the_tokens_of_an_encoder_are_not_the_labels_of_a_decoder():
    graph = kirsch.trace(Seq2Seq().eval(), sequences(3))
    with pytest.raises(DataError, match=r"Batch 1 of `data` has no labels"):
        kirsch.plan(graph, kirsch.Goal(parameters=0.8), importance="taylor", loss="next-token", data=[sequences(3)])
    with pytest.raises(DataError, match=r"Batch 1 of `data` has no labels"):
        Quality(graph, [sequences(3)], "next_token_accuracy")


def test_outputs_have_the_mask_of_the_sequence_to_which_they_belong():
    encoder, decoder = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0]])
    inputs = {"attention_mask": encoder, "decoder_input_ids": decoder, "decoder_attention_mask": decoder}
    np.testing.assert_array_equal(counted_tokens(inputs, (1, 3, 5)), [[True, True, False]])
    np.testing.assert_array_equal(counted_tokens(inputs, (1, 2, 5)), [[True, False]])
    assert counted_tokens(inputs, (1, 3)) is None  # three classes, not three tokens
    assert counted_tokens({"attention_mask": torch.ones(1, 3)}, (1, 3, 5)) is None
    same = {"attention_mask": encoder, "decoder_input_ids": torch.zeros(1, 3)}
    assert token_mask(same, (1, 3)) is None  # all tokens of the decoder count
    assert token_mask((encoder,), (1, 3)) is None


def test_statistics_of_batch_normalization_are_not_estimated_from_padding():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

        def forward(self, hidden, attention_mask):
            x = self.norm(self.first(hidden).transpose(1, 2)).transpose(1, 2)
            return self.last(F.relu(x)) + 0 * attention_mask[..., None]

    hidden, mask = torch.randn(4, 3, 4), torch.tensor([[1, 1, 0]] * 4)
    graph = kirsch.trace(Normalized().eval(), (hidden, mask))
    with pytest.raises(kirsch.KirschError, match=r"cannot be estimated from batches with padding.*or give `quality`"):
        kirsch.plan(graph, kirsch.Goal(parameters=0.8), ranking="legr", data=[((hidden, mask), None)])
