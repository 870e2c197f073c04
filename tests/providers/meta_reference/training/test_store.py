"""Checkpoints on disk: whole or known not to be, whatever happened to them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_stack_meta_reference.training.store import (
    checkpoints,
    newest_valid,
    save_checkpoint,
    verify,
    write_folder,
)

from llama_stack.errors import CheckpointError


def fill(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(random.Random(1).randbytes(5000))
    (folder / "trainer").mkdir()
    (folder / "trainer" / "state.json").write_text('{"iters": 3}')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "iters-00000003", 3, fill)
    return tmp_path / "iters-00000003"


def test_what_was_written_is_valid_and_nothing_else_is_left(folder: Path) -> None:
    assert verify(folder) == 3
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_every_flipped_bit_and_every_cut_is_found(folder: Path) -> None:
    """200 flips and 100 cuts, in weights, state and manifest alike; a flip in the manifest's own spaces changes nothing
    that it says, and is no fault."""
    draw = random.Random(2)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for number in range(300):
        path = draw.choice(files)
        kept = path.read_bytes()
        damaged = bytearray(kept)
        if number % 3:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            says_the_same = path.name == "manifest.json" and json.loads(damaged) == json.loads(kept)
        except ValueError:
            says_the_same = False
        if not says_the_same:
            with pytest.raises(CheckpointError):
                verify(folder)
        path.write_bytes(kept)
    assert verify(folder) == 3


def change_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _as_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "more").write_text("x"),
        lambda folder: (folder / "link").symlink_to("/etc/passwd"),
        _as_pipe,
        lambda folder: (
            (folder / "model.safetensors").rename(folder.parent / "kept"),
            (folder / "model.safetensors").symlink_to(folder.parent / "kept"),
        ),
        lambda folder: change_manifest(folder, version=2),
        lambda folder: change_manifest(folder, iters="3"),
        lambda folder: change_manifest(folder, files=None),
        lambda folder: change_manifest(folder, files=[]),
        lambda folder: change_manifest(folder, files=[1, 2]),
        lambda folder: change_manifest(folder, files=[{"name": ["a"]}]),
        lambda folder: change_manifest(folder, files=[{"name": "../../etc/passwd", "bytes": 1, "sha256": ""}]),
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    ],
)
def test_a_folder_that_is_not_as_its_manifest_says_is_refused(folder: Path, change: Callable[[Path], object]) -> None:
    """Missing, foreign and special files, links, and manifests that are none."""
    change(folder)
    with pytest.raises(CheckpointError):
        verify(folder)


def test_the_newest_valid_one_is_found_and_the_others_told_of(tmp_path: Path) -> None:
    for iters in (1, 2, 3):
        save_checkpoint(tmp_path, iters, fill, keep=0)
    (tmp_path / "checkpoints" / "iters-00000003" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "iters-00000004.part").mkdir()
    told: list[CheckpointError] = []
    found = newest_valid(tmp_path, told.append)
    assert found is not None
    assert (found.name, len(told)) == ("iters-00000002", 1)


def test_a_copy_under_another_number_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, fill, keep=0)
    (tmp_path / "checkpoints" / "iters-00000001").rename(tmp_path / "checkpoints" / "iters-00000009")
    assert newest_valid(tmp_path, lambda _: None) is None


def test_what_a_save_left_that_was_cut_off_is_removed_by_the_next(tmp_path: Path) -> None:
    """Each stop in the middle of one would otherwise leave a whole checkpoint's bytes for ever."""
    save_checkpoint(tmp_path, 1, fill, keep=0)
    left = tmp_path / "checkpoints" / "iters-00000007.part"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    save_checkpoint(tmp_path, 2, fill, keep=0)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iters-00000001", "iters-00000002"]


def test_only_as_many_as_asked_stay(tmp_path: Path) -> None:
    for iters in range(1, 6):
        save_checkpoint(tmp_path, iters, fill, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["iters-00000004", "iters-00000005"]
