"""The stages of well-known networks are those that their papers describe."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from kirsch.distillation.matching import stages, stages_among, stages_of
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.pytorch.io.vision import import_beside

IMAGE = (2, 3, 32, 32)


@pytest.fixture(scope="module")
def torchvision():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return import_beside("torchvision")


def stages_found(model, inputs=None):
    return stages_of(framework_of(model).features, model, torch.randn(2, 3, 64, 64) if inputs is None else inputs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"relu": 32, "layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}),
        ("resnet50", {"relu": 32, "layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}),
        # not features.4.conv.0, which has the size of features.3 and belongs to the next stage
        ("mobilenet_v2", {"features.1": 32, "features.3": 16, "features.6": 8, "features.13": 4, "features": 2}),
        ("shufflenet_v2_x0_5", {"conv1": 32, "maxpool": 16, "stage2": 8, "stage3": 4, "conv5": 2}),
        (
            "regnet_y_400mf",
            {
                "stem": 32,
                **{f"trunk_output.block{n}": size for n, size in ((1, 16), (2, 8), (3, 4))},
                "trunk_output": 2,
            },
        ),
        # inside of the blocks of these networks, channels are last
        ("convnext_tiny", {"features.1": 16, "features.3": 8, "features.5": 4, "features": 2}),
        ("swin_t", {"permute": 2}),
        ("vit_b_16", {f"encoder.layers.encoder_layer_{n}": None for n in range(12)}),
    ],
)
def test_the_stages_of_torchvision_models_are_found(torchvision, name, expected):
    torch.manual_seed(0)
    options = {"image_size": 64} if name.startswith("vit") else {}
    found = stages_found(getattr(torchvision.models, name)(weights=None, **options))
    assert found == [(path, None if size is None else (size, size)) for path, size in expected.items()]


def test_a_network_with_channels_last_has_no_stages():
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = self.embed(x).permute(0, 2, 3, 1)
            for block in self.blocks:
                x = block(x)
            return x.mean((1, 2))

    with pytest.raises(
        UsageError, match=r"ChannelsLast has no stages that can be found by the output shapes.*Name the layers"
    ):
        stages_found(ChannelsLast())


def test_a_patch_embedding_is_not_a_stage_of_a_transformer():
    shapes = [("embed.proj", (2, 8, 8, 8)), ("embed", (2, 64, 8)), ("blocks.0", (2, 64, 8)), ("blocks.1", (2, 64, 8))]
    assert stages_among(shapes, IMAGE, "Net") == [("blocks.0", None), ("blocks.1", None)]


def test_attention_is_not_a_feature_map():
    shapes = [("embed", (2, 64, 8))]
    for block in range(2):
        inner = [(f"blocks.{block}.drop", (2, 4, 64, 64)), (f"blocks.{block}.norm", (2, 4, 64, 2))]
        shapes += [*inner, (f"blocks.{block}", (2, 64, 8))]
    assert stages_among(shapes, IMAGE, "Net") == [("blocks.0", None), ("blocks.1", None)]


def test_layers_inside_of_a_block_are_not_stages():
    shapes = [(f"blocks.{block}{inner}", (2, 9, width)) for block in range(2)
              for inner, width in ((".fc1", 8), (".fc2", 4), ("", 4))]  # fmt: skip
    assert stages_among(shapes, (2, 9), "Net") == [("blocks.0", None), ("blocks.1", None)]
    with pytest.raises(UsageError, match="has no stages"):
        stages_among(shapes[:2], (2, 9), "Net")


def test_all_stages_of_a_network_inside_of_a_module_are_found():
    shapes = [("body.0", (2, 4, 16, 16)), ("body.1", (2, 8, 8, 8)), ("body", (2, 8, 8, 8)), ("head", (2, 5))]
    assert stages_among(shapes, IMAGE, "Net") == [("body.0", (16, 16)), ("body", (8, 8))]


def test_blocks_with_several_outputs_are_found_as_stages(transformers):
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2)
    words = torch.randint(3, 20, (2, 5))
    found = stages_found(
        transformers.T5ForConditionalGeneration(config), {"input_ids": words, "decoder_input_ids": words}
    )
    assert found == [(f"encoder.block.{number}", None) for number in range(3)]


def test_layers_of_a_transformer_match_stages_of_a_convolutional_network_by_depth(torchvision):
    student = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=4, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    teacher = torchvision.models.resnet18(weights=None)
    inputs = torch.randn(2, 3, 64, 64)
    layer = "encoder.layers.encoder_layer_{}".format
    found = stages(framework_of(student).features, student, teacher, inputs)
    assert found == [(layer(0), "relu"), (layer(1), "layer1"), (layer(2), "layer2"), (layer(3), "layer4")]
    found = stages(framework_of(student).features, teacher, student, inputs)  # five stages, four layers
    assert found == [("relu", layer(0)), ("layer1", layer(1)), ("layer2", layer(2)), ("layer4", layer(3))]
