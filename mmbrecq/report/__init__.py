"""Reports a run: ``summary.json``, the table in the terminal and ``report.html``."""
