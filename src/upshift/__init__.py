"""upshift: makes PyTorch training faster and cheaper on an unmodified script, and proves it.

The functions for scripts are in `upshift.api`; what a declared job needs is here:

    from upshift import Job, Target, run, tune
"""

__version__ = "0.1.0"

# Not from `typing`: a person's folder may hold a module of that name, and this is imported first.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from upshift.api.jobs import run as run
    from upshift.api.jobs import tune as tune
    from upshift.engine.job import Job as Job
    from upshift.engine.job import Target as Target
    from upshift.engine.job import Weighted as Weighted

_WHERE = {
    "Job": "upshift.engine.job", "Target": "upshift.engine.job", "Weighted": "upshift.engine.job",
    "run": "upshift.api.jobs", "tune": "upshift.api.jobs",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_WHERE[name]), name)
    return found


def load_ipython_extension(shell: object) -> None:
    """`%load_ext upshift` in a notebook: the cell magic `%%upshift`."""
    from upshift.cli.magic import load

    load(shell)
