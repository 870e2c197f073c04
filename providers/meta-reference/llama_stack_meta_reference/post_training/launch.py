"""Runs the trainer so that it never outlives the server, however that ends.

    python -m llama_stack_meta_reference.post_training.launch MODULE JOB_FOLDER PROCESSES

Standard input is a pipe whose other end the server alone holds: when it closes, this process ends. On Linux the kernel
sees to it besides, also when the interpreter is deep in a library. With more than one process torchrun starts this
module again in each of them.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NICENESS = 10
"""Requests that the same machine answers go before training."""


def main() -> None:
    """Run the module as ``python -m`` would, in this process or in several."""
    module, folder, processes = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    if processes == "1":
        with suppress(OSError):
            os.nice(_NICENESS)
        sys.argv = [module, folder]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    torchrun = ["--standalone", "--nproc-per-node", processes, "--module", __spec__.name]
    sys.argv = ["torchrun", *torchrun, module, folder, "1"]
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


def _end_with_the_server() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
