"""What a record of a teacher store takes on disk, and what building and reading cost; writes docs/store.md.

The teacher is one small matrix product, so that what is timed is the store. Reading: random ids in batches of 256,
files in the page cache, median of rounds. Beside it a file a sample, as `torch.save` writes it.

    python benchmarks/store.py    # the rows go to build/store.json too
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from kirsch.distillation.losses.top_k import stored_top_k
from kirsch.distillation.store import Dense, TeacherStore, TopK, build
from kirsch.distillation.store.record import index_type
from kirsch.distillation.teachers import TOP_K
from kirsch.frameworks.augment import Chain, Crop, Flip, Noise
from kirsch.frameworks.data import ArrayData
from kirsch.measurement.machine import environment, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.frameworks.data import Batch

ROOT = Path(__file__).parents[1]
BATCH, BATCHES, ROUNDS, WIDTH = 256, 100, 9, 16
SETS: dict[str, tuple[TopK | Dense, int, int]] = {
    "top 10 of 10": (TopK(10), 10, 200_000),
    "top 10 of 1,000": (TopK(10), 1000, 200_000),
    "top 100 of 21,841": (TopK(100), 21_841, 20_000),
    "top 64 of 128,256": (TopK(64), 128_256, 2_000),
    "dense, 100": (Dense(), 100, 200_000),
    "dense, 1,000": (Dense(), 1000, 50_000),
}
"""What is kept, classes, samples."""
FILES = 2_000
START, END = "<!-- table: written by benchmarks/store.py -->", "<!-- end of table -->"


def formula(keep: TopK | Dense, classes: int) -> int:
    """Bytes of a record, as docs/store.md states them."""
    if isinstance(keep, TopK):
        return 4 + keep.k * (int(index_type(classes)[1]) + 2) + 2
    return 4 + 2 * classes + 4


def per_sample_us(read: Callable[[np.ndarray], Any], samples: int, batch: int = BATCH) -> float:
    """Microseconds a sample: the median of rounds over random ids."""
    random, rounds = np.random.default_rng(0), []
    for _ in range(ROUNDS):
        ids = [random.integers(0, samples, batch) for _ in range(BATCHES)]
        begun = time.perf_counter()
        for one in ids:
            read(one)
        rounds.append((time.perf_counter() - begun) / BATCHES / batch * 1e6)
    return statistics.median(rounds)


def measure(keep: TopK | Dense, classes: int, samples: int) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    teacher = nn.Linear(WIDTH, classes)
    inputs = np.random.default_rng(0).standard_normal((samples, WIDTH)).astype(np.float32)
    data = ArrayData(inputs, None, BATCH, Noise(0.1))
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        build(folder, teacher, data, keep=keep, batch_size=BATCH)
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        for start in range(0, samples, BATCH):
            teacher_inputs = data.look(np.arange(start, min(start + BATCH, samples)), 0, 0).inputs
            with torch.no_grad():
                teacher(torch.from_numpy(teacher_inputs))
        alone = time.perf_counter() - begun
        store = TeacherStore.open(folder)
        store.verify()
        size = (Path(folder) / "view-0000.bin").stat().st_size
        check = store.check(teacher, data)
        return {
            "samples": samples,
            "bytes_per_record": size / samples,
            "bytes_by_formula": formula(keep, classes),
            "build_samples_per_second": samples / seconds,
            "store_us_per_sample": (seconds - alone) / samples * 1e6,
            "read_us_per_sample": per_sample_us(store.read, samples),
            "read_alone_us": per_sample_us(store.read, samples, batch=1),
            "largest_difference": max(check.differences.values()),
            "top1_agreement": check.top1_agreement,
        }


def file_per_sample() -> dict[str, Any]:
    """The top 10 of 1,000 classes in a file a sample."""
    with tempfile.TemporaryDirectory() as folder:
        record = {"indices": torch.arange(10, dtype=torch.int16), "log_p": torch.zeros(10, dtype=torch.float16)}
        begun = time.perf_counter()
        for number in range(FILES):
            torch.save(record, f"{folder}/{number}.pt")
        seconds = time.perf_counter() - begun
        size = Path(f"{folder}/0.pt").stat().st_size

        def read(ids: np.ndarray) -> list[dict[str, torch.Tensor]]:
            return [torch.load(f"{folder}/{number}.pt", weights_only=True) for number in ids]

        cost = per_sample_us(read, FILES, batch=8)
    return {
        "samples": FILES,
        "bytes_per_record": size,
        "build_samples_per_second": FILES / seconds,
        "read_us_per_sample": cost,
    }


def network(widths: tuple[int, ...]) -> nn.Module:
    """A plain convolutional network for 32 x 32 pixels and 10 classes."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, *widths)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def divergence(scores: torch.Tensor, found: dict[str, np.ndarray]) -> torch.Tensor:
    """Soft targets from a record of the store."""
    charge: torch.Tensor = stored_top_k(scores, *(torch.from_numpy(found[name]) for name in TOP_K))
    return charge


