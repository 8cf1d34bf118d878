"""What a training would need on catalogued devices: memory, time, money and energy, each saying how it is known."""

from __future__ import annotations

from upshift.records.quantity import Quantity, Record


class DeviceFigures(Record, frozen=True):
    """A device as far as an estimate needs it. Bytes, FLOP/s per dtype (dense), B/s, W, `currency`; None: not known."""

    name: str
    kind: str
    """`cpu`, `gpu`, `tpu` ...: between kinds a step time is an order of magnitude only."""
    flops: dict[str, float] = {}
    bandwidth: float | None = None
    memory: float | None = None
    interconnect: float | None = None
    watts_idle: float | None = None
    watts: float | None = None
    """At full load: what its maker states as its power."""
    purchase: float | None = None
    measured: bool = False
    """Whether FLOP/s and bandwidth were measured here, not stated by its maker."""
    source: str = ""
    date: str = ""


class OfferFigures(Record, frozen=True):
    """A machine to rent: `count` devices for `hour` (on demand) or `spot` an hour, in `currency`."""

    provider: str
    instance: str
    count: int
    hour: float | None
    spot: float | None = None
    region: str = ""
    currency: str = "USD"
    source: str = ""
    date: str = ""


class Cost(Record, frozen=True):
    """What a training costs on one offer."""

    offer: OfferFigures
    seconds: Quantity
    on_demand: Quantity
    spot: Quantity
    interruptions: Quantity
    """Expected on a spot machine over the whole training."""
    lost: Quantity
    """Seconds of work expected to be done again, and of saving, on a spot machine."""
    note: str = ""


class Remedy(Record, frozen=True):
    """Techniques, by their names in the registry, with which a training would fit."""

    techniques: tuple[str, ...]
    memory: Quantity
    how: str
    batch: int | None = None


class DeviceEstimate(Record, frozen=True):
    """One kind of device. `parts` sum to `memory`. `order_of_magnitude`: no interval of the step can be trusted."""

    device: DeviceFigures
    memory: Quantity
    parts: dict[str, Quantity]
    fits: bool | None
    largest_batch: Quantity
    step: Quantity
    order_of_magnitude: bool
    total: Quantity
    energy: Quantity
    """Joules of the devices alone over the whole training."""
    carbon: Quantity
    """Grams of CO2 equivalent, with the building's share where a PUE is known."""
    costs: tuple[Cost, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    break_even: Quantity | None = None
    """Hours of use after which buying the device is cheaper than renting it."""
    how: str = ""
    """The method of the step, or why it is unknown."""
    step_parts: dict[str, float] = {}
    """Seconds of the step by what they depend on."""
    notes: tuple[str, ...] = ()


class Error(Record, frozen=True):
    """How far one earlier estimate was from what was measured then. `predicted` and `measured` in `unit`."""

    when: str
    what: str
    """`step` or `memory`."""
    device: str
    script: str
    predicted: float
    measured: float
    unit: str

    @property
    def relative(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured


class Choice(Record, frozen=True):
    """So many devices of a kind for a whole training. `seconds` and `money` for all of them together."""

    device: str
    count: int
    seconds: Quantity
    money: Quantity
    spot: bool = False
    instance: str = ""
    within: bool = True
    """Whether it meets the budget and the deadline, by the values and not by their intervals."""
    order_of_magnitude: bool = False
    note: str = ""


class Estimate(Record, frozen=True):
    """An answer of `upshift estimate`."""

    script: str
    arguments: tuple[str, ...]
    created: str
    here: DeviceEstimate
    """The machine the training was watched on."""
    devices: tuple[DeviceEstimate, ...]
    batch: int | None
    precision: str
    steps: Quantity
    steps_how: str = ""
    budget: float | None = None
    deadline: float | None = None
    currency: str = "USD"
    choices: tuple[Choice, ...] = ()
    """What meets the budget and the deadline, cheapest first; else the nearest alone."""
    advice: tuple[str, ...] = ()
    compared: tuple[Error, ...] = ()
    """This estimate against a measurement made at once, where one was asked for."""
    experience: str = ""
    methods: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    schema: int = 1
