"""Holds what leaves mmbrecq: exported files, the runtimes that execute them, and the rules they keep."""
