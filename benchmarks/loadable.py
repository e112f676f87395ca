"""Measure which families of transformers models are pruned to half of their parameters, and load without Kirsch.

Each model has a small configuration and random weights. It is pruned with `loadable=True`, so that the
configuration states all cuts, and saved with `save_pretrained`. A process that cannot import Kirsch loads it with an
`AutoModel` class, and compares the outputs and the generated tokens. The result is docs/loadable.md.

    python benchmarks/loadable.py                 # all families without a row in build/loadable.jsonl
    python benchmarks/loadable.py --only 'Qwen*'  # those whose name matches
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from zoo import DEBERTA, DECODER, GPT, IMAGE, MARIAN, PAIR, SHARED, SWIN, T5, TEXT, WAVE, WHISPER, Recipe

import kirsch
from kirsch.errors import KirschError
from kirsch.pruning.prune import prune_with_verification

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "build/loadable.jsonl"
GOALS = 0.5, 0.52
"""Goals, as fractions of the parameters. The second is used if the plan for the first keeps less than `LEAST`."""
LEAST = 0.48
TOKENS = 4
"""Number of tokens that are generated."""

HEAD_DIM = {**SHARED, "head_dim": 16}
BLOOM = {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 200}
DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 200, "max_position_embeddings": 64}
OPT = {**TEXT, "ffn_dim": 96, "word_embed_proj_dim": 48, "use_cache": False}
FALCON = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 200,
    "alibi": False,
    "use_cache": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CLIP = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 32}


def _family(
    name: str, factory: str, config: str, options: dict[str, Any], inputs: str = "words", size: int = 32
) -> Recipe:
    return Recipe("transformers", name, factory, f"{config}Config", options, inputs, size)


FAMILIES = [
    _family("Llama", "LlamaForCausalLM", "Llama", SHARED),
    _family("Mistral", "MistralForCausalLM", "Mistral", SHARED),
    _family("Qwen2", "Qwen2ForCausalLM", "Qwen2", SHARED),
    _family("Qwen3", "Qwen3ForCausalLM", "Qwen3", HEAD_DIM),
    _family("Gemma 2", "Gemma2ForCausalLM", "Gemma2", HEAD_DIM),
    _family("Gemma 3", "Gemma3ForCausalLM", "Gemma3Text", HEAD_DIM),
    _family("Phi-3", "Phi3ForCausalLM", "Phi3", SHARED),
    _family("OLMo 2", "Olmo2ForCausalLM", "Olmo2", SHARED),
    _family("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3", SHARED),
    _family("Granite", "GraniteForCausalLM", "Granite", SHARED),
    _family("StarCoder 2", "Starcoder2ForCausalLM", "Starcoder2", SHARED),
    _family("StableLM", "StableLmForCausalLM", "StableLm", {**SHARED, "partial_rotary_factor": 0.5}),
    _family("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoX", DECODER),
    _family("Falcon", "FalconForCausalLM", "Falcon", {**FALCON, "alibi": False, "use_cache": False}),
    _family("GPT-2", "GPT2LMHeadModel", "GPT2", GPT),
    _family("OPT", "OPTForCausalLM", "OPT", OPT),
    _family("BLOOM", "BloomForCausalLM", "Bloom", {**BLOOM, "use_cache": False}),
    _family("Mixtral", "MixtralForCausalLM", "Mixtral", {**SHARED, "num_local_experts": 4}),
    _family("Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3Moe", {**HEAD_DIM, **MOE}),
    _family("BERT", "BertForSequenceClassification", "Bert", TEXT),
    _family("RoBERTa", "RobertaForSequenceClassification", "Roberta", TEXT),
    _family("DistilBERT", "DistilBertForSequenceClassification", "DistilBert", DISTIL),
    _family("ModernBERT", "ModernBertForMaskedLM", "ModernBert", {**TEXT, "pad_token_id": 0}),
    _family("DeBERTa", "DebertaV2ForSequenceClassification", "DebertaV2", DEBERTA),
    _family("ELECTRA", "ElectraForSequenceClassification", "Electra", {**TEXT, "embedding_size": 32}),
    _family("ALBERT", "AlbertForSequenceClassification", "Albert", {**TEXT, "embedding_size": 32}),
    _family("ViT", "ViTForImageClassification", "ViT", IMAGE, "pixels"),
    _family("DeiT", "DeiTForImageClassification", "DeiT", IMAGE, "pixels"),
    _family("Swin", "SwinForImageClassification", "Swin", SWIN, "pixels", 64),
    _family("DINOv2", "Dinov2ForImageClassification", "Dinov2", IMAGE, "pixels"),
    _family(
        "T5",
        "T5ForConditionalGeneration",
        "T5",
        {**T5, "use_cache": False, "decoder_start_token_id": 0},
        "words to words",
    ),
    _family("BART", "BartForConditionalGeneration", "Bart", PAIR, "words to words"),
    _family("Marian", "MarianMTModel", "Marian", MARIAN, "words to words"),
    _family("Whisper", "WhisperForConditionalGeneration", "Whisper", WHISPER, "spectrum"),
    _family("wav2vec 2.0", "Wav2Vec2ForCTC", "Wav2Vec2", WAVE, "wave"),
    _family("CLIP", "CLIPModel", "CLIP", CLIP, "pixels and words"),
]

WITHOUT_KIRSCH = """
import json, sys
import torch

