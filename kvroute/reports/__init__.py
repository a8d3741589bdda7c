"""Reports that people look at: plots, and pages of one self-contained HTML file."""

from __future__ import annotations

from kvroute.reports.page import ReportPage

__all__ = ["ReportPage"]
