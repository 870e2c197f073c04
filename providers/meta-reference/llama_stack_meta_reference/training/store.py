"""Checkpoints on disk: written aside, hashed, and given their name when nothing can be missing any more.

``manifest.json`` comes last and lists every other file with its size and SHA-256, so a folder is either all there or
known not to be. Whatever a crash leaves has a name of its own and is removed by the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_stack.errors import CheckpointError

from ..llama.checkpoint import read_json
from .plan import CHECKPOINTS_FOLDER, MANIFEST_FILE, checkpoint_name

_CHECKPOINT = re.compile(r"iters-(\d{8,})")
_PART = ".part"
_VERSION = 1


def write_folder(folder: Path, iters: int, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a new folder's files, and give it its name once all of it is on disk. Raises ``OSError``.

    A folder of that name is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{folder.name}{_PART}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    fill(aside)
    files = [_hashed(aside, path) for path in sorted(aside.rglob("*")) if path.is_file()]
    manifest = {"version": _VERSION, "iters": iters, "files": files}
    (aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in [aside / MANIFEST_FILE, *(path for path in aside.rglob("*") if path.is_dir()), aside]:
        _sync(path)
    if folder.exists():
        gone = folder.with_name(f"{folder.name}.old{_PART}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
    aside.rename(folder)
    _sync(folder.parent)
    for left in folder.parent.glob(f"{folder.name}*{_PART}"):
        shutil.rmtree(left, ignore_errors=True)


def verify(folder: Path) -> int:
    """Return after how many iterations a folder was written.

    Raises ``CheckpointError`` unless every file that its manifest lists is there as it was written, and no other.
    """
    manifest_file = folder / MANIFEST_FILE
    if folder.is_symlink() or not manifest_file.is_file() or manifest_file.is_symlink():
        raise CheckpointError(f"{folder}: there is no {MANIFEST_FILE}, which is written last")
    manifest = read_json(manifest_file)
    iters, listed = manifest.get("iters"), manifest.get("files")
    if manifest.get("version") != _VERSION or type(iters) is not int or not isinstance(listed, list):
        raise CheckpointError(f"{manifest_file}: not a manifest of version {_VERSION}")
    entries = {str(entry.get("name")): entry for entry in listed if isinstance(entry, dict)}
    found = {
        str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    del found[MANIFEST_FILE]
    if len(entries) != len(listed) or entries.keys() != found.keys():
        odd = sorted(map(str, entries.keys() ^ found.keys())) or ["a name that stands twice"]
        raise CheckpointError(f"{folder}: files and {MANIFEST_FILE} differ: {odd[0][:120]}")
    for name, path in found.items():
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
        if path.stat().st_size != entries[name].get("bytes"):
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes; {MANIFEST_FILE} says {str(entries[name].get('bytes'))[:40]}"
            )
        if _sha256(path) != entries[name].get("sha256"):
            raise CheckpointError(f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}: damaged")
    return iters


def checkpoints(job: Path) -> list[Path]:
    """The folders of a job's checkpoints by their names alone, oldest first."""
    home = job / CHECKPOINTS_FOLDER
    if not home.is_dir():
        return []
    return sorted((path for path in home.iterdir() if _CHECKPOINT.fullmatch(path.name)), key=_iters)


def newest_valid(job: Path, pass_over: Callable[[CheckpointError], None]) -> Path | None:
    """The newest checkpoint that is as it was written; those that are not are told to ``pass_over``."""
    for folder in reversed(checkpoints(job)):
        try:
            if verify(folder) != _iters(folder):
                raise CheckpointError(f"{folder}: its manifest is another checkpoint's")
        except CheckpointError as error:
            pass_over(error)
        except OSError as error:
            pass_over(CheckpointError(f"{folder}: cannot be read: {error.strerror}"))
        else:
            return folder
    return None


def save_checkpoint(job: Path, iters: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint after ``iters`` iterations; of the older ones, ``keep`` - 1 stay (0 = all)."""
    folder = job / CHECKPOINTS_FOLDER / checkpoint_name(iters)
    for left in folder.parent.glob(f"*{_PART}"):  # of saves that were cut off; only one process works in a job
        shutil.rmtree(left, ignore_errors=True)
    write_folder(folder, iters, fill)
    if keep:
        # Only what is older: a newer one that was passed over will be written again.
        older = [path for path in checkpoints(job) if _iters(path) < iters]
        for path in older[: max(0, len(older) - keep + 1)]:
            shutil.rmtree(path, ignore_errors=True)
    return folder


def settle(aside: Path, path: Path) -> None:
    """Give a finished file its name, durably."""
    _sync(aside)
    aside.replace(path)
    _sync(path.parent)


def _iters(folder: Path) -> int:
    match = _CHECKPOINT.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _hashed(home: Path, path: Path) -> dict[str, Any]:
    _sync(path)
    return {"name": str(path.relative_to(home)), "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
