"""Public models with random weights and small inputs, on which the coverage is measured.

`MODELS`, 153 models of three libraries, were used during development. `OTHERS` were not used during development: they
measure how well Kirsch handles new models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import kernels
import small
import torch

from kirsch.frameworks.pytorch.io.vision import import_beside

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Instructions to build a model and its example inputs.

    Args:
        library: "torchvision", "timm", "transformers" or "by hand" (`small`).
        name: name of the row.
        factory: function of torchvision, name of a timm model, class of transformers, or class of `small`.
        config: class of the configuration; transformers only.
        options: arguments of the factory or of the configuration.
        inputs: kind of the example inputs, a key of `INPUTS`.
        size: height and width of the images.
        module: submodule to prune instead of the model. Detectors select boxes by their values, which cannot be traced.
    """

    library: str
    name: str
    factory: str
    config: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str = "images"
    size: int = 64
    module: str = ""

    def build(self) -> tuple[nn.Module, Any]:
        """Return the model in inference mode and its example inputs."""
        torch.manual_seed(0)
        return BUILDERS[self.library](self).eval(), INPUTS[self.inputs](self.size)


def _torchvision(recipe: Recipe) -> nn.Module:
    module, _, function = f"torchvision.models.{recipe.factory}".rpartition(".")
    if "detection" in module:
        kernels.register()
    import_beside("torchvision.models")
    model: nn.Module = getattr(import_beside(module), function)(**recipe.options)
    return model


def _timm(recipe: Recipe) -> nn.Module:
    model: nn.Module = import_beside("timm").create_model(recipe.factory, pretrained=False, **recipe.options)
    return model


def _transformers(recipe: Recipe) -> nn.Module:
    import_beside("torchvision")  # transformers imports torchvision if it is installed
    library = import_beside("transformers")
    model: nn.Module = getattr(library, recipe.factory)(getattr(library, recipe.config)(**recipe.options))
    return model


def _by_hand(recipe: Recipe) -> nn.Module:
    model: nn.Module = getattr(small, recipe.factory)()
    return model


BUILDERS = {"by hand": _by_hand, "torchvision": _torchvision, "timm": _timm, "transformers": _transformers}


def _words(length: int = 12) -> torch.Tensor:
    return torch.randint(3, 200, (2, length))


INPUTS: dict[str, Any] = {
    "images": lambda size: torch.randn(2, 3, size, size),
    "one image": lambda size: torch.randn(1, 3, size, size),
    "two images": lambda size: (torch.randn(1, 3, size, size), torch.randn(1, 3, size, size)),
    "list of images": lambda size: ([torch.rand(3, size, size)],),
    "video": lambda size: torch.randn(1, 3, 16, size, size),
    "words": lambda _: {"input_ids": _words()},
    "words to words": lambda _: {"input_ids": _words(), "decoder_input_ids": _words(8)},
    "pixels": lambda size: {"pixel_values": torch.randn(2, 3, size, size)},
    "pixels and words": lambda size: {"input_ids": _words(), "pixel_values": torch.randn(2, 3, size, size)},
    "wave": lambda _: {"input_values": torch.randn(2, 1600)},
    "spectrum": lambda _: {"input_features": torch.randn(2, 20, 64), "decoder_input_ids": _words(8)},
    "spectrum as image": lambda _: {"input_values": torch.randn(2, 64, 32)},
    "plain words": lambda _: _words(),
    "pairs of words": lambda _: (_words(), _words(5)),
    "gray line": lambda size: torch.randn(2, 1, size, 48),
    "plain series": lambda _: torch.randn(2, 3, 40),
    "points": lambda _: torch.randn(2, 3, 30),
    "plain wave": lambda _: torch.randn(2, 1, 40),
    "small images": lambda size: torch.randn(2, 3, size, size),
    "series": lambda _: {"past_values": torch.randn(2, 32, 3)},
}


