"""The benchmark of pruned text models runs, continues after an interruption, and writes its tables."""

from __future__ import annotations

import gzip
import json
import random
from types import SimpleNamespace

import distill_text
import pytest
import text_decoder
import text_encoder
import text_pruning
import torch

pytestmark = pytest.mark.filterwarnings("ignore")
CACHED = (distill_text.sentences, distill_text.vocabulary, distill_text.encoded, text_decoder.sequences)


def write_data(folder):
    """Write sentences whose words differ between the classes, and captions of the same words."""
    draw, words = random.Random(0), ["a", "dog", "and", "a", "man", "walk", "on", "green", "grass", "near", "water"]
    (folder / "sst2").mkdir()
    (folder / "multi30k").mkdir()
    for part, count in (("train", 320), ("test", 24)):
        labels = [draw.randrange(2) for _ in range(count)]
        lines = [f"{' '.join(draw.choices(words[5 * label :][:5], k=8))}\t{label}" for label in labels]
        (folder / f"sst2/{part}.tsv").write_text("\n".join(lines) + "\n")
    for part, count in zip(text_decoder.PARTS, (300, 40), strict=True):
        text = "\n".join(" ".join(draw.choices(words, k=8)) for _ in range(count))
        (folder / f"multi30k/{part}.en.gz").write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.setenv("KIRSCH_DATA", str(tmp_path))
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{text_pruning.START}\nold\n{text_pruning.END}\nafter\n")
    for name, value in {"ROWS": tmp_path / "rows.jsonl", "PAGE": page, "MODELS": tmp_path}.items():
        monkeypatch.setattr(text_pruning, name, value)
    for task in (text_decoder, text_encoder):
        monkeypatch.setattr(task, "LOADABLE", ("magnitude",))
        monkeypatch.setattr(task, "RANKINGS", ("local",))
        monkeypatch.setattr(task, "GOALS", (0.6,))
    monkeypatch.setattr(text_decoder, "IMPORTANCES", ("taylor", "wanda"))
    monkeypatch.setattr(text_encoder, "IMPORTANCES", ("movement", "random"))
    for function in CACHED:
        function.cache_clear()
    yield SimpleNamespace(rows=tmp_path / "rows.jsonl", page=page)
    for function in CACHED:
        function.cache_clear()


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_all_rows_of_a_seed_are_measured_once_and_appear_in_the_table(benchmark, name, monkeypatch):
    text_pruning.run(name, 0, 0.6)
    rows = [json.loads(line) for line in benchmark.rows.read_text().splitlines()]
    assert len(rows) == len(text_pruning.rows_of(name, 0))
    cost = text_pruning.TASKS[name].COST
    dense = text_pruning.cost_of(text_pruning.TASKS[name].network(), text_pruning.TASKS[name].example())[cost]
    for row in rows[1:]:
        assert 0.4 * dense < row[cost] <= 0.6 * dense
        assert row["recovered"] > 0
    # The dense model is read from its file, and a row that is missing is measured again with the same result.
    benchmark.rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:1] + rows[2:]))
    monkeypatch.setattr(text_pruning.TASKS[name], "train", None)
    text_pruning.run(name, 0, 0.6)
    *_, again = map(json.loads, benchmark.rows.read_text().splitlines())
    changing = {"seconds", "plan_seconds"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in rows[1].items() if k not in changing
    }

    monkeypatch.setattr("sys.argv", ["text_pruning.py", "table"])
    text_pruning.main()
    page = benchmark.page.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    for importance in text_pruning.TASKS[name].IMPORTANCES:
        assert f"| `{importance}` |" in page
    assert '| `taylor`, `ranking="local"` |' in page


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_a_small_model_costs_at_most_the_goal_and_almost_as_much(benchmark, name):
    task = text_pruning.TASKS[name]
    dense, small = (
        text_pruning.cost_of(task.network(*widths), task.example())[task.COST]
        for widths in ((), text_pruning.small(task, 0.5))
    )
    assert 0.48 * dense < small <= 0.5 * dense


def test_the_perplexity_of_a_uniform_model_is_the_number_of_characters(benchmark):
    model = text_decoder.network()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert text_decoder.quality(model) == pytest.approx(model.config.vocab_size)
