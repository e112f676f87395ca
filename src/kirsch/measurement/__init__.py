"""Latency, quality and agreement, each with its doubt."""