def _of_torchvision() -> list[Recipe]:
    plain = """alexnet vgg11 vgg11_bn squeezenet1_1 resnet18 resnet50 resnext50_32x4d densenet121 mnasnet0_5
        mobilenet_v2 mobilenet_v3_small mobilenet_v3_large shufflenet_v2_x0_5 shufflenet_v2_x1_0 efficientnet_b0
        efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny swin_t swin_v2_t"""
    bare = {"weights": None, "weights_backbone": None}
    return [
        *(Recipe("torchvision", name, name) for name in plain.split()),
        Recipe("torchvision", "googlenet", "googlenet", options={"init_weights": False}),
        Recipe("torchvision", "inception_v3", "inception_v3", options={"init_weights": False}, size=96),
        Recipe("torchvision", "vit_b_32", "vit_b_32", options={"image_size": 64}),
        Recipe("torchvision", "maxvit_t", "maxvit_t", options={"input_size": (224, 224)}, size=224),
        *(
            Recipe("torchvision", name, f"segmentation.{name}", options=bare)
            for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
        ),
        *(
            Recipe(
                "torchvision", name, f"video.{name}", inputs="video", size=224 if name in ("mvit_v2_s", "s3d") else 64
            )
            for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v2_s", "swin3d_t")
        ),
        *(
            Recipe(
                "torchvision",
                name,
                f"detection.{name}",
                options=bare,
                inputs="list of images",
                size=128,
                module="backbone",
            )
            for name in (
                "fasterrcnn_mobilenet_v3_large_320_fpn",
                "ssdlite320_mobilenet_v3_large",
                "retinanet_resnet50_fpn",
                "fcos_resnet50_fpn",
                "keypointrcnn_resnet50_fpn",
            )
        ),
        Recipe("torchvision", "raft_small", "optical_flow.raft_small", inputs="two images", size=128),
    ]


TIMM = {
    64: "res2net50_26w_4s skresnet18 nf_regnet_b0 ghostnet_100 hrnet_w18_small dla34 cspresnet50 vovnet39a darknet53 "
    "rexnet_100 tresnet_m resnest14d dpn48b hardcorenas_a tinynet_e selecsls42b repghostnet_050 gernet_s mobileone_s0 "
    "starnet_s1 xception41 mambaout_femto poolformer_s12 inception_next_atto efficientvit_b0 fastvit_t8",
    160: "pvt_v2_b0",
    224: "vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 resmlp_12_224 gmlp_s16_224 "
    "mixer_s32_224 levit_128s eva02_tiny_patch14_224 xcit_nano_12_p16_224 efficientvit_m0 volo_d1_224 coat_tiny "
    "twins_pcpvt_small cait_xxs24_224 convit_tiny tnt_s_legacy_patch16_224 visformer_tiny nest_tiny "
    "focalnet_tiny_srf davit_tiny "
    "tiny_vit_5m_224 hiera_tiny_224 coatnet_nano_rw_224 efficientformer_l1 sequencer2d_s pit_ti_224 "
    "beit_base_patch16_224",
    256: "mobilevit_xxs mobilevitv2_050 botnet26t_256 maxvit_rmlp_pico_rw_256 lambda_resnet26t halonet26t",
}
FIXED = {"tinynet_e": 106}


