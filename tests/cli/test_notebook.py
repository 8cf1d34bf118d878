"""Notebooks: cells as a script, `TARGET.ipynb` for the commands, and the cell magic in a real or stand-in shell."""

from __future__ import annotations

import ast
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRAIN, upshift

from upshift.api import Target, notebook
from upshift.api.cells import plain_python
from upshift.errors import UpshiftError, UsageError


def code(source: str | list[str], **metadata: object) -> dict[str, object]:
    return {"cell_type": "code", "source": source, "metadata": metadata, "outputs": [], "execution_count": None}


def write_notebook(path: Path, *cells: dict[str, object], language: str = "python") -> Path:
    kernel = {"kernelspec": {"language": language, "name": "k", "display_name": "K"}}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": list(cells)}))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- cells -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "python", "dropped"),
    [
        ("%matplotlib inline\nx = 1", "pass  # %matplotlib inline\nx = 1", ("%matplotlib inline",)),
        ("if x:\n    !echo it's\ny = 2", "if x:\n    pass  # !echo it's\ny = 2", ("!echo it's",)),
        ("!pip install \\\n   a b\nx = 1", "pass  # !pip install \\\n#    a b\nx = 1", ("!pip install \\",)),
        ("model?", "pass  # model?", ("model?",)),
        ("%time loss = 3\nz = loss", "loss = 3\nz = loss", ()),
        ("\n%%time\nx = 1", "\n# %%time\nx = 1", ()),
        ("%%upshift tune --budget 5m\nx = 1", "# %%upshift tune --budget 5m\nx = 1", ()),
        ("%%bash\nrm -r x", "# %%bash\n# rm -r x", ("%%bash",)),
    ],
)
def test_ipython_syntax_is_dropped_line_by_line(cell, python, dropped):
    assert plain_python(cell, "cell 1") == (python, dropped)


@pytest.mark.parametrize("cell", ["x = (7\n    % 4)", 's = """\n%time\n!ls\n"""', "x = [\n    -1,\n]\n# done?"])
def test_python_that_looks_like_a_magic_stays(cell):
    assert plain_python(cell, "cell 1") == (cell, ())


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("files = !ls", "cell 4, line 1 is not Python: files = !ls"),
        ("x = 1\nawait go()", "cell 4, line 2 is not Python"),
        ("%run other.py", "cell 4, line 1: %run other.py means nothing to a script"),
        ("x = 1\n%cd data", "cell 4, line 2: %cd data means nothing"),
        ("%time x = !ls", "cell 4, line 1 is not Python"),
    ],
)
def test_what_cannot_be_left_out_is_refused_with_its_place(cell, said):
    with pytest.raises(UsageError) as error:
        plain_python(cell, "cell 4")
    assert said in error.value.message and error.value.remedy


# -- notebooks ---------------------------------------------------------------------------------------------------------


def test_the_script_of_a_notebook_does_what_its_cells_do(here, capsys):
    write_notebook(
        here / "My Model.ipynb",
        {"cell_type": "markdown", "source": ["# Title\n"], "metadata": {}},
        code(["import math\n", "x = math.floor(2.5)"]),
        code("x = 100", tags=["skip-execution"]),
        code("from __future__ import annotations\ndef f(a: Unknown): return a\n%matplotlib inline\ndisplay(f(x))"),
    )
    converted = notebook.convert(Path("My Model.ipynb"))
    assert converted.script == Path(".upshift/notebook/my-model-ipynb.py")
    assert converted.dropped == ("%matplotlib inline",)
    found = runpy.run_path(str(converted.script))
    sys.path.remove(str(here))
    assert found["x"] == 2 and capsys.readouterr().out == "2\n"


def test_the_script_stays_the_same_file_until_a_cell_or_a_module_beside_it_changes(here, write):
    write("helper.py", "import deeper\n")
    write("deeper.py", "rate = 1\n")
    write("other.py", "")
    file = write_notebook(here / "n.ipynb", code("import helper"))
    script = notebook.convert(file).script
    first = script.read_text()
    when = script.stat().st_mtime_ns
    write("other.py", "rate = 3\n")
    assert notebook.convert(file).script == script and script.stat().st_mtime_ns == when
    assert "deeper.py, helper.py (" in first
    write("deeper.py", "rate = 2\n")
    notebook.convert(file)
    assert script.read_text() != first
    ast.parse(script.read_text())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "not a notebook of format 4"),
        ("not json", "not a notebook of format 4"),
        ('{"metadata": {}, "cells": [{"cell_type": "code"}]}', "not a notebook of format 4"),
        ('{"metadata": {"kernelspec": {"language": "R"}}, "cells": []}', "a notebook in R"),
        ('{"metadata": {}, "cells": []}', "has no code"),
    ],
)
def test_what_is_no_python_notebook_is_said(here, write, content, said):
    file = write("n.ipynb", content)
    with pytest.raises(UsageError, match=said):
        notebook.convert(file)
    assert not (here / ".upshift").exists()


