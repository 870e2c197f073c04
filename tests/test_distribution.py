"""Distributions: what is read, what is refused, and that every fault of a file is reported where it stands."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import field_validator
from pydantic_core import PydanticCustomError

from llama_stack.apis import Config
from llama_stack.distribution import (
    Distribution,
    Fault,
    PluginFilter,
    check_distribution,
    find_distribution,
    json_schema,
    load_distribution,
    shipped_distributions,
)
from llama_stack.distribution import nodes as yaml_nodes
from llama_stack.distribution.faults import MAX_FAULTS
from llama_stack.distribution.source import read_source
from llama_stack.distribution.validation import validate
from llama_stack.errors import DistributionError
from llama_stack.plugins import Plugin, discover
from llama_stack.registry import Registry
from tests import sample_plugin
from tests.broken_plugins import SAFETY_PLUGIN, install

BROKEN = Path(__file__).parent / "broken_distributions"
PACKAGES = {"this process", "first-twin", "second-twin", "crasher", "banned"}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Plugin]]:
    """The sample plugin, two packages that declare the same, one that fails at import, and one to be denied."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "first-twin", {"first_twin": SAFETY_PLUGIN.format(name="twin")}, {"twin": "first_twin"})
    install(folder, "second-twin", {"second_twin": SAFETY_PLUGIN.format(name="twin")}, {"twin": "second_twin"})
    install(folder, "crasher", {"crasher": "raise RuntimeError('boom')"}, {"crashes": "crasher"})
    install(folder, "banned", {"banned": "raise SystemExit(3)"}, {"banned": "banned"})
    sys.path.insert(0, str(folder))
    yield [plugin for plugin in discover([sample_plugin]) if plugin.package in PACKAGES]
    sys.path.remove(str(folder))


@pytest.fixture
def registry(plugins: list[Plugin]) -> Registry:
    return Registry(plugins)


