"""What makes a plan stale, and what does not."""

from __future__ import annotations

import os

import pytest

from upshift.records.fingerprint import changes, fingerprint, shaping
from upshift.records.plan import Kept, Plan


def plan_for(script, arguments=(), techniques=None, **more):
    techniques = techniques or {"threads": {"count": 2}}
    return Plan(
        script=str(script), arguments=tuple(arguments), created="", device="cpu", verdict="",
        fingerprint=fingerprint(str(script), arguments, "cpu", techniques, **more),
        kept=tuple(Kept(name=name, settings=value) for name, value in techniques.items()),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--epochs", "3"], ()),
        (["--epochs=3", "--batch-size=64"], ("--batch-size=64",)),
        (["--num-epochs", "3", "--lr", "0.1"], ("--lr", "0.1")),
        (["--max_iters=100", "--seed", "7", "--out_dir=x", "--log-interval", "5", "--save-every", "9"], ()),
        (["--output-dim", "64", "--out_channels=3", "--output_size", "4"],
         ("--output-dim", "64", "--out_channels=3", "--output_size", "4")),
        (["--log-sigma", "1", "--checkpoint-activations", "--save-memory"],
         ("--log-sigma", "1", "--checkpoint-activations", "--save-memory")),
        (["--resume", "--width", "3"], ("--width", "3")),
        (["--dry-run", "--amp"], ("--amp",)),
        (["train", "epochs"], ("train", "epochs")),
        (["epochs=3", "model.width=4"], ("model.width=4",)),
        (["--wandb-project", "x", "--wandb_name=y"], ()),
    ],
)  # fmt: skip
def test_arguments_that_may_shape_a_step(arguments, kept):
    assert shaping(arguments) == kept


def test_untouched_plan_holds(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("x")
    (tmp_path / "net.py").write_text("y")
    plan = plan_for(script, ["--lr", "1"], files=("net.py",))
    now = fingerprint(str(script), ["--lr", "1", "--epochs", "5"], "cpu", plan.techniques, files=("net.py",))
    assert changes(plan, now) == []


@pytest.mark.parametrize("change", ["script", "module", "module gone", "arguments", "device", "settings"])
def test_every_change_is_named(tmp_path, change):
    script, module = tmp_path / "train.py", tmp_path / "net.py"
    script.write_text("x")
    module.write_text("y")
    plan = plan_for(script, files=("net.py",))
    arguments, device = (), "cpu"
    if change == "script":
        script.write_text("x ")
    elif change == "module":
        module.write_text("z")
    elif change == "module gone":
        module.unlink()
    elif change == "arguments":
        arguments = ("--width", "3")
    elif change == "device":
        device = "cuda"
    else:
        plan = Plan(**{**{f: getattr(plan, f) for f in plan.__struct_fields__},
                       "kept": (Kept(name="threads", settings={"count": 3}),)})  # fmt: skip
    now = fingerprint(str(script), arguments, device, plan.techniques, files=("net.py",))
    found = changes(plan, now)
    assert len(found) == 1 and change.split()[0].removesuffix("s") in found[0]


def test_module_is_found_where_python_finds_it(tmp_path, monkeypatch):
    package = tmp_path / "site" / "pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "train.py").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    before = fingerprint("pkg.train", (), "cpu", {}, module=True)
    (package / "train.py").write_text("y")
    assert fingerprint("pkg.train", (), "cpu", {}, module=True).script != before.script
    assert fingerprint("pkg", (), "cpu", {}, module=True).script == fingerprint("no", (), "cpu", {}, module=True).script


def test_files_named_by_a_hostile_plan_are_not_opened(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    script = folder / "train.py"
    script.write_text("x")
    secret = tmp_path / "secret"
    secret.write_text("one")
    os.mkfifo(folder / "pipe")  # opening it would wait for ever
    names = ("../secret", str(secret), "pipe", ".", "a\0b", "/dev/zero", "x" * 5000)
    before = fingerprint(str(script), (), "cpu", {}, files=names)
    secret.write_text("two")
    assert fingerprint(str(script), (), "cpu", {}, files=names).sources == before.sources
