"""The command line: help without torch, hints, durations, exit codes, drawn records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import UPSHIFT, execute, upshift

from upshift.cli import show
from upshift.cli.main import COMMANDS, cli
from upshift.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("512 MiB", 2**29), ("8GB", 8 * 10**9), ("1.5g", 15 * 10**8)]
)
def test_sizes(text, size):
    assert show.Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["8", "0GiB", "eight", "8 parsec"])
def test_no_sizes(text):
    with pytest.raises(click.BadParameter, match="write 8GiB"):
        show.Size().convert(text, None, None)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)])
def test_help(arguments):
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 0 and "Usage:" in found.output
    if arguments[0] in COMMANDS:
        assert "Example" in found.output


def test_help_documents_every_exit_code():
    from upshift import errors

    text = CliRunner().invoke(cli, ["--help"]).output
    codes = {item.exit_code for item in vars(errors).values() if isinstance(item, type)}
    for code in codes - {1}:
        assert f"{code} " in text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_neither_torch_nor_numpy(command):
    code = (
        "import sys\nfrom upshift.cli.main import main\n"
        f"try:\n  main({[*command.split(), '--help']!r})\nexcept SystemExit as e:\n  assert e.code == 0\n"
        "assert not {'torch', 'numpy', 'rich', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_unknown_command_and_option(tmp_path):
    ended = upshift("trian", "train.py", cwd=tmp_path)
    assert ended.code == 2 and "trian" in ended.err and ended.out == ""
    ended = upshift("run", "--plam", "x", "train.py", cwd=tmp_path)
    assert ended.code == 2 and "--plan" in ended.err


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2min", 120), ("1h", 3600), (" 3 m ", 180)]
)
def test_durations(text, seconds):
    assert show.Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-1", "1d", "s", "1e3", "inf", "1m30s", "٣"])
def test_no_durations(text):
    if text == "٣":  # a digit in another script is a digit to int(), and harmless
        assert show.Duration().convert(text, None, None) == 3
        return
    with pytest.raises(click.BadParameter):
        show.Duration().convert(text, None, None)


def words(arguments):
    """What a command with ordinary options and a target makes of a command line."""

    @click.command("x", cls=show.ForTarget, context_settings=show.TARGET_SETTINGS)
    @click.option("--plan")
    @click.option("-q", "--quiet", is_flag=True)
    @show.target_options
    def command(plan, quiet, module, rest):
        return plan, quiet, module, rest

    return command.main(arguments, standalone_mode=False)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train.py", (None, False, None, ("train.py",))),
        ("--plan p -q train.py --plan x -q -m a", ("p", True, None, ("train.py", "--plan", "x", "-q", "-m", "a"))),
        ("-m pkg.train", (None, False, "pkg.train", ())),
        ("-m pkg.train --plan x -- -q", (None, False, "pkg.train", ("--plan", "x", "--", "-q"))),
        ("-q --plan -m -m pkg.train -m b", ("-m", True, "pkg.train", ("-m", "b"))),
        ("--plan=p -mpkg.train --lr 1", ("p", False, "pkg.train", ("--lr", "1"))),
        ("-- train.py -q", (None, False, None, ("train.py", "-q"))),
    ],
)
def test_options_end_at_the_target(line, expected):
    assert words(line.split()) == expected


def test_option_with_a_slip_is_refused():
    for line in ("-m", "--plan", "--nope train.py"):
        with pytest.raises(click.UsageError):
            words(line.split())


def test_target():
    assert show.target("pkg.train", ("--lr", "1")).module
    assert show.target(None, ("train.py", "-x")).arguments == ("-x",)
    with pytest.raises(UsageError) as error:
        show.target(None, ())
    assert "train.py" in error.value.remedy


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "a\rb", "\u202eevil", "\x9b2J"])
def test_text_of_others_cannot_drive_a_terminal(text):
    assert all(char.isprintable() or char in "\n\t" for char in show.safe(text))


def test_explain(tmp_path):
    everything = upshift("explain", cwd=tmp_path)
    assert everything.code == 0
    for name in ("threads", "data_starved"):
        assert name in everything.out
        one = upshift("explain", name, cwd=tmp_path)
        assert one.code == 0 and "source" in one.out
    missing = upshift("explain", "warp_drive", cwd=tmp_path)
    assert missing.code == 2 and "Known" in missing.err


def test_report_of_a_run(tmp_path, train):
    runs = tmp_path / ".upshift" / "runs"
    assert upshift("run", "-q", "train.py", cwd=tmp_path).code == 0
    (folder,) = runs.iterdir()
    newest = upshift("report", cwd=tmp_path)
    named = upshift("report", str(folder), "--json", "run.json", "--html", "page.html", cwd=tmp_path)
    assert newest.code == named.code == 0 and newest.out == named.out == ""
    assert "train.py" in newest.err and "5" in newest.err
    from upshift.records import Run, codec
    from upshift.records.runfold import fold

    assert codec.read(tmp_path / "run.json", Run) == fold(folder)
    assert "<html" in (tmp_path / "page.html").read_text()
    compared = upshift("compare", str(folder), str(folder), cwd=tmp_path)
    assert compared.code == 0 and compared.out == ""


def test_report_without_any_run(tmp_path):
    ended = upshift("report", cwd=tmp_path)
    assert ended.code == 3 and "upshift run" in ended.err


def test_module_and_console_script_are_one(tmp_path):
    script = execute([UPSHIFT, "--version"], tmp_path)
    module = execute([sys.executable, "-m", "upshift", "--version"], tmp_path)
    assert script == module and script.code == 0


def test_module_form_in_a_folder_with_shadowing_names(tmp_path):
    for name in ("json", "click", "queue", "typing"):
        (Path(tmp_path) / f"{name}.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "train.py").write_text("print('ran')")
    ended = execute([sys.executable, "-m", "upshift", "run", "-q", "train.py"], tmp_path)
    assert ended.out == "ran\n" and ended.code == 0
