"""Loops that quantize and test, and the hooks around every reconstructed unit."""

from mmbrecq.dependencies import check_dependencies

check_dependencies()
