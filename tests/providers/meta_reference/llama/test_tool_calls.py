"""Tool calls in what a model writes: every form, in every split, and everything that only looks like one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_stack_meta_reference.llama import tool_calls
from llama_stack_meta_reference.llama.chat_format import ChatFormat
from llama_stack_meta_reference.llama.tokenizer import SpecialToken, TextDecoder, Tokenizer, load_tokenizer
from llama_stack_meta_reference.llama.tool_calls import MAX_DEPTH, ToolCallParser

from llama_stack.apis.common import Json, Message, Role, ToolCall, ToolDefinition
from tests.providers.meta_reference.small_tokenizer import write_meta

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

TAG = "<|python_tag|>"
"""In the replies below this is the special token."""


def offer(*names: str) -> list[ToolDefinition]:
    return [ToolDefinition(tool_name=name, input_shields=[], output_shields=[]) for name in names]


TOOLS = offer("web_search", "math", "get_weather", "get-time", "get_weather_map")
WITH_INTERPRETER = [*TOOLS, *offer("code_interpreter")]


def pieces(reply: str) -> list[str]:
    return [SpecialToken(part) if part == TAG else part for part in re.split(r"(<\|python_tag\|>)", reply)]


def joined(items: Sequence[str | ToolCall]) -> list[Any]:
    """Neighbouring texts as one, calls as (name, arguments)."""
    result: list[Any] = []
    for item in items:
        if isinstance(item, ToolCall):
            result.append((item.tool_name, item.arguments))
        elif result and isinstance(result[-1], str):
            result[-1] += item
        else:
            result.append(item)
    return result


def parse(parts: Sequence[str], tools: Sequence[ToolDefinition]) -> list[Any]:
    parser = ToolCallParser(tools)
    items = [item for part in parts for item in parser.feed(part)]
    return joined(items + parser.finish())


def split_everywhere(reply: str) -> Iterator[str]:
    for part in pieces(reply):
        yield from [part] if isinstance(part, SpecialToken) else part


OSLO = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
TIME = '{"name": "get-time", "parameters": {}}'
CALL_OSLO = ("get_weather", {"city": "Oslo"})
CALL_TIME: tuple[str, dict[str, Json]] = ("get-time", {})

CALLS: dict[str, tuple[str, list[Any]]] = {
    "one object": (OSLO, [CALL_OSLO]),
    "an object over several lines": (json.dumps(json.loads(OSLO), indent=4), [CALL_OSLO]),
    "arguments instead of parameters": (OSLO.replace("parameters", "arguments"), [CALL_OSLO]),
    "with a type": ('{"type": "function", "name": "get-time", "parameters": {}}', [CALL_TIME]),
    "keys in another order": ('{"parameters": {"city": "Oslo"}, "name": "get_weather"}', [CALL_OSLO]),
    "a name that begins another": ('{"name": "get_weather_map", "parameters": {}}', [("get_weather_map", {})]),
    "separated by semicolons": (f"{OSLO}; {TIME};{OSLO}", [CALL_OSLO, CALL_TIME, CALL_OSLO]),
    "separated by lines": (f"{OSLO}\n\n{TIME}", [CALL_OSLO, CALL_TIME]),
    "not separated": (OSLO + TIME, [CALL_OSLO, CALL_TIME]),
    "separated by commas": (f"{OSLO}, {TIME}", [CALL_OSLO, CALL_TIME]),
    "a list": (f"[{OSLO},\n {TIME}]", [CALL_OSLO, CALL_TIME]),
    "white space around": (f" \n{OSLO}\n ", [CALL_OSLO]),
    "text before, text behind": (f"I look.\n{OSLO}\nDone.", ["I look.\n", CALL_OSLO, "\nDone."]),
    "text between": (f"{OSLO} then\n{TIME}", [CALL_OSLO, " then\n", CALL_TIME]),
    "a fence around": (f"```json\n{OSLO}\n```", ["```json\n", CALL_OSLO, "\n```"]),
    "escapes": (
        r'{"name": "get_weather", "parameters": {"city": "\u00c5lesund \ud83d\ude00 \"x\" }{\n"}}',
        [("get_weather", {"city": 'Ålesund 😀 "x" }{\n'})],
    ),
    "values of every type": (
        '{"name": "get_weather", "parameters": {"a": [1, -2.5, 1e3, true, null, {"b": []}]}}',
        [("get_weather", {"a": [1, -2.5, 1000.0, True, None, {"b": []}]})],
    ),
    "a function tag": ('<function=get_weather>{"city": "Oslo"}</function>', [CALL_OSLO]),
    "function tags": (
        '<function=get_weather>{"city": "Oslo"}</function>\n<function=get-time>{}</function> ok',
        [CALL_OSLO, CALL_TIME, " ok"],
    ),
    "a function tag left open": ('<function=get_weather>{"city": "Oslo"}', [CALL_OSLO]),
    "pythonic": ("[get_weather(city='Oslo'), get-time()]", [CALL_OSLO, CALL_TIME]),
    "pythonic values": (
        "[get_weather(a=-1, b=\"it's )\", c=[1, (2, None)], d={'k': False}, e=true, f=1.5)]",
        [("get_weather", {"a": -1, "b": "it's )", "c": [1, [2, None]], "d": {"k": False}, "e": True, "f": 1.5})],
    ),
    "pythonic escapes": (r'[get_weather(city="a\n\u00c5\"\d\\")]', [("get_weather", {"city": 'a\nÅ"\\d\\'})]),
    "a built-in tool": (
        TAG + r'brave_search.call(query="a \"b\" \\ \n")', [("web_search", {"query": 'a "b" \\ \n'})],
    ),
    "built-in tools": (
        TAG + 'brave_search.call(query="a"); wolfram_alpha.call(query="1+1")',
        [("web_search", {"query": "a"}), ("math", {"query": "1+1"})],
    ),
    "a built-in tool behind text": (
        f'Yes. {TAG}brave_search.call(query="a")', ["Yes. ", ("web_search", {"query": "a"})],
    ),
    "a tag for each": (
        f'{TAG}brave_search.call(query="a"){TAG}{TIME}{TAG}wolfram_alpha.call(query="b")',
        [("web_search", {"query": "a"}), CALL_TIME, ("math", {"query": "b"})],
    ),
    "a built-in tool as an object": (
        '{"name": "brave_search", "parameters": {"query": "a"}}', [("web_search", {"query": "a"})],
    ),
    "an object behind the tag": (f"{TAG}{OSLO}", [CALL_OSLO]),
    "a pythonic list behind the tag": (f"{TAG}[get_weather(city='Oslo')]", [CALL_OSLO]),
    "a function tag behind the tag": (f"{TAG}<function=get-time>{{}}</function>", [CALL_TIME]),
}  # fmt: skip

CODE: dict[str, tuple[str, list[Any]]] = {
    "code": (TAG + "def f(x):\n    return x\n\nprint(f(7))", ["def f(x):\n    return x\n\nprint(f(7))"]),
    "code with white space around": (TAG + "\n x = 1\n", ["\n x = 1\n"]),
    "code that begins like a call": (TAG + "brave_search.call(query=name)", ["brave_search.call(query=name)"]),
    "code that is a dict": (TAG + '{"a": 1}["a"]', ['{"a": 1}["a"]']),
    "code that is a list": (TAG + "[print(x) for x in range(3)]", ["[print(x) for x in range(3)]"]),
    "a name that begins a tool's": (TAG + "w", ["w"]),
    "a list that never ends": (TAG + "[", ["["]),
    "two pieces of code": (f"{TAG}a = 1{TAG}b = 2", ["a = 1", "b = 2"]),
}

NO_CALLS: dict[str, str] = {
    "plain text": "The weather is fine.\n\nIs it?\n",
    "white space": " \n ",
    "an unknown name": '{"name": "get_wether", "parameters": {}}',
    "an unknown name in a list": f'[{OSLO}, {{"name": "other", "parameters": {{}}}}]',
    "an unknown name in a tag": "<function=other>{}</function>",
    "an unknown pythonic name": "[get_weather(), other()]",
    "a known name and more": '{"name": "get_weathers", "parameters": {}}',
    "cut short": OSLO[:-1],
    "a list cut short": f"[{OSLO}",
    "a tag cut short": '<function=get_weather>{"city": "Oslo"',
    "in the middle of a line": f"Write {OSLO} to call it.",
    "no parameters": '{"name": "get_weather"}',
    "no name": '{"parameters": {}}',
    "parameters that are no object": '{"name": "get_weather", "parameters": ["Oslo"]}',
    "another key": '{"name": "get_weather", "parameters": {}, "note": 1}',
    "another type": '{"type": "tool", "name": "get_weather", "parameters": {}}',
    "both keys": '{"name": "get_weather", "parameters": {}, "arguments": {}}',
    "a key twice": '{"name": "get_weather", "name": "get_weather", "parameters": {}}',
    "an argument twice": '{"name": "get_weather", "parameters": {"a": 1, "a": 2}}',
    "an argument twice inside": '{"name": "get_weather", "parameters": {"a": {"b": 1, "b": 2}}}',
    "NaN": '{"name": "get_weather", "parameters": {"a": NaN}}',
    "Infinity": '{"name": "get_weather", "parameters": {"a": -Infinity}}',
    "a number beyond all": '{"name": "get_weather", "parameters": {"a": 1e999}}',
    "an integer beyond all": '{"name": "get_weather", "parameters": {"a": ' + "9" * 5000 + "}}",
    "half a surrogate pair": r'{"name": "get_weather", "parameters": {"a": "\ud83d"}}',
    "half a surrogate pair as a key": r'{"name": "get_weather", "parameters": {"\ud83d": 1}}',
    "a line break in a string": '{"name": "get_weather", "parameters": {"a": "x\ny"}}',
    "single quotes": "{'name': 'get_weather', 'parameters': {}}",
    "a trailing comma": '{"name": "get_weather", "parameters": {},}',
    "a bad escape": r'{"name": "get_weather", "parameters": {"a": "\q"}}',
    "brackets that cross": '{"name": "get_weather", "parameters": {"a": [}]}',
    "a comment": '{"name": "get_weather", /* x */ "parameters": {}}',
    "an object of data": '{"city": "Oslo"}',
    "a list of data": '["a", "b"]',
    "an empty list": "[]",
    "a link": "[get](https://example.org)",
    "a positional argument": '[get_weather("Oslo")]',
    "a pythonic argument twice": "[get_weather(a=1, a=2)]",
    "unpacking": "[get_weather(**{'a': 1})]",
    "an expression": "[get_weather(a=1+1)]",
    "a name as a value": "[get_weather(a=city)]",
    "a call as a value": "[get_weather(a=__import__('os').getcwd())]",
    "an f-string": "[get_weather(a=f'{1}')]",
    "bytes": "[get_weather(a=b'x')]",
    "a set": "[get_weather(a={1})]",
    "a dict with a number for a key": "[get_weather(a={1: 2})]",
    "a dict with a key twice": "[get_weather(a={'k': 1, 'k': 2})]",
    "a dict unpacked": "[get_weather(a={**{}})]",
    "a complex number": "[get_weather(a=1j)]",
    "a pythonic number beyond all": "[get_weather(a=1e999)]",
    "html": "<b>bold</b>\n<br>\n<function>",
    "a tag's end": "</function>",
    "a built-in tool without the tag": 'brave_search.call(query="a")',
    "the tag in letters": '<|python_tag|brave_search.call(query="a")',
    "too deep": '{"name": "get_weather", "parameters": {"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}",
}

REPLIES = [reply for reply, _ in (CALLS | CODE).values()] + list(NO_CALLS.values())


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_read_in_every_form_that_llama_writes(name: str) -> None:
    """Calls that arrive as text are what users of other servers report most."""
    reply, expected = CALLS[name]
    assert parse(pieces(reply), TOOLS) == expected
    assert parse(pieces(reply), WITH_INTERPRETER) == expected


@pytest.mark.parametrize("name", CODE)
def test_what_follows_the_tag_and_is_no_call_is_code(name: str) -> None:
    """With an interpreter at hand code arrives whole and unchanged; without one nothing could run it, so it is text."""
    reply, codes = CODE[name]
    assert parse(pieces(reply), WITH_INTERPRETER) == [("code_interpreter", {"code": code}) for code in codes]
    assert parse(pieces(reply), TOOLS) == ["".join(codes)]


@pytest.mark.parametrize("name", NO_CALLS)
def test_what_is_no_call_stays_as_it_was(name: str) -> None:
    """An answer may show JSON or code; none of it may be lost, changed or carried out."""
    reply = NO_CALLS[name]
    assert parse([reply], WITH_INTERPRETER) == [reply]


@pytest.mark.parametrize("name", CODE)
def test_code_of_a_reply_that_was_cut_is_text(name: str) -> None:
    """max_tokens may fall between a deletion and its condition: half a program must not run."""
    reply, codes = CODE[name]
    parser = ToolCallParser(WITH_INTERPRETER)
    items = [item for part in pieces(reply) for item in parser.feed(part)]
    finished = [("code_interpreter", {"code": code}) for code in codes[:-1]]
    assert joined(items + parser.finish(is_cut=True)) == [*finished, codes[-1]]


@pytest.mark.parametrize(
    "reply",
    [
        f'{TAG}{{"name": "other", "parameters": {{}}}}',
        f"{TAG}<function=other>{{}}</function>",
        f'{TAG}brave_search.call(query="a")',
    ],
)
def test_a_call_of_a_tool_that_is_not_at_hand_is_text_even_behind_the_tag(reply: str) -> None:
    """It is valid Python, yet the model meant a tool; running it as code would do something nobody asked for."""
    assert parse(pieces(reply), offer("code_interpreter", "get_weather")) == [reply.removeprefix(TAG)]


@pytest.mark.parametrize("reply", REPLIES)
def test_one_character_at_a_time_gives_the_same(reply: str) -> None:
    """Streamed and plain answers must agree, and tokens cut anywhere."""
    for tools in (TOOLS, WITH_INTERPRETER):
        assert parse(list(split_everywhere(reply)), tools) == parse(pieces(reply), tools)


FRAGMENTS = st.sampled_from(
    [OSLO, TIME, TAG, "; ", ",", "\n", " ", "[", "]", "{", "}", "<", "(", ")", '"', "'", "\\", "a", "é😀",
     "get_weather(", "city='x'", "<function=get-time>", "{}", "</function>", "brave_search.call(", 'query="a")',
     '{"name": "get_weather", ', '"parameters": {', '{"name"', "print(1)", "Hello.\n"]
)  # fmt: skip
WRITTEN = st.lists(FRAGMENTS | st.text(max_size=3), max_size=14).map("".join)


@UNTIMED
@given(reply=WRITTEN | st.sampled_from(REPLIES), data=st.data())
def test_any_split_gives_the_same(reply: str, data: st.DataObject) -> None:
    """Where tokens end depends on the model and on the network; what was called must not."""
    parts: list[str] = []
    for part in pieces(reply):
        if isinstance(part, SpecialToken):
            parts.append(part)
        else:
            cuts = sorted(data.draw(st.lists(st.integers(0, len(part)), max_size=5)))
            parts += [part[start:end] for start, end in zip([0, *cuts], [*cuts, len(part)], strict=True)]
    tools = data.draw(st.sampled_from([TOOLS, WITH_INTERPRETER]))
    assert parse(parts, tools) == parse(pieces(reply), tools)


@UNTIMED
@given(reply=WRITTEN)
def test_nothing_is_lost(reply: str) -> None:
    """Take the calls' own characters and separators away from the reply, and what remains is the text, in order."""
    items = parse(pieces(reply), TOOLS)
    rest = reply.replace(TAG, "")
    for item in items:
        if isinstance(item, str):
            _, found, rest = rest.partition(item)
            assert found == item
        else:
            assert item[0] in rest.replace("brave_search", "web_search")
    if not any(isinstance(item, tuple) for item in items):
        assert "".join(items) == reply.replace(TAG, "")


