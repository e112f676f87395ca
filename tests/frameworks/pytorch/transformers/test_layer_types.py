"""Lists with a word for each layer, in configurations whose numbers of layers and heads are equal."""

from __future__ import annotations

import pytest
import torch

import kirsch
from kirsch.frameworks.pytorch.transformers.blueprint import build

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("transformers")]

FAMILIES = ["Qwen2", "Qwen3", "Gemma2", "Gemma3", "Cohere2"]


def causal_model(transformers, family, layers=4, **numbers):
    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "pad_token_id": 0} | numbers,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_number_of_heads_that_equals_the_number_of_layers_does_not_cut_the_types_of_the_layers(transformers, family):
    model = causal_model(transformers, family)
    types = model.config.layer_types
    assert len(types) == 4
    for changes, expected in (
        ({"num_key_value_heads": 2}, types),
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, types),
        ({"num_hidden_layers": 3}, types[:3]),
        ({"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}, types[:3]),
    ):
        built = build(model, changes, "meta")
        assert built.config.layer_types == expected
        assert len(built.model.layers) == len(expected)
        assert built.config.num_key_value_heads == changes.get("num_key_value_heads", 4)


def test_a_model_that_lost_kv_groups_is_saved_if_their_number_was_that_of_the_layers(transformers, tmp_path):
    torch.manual_seed(0)
    model = causal_model(transformers, "Qwen3", num_attention_heads=8)
    inputs = {"input_ids": torch.arange(8)[None]}
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(parameters=0.8), kinds=["kv group"], uniform=True)
    small = kirsch.prune(model, plan)
    assert small.config.num_key_value_heads < 4
    assert len(small.config.layer_types) == 4
    small.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small").eval()
    assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)