def _of_timm() -> list[Recipe]:
    pairs = [(name, FIXED.get(name, size)) for size, names in TIMM.items() for name in names.split()]
    return [Recipe("timm", name, name, size=size) for name, size in pairs]


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**SMALL, "vocab_size": 200, "max_position_embeddings": 64}
DECODER = {**TEXT, "use_cache": False}
SHARED = {**DECODER, "num_key_value_heads": 2, "pad_token_id": 0}
PAIR = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "use_cache": False,
}
MARIAN = {**PAIR, "pad_token_id": 0, "decoder_start_token_id": 0}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 200}
GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 200, "n_positions": 64, "use_cache": False}
SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64, "patch_size": 4}
PYRAMID = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
ATTENTIVE = {**PYRAMID, "num_attention_heads": [1, 2, 4, 4]}
WAVE = {
    **SMALL,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
WHISPER = {
    **{key: value for key, value in PAIR.items() if key != "max_position_embeddings"},
    "num_mel_bins": 20,
    "max_source_positions": 32,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def _hf(name: str, factory: str, config: str, options: dict[str, Any], inputs: str = "words", size: int = 32) -> Recipe:
    return Recipe("transformers", name, factory, f"{config}Config", options, inputs, size)


TRANSFORMERS = [
    _hf("bert", "BertForSequenceClassification", "Bert", TEXT),
    _hf(
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBert",
        {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 200, "max_position_embeddings": 64},
    ),
    _hf("roberta", "RobertaForSequenceClassification", "Roberta", TEXT),
    _hf("albert", "AlbertForSequenceClassification", "Albert", {**TEXT, "embedding_size": 32}),
    _hf("electra", "ElectraForSequenceClassification", "Electra", {**TEXT, "embedding_size": 32}),
    _hf("deberta", "DebertaForSequenceClassification", "Deberta", DEBERTA),
    _hf("deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2", DEBERTA),
    _hf("camembert-mlm", "CamembertForMaskedLM", "Camembert", TEXT),
    _hf("layoutlm", "LayoutLMForSequenceClassification", "LayoutLM", TEXT),
    _hf("t5", "T5ForConditionalGeneration", "T5", {**T5, "use_cache": False}, "words to words"),
    _hf("mt5-gated", "MT5ForConditionalGeneration", "MT5", {**T5, "use_cache": False}, "words to words"),
    _hf("t5-encoder", "T5EncoderModel", "T5", T5),
    _hf("bart", "BartForConditionalGeneration", "Bart", PAIR, "words to words"),
    _hf("mbart", "MBartForConditionalGeneration", "MBart", PAIR, "words to words"),
    _hf(
        "marian", "MarianMTModel", "Marian", {**PAIR, "pad_token_id": 0, "decoder_start_token_id": 0}, "words to words"
    ),
    _hf("gpt2", "GPT2LMHeadModel", "GPT2", GPT),
    _hf(
        "gpt-neo",
        "GPTNeoForCausalLM",
        "GPTNeo",
        {
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 96,
            "vocab_size": 200,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "use_cache": False,
        },
    ),
    _hf("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoX", DECODER),
    _hf("gpt-bigcode", "GPTBigCodeForCausalLM", "GPTBigCode", GPT),
    _hf(
        "bloom",
        "BloomForCausalLM",
        "Bloom",
        {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 200, "use_cache": False},
    ),
    _hf(
        "opt",
        "OPTForCausalLM",
        "OPT",
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "vocab_size": 200,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 48,
            "use_cache": False,
        },
    ),
    _hf("llama-mha", "LlamaForCausalLM", "Llama", DECODER),
    _hf("llama-gqa", "LlamaForCausalLM", "Llama", SHARED),
    _hf("mistral", "MistralForCausalLM", "Mistral", SHARED),
    _hf("qwen2", "Qwen2ForCausalLM", "Qwen2", SHARED),
    _hf("qwen3", "Qwen3ForCausalLM", "Qwen3", {**SHARED, "head_dim": 16}),
    _hf("gemma", "GemmaForCausalLM", "Gemma", {**SHARED, "head_dim": 16}),
    _hf("gemma2", "Gemma2ForCausalLM", "Gemma2", {**SHARED, "head_dim": 16}),
    _hf("phi", "PhiForCausalLM", "Phi", DECODER),
    _hf("phi3", "Phi3ForCausalLM", "Phi3", SHARED),
    _hf(
        "falcon",
        "FalconForCausalLM",
        "Falcon",
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 200,
            "use_cache": False,
            "alibi": False,
        },
    ),
    _hf("cohere", "CohereForCausalLM", "Cohere", SHARED),
    _hf("mixtral", "MixtralForCausalLM", "Mixtral", {**SHARED, "num_local_experts": 4}),
    _hf(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        "Qwen3Moe",
        {**SHARED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    _hf(
        "mamba",
        "MambaForCausalLM",
        "Mamba",
        {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 200, "state_size": 8, "use_cache": False},
    ),
    _hf("vit", "ViTForImageClassification", "ViT", IMAGE, "pixels"),
    _hf("deit", "DeiTForImageClassification", "DeiT", IMAGE, "pixels"),
    _hf("beit", "BeitForImageClassification", "Beit", {**IMAGE, "use_relative_position_bias": True}, "pixels"),
    _hf("dinov2", "Dinov2ForImageClassification", "Dinov2", IMAGE, "pixels"),
    _hf("swin", "SwinForImageClassification", "Swin", SWIN, "pixels", 64),
    _hf("swinv2", "Swinv2ForImageClassification", "Swinv2", SWIN, "pixels", 64),
    _hf(
        "segformer",
        "SegformerForImageClassification",
        "Segformer",
        {**ATTENTIVE, "decoder_hidden_size": 32},
        "pixels",
        64,
    ),
    _hf(
        "segformer-seg",
        "SegformerForSemanticSegmentation",
        "Segformer",
        {**ATTENTIVE, "decoder_hidden_size": 32},
        "pixels",
        64,
    ),
    _hf("pvt-v2", "PvtV2ForImageClassification", "PvtV2", ATTENTIVE, "pixels", 64),
    _hf("poolformer", "PoolFormerForImageClassification", "PoolFormer", PYRAMID, "pixels", 64),
    _hf("convnext", "ConvNextForImageClassification", "ConvNext", PYRAMID, "pixels", 64),
    _hf("clip-vision", "CLIPVisionModel", "CLIPVision", IMAGE, "pixels"),
    _hf("clip-text", "CLIPTextModel", "CLIPText", TEXT),
    _hf(
        "yolos",
        "YolosForObjectDetection",
        "Yolos",
        {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 10},
        "pixels",
    ),
    _hf("whisper", "WhisperForConditionalGeneration", "Whisper", WHISPER, "spectrum"),
    _hf("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2", WAVE, "wave"),
    _hf("hubert", "HubertForCTC", "Hubert", WAVE, "wave"),
    _hf(
        "ast",
        "ASTForAudioClassification",
        "AST",
        {**SMALL, "max_length": 64, "num_mel_bins": 32, "patch_size": 8},
        "spectrum as image",
    ),
]

MODELS = (*_of_torchvision(), *_of_timm(), *TRANSFORMERS)

OTHER_TIMM = {
    64: "regnety_002 repvgg_a0 fbnetc_100 mixnet_s semnasnet_075 tf_efficientnet_lite0 lcnet_050 ese_vovnet19b_dw "
    "cs3darknet_s ecaresnet26t ghostnetv2_100 mobilenetv4_conv_small hgnetv2_b0 fasternet_t0 convnextv2_atto "
    "rdnet_tiny",
    224: "crossvit_9_240 repvit_m0_9 edgenext_xx_small vit_relpos_small_patch16_224 mvitv2_tiny gcvit_xxtiny "
    "swiftformer_xs shvit_s1 deit3_small_patch16_224 vit_small_patch16_rope_224",
    256: "gcresnet33ts bat_resnext26ts sebotnet33ts_256 eca_halonext26ts",
}
OTHER_FIXED = {"crossvit_9_240": 240}
CLIP = {"vocab_size": 200, **SMALL, "max_position_embeddings": 64}
OTHER_TRANSFORMERS = [
    _hf("mpnet", "MPNetForSequenceClassification", "MPNet", TEXT),
    _hf("squeezebert", "SqueezeBertForSequenceClassification", "SqueezeBert", {**TEXT, "embedding_size": 48}),
    _hf("roformer", "RoFormerForMaskedLM", "RoFormer", {**TEXT, "embedding_size": 48}),
    _hf("fnet", "FNetForMaskedLM", "FNet", {**TEXT, "tpu_short_seq_length": 12}),
    _hf("convbert", "ConvBertForTokenClassification", "ConvBert", {**TEXT, "embedding_size": 32}),
    _hf("modernbert", "ModernBertForMaskedLM", "ModernBert", {**TEXT, "pad_token_id": 0}),
    _hf(
        "xlnet",
        "XLNetForSequenceClassification",
        "XLNet",
        {"vocab_size": 200, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 96},
    ),
    _hf("starcoder2", "Starcoder2ForCausalLM", "Starcoder2", SHARED),
    _hf("stablelm", "StableLmForCausalLM", "StableLm", {**SHARED, "partial_rotary_factor": 0.5}),
    _hf("olmo2", "Olmo2ForCausalLM", "Olmo2", SHARED),
    _hf("granite", "GraniteForCausalLM", "Granite", SHARED),
    _hf("gptj", "GPTJForCausalLM", "GPTJ", {**GPT, "rotary_dim": 8}),
    _hf("pegasus", "PegasusForConditionalGeneration", "Pegasus", PAIR, "words to words"),
    _hf("m2m-100", "M2M100ForConditionalGeneration", "M2M100", PAIR, "words to words"),
    _hf(
        "levit",
        "LevitForImageClassification",
        "Levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        "pixels",
        64,
    ),
    _hf(
        "cvt",
        "CvtForImageClassification",
        "Cvt",
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "patch_padding": [2, 1, 1]},
        "pixels",
        64,
    ),
    _hf("vit-mae", "ViTMAEModel", "ViTMAE", {**IMAGE, "mask_ratio": 0.0}, "pixels"),
    _hf(
        "efficientnet",
        "EfficientNetForImageClassification",
        "EfficientNet",
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 64},
        "pixels",
        64,
    ),
    _hf(
        "patchtst",
        "PatchTSTForPrediction",
        "PatchTST",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 24,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
        },
        "series",
    ),
    _hf("siglip", "SiglipVisionModel", "SiglipVision", IMAGE, "pixels"),
]
SMALL_NETS = {
    "UNet": "images",
    "Espcn": "images",
    "TextCnn": "plain words",
    "Crnn": "gray line",
    "Tcn": "plain series",
    "PointNet": "points",
    "WaveGate": "plain wave",
    "Seq2Seq": "pairs of words",
    "Cbam": "images",
    "Vae": "small images",
}

OTHERS = (
    *(
        Recipe("timm", name, name, size=OTHER_FIXED.get(name, size))
        for size, names in OTHER_TIMM.items()
        for name in names.split()
    ),
    *OTHER_TRANSFORMERS,
    *(Recipe("by hand", name, name, inputs=inputs, size=32) for name, inputs in SMALL_NETS.items()),
)
