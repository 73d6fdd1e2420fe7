"""How numbers and times are written in reports."""

from __future__ import annotations

import math
from datetime import UTC, datetime

_LARGE = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (9999.5, 1e3, "k"))  # from this size on, in this unit


def format_number(value: float | None, signed: bool = False, digits: int = 4) -> str:
    """A number to `digits` significant digits: `0.4131`, `12.3k`, `1.2e−6`; a dash for what is missing."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    for least, unit, letter in _LARGE:
        if size >= least:
            return f"{sign}{size / unit:.3g}{letter}"
    if size and size < 1e-3:
        mantissa, exponent = f"{size:.2e}".split("e")
        return f"{sign}{float(mantissa):g}e{int(exponent)}".replace("e-", "e−")
    return f"{sign}{size:.{digits}g}"


def format_percent(fraction: float) -> str:
    """A fraction in per cent with one decimal."""
    return f"{100 * fraction:.1f}%".replace("-", "−")


def format_duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def parse_time(value: object) -> float | None:
    """Seconds since the epoch of a number or an ISO 8601 text; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return None


def format_time(seconds: float) -> str:
    """Date and minute in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
