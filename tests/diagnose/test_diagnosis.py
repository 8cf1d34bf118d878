"""All rules together: order, blindness to the unknown, the paragraph, and independence of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from built_measurements import (
    PLAIN,
    anatomy,
    facts,
    floor,
    line,
    loader,
    measurement,
    model,
    nothing_known,
    optimizer,
    q,
)

from upshift.diagnose import RULES, FindingCard, card, cards, diagnose, registry, verdict
from upshift.diagnose.evidence import amdahl, share_of, total_share
from upshift.errors import UsageError
from upshift.records import Measurement, unknown
from upshift.records.codec import dumps, loads
from upshift.records.measurement import PHASES
from upshift.techniques.registry import BUILT_IN


def test_a_plain_measurement_has_no_finding_and_says_so() -> None:
    found = diagnose(measurement())
    assert found == ()
    text = verdict(measurement(), found)
    assert "keeping your baseline is an answer" in text and "Not known" not in text
    assert "100 ms" in text and "50 %" in text


def test_nothing_known_gives_no_finding_and_a_verdict_that_says_what_is_unknown() -> None:
    m = nothing_known()
    assert diagnose(m) == ()
    text = verdict(m, ())
    assert "not known" in text and "floor of this machine" in text
    for phase in ("waiting for data", "forward", "backward", "optimizer"):
        assert phase in text
    assert "0 %" not in text and "host to device" not in text


@pytest.mark.parametrize("hidden", PHASES)
def test_hiding_one_phase_never_adds_a_finding(hidden: str) -> None:
    shares = {**PLAIN, "data": 0.3, "optimizer": 0.2, "backward": 0.2, "forward": 0.2}
    made = facts(optimizers=(optimizer(),), models=(model(layers={"Conv2d": 2}),), attention=True, steps_total=50)
    full = {item.rule for item in diagnose(measurement(anatomy=anatomy(shares), facts=made))}
    less = {item.rule for item in diagnose(measurement(anatomy=anatomy({**shares, hidden: None}), facts=made))}
    assert less <= full and len(full) >= 4
    assert hidden not in verdict(measurement(anatomy=anatomy({**shares, hidden: None})), ()).split("Not known")[0]


quantity = st.one_of(
    st.just(unknown("1")),
    st.floats(0, 1).map(lambda value: q(value, "fraction")),
    st.sampled_from([0.0, 1e-300, 1e300]).map(lambda value: q(value, "1")),
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_mixture_of_known_and_unknown_breaks_a_rule(data: st.DataObject) -> None:
    shares = {name: data.draw(st.one_of(st.none(), st.floats(0, 1))) for name in PHASES}
    fields = {
        name: data.draw(quantity)
        for name in ("flops", "bytes_moved", "peak_flops", "best_peak_flops", "bandwidth", "mfu")
        + ("arithmetic_floor", "bandwidth_floor")
    }
    m = measurement(
        anatomy=anatomy(
            shares,
            step=data.draw(quantity),
            startup=data.draw(quantity),
            warmup=data.draw(quantity),
            evaluation=data.draw(quantity),
            checkpointing=data.draw(quantity),
        ),
        floor=floor(**fields, best_dtype=data.draw(st.sampled_from(["float32", "bfloat16"]))),
        facts=facts(
            device=data.draw(st.sampled_from(["cpu", "cuda:0"])),
            threads=data.draw(st.integers(0, 8)),
            cores=data.draw(st.integers(0, 8)),
            steps_total=data.draw(st.one_of(st.none(), st.integers(0, 1000))),
            optimizers=(optimizer(),),
            models=(model(layers={"Conv2d": 1}),),
            attention=data.draw(st.booleans()),
            loaders=data.draw(st.sampled_from([(), (loader(),)])),
        ),
        lines=(line("print(x)", data.draw(st.floats(0, 1))), line("a", data.draw(st.floats(0, 1)), "data")),
        syncs=(line("x.item()", data.draw(st.floats(0, 1)), "sync"),),
    )
    found = diagnose(m)
    for item in found:
        assert loads(dumps(item), type(item)) == item
        if item.gain.value is not None:
            assert item.gain.basis == "estimated" and item.gain.low is not None and item.gain.high is not None
            assert 1 <= item.gain.low <= item.gain.value * (1 + 1e-9)
            assert item.gain.value <= item.gain.high * (1 + 1e-9) <= 101
    assert verdict(m, found)


def test_ranked_by_gain_and_confidence_notes_last() -> None:
    shares = {**PLAIN, "data": 0.5, "optimizer": 0.08, "forward": 0.1, "backward": 0.29}
    m = measurement(
        anatomy=anatomy(shares), facts=facts(optimizers=(optimizer(),)), floor=floor(arithmetic_floor=q(0.09))
    )
    rules = [item.rule for item in diagnose(m)]
    assert rules[0] == "data_starved" and rules[-1] == "near_floor"
    assert rules.index("data_starved") < rules.index("unfused_optimizer")


def test_verdict_says_the_largest_part_first() -> None:
    shares = {**PLAIN, "data": 0.66, "forward": 0.1, "backward": 0.2}
    m = measurement(anatomy=anatomy(shares))
    text = verdict(m, diagnose(m))
    assert "Two thirds of it (66 %) is spent waiting for data" in text
    assert "a prediction, not a measurement" in text


def test_verdict_near_the_floor_keeps_the_baseline() -> None:
    m = measurement(floor=floor(arithmetic_floor=q(0.095), mfu=q(0.95, "fraction")))
    assert "nothing much to gain" in verdict(m, diagnose(m))


def test_every_rule_has_a_card_and_names_known_techniques() -> None:
    assert {item.name for item in cards()} == set(RULES)
    for name in RULES:
        one = card(name)
        assert isinstance(one, FindingCard) and one.summary and one.source and one.triggers
        assert set(one.techniques) <= set(BUILT_IN)
    with pytest.raises(UsageError, match="nonsense"):
        card("nonsense")


def test_every_rule_file_is_registered_and_blind_to_the_others() -> None:
    folder = Path(registry.__file__).parent / "rules"
    files = {item.stem: item.read_text() for item in folder.glob("*.py") if item.stem != "__init__"}
    assert set(files) == set(RULES)
    for name, text in files.items():
        assert "diagnose.rules" not in text, name
        assert "torch" not in [word for item in text.splitlines() if "import " in item for word in item.split()], name


def test_diagnosis_never_loads_torch() -> None:
    code = (
        "import sys, upshift.diagnose as d; [d.card(n) for n in d.RULES];"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.floats(0, 0.99), st.floats(1, 100))
def test_amdahl_is_bounded_by_both_the_part_and_the_factor(share: float, factor: float) -> None:
    gain = amdahl(share, factor)
    assert 1 - 1e-12 <= gain <= min(factor, 1 / (1 - share)) + 1e-9


def test_sums_of_shares_are_unknown_if_a_part_is() -> None:
    m = measurement(anatomy=anatomy({"forward": 0.2, "backward": None}))
    assert share_of(m, "forward").value == 0.2
    assert share_of(m, "forward", "backward").value is None and share_of(m, "nonsense").value is None
    assert total_share([]).value is None


def test_a_measurement_read_back_gives_the_same_findings() -> None:
    m = measurement(anatomy=anatomy({**PLAIN, "data": 0.4}), lines=(line("print(1)", 0.2),))
    assert diagnose(loads(dumps(m), Measurement)) == diagnose(m) != ()
