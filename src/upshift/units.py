"""Numbers as people read them: seconds, bytes, FLOPs, ratios."""

from __future__ import annotations

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def seconds(value: float) -> str:
    """A duration in the unit that keeps three significant digits: `12.3 ms`, `4.56 s`, `3 min 20 s`."""
    magnitude = abs(value)
    if magnitude >= 7200:
        return f"{value / 3600:.1f} h"
    if magnitude >= 120:
        whole = round(value)
        return f"{whole // 60} min {whole % 60} s"
    if magnitude >= 1:
        return f"{value:.3g} s"
    if magnitude >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    if magnitude > 0:
        return f"{value * 1e6:.3g} us"
    return "0 s"


def si(value: float, unit: str) -> str:
    """A number with an SI prefix: `2.31 TFLOP/s`."""
    for factor, prefix in _SI:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def binary(value: float) -> str:
    """Bytes in powers of 1024: `1.50 GiB`."""
    for factor, prefix in ((2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}B"
    return f"{value:.0f} B"


def ratio(value: float) -> str:
    """A speed-up: `1.87x`."""
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def percent(value: float) -> str:
    """A share given as a fraction: `12.3 %`."""
    return f"{value * 100:.3g} %" if abs(value) >= 0.001 or value == 0 else "<0.1 %"
