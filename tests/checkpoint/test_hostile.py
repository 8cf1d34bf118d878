"""Checkpoints and weights that somebody made to harm: nothing runs, nothing large is allocated, all within a second."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch

from upshift.checkpoint import Store
from upshift.checkpoint.foreign import load_weights
from upshift.checkpoint.manifest import Manifest
from upshift.checkpoint.manifest import read as read_manifest
from upshift.checkpoint.reading import MAX_STATE
from upshift.errors import CheckpointError
from upshift.testing.crashes import forked, state


class Canary:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the file was run"


def bounded(act, seconds=1.0, megabytes=200):
    """Run in a process of its own: an expected error within `seconds`, with so much more memory at most."""
    told, tell = os.pipe()

    def inside():
        def peak():
            with open("/proc/self/status") as lines:
                return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
        before, begun = peak(), time.process_time()
        text = "no error"
        try:
            act()
        except CheckpointError as error:
            text = error.message
        os.write(tell, json.dumps([text, time.process_time() - begun, peak() - before]).encode())

    child = forked(inside)
    os.close(tell)
    found = b""
    while part := os.read(told, 65536):
        found += part
    os.close(told)
    os.waitpid(child, 0)
    text, took, more = json.loads(found)
    assert text != "no error"
    assert took < seconds and more < megabytes, (took, more)
    return text


# -- our own checkpoints ----------------------------------------------------------------------------------------------


def forged(store, files=None, text=None, name="step-9-a1", **changes):
    """A checkpoint with a manifest that fits its files; `files` are replaced, `changes` made in the manifest."""
    folder = store.folder / name
    folder.mkdir(parents=True)
    contents = {"rank-0-of-1.safetensors": b"", "state.json": b"{}", **(files or {})}
    listed = {}
    for file, data in contents.items():
        if isinstance(data, bytes):
            (folder / file).write_bytes(data)
            listed[file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        else:
            listed[file] = data
    manifest = {"schema": 1, "step": 9, "attempt": 1, "world": 1, "files": listed, **changes}
    body = text if text is not None else json.dumps(manifest).encode()
    digest = hashlib.sha256(body).hexdigest()
    (folder / "manifest.json").write_bytes(b'{"sha256": "' + digest.encode() + b'",\n"manifest": ' + body + b"}\n")
    return folder


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(shape, offsets, dtype="F32"):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


STATE = json.dumps({"schema": 1, "ranks": [{"tree": {"dict": {"x": {"tensor": "x"}}}}]}).encode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {"../../x": {"size": 0, "sha256": "0" * 64}}}, "files of a checkpoint"),
        ({"world": 3}, "files of a checkpoint"),
        ({"world": 10**9}, "cannot be read"),
        ({"step": 8}, "belongs to step 8"),
        ({"step": 10**300}, "cannot be read"),
        ({"step": -1}, "cannot be read"),
        ({"schema": 2}, "cannot be read"),
        ({"run": "me"}, "cannot be read"),
        ({"text": b"[" * 10**6}, "cannot be read"),
        ({"text": b'{"step": ' + b"9" * 10**6 + b"}"}, "cannot be read"),
        ({"text": b'{"a":' * 10**5 + b"1" + b"}" * 10**5}, "cannot be read"),
        ({"facts": {"x": "y" * (5 * 2**20)}}, "more than"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_manifests(tmp_path, changes, said):
    store = Store(tmp_path)
    changes = dict(changes)
    files = changes.pop("files", None)
    forged(store, files, **changes)
    text = bounded(lambda: store.load(store.checkpoints()[0]))
    assert said in text


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (safetensors(one([2**40], [0, 2**42])), "claims"),
        (safetensors(one([2**40], [0, 4]), b"1234"), "does not fit"),
        (safetensors(one([2**59] * 60, [0, 4]), b"1234"), "does not fit"),
        (safetensors(one([2] * 10**5, [0, 4]), b"1234"), "does not fit"),
        (safetensors(one([1], [4, 8]), b"12345678"), "does not fit"),
        (safetensors(one([1], [-4, 0]), b"1234"), "cannot be read"),
        (safetensors(one([1], [0, 4], "PICKLE"), b"1234"), "unknown dtype"),
        (struct.pack("<Q", 2**60) + b"{}", "no safetensors"),
        (struct.pack("<Q", 20 * 2**20) + b" " * (20 * 2**20), "header claims"),
        (safetensors(b"[" * 10**6), "cannot be read"),
        (safetensors(b'{"x":' * 10**6), "cannot be read"),
        (b"", "no safetensors"),
        (safetensors({}), "cannot be put together"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_hostile_tensor_files_with_fitting_digests(tmp_path, tensors, said):
    store = Store(tmp_path)
    forged(store, {"rank-0-of-1.safetensors": tensors, "state.json": STATE})
    assert said in bounded(lambda: store.load(store.newest()))


def ranks(text):
    return b'{"schema": 1, "ranks": [{"tree": ' + text + b"}]}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ranks(b"[" * 10**6), "cannot be read"),
        (ranks(b"[" + b"[]," * 10**6 + b"1]"), "values"),
        (ranks(b"[" + b"[]," * 300_000 + b"{}]"), "cannot be put together"),
        (ranks(b"[" + b"{}," * 300_000 + b"1]"), "cannot be put together"),
        (ranks(b'"' + b"x" * MAX_STATE + b'"'), "more than"),
        (ranks(b'{"int": "0x' + b"f" * 10**6 + b'"}'), "cannot be put together"),
        (ranks(b"[" * 100 + b"]" * 100), "too deeply"),
        (b'{"schema": 1, "ranks": []}', "number of ranks"),
        (b'{"schema": 9, "ranks": [{"tree": 1}]}', "another version"),
        (b"\x80\x04cos\nsystem\n", "cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_states_with_fitting_digests(tmp_path, text, said):
    store = Store(tmp_path)
    forged(store, {"rank-0-of-1.safetensors": safetensors({}), "state.json": text})
    found = store.checkpoints()[0]
    assert said in bounded(lambda: store.load(found), seconds=3.0 if len(text) > 2**19 else 1.0)


def test_a_hollow_file_of_a_terabyte_is_not_read_through(tmp_path):
    store = Store(tmp_path)
    folder = forged(store, {"rank-0-of-1.safetensors": {"size": 2**40, "sha256": "0" * 64}})
    with open(folder / "rank-0-of-1.safetensors", "wb") as file:
        file.truncate(2**40)
    begun = time.monotonic()
    said = []
    store.say = said.append
    assert store.newest() is None and "claims" in said[0]
    assert time.monotonic() - begun < 1.0


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank-0-of-1.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_pipes_and_folders_are_no_files(tmp_path, name, kind):
    with Store(tmp_path) as store:
        saved = store.save(1, state(1))
    path = saved.path / name
    path.rename(tmp_path / name)
    {"link": lambda: path.symlink_to(tmp_path / name), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    said = []
    assert Store(tmp_path, say=said.append).newest() is None
    assert "link" in said[0] or "no regular file" in said[0]


def test_a_checkpoint_that_is_a_link_does_not_count(tmp_path):
    with Store(tmp_path / "a") as store:
        store.save(1, state(1))
    with Store(tmp_path / "b") as store:
        (store.folder / "step-1-a1").symlink_to(tmp_path / "a" / "checkpoints" / "step-1-a1")
        assert store.newest() is None and store.checkpoints() == []


def test_names_that_are_no_checkpoints(tmp_path):
    with Store(tmp_path) as store:
        for name in ("step-1", "step-01-a1", "step--1-a1", "step-1-a0", "step-١-a1", "step-1-a1-x", "step-" + "9" * 30):
            (store.folder / name).mkdir()
        assert store.checkpoints() == []


def test_a_changed_manifest_is_noticed_whatever_was_changed(tmp_path):
    with Store(tmp_path) as store:
        folder = store.save(1, state(1), facts={"accuracy": 0.25}).path
    data = (folder / "manifest.json").read_bytes()
    assert isinstance(read_manifest(data, "step-1-a1"), Manifest)
    for other in (data + b" ", data.replace(b'": "', b'" : "', 1), data.replace(b"0.25", b"0.75"), data[:-1]):
        with pytest.raises(CheckpointError):
            read_manifest(other, "step-1-a1")


# -- weights of others ------------------------------------------------------------------------------------------------


def pt(path, index, records=None, compression=zipfile.ZIP_STORED):
    """An archive as torch.save writes it, with this index."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", index)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
        for name, data in (records or {}).items():
            archive.writestr(f"x/{name}", data)
    return path