def write(tmp_path: Path, text: str | bytes, name: str = "stack.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("path", sorted(BROKEN.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_fault_of_a_broken_distribution_is_reported_with_place_cause_and_remedy(
    path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator rights a file in one round only if no fault hides another and each says where and what to do."""
    text = path.read_text()
    monkeypatch.chdir(BROKEN)
    environ = dict(pair.split("=", 1) for pair in "".join(re.findall(r"^# environ: (.*)", text)).split())
    expected = [line.split(" | ") for line in re.findall(r"^# fault: (.*)$", text, re.MULTILINE)]
    found = check_distribution(path.name, environ=environ, registry=registry)
    assert expected
    for fault, (place, keys, what, remedy) in zip(found, expected, strict=True):
        assert f"{fault.file}:{fault.line}:{fault.column}" == (place if ":" in place[5:] else f"{path.name}:{place}")
        assert fault.key_path == keys
        assert what in fault.what
        assert remedy in fault.remedy
        assert "\n" not in str(fault)


def test_the_set_of_broken_distributions_is_as_large_as_we_say() -> None:
    """Sixty are promised; a file that is removed must not go unnoticed."""
    assert len(list(BROKEN.glob("*.yaml"))) >= 60


HOSTILE_FILES: dict[str, tuple[bytes, str, str, str]] = {
    "empty": (b"", "1:1", "the file is empty", "version: 1"),
    "not UTF-8": (b"version: 1\nname: caf\xe9\n", "2:10", "not UTF-8", "UTF-8"),
    "UTF-16": ("version: 1\n".encode("utf-16"), "1:1", "not UTF-8", "UTF-8"),
    "NUL": (b"version: 1\nname: a\x00b\n", "2:8", "U+0000", "remove it"),
    "escape": (b"version: 1\nname: a\x1b[31m\n", "2:8", "U+001B", "remove it"),
    "override": ("version: 1\nname: a\u202eb\n".encode(), "2:8", "U+202E", "remove it"),
    "two megabytes": (b"#" * 2_000_000, "1:1", "larger than 1000000 bytes", "keep data out"),
    "deep": (b"version: 1\nname: a\nserver: " + b"[" * 500_000, "3:40", "deeper than 32", "flatten"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(500)), "33:33", "deeper than 32", "flatten"),
    "many values": (b"a: [" + b"1," * 400_000 + b"]", "1:39999", "more than 20000", "split"),
    "carriage returns": (b"version: 1\r\nname: A\r\n", "2:7", "not a name", "lowercase"),
}


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_a_hostile_file_is_refused_before_it_is_built(case: str, tmp_path: Path, registry: Registry) -> None:
    """Size, depth and bytes are judged while reading: a file may be anything that somebody could write."""
    data, place, what, remedy = HOSTILE_FILES[case]
    [fault, *others] = check_distribution(write(tmp_path, data), environ={}, registry=registry)
    assert f"{fault.line}:{fault.column}" == place
    assert what in fault.what
    assert remedy in fault.remedy
    assert all(other.line >= fault.line for other in others)


def test_what_is_not_a_file_is_refused_with_its_path(tmp_path: Path, registry: Registry) -> None:
    """A wrong path is the first mistake of all; a pipe would hang the reader."""
    (tmp_path / "tiny.yaml").write_text("version: 1\n")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, what, remedy in (
        (tmp_path / "tinny.yaml", "no such file", f"did you mean '{tmp_path / 'tiny.yaml'}'?"),
        (tmp_path / "nowhere" / "x.yaml", "no such file", "shipped distributions: "),
        (Path("no-such-stack"), "no such file", "shipped distributions: "),
        (tmp_path, "is a folder", "name a YAML file"),
        (tmp_path / "pipe.yaml", "is not a regular file", "name a YAML file"),
        (tmp_path / ("a" * 300 + ".yaml"), "file name too long", "can be read"),
        (tmp_path / "a\0b.yaml", "null byte", "can be read"),
    ):
        [fault] = check_distribution(path, environ={}, registry=registry)
        assert (fault.line, fault.column, fault.key_path) == (1, 1, "")
        assert what in fault.what
        assert remedy in fault.remedy


def test_faults_are_capped_and_the_rest_is_counted(tmp_path: Path, registry: Registry) -> None:
    """Thousands of lines help nobody, and must not look like all there is."""
    text = "version: 1\nname: a\n" + "".join(f"unknown_{i}: 1\n" for i in range(500))
    faults = check_distribution(write(tmp_path, text), environ={}, registry=registry)
    assert len(faults) == MAX_FAULTS + 1
    assert faults[-1].what == "400 more faults follow"


def test_the_error_of_a_load_has_one_line_a_fault(tmp_path: Path, registry: Registry) -> None:
    """The command line prints these lines as they are: FILE:LINE:COL: key.path: what; remedy."""
    path = write(tmp_path, "version: 1\nname: a\nserver:\n  port: true\n  hots: x\n")
    with pytest.raises(DistributionError) as refused:
        load_distribution(path, environ={}, registry=registry)
    assert refused.value.problems == (
        f"{path}:4:9: server.port: expected a whole number, got true; write a whole number",
        f"{path}:5:3: server.hots: unknown key; did you mean 'host'?",
    )


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
def test_both_parsers_read_the_same(loader: type) -> None:
    """Where libyaml is missing the Python parser takes its place, and nothing may change by that."""
    text = "a: 1\nb: [x, 'y', \"z\", 1.5, ~, true]\nc: {d: e}\nc: 2\n1: x\nf: *g\nh: !t 1\ni: no\n"
    root, faults = yaml_nodes.parse(text, "f.yaml", loader)
    assert root is not None
    assert [(f.line, f.column, f.key_path) for f in faults] == [
        (4, 1, "c"),
        (5, 1, ""),
        (6, 4, "f"),
        (7, 4, "h"),
        (8, 4, "i"),
    ]
    b = root.entries["b"]
    assert isinstance(b, yaml_nodes.Sequence)
    assert [item.value for item in b.items if isinstance(item, yaml_nodes.Scalar)] == ["x", "y", "z", 1.5, None, True]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("tiny", "tiny"),
        ("y", "y"),
        ("n", "n"),
        ("~", None),
        ("null", None),
        ("True", True),
        ("false", False),
        ("0", 0),
        ("-12", -12),
        ("+3", 3),
        ("0x1F", 31),
        ("1e-5", 1e-5),
        ("2.5E3", 2500.0),
        (".5", 0.5),
        ("1.2.3", "1.2.3"),
        ("127.0.0.1:8321", "127.0.0.1:8321"),
        ("8321:8321", "8321:8321"),
        ("9223372036854775807", 2**63 - 1),
        ("nothing", "nothing"),
        ("builtin:tiny", "builtin:tiny"),
    ],
)
def test_a_plain_word_means_what_the_core_schema_says(word: str, value: object) -> None:
    """YAML 1.2.2 section 10.3.2; a learning rate of 1e-5 is a number here, as people expect."""
    read = yaml_nodes.read_plain(word)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "word",
    (
        "yes NO On off 0123 -07 08 0o17 0b11 -0x1F 0x1_F 1_000 1_0.5 1:30 12:30:45 2024-07-01 2024-07-01T10:00:00Z "
        f".inf -.Inf .NaN 9223372036854775808 1e999 {'9' * 5000}"
    ).split(),
)
def test_a_plain_word_that_readers_of_yaml_disagree_about_is_refused(word: str, tmp_path: Path) -> None:
    """Norway's code, a port mapping or a zip code must not change its meaning in silence; in quotes it is text."""
    _, [fault] = yaml_nodes.parse(f"a: {word}\n", "f.yaml")
    assert (fault.line, fault.column, fault.key_path) == (1, 4, "a")
    assert "quote" in fault.remedy
    root, faults = yaml_nodes.parse(f'a: "{word}"\n', "f.yaml")
    assert faults == []
    assert root is not None
    quoted = root.entries["a"]
    assert isinstance(quoted, yaml_nodes.Scalar)
    assert quoted.value == word


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail(text: str) -> None:
    """Whatever the file holds is a tree or a fault, never an exception."""
    root, faults = yaml_nodes.parse(text, "f.yaml")
    assert root is not None or faults


@settings(deadline=None)
@given(st.lists(st.sampled_from("ab:-[]{}&*!#|>'\"%@`,? \n\t0"), max_size=60).map("".join))
def test_no_arrangement_of_signs_makes_the_reader_fail(text: str) -> None:
    """The same, for texts that are nearly YAML."""
    root, faults = yaml_nodes.parse(text, "f.yaml")
    assert root is not None or faults


KEYS = st.sampled_from(
    [
        "version",
        "name",
        "extends",
        "providers",
        "inference",
        "safety",
        "memory_banks",
        "faces",
        "face",
        "middleware",
        "plugins",
        "allow",
        "deny",
        "storage",
        "url",
        "server",
        "port",
        "limits",
        "provider",
        "id",
        "optional",
        "config",
        "greeting",
        "times",
        "weights",
        "kind",
        "path",
        "words",
        "api_key",
        "zzz",
    ]
)
WORDS = st.sampled_from(
    [
        "echo",
        "words",
        "careful",
        "banks",
        "plain",
        "talk",
        "audit",
        "folder",
        "${env.A}",
        "${env.B}",
        "${env.A:1}",
        "${",
        "tiny",
        "twin",
        "crashes",
    ]
)
SCALARS = st.one_of(WORDS, st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8))
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=20
)
ECHOES = st.fixed_dictionaries(
    {"greeting": SCALARS},
    optional={key: TREES for key in sample_plugin.EchoConfig.model_fields if key != "greeting"},
)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {"provider": WORDS}, optional={"id": SCALARS, "optional": SCALARS, "config": TREES | ECHOES, "zzz": TREES}
    )
    | TREES,
    max_size=4,
)
NEARLY = st.fixed_dictionaries(
    {"version": st.just(1), "name": st.just("a")},
    optional={
        "providers": st.dictionaries(KEYS, ENTRIES, max_size=4) | TREES,
        "faces": st.lists(st.fixed_dictionaries({"face": WORDS}, optional={"config": TREES}) | TREES, max_size=3),
        "middleware": ENTRIES | TREES,
        "plugins": TREES,
        "storage": TREES,
        "server": st.dictionaries(KEYS, TREES, max_size=4) | TREES,
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=NEARLY | st.dictionaries(KEYS, TREES, min_size=1, max_size=8))
def test_no_tree_of_keys_makes_the_check_fail(tree: dict[str, object], tmp_path: Path, plugins: list[Plugin]) -> None:
    """Whatever stands under whatever key is accepted or reported, never a traceback, and never with the secret."""
    path = write(tmp_path, yaml.safe_dump(tree, sort_keys=False))
    faults = check_distribution(path, environ={"A": "s3cr3t-value"}, registry=Registry(plugins))
    assert faults or set(tree) <= set(Distribution.model_fields)
    assert not [fault for fault in faults if "s3cr3t" in str(fault)]


def test_a_whole_distribution_is_read_with_defaults_filled_in(tmp_path: Path, registry: Registry) -> None:
    """The example of the design, with the names of the sample plugin."""
    path = write(
        tmp_path,
        """
        version: 1
        name: tiny
        providers:
          inference:
            - provider: echo
              id: local
              config:
                greeting: hello
                ratio: 1e-5
                aliases: { llama3_8b: tiny }
                weights: { kind: folder, path: /data }
          safety:
            - provider: words
              optional: true
        faces:
          - face: plain
        middleware:
          - middleware: audit
            config: { words: [a, b] }
        server: { port: 0 }
        """.replace("\n        ", "\n"),
    )
    distribution = load_distribution(path, environ={}, registry=registry)
    assert isinstance(distribution, Distribution)
    [echo], [words] = distribution.providers["inference"], distribution.providers["safety"]
    assert (echo.provider, echo.id, echo.optional) == ("echo", "local", False)
    assert echo.config["ratio"] == 1e-5
    assert (words.id, words.optional, words.config) == (None, True, {})
    assert distribution.middleware[0].config == {"words": ["a", "b"]}
    assert (distribution.server.host, distribution.server.port) == ("127.0.0.1", 0)
    assert distribution.storage.url == "sqlite"


def test_an_empty_list_of_providers_serves_nothing(tmp_path: Path, registry: Registry) -> None:
    """So a file can take an API away from the one that it extends."""
    path = write(tmp_path, "version: 1\nname: a\nproviders:\n  safety: []\n")
    assert load_distribution(path, environ={}, registry=registry).providers == {"safety": ()}


ECHO = "version: 1\nname: a\nproviders:\n  inference:\n    - provider: echo\n      config:\n"


def test_a_variable_is_put_in_as_text_and_converted_by_its_field(tmp_path: Path, registry: Registry) -> None:
    """A key of digits stays text, a port becomes a number; the value decides nothing about its own type."""
    text = (
        ECHO
        + "        greeting: ${env.GREETING}\n        times: ${env.TIMES}\n        ratio: ${env.RATIO:0.25}\n"
        + "        loud: ${env.LOUD}\n        api_key: ${env.API_KEY}\n        words: ['${env.TIMES}']\n"
        + "server:\n  host: ${env.A:local}${env.B:host}\n  port: ${env.PORT:8000}\nstorage:\n  url: sqlite:///$${x}\n"
    )
    environ = {"GREETING": "0123", "TIMES": "3", "LOUD": "true", "API_KEY": "42"}
    distribution = load_distribution(write(tmp_path, text), environ=environ, registry=registry)
    config = sample_plugin.EchoConfig.model_validate(distribution.providers["inference"][0].config)
    assert config.api_key is not None
    assert (config.greeting, config.times, config.ratio, config.loud) == ("0123", 3, 0.25, True)
    assert (config.api_key.get_secret_value(), config.words) == ("42", ("3",))
    assert (distribution.server.host, distribution.server.port) == ("localhost", 8000)
    assert distribution.storage.url == "sqlite:///${x}"


@pytest.mark.parametrize(
    "value", ["yes: 1", "*alias", "!!python/name:os", "${env.HOME}", "$${", "a\nb: c", "null", "{"]
)
def test_the_value_of_a_variable_is_never_read_as_yaml_or_as_another_variable(
    value: str, tmp_path: Path, registry: Registry
) -> None:
    """Whoever sets a variable sets one value, and cannot reach another part of the file."""
    path = write(tmp_path, ECHO + "        greeting: ${env.GREETING}\n")
    distribution = load_distribution(path, environ={"GREETING": value, "HOME": "/root"}, registry=registry)
    assert distribution.providers["inference"][0].config == {"greeting": value}


def test_no_message_shows_what_a_variable_holds(tmp_path: Path, registry: Registry) -> None:
    """Faults are pasted into tickets; a variable is where secrets are."""
    secret = "s3cr3t-9f2"
    text = (
        ECHO
        + "".join(
            f"        {key}: ${{env.SECRET}}\n" for key in ("times", "ratio", "loud", "device", "window", "words")
        )
        + "        aliases: ${env.SECRET}\n        weights: { kind: '${env.SECRET}', path: x }\n"
        + "    - provider: ${env.SECRET}\n      id: x${env.SECRET}!\n    - provider: echo\n"
        + "server:\n  port: a${env.SECRET}\n  allowed_origins: ['${env.SECRET}']\nstorage:\n  url: ${env.SECRET}\n"
        + "faces:\n  - face: ${env.SECRET}\nplugins: { allow: ['${env.SECRET}'] }\n"
    )
    faults = check_distribution(write(tmp_path, text), environ={"SECRET": secret}, registry=registry)
    assert len(faults) >= 13
    assert not [fault for fault in faults if secret in str(fault)]


@pytest.mark.parametrize("is_custom", [False, True])
def test_a_validators_words_are_told_without_what_a_variable_holds(tmp_path: Path, is_custom: bool) -> None:
    """Validators quote what they refuse; of a plain value that is a help, of a variable's it is a leak."""

    class Picky(Config):
        words: tuple[str, ...]

        @field_validator("words")
        @classmethod
        def check(cls, words: tuple[str, ...]) -> tuple[str, ...]:
            said = f"{words[0]!r} is no word; write another"
            raise PydanticCustomError("of_ours", "{said}", {"said": said}) if is_custom else ValueError(said)

    path = write(tmp_path, "version: 1\nname: x\nwords: ['${env.WORD:plain}']\n")
    environs: list[dict[str, str]] = [{}, {"WORD": "s3cr3t"}]
    for environ, told in zip(environs, ("'plain' is no word", "'${env.WORD}' is no word"), strict=True):
        source = read_source(path, environ)
        assert source.root is not None
        faults: list[Fault] = []
        node = yaml_nodes.Mapping(source.root.mark, {"words": source.root.entries["words"]})
        assert validate(Picky, node, (), source.hidden, faults) is None
        assert [(fault.what, fault.remedy) for fault in faults] == [(told, "write another")]


def test_a_value_whose_key_is_a_secret_is_not_printed(tmp_path: Path, registry: Registry) -> None:
    """Keys are written into files all the same, and their faults are pasted all the same."""
    path = write(tmp_path, ECHO + "        greeting: x\n        api_key: 998877\n")
    [fault] = check_distribution(path, environ={}, registry=registry)
    assert fault.key_path == "providers.inference[0].config.api_key"
    assert "998877" not in str(fault)


def test_a_variable_that_is_not_text_is_refused_by_name(tmp_path: Path, registry: Registry) -> None:
    """Bytes of another encoding reach us as lone surrogates, which no log and no JSON can carry."""
    path = write(tmp_path, "version: 1\nname: a\nserver:\n  host: ${env.HOST}\n")
    [fault] = check_distribution(path, environ={"HOST": "caf\udce9"}, registry=registry)
    assert fault.what == "the environment variable HOST holds bytes that are not text"


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path, registry: Registry) -> None:
    """One can add a key to a section, and says all providers of an API that one changes."""
    write(
        tmp_path,
        "version: 1\nname: base\nstorage: { url: 'sqlite::memory:' }\n"
        "server: { port: 1, allowed_hosts: [a], limits: { max_json_depth: 10, max_json_nodes: 500 } }\n"
        "providers:\n  safety:\n    - provider: words\n      id: one\n    - provider: words\n      id: two\n",
        "base.yaml",
    )
    path = write(
        tmp_path,
        "version: 1\nname: top\nextends: ./base.yaml\n"
        "server: { allowed_hosts: [b], limits: { max_json_depth: 20 } }\n"
        "providers:\n  safety:\n    - provider: words\n      id: three\n",
    )
    found = load_distribution(path, environ={}, registry=registry)
    assert (found.name, found.storage.url, found.server.port) == ("top", "sqlite::memory:", 1)
    assert found.server.allowed_hosts == ("b",)
    assert (found.server.limits.max_json_depth, found.server.limits.max_json_nodes) == (20, 500)
    assert [entry.id for entry in found.providers["safety"]] == ["three"]


