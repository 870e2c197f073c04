"""``python -m llama_stack_meta_reference.tiny``: train the tiny model again, or measure the one that is there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_stack_meta_reference import tiny
from llama_stack_meta_reference.tiny.release import COMMAND, MEASURED_CASES, build, passes, report
from llama_stack_meta_reference.tiny.train import Plan

CHECKPOINT = Path(tiny.__file__).parents[1] / "checkpoints" / "tiny"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when every bar is met, 1 when one is missed, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train the tiny model from nothing, and measure it.")
    parser.add_argument("--measure", action="store_true", help="only measure the checkpoint that is there")
    parser.add_argument("--cases", type=int, default=MEASURED_CASES, help="held-out cases a skill for --measure")
    parser.add_argument("--failures", type=int, default=0, help="failures a skill to print with --measure")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the checkpoint's folder")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="where an unfinished training is kept")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2), help="processes that train, one core each")
    options = parser.parse_args(arguments)
    if options.measure:
        return 0 if passes(report(options.checkpoint, options.cases, failures=options.failures)) else 1
    return 0 if build(Plan(), options.checkpoint, options.work, options.workers) else 1


if __name__ == "__main__":
    sys.exit(main())
