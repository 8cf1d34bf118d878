"""Wait for torch in a process that upshift did not start itself. Nothing of upshift is imported before that."""

import sys


class WaitForTorch:
    """A finder that finds nothing but torch, and that by the finders after it."""

    def __init__(self, entry: str, argument: str) -> None:
        self.entry = entry
        self.argument = argument
        self.asked = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """Whoever looks for torch may import it: from now on upshift's own finder waits."""
        if name != "torch" or self.asked:
            return None
        self.asked = True
        try:
            from upshift.hook.imports import AfterImport
        except ImportError:
            tell(f"not installed for {sys.executable}, which imports torch: its training is not recorded")
            return None
        after = AfterImport()
        after.on("torch", self.begin)
        return after.find_spec(name)

    def begin(self, torch: object) -> None:
        """Torch has been imported. Whatever goes wrong here is not the script's affair."""
        try:
            module = __import__(f"upshift.hook.{self.entry}", fromlist=["torch_imported"])
            module.torch_imported(self.argument, torch)
        except Exception as error:
            tell(f"this training is not recorded: {type(error).__name__}: {error}")


def tell(text: str) -> None:
    """One line on stderr, if there is one."""
    try:
        sys.stderr.write(f"upshift: {text}\n")
    except (AttributeError, OSError, ValueError):
        pass


def wait(entry: str, argument: str) -> None:
    """Call `upshift.hook.ENTRY.torch_imported(argument, torch)` right after torch has been imported."""
    waiting = WaitForTorch(entry, argument)
    if "torch" in sys.modules:
        waiting.begin(sys.modules["torch"])
    else:
        sys.meta_path.insert(0, waiting)  # type: ignore[arg-type]
