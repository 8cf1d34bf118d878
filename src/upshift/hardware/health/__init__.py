"""What of this machine stands in the way of training, or of trials that can be believed, and what mends it.

Nothing is changed. What may hang or crash (torch, a driver, a compiler) runs in processes of its own with a time limit,
and a check that fails says so without ending the others. Most facts are those of Linux; each function takes the root of
the file system it reads, so that recorded trees can be read back.
"""

from __future__ import annotations

from upshift.hardware.health.check import Check, Group, Health, State
from upshift.hardware.health.whole import look

__all__ = ["Check", "Group", "Health", "State", "look"]
