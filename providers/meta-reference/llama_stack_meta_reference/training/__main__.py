"""python -m llama_stack_meta_reference.training JOB_FOLDER: does the job whose plan is in the folder (plan.py)."""

from __future__ import annotations

import sys
from pathlib import Path

from .job import run_job

if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m llama_stack_meta_reference.training JOB_FOLDER", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_job(Path(sys.argv[1])))
