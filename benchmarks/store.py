"""Measure the record size of a teacher store and the time to build and read it; write the table in docs/store.md.

The teacher is one small matrix product, so that the store takes most of the time. Records are read by random ids in
batches of 256, with files in the page cache; the time is the median of the rounds. One file per sample, written by
`torch.save`, is measured for comparison. All times are CPU times of one thread, which other processes on the machine
hardly change.

    python benchmarks/store.py    # also writes the rows to build/store.json
"""

from __future__ import annotations

import argparse
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

from kirsch.data.augment import Noise
from kirsch.data.batches import ArrayData
from kirsch.distillation.store import Dense, TeacherStore, TopK, build_store
from kirsch.distillation.store.record import index_type
from kirsch.distillation.store.specification import DIGEST_BYTES
from kirsch.measurement.machine import environment, load

if TYPE_CHECKING:
    from collections.abc import Callable


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
"""Kept outputs, number of classes and number of samples of each row, by name."""
FILES = 2_000
START, END = "<!-- table: written by benchmarks/store.py -->", "<!-- end of table -->"


def formula(keep: TopK | Dense, classes: int) -> int:
    """Return the bytes per record by the formula of docs/store.md."""
    if isinstance(keep, TopK):
        return 4 + keep.k * (np.dtype(index_type(classes)).itemsize + 2) + 2
    return 4 + 2 * classes + 4


def per_sample_us(read: Callable[[np.ndarray], Any], samples: int, batch: int = BATCH) -> float:
    """Return the median time to read a sample by random ids, in microseconds."""
    random, rounds = np.random.default_rng(0), []
    for _ in range(ROUNDS):
        ids = [random.integers(0, samples, batch) for _ in range(BATCHES)]
        begun = time.process_time()
        for batch_ids in ids:
            read(batch_ids)
        rounds.append((time.process_time() - begun) / BATCHES / batch * 1e6)
    return statistics.median(rounds)


def measure(keep: TopK | Dense, classes: int, samples: int) -> dict[str, Any]:
    """Return the row of one kind of record."""
    torch.manual_seed(0)
    teacher = nn.Linear(WIDTH, classes)
    inputs = np.random.default_rng(0).standard_normal((samples, WIDTH)).astype(np.float32)
    data = ArrayData(inputs, None, batch_size=BATCH, augment=Noise(0.1))
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        build_store(folder, teacher, data, keep=keep, batch_size=BATCH)
        seconds = time.process_time() - begun
        begun = time.process_time()
        for start in range(0, samples, BATCH):
            teacher_inputs = data.batch(np.arange(start, min(start + BATCH, samples)), 0, 0).inputs
            with torch.no_grad():
                teacher(torch.from_numpy(teacher_inputs))
        alone = time.process_time() - begun
        store = TeacherStore.open(folder)
        store.verify()
        size = sum(path.stat().st_size - DIGEST_BYTES for path in Path(folder).glob("view-*.bin"))
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
    """Return the row of the top 10 of 1,000 classes in one file per sample."""
    with tempfile.TemporaryDirectory() as folder:
        record = {"indices": torch.arange(10, dtype=torch.int16), "log_p": torch.zeros(10, dtype=torch.float16)}
        begun = time.process_time()
        for number in range(FILES):
            torch.save(record, f"{folder}/{number}.pt")
        seconds = time.process_time() - begun
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


def table(found: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    machine = found["environment"]
    lines = [
        START,
        f"`python benchmarks/store.py` writes this table; CPU time on {machine['cpu']}, one thread, {found['date']}.",
        "",
        "| kept | bytes per record | by formula | reading, batches of 256 | one by one | building, without teacher |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        building = f"{row['store_us_per_sample']:.1f} µs per sample" if "store_us_per_sample" in row else "–"
        alone = f"{row['read_alone_us']:.0f} µs" if "read_alone_us" in row else f"{row['read_us_per_sample']:.0f} µs"
        batch = f"{row['read_us_per_sample']:.2f} µs per sample" if "read_alone_us" in row else "–"
        by = f"{row['bytes_by_formula']:,}" if "bytes_by_formula" in row else "–"
        lines.append(f"| {name} | {row['bytes_per_record']:,.0f} | {by} | {batch} | {alone} | {building} |")
    return "\n".join([*lines, END])


def main() -> None:
    """Measure, and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    before = load()
    rows = {name: measure(*options) for name, options in SETS.items()}
    rows["one file per sample, top 10 of 1,000"] = file_per_sample()
    found = {
        "environment": environment(),
        "load_before": before,
        "protocol": f"random ids, batches of {BATCH}, page cache, median of {ROUNDS} rounds of {BATCHES} batches",
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
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
