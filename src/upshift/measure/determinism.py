"""Is reading a dataset deterministic? Shown by reading some of it twice, and leaving everything as it was."""

from __future__ import annotations

import random
from typing import Any

from upshift.measure.constancy import (
    Glance,
    Streams,
    difference,
    fingerprint,
    generators,
    shift_streams,
    streams_kept,
)
from upshift.measure.samples import Field, Rows, Unfit, batch_leaves, flatten, same_bits

#: Samples read twice (all, if there are fewer).
PROOF_READS = 16

_SIMPLE = (bool, int, float, str, type(None))


def read(dataset: Any, index: Any) -> Any:
    """The samples of a batch of indices, read as PyTorch's own fetcher reads them."""
    if hasattr(dataset, "__getitems__") and dataset.__getitems__:
        return dataset.__getitems__(index)
    return [dataset[item] for item in index]


def prove(dataset: Any, count: int) -> tuple[Rows, dict[str, tuple[Any, ...]]]:
    """Read samples twice under different random states; rows that fit them, and the dataset's fingerprint.

    Every global random stream and every generator the dataset holds is put back to the bit; where the dataset is
    refused, so are plain attributes that reading it has changed.

    Raises:
        Unfit: reading is not deterministic, draws random numbers, changes the dataset, raises, or the samples are not
            of one fixed form. The message says which.
    """
    own = random.Random(count)
    picks = sorted({0, count - 1, *own.sample(range(count), min(count, PROOF_READS))})
    owned = generators(dataset)
    before = Glance(dataset)
    try:
        with streams_kept(owned):
            return _prove(dataset, count, picks, owned)
    except Unfit:
        _put_back(before)
        raise
    except Exception as error:
        _put_back(before)
        raise Unfit(f"reading a sample ahead of time raised {type(error).__name__}: {error}") from None


def _put_back(before: Glance) -> None:
    for now, earlier in before.seen:
        for key, value in earlier.items():
            if isinstance(value, _SIMPLE) and isinstance(now.get(key), _SIMPLE):
                now[key] = value


def _prove(
    dataset: Any, count: int, picks: list[int], owned: tuple[Any, ...]
) -> tuple[Rows, dict[str, tuple[Any, ...]]]:
    from torch.utils.data import default_collate

    shift_streams(1)
    streams = Streams(owned)
    together = read(dataset, list(picks))
    drawn = streams.moved()
    forms = [flatten(sample)[0] for sample in together]
    batch = default_collate(together)
    print_ = fingerprint(dataset)
    shift_streams(2)
    streams = Streams(owned)
    singly = []
    for item in reversed(picks):
        sample = read(dataset, [item])[0]
        # Collated at once: a dataset may hand out one buffer again and again.
        singly.append((flatten(sample)[0], default_collate([sample])))
    singly.reverse()
    drawn = drawn or streams.moved()
    if drawn:
        raise Unfit(f"reading a sample draws from {drawn}")
    if changed := difference(print_, fingerprint(dataset)):
        raise Unfit(f"the dataset changes as it is read ({changed})")
    if any(form != forms[0] for form in [*forms, *(form for form, _ in singly)]):
        raise Unfit("samples differ in shape or type")
    leaves = batch_leaves(forms[0], batch)
    if not leaves:
        raise Unfit("samples hold no data")
    for place, (form, alone) in enumerate(singly):
        for leaf, whole in zip(batch_leaves(form, alone), leaves, strict=True):
            if not same_bits(leaf[0], whole[place]):
                raise Unfit(f"sample {picks[place]} read twice gave two results")
    return Rows(forms[0], [Field(leaf) for leaf in leaves], count), print_
