"""Does the proof hold on this machine? Trials whose truth is known, through the real decisions."""

from upshift.search.selftest.planted import Planting, Twins, planted, tiny, truth
from upshift.search.selftest.result import Identical, SelftestReport, Truth, rate_high, rate_low
from upshift.search.selftest.session import Selftest

__all__ = [
    "Identical",
    "Planting",
    "Selftest",
    "SelftestReport",
    "Truth",
    "Twins",
    "planted",
    "rate_high",
    "rate_low",
    "tiny",
    "truth",
]
