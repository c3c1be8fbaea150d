"""The version of mmbrecq."""

__version__ = '0.1.0'
