"""The report: one offline HTML file."""

from kirsch.report.html import render

__all__ = ["render"]
