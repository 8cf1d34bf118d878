"""`python -m upshift`."""

import sys

# `-m` puts the current folder first; a script's own `queue.py` there must not become ours.
if not sys.flags.safe_path:
    del sys.path[0]

from upshift.cli.main import main

main()
