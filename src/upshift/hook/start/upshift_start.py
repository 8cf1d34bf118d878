"""First file of every hooked process. It lies alone in its folder: nothing here can shadow a module of the script."""

import sys

loaded = frozenset(sys.modules)
if not sys.flags.safe_path:
    del sys.path[0]

from upshift.hook.boot import main  # noqa: E402  (the path must be clean first)

main(loaded)