torch.set_num_threads(1)
sys.modules["kirsch"] = sys.modules["torchvision"] = None
import transformers

AUTO = "CausalLM Seq2SeqLM SequenceClassification MaskedLM ImageClassification SpeechSeq2Seq CTC".split()


def auto_class(config):
    for auto in [*(getattr(transformers, f"AutoModelFor{name}") for name in AUTO), transformers.AutoModel]:
        kinds = auto._model_mapping.get(type(config), ())
        kinds = kinds if isinstance(kinds, (list, tuple)) else [kinds]
        if config.architectures[0] in [kind.__name__ for kind in kinds]:
            return auto
    raise LookupError(config.architectures[0])


folder, tokens = sys.argv[1], int(sys.argv[2])
stored = torch.load(f"{folder}/stored.pt")
model = auto_class(transformers.AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval()
for tensor in [*model.parameters(), *model.buffers()]:
    # The alignment of a tensor in memory decides which kernel runs, and kernels differ in the last bit of a result.
    tensor.data = tensor.data.clone()
inputs = stored["inputs"]
with torch.no_grad():
    found = {"same": torch.equal(model(**inputs)[0], stored["outputs"])}
    if stored["generated"] is not None:
        start = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
        for cache in (True, False):
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            made = model.generate(**start, **lengths, do_sample=False, use_cache=cache)
            found["cached" if cache else "uncached"] = torch.equal(made, stored["generated"])
print(json.dumps(found))
"""


def row(recipe: Recipe) -> dict[str, Any]:
    """Return the result of one family."""
    model, inputs = recipe.build()
    found: dict[str, Any] = {"name": recipe.name, "parameters": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    graph = kirsch.trace(model, inputs)
    found["trace"] = time.perf_counter() - start
    try:
        plans = (kirsch.plan(graph, kirsch.Goal(parameters=goal), loadable=True) for goal in GOALS)
        plan = next(plan for plan in plans if _fraction(plan) >= LEAST or plan.goal["parameters"] == GOALS[-1])
    except KirschError as error:
        return found | {"why": str(error), "plan": time.perf_counter() - start - found["trace"]}
    found["plan"] = time.perf_counter() - start - found["trace"]
    before = model.config.to_dict()
    result = prune_with_verification(model, plan)
    found["left"] = _fraction(plan)
    found["numbers"] = {path: (_number(before, path), number) for path, number in result.plan.configuration.items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            result.model.save_pretrained(folder)
        except KirschError as error:
            return found | {"why": str(error)}
        return found | loaded(result.model, inputs, folder)


def _fraction(plan: kirsch.Plan) -> float:
    return plan.after.parameters / plan.before.parameters


def _number(config: dict[str, Any], path: str) -> Any:
    owner: Any = config
    for name in path.split("."):
        owner = owner[int(name)] if isinstance(owner, (list, tuple)) else owner.get(name)
    return owner


def loaded(model: nn.Module, inputs: dict[str, torch.Tensor], folder: str) -> dict[str, bool]:
    """Return whether a process without Kirsch loads a saved model, with the same outputs and generated tokens."""
    start = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        outputs = model(**inputs)[0]
        generated = model.generate(**start, **options) if model.can_generate() else None
    torch.save({"inputs": inputs, "outputs": outputs, "generated": generated}, f"{folder}/stored.pt")
    paths = os.pathsep.join(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if "src" not in path)
    done = subprocess.run(  # noqa: S603 - this Python
        [sys.executable, "-c", WITHOUT_KIRSCH, folder, str(TOKENS)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}  # type: ignore[dict-item]
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


HEADER = """\
# Pruned transformers models that load elsewhere

<!-- written by benchmarks/loadable.py; do not edit -->

`kirsch.plan(..., loadable=True)` makes only cuts that the configuration of a transformers model can state.
`save_pretrained` of the pruned model then writes a checkpoint that `from_pretrained` loads in a process without Kirsch.

The cuts are found by trials, not by the names of models or layers. Kirsch decreases each number of the configuration,
alone and together with up to three others, and builds the model on the meta device. A number can be used if the sizes
of the built model are those after the removal of units from some groups, and if a model that is built with the number
returns the same bits as the pruned model. The numbers of layers are found in the same way. Of the widths and layers
that reach the goal, those are removed whose importances have the smallest sum. With an importance that uses data, the
best choice of each set of numbers is measured, and the one that changes the outputs least is taken.

The table shows models with small configurations and random weights, pruned to at most half of their parameters; to
52 % if the few values of the numbers have no combination between 48 and 50 %. *Left* is the fraction of
the parameters that remain. *Same outputs*: a process without Kirsch loads the checkpoint with an `AutoModel` class, and
its outputs have the same bits. *Same tokens*: it generates the same tokens with and without its cache.

"""


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page with one row per family, and the reasons of those that miss the goal."""
    reached = sum(bool(found.get("same")) and LEAST <= found["left"] <= GOALS[-1] for found in rows)
    lines = [
        f"{reached} of {len(rows)} families reach half of their parameters within two points, and load elsewhere.",
        "",
        "| family | parameters | left | changed numbers | same outputs | same tokens |",
        "|---|---|---|---|---|---|",
    ]
    for found in rows:
        changed = ", ".join(f"`{path}` {old} → {new}" for path, (old, new) in found.get("numbers", {}).items())
        left = f"{found['left']:.1%}" if "left" in found else "–"
        tokens = "–" if "cached" not in found else _word(found["cached"] and found["uncached"])
        same = _word(found["same"]) if "same" in found else "–"
        cells = [found["name"], f"{found['parameters']:,}", left, changed or "–", same, tokens]
        lines.append(f"| {' | '.join(cells)} |")
    missed = [f"- {found['name']}: {found.get('why', found.get('error'))}" for found in rows if "same" not in found]
    if missed:
        lines += ["", "Not reached, with the error of `kirsch.plan`:", "", *missed]
    return HEADER + "\n".join(lines) + "\n"


def _word(value: bool) -> str:
    return "yes" if value else "no"


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    stored = {found["name"]: found for found in map(json.loads, ROWS.read_text().splitlines())} if ROWS.exists() else {}
    for recipe in FAMILIES:
        if fnmatch.fnmatch(recipe.name, options.only) and recipe.name not in stored:
            stored[recipe.name] = found = row(recipe)
            print(json.dumps(found), flush=True)
            with ROWS.open("a") as file:
                file.write(json.dumps(found) + "\n")
    (ROOT / "docs/loadable.md").write_text(page([stored[r.name] for r in FAMILIES if r.name in stored]))


if __name__ == "__main__":
    main()
