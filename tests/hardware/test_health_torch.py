"""torch and what is built against it: builds, devices, versions, compilers, from invented facts and tiny packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.hardware.health import build, compiler, packages
from upshift.hardware.health.build import TorchFacts
from upshift.hardware.health.check import Ran, run
from upshift.hardware.health.packages import PackageFacts

CPU = TorchFacts(version="2.13.0+cpu", mkl=True, onednn=True, capability="AVX2")
CUDA = TorchFacts(version="2.13.0+cu128", mkl=True, onednn=True, capability="AVX2", cuda="12.8", started=True,
                  cudnn=91002, nccl="2.27.3", archs=("sm_75", "sm_80", "sm_90", "sm_100", "compute_120"),
                  devices=(("NVIDIA H100", 9, 0),), triton="3.5.0")  # fmt: skip


def but(facts: TorchFacts, **changes: object) -> TorchFacts:
    return msgspec.structs.replace(facts, **changes)


@pytest.mark.parametrize(
    ("facts", "state"),
    [(CPU, "ok"), (but(CPU, version="2.9.1"), "wrong"), (but(CPU, mkl=False, onednn=False), "note"),
     (but(CPU, mkl=None), "ok"), (TorchFacts(failure="ModuleNotFoundError: No module named 'torch'"), "wrong")],
)  # fmt: skip
def test_torch(facts, state):
    found = build.torch_build(facts)
    assert found.state == state and bool(found.mend) == (state != "ok")


# -- torch against the device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "nvidia", "driver", "visible", "state", "mend"),
    [
        (CPU, False, "", None, "ok", ""),
        (CPU, True, "12.4", None, "wrong", "whl/cu126"),
        (CPU, True, "13.0", None, "wrong", "whl/cu130"),
        (CPU, True, "", None, "wrong", "download.pytorch.org"),
        (but(CUDA, started=False, devices=()), False, "", None, "ok", ""),
        (CUDA, True, "12.8", None, "ok", ""),
        (CUDA, True, "12.2", None, "ok", ""),  # minor version compatibility
        (CUDA, True, "13.0", None, "ok", ""),
        (but(CUDA, cuda="13.0", started=False), True, "12.4", None, "wrong", "whl/cu126"),
        (but(CUDA, cuda="13.0"), True, "12.4", None, "ok", ""),  # CUDA's compatibility package
        (but(CUDA, started=False), True, "11.4", None, "wrong", "driver"),
        (but(CUDA, started=False, driver_cuda=11040), True, "", None, "wrong", "driver"),
        (but(CUDA, started=False, problem="out of memory"), True, "12.8", None, "wrong", "nvidia-smi"),
        (but(CUDA, started=False), True, "12.8", "", "note", "unset CUDA_VISIBLE_DEVICES"),
        (but(CUDA, started=False), True, "12.8", "-1", "note", "unset CUDA_VISIBLE_DEVICES"),
        (but(CUDA, started=None), True, "12.8", None, "unknown", ""),
        (but(CUDA, devices=(("Tesla P100", 6, 0),)), True, "12.8", None, "wrong", "whl/cu126"),
        (but(CUDA, devices=(("NVIDIA Thor", 11, 0),)), True, "13.0", None, "wrong", "whl/cu130"),
        (but(CUDA, devices=(("RTX 5090", 12, 0),)), True, "13.0", None, "note", "pip install --upgrade torch"),
        (but(CPU, mps=True), False, "", None, "ok", ""),
    ],
)
def test_a_build_against_the_device(facts, nvidia, driver, visible, state, mend):
    found = build.torch_device(facts, nvidia, False, driver, visible)
    assert found is not None and found.state == state, found
    assert mend in found.mend if mend else not found.mend


def test_the_libraries_of_a_cuda_build_are_named():
    found = build.torch_device(CUDA, True, False, "12.8", None)
    assert found is not None and "CUDA 12.8, cuDNN 9.10.2, NCCL 2.27.3; it can use NVIDIA H100" in found.found
    old = build.torch_device(but(CUDA, cudnn=8902), True, False, "12.8", None)
    assert old is not None and "cuDNN 8.9.2" in old.found


def test_other_makers_and_no_torch():
    found = build.torch_device(CPU, False, True, "", None)
    assert found is not None and found.state == "note" and "rocm" in found.mend
    hip = but(CPU, hip="6.4", started=True, devices=(("MI300X", 9, 4),), archs=("gfx942",))
    assert (ok := build.torch_device(hip, False, True, "", None)) is not None and ok.state == "ok"
    assert build.torch_device(TorchFacts(failure="x"), True, False, "", None) is None


@pytest.mark.parametrize(
    ("capability", "archs", "fit"),
    [
        ((8, 6), ["sm_80"], "binary"),
        ((8, 0), ["sm_86"], "none"),
        ((9, 0), ["sm_80"], "none"),
        ((9, 0), ["sm_80", "compute_80"], "ptx"),
        ((9, 0), ["sm_90a"], "binary"),
        ((10, 0), ["sm_90a", "compute_90a"], "none"),
        ((10, 3), ["sm_100f"], "binary"),
        ((12, 1), ["sm_120"], "binary"),
        ((7, 0), ["compute_75"], "none"),
        ((9, 0), ["gfx942", "", "sm_", "sm_x"], "none"),
    ],
)
def test_kernels_for_a_capability(capability, archs, fit):
    assert build.kernels_for(*capability, archs) == fit


@given(st.integers(3, 15), st.integers(0, 9))
def test_machine_code_for_a_chip_runs_on_it(major, minor):
    assert build.kernels_for(major, minor, [f"sm_{major}{minor}"]) == "binary"
    assert build.kernels_for(major, minor, [f"compute_{major}{minor}"]) == "ptx"


@given(st.lists(st.text(max_size=10), max_size=5), st.integers(0, 99), st.integers(0, 99))
def test_odd_architectures_raise_nothing(archs, major, minor):
    assert build.kernels_for(major, minor, archs) in ("binary", "ptx", "none")


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.booleans(), st.sampled_from(["", "11.4", "12.2", "13.0", "odd"]),
       st.none() | st.sampled_from(["", "0", "-1"]),
       st.builds(TorchFacts, version=st.sampled_from(["2.13.0+cpu", "2.1", ""]), cuda=st.none() | st.just("12.8"),
                 hip=st.none(), started=st.none() | st.booleans(), problem=st.text(max_size=9),
                 driver_cuda=st.none() | st.integers(0, 20000), mkl=st.booleans(),
                 capability=st.none() | st.just("AVX2"),
                 archs=st.lists(st.sampled_from(["sm_90", "compute_80"])).map(tuple),
                 devices=st.lists(st.tuples(st.just("GPU"), st.integers(3, 12), st.integers(0, 9))).map(tuple)
                 ))  # fmt: skip
def test_what_is_not_well_has_a_why_and_what_is_wrong_a_mend(nvidia, amd, driver, visible, facts):
    found = [build.torch_build(facts), build.torch_device(facts, nvidia, amd, driver, visible),
             build.instructions(facts, frozenset({"avx2", "amx_tile"}), {}), packages.triton(facts),
             *(packages.package(name, "0.1", "2.0", loaded, facts) for name in packages.PACKAGES
               for loaded in (None, PackageFacts(failure="x"), PackageFacts("1", None, True)))]  # fmt: skip
    for check in found:
        assert check is None or (check.found and check.why and (check.state != "wrong" or check.mend))


# -- vector instructions -----------------------------------------------------------------------------------------------

WHOLE = frozenset({"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"})


@pytest.mark.parametrize(
    ("facts", "features", "env", "state"),
    [
        (but(CPU, capability="AVX512"), WHOLE, {}, "ok"),
        (CPU, WHOLE, {}, "note"),
        (CPU, WHOLE, {"ATEN_CPU_CAPABILITY": "avx2"}, "note"),
        (CPU, WHOLE - {"avx512vl"}, {}, "ok"),  # torch needs all parts of AVX-512
        (CPU, frozenset({"avx2"}), {}, "ok"),
        (but(CPU, capability="DEFAULT"), frozenset({"avx2"}), {}, "note"),
        (but(CPU, capability="NO AVX"), frozenset(), {}, "ok"),
        (but(CPU, capability="AVX512", amx=False), WHOLE | {"amx_tile"}, {}, "note"),
        (but(CPU, capability="AVX512", amx=True), WHOLE | {"amx_tile"}, {}, "ok"),
        (but(CPU, capability="AVX512"), WHOLE, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "note"),
        (but(CPU, capability="AVX512"), WHOLE, {"ONEDNN_MAX_CPU_ISA": "ALL"}, "ok"),
        (but(CPU, capability="AVX512"), WHOLE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "ok"),
        (but(CPU, capability="AVX512", amx=True), WHOLE | {"amx_tile"}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "note"),
    ],
)
def test_vector_instructions(facts, features, env, state):
    found = build.instructions(facts, features, env)
    assert found is not None and found.state == state and bool(found.mend) == (state == "note")


# -- packages built against torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "torch", "pair"),
    [("torchvision", "2.9.1", "==0.24.*"), ("torchvision", "2.13.0+cpu", "==0.28.*"),
     ("torchvision", "2.0.1", "==0.15.*"),
     ("torchaudio", "2.9.1", "==2.9.*"), ("torchaudio", "2.11.0", ">=2.11"), ("torchaudio", "2.13.0+cpu", ">=2.11"),
     ("torchvision", "odd", "")],
)  # fmt: skip
def test_pairs(name, torch, pair):
    """Those of pytorch.org/get-started/previous-versions and of the two READMEs."""
    assert packages.pair(name, torch) == pair


@pytest.mark.parametrize(
    ("built_for", "loaded", "facts", "state"),
    [
        ("2.13.0", PackageFacts("0.28.0"), CPU, "ok"),
        ("", PackageFacts("0.28.0"), CPU, "ok"),
        ("2.12.0", PackageFacts("0.27.0"), CPU, "note"),
        ("2.12.0", None, CPU, "wrong"),
        ("2.13.0", PackageFacts(failure="RuntimeError: operator torchvision::nms does not exist"), CPU, "wrong"),
        ("2.13.0", PackageFacts("0.28.0", None, True), CUDA, "wrong"),
        ("2.13.0", PackageFacts("0.28.0", "12.6", True), CUDA, "note"),
        ("2.13.0", PackageFacts("0.28.0", "12.8", True), CUDA, "ok"),
    ],
)
def test_torchvision_beside_torch(built_for, loaded, facts, state):
    found = packages.package("torchvision", "0.28.0", built_for, loaded, facts)
    tag = facts.version.partition("+")[2]
    assert found is not None and found.state == state
    if state != "ok":
        assert "'torchvision==0.28.*'" in found.mend and found.mend.endswith(f"whl/{tag}")
    assert packages.package("torchvision", None, "", None, facts) is None


@pytest.mark.parametrize(
    ("requires", "version"),
    [(["numpy", "torch==2.12.0", "pillow"], "2.12.0"), (["torch (==2.1.2)"], "2.1.2"), (["torch>=2.0"], ""),
     (["torchdata==0.11"], ""), (None, ""), ([], "")],
)  # fmt: skip
def test_the_torch_a_package_was_built_for(requires, version):
    assert packages.pinned(requires) == version


def test_tensorflow_and_triton():
    assert packages.tensorflow(None, True, {}) is None
    assert "ALLOW_GROWTH" in (packages.tensorflow("2.20", True, {}) or pytest.fail()).mend
    assert packages.tensorflow("2.20", True, {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}).state == "note"  # type: ignore[union-attr]
    states = [packages.triton(facts) for facts in (CPU, CUDA, but(CUDA, triton=""))]
    assert [None if check is None else check.state for check in states] == [None, "ok", "note"]


# -- asked in a process of its own -------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package of this name that the child process imports."""

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart"),
        ("import os; os.kill(os.getpid(), 4)", "ended with code -4"),  # illegal instruction
        ("import os; os._exit(3)", "ended with code 3"),
        ("print('{}'); raise SystemExit(0)", "SystemExit"),
        ("version = 'no torch at all'", "AttributeError"),
    ],
)
def test_a_torch_that_breaks_its_process(fake, text, said):
    fake("torch", text)
    found = build.ask_torch()
    assert said in found.failure
    assert build.torch_build(found).state == "wrong"


