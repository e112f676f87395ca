"""Numbers as texts, tested where a digit or a unit changes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch import figures

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (1, "1.00"),
        (0.99949, "0.999"),
        (0.9995, "1.00"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.96, "100"),
        (402, "402"),
        (999.49, "999"),
        (999.5, "1000"),
        (12345.6, "12300"),
        (0.00123456, "0.00123"),
        (0.000999951, "0.00100"),
        (-1.2345, "-1.23"),
        (NAN, "nan"),
        (INF, "inf"),
        (-INF, "-inf"),
    ],
)
def test_a_number_has_three_significant_digits_and_no_exponent(value, text):
    assert figures.digits(value) == text


def test_the_number_of_significant_digits_can_be_chosen():
    assert [figures.digits(math.pi, significant) for significant in (1, 2, 5)] == ["3", "3.1", "3.1416"]


@given(st.floats(1e-12, 1e12) | st.floats(-1e12, -1e-12), st.integers(1, 6))
def test_the_rounding_error_is_at_most_half_of_the_last_digit(value, significant):
    text = figures.digits(value, significant)
    power = 10.0 ** (math.floor(math.log10(abs(value))) + 1 - significant)
    assert abs(float(text) - value) <= 0.5 * power * (1 + 1e-9)  # a tie may be rounded either way
    assert len(text.replace("-", "").replace(".", "").lstrip("0").rstrip("0")) <= significant
    assert "e" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (31, "31"),
        (31.0, "31"),
        (0.5, "0.500"),
        (999, "999"),
        (999.4, "999"),
        (999.5, "1.00 k"),
        (1000, "1.00 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (1e6, "1.00 M"),
        (1_210_000, "1.21 M"),
        (999_500_000, "1.00 G"),
        (25.6e9, "25.6 G"),
        (1e12, "1000 G"),
        (-1500, "-1.50 k"),
        (NAN, "nan"),
        (INF, "inf"),
    ],
)
def test_a_count_has_the_prefix_with_one_to_three_digits_before_the_point(value, text):
    assert figures.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.5, "1.00 kB"), (61_234, "61.2 kB"), (3_574_126, "3.57 MB"), (NAN, "nan B")],
)
def test_a_file_size_is_in_decimal_units(value, text):
    assert figures.bytes_(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 µs"),
        (84.13, "84.1 µs"),
        (999.49, "999 µs"),
        (999.5, "1.00 ms"),
        (2310, "2.31 ms"),
        (999_499, "999 ms"),
        (999_500, "1.00 s"),
        (1.2e6, "1.20 s"),
        (60e6, "60.0 s"),
        (NAN, "nan µs"),
        (INF, "inf s"),
    ],
)
def test_a_time_has_the_unit_with_one_to_three_digits_before_the_point(value, text):
    assert figures.micros(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.95, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (100 * 3600, "100 h 00 min"),
        (-0.04, "0.0 s"),
        (NAN, "nan s"),
        (INF, "inf s"),
    ],
)
def test_a_duration_has_one_or_two_units(value, text):
    assert figures.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.98349, 1, "98.3 %"),
        (0.9995, 1, "100.0 %"),  # the float 99.95 is slightly larger than 99.95
        (0.9994, 1, "99.9 %"),
        (1, 0, "100 %"),
        (0, 1, "0.0 %"),
        (-0.0004, 1, "0.0 %"),
        (-0.5, 0, "-50 %"),
        (1e6, 0, "100000000 %"),
        (NAN, 1, "nan %"),
    ],
)
def test_a_fraction_is_shown_as_percent(value, decimals, text):
    assert figures.percent(value, decimals) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "1.2 points"),
        (0.01, "1.0 point"),
        (0.00951, "1.0 point"),
        (0, "0.0 points"),
        (-0.0004, "0.0 points"),
        (-0.0123, "−1.2 points"),
        (NAN, "nan points"),
    ],
)
def test_a_difference_of_fractions_is_shown_in_percentage_points(value, text):
    assert figures.points(value) == text


def test_an_interval_is_shown_by_half_its_width():
    assert figures.interval(0.983, 0.971, 0.995) == "98.3 % ± 1.2"
    assert figures.interval(1.0, 0.9, 1.0) == "100.0 % ± 5.0"
    assert figures.interval(NAN, NAN, NAN) == "nan % ± nan"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((2.7, 2.514, 2.926), "2.70× [2.51 – 2.93]"),
        ((0.9995,), "1.00×"),
        ((31.0, 9.996, 999.5), "31.0× [10.0 – 1000]"),
        ((2.0, None, 3.0), "2.00×"),
        ((NAN, 1.0, INF), "nan× [1.00 – inf]"),
        ((0.0, 0.0, 0.0), "0× [0 – 0]"),
    ],
)
def test_a_ratio_is_shown_with_its_interval(arguments, text):
    assert figures.ratio(*arguments) == text


@pytest.mark.parametrize(
    ("texts", "options", "text"),
    [
        ([], {}, ""),
        (["a"], {}, "a"),
        (["a", "b", "c"], {}, "a, b, c"),
        (["a", "b", "c", "d"], {}, "a, b, c and 1 more"),
        (["a"] * 1003, {"most": 2, "separator": "; "}, "a; a and 1,001 more"),
    ],
)
def test_a_list_shows_the_first_texts_and_the_number_of_the_others(texts, options, text):
    assert figures.listed(texts, **options) == text
