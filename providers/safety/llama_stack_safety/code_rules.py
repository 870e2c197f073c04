"""Rules for code in languages that no analyser runs on here: one pattern a danger.

Each names the weakness by its number in the Common Weakness Enumeration (cwe.mitre.org). A pattern sees text and no
program: it finds the plain forms of a danger and misses the disguised ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .secrets import line_of


@dataclass(frozen=True)
class Rule:
    """A form of code that is dangerous in the languages that it names."""

    name: str
    languages: frozenset[str]
    pattern: re.Pattern[str]
    severity: str = "high"


ALIASES: Mapping[str, str] = {
    "py": "python",
    "python3": "python",
    "sh": "shell",
    "bash": "shell",
    "zsh": "shell",
    "console": "shell",
    "js": "javascript",
    "jsx": "javascript",
    "ts": "javascript",
    "tsx": "javascript",
    "typescript": "javascript",
    "node": "javascript",
    "c++": "c",
    "cpp": "c",
    "cc": "c",
    "h": "c",
    "kt": "java",
    "kotlin": "java",
    "golang": "go",
    "rb": "ruby",
    "cs": "csharp",
    "c#": "csharp",
}
"""Other words for a language, after the fence of a code block."""


def _rule(name: str, languages: str, pattern: str, severity: str = "high") -> Rule:
    return Rule(name, frozenset(languages.split()), re.compile(pattern, re.MULTILINE | re.IGNORECASE), severity)


RULES: tuple[Rule, ...] = (
    _rule(
        "deletes everything (CWE-73)",
        "shell",
        r"\brm\s+(?:-\w+\s+){1,4}(?:--no-preserve-root\s+)?(?:/|~|\$HOME"
        r"|/\*|\.\.?)(?:\s|\*|/?$|;)",
    ),
    _rule(
        "runs what it downloads (CWE-494)",
        "shell",
        r"\b(?:curl|wget)\b[^|\n;]{0,300}\|\s*(?:sudo\s+)?(?:ba|z|da)?sh\b"
        r"|\b(?:ba)?sh\s+(?:-c\s+)?[\"']?(?:<\(|\$\()\s*(?:curl|wget)\b",
    ),
    _rule(
        "fork bomb (CWE-400)",
        "shell",
        r"[\w:]{1,40} {0,3}\(\)\s{0,3}\{\s{0,3}[\w:]{1,40}\s{0,3}\|\s{0,3}[\w:]{1,40}\s{0,3}&\s{0,3};?"
        r"\s{0,3}\}",
    ),
    _rule(
        "overwrites a disk (CWE-73)",
        "shell",
        r"\bmkfs(?:\.\w+)?\s+[^\n]{0,80}/dev/|\bdd\s+[^\n]{0,120}of=/dev/"
        r"(?:sd|hd|nvme|vd|xvd|mmcblk)|>\s*/dev/(?:sd|nvme|vd)[a-z0-9]",
    ),
    _rule(
        "reverse shell (CWE-78)",
        "shell python ruby php",
        r"/dev/(?:tcp|udp)/[\w.${}]+/\d|\b(?:nc|ncat|netcat)\b[^\n]{0,80}\s-\w*[ec]\s*\S*"
        r"(?:sh|cmd)\b|\bsocat\b[^\n]{0,120}exec:",
    ),
    _rule("open to everyone (CWE-732)", "shell", r"\bchmod\s+(?:-\w+\s+){0,3}(?:0?777|a\+rwx)\b", "medium"),
    _rule(
        "no check of certificates (CWE-295)",
        "shell javascript go ruby php java csharp",
        r"\bcurl\b[^\n]{0,200}\s(?:-k|--insecure)\b|--no-check-certificate"
        r"|rejectUnauthorized\s*:\s*false|NODE_TLS_REJECT_UNAUTHORIZED"
        r"|InsecureSkipVerify\s*:\s*true|VERIFY_NONE|CURLOPT_SSL_VERIFYPEER\s*,\s*"
        r"(?:false|0)",
        "medium",
    ),
    _rule(
        "runs text as code (CWE-95)",
        "javascript php ruby",
        r"(?<![\w.])eval\s*\(|\bnew\s+Function\s*\(|\bset(?:Timeout|Interval)\s*\(\s*[\"'`]"
        r"|\binstance_eval\b|\bassert\s*\(\s*\$_",
    ),
    _rule(
        "runs a command (CWE-78)",
        "javascript",
        r"\bchild_process\b[^\n]{0,80}\.?exec(?:Sync)?\s*\(|\bexec(?:Sync)?\s*\(\s*"
        r"(?:`[^`]*\$\{|[\"'][^\"'\n]*[\"']\s*\+)|require\(\s*[\"']child_process[\"']\s*\)\.exec",
    ),
    _rule(
        "markup from data (CWE-79)",
        "javascript",
        r"\.(?:inner|outer)HTML\s*\+?=(?!=)|\bdocument\.write(?:ln)?\s*\("
        r"|dangerouslySetInnerHTML",
        "medium",
    ),
    _rule(
        "unbounded copy (CWE-120)",
        "c",
        r"(?<![\w.])(?:gets|strcpy|strcat|sprintf|vsprintf)\s*\(|\bscanf\s*\(\s*\"[^\"]*%s",
    ),
    _rule(
        "format from data (CWE-134)",
        "c",
        r"(?<![\w.])(?:printf|syslog)\s*\(\s*[a-z_]\w*\s*\)|\bfprintf\s*\(\s*\w+\s*,\s*[a-z_]\w*\s*\)",
    ),
    _rule(
        "runs a command (CWE-78)",
        "c php ruby",
        r"(?<![\w.>:])(?:system|popen|passthru|shell_exec|proc_open|execl"
        r"|execlp|execvp)\s*\(",
    ),
    _rule("runs a command (CWE-78)", "java", r"Runtime\s*\.\s*getRuntime\s*\(\s*\)\s*\.\s*exec\s*\("),
    _rule(
        "runs a command (CWE-78)",
        "go csharp",
        r"exec\.Command\s*\(\s*\"(?:/bin/)?(?:ba)?sh\"|Process\.Start\s*\(\s*\""
        r"(?:cmd|/bin/(?:ba)?sh|powershell)",
    ),
    _rule(
        "runs a command (CWE-78)",
        "python",
        r"\bos\.(?:system|popen)\s*\(|\bsubprocess\.\w+\([^)\n]{0,300}shell\s*=\s*True",
    ),
    _rule("runs text as code (CWE-95)", "python", r"(?<![\w.])(?:eval|exec)\s*\("),
    _rule(
        "objects from data (CWE-502)",
        "python",
        r"\b(?:c?pickle|marshal|shelve|dill|joblib)\.loads?\s*\(|\byaml\.load\s*\("
        r"(?![^)\n]{0,200}Safe)",
    ),
    _rule(
        "objects from data (CWE-502)",
        "java php ruby csharp javascript",
        r"\bnew\s+ObjectInputStream\b|\bunserialize\s*\(|\bMarshal\.load\b"
        r"|\bYAML\.load\s*\(|\bBinaryFormatter\b",
    ),
    _rule(
        "SQL from text (CWE-89)",
        "java javascript php csharp go ruby python",
        r"[\"'`]\s*(?:select\s[^\"'`\n]{0,200}\sfrom|insert\s+into|update\s+\w+\s+set"
        r"|delete\s+from)\s[^\"'`\n]{0,200}(?:[\"']\s*(?:\+|\.)\s*[$\w]"
        r"|\$\{|\$_(?:GET|POST|REQUEST))",
    ),
    _rule(
        "file named by the request (CWE-98)",
        "php",
        r"\b(?:include|require)(?:_once)?\s*\(?\s*\$_(?:GET|POST|REQUEST"
        r"|COOKIE)",
    ),
    _rule(
        "deletes all rows (CWE-284)",
        "sql",
        r"\bdrop\s+(?:table|database|schema)\b|\btruncate\s+table\b|\bdelete\s+from\s+\w+\s*"
        r"(?:;|$)",
        "medium",
    ),
)


def matches(code: str, language: str) -> Iterator[tuple[Rule, int]]:
    """The rules that a piece of code breaks, each once, with the line; in an unknown language all rules are tried."""
    known = ALIASES.get(language.lower(), language.lower())
    is_known = any(known in rule.languages for rule in RULES)
    for rule in RULES:
        if not is_known or known in rule.languages:
            found = rule.pattern.search(code)
            if found:
                yield rule, line_of(code, found.start())
