"""Scripts that get in the way of a watcher, on purpose or not: the run stays theirs, the record stays readable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import often, python, upshift

from upshift.records.runfold import fold

HEAD = """
import gc, os, signal, sys, threading, torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def step():
    optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    optimizer.step()
    print(repr(loss.item()), flush=True)
    return loss
"""

# name: (source, steps the record must hold; None where the script makes the record impossible)
SCRIPTS = {
    "closes every descriptor": (
        """
step()
os.closerange(3, 4096)
file = open("own.txt", "w")
step()
file.write("own")
file.close()
print(open("own.txt").read())
""",
        None,
    ),
    "patches what is patched": (
        """
call, backward, save = torch.nn.Module.__call__, torch.autograd.backward, torch.save
torch.nn.Module.__call__ = lambda module, *args, **more: call(module, *args, **more)
torch.autograd.backward = lambda *args, **more: backward(*args, **more)
step()
torch.nn.Module.__call__, torch.autograd.backward = call, backward
step()
""",
        2,
    ),
    "removes what it does not know": (
        """
for name in [name for name in sys.modules if name.startswith("upshift")]:
    del sys.modules[name]
sys.meta_path[:] = [item for item in sys.meta_path if "upshift" not in type(item).__module__]
step()
""",
        1,
    ),
    "clears the optimizer hooks": (
        """
from torch.optim import optimizer as module
module._global_optimizer_pre_hooks.clear()
module._global_optimizer_post_hooks.clear()
step()
""",
        0,
    ),
    "traces itself with little stack": (
        """
sys.settrace(lambda *args: None)
sys.setprofile(lambda *args: None)
sys.setrecursionlimit(150)
step()
step()
""",
        2,
    ),
    "interrupts itself": (
        """
def late(*args):
    raise TimeoutError
signal.signal(signal.SIGTERM, lambda *args: print("term"))
signal.signal(signal.SIGALRM, late)
os.kill(os.getpid(), signal.SIGTERM)
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    while True:
        model(torch.ones(2, 4)).mean().backward()
        optimizer.step()
except TimeoutError:
    print("late")
model.load_state_dict({"weight": torch.ones(1, 4), "bias": torch.ones(1)})
step()
""",
        None,
    ),
    "closes stderr": ("sys.stderr.close()\nstep()", 1),
    "swallows everything": (
        """
for _ in range(5):
    try:
        step()
        raise KeyboardInterrupt
    except:
        pass
""",
        5,
    ),
    "trains in a forked child": (
        """
step()
child = os.fork()
if child == 0:
    step()
    os._exit(0)
os.waitpid(child, 0)
step()
""",
        2,
    ),
    "trains while it ends": (
        """
import atexit
atexit.register(step)
sys.excepthook = lambda kind, error, trace: print("hook", kind, trace.tb_lineno)
step()
1 / 0
""",
        2,
    ),
    "compares in its own way": (
        """
class Own(torch.nn.Module):
    __hash__ = None
    def __eq__(self, other):
        raise RuntimeError
    def __bool__(self):
        raise RuntimeError
    def __len__(self):
        raise RuntimeError
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 1)
    def forward(self, x):
        return self.inner(x)
try:
    model = Own()
    optimizer = torch.optim.SGD(model.inner.parameters(), lr=0.1)
    step()
except Exception as error:
    print(type(error))
""",
        None,
    ),
}


@pytest.mark.parametrize("name", often(SCRIPTS, "closes every descriptor"))
def test_the_run_stays_the_scripts_own(tmp_path, name):
    source, steps = SCRIPTS[name]
    here = tmp_path / "here"
    here.mkdir()
    (here / "train.py").write_text(HEAD + source + "\n")
    plain = python("train.py", cwd=here)
    (here / "own.txt").unlink(missing_ok=True)
    hooked = upshift("run", "--runs", str(tmp_path / "runs"), "train.py", cwd=here)
    assert hooked.out == plain.out
    assert hooked.err == plain.err
    assert hooked.code == plain.code
    (folder,) = (tmp_path / "runs").iterdir()
    run = fold(folder)
    assert run.torn_lines == 0
    if steps is not None:
        assert run.steps == steps
    written = {path.name for path in Path(folder).iterdir()} - {"log.jsonl", "spec.json"}
    assert len(written) == (name == "trains in a forked child")  # the child's own record
    assert not any(name.startswith("upshift") for name in os.listdir(here))
