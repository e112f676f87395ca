"""Draws pipeline.svg, the picture at the head of the README. Run: python docs/pictures/draw.py."""

from __future__ import annotations

from pathlib import Path

STEPS = (
    ("teacher", "large, trained"),
    ("distill", "CE + T²·KL"),
    ("prune", "plan, cut, verify"),
    ("recover", "learn again"),
    ("export", "ONNX, checked"),
    ("measure", "where it runs"),
    ("report", "one file"),
)
BOX, GAP, HEIGHT, TOP = 112, 24, 60, 12


def draw() -> str:
    """Return the picture as SVG; gray and red are readable on white and on black."""
    width = len(STEPS) * (BOX + GAP) - GAP + 4
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 2 * TOP}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif" text-anchor="middle">'
    )
    parts = [
        head,
        "<title>teacher, distill, prune, recover, export, measure, report</title>",
    ]
    for index, (name, text) in enumerate(STEPS):
        x = 2 + index * (BOX + GAP)
        ours = name in ("distill", "prune", "recover")
        color = "#d6336c" if ours else "#868e96"
        box = f'x="{x}" y="{TOP}" width="{BOX}" height="{HEIGHT}" rx="8"'
        parts += [
            f'<rect {box} fill="none" stroke="{color}" stroke-width="{2 if ours else 1.2}"/>',
            f'<text x="{x + BOX / 2}" y="{TOP + 26}" font-size="16" font-weight="600" fill="{color}">{name}</text>',
            f'<text x="{x + BOX / 2}" y="{TOP + 45}" font-size="12" fill="#868e96">{text}</text>',
        ]
        if index:
            arrow = f"M{x - GAP + 4} {TOP + HEIGHT / 2}h{GAP - 9}m-5 -4l5 4l-5 4"
            parts.append(f'<path d="{arrow}" fill="none" stroke="#868e96" stroke-width="1.4"/>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    (Path(__file__).parent / "pipeline.svg").write_text(draw(), encoding="utf-8")
