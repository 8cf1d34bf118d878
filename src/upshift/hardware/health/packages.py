"""What stands beside torch in the same environment: torchvision, torchaudio, TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata

import msgspec

from upshift.hardware.health.build import WHEELS, TorchFacts, asked, release
from upshift.hardware.health.check import Check, Run, State, one_line, run

#: torch is compiled against these, operator by operator.
PACKAGES = ("torchvision", "torchaudio")
#: From this version on torchaudio uses the stable ABI, and works with every later torch
#: (docs.pytorch.org/audio/2.11.0/installation.html).
STABLE_AUDIO = (2, 11)


class PackageFacts(msgspec.Struct, frozen=True):
    """What torchvision or torchaudio says of itself. `cuda` counts only where `says_cuda`."""

    version: str = ""
    cuda: str | None = None
    says_cuda: bool = False
    failure: str = ""


def ask_package(name: str, execute: Run = run) -> PackageFacts:
    """What a package built against torch says of itself."""
    return msgspec.convert(asked(name, execute), PackageFacts)


def pair(name: str, torch: str) -> str:
    """The versions of torchvision or torchaudio that belong to a version of torch, as pip takes them; or empty.

    Source: the tables in the README of pytorch/vision and on docs.pytorch.org/audio ("Compatibility Matrix").
    """
    major, minor = release(torch)
    if major != 2:
        return ""
    if name == "torchvision":
        return f"==0.{minor + 15}.*"
    return f">={'.'.join(map(str, STABLE_AUDIO))}" if (major, minor) >= STABLE_AUDIO else f"==2.{minor}.*"


def pinned(requires: Sequence[str] | None) -> str:
    """The version of torch a package was built for, from its requirements; empty where none is named."""
    for line in requires or ():
        found = re.match(r"torch\s*\(?\s*==\s*([\w.+]+)", line)
        if found:
            return found[1]
    return ""


def package(
    name: str, installed: str | None, built_for: str, loaded: PackageFacts | None, facts: TorchFacts
) -> Check | None:
    """Whether torchvision or torchaudio fits torch.

    Args:
        installed: its version, None where it is not installed; built_for: the torch its requirements name, or empty;
        loaded: what came of importing it, None where that was not tried.
    """
    if installed is None or facts.failure:
        return None
    why = f"{name} holds operators compiled for one version and build of torch."
    wanted = pair(name, facts.version)
    tag = re.search(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$", facts.version)
    index = f" --index-url {WHEELS}/{tag[1]}" if tag else ""
    mend = f"pip install --force-reinstall --no-deps '{name}{wanted}'{index}"
    found = f"{installed} beside torch {facts.version}"
    if loaded is not None and loaded.failure:
        return Check(name, "wrong", f"{found}: it cannot be imported: {one_line(loaded.failure)}", why, mend)
    if loaded is not None and loaded.says_cuda and facts.cuda and release(loaded.cuda or "") != release(facts.cuda):
        other = f"CUDA {loaded.cuda}" if loaded.cuda else "the CPU"
        state: State = "note" if loaded.cuda else "wrong"
        return Check(name, state, f"{found}: it is built for {other}, torch for CUDA {facts.cuda}",
                     "Its operators fail on the GPU." if state == "wrong" else why, mend)  # fmt: skip
    if built_for and release(built_for) != release(facts.version):
        # It could be imported: what is left to fail shows only when an operator is called.
        return Check(name, "note" if loaded is not None else "wrong", f"{found}: it was built for torch {built_for}",
                     why, mend)  # fmt: skip
    return Check(name, "ok", found, why)


def installed_package(name: str) -> tuple[str | None, str]:
    """The version of an installed package (None: it is not), and the torch it was built for."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None, ""
    return found.version, pinned(found.requires)


def tensorflow(version: str | None, gpu: bool, env: Mapping[str, str]) -> Check | None:
    """TensorFlow in the same environment; `version` is None where it is not installed."""
    if version is None:
        return None
    found = f"TensorFlow {version} in the same environment"
    if gpu and env.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() != "true":
        return Check("TensorFlow", "note", found, "What imports it beside torch lets it take all memory of the GPU.",
                     "export TF_FORCE_GPU_ALLOW_GROWTH=true")  # fmt: skip
    return Check("TensorFlow", "note", found, "torch.utils.tensorboard imports it when it is there: seconds at "
                 "each start, and threads of its own.",
                 "pip uninstall tensorflow    (if nothing else needs it)")  # fmt: skip


def triton(facts: TorchFacts) -> Check | None:
    """Whether triton is there, on a machine whose GPU torch can use."""
    if not facts.started or facts.triton is None:
        return None
    why = "torch.compile writes its kernels for the GPU in it."
    if facts.triton:
        return Check("triton", "ok", facts.triton, why)
    return Check("triton", "note", "not installed", why, "pip install triton")
