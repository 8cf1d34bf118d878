"""What a run used, what it cost, and what came of it. Every figure says whether it was measured or estimated."""

from __future__ import annotations

from upshift.records.quantity import Quantity, Record


class Entry(Record, frozen=True):
    """A figure and the sentence that says how it is known, with its source."""

    value: Quantity
    how: str = ""


class Ledger(Record, frozen=True):
    """The books of one run.

    Units: seconds; `device_hours` in hours times devices (GPUs, or the machine where there is none); `energy` in
    joules; `carbon` in grams of CO2 equivalent; `cost` in `currency`; memory in bytes; utilisations 0..1.
    """

    run: str
    seconds: Entry
    device_hours: Entry
    cpu_hours: Entry
    energy: Entry
    carbon: Entry
    cost: Entry
    cost_per_epoch: Entry
    lost: Entry
    """Seconds of work that was done again after interruptions, or is expected to be."""
    memory: Entry
    """Peak of the process tree in host memory."""
    gpu_memory: Entry
    cpu_utilisation: Entry
    """Of the cores the run may use."""
    gpu_utilisation: Entry
    currency: str = "USD"
    tuning: Entry | None = None
    """What finding the plan cost, in `currency`; None where no plan was used."""
    cost_to_target: Entry | None = None
    """In `currency`; None where the log names no target."""
    schema: int = 1
