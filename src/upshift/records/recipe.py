"""How the training is set up, as far as it was seen: loss, learning rate, modes, gradients, evaluation."""

from __future__ import annotations

from upshift.records.quantity import Quantity, Record, unknown

#: Optimizers that set their own steps, by a part of their names.
_OWN_STEPS = ("schedulefree", "prodigy", "dadapt", "lbfgs", "rprop", "adafactor")


def sets_own_steps(optimizer: str) -> bool:
    """Whether an optimizer of this class name finds the size of its steps itself, so that a schedule is not for it."""
    return any(part in optimizer.lower() for part in _OWN_STEPS)


class ModelMode(Record, frozen=True):
    """In which mode a root module was when the steps watched ended."""

    name: str
    steps: int
    eval_steps: int
    last_eval_steps: int
    """The unbroken run of steps in evaluation mode up to the last step watched."""
    trained_in_eval: bool
    """A forward in evaluation mode led into a backward pass."""
    put_in_eval: bool
    """It, or a part of it, was ever put into evaluation mode."""
    optimized: bool
    """An optimizer that stepped holds parameters of it."""
    mode_layers: tuple[str, ...]
    """Kinds of its layers that act differently in the two modes."""


class LeftOut(Record, frozen=True):
    """Parameters that do not learn: the first names, how many tensors, and their share of all elements looked at."""

    names: tuple[str, ...] = ()
    tensors: int = 0
    share: float = 0.0


class Scores(Record, frozen=True):
    """One evaluation after `step` steps: its loss per sample, and the mean training loss since the one before."""

    step: int
    training: float
    evaluation: float


class GradientNoise(Record, frozen=True):
    """How much of a step's gradient is noise, at the last weights of the time watched.

    G is the gradient over all data, B the batch of a step, Sigma the covariance of the gradient of one sample.
    """

    scale: Quantity = unknown("batches")
    """tr(Sigma) / |G|^2 in batches of B samples. No value where |G|^2 was lost in the noise, and no high end where its
    own interval reaches zero; the low end holds then, too."""
    signal: Quantity = unknown("squared gradient")
    """|G|^2."""
    variance: Quantity = unknown("squared gradient")
    """tr(Sigma) / B."""
    steps: int = 0
    """Steps whose gradients were used."""
    why: str = ""
    """Why the scale is not known."""


class RecipeFacts(Record, frozen=True):
    """What rules about the recipe need to know. A default means: not seen."""

    curve: tuple[float, ...] = ()
    """Means of the loss over `stride` consecutive steps each, in order; only finite ones."""
    stride: int = 1
    first_not_finite: int | None = None
    """Number of the first step whose loss was not finite."""
    rate_first: float | None = None
    rate_last: float | None = None
    """Learning rate of the first parameter group at the first and at the last step."""
    rate_changes: int | None = None
    """Steps at which the rate of any group changed; None where a rate could not be read."""
    schedulers: tuple[str, ...] = ()
    declared: tuple[str, ...] | None = None
    """What the script's source speaks of: `validation`, `schedule`, `stopping`, `reward`, `seed`; None: not read."""
    evaluations: int = 0
    """Stretches of work without gradients after the first step, where they stand apart from training."""
    loaded: bool = False
    """Weights were loaded into a module before the last step watched."""
    modes: tuple[ModelMode, ...] = ()
    gradient_steps: int = 0
    """Optimizer steps at which gradients were looked at."""
    no_gradient: LeftOut = LeftOut()
    """In an optimizer, and never had a gradient."""
    zero_gradient: LeftOut = LeftOut()
    """In an optimizer, and every gradient looked at was all zeros."""
    not_optimized: LeftOut = LeftOut()
    """Has a gradient, and no optimizer holds it."""
    decay: float = 0.0
    """Largest decoupled weight decay."""
    decayed_vectors: int = 0
    """Norms and biases (fewer than two dimensions) under that decay."""
    scores: tuple[Scores, ...] = ()
    noise: GradientNoise | None = None
