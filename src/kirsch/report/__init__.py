"""Report of a run as one offline HTML file."""

from kirsch.report.html import render
from kirsch.report.metrics import read_metrics

__all__ = ["read_metrics", "render"]