def test_a_variable_that_an_extending_file_replaces_need_not_be_set(tmp_path: Path, registry: Registry) -> None:
    """Whoever replaces a value has answered for it."""
    write(tmp_path, "version: 1\nserver: { host: '${env.UNSET}' }\n", "base.yaml")
    path = write(tmp_path, "version: 1\nname: top\nextends: base.yaml\nserver: { host: localhost }\n")
    assert load_distribution(path, environ={}, registry=registry).server.host == "localhost"


def test_a_name_is_not_inherited(tmp_path: Path, registry: Registry) -> None:
    """Two distributions of one name would share one folder of state."""
    write(tmp_path, "version: 1\nname: base\n", "base.yaml")
    [fault] = check_distribution(write(tmp_path, "version: 1\nextends: base.yaml\n"), environ={}, registry=registry)
    assert (fault.line, fault.key_path, fault.what) == (1, "name", "the key is missing")


def test_a_shipped_distribution_can_be_extended_by_name(tmp_path: Path) -> None:
    """The usual first file of an operator: a shipped one, with a line or two changed."""
    path = write(
        tmp_path,
        "version: 1\nname: mine\nextends: tiny\nserver: { port: 9000 }\ntools: []\n"
        "providers: { inference: [], memory_banks: [], safety: [], agentic_system: [], datasets: [], post_training: [],"
        " reward_scoring: [], synthetic_data_generation: [] }\n",
    )
    distribution = load_distribution(path, environ={}, registry=Registry([]))
    assert (distribution.name, distribution.server.port) == ("mine", 9000)


