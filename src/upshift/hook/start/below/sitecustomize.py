"""First on the path of every Python below a launcher. Waits for torch, then gives way to the person's own one."""

# Only what every interpreter has loaded by now: a script may have a module of its own of any other name.
import os
import sys
from _frozen_importlib import module_from_spec
from _frozen_importlib_external import PathFinder

folder = os.path.dirname(os.path.abspath(__file__))
launch = os.environ.get("UPSHIFT_LAUNCH", "")
# upshift follows what it starts itself; so does the process that starts one by multiprocessing, which knows its use.
followed = any(
    item == "--multiprocessing-fork" or item.startswith("from multiprocessing.") or item.endswith("/upshift_start.py")
    for item in getattr(sys, "orig_argv", ())
)
if launch and not followed:
    try:
        import upshift_below  # type: ignore[import-not-found]

        upshift_below.wait("launched", launch)
    except Exception as error:
        sys.stderr.write(f"upshift: not followed: {error}\n")
sys.path[:] = [item for item in sys.path if os.path.abspath(item) != folder]

own = PathFinder.find_spec("sitecustomize", sys.path)
if own is not None and own.loader is not None:
    module = module_from_spec(own)
    sys.modules["sitecustomize"] = module
    own.loader.exec_module(module)
