"""What a run of checks found: for people, for programs (JSON) and for build servers (JUnit's XML)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from .checks import Outcome, Verdict


@dataclass(frozen=True)
class Report:
    """The outcomes of one run against one server."""

    url: str
    outcomes: Sequence[Outcome]
    unserved: Sequence[str] = ()
    """The APIs that the server says it does not serve."""

    def count(self, verdict: Verdict) -> int:
        """How many checks ended so."""
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    @property
    def score(self) -> float:
        """The share of the checks that passed among those that had something to try, from 0 to 1."""
        tried = self.count(Verdict.PASSED) + self.count(Verdict.FAILED)
        return self.count(Verdict.PASSED) / tried if tried else 0.0

    def text(self) -> str:
        """A line an API, each failure with its rule, and the score."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for name in dict.fromkeys(outcome.check.api.name for outcome in self.outcomes):
            own = [outcome for outcome in self.outcomes if outcome.check.api.name == name]
            counts = [f"{sum(o.verdict is verdict for o in own)} {verdict.value}" for verdict in Verdict]
            yield f"{name:26} {', '.join(counts)}"
            for outcome in own:
                if outcome.verdict is Verdict.FAILED:
                    yield f"  FAILED {outcome.check.name}: {outcome.check.rule}"
                    yield f"         {outcome.reason}"
            skipped = dict.fromkeys(outcome.reason for outcome in own if outcome.verdict is Verdict.SKIPPED)
            yield from (f"  skipped: {reason}" for reason in skipped)
        yield from (f"{name:26} not served" for name in self.unserved)
        yield f"{self.url} scores {self.score:.1%}: {self.count(Verdict.PASSED)} of {self._tried} checks passed"

    @property
    def _tried(self) -> int:
        return len(self.outcomes) - self.count(Verdict.SKIPPED)

    def json(self) -> str:
        """One object with the score and every outcome."""
        return json.dumps(
            {
                "url": self.url,
                "score": round(self.score, 6),
                "unserved": list(self.unserved),
                **{verdict.value: self.count(verdict) for verdict in Verdict},
                "checks": [
                    {
                        "api": outcome.check.api.name,
                        "name": outcome.check.name,
                        "rule": outcome.check.rule,
                        "verdict": outcome.verdict.value,
                        "seconds": round(outcome.seconds, 3),
                        "reason": outcome.reason,
                    }
                    for outcome in self.outcomes
                ],
            },
            indent=2,
        )

    def junit(self) -> str:
        """The XML that build servers read (the form that pytest writes)."""
        suite = ElementTree.Element(
            "testsuite",
            name="llama-stack conformance",
            tests=str(len(self.outcomes)),
            failures=str(self.count(Verdict.FAILED)),
            skipped=str(self.count(Verdict.SKIPPED)),
            errors="0",
        )
        for outcome in self.outcomes:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=outcome.check.api.name,
                name=outcome.check.name,
                time=f"{outcome.seconds:.3f}",
            )
            if outcome.verdict is not Verdict.PASSED:
                kind = "failure" if outcome.verdict is Verdict.FAILED else "skipped"
                ElementTree.SubElement(case, kind, message=_printable(outcome.reason)).text = outcome.check.rule
        ElementTree.indent(suite)
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _printable(text: str) -> str:
    """XML 1.0 has no control characters."""
    return "".join(character if character.isprintable() else " " for character in text)