def test_shipped_distributions_are_found_by_name_and_paths_are_left_alone() -> None:
    """``run tiny`` means the shipped one; ``run ./tiny.yaml`` means the file beside me."""
    assert find_distribution("tiny") == shipped_distributions()["tiny"]
    assert find_distribution("./tiny.yaml") == Path("tiny.yaml")
    assert find_distribution("none-such") == Path("none-such")


@pytest.mark.parametrize("name", sorted(shipped_distributions()))
def test_every_shipped_distribution_is_whole_but_for_plugins_that_are_not_installed(name: str) -> None:
    """With no plugin at all, only the names of providers may be unknown."""
    faults = check_distribution(name, environ=_Anything(), registry=Registry([]))
    assert [fault for fault in faults if "no installed plugin declares the" not in fault.what] == []


class _Anything(dict[str, str]):
    """An environment in which every variable is set."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return "x"

    def get(self, name: str, default: object = None) -> str:
        return "x"


def test_plugins_that_are_denied_are_not_imported(tmp_path: Path, registry: Registry) -> None:
    """``banned`` would end the process: were it imported, the fault would say so."""
    path = write(
        tmp_path, "version: 1\nname: a\nplugins: { deny: [banned] }\nproviders:\n  safety:\n  - provider: zzz\n"
    )
    [fault] = check_distribution(path, environ={}, registry=registry)
    assert "crashes" in fault.remedy
    assert "banned" not in fault.remedy


def test_a_package_is_denied_and_allowed_however_it_is_spelt() -> None:
    """To pip ``acme_words`` and ``Acme-Words`` are one package: a denial of the one must not let the other in."""
    for spelt in ("acme-words", "acme_words", "Acme.Words"):
        assert not PluginFilter(deny=(spelt,)).admits("words", "Acme-Words")
        assert PluginFilter(allow=(spelt,)).admits("words", "Acme-Words")
        assert not PluginFilter(allow=(spelt,)).admits("words", "acme")


def test_nothing_is_imported_while_the_filter_is_faulty(tmp_path: Path, registry: Registry) -> None:
    """A misspelt ``deny`` must not import what was to be denied, not even for the sake of more faults."""
    path = write(tmp_path, "version: 1\nname: a\nplugins: { dney: [x] }\nproviders:\n  safety:\n  - provider: banned\n")
    [fault] = check_distribution(path, environ={}, registry=registry)
    assert (fault.key_path, fault.remedy) == ("plugins.dney", "did you mean 'deny'?")
    assert registry.faults == []


def test_only_plugins_that_are_allowed_are_imported(tmp_path: Path, registry: Registry) -> None:
    """An allow-list names packages or entry points; what is handed over in process is allowed already."""
    path = write(
        tmp_path, "version: 1\nname: a\nplugins: { allow: [crasher] }\nproviders:\n  safety:\n  - provider: zzz\n"
    )
    [fault] = check_distribution(path, environ={}, registry=registry)
    assert "crashes" in fault.remedy
    assert "banned" not in fault.remedy


def test_a_distribution_that_uses_none_of_the_broken_plugins_starts(tmp_path: Path, registry: Registry) -> None:
    """One bad package must not take the host down."""
    path = write(tmp_path, "version: 1\nname: a\nproviders:\n  safety:\n  - provider: words\n")
    assert load_distribution(path, environ={}, registry=registry).providers["safety"][0].provider == "words"
    assert registry.faults == []


def test_the_schema_accepts_what_is_accepted_and_refuses_what_is_refused(registry: Registry) -> None:
    """Editors complete and check a file with it, so it must agree with the check."""
    validator = jsonschema.Draft202012Validator(json_schema(registry))
    validator.check_schema(validator.schema)
    base = {"version": 1, "name": "a"}

    def provider(config: object, name: str = "echo") -> dict[str, object]:
        return base | {"providers": {"inference": [{"provider": name, "config": config}]}}

    accepted: list[object] = [
        base,
        provider({"greeting": "x", "times": 3}),
        provider({"greeting": "x", "times": "${env.TIMES}", "device": "${env.DEVICE:cpu}"}),
        base | {"server": {"port": "${env.PORT:8321}", "limits": {"max_json_depth": 10}}},
        base | {"faces": [{"face": "plain", "config": {"words": ["a"]}}], "middleware": [{"middleware": "audit"}]},
        base | {"providers": {"translation": [{"provider": "dictionary"}]}},
    ]
    refused: list[object] = [
        {"name": "a"},
        base | {"version": 2},
        base | {"servr": {}},
        base | {"server": {"port": "8321"}},
        base | {"providers": {"inferrence": []}},
        provider({}),
        provider({"greeting": "x", "tims": 3}),
        provider({"greeting": "x", "times": "three"}),
        provider({"greeting": "x", "device": "gpu"}),
        provider({"greeting": "x"}, "ehco"),
        base | {"providers": {"inference": [{"provider": "echo"}]}},
        base | {"faces": [{"face": "plane"}]},
    ]
    assert [document for document in accepted if not validator.is_valid(document)] == []
    assert [document for document in refused if validator.is_valid(document)] == []


def test_the_schema_describes_every_key_of_the_core(registry: Registry) -> None:
    """The text below a field is the documentation that editors show."""
    schema = json_schema(registry)
    undescribed = [
        f"{name}.{key}"
        for name, model in {"Distribution": schema, **schema["$defs"]}.items()
        if name in ("Distribution", "ServerConfig", "ServerLimits", "StorageConfig", "PluginFilter")
        for key, field in model["properties"].items()
        if "description" not in field
    ]
    assert undescribed == []


def test_a_fault_prints_as_one_line_in_the_promised_form() -> None:
    """Editors and CI jump to FILE:LINE:COL."""
    fault = Fault("a.yaml", 3, 7, "server.port", "too small", "write 1 or more")
    assert str(fault) == "a.yaml:3:7: server.port: too small; write 1 or more"
    assert str(Fault("a.yaml", 1, 1, "", "the file is empty", "fill it")) == "a.yaml:1:1: the file is empty; fill it"


PAGE = (Path(__file__).parents[1] / "docs" / "distributions.md").read_text()


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_each_file_on_the_page_is_accepted(text: str, tmp_path: Path) -> None:
    """An operator begins by copying one; only plugins may be missing here."""
    write(tmp_path, "version: 1\nproviders:\n  memory_banks:\n    - provider: sqlite\n", "base.yaml")
    faults = check_distribution(write(tmp_path, text), environ={}, registry=Registry([]))
    assert [fault for fault in faults if "no installed plugin declares the" not in fault.what] == []


def test_the_page_has_every_key_of_the_top() -> None:
    """A key that is not written about is not found."""
    described = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    assert set(Distribution.model_fields) <= described
