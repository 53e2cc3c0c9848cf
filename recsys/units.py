"""Units: how bytes, seconds, counts and figures are written for a reader."""

from __future__ import annotations

import math


def in_bytes(count: float) -> str:
    """Bytes in decimal units.

    >>> in_bytes(912), in_bytes(104_000), in_bytes(20_800_000), in_bytes(9.4e9)
    ('912 B', '104 kB', '20.8 MB', '9.4 GB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break
    return f"{count:.0f} {unit}" if count >= 99.95 else f"{count:.1f} {unit}"


def in_seconds(seconds: float) -> str:
    """A duration, to about three digits.

    >>> in_seconds(0.0042), in_seconds(0.131), in_seconds(7.25), in_seconds(48.2), in_seconds(185), in_seconds(4000)
    ('4 ms', '0.13 s', '7.2 s', '48 s', '3 min 05 s', '1 h 07 min')
    """
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02d} min"


def in_count(count: float) -> str:
    """A whole number with its thousands apart.

    >>> in_count(1000209)
    '1,000,209'
    """
    return f"{count:,.0f}"


def in_percent(share: float) -> str:
    """A share, to three digits.

    >>> in_percent(0.0446832), in_percent(0.3), in_percent(0.00016)
    ('4.47 %', '30 %', '0.016 %')
    """
    return f"{100 * share:.3g} %"


def in_times(factor: float) -> str:
    """A factor, to about three digits.

    >>> in_times(2.2875), in_times(61.32), in_times(20_300.0)
    ('2.29 times', '61.3 times', '20,300 times')
    """
    shown = f"{factor:,.0f}" if factor >= 99.95 else f"{factor:.3g}"
    return f"{shown} times"


def figure(value: float | None) -> str:
    """A metric or a loss: three decimals below 10, three digits above; a dash where there is none.

    >>> figure(0.45298), figure(5.21311), figure(57.31), figure(1034.2), figure(None), figure(float("nan"))
    ('0.453', '5.213', '57.3', '1,034', '–', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
