"""Compiles ``kernels.cpp`` for the machine it runs on, once, and gives it to Python through ctypes.

The library is kept in the user's cache folder (``XDG_CACHE_HOME``, by default ``~/.cache``, under
``llama-stack/kernels``), named by what it was made of: source, compiler, processor and torch. Without a C++ compiler,
or on a processor without the vector instructions, ``library`` says why there is none and whoever asked takes the plain
path. Nothing is downloaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger("llama_stack.meta_reference.native")

SOURCE = Path(__file__).parent / "kernels.cpp"
PANEL = 16
"""Output channels side by side in a packed matrix."""
INPUT_MULTIPLE = 64
"""Inputs are padded to a multiple of this."""
LANES = 16
"""Head widths in the cache are padded to a multiple of this."""
BLOCK = 16
"""Tokens in a block of the cache."""
WIDEST_HEAD = 256
KINDS = {"float32": 0, "float16": 1, "int8": 2, "int4": 3}
"""What weights can be packed as, with the number that the kernels know it by."""
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC")
_PROCESSOR_FLAG = "-march=native"
_COMPILE_SECONDS = 120


class CMatrix(Structure):
    """``Matrix`` of kernels.cpp."""

    _fields_ = (("kind", c_int), ("outputs", c_int), ("inputs", c_int), ("panels", c_void_p))


class CLayer(Structure):
    """``Layer`` of kernels.cpp."""

    _fields_ = (
        *(("attention_norm", c_void_p), ("ffn_norm", c_void_p)),
        *(("qkv", CMatrix), ("output", CMatrix), ("gate_up", CMatrix), ("down", CMatrix)),
    )


class CLowRank(Structure):
    """``LowRank`` of kernels.cpp."""

    _fields_ = (("down", c_void_p), ("up", c_void_p))


class CAdapter(Structure):
    """``Adapter`` of kernels.cpp."""

    _fields_ = (("rank", c_int), ("pairs", POINTER(CLowRank)))


class CNetwork(Structure):
    """``Network`` of kernels.cpp."""

    _fields_ = (
        *((name, c_int) for name in ("layers", "dim", "query_heads", "key_heads", "head_width", "ffn_dim", "kind")),
        ("epsilon", c_float),
        ("layer", POINTER(CLayer)),
        ("norm", c_void_p),
        ("head", CMatrix),
        *((name, c_void_p) for name in ("cosine", "sine", "keys", "values")),
        ("layer_bytes", c_int64),
        *((name, c_int) for name in ("blocks", "has_half_cache")),
        *((name, c_void_p) for name in ("x", "wide", "attended", "floats", "scales", "low")),
        ("low_rank", c_int),
        *((name, c_void_p) for name in ("bytes", "starts")),
        ("threads", c_int),
    )


class CWork(Structure):
    """``Work`` of kernels.cpp."""

    _fields_ = (
        *((name, c_int) for name in ("rows", "sequences", "sampled", "table_width")),
        ("embedded", c_void_p),
        *((name, c_void_p) for name in ("start", "count", "tables", "sampled_rows", "position", "slot")),
        ("adapters", POINTER(CAdapter)),
        ("adapter", c_void_p),
        ("logits", c_void_p),
    )


class KernelsUnavailableError(Exception):
    """There are no compiled kernels on this machine; the text says why."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return the kernels, compiled if they have not been before (about four seconds).

    Raises ``KernelsUnavailableError`` where that cannot be done. Called off the event loop.
    """
    try:
        compiler = _compiler()
        version = _run([*compiler, "--version"], timeout=30)
        sources = [path.read_text() for path in (SOURCE, SOURCE.with_name("lanes.h"))]
        made_of = (*sources, *compiler, *_FLAGS, _PROCESSOR_FLAG, version, _processor(), torch.__version__)
        name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:32]
        path = _cache_folder() / f"{name}.so"
        if path.exists():
            _refuse_strangers(path)
            try:
                return _declared(ctypes.CDLL(str(path)))
            except OSError:
                logger.warning("%s cannot be loaded, so it is compiled again; a crash may have cut it short", path)
        _compile(compiler, path)
        return _declared(ctypes.CDLL(str(path)))
    except subprocess.CalledProcessError as error:
        raise KernelsUnavailableError(f"{error.cmd[0]} failed: {_reason(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"the kernels cannot be compiled or loaded: {error}") from error


def _compiler() -> list[str]:
    """The command of ``CXX``, which may have arguments (``ccache g++``), or g++."""
    try:
        command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError as error:
        raise KernelsUnavailableError(f"CXX is no command: {error}") from error
    program = shutil.which(command[0])
    if program is None:
        raise KernelsUnavailableError(f"no C++ compiler is installed ({command[0]})")
    return [program, *command[1:]]


def _cache_folder() -> Path:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise KernelsUnavailableError("there is no home folder to keep them in; set HOME or XDG_CACHE_HOME") from error
    return cache / "llama-stack" / "kernels"


def _refuse_strangers(path: Path) -> None:
    """Refuse a library that another user put there or may change: whoever wrote it would run as us."""
    for place in (path, path.parent):
        status = place.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
            raise KernelsUnavailableError(f"{place} can be written by other users; remove it, or set XDG_CACHE_HOME")


def _compile(compiler: list[str], path: Path) -> None:
    """Compile aside and move into place: of two processes that start together, either's file is whole."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # torch brings an OpenMP of its own; a second one beside it would fight it for the cores.
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects, made = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _run([*compiler, *_FLAGS, _PROCESSOR_FLAG, "-c", str(SOURCE), "-o", str(objects)], timeout=_COMPILE_SECONDS)
        openmp = [str(own[0])] if own else ["-fopenmp"]
        # All symbols are looked up when the library is loaded: what is missing is an error then, not an abort later.
        openmp.append("-Wl,-z,now")
        _run([*compiler, "-shared", str(objects), "-o", str(made), *openmp], timeout=_COMPILE_SECONDS)
        made.chmod(0o755)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # a library cut short by a crash would take the next process down with SIGBUS
        made.replace(path)


def _run(command: list[str], *, timeout: float) -> str:
    """What a command prints, in English: ``_reason`` reads what a compiler says."""
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True, env=environment)
    return done.stdout


def _reason(messages: str) -> str:
    """The first error among a compiler's messages, which may begin with the way to the file that has it."""
    lines = messages.strip().splitlines()
    errors = (line for line in lines if "error: " in line and not line.startswith("collect2"))
    return next(errors, lines[0] if lines else "no message")


def _processor() -> str:
    """What decides which instructions ``-march=native`` stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    kernels.packed_bytes.argtypes = (c_int, c_int, c_int)
    kernels.packed_bytes.restype = c_int64
    kernels.pack.argtypes = (c_int, c_void_p, c_int, c_int, c_void_p)
    kernels.pack.restype = None
    kernels.product_of.argtypes = (
        *(c_int, c_void_p, c_int, c_int, c_void_p, c_int, c_void_p),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    )
    kernels.product_of.restype = None
    kernels.step.argtypes = (POINTER(CNetwork), POINTER(CWork))
    kernels.step.restype = None
    return kernels
