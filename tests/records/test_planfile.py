"""Plans survive a round trip, keep other devices' sections, and refuse what is no plan."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.errors import PlanError
from upshift.records import planfile
from upshift.records.plan import Fingerprint, Kept, Pace, Plan, Rejected
from upshift.records.trial import Band, Proof, UpdateCheck
from upshift.records.verification import Energy, Interval

PRINT = Fingerprint(script="a", sources="b", arguments="--x", device="cpu", versions="v", files=("m.py",), settings="s")


def plan(**more):
    base = {"script": "train.py", "arguments": ("--x", "1"), "created": "now", "device": "AMD EPYC (2 cores)",
            "verdict": "faster", "fingerprint": PRINT}  # fmt: skip
    return Plan(**{**base, **more})


FULL = plan(
    speedup=1.5, low=1.4, high=1.6, pairs=12, break_even_steps=3.0, one_off_seconds=0.5, step_seconds=0.01,
    proof=Proof(rung="trajectory", passed=True, reason="r", steps=9, lag=0.001, stock_losses=(1.0,), weaker="",
                updates=(UpdateCheck(step=1, cosine=1.0, norm_ratio=1.0, relative_error=0.0, noise=None),),
                band=Band(first=(0, 4), length=(4, 5), mean=(2.5, 2.0), spread=(0.1, 0.1), between=(0.5, 0.25))),
    pace=Pace(0.008, 0.0075, 0.009, 9, samples_per_second=4000.0, from_step=12), upshift="0.1.0",
    kept=(Kept(name="threads", settings={"count": 2, "on": True, "x": 0.5, "s": "t"}, speedup=1.5, low=1.4),),
    rejected=(Rejected(name="bf16", reason='a "quoted"\nline \\ é', settings={"a": 1}),),
)  # fmt: skip

text = st.text(max_size=30).map(lambda value: value.encode("utf-8", "replace").decode())
settings_of = st.dictionaries(
    st.text("abc_", min_size=1, max_size=5),
    st.one_of(st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), text),
    max_size=4,
)
plans = st.builds(
    plan,
    arguments=st.lists(text, max_size=3).map(tuple),
    verdict=text,
    speedup=st.one_of(st.none(), st.floats(0.1, 9)),
    kept=st.lists(st.builds(Kept, name=text, settings=settings_of, note=text), max_size=3).map(tuple),
    rejected=st.lists(st.builds(Rejected, name=text, reason=text, settings=settings_of), max_size=3).map(tuple),
)


def without_curves(value):
    import msgspec

    if value.proof is None:
        return value
    return msgspec.structs.replace(
        value, proof=msgspec.structs.replace(value.proof, stock_losses=(), planned_losses=())
    )


@given(value=plans)
@settings(max_examples=100, deadline=None)
def test_round_trip(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("plan") / "train.upshift.toml"
    planfile.write(file, value)
    assert planfile.read(file) == {planfile.slug(value.device): without_curves(value)}


def test_round_trip_of_everything(tmp_path):
    file = tmp_path / "p.toml"
    planfile.write(file, FULL)
    assert planfile.read(file) == {"amd-epyc-2-cores": without_curves(FULL)}
    assert FULL.techniques == {"threads": {"count": 2, "on": True, "x": 0.5, "s": "t"}}


@pytest.mark.parametrize("known", [True, False])
def test_round_trip_of_an_energy_with_and_without_a_figure(tmp_path, known):
    file = tmp_path / "p.toml"
    figures = (1.3, 1.1, 1.5, 3) if known else (None, None, None, 0)
    energy = Energy(*figures, basis="estimated", how='from "CPU time"', stock=120.5, plan=93.0 if known else None)
    wanted = plan(objective="energy", to_target=Interval(1.2, 1.0, 1.4, 3), energy=energy)
    planfile.write(file, wanted)
    assert planfile.read(file) == {"amd-epyc-2-cores": wanted}
    assert 'basis = "estimated"' in file.read_text()


def test_sections_of_other_devices_are_kept(tmp_path):
    file = tmp_path / "p.toml"
    planfile.write(file, FULL)
    planfile.write(file, plan(device="H100"))
    planfile.write(file, plan(device="AMD EPYC (2 cores)", verdict="newer"))
    found = planfile.read(file)
    assert set(found) == {"amd-epyc-2-cores", "h100"}
    assert found["amd-epyc-2-cores"].verdict == "newer" and found["amd-epyc-2-cores"].kept == ()


def test_a_file_that_is_no_plan_is_not_overwritten(tmp_path):
    file = tmp_path / "p.toml"
    file.write_text("[tool.poetry]\n")
    with pytest.raises(PlanError):
        planfile.write(file, FULL)
    assert file.read_text() == "[tool.poetry]\n"


def section(**lines):
    base = {
        "script": '"t.py"', "arguments": "[]", "created": '""', "device": '"cpu"', "verdict": '""',
        "fingerprint": '{script="", sources="", arguments="", device="", versions=""}',
    }  # fmt: skip
    merged = {**base, **lines}
    return "schema = 1\n[devices.cpu]\n" + "\n".join(f"{key} = {value}" for key, value in merged.items() if value)


def test_the_smallest_plan_reads(tmp_path):
    (tmp_path / "p.toml").write_text(section())
    assert planfile.read(tmp_path / "p.toml")["cpu"].script == "t.py"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("schema = 1\n[devices", "not TOML"),
        ("", "schema None"),
        ("schema = 2\n[devices.cpu]", "schema 2"),
        ("schema = '1'", "schema '1'"),
        ("schema = 1", "no [devices"),
        ("schema = 1\ndevices = 3", "no [devices"),
        ("schema = 1\n[devices]\ncpu = 3", "devices.cpu"),
        (section() + "\nimport = 'os'", "import"),
        (section(speedup='"fast"'), "devices.cpu.speedup"),
        (section(kept="[{name=3}]"), "devices.cpu.kept[0].name"),
        (section(kept='[{name="x", settings={a=[1]}}]'), "settings"),
        (section(kept='[{name="x", exec="y"}]'), "exec"),
        (section(script=""), "script"),
        (section(pace="{seconds = 1.0, low = 2.0, high = 3.0, stretches = 4}"), "devices.cpu.pace"),
        (section() + "\n[other]\nx = 1", "unknown key: other"),
        ("schema = 1\nx = " + "[" * 50 + "]" * 50, "nested deeper"),
        ("schema = 1\nx = " + "[" * 50_000 + "]" * 50_000, ""),
        ("schema = " + "9" * 10_000, ""),
        ("schema = 1\n# " + "x" * (1 << 20), "larger than any plan"),
    ],
)
def test_what_is_no_plan_is_refused_with_its_place(tmp_path, content, names):
    (tmp_path / "p.toml").write_text(content)
    with pytest.raises(PlanError) as error:
        planfile.read(tmp_path / "p.toml")
    assert names in error.value.message and error.value.remedy


BAND = {"first": "[0, 4]", "length": "[4, 4]", "mean": "[2.0, 1.0]", "spread": "[0.1, 0.1]", "between": "[0.1, 0.1]"}


@pytest.mark.parametrize(
    ("column", "values", "names"),
    [
        ("mean", "[2.0]", "differ in size"),
        ("mean", "[2.0, nan]", "not finite"),
        ("between", "[inf, 0.1]", "not finite"),
        ("spread", "[0.1, -0.1]", "negative"),
        ("length", "[5, 4]", "overlap"),
        ("length", "[4, 0]", "holds none"),
        ("first", "[-4, 4]", "before the first step"),
        ("first", '["0", 4]', "proof.band.first[0]"),
        ("mean", "[]", "differ in size"),
        ("extra", "1", "extra"),
        ("first", str(list(range(0, 1320, 40))), "1 to 32 windows"),
    ],
)
def test_band_that_cannot_be_is_refused(tmp_path, column, values, names):
    def text(band):
        inside = ", ".join(f"{key} = {value}" for key, value in band.items())
        return section() + f'\nproof = {{rung = "update", passed = true, reason = "", band = {{{inside}}}}}\n'

    file = tmp_path / "p.toml"
    file.write_text(text(BAND))
    assert planfile.read(file)["cpu"].proof.band.horizon == 8
    file.write_text(text({**BAND, column: values}))
    with pytest.raises(PlanError) as error:
        planfile.read(file)
    assert names in error.value.message and "devices.cpu.proof.band" in error.value.message


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0", bytes(range(256))])
def test_bytes(tmp_path, content):
    (tmp_path / "p.toml").write_bytes(content)
    with pytest.raises(PlanError):
        planfile.read(tmp_path / "p.toml")


def test_folder_or_missing(tmp_path):
    for path in (tmp_path, tmp_path / "no.toml"):
        with pytest.raises(PlanError, match="cannot be read"):
            planfile.read(path)


def test_slug():
    assert planfile.slug("AMD EPYC (2 cores)") == "amd-epyc-2-cores"
    assert planfile.slug("../../etc") == "etc"
    assert planfile.slug("é☃") == "unknown"
    assert len(planfile.slug("x" * 500)) == 80


def test_digest_depends_on_content_not_on_order():
    one = planfile.settings_digest({"a": {"x": 1, "y": 2}, "b": {}})
    assert planfile.settings_digest({"b": {}, "a": {"y": 2, "x": 1}}) == one
    for other in ({"a": {"x": 1, "y": 3}, "b": {}}, {"a": {"x": 1, "y": 2}}, {"a": {"x": True, "y": 2}, "b": {}}):
        assert planfile.settings_digest(other) != one
