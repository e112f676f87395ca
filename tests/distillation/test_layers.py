"""Layer names select inputs and outputs of modules and functions, even if the values are overwritten in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.pytorch.features.capture import FeatureCapture, dry_run
from kirsch.frameworks.training import Training, TrainingHooks

K = 3


class Block(nn.Module):
    """A basic block of torchvision: the sum and the ReLU overwrite the output of the norm in place."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.layer1 = nn.Sequential(Block(width), Block(width))
        self.fc = nn.Linear(width, K)

    def forward(self, x):
        return self.fc(self.layer1(self.conv1(x)).mean((2, 3)))


def images(n=12):
    return np.random.default_rng(0).standard_normal((n, 1, 6, 6)).astype(np.float32)


def values_of(block, x):
    """Return the outputs of the norm, the sum and the block, computed out of place."""
    normed = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    return normed, normed + x, torch.relu(normed + x)


def test_a_feature_is_copied_before_the_model_overwrites_it_in_place():
    """The first run finds out which values are overwritten; later runs copy only these values."""
    net, x = ResNet(4).eval(), torch.from_numpy(images())
    block = net.layer1[0]
    normed, added, out = values_of(block, net.conv1(x))
    expected = {
        "layer1.0.bn2": normed,
        "layer1.0/add": added,
        "layer1.0.relu#1": out,
        "layer1.0": out,
    }
    watch = FeatureCapture(net, list(expected))
    for _ in range(3):
        for layer, value in watch(x).items():
            torch.testing.assert_close(value, expected[layer], msg=layer)
    copied = {key[0][0] or "root" for key, overwritten in watch._overwritten.items() if overwritten}
    assert copied == {"layer1.0.bn2", "layer1.0"}  # the entry "layer1.0" is that of the function "layer1.0/add"
    watch.close()


def test_gradients_flow_to_overwritten_values():
    net, x = ResNet(4).double(), torch.from_numpy(images()).double()
    watch = FeatureCapture(net, ["layer1.0.bn2"])
    for _ in range(2):
        found = torch.autograd.grad(watch(x)["layer1.0.bn2"].square().sum(), net.layer1[0].bn2.weight)
    expected = torch.autograd.grad(values_of(net.layer1[0], net.conv1(x))[0].square().sum(), net.layer1[0].bn2.weight)
    torch.testing.assert_close(found, expected)
    watch.close()


def test_a_forward_that_overwrites_only_in_later_runs_is_refused():
    class Changing(nn.Module):
        in_place = False

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            out = self.fc(x)
            return out.relu_() if self.in_place else out.relu()

    net = Changing()
    watch = FeatureCapture(net, ["fc"])
    watch(torch.ones(1, 2))
    net.in_place = True
    with pytest.raises(UsageError, match=r"The value at `fc` is overwritten in place in this forward pass of Changing"):
        watch(torch.ones(1, 2))
    watch.close()


def test_functions_of_a_module_are_those_that_its_own_forward_calls():
    """In training mode the norm adds 1 to a counter, which is not an addition of the block that contains it."""
    net, x = ResNet(4), torch.from_numpy(images())
    watch = FeatureCapture(net, ["layer1.0/add", "layer1.1/add", "/mean"])
    for mode in (net.eval(), net.train()):
        for layer, value in watch(x).items():
            assert value.shape == ((12, 4) if layer == "/mean" else (12, 4, 6, 6)), mode
    watch.close()
    with pytest.raises(
        UsageError, match=r'`layer1.0` does not call relu itself; `layer1.0.relu` does\. Write "layer1.0.relu/r'
    ):
        dry_run(net, ["layer1.0/relu"], x)
    with pytest.raises(
        UnknownNameError, match=r"no function that `layer1.0` calls 'ad'\. Known: add\. Did you mean 'add'"
    ):
        dry_run(net, ["layer1.0/ad"], x)


def test_terms_can_compare_the_results_of_functions_of_a_residual_network():
    terms = (
        Term("fitnet", 1.0, student_layer="layer1.0/add", name="sum"),
        Term("at", 1.0, student_layer="layer1.*.bn2", name="normed"),
    )
    found = distilled(ResNet(4), ResNet(6), ArrayData(images(), np.arange(12) % K), terms)
    assert set(found.history[0]["terms"]) == {"label", "sum", "normed"}


# ------------------------------------------------------------------------------------------------ transformers


