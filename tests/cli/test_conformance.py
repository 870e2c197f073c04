"""``llama-stack conformance`` against a running server: the score, and the forms of the report."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from llama_stack.apis import Inference
from llama_stack.testing.conformance import Check, Outcome, Report, Verdict
from tests.cli.called import Run, Served


def test_a_server_that_keeps_the_contracts_scores_100_percent(run: Run, server: Served) -> None:
    """With every check that had something to try, and the APIs that it does not serve named."""
    ran = run("conformance", server.url)
    assert ran.code == 0, ran.out
    last = ran.out.splitlines()[-1]
    assert last.startswith(f"{server.url} scores 100.0%: ")
    assert "memory_banks               not served" in ran.out
    passed, tried = last.partition(": ")[2].split(" of ")
    assert int(passed) == int(tried.split()[0]) > 40


def test_a_server_that_breaks_a_rule_is_told_which(run: Run, server: Served) -> None:
    """The rule, what was found, and an exit code for scripts."""
    server.stub.failure = ZeroDivisionError("oops")
    ran = run("conformance", server.url, "--api", "inference")
    assert ran.code == 1
    assert "FAILED inference.a_text_is_continued: A completion ends with a reason" in ran.out
    assert "scores 100" not in ran.out


def test_programs_read_the_report(run: Run, server: Served) -> None:
    """As JSON, and as the XML of build servers, with the same checks in both."""
    found = json.loads(run("conformance", server.url, "--api", "inference", "--format", "json").out)
    assert found["score"] == 1.0
    assert found["passed"] + found["skipped"] == len(found["checks"])
    assert {"api", "name", "rule", "verdict", "seconds", "reason"} == set(found["checks"][0])
    suite = ElementTree.fromstring(run("conformance", server.url, "--api", "inference", "--format", "junit").out)
    assert (suite.get("failures"), suite.get("tests")) == ("0", str(len(found["checks"])))
    assert [case.get("name") for case in suite] == [check["name"] for check in found["checks"]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("http://127.0.0.1:1",), 1, "nothing answers at http://127.0.0.1:1"),
        (("not an address",), 2, "URL"),
        (("http://127.0.0.1:1", "--api", "inferense"), 1, "no API is called 'inferense'"),
    ],
)
def test_what_cannot_be_tried_is_refused(arguments: tuple[str, ...], code: int, said: str, run: Run) -> None:
    """A report of nothing would look like one of a server without faults."""
    ran = run("conformance", *arguments)
    assert ran.code == code
    assert said in ran.err


def test_a_report_of_nothing_scores_nothing() -> None:
    """And control characters that a server sends do not break the XML."""

    async def run(subject: object) -> None:
        raise NotImplementedError

    assert Report("http://x", []).score == 0.0
    check = Check(Inference, "inference.odd", "A rule.", run)
    report = Report("http://x", [Outcome(check, Verdict.FAILED, 0.1, "a\x00b\x1b[31m")])
    assert ElementTree.fromstring(report.junit())[0][0].get("message") == "a b [31m"
