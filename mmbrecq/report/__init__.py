"""Reports a run: ``summary.json``, the table in the terminal and ``report.html``."""

from mmbrecq.report.html import render_html, write_report
from mmbrecq.report.summary import Summary
from mmbrecq.report.table import print_table, render_table

__all__ = ['Summary', 'print_table', 'render_html', 'render_table', 'write_report']
