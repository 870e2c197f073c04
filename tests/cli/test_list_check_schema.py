"""Commands that look and start nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_stack.apis import APIS, operations
from tests.broken_plugins import SAFETY_PLUGIN, install
from tests.cli.called import Ran, Run, Served, ran_process


def rows(ran: Ran) -> list[dict[str, object]]:
    assert (ran.code, ran.err) == (0, "")
    found: list[dict[str, object]] = json.loads(ran.out)
    return found


def test_apis_are_listed_with_their_providers(run: Run) -> None:
    """What a distribution may put under ``providers:``."""
    found = {str(row["api"]): row for row in rows(run("list", "apis", "--json"))}
    for api in APIS:
        assert found[api.name]["operations"] == len(operations(api))
    assert "remote" in str(found["inference"]["providers"]).split(", ")


def test_providers_are_listed_with_their_package(run: Run) -> None:
    """Which package to upgrade, or to report to."""
    found = [(row["api"], row["provider"]) for row in rows(run("list", "providers", "--json"))]
    assert ("inference", "remote") in found
    assert found == sorted(found)


def test_tools_are_listed_with_what_they_may_ask_to_touch(run: Run) -> None:
    """An operator decides by it what to permit; one that asks for nothing says that too."""
    found = {str(row["tool"]): row["permissions"] for row in rows(run("list", "tools", "--json"))}
    assert found["web_search"] == "network, files"
    assert found["math"] is None


def test_a_table_has_the_same_rows_as_its_json(run: Run) -> None:
    """People read the one and programs the other."""
    for what in ("apis", "providers", "tools", "plugins", "distributions"):
        table = run("list", what)
        found = rows(run("list", what, "--json"))
        lines = table.out.splitlines()
        assert len(lines) == len(found) + 1
        assert lines[0] == lines[0].upper()
        for line, row in zip(lines[1:], found, strict=True):
            assert line.startswith(str(next(iter(row.values()))))


def test_a_broken_plugin_is_listed_with_cause_and_remedy(tmp_path: Path) -> None:
    """And does not hide the others."""
    install(tmp_path, "acme-words", {"acme_words": "import no_such_module_at_all"}, {"acme": "acme_words"})
    ran = ran_process("list", "plugins", "--json", site=tmp_path)
    found = {str(row["package"]): str(row["state"]) for row in rows(ran)}
    assert found["acme-words"].startswith("it needs the module 'no_such_module_at_all', which is not installed; ")
    assert found["llama-stack-remote"] == "loaded"
    ran = ran_process("list", "providers", site=tmp_path)
    assert ran.code == 0
    assert ran.err.startswith("warning: ")
    assert "acme-words" in ran.err
    assert ran.err.count("\n") == 1


def test_what_two_packages_declare_is_listed_with_a_warning_that_names_both(tmp_path: Path) -> None:
    """It cannot be used: better read here than in the refusal of a distribution that names it."""
    for package, module in (("acme-words", "acme_words"), ("other-words", "other_words")):
        install(tmp_path, package, {module: SAFETY_PLUGIN.replace("{name}", "words")}, {"words": module})
    for what in ("providers", "plugins"):
        ran = ran_process("list", what, site=tmp_path)
        assert ran.code == 0
        assert ran.err.startswith("warning: provider 'words' of 'safety' is declared by ")
        assert "acme-words 1.0" in ran.err
        assert "other-words 1.0" in ran.err
        assert ran.err.count("\n") == 1


def test_faults_are_printed_as_json_for_programs(run: Run, tmp_path: Path) -> None:
    """An editor shows them where they stand; the exit code says the same as without."""
    file = tmp_path / "stack.yaml"
    file.write_text("version: 1\nname: small\nserver: {host: 0.0.0.0}\n")
    ran = run("check", "--json", str(file))
    [fault] = json.loads(ran.out)
    assert ran.code == 1
    assert (fault["file"], fault["line"], fault["column"], fault["key_path"]) == (str(file), 3, 16, "server.host")
    assert "allowed_hosts" in fault["remedy"]
    file.write_text("version: 1\nname: small\n")
    assert (run("check", "--json", str(file)).code, run("check", "--json", str(file)).out) == (0, "[]\n")


def test_distributions_are_listed_with_their_file(run: Run) -> None:
    """The file is what to copy from."""
    found = {str(row["distribution"]): Path(str(row["file"])) for row in rows(run("list", "distributions", "--json"))}
    assert found["tiny"].read_text().startswith("#")


def test_models_are_those_of_the_server(run: Run, server: Served) -> None:
    """The one list that asks a server."""
    expected = {"model": "stub", "kind": "llm", "device": None, "context_tokens": None, "alias_of": None}
    assert rows(run("list", "models", "--url", server.url, "--json")) == [expected | {"provider": "stub"}]
    table = run("list", "models", "--url", server.url).out.splitlines()
    assert table[1].split() == ["stub", "llm", "-", "-", "-", "stub"]


def test_the_servers_address_may_come_from_the_environment(
    run: Run, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set once in a shell, it need not be typed again."""
    monkeypatch.setenv("LLAMA_STACK_URL", server.url)
    assert len(rows(run("list", "models", "--json"))) == 1


def test_check_ends_with_0_where_there_is_no_fault(run: Run, tmp_path: Path) -> None:
    """A name is checked as a file is; variables come from the environment."""
    file = tmp_path / "good.yaml"
    file.write_text(
        "version: 1\nname: good\nproviders:\n  inference:\n    - { provider: remote, config: { url: 'http://h:1' } }\n"
    )
    assert run("check", str(file)) == Ran(0, f"{file}: no faults\n", "")


def test_check_prints_every_fault_with_its_place_and_ends_with_1(run: Run, tmp_path: Path) -> None:
    """Editors jump to FILE:LINE:COL; all faults come in one run."""
    file = tmp_path / "bad.yaml"
    file.write_text(
        "version: 1\nname: bad\nproviders:\n  inference:\n    - { provider: remoet, config: { url: 'x' } }\nserver:\n"
        "  prot: 1\n"
    )
    ran = run("check", str(file))
    assert (ran.code, ran.err) == (1, "")
    lines = ran.out.splitlines()
    assert [line.removeprefix(f"{file}:").split(":")[0] for line in lines] == ["5", "7"]
    assert "remote" in lines[0]
    assert lines[1].startswith(f"{file}:7:3: server.prot: ")


def test_check_of_a_file_that_is_not_there_is_a_fault(run: Run, tmp_path: Path) -> None:
    """One line, as any other fault."""
    ran = run("check", str(tmp_path / "none.yaml"))
    assert (ran.code, ran.out.count("\n"), ran.err) == (1, 1, "")


def test_the_schema_holds_the_settings_of_installed_providers(run: Run) -> None:
    """An editor completes what is installed here."""
    ran = run("schema")
    assert (ran.code, ran.err) == (0, "")
    schema = json.loads(ran.out)
    assert schema["title"] == "Distribution"
    assert "read_timeout_seconds" in json.dumps(schema)
