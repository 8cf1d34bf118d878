"""The batch is far below the noise scale of the gradient: larger ones would cost hardly more samples."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.curve import fall
from upshift.diagnose.evidence import SMALL_KERNELS, amdahl, known, least_seconds, samples_fed, severity, share_of
from upshift.diagnose.training import is_zero, one_loss
from upshift.measure.noise_scale import more_samples
from upshift.records import Finding, Measurement, Quantity, unknown
from upshift.records.quantity import estimated
from upshift.records.recipe import RecipeFacts

CARD = FindingCard(
    name="batch_below_noise_scale",
    summary="The batch is far below the gradient's noise scale, and much of a step does not grow with it.",
    source="McCandlish et al. 2018, An Empirical Model of Large-Batch Training (arXiv:1812.06162), appendix A.1",
    triggers="the batch is under an eighth of the low end of the noise scale tr(Sigma) / |G|^2, measured on 32 steps "
    "or more whose updates are withheld (four at a time, at several weights), after the last step that is timed; and a "
    "larger batch would save a tenth of the time or more, or what it saves is not known",
    limits="Of the moment watched: the scale mostly grows as the loss falls. It says how many samples and steps a "
    "larger batch needs, not which learning rate. The time a sample takes in a larger batch is estimated. Silent where "
    "the loss does not fall, with several optimizers, rewards, frameworks, several processes, sparse gradients, hooks "
    "that may change gradients, and where a sum of the gradients takes over a quarter of the free memory; a note of "
    "the measurement says why.",
    techniques=("larger_batch",),
)
#: A batch is far below the noise scale where it is under this part of its low end.
BELOW = 1 / 8
#: Times the batch; a factor is named where it needs at most so many times the samples: at the limit, twice the batch.
FACTORS, MOST_SAMPLES = (2, 4, 8), (2.0 + 1 / BELOW) / (1.0 + 1 / BELOW) + 1e-9
#: Batches an epoch must have left.
BATCHES = 8
LEAST_GAIN = 1.1
FLAT = 0.02


def rule(m: Measurement) -> Finding | None:
    """Speaks on the low end of the noise scale, and on what of a step does not grow with the batch."""
    recipe = one_loss(m)
    noise = None if recipe is None else recipe.noise
    low = None if noise is None else noise.scale.low
    if recipe is None or noise is None or low is None or BELOW * low <= 1.0:
        return None
    if is_zero(recipe) or recipe.first_not_finite is not None or _flat(recipe):
        return None
    factor = max((f for f in FACTORS if more_samples(f, low) <= MOST_SAMPLES and f <= _room(m)), default=None)
    if factor is None:
        return None
    fixed = _fixed(m)
    predicted = _gain(fixed, factor, low)
    arithmetic_known = least_seconds(m.floor) is not None
    if arithmetic_known and predicted.or_else(1.0) < LEAST_GAIN:
        return None  # the work itself fills the step: twice the batch takes twice as long here
    step, total = known(m.anatomy.step), m.facts.steps_total
    steps = ""
    if step and total:
        needed = round(total * more_samples(factor, low) / factor)
        steps = f" Of the {total:,} steps planned ({units.seconds(total * step)}) about {needed:,} would be left."
    return Finding(
        rule=CARD.name,
        title="The batch is far below the gradient noise scale",
        evidence=f"{_scale(m, noise.scale)}, over {noise.steps} steps in windows of fixed weights. {factor} times the "
        f"batch would need at most {units.percent(more_samples(factor, low) - 1.0)} more samples for the same loss "
        f"(estimated), in {factor / more_samples(factor, low):.2g} times fewer steps.{steps} {_time(m, fixed)}",
        share=fixed,
        helps=f"{factor} times the batch and a learning rate to match, as a recipe: it changes training, so the result "
        "must be judged on your own metric",
        gain=predicted if arithmetic_known else unknown("ratio"),
        rests_on="time to the same loss: samples needed by the noise scale, and a step of which only the work grows "
        "with the batch; a single step gets longer",
        techniques=CARD.techniques if any(item.training for item in m.facts.loaders) else (),
        edit=m.script,
        severity=severity(fixed, predicted) if arithmetic_known else "note",
    )


def _flat(recipe: RecipeFacts) -> bool:
    """Whether the loss surely falls by next to nothing: without a gradient all of it is noise, whatever the batch."""
    seen = fall(recipe.curve)
    return seen is not None and seen.high < FLAT * abs(seen.first)


def _room(m: Measurement) -> float:
    """Times the batch at which an epoch still has batches enough."""
    epochs = [
        item.samples / item.batch_size
        for item in m.facts.loaders
        if item.training and not item.iterable and item.samples and item.batch_size
    ]
    return max(epochs) / BATCHES if epochs else float(max(FACTORS))


def _fixed(m: Measurement) -> Quantity:
    """Share of the step that a larger batch does not lengthen: the optimizer (measured), and overhead (estimated)."""
    optimizer, work = share_of(m, "optimizer"), share_of(m, "forward", "loss", "backward")
    step, least = known(m.anatomy.step), least_seconds(m.floor)
    if optimizer.value is None:
        return unknown("fraction")
    if not step or least is None or work.value is None:
        return optimizer
    overhead = max(0.0, work.value - SMALL_KERNELS * least / step)
    return estimated(
        min(1.0, optimizer.value + overhead), "fraction", optimizer.value, min(1.0, optimizer.value + work.value)
    )


def _gain(fixed: Quantity, factor: float, scale: float) -> Quantity:
    """Times faster to the same loss; never below one, since nobody has to take it."""
    if fixed.value is None:
        return unknown("ratio")
    ends = [max(1.0, amdahl(share, factor) / more_samples(factor, scale)) for share in _ends(fixed)]
    return estimated(ends[1], "ratio", 1.0, max(ends[1:]))


def _ends(share: Quantity) -> tuple[float, float, float]:
    value = share.or_else(0.0)
    return (value if share.low is None else share.low, value, value if share.high is None else share.high)


def _scale(m: Measurement, scale: Quantity) -> str:
    """The noise scale beside the batch: in samples where a loader says what a sample is, otherwise in batches."""
    batch = known(m.anatomy.samples)
    ends = (scale.value, scale.low, scale.high)
    if batch:
        value, low, high = (None if end is None else f"{end * batch:,.0f}" for end in ends)
        head, unit = f"A step takes {batch:.0f} samples", "samples"
    else:
        value, low, high = (None if end is None else f"{end:,.1f}" for end in ends)
        rows = (samples_fed(m) or 0) * (known(m.anatomy.micro_batches) or 1.0)
        head, unit = "A step takes one batch" + (f" ({rows:,.0f} rows fed to the model)" if rows else ""), "batches"
    interval = f"{low} to {high}" if high is not None else f"at least {low}, no upper end"
    return f"{head}; the noise scale of the gradient is {value or 'larger than can be told'} {unit} ({interval})"


def _time(m: Measurement, fixed: Quantity) -> str:
    """What is known of the time a larger batch takes."""
    if fixed.value is None:
        return "What a larger batch costs in time is unknown."
    if fixed.basis == "measured":
        return (
            f"The optimizer, {units.percent(fixed.value)} of a step, takes no longer with it; how much longer the "
            "rest takes is unknown."
        )
    return f"About {units.percent(fixed.value)} of a step would get no longer with it (estimated)."
