"""The contrast of the colors of the report."""

from __future__ import annotations

import re

import pytest

from report.structure import STYLE


def rgb(code):
    """Return (red, green, blue), each 0 to 1, of a hexadecimal code of 3 or 6 digits."""
    code = code if len(code) == 6 else "".join(2 * digit for digit in code)
    return tuple(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))


def palettes():
    """Return the colors of the style sheet by theme and variable."""
    return {
        theme: {name: rgb(code) for name, code in re.findall(r"--([\w-]+): #([0-9a-f]{3}|[0-9a-f]{6});", block)}
        for theme, block in zip(("light", "dark"), re.findall(r":root \{([^}]*)\}", STYLE), strict=True)
    }


def contrast(first, second):
    """Return the contrast ratio of two colors as defined by WCAG 2.2."""

    def luminance(color):
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_ratio_has_the_known_values_of_wcag():
    black, white, gray = (0, 0, 0), (1, 1, 1), (0x77 / 255,) * 3
    assert contrast(black, white) == pytest.approx(21)
    assert contrast(gray, white) == pytest.approx(4.48, abs=0.005)  # the lightest common gray below 4.5


TEXT = [
    *(("paper", color) for color in ("ink", "soft", "accent", "met", "missed")),
    *(("wash", color) for color in ("ink", "soft")),
    ("met-wash", "met"),
    ("missed-wash", "missed"),
]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("background", "color"), TEXT)
def test_the_contrast_of_text_is_at_least_4_5(theme, background, color):
    palette = palettes()[theme]
    assert contrast(palette[color], palette[background]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_contrast_of_counts_in_a_confusion_matrix_is_at_least_4_5(theme):
    palette = palettes()[theme]
    shades = re.findall(r"background: color-mix\(in srgb, var\(--(\w+)\) (\d+)%, transparent\)", STYLE)
    assert len(shades) == 5
    for name, percent in shades:
        opacity = int(percent) / 100
        background = [opacity * c + (1 - opacity) * p for c, p in zip(palette[name], palette["paper"], strict=True)]
        assert contrast(palette["ink"], background) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_contrast_of_kept_units_with_removed_units_and_the_page_is_at_least_3(theme):
    """WCAG 2.2, criterion 1.4.11: graphics need a contrast of 3 : 1 with adjacent colors."""
    palette = palettes()[theme]
    assert contrast(palette["accent"], palette["paper"]) >= 3
    assert contrast(palette["accent"], palette["gone"]) >= 3
