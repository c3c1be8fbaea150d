"""Parses, formats and computes numbers of bytes."""

import re

from mmbrecq.errors import ConfigError

UNITS = {
    'B': 1, 'kB': 10**3, 'MB': 10**6, 'GB': 10**9, 'TB': 10**12, 'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30, 'TiB': 2**40,
}  # fmt: skip


def parse_bytes(value: int | str, where: str) -> int:
    """Returns the number of bytes of an integer of at least 1, or of a number and a unit, such as ``'1.5 GiB'``.

    ConfigError names the option ``where`` for any other value.
    """
    size = value if type(value) is int else 0
    if isinstance(value, str):
        match = re.fullmatch(r'(\d+(?:\.\d+)?) ?([A-Za-z]+)', value.strip())
        size = round(float(match[1]) * UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ConfigError(
            f"expected {where} to be a number of bytes, or one with a unit of {list(UNITS)} such as '2GiB', "
            f'but got {value!r}'
        )
    return size


def show_bytes(count: float) -> str:
    """Returns a size in decimal units (1 MB is 1,000,000 bytes) with three digits, as ``'44.7 MB'``."""
    value, unit = float(count), 'B'
    for larger in ('kB', 'MB', 'GB', 'TB'):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == 'B' or value >= 99.95 else 1 if value >= 9.995 else 2
    return f'{value:.{digits}f} {unit}'


def weight_bytes(weights: int, scales: int, bits: int | None, symmetric: bool) -> float:
    """Returns the bytes of a weight: packed bits, and for each scale a float and, where there is one, a zero-point.

    Args:
        weights: Number of weights.
        scales: Number of scales.
        bits: Of a weight and of a zero-point; None for a float weight, which has no scales.
        symmetric: Whether there are no zero-points.
    """
    if bits is None:
        return 4.0 * weights
    return (weights * bits + scales * (32 + (0 if symmetric else bits))) / 8
