"""Whether a provider, or a whole server, keeps the contracts: one set of checks for both.

An author enables the pytest plugin ``llama_stack.testing.plugin`` and writes, in a file of tests::

    test_conformance = conformance("inference", "echo")

``llama-stack conformance URL`` runs the same checks against any server, ours or not.
"""

from .checks import Check, Outcome, Skipped, Verdict, checks_for, run_check
from .in_process import Target, conformance
from .report import Report
from .subject import Subject

__all__ = [
    "Check",
    "Outcome",
    "Report",
    "Skipped",
    "Subject",
    "Target",
    "Verdict",
    "checks_for",
    "conformance",
    "run_check",
]
