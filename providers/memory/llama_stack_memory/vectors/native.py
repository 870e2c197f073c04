"""Compiles ``scan.c`` for the machine it runs on, once, and gives it to Python through ctypes.

The library is kept in the user's cache folder (``XDG_CACHE_HOME``, by default ``~/.cache``, under
``llama-stack/kernels``), named by what it was made of. Without a C compiler there is none, and searches take numpy.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int64
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("scan.c")
_FLAGS = ("-std=c11", "-O3", "-march=native", "-shared", "-fPIC")
_COMPILE_SECONDS = 60


@lru_cache(maxsize=1)
def scan() -> Any:
    """The function ``scan`` of scan.c, or ``None`` where it cannot be had, and then the log says why.

    Called off the event loop.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        logger.warning("no C compiler is installed (cc): exact search runs in numpy, several times slower")
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
        made_of = "\0".join([_SOURCE.read_text(), *_FLAGS, version, _processor()])
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = cache / "llama-stack" / "kernels" / f"scan-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
        if not path.exists():
            _compile(compiler, path)
        function = ctypes.CDLL(str(path)).scan
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "scan.c cannot be compiled or loaded: exact search runs in numpy, several times slower: %s", error
        )
        return None
    array = np.ctypeslib.ndpointer
    function.argtypes = (
        *(array(kind, flags="C_CONTIGUOUS") for kind in (np.int8, np.int16, np.float32)),
        *(c_int64, c_int64, c_float),
        array(np.float32, flags="C_CONTIGUOUS"),
    )
    function.restype = None
    return function


def _compile(compiler: str, path: Path) -> None:
    """Compile aside and move into place: of two processes that start together, either's file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "scan.so"
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
        subprocess.run(command, capture_output=True, timeout=_COMPILE_SECONDS, check=True)
        made.replace(path)


def _processor() -> str:
    """What decides which instructions ``-march=native`` stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