@UNTIMED
@given(reply=WRITTEN)
def test_without_tools_everything_is_text_at_once(reply: str) -> None:
    """A chat without tools must not wait for a bracket to close."""
    parser = ToolCallParser([])
    for part in pieces(reply):
        expected = [] if isinstance(part, SpecialToken) or not part else [part]
        assert parser.feed(part) == expected
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("reply", "until"),
    [
        ("Hello", "H"),
        ("{ 'a'", "{ '"),
        ('{"city"', '{"c'),
        ('{"name": "get_weathr"', '{"name": "get_weathr"'),
        ('{"name": "get_weather", "parameters": [', '{"name": "get_weather", "parameters": ['),
        ('{"name": "get_weather", "parameters": {"a": "\n', '{"name": "get_weather", "parameters": {"a": "\n'),
        ("[1", "[1"),
        ("[get_x", "[get_x"),
        ("<b", "<b"),
        ("<function=x", "<function=x"),
        ("Hello\n- ", "Hello\n-"),
    ],
)
def test_text_is_held_back_only_while_it_may_become_a_call(reply: str, until: str) -> None:
    """A reader of a stream waits for what is held, so it goes out with the first character that settles it."""
    parser = ToolCallParser(TOOLS)
    shown = ""
    for position, character in enumerate(reply):
        shown += "".join(str(item) for item in parser.feed(character))
        if position + 1 >= len(until):
            assert shown == reply[: position + 1]
    assert shown == reply


