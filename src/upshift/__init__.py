"""upshift: makes PyTorch training faster and cheaper on an unmodified script, and proves it.

The functions are in `upshift.api`.
"""

__version__ = "0.1.0"


def load_ipython_extension(shell: object) -> None:
    """`%load_ext upshift` in a notebook: the cell magic `%%upshift`."""
    from upshift.cli.magic import load

    load(shell)
