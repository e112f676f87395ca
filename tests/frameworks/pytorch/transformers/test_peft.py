"""Models with adapters of PEFT are pruned, saved and masked like others, and their adapters are cut with them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

import kirsch
from kirsch.errors import UsageError
from kirsch.frameworks.pytorch.modules.tuners import adapter_tensors, without_tuners
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.pruning.importance import importance_of
from kirsch.pruning.options import PlanOptions
from kirsch.pruning.prune import prune_with_verification
from kirsch.pruning.scores import scores_of

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = {"input_ids": torch.arange(8)[None] % 7}
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def peft(transformers):
    return pytest.importorskip("peft")


@pytest.fixture
def base(transformers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).eval()


def adapted(peft, base, name="default", **options):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**(settings | options)), adapter_name=name)
    return trained(model)


def trained(model):
    """Replace the zeros of new adapters, and so make their outputs differ from 0."""
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pruned(model, goal=0.7, **options):
    plan = kirsch.plan(kirsch.trace(model, EXAMPLE), kirsch.Goal(parameters=goal), **options)
    return prune_with_verification(model, plan)


def ranks(model):
    return {value.shape[0] for name, value in model.named_parameters() if "lora_A" in name}


def logits(model):
    with torch.no_grad():
        return model(**EXAMPLE).logits


def plain(name):
    return name.removeprefix(PREFIX).replace(".base_layer", "")


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "down_proj"]}])
def test_merging_after_pruning_equals_pruning_the_same_units_after_merging(peft, base, options):
    model = adapted(peft, base, **options)
    found = pruned(model)
    merged = copy.deepcopy(model).merge_and_unload()
    graph = kirsch.trace(merged, EXAMPLE)
    removed = {plain(group.name): group.removed for group in found.plan.groups if group.removed}
    assert removed.keys() <= {group.name for group in graph.groups}
    expected = cut(merged, graph, graph.keep(removed)).state_dict()
    state = found.model.merge_and_unload().state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():  # the products of the adapters sum in another order
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_adapters_are_cut_with_the_weights_beside_which_they_run_and_keep_their_rank(peft, base):
    model = adapted(peft, base)
    small = pruned(model).model
    layer = small.base_model.model.model.layers[0].mlp.up_proj
    kept, inputs = layer.base_layer.weight.shape
    assert kept < 48
    assert layer.lora_B["default"].weight.shape == (kept, 4)
    assert layer.lora_A["default"].weight.shape == (4, inputs)
    assert (layer.in_features, layer.out_features) == (inputs, kept)
    assert ranks(small) == {4}


def test_another_adapter_can_be_added_to_a_pruned_model(peft, base):
    small = pruned(adapted(peft, base)).model
    small.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    small.set_adapter("second")
    assert logits(small).shape == (1, 8, 32)


def test_ranks_are_cut_if_kinds_names_them_and_the_adapter_can_be_loaded(peft, base, tmp_path):
    model = adapted(peft, base)
    found = pruned(model, 0.95, kinds=["rank"], round_to=1)
    small = found.model
    assert ranks(small) != {4}
    assert found.warnings == ()
    small.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base_of(base), tmp_path).eval()
    assert torch.equal(logits(again), logits(small))


def base_of(model):
    return copy.deepcopy(without_tuners(model))


def test_a_rank_that_keep_names_without_kinds_is_refused(peft, base):
    graph = kirsch.trace(adapted(peft, base), EXAMPLE)
    name = f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.default"
    with pytest.raises(UsageError, match="the rank of an adapter"):
        kirsch.plan(graph, keep={name: 2})
    plan = kirsch.plan(graph, keep={name: 2}, kinds={"rank": 1})
    assert {group.name for group in plan.groups if group.removed} == {name}


WITHOUT_KIRSCH = """
import sys
sys.modules["kirsch"] = sys.modules["torchvision"] = None
import torch, transformers, peft
torch.set_num_threads(1)
folder = sys.argv[1]
base = transformers.AutoModelForCausalLM.from_pretrained(folder + "/base")
model = peft.PeftModel.from_pretrained(base, folder + "/adapter").eval()
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.data = tensor.data.clone()  # the alignment of a tensor decides which kernel runs
stored = torch.load(folder + "/stored.pt")
with torch.no_grad():
    assert torch.equal(model(**stored["inputs"]).logits, stored["logits"])
    assert torch.equal(model.generate(**stored["inputs"], max_new_tokens=4, do_sample=False), stored["generated"])
    with model.disable_adapter():
        assert torch.equal(model(**stored["inputs"]).logits, stored["base"])
