"""Time and memory of "nst" and "rkd-angle", compared with the formulas of the papers; writes docs/losses.md.

Both forms have the same value. The time is the processor time of value and gradient on one thread. The two forms are
timed in turn in one process, and the median of the rounds is shown. The memory is the peak of a separate process for
each form, minus the memory before the step.

    python benchmarks/losses.py    # all; also writes the rows to build/losses.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from kirsch.distillation.losses import LOSSES
from kirsch.measurement.machine import cpu, load

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
ROUNDS = 7
LONGEST_S = 60.0
"""Seconds after which three rounds are enough."""
FEWEST = 3


def nst(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return "nst" from the products of all pairs of channels at all positions, (N, C, C', H · W)."""
    first, second = (F.normalize(part.flatten(2), dim=2) for part in (student, teacher))

    def kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left[:, :, None] * right[:, None]).sum(-1).square().mean()

    return kernel(first, first) + kernel(second, second).detach() - 2 * kernel(first, second)


def rkd_angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return "rkd-angle" from the differences of all pairs of samples, (N, N, D), scaled to norm 1."""

    def cosines(features: torch.Tensor) -> torch.Tensor:
        apart = F.normalize(features[None] - features[:, None], dim=2)
        return apart @ apart.mT

    with torch.no_grad():
        target = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), target)


PLAIN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"nst": nst, "rkd-angle": rkd_angle}
ROWS = {
    f"{loss} {' × '.join(map(str, shape))}": (loss, shape)
    for loss, shape in (
        ("nst", (64, 32, 16, 16)),
        ("nst", (64, 64, 8, 8)),
        ("nst", (16, 64, 28, 28)),
        ("nst", (16, 256, 7, 7)),
        ("rkd-angle", (64, 256)),
        ("rkd-angle", (256, 256)),
        ("rkd-angle", (256, 2048)),
    )
}
FORMS = ("plain", "kirsch")


def _step(row: str, form: str) -> Callable[[], float]:
    """Return a function that computes value and gradient of one form, and returns the value."""
    loss, shape = ROWS[row]
    function = PLAIN[loss] if form == "plain" else LOSSES[loss]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    student.requires_grad_()

    def step() -> float:
        student.grad = None
        value = function(student, teacher)
        value.backward()
        return float(value.detach())

    return step


def measure(row: str) -> dict[str, Any]:
    """Return the times of both forms, measured in turn, and the relative difference of their values."""
    steps = {form: _step(row, form) for form in FORMS}
    values = {form: step() for form, step in steps.items()}  # the first run of each is not a round
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    began = time.perf_counter()
    while len(times["plain"]) < (FEWEST if time.perf_counter() - began > LONGEST_S else ROUNDS):
        for form, step in steps.items():
            start = time.process_time()
            step()
            times[form].append(time.process_time() - start)
    plain, kirsch = (statistics.median(times[form]) for form in FORMS)
    ratios = [first / second for first, second in zip(*times.values(), strict=True)]
    return {
        "plain_ms": 1e3 * plain,
        "kirsch_ms": 1e3 * kirsch,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "difference": abs(values["plain"] - values["kirsch"]) / abs(values["plain"]),
    }


def peak(row: str, form: str) -> float:
    """Return the peak memory of a step above the memory before it, in MiB."""
    step = _step(row, form)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step()
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def page(found: dict[str, Any]) -> str:
    """Return the text of docs/losses.md."""
    lines = ["| | plain | Kirsch | times faster | lowest to highest | memory, plain | Kirsch | difference |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in found["rows"].items():
        lines.append(
            f"| {name} | {row['plain_ms']:.1f} ms | {row['kirsch_ms']:.1f} ms | **{row['ratio']:.1f}** "
            f"| {min(row['ratios']):.1f}–{max(row['ratios']):.1f} | {row['plain_mib']:.0f} MiB "
            f"| {row['kirsch_mib']:.0f} MiB | {row['difference']:.0e} |"
        )
    return HEAD.format(**found) + "\n\n" + "\n".join(lines) + "\n"


HEAD = """# Time and memory of losses

<!-- written by benchmarks/losses.py; do not edit -->

This page compares two ways to compute the losses "nst" and "rkd-angle". "nst" needs the inner products of all pairs of
channels, and "rkd-angle" the angles of all triples of samples.

- The *plain* form stores each term of the sums: for "nst", the products of all pairs of channels at every position; for
  "rkd-angle", the differences of all pairs of samples in every dimension.
- The *Kirsch* form uses matrices of inner products. For "nst", the matrix has the inner products of all pairs of
  channels or of all pairs of positions, whichever is cheaper. For "rkd-angle", the matrix has the inner products of
  all pairs of samples, and is computed in float64, because float32 would lose the small distances between similar
  samples.

The first column gives the shape of the student's and the teacher's features: (N, C, H, W) for "nst", (N, D) for
"rkd-angle". The features are float32.

- The time is the processor time of value and gradient on one thread. The two forms are timed in turn. The table shows
  the median of {rounds} rounds ({fewest} if a round takes long).
- *Times faster* is the median of the ratios of the rounds; *lowest to highest* is the range of the ratios.
- The memory is the peak memory of a separate process while it computes value and gradient, minus its memory before. A
  few MiB of the difference belong to PyTorch itself.
- *Difference* is the relative difference between the values of the two forms.

`python benchmarks/losses.py` writes this page. These numbers are from {machine}, {date}.
Other programs ran on the machine (load {load:.1f}), so compare the ratios, not the milliseconds.

The Kirsch form of "rkd-angle" is faster for wide features. With as many samples as dimensions, the Kirsch form is
hardly faster, and needs more memory for its intermediate matrices."""


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--form", choices=FORMS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.row:
        print(json.dumps(peak(given.row, given.form) if given.form else measure(given.row)))
        return
    found: dict[str, Any] = {
        "machine": f"{cpu()[0]}, one thread, torch {torch.__version__}",
        "date": str(datetime.now(UTC).date()),
        "load": load() or 0.0,
        "rounds": ROUNDS,
        "fewest": FEWEST,
        "rows": {},
    }
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name]
        parts = [
            subprocess.run(c, capture_output=True, text=True, check=True).stdout  # noqa: S603 - this file
            for c in (command, *([*command, "--form", form] for form in FORMS))
        ]
        row, *peaks = (json.loads(part) for part in parts)
        found["rows"][name] = row | dict(zip(("plain_mib", "kirsch_mib"), peaks, strict=True))
        print(name, found["rows"][name])
    out = ROOT / "build/losses.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    (ROOT / "docs/losses.md").write_text(page(found))


if __name__ == "__main__":
    main()
