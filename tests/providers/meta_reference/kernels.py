"""Whether this machine can compile the kernels; tests of them are skipped where it cannot."""

from __future__ import annotations

import pytest
from llama_stack_meta_reference.native.library import KernelsUnavailableError, library


def _cause() -> str:
    try:
        library()
    except KernelsUnavailableError as error:
        return str(error)
    return ""


NEEDS_KERNELS = pytest.mark.skipif(bool(_cause()), reason=f"no compiled kernels: {_cause()}")