def distilled(student, teacher, data, terms, **training):
    return distill(
        student,
        teacher,
        data,
        objective=Objective(terms),
        training=Training(epochs=1, learning_rate=1e-3, **training),
        check_teacher=False,
        hooks=TrainingHooks(event=lambda event: None),
    )


@pytest.fixture(scope="module")
def vit(timm):
    """Return a function that builds a vision transformer of timm."""

    def build(width, *, fused=True):
        torch.manual_seed(width)
        net = timm.models.VisionTransformer(
            img_size=6, patch_size=3, in_chans=1, num_classes=K, embed_dim=width, depth=2, num_heads=2, mlp_ratio=2
        )
        for block in net.blocks:
            block.attn.fused_attn = fused
        return net

    return build


def attention(block, x):
    """Return queries (N, heads, L, D / heads) and attention scores, computed from the weights."""
    n, length, width = x.shape
    states = block.attn.qkv(block.norm1(x)).reshape(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
    return states[0], states[0] @ states[1].transpose(-1, -2) * (width // 2) ** -0.5


def test_layer_names_select_inputs_and_results_of_functions_of_a_vision_transformer(vit):
    net, x = vit(8, fused=False).eval(), torch.from_numpy(images(2))
    layers = ["blocks.0:in", "blocks.0.attn/softmax:in", "blocks.0.attn/softmax", "blocks.0/add#0", "blocks.0/add#1"]
    found = dry_run(net, [*layers, "blocks.0", "blocks.0.attn", "blocks.0.mlp"], x)
    _, scores = attention(net.blocks[0], found["blocks.0:in"])
    torch.testing.assert_close(found["blocks.0.attn/softmax:in"], scores)
    torch.testing.assert_close(found["blocks.0.attn/softmax"], scores.softmax(-1))
    torch.testing.assert_close(found["blocks.0/add#0"], found["blocks.0:in"] + found["blocks.0.attn"])
    torch.testing.assert_close(found["blocks.0/add#1"], found["blocks.0"])


def test_the_function_of_fused_attention_has_the_queries_as_input_and_calls_no_softmax(vit):
    net, x = vit(8).eval(), torch.from_numpy(images(2))
    function = "blocks.0.attn/scaled_dot_product_attention"
    found = dry_run(net, ["blocks.0:in", f"{function}:in", function], x)
    queries, scores = attention(net.blocks[0], found["blocks.0:in"])
    torch.testing.assert_close(found[f"{function}:in"], queries)
    assert found[function].shape == queries.shape
    with pytest.raises(UsageError, match=r"does not call softmax: it calls scaled_dot_product_attention"):
        dry_run(net, ["blocks.0.attn/softmax"], x)
    assert scores.shape[-1] == 5


def test_terms_can_compare_inputs_and_results_of_functions_of_a_vision_transformer(vit):
    terms = (
        Term("attention-mse", 1.0, student_layer="blocks.*.attn/softmax:in", name="attention"),
        Term("hidden-mse", 1.0, student_layer="blocks.*/add#1", name="hidden"),
    )
    data = ArrayData(images(), np.arange(12) % K)
    found = distilled(vit(4, fused=False), vit(8, fused=False), data, terms)
    assert set(found.history[0]["terms"]) == {"label", "attention", "hidden"}
    fused = (Term("hidden-mse", 1.0, student_layer="blocks.*.attn/scaled_dot_product_attention:in", adapter="linear"),)
    assert np.isfinite(distilled(vit(4), vit(8), data, fused).history[0]["loss"])


@pytest.fixture(scope="module")
def bert(transformers):
    """Return a function that builds an encoder of transformers with two classes."""

    def build(width, attention="eager", layers=2):
        torch.manual_seed(width)
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=16,
            max_position_embeddings=16, num_labels=2, attn_implementation=attention,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)

    return build


def texts(n=8, length=7):
    random = np.random.default_rng(0)
    mask = (np.arange(length) < random.integers(2, length + 1, n)[:, None]).astype(np.int64)
    return {"input_ids": random.integers(1, 30, (n, length)), "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_layer_names_select_inputs_and_results_of_functions_of_an_encoder(bert, implementation):
    net, inputs = bert(8, implementation).eval(), {name: torch.from_numpy(part) for name, part in texts().items()}
    module = "bert.encoder.layer.0.attention.self"
    query = f"{module}.query"
    if implementation == "eager":
        found = dry_run(net, [f"{module}/softmax", "attention[0]"], inputs)
        torch.testing.assert_close(found[f"{module}/softmax"], found["attention[0]"])
        return
    function = f"{module}/scaled_dot_product_attention"
    found = dry_run(net, [query, f"{function}:in", function, module], inputs)
    queries = found[query].unflatten(-1, (4, 2)).transpose(1, 2)
    torch.testing.assert_close(found[f"{function}:in"], queries)
    torch.testing.assert_close(found[function].transpose(1, 2).flatten(2), found[module])
    with pytest.raises(UsageError, match=r'returns no attentions.*attn_implementation="eager"'):
        dry_run(net, ["attention[0]"], inputs)
    sentence = r'does not call softmax: it calls scaled_dot_product_attention.*attn_implementation="eager"'
    with pytest.raises(UsageError, match=sentence):
        dry_run(net, [f"{module}/softmax:in"], inputs)


def test_a_student_with_fused_attention_learns_from_a_teacher_without_fused_attention(bert):
    """Relations of queries need no attention scores; the loss equals that of a student with eager attention."""
    last = [f"**.attention.self.{name}[-1]" for name in ("query", "key", "value")]
    terms = (Term("minilm", 1.0, student_layer=last, options={"heads": 4}),)
    data = ArrayData(texts(), np.arange(8) % 2)
    fused, plain = (
        distilled(bert(8, implementation), bert(16, "eager"), data, terms) for implementation in ("sdpa", "eager")
    )
    assert fused.history[0]["terms"] == pytest.approx(plain.history[0]["terms"], rel=1e-5)


def test_the_attention_scores_of_an_encoder_follow_from_queries_and_keys(bert):
    net, inputs = bert(8).eval(), {name: torch.from_numpy(part) for name, part in texts().items()}
    module = "bert.encoder.layer.1.attention.self"
    found = dry_run(net, [f"{module}/softmax:in", f"{module}.query", f"{module}.key"], inputs)
    queries, keys = (found[f"{module}.{name}"].unflatten(-1, (4, 2)).transpose(1, 2) for name in ("query", "key"))
    scores = queries @ keys.transpose(-1, -2) / 2**0.5
    valid = inputs["attention_mask"].bool()[:, None, None].expand_as(scores)
    torch.testing.assert_close(found[f"{module}/softmax:in"][valid], scores[valid])


# ------------------------------------------------------------------------------------------------ bf16


def test_features_and_adapters_in_bf16_are_finite_and_close_to_fp32():
    """bf16 has a relative precision of 2^-8; errors add up over a few steps."""
    terms = (
        Term("kd", 0.9, temperature=4.0),
        Term("fitnet", 1.0, student_layer="layer1.0", adapter="fitnet"),
        Term("at", 10.0, student_layer="layer1.1/add"),
        Term("rkd", 1.0, student_layer="penultimate"),
        Term("sp", 1.0, student_layer="layer1.1"),
    )
    data = ArrayData(images(24), np.arange(24) % K, batch_size=12)
    torch.manual_seed(0)
    nets = ResNet(4), ResNet(6)
    full, half = (distilled(*nets, data, terms, precision=precision) for precision in ("fp32", "bf16"))
    assert all(torch.isfinite(value).all() for value in half.model.state_dict().values())
    assert all(value.dtype == torch.float32 for value in half.model.parameters())
    assert half.history[0]["terms"] == pytest.approx(full.history[0]["terms"], rel=0.03)
    assert half.history[0]["terms"] != full.history[0]["terms"]


def test_losses_and_weights_of_an_encoder_in_bf16_are_finite_and_close_to_fp32(bert):
    terms = (
        Term("kd", 0.5, temperature=2.0),
        Term("hidden-mse", 1.0, student_layer="hidden[*]", name="hidden"),
        Term("attention-kl", 1.0, student_layer="**.attention.self/softmax:in", name="attention"),
    )
    data = ArrayData(texts(), np.arange(8) % 2)
    full, half = (distilled(bert(8), bert(16), data, terms, precision=precision) for precision in ("fp32", "bf16"))
    assert all(torch.isfinite(value).all() for value in half.model.state_dict().values())
    assert half.history[0]["terms"] == pytest.approx(full.history[0]["terms"], rel=0.03, abs=1e-3)