"""


@pytest.mark.parametrize("options", [{"kinds": ["ffn unit"], "uniform": True}, {"loadable": True}])
def test_base_model_and_adapter_load_in_a_process_without_kirsch(peft, base, tmp_path, options):
    found = pruned(adapted(peft, base), 0.8, **options)
    small = found.model
    assert found.warnings == ()
    assert any("copy.deepcopy(model).unload().save_pretrained(folder)" in note for note in found.notes)
    small.save_pretrained(tmp_path / "adapter")
    copy.deepcopy(small).unload().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        stored = {
            "inputs": EXAMPLE,
            "logits": logits(small),
            "generated": small.generate(**EXAMPLE, max_new_tokens=4, do_sample=False),
        }
        with small.disable_adapter():
            stored["base"] = logits(small)
    torch.save(stored, tmp_path / "stored.pt")
    paths = os.pathsep.join(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if "src" not in path)
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", WITHOUT_KIRSCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_adapters_that_transformers_has_added_itself_are_pruned_and_saved(peft, base, tmp_path):
    original = copy.deepcopy(base)
    settings = {"r": 4, "target_modules": ["up_proj", "q_proj"]}
    try:
        base.add_adapter(peft.LoraConfig(**settings))
    except ValueError as error:
        pytest.skip(f"transformers does not work with this version of PEFT: {error}")
    found = pruned(trained(base), 0.8, kinds=["ffn unit"], uniform=True)
    assert found.warnings == ()
    assert found.model.config.intermediate_size < 48
    assert any("kirsch.save saves model and adapters" in note for note in found.notes)

    def build():
        model = copy.deepcopy(original)
        model.add_adapter(peft.LoraConfig(**settings))
        return model

    kirsch.save(found.model, tmp_path / "small")
    assert torch.equal(logits(kirsch.load(tmp_path / "small", build)), logits(found.model))


def test_a_merged_model_after_pruning_is_saved_with_its_configuration(peft, base, transformers, tmp_path):
    small = pruned(adapted(peft, base), 0.8, kinds=["ffn unit"], uniform=True).model.merge_and_unload()
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(small))


def test_without_a_describing_configuration_adapter_and_base_are_refused_and_kirsch_saves_them(peft, base, tmp_path):
    original = copy.deepcopy(base)
    model = adapted(peft, base)
    keep = {f"{PREFIX}model.layers.0.mlp.gate_proj.base_layer": 16}
    found = prune_with_verification(model, kirsch.plan(kirsch.trace(model, EXAMPLE), keep=keep))
    small = found.model
    assert len(found.warnings) == 1
    for refused in (small, small.get_base_model(), copy.deepcopy(small).merge_and_unload()):
        with pytest.raises(UsageError, match=r"No configuration describes the pruned.*kirsch\.save"):
            refused.save_pretrained(tmp_path / "refused")
    kirsch.save(small, tmp_path / "small")
    again = kirsch.load(tmp_path / "small", lambda: adapted(peft, copy.deepcopy(original)))
    assert torch.equal(logits(again), logits(small))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in small.parameters()]


def test_an_adapter_that_its_configuration_does_not_describe_is_refused(peft, base, tmp_path):
    model = adapted(peft, base)
    model.peft_config["default"].target_modules = {"up_proj"}
    small = pruned(model, 0.8, kinds=["ffn unit"], uniform=True).model
    with pytest.raises(UsageError, match="configuration of the adapters does not describe"):
        small.save_pretrained(tmp_path)
    small.merge_and_unload().save_pretrained(tmp_path)


def test_the_weights_of_dora_change_with_the_kept_units_and_a_warning_says_so(peft, base):
    model = adapted(peft, base, use_dora=True, target_modules=["down_proj"])
    assert any("are computed from all units" in text for text in pruned(model, kinds=["ffn unit"]).warnings)


def test_adapters_that_are_not_active_and_disabled_ones_run_on_the_pruned_model(peft, base):
    model = adapted(peft, base)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj", "o_proj"], task_type="CAUSAL_LM"))
    trained(model)
    small = pruned(model, 0.6).model
    with small.disable_adapter():
        assert logits(small).shape == (1, 8, 32)
    small.set_adapter("second")
    second = copy.deepcopy(model)
    second.set_adapter("second")
    graph = kirsch.trace(second, EXAMPLE)
    keep = kirsch.plan(kirsch.trace(model, EXAMPLE), kirsch.Goal(parameters=0.6)).groups
    removed = {group.name: group.removed for group in keep if group.removed}
    expected = cut(second, graph, graph.keep(removed))
    torch.testing.assert_close(logits(small), logits(expected))


def test_a_classifier_that_is_trained_as_a_whole_is_cut_with_its_original(peft, transformers):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    model = adapted(peft, model, task_type="SEQ_CLS", target_modules=["query", "value"])
    keep = {f"{PREFIX}bert.pooler.dense": 8}
    small = prune_with_verification(model, kirsch.plan(kirsch.trace(model, EXAMPLE), keep=keep)).model
    copied = small.base_model.model.classifier
    assert copied.original_module.weight.shape == copied.modules_to_save["default"].weight.shape
    assert copied.original_module.weight.shape[1] == 8
    with small.disable_adapter():
        assert logits(small).shape == (1, 2)


def test_gradient_importances_see_frozen_base_weights_as_in_the_merged_model(peft, base):
    model = adapted(peft, base, target_modules=["up_proj", "down_proj", "q_proj"])
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    merged = copy.deepcopy(model).merge_and_unload()
    tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    data = [kirsch.Batch({"input_ids": tokens}, tokens)]
    before = [p.requires_grad for p in model.parameters()]
    found = [scores(traced, data) for traced in (model, merged)]
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        assert values.max() > 0
        torch.testing.assert_close(torch.tensor(values), torch.tensor(found[1][name]), rtol=1e-3, atol=1e-7)


def scores(model, data):
    graph = kirsch.trace(model, EXAMPLE)
    options = PlanOptions(importance="taylor", loss="next-token")
    cache = scores_of(graph, options, importance_of("taylor"), data, "next-token")
    return {plain(group.name): cache.get(group, options) for group in graph.groups if group.kind == "ffn unit"}


def test_masks_leave_adapters_dense_and_a_merge_that_would_lose_them_is_refused(peft, base):
    model = adapted(peft, base, target_modules=["up_proj"])
    sparse = kirsch.sparsify(model, sparsity=0.5)
    assert not adapter_tensors(sparse.model) & {layer.name for layer in sparse.layers}
    assert any("lora_A" in name and "adapter" in reason for name, reason in sparse.kept.items())
    with pytest.raises(UsageError, match=r"cannot be merged.*kirsch\.fold_masks"):
        copy.deepcopy(sparse.model).merge_and_unload()
    folded = kirsch.fold_masks(sparse.model)
    before = logits(folded)
    torch.testing.assert_close(logits(folded.merge_and_unload()), before)