def test_a_driver_that_hangs_leaves_what_was_known():
    def hangs(command: Sequence[str], seconds: float) -> Ran:
        return Ran(
            None, '{"version": "2.13.0+cu128", "cuda": "12.8"}\n{"driver_cuda": 12080}\n{"arc', "", "did not end"
        )

    found = build.ask_torch(hangs)
    assert found.cuda == "12.8" and found.started is False and "did not start" in found.problem
    check = build.torch_device(found, True, False, "", None)
    assert check is not None and check.state == "wrong"


def test_a_torchvision_for_another_torch(fake):
    fake("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    found = packages.ask_package("torchvision")
    assert found.failure == "RuntimeError: operator torchvision::nms does not exist"


def test_a_package_that_imports_but_lacks_its_compiled_part(fake):
    fake("torch", "class ops:\n    class torchvision: pass")
    fake("torchvision", "__version__ = '0.28'")
    assert "nms" in packages.ask_package("torchvision").failure


def test_a_file_of_this_folder_does_not_stand_in(tmp_path, monkeypatch):
    (tmp_path / "torchaudio.py").write_text("raise RuntimeError('mine')")
    monkeypatch.chdir(tmp_path)
    assert "mine" not in packages.ask_package("torchaudio").failure


# -- the compiler ------------------------------------------------------------------------------------------------------

GXX = shutil.which("g++")
needs_compiler = pytest.mark.skipif(GXX is None or sys.platform != "linux", reason="needs g++")


def script(folder: Path, text: str) -> dict[str, str]:
    """An environment whose C++ compiler is this shell script."""
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return {"PATH": os.environ["PATH"], "CXX": str(path)}


def test_no_compiler(tmp_path):
    assert compiler.builds({"PATH": str(tmp_path)}).mend == "apt-get install g++"
    assert compiler.builds({"PATH": os.environ["PATH"], "CXX": "/no/such/compiler"}).mend == "unset CXX"
    assert compiler.present({"PATH": str(tmp_path)}).state == "note"


@needs_compiler
def test_a_compiler_that_works(tmp_path):
    found = compiler.builds({"PATH": os.environ["PATH"]}, tmp_path)
    if "Python.h" in found.found:
        pytest.skip("the headers of Python are not installed")
    assert found.state == "ok" and "measured" in found.found and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("echo 'kernel.cpp:1:10: fatal error: Python.h: No such file' >&2; exit 1", "-dev"),
        ("echo 'fatal error: omp.h: No such file' >&2; exit 1", "libgomp1"),
        ("echo 'cannot execute cc1plus' >&2; exit 1", "--reinstall g++"),
        ("kill -9 $$", "--reinstall g++"),
    ],
)
def test_a_compiler_that_does_not_build(tmp_path, text, mend):
    found = compiler.builds(script(tmp_path, text), tmp_path)
    assert found.state == "wrong" and mend in found.mend
    assert [path.name for path in tmp_path.iterdir()] == ["cxx"]


def test_what_was_built_cannot_be_loaded(tmp_path):
    """As in a folder mounted noexec."""

    def execute(command: Sequence[str], seconds: float) -> Ran:
        if command[0] == sys.executable:
            return Ran(1, err="OSError: kernel.so: failed to map segment from shared object: Operation not permitted")
        return Ran(0)

    found = compiler.builds(script(tmp_path, "exit 0"), tmp_path, execute)
    assert found.state == "wrong" and "TORCHINDUCTOR_CACHE_DIR" in found.mend and str(tmp_path) in found.found
    rubbish = compiler.builds(script(tmp_path, "exit 0"), tmp_path, run)
    assert rubbish.state == "wrong", "nothing was written"


def test_all_of_cxx_is_the_name_of_one_program():
    several = compiler.present({"PATH": os.environ["PATH"], "CXX": "env g++"})
    assert several.state == "note" and "one program" in several.found and several.mend == "unset CXX"


def test_nothing_of_this_imports_torch():
    code = "import sys, upshift.hardware.health; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