def test_a_pickle_is_never_run(tmp_path, canary):
    torch.save({"weight": Canary(canary)}, tmp_path / "a.pt")
    torch.save({"weight": torch.zeros(1), "x": Canary(canary)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Canary(canary)))
    (tmp_path / "d.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
    for name in ("a.pt", "b.pt", "c.pt", "d.safetensors", "e"):
        with pytest.raises(CheckpointError):
            load_weights(tmp_path / name)


def test_a_pickle_is_run_only_when_trusted(tmp_path):
    path = tmp_path / "canary"
    torch.save({"weight": torch.ones(2), "x": Canary(path)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"would use (_io|io)\.open"):
        load_weights(tmp_path / "a.pt")
    assert not path.exists()
    with pytest.raises(CheckpointError, match="no weights"):
        load_weights(tmp_path / "a.pt", trust_pickle=True)
    assert path.exists()


def tensor_of(shape, numel, storage="torch FloatStorage", stride=(1,)):
    """The opcodes of {"w": a tensor}: protocol 2."""

    def number(value):
        data = value.to_bytes(9, "little")
        return b"\x8a" + bytes([len(data)]) + data

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    persistent = b"(" + text("storage") + b"c" + storage.replace(" ", "\n").encode() + b"\n" + text("0") + text("cpu")
    persistent += number(numel) + b"tQ"
    shapes = b"(" + b"".join(map(number, shape)) + b"t" + b"(" + b"".join(map(number, stride)) + b"t"
    rebuild = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + persistent
        + number(0)
        + shapes
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}" + text("w") + rebuild + b"s."


def test_the_forged_tensor_is_one_that_torch_loads(tmp_path):
    """So that the bombs below are refused for what they claim, not for how they are written."""
    pt(tmp_path / "good.pt", tensor_of((2,), 2), {"data/0": b"\0" * 8})
    assert torch.equal(load_weights(tmp_path / "good.pt")["w"], torch.zeros(2))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (tensor_of((2**40,), 2**40), "claims"),
        (tensor_of((2**40,), 2), "reaches beyond"),
        (tensor_of((2**40, 2**40), 2, stride=(0, 1)), "reaches beyond"),
        (tensor_of((2,), 2, "os system"), "would use os.system"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R.", "would use builtins.bytearray"),
        (b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\0\0\0\0\x01\x85R.", "would use torch.FloatTensor"),
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.", "would use os.system"),
        (b"\x80\x02ccollections\nOrderedDict\n)Rcos\nsystem\n\x86.", "would use os.system"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "not as torch writes"),
        (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
        (b"]" + b"]a" * 10**4, "pickle"),
        (b"2" * 10, "opcode DUP"),
        (b"}" + b"0" * 5, "opcode POP"),
        (b"", "pickle"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_archives(tmp_path, index, said):
    path = pt(tmp_path / "a.pt", index, {"data/0": b"\0" * 8})
    assert said in bounded(lambda: load_weights(path))


def test_zip_bombs(tmp_path):
    bomb = pt(tmp_path / "bomb.pt", tensor_of((2**26,), 2**26), {"data/0": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**20
    assert "compressed" in bounded(lambda: load_weights(bomb))
    (tmp_path / "index.pt").write_bytes(pt(tmp_path / "i.pt", b"\x80\x02" + b"N0" * 2**24).read_bytes())
    assert "size" in bounded(lambda: load_weights(tmp_path / "index.pt"))


def test_a_tensor_bomb_in_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(one([2**40], [0, 2**42])))
    assert path.stat().st_size < 1000
    assert "claims" in bounded(lambda: load_weights(path))