def test_a_call_arrives_with_its_last_character() -> None:
    """An agent can start a tool while the model still writes; waiting for the end would waste that time."""
    parser = ToolCallParser(TOOLS)
    assert parser.feed(OSLO[:-1]) == []
    assert joined(parser.feed(OSLO[-1])) == [CALL_OSLO]
    assert parser.feed("; ") == []
    assert joined(parser.feed(f"[{TIME}]")) == [CALL_TIME]
    assert parser.finish() == []


@pytest.mark.parametrize(
    "opening",
    [
        '{"name": "get_weather", "parameters": {"a": "',
        '{"name": "get_weather", "parameters": {"a": [',
        "[get_weather(a='",
        TAG + "x = '",
        TAG,
        "",
    ],
)
@pytest.mark.parametrize("filler", ["a", " ", "1,", "(", '"\\'])
def test_what_is_held_back_is_bounded(opening: str, filler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in a loop must not make the server hold its whole output, whatever it began to write."""
    bound = 10_000
    monkeypatch.setattr(tool_calls, "MAX_HELD_CHARACTERS", bound)
    parser = ToolCallParser(WITH_INTERPRETER)
    shown: list[str | ToolCall] = []
    written = opening.replace(TAG, "")
    for part in pieces(opening):
        shown += parser.feed(part)
    chunk = filler * 500
    while len(written) < 2 * bound:
        shown += parser.feed(chunk)
        written += chunk
        assert len(written) - sum(len(item) for item in shown if isinstance(item, str)) <= bound
    shown += parser.finish()
    assert joined(shown) == [written]


@pytest.mark.parametrize(
    "reply",
    [
        "[get_weather(a=" + "-" * 100_000 + "1)]",
        "[get_weather(a=" + "1+" * 100_000 + "1)]",
        "[get_weather(a=1" + ".a" * 60_000 + ")]",
        "[get_weather(a=" + "not " * 60_000 + "1)]",
        "[get_weather(a=" + "lambda:" * 30_000 + "1)]",
        '{"name": "get_weather", "parameters": {"a": ' * 5_000,
        '{"name":\n' * 20_000,
    ],
)
def test_hostile_nesting_is_text_and_no_crash(reply: str) -> None:
    """Python's own parser recurses; what it cannot take must come back as text, not end the process."""
    assert parse([reply], TOOLS) == [reply]


def _json_values() -> st.SearchStrategy[Any]:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(['"', "\\", "'", "\n", ")"])
    number = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    leaf = st.none() | st.booleans() | number | text
    return st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
    )


