"""What the formulas of "nst" and "rkd-angle" cost against the ones that the papers suggest; writes docs/losses.md.

Both forms give the same number. Time is that of the processor for value and gradient, one thread, the two forms in turn
in one process, and the median of the rounds; memory is the peak above what the process held before, each form in a
process of its own.

    python benchmarks/losses.py    # all; the rows go to build/losses.json too
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
"""After this much time, three rounds are enough."""
FEWEST = 3


def nst(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Products of all pairs of channels at all places, (N, C, C', H · W), then their sums."""
    first, second = (F.normalize(part.flatten(2), dim=2) for part in (student, teacher))

    def kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left[:, :, None] * right[:, None]).sum(-1).square().mean()

    return kernel(first, first) + kernel(second, second).detach() - 2 * kernel(first, second)


def rkd_angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Differences of all pairs of samples, (N, N, D), scaled to length 1, then their inner products."""

    def cosines(features: torch.Tensor) -> torch.Tensor:
        apart = F.normalize(features[None] - features[:, None], dim=2)
        return apart @ apart.mT

    with torch.no_grad():
        wanted = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), wanted)


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
    """Value and gradient of one form; gives the value."""
    loss, shape = ROWS[row]
    charged = PLAIN[loss] if form == "plain" else LOSSES[loss]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    student.requires_grad_()

    def step() -> float:
        student.grad = None
        found = charged(student, teacher)
        found.backward()
        return float(found.detach())

    return step


def measure(row: str) -> dict[str, Any]:
    """Times of both forms in turn, and by how much their values differ."""
    steps = {form: _step(row, form) for form in FORMS}
    values = {form: step() for form, step in steps.items()}  # the first run of each is none of the rounds
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    began = time.perf_counter()
    while len(times["plain"]) < (FEWEST if time.perf_counter() - began > LONGEST_S else ROUNDS):
        for form, step in steps.items():
            start = time.process_time()
            step()
            times[form].append(time.process_time() - start)
    plain, own = (statistics.median(times[form]) for form in FORMS)
    ratios = [first / second for first, second in zip(*times.values(), strict=True)]
    return {
        "plain_ms": 1e3 * plain,
        "kirsch_ms": 1e3 * own,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "difference": abs(values["plain"] - values["kirsch"]) / abs(values["plain"]),
    }


def peak(row: str, form: str) -> float:
    """MiB above what the process held before the first step."""
    step = _step(row, form)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step()
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def page(found: dict[str, Any]) -> str:
    """docs/losses.md."""
    lines = ["| | plain | Kirsch | times faster | lowest to highest | memory, plain | Kirsch | relative difference |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in found["rows"].items():
        lines.append(
            f"| {name} | {row['plain_ms']:.1f} ms | {row['kirsch_ms']:.1f} ms | **{row['ratio']:.1f}** "
            f"| {min(row['ratios']):.1f}–{max(row['ratios']):.1f} | {row['plain_mib']:.0f} MiB "
            f"| {row['kirsch_mib']:.0f} MiB | {row['difference']:.0e} |"
        )
    return HEAD.format(**found) + "\n\n" + "\n".join(lines) + "\n"


HEAD = """# Cost of losses

<!-- written by benchmarks/losses.py; do not edit -->

The loss "nst" needs the inner products of all pairs of channels, "rkd-angle" the angles of all triples of samples.
*Plain* computes the sums directly: products of channels at every position, differences of samples in every
dimension. *Kirsch* uses matrices of inner products: for "nst" of channels or of positions, whichever is cheaper; for
"rkd-angle" of samples, in double precision, which keeps small differences between distant samples accurate. The shapes
are those of student and teacher, in single precision.

Times are processor times of value and gradient on one thread, both forms in turn, as the median of {rounds} rounds
({fewest} if a round takes long); *times faster* is the median of the ratios. Memory is the increase of the peak memory,
in a separate process; a few MiB of it belong to the libraries.

`python benchmarks/losses.py` writes this page; measured on {machine}, {date}.
Other processes ran at the same time (load {load:.1f}), which affects the times more than the ratios.

The cost of "rkd-angle" hardly depends on the number of dimensions. With as many samples as dimensions there is no
gain, and the intermediate sums take some memory."""


def main() -> None:
    """The command line above."""
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
