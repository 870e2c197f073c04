"""Pickles and archives that were made to harm whoever reads them: refused, with nothing of theirs run."""

from __future__ import annotations

import io
import os
import pickle
import pkgutil
import runpy
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import pack

import numpy as np
import pytest
import torch
from llama_stack_meta_reference.llama.checkpoint import open_checkpoint
from safetensors.torch import save

from llama_stack.errors import CheckpointError
from tests.providers.meta_reference.checkpoints import random_reference, write_meta

SHARD = "consolidated.00.pth"
PROTOCOL_2 = b"\x80\x02"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that opens; the tests replace its shard's pickle, or the shard."""
    return write_meta(random_reference(), tmp_path_factory.mktemp("meta"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A folder of its own, still without a shard."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "params.json").write_bytes((good / "params.json").read_bytes())
    return folder


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What every hostile pickle here would make if it were run."""
    return tmp_path / "canary"


def repack(good: Path, path: Path, description: bytes) -> None:
    """Write the good shard with another pickle in it."""
    with zipfile.ZipFile(good / SHARD) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            target.writestr(
                member.filename, description if member.filename.endswith("/data.pkl") else source.read(member)
            )


def text(value: str) -> bytes:
    return b"X" + pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + pack("<i", value)


def sizes(values: list[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(*, elements: int, shape: list[int], strides: list[int], offset: int = 0) -> bytes:
    """One tensor as torch.save describes it, over the first storage of the archive."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(elements) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes(shape) + sizes(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def dictionary(key: bytes, value: bytes) -> bytes:
    return PROTOCOL_2 + b"}" + key + value + b"s."


class Call:
    """Unpickled without care, it calls ``function``."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


CALLS: dict[str, Callable[[str], object]] = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, f"open({canary!r}, 'w')"),
    "exec": lambda canary: Call(exec, f"open({canary!r}, 'w')"),
    "open": lambda canary: Call(open, canary, "w"),
    "subprocess": lambda canary: {"norm.weight": Call(subprocess.call, ["touch", canary])},
    "resolve_name": lambda canary: Call(pkgutil.resolve_name, "os:mkdir"),
    "run_path": lambda canary: Call(runpy.run_path, canary),
    "getattr": lambda canary: Call(getattr, Call(__import__, "os"), "mkdir"),
    "torch.load": lambda canary: Call(torch.load, canary),
    "behind an ordinary dictionary": lambda canary: OrderedDict(a=torch.zeros(1), b=Call(os.mkdir, canary)),
    "numpy array of objects": lambda canary: {"norm.weight": np.array([Call(os.mkdir, canary)], dtype=object)},
}


@pytest.mark.parametrize(
    ("form", "protocol"),
    [("archive", 0), ("archive", 2), ("archive", 5), ("plain", 2), ("renamed to safetensors", 2)],
)
@pytest.mark.parametrize("name", CALLS)
def test_no_call_in_a_pickle_is_made(
    name: str, form: str, protocol: int, good: Path, folder: Path, canary: Path
) -> None:
    """Model files come from strangers; the canary shows whether one of theirs got to act."""
    description = pickle.dumps(CALLS[name](str(canary)), protocol)
    if form == "archive":
        repack(good, folder / SHARD, description)
    elif form == "plain":
        (folder / SHARD).write_bytes(description)
    else:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(description)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert not canary.exists()


MKDIR = b"cposix\nmkdir\n"
NESTED = b")" + b"\x85" * 200_000
DOUBLED = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(64))
NORMAL = tensor(elements=4, shape=[4], strides=[1])

# What a pickler would not write: instruction by instruction.
PICKLES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a call whose result is thrown away": (
        lambda canary: PROTOCOL_2 + MKDIR + b"(" + canary + b"tR0}.",
        r"asks for 'posix\.mkdir'",
    ),
    "a name made at run time": (
        lambda canary: b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93(" + canary + b"tR.",
        r"instruction SHORT_BINUNICODE",
    ),
    "a name made of allowed parts": (
        lambda canary: b"\x80\x04" + text("posix") + text("mkdir") + b"\x93(" + canary + b"tR.",
        r"instruction STACK_GLOBAL",
    ),
    "an instance": (lambda canary: b"(" + canary + b"iposix\nmkdir\n.", r"instruction INST"),
    "an object": (lambda canary: b"(" + MKDIR + canary + b"o.", r"asks for 'posix\.mkdir'"),
    "an extension code": (lambda canary: PROTOCOL_2 + b"\x82\x01.", r"instruction EXT1"),
    "a persistent id as text": (lambda canary: b"Pstorage\n.", r"instruction PERSID"),
    "hostile state": (
        lambda canary: dictionary(text("a"), b"ctorch\nTensor\n)\x81}b"),
        r"asks for 'torch\.Tensor'",
    ),
    "a list that holds itself": (lambda canary: PROTOCOL_2 + b"]q\x00h\x00a.", r"dictionary of tensors; found list"),
    "items for what is no dictionary": (
        lambda canary: PROTOCOL_2 + text("a") + text("b") + NORMAL + b"s.",
        r"cannot load",
    ),
    "an endless number": (
        lambda canary: dictionary(text("a"), b"\x8b" + pack("<i", 1 << 30)),
        r"pickle is damaged",
    ),
    "a number of a gigabyte": (
        lambda canary: dictionary(text("a"), b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR"),
        r"asks for 'builtins\.bytearray'",
    ),
    "a key nested too deep to be hashed": (lambda canary: dictionary(NESTED, NORMAL), r"nests tuples"),
    "a value nested as deep": (lambda canary: dictionary(text("a"), NESTED), r"nests tuples"),
    "a key that takes years to hash": (lambda canary: dictionary(DOUBLED, NORMAL), r"nests tuples"),
    "a memo of millions": (
        lambda canary: dictionary(text("a"), b"r\0\0\0\0" * 200_001 + b"N"),
        r"a pickle of 1000\d+ bytes",
    ),
    "an empty stack": (lambda canary: PROTOCOL_2 + b"s.", r"pickle is damaged: it takes more"),
    "no mark": (lambda canary: PROTOCOL_2 + b"t.", r"pickle is damaged"),
    "a memo that was not made": (lambda canary: PROTOCOL_2 + b"h\x07.", r"pickle is damaged"),
    "no end": (lambda canary: PROTOCOL_2 + b"}", r"pickle is damaged"),
    "a shape beyond the storage": (
        lambda canary: dictionary(text("a"), tensor(elements=4, shape=[1 << 30], strides=[1])),
        r"torch cannot load it",
    ),
    "a storage beyond the file": (
        lambda canary: dictionary(text("a"), tensor(elements=1 << 28, shape=[1 << 28], strides=[1])),
        r"torch cannot load it",
    ),
    "a start before the storage": (
        lambda canary: dictionary(text("a"), tensor(elements=4, shape=[4], strides=[1], offset=-8)),
        r"torch cannot load it",
    ),
    "strides beyond the storage": (
        lambda canary: dictionary(text("a"), tensor(elements=4, shape=[4], strides=[1 << 30])),
        r"torch cannot load it",
    ),
    "sparse indices": (
        lambda canary: dictionary(text("a"), b"ctorch._utils\n_rebuild_sparse_tensor\n(NNtR"),
        r"asks for 'torch\._utils\._rebuild_sparse_tensor'",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_are_refused(name: str, good: Path, folder: Path, canary: Path) -> None:
    """``weights_only`` runs no code, and yet some of these end a process that reads them with it, or hang it."""
    make, message = PICKLES[name]
    repack(good, folder / SHARD, make(text(str(canary))))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
    assert not canary.exists()


def hostile(canary: Path) -> bytes:
    return pickle.dumps(Call(os.mkdir, str(canary)), 2)


def as_tar(good: Path, path: Path, canary: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(hostile(canary))
            archive.addfile(member, io.BytesIO(hostile(canary)))


def as_torchscript(good: Path, path: Path, canary: Path) -> None:
    repack(good, path, description_of(good))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member_name(good).replace("data.pkl", "constants.pkl"), hostile(canary))


def as_7z(good: Path, path: Path, canary: Path) -> None:
    path.write_bytes(b"7z\xbc\xaf\x27\x1c\x00\x04" + hostile(canary) * 10)


def behind_a_legacy_pickle(good: Path, path: Path, canary: Path) -> None:
    path.write_bytes(hostile(canary) + (good / SHARD).read_bytes())


def with_a_wrong_checksum(good: Path, path: Path, canary: Path) -> None:
    path.write_bytes((good / SHARD).read_bytes().replace(b"norm.weight", b"norm.weighs", 1))


def as_safetensors(good: Path, path: Path, canary: Path) -> None:
    path.write_bytes(save({"norm.weight": torch.zeros(64)}))


@pytest.mark.parametrize(
    "make", [as_tar, as_torchscript, as_7z, behind_a_legacy_pickle, with_a_wrong_checksum, as_safetensors]
)
def test_other_containers_are_refused(
    make: Callable[[Path, Path, Path], None], good: Path, folder: Path, canary: Path
) -> None:
    """Older formats are read by older code: there is one way in."""
    make(good, folder / SHARD, canary)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert not canary.exists()


def with_a_second_pickle(good: Path, path: Path, canary: Path) -> None:
    repack(good, path, description_of(good) + hostile(canary))


def with_a_member_of_the_same_name(good: Path, path: Path, canary: Path) -> None:
    path.write_bytes((good / SHARD).read_bytes())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(member_name(good), hostile(canary))


def with_a_member_of_another_folder(good: Path, path: Path, canary: Path) -> None:
    path.write_bytes((good / SHARD).read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"../../{canary.name}", b"")
        archive.writestr(str(canary), b"")


def member_name(good: Path) -> str:
    with zipfile.ZipFile(good / SHARD) as archive:
        return next(name for name in archive.namelist() if name.endswith("/data.pkl"))


def description_of(good: Path) -> bytes:
    with zipfile.ZipFile(good / SHARD) as archive:
        return archive.read(member_name(good))


@pytest.mark.parametrize(
    "make", [with_a_second_pickle, with_a_member_of_the_same_name, with_a_member_of_another_folder]
)
def test_what_stands_beside_the_weights_is_never_used(
    make: Callable[[Path, Path, Path], None], good: Path, folder: Path, canary: Path
) -> None:
    """The pickle that is looked through and the one that is read are the same, whatever else is in the archive."""
    make(good, folder / SHARD, canary)
    with suppress(CheckpointError):
        assert open_checkpoint(folder).config == open_checkpoint(good).config
    assert list(canary.parent.iterdir()) == [folder]