def steps() -> dict[str, Any]:
    """Milliseconds of a training step on labels, with the store, and with the teacher, in turns."""
    torch.manual_seed(0)
    student, teacher = network((32, 64, 128)), network((64, 128, 256)).eval()
    random = np.random.default_rng(0)
    inputs = random.standard_normal((2048, 3, 32, 32)).astype(np.float32)
    data = ArrayData(inputs, random.integers(0, 10, 2048), 128, Chain(Crop(4), Flip()), views=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)

    def step(batch: Batch, target: Callable[[Batch, torch.Tensor, torch.Tensor], Any]) -> float:
        begun = time.perf_counter()
        seen = torch.from_numpy(batch.inputs)
        scores = student(seen)
        loss = nn.functional.cross_entropy(scores, torch.from_numpy(batch.targets)) + target(batch, seen, scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - begun

    def live(_batch: Batch, seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            log_t = teacher(seen).log_softmax(-1)
        return nn.functional.kl_div(scores.log_softmax(-1), log_t, log_target=True, reduction="batchmean")

    with tempfile.TemporaryDirectory() as folder:
        store = build(folder, teacher, data, keep=TopK(5), views=2)
        targets: dict[str, Callable[[Batch, torch.Tensor, torch.Tensor], Any]] = {
            "labels": lambda _batch, _seen, _scores: 0,
            "store": lambda batch, _seen, scores: divergence(scores, store.read(batch.ids, batch.view)),
            "teacher": live,
        }
        times: dict[str, list[float]] = {name: [] for name in targets}
        for epoch in range(8):
            for batch in data.epoch(0, epoch):
                for name, target in targets.items():
                    times[name].append(step(batch, target))
    middle = {name: statistics.median(values[12:]) * 1e3 for name, values in times.items()}
    return middle | {
        "store_ratio": middle["store"] / middle["labels"],
        "live_ratio": middle["teacher"] / middle["labels"],
    }


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    machine = found["environment"]
    lines = [
        START,
        f"`python benchmarks/store.py` writes this table; here on {machine['cpu']}, one thread, {found['date']}.",
        "",
        "| kept | bytes a record | by formula | reading, batches of 256 | one by one | building, beside the teacher |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        beside = f"{row['store_us_per_sample']:.1f} µs a sample" if "store_us_per_sample" in row else "–"
        alone = f"{row['read_alone_us']:.0f} µs" if "read_alone_us" in row else f"{row['read_us_per_sample']:.0f} µs"
        batch = f"{row['read_us_per_sample']:.2f} µs a sample" if "read_alone_us" in row else "–"
        by = f"{row['bytes_by_formula']:,}" if "bytes_by_formula" in row else "–"
        lines.append(f"| {name} | {row['bytes_per_record']:,.0f} | {by} | {batch} | {alone} | {beside} |")
    took = found["steps"]
    by_store = f"{took['store']:.1f} ms with the store ({took['store_ratio']:.2f} of it)"
    by_teacher = f"{took['teacher']:.1f} ms with a teacher twice as wide beside it ({took['live_ratio']:.2f})"
    plain = f"A step of a small network on 128 images takes {took['labels']:.1f} ms on labels alone"
    lines += ["", f"{plain}, {by_store},", f"and {by_teacher}."]
    return "\n".join([*lines, END])


def main() -> None:
    """Measure, and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    before = load()
    rows = {name: measure(*given) for name, given in SETS.items()}
    rows["a file a sample, top 10 of 1,000"] = file_per_sample()
    found = {
        "environment": environment(),
        "load_before": before,
        "protocol": f"random ids, batches of {BATCH}, page cache, median of {ROUNDS} rounds of {BATCHES} batches",
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
        "steps": steps(),
    }
    out = ROOT / "build" / "store.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    page = ROOT / "docs" / "store.md"
    text = page.read_text()
    page.write_text(text[: text.index(START)] + table(found) + text[text.index(END) + len(END) :])
    print(table(found))


if __name__ == "__main__":
    main()