ARGUMENTS = st.dictionaries(
    st.sampled_from(["query", "city", "n", "class", "a b", "ﬁ", "é"]) | st.text(
        st.characters(exclude_categories=["Cs"]), max_size=5
    ),
    _json_values(),
    max_size=3,
)  # fmt: skip
WRITABLE = st.one_of(
    st.tuples(st.sampled_from(["get_weather", "get-time", "web_search", "math", "code_interpreter"]), ARGUMENTS),
    st.tuples(st.just("web_search"), st.fixed_dictionaries({"query": _json_values()})),
    st.tuples(
        st.just("code_interpreter"), st.sampled_from(["print(1)", " x\n", "f'{a}'\n"]).map(lambda c: {"code": c})
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_meta(tmp_path_factory.mktemp("tokenizer")))


@UNTIMED
@given(calls=st.lists(WRITABLE, min_size=1, max_size=4))
def test_calls_that_the_chat_format_writes_are_read_back(
    tokenizer: Tokenizer, calls: list[tuple[str, dict[str, Json]]]
) -> None:
    """History is written in the notation that replies are read in; token by token, as the engine sees them."""
    expected = [ToolCall(tool_name=name, arguments=arguments) for name, arguments in calls]
    message = Message(role=Role.ASSISTANT, content="", tool_calls=expected, tool_responses=[])
    parser, decoder = ToolCallParser(WITH_INTERPRETER), TextDecoder(tokenizer)
    items: list[str | ToolCall] = []
    for token in ChatFormat(tokenizer).encode_reply(message):
        items += parser.feed(decoder.feed(token))
        special = tokenizer.special_name(token)
        if special is not None:
            items += parser.feed(special)
    items += parser.finish()
    assert items == expected


def test_the_callers_own_name_for_a_tool_is_given_back() -> None:
    """The model knows brave_search; the caller asked for web_search, or for a brave_search of its own, or for both."""
    reply = pieces(TAG + 'brave_search.call(query="a")')
    for names in (["web_search"], ["brave_search"], ["web_search", "brave_search"], ["brave_search", "web_search"]):
        expected = "brave_search" if "brave_search" in names else "web_search"
        assert parse(reply, offer(*names)) == [(expected, {"query": "a"})]


def test_golden_replies_of_the_dialogs_are_read_back() -> None:
    """The golden set shows people what calls look like; the parser must agree with every example."""
    path = Path(__file__).with_name("golden_dialogs.json")
    for golden in json.loads(path.read_text("utf-8")):
        tools = offer(*(tool["tool_name"] for tool in golden["tools"]))
        replies = re.findall(
            r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?)<\|eo[tm]_id\|>", golden["prompt"], re.DOTALL
        )
        written = [message for message in golden["messages"] if message["role"] == "assistant"]
        for reply, message in zip(replies, written, strict=True):
            expected = [(call["tool_name"], call["arguments"]) for call in message.get("tool_calls", [])]
            if tools:
                # A bar behind a backslash in a golden prompt is text that only looks like a special token
                said = [piece.replace("<\\|", "<|") if type(piece) is str else piece for piece in pieces(reply)]
                assert [item for item in parse(said, tools) if isinstance(item, tuple)] == expected
