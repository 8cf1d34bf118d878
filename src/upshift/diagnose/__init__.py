"""Diagnosis: a measurement in, ranked findings and one paragraph out. One rule per file, blind to each other."""

from upshift.diagnose.card import FindingCard
from upshift.diagnose.registry import RULES, card, cards, diagnose
from upshift.diagnose.verdict import verdict

__all__ = ["RULES", "FindingCard", "card", "cards", "diagnose", "verdict"]
