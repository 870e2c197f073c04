"""python -m llama_stack_meta_reference.training JOB_FOLDER: does the job whose plan is in the folder (plan.py)."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from .job import run_job

if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m llama_stack_meta_reference.training JOB_FOLDER", file=sys.stderr)
        sys.exit(2)
    code = run_job(Path(sys.argv[1]))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Everything is written and closed. What torch still takes down at the exit of a rank aborts it now and then,
        # with a thread that nobody has joined, and torchrun would call the whole training failed.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