def test_a_command_takes_a_notebook(here, write):
    (here / "sub").mkdir()
    write("sub/helper.py", "word = 'imported'\n")
    write_notebook(here / "sub" / "n.ipynb", code("!ls\nimport sys, helper\nprint(helper.word, sys.argv[1:])"))
    done = upshift("run", "sub/n.ipynb", "--epochs", "3", cwd=here)
    assert (done.code, done.out) == (0, "imported ['--epochs', '3']\n"), done.err
    assert done.said[0].rstrip() == (
        "upshift: sub/n.ipynb: its code cells, as .upshift/notebook/sub-n-ipynb.py; left out: !ls"
    )
    missing = upshift("diagnose", "gone.ipynb", cwd=here)
    assert missing.code == 2 and "gone.ipynb cannot be read" in missing.said[0]


def test_from_python_a_notebook_is_not_taken_for_a_script(here):
    write_notebook(here / "n.ipynb", code("print(1)"))
    with pytest.raises(UsageError, match="is a notebook"):
        Target("n.ipynb").check()
    assert Target(str(notebook.convert(Path("n.ipynb")).script)).check()


# -- the cell magic ----------------------------------------------------------------------------------------------------


class StandIn:
    """What the extension needs of a shell, where IPython is not installed."""

    def __init__(self):
        self.user_ns = {}

    def register_magic_function(self, function, magic_kind, magic_name):
        assert (magic_kind, magic_name) == ("cell", "upshift")
        self.run_cell_magic = lambda name, line, cell: function(line, cell)


@pytest.fixture
def shell():
    """A shell in which `%load_ext upshift` was said: IPython's own where there is one."""
    if importlib.util.find_spec("IPython") is None:
        import upshift as package

        shell = StandIn()
        package.load_ipython_extension(shell)
        return shell
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    off = Config()
    off.HistoryManager.enabled = False
    shell = InteractiveShell(config=off)
    shell.run_line_magic("load_ext", "upshift")
    return shell


def test_a_cell_is_diagnosed_in_a_process_of_its_own(shell, here, capfd):
    shell.run_cell_magic("upshift", "diagnose --seconds 2s --no-probe", TRAIN.format(steps=400))
    shown = capfd.readouterr().out
    assert "upshift diagnose  .upshift/notebook/cell-1.py" in shown and "backward" in shown
    assert (here / ".upshift" / "notebook" / "cell-1.py").exists()


def test_arguments_reach_the_cell_and_its_name_is_that_of_the_file(shell, here, capfd):
    shell.run_cell_magic("upshift", "run --as small -- --epochs 2", "import sys\nprint(sys.argv)")
    assert "['.upshift/notebook/cell-small.py', '--epochs', '2']" in capfd.readouterr().out


def test_a_name_of_the_notebook_is_not_seen_and_that_is_said(shell, capfd):
    shell.user_ns["dataset"] = [1]
    with pytest.raises(UpshiftError, match="'dataset' of the notebook is not seen there"):
        shell.run_cell_magic("upshift", "run", "print(len(dataset))")
    assert "NameError" in capfd.readouterr().out


def test_a_name_that_nobody_knows_is_only_an_error_of_the_cell(shell, capfd):
    with pytest.raises(UpshiftError, match="run ended with exit code 1"):
        shell.run_cell_magic("upshift", "run", "print(nothing)")


def test_an_interrupt_of_the_kernel_ends_the_cell_and_nothing_printed_is_lost(write):
    cell = "import time\ntry: print('ready'); time.sleep(60)\nfinally: print('its own end')"
    kernel = f"""
        import threading
        from upshift.cli import magic

        class Watching:
            asked = False
            def write(self, text):
                if "ready" in text and not self.asked:  # as Jupyter does: to the group of the kernel
                    self.asked = True  # the traceback shows the word again
                    threading.Timer(0.2, os.killpg, (os.getpgid(0), signal.SIGINT)).start()
                return sys.__stdout__.write(text)
            def flush(self): sys.__stdout__.flush()

        import os, signal, sys
        sys.stdout = Watching()
        try:
            magic.run_cell("run", {cell!r}, {{}})
        except magic.CellError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, write("kernel.py", kernel)], capture_output=True, text=True,
                          start_new_session=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "its own end" in done.stdout and "KeyboardInterrupt" in done.stdout
    assert "run ended by SIGINT." in done.stdout


@pytest.mark.parametrize("line", ["", "explain", "run --as", "run --as ../x", "run 'open"])
def test_a_wrong_line_says_the_right_one(shell, here, line):
    with pytest.raises(UpshiftError, match="%%upshift diagnose"):
        shell.run_cell_magic("upshift", line, "x = 1")
    assert not (here / ".upshift").exists()


@pytest.mark.skipif(importlib.util.find_spec("IPython") is None, reason="needs IPython")
def test_ipython_shows_words_and_no_traceback(shell, capfd):
    assert not shell.run_cell("%%upshift run\nraise SystemExit(3)").success
    shown = "".join(capfd.readouterr())
    assert "upshift: run ended with exit code 3" in shown and "Traceback" not in shown and "magic.py" not in shown
