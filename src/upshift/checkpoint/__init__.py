"""What is saved, how it is stored, what is kept. Knows nothing of jobs; torch is imported where tensors are touched."""

from upshift.checkpoint.interval import Pace, seconds_between
from upshift.checkpoint.retention import Checkpoint
from upshift.checkpoint.saver import Saver
from upshift.checkpoint.store import Saved, Store

__all__ = ["Checkpoint", "Pace", "Saved", "Saver", "Store", "seconds_between"]
