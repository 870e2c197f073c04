"""What a ``.pth`` file must be before torch may read it: a plain zip archive whose pickle builds tensors and no more.

``weights_only`` keeps a pickle from running code, but not from ending the process: a key of tuples nested 100,000 deep
overflows the C stack when it is hashed, one whose tuples name each other twice is hashed for years, and ``bytearray``
takes any amount of memory. So the pickle's instructions are looked through first, without building anything, and only
those that ``torch.save`` writes for a dictionary of tensors are let through.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llama_stack.errors import CheckpointError

# The pickle of a shard names its tensors; Llama 3.1 405B's needs 250 kB.
_LARGEST_PICKLE_BYTES = 1_000_000
_MOST_ARCHIVE_MEMBERS = 100_000
# The arguments of one tensor, its shape and strides among them, are about 30 items.
_LARGEST_TUPLE = 1_000

_BUILDERS = re.compile(
    r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|torch\._utils _rebuild_parameter|collections OrderedDict"
)
_PUTS = frozenset({"BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"BINGET", "LONG_BINGET"})
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_INSTRUCTIONS = (
    frozenset({"PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE"})
    | {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "EMPTY_TUPLE", "EMPTY_DICT", "SETITEM", "SETITEMS"}
    | {"EMPTY_LIST", "APPEND", "APPENDS", *_TUPLES, *_PUTS, *_GETS}
)


def check_archive(path: Path) -> None:
    """Raise CheckpointError unless torch can read the file without running code, crashing or taking much memory."""
    _check_members(path)
    try:
        # torch's own reader: two readers of one archive could be shown two different pickles.
        description = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not an archive as torch.save writes it: {first_line(error)}") from None
    try:
        _check_pickle(path, description)
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path}: its pickle is damaged: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The beginning of an error's text; torch's run over pages."""
    return str(error).strip().split("\n")[0][:200]


def _check_members(path: Path) -> None:
    """Refuse what would be unpacked or read whole before it is looked at: compressed members, a huge pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{path}: not a complete zip archive as torch.save writes it: cut short, or of another kind "
            f"({first_line(error)})"
        ) from None
    if len(members) > _MOST_ARCHIVE_MEMBERS:
        raise CheckpointError(f"{path}: {len(members)} archive members; at most {_MOST_ARCHIVE_MEMBERS} are read")
    stored_bytes = 0
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise CheckpointError(
                f"{path}: archive member {member.filename[:80]!r} is compressed; torch.save never does that"
            )
        if member.filename.endswith(".pkl") and member.file_size > _LARGEST_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: a pickle of {member.file_size} bytes; at most {_LARGEST_PICKLE_BYTES} are read"
            )
        stored_bytes += member.file_size
    if stored_bytes > path.stat().st_size:
        raise CheckpointError(f"{path}: its members claim {stored_bytes} bytes, more than the file has")


def _check_pickle(path: Path, description: bytes) -> None:
    """Follow the unpickler's stack, keeping of each object only how many items are in it if it is a tuple, else 1.

    Only tuples can be hashed item by item, so their size, counted anew at each place they stand in, bounds both the
    depth and the time of hashing. Raises ValueError, IndexError or KeyError for what no pickler writes.
    """
    sizes: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    instructions: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(description)
    for instruction, argument, _ in instructions:
        name = instruction.name
        if name not in _INSTRUCTIONS:
            raise CheckpointError(f"{path}: its pickle has the instruction {name}; weights need none such")
        if name == "GLOBAL" and not _BUILDERS.fullmatch(argument):
            raise CheckpointError(
                f"{path}: its pickle asks for {argument.replace(' ', '.')[:120]!r}; plain weights are made without it"
            )
        if name == "MARK":
            marks.append(len(sizes))
        elif name in _PUTS:
            memo[argument] = sizes[-1]
        elif name in _GETS:
            sizes.append(memo[argument])
        else:
            before = instruction.stack_before
            has_mark = pickletools.markobject in before
            start = marks.pop() - (len(before) - 2) if has_mark else len(sizes) - len(before)
            if start < 0:
                raise IndexError("it takes more from its stack than is there")
            size = 1 + sum(sizes[start:]) if name in _TUPLES else 1
            if size > _LARGEST_TUPLE:
                raise CheckpointError(f"{path}: its pickle nests tuples of over {_LARGEST_TUPLE} items")
            sizes[start:] = [size] * len(instruction.stack_after)
