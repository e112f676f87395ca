"""Latency and quality with confidence intervals, and agreement of two models."""
