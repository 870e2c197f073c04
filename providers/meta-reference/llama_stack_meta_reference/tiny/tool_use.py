"""Tools described in the prompt: which one to call, with which arguments, and what to make of its result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from llama_stack.apis.common import Json, Message, ToolCall, ToolDefinition
from llama_stack_meta_reference.tiny.case import Case, assistant, system, tool_result, user
from llama_stack_meta_reference.tiny.conversation import chat_case, system_prompt, unknown_case
from llama_stack_meta_reference.tiny.words import ARGUMENTS, Words, split_of


@dataclass(frozen=True)
class Argument:
    """One argument: its JSON type, and how a user speaks of its value (``{v}``) without naming the argument."""

    name: str
    type: str
    natural: tuple[str, ...]
    draw: Callable[[Words], Json]


@dataclass(frozen=True)
class Tool:
    """A tool, its arguments, and the words with which a user asks for it."""

    name: str
    description: str
    arguments: tuple[Argument, ...]
    requests: tuple[str, ...]
    imperative: str


_VERBS = {
    "get": ("Get", "Give me", "I need", "Tell me", "Show me", "What is"),
    "find": ("Find", "Find me", "Look for", "I am looking for", "Can you find"),
    "search": ("Search", "Look for", "Search for", "Please search"),
    "create": ("Create", "Make", "Please create", "I would like"),
    "delete": ("Delete", "Remove", "Please delete", "Get rid of"),
    "update": ("Update", "Change", "Please update"),
    "book": ("Book", "Reserve", "I want to book", "Please book"),
    "send": ("Send", "Please send", "I want to send", "Can you send"),
    "check": ("Check", "Please check", "Can you check", "Look at"),
    "list": ("List", "Show", "Show me", "Give me a list of"),
    "set": ("Set", "Please set", "Change", "Put"),
    "start": ("Start", "Please start", "Turn on", "Begin"),
    "stop": ("Stop", "Please stop", "Turn off", "End"),
    "count": ("Count", "How many are in", "Please count"),
    "order": ("Order", "I want to order", "Please order", "Buy"),
    "open": ("Open", "Please open", "Can you open"),
    "convert": ("Convert", "Please convert", "Turn"),
    "measure": ("Measure", "Please measure", "What is"),
    "fetch": ("Fetch", "Get me", "Please fetch", "Show"),
    "track": ("Track", "Where is", "Please track"),
    "rate": ("Rate", "Please rate", "I want to rate"),
    "plan": ("Plan", "Please plan", "Help me plan"),
    "move": ("Move", "Please move", "Can you move"),
    "print": ("Print", "Please print", "Can you print"),
    "lookup": ("Look up", "Tell me", "What is", "I want to know"),
    "compute": ("Compute", "Calculate", "What is", "Work out"),
    "read": ("Read", "Please read", "Show me"),
    "add": ("Add", "Please add", "Put in", "I want to add"),
}

_PLACE_WORDS = ("in {v}", "in {v}", "at {v}", "for {v}", "near {v}")
_NATURAL: tuple[Argument, ...] = (
    *(
        Argument(name, "string", _PLACE_WORDS, Words.city)
        for name in ("city", "town", "location", "place", "destination", "region", "city_name", "where")
    ),
    *(Argument(name, "string", ("for {v}", "of {v}", "by {v}"), Words.person) for name in ("name", "person",
        "customer", "user")),
    *(Argument(name, "string", ("on {v}", "for {v}"), Words.date) for name in ("date", "day", "when")),
    *(Argument(name, "string", ("at {v}",), Words.clock) for name in ("time", "hour", "start_time")),
    *(Argument(name, "string", ("for {v}", "with code {v}", "{v}"), Words.code) for name in ("code", "id", "number",
        "reference")),
    *(Argument(name, "string", ("about {v}", "for {v}", "on {v}"), Words.phrase) for name in ("topic", "query",
        "subject", "keyword")),
    *(Argument(name, "string", ("called {v}", "named {v}", "for {v}", "of {v}"), Words.title) for name in ("title",
        "product", "label")),
    *(Argument(name, "integer", ("with {v}", "to {v}", "of {v}", "for {v}"), Words.number) for name in ("count",
        "amount", "limit", "value")),
)  # fmt: skip

_NAMED_FORMS = (
    "{n} {v}", "{n} {v}", "{n}: {v}", "{n} = {v}", "the {n} {v}", "{n} is {v}", "with {n} {v}", "for {n} {v}",
    "the {n} is {v}",
    "{v} as {n}", "using {v} as the {n}", "{v} for the {n}", "{n} {v}", "{n}={v}", "{n} set to {v}",
)  # fmt: skip

_REQUEST_FORMS = (
    "{r} {a}.", "{r} {a}", "{r} {a}, please.", "Please {l} {a}.", "{r} {a}?", "Could you {l} {a}?", "Use {t}: {a}",
    "Call {t} with {a}.",
    "I would like you to {l} {a}.", "{r} {a}!", "Now {l} {a}.", "{a}: {l}", "With {a}, {l}.", "Hi! {r} {a}.",
    "Run {t} with {a}.",
)  # fmt: skip


def tool_case(words: Words) -> Case:
    """One to three tools and one to four requests; each leads to a call, and its result to an answer."""
    tools = _tools(words)
    messages: list[Message] = [system(system_prompt(words))] if words.chance(0.25) else []
    for _ in range(words.choice((1, 2, 2, 3, 3, 4))):
        if words.chance(0.15):
            messages += _small_turn(words)
        tool = words.choice(tools)
        request, arguments = _request(words, tool)
        call = ToolCall(tool_name=tool.name, arguments=arguments)
        messages += [user(request), assistant("", call)]
        result, reply, parts, wrong = _result(words)
        messages += [tool_result(tool.name, result), assistant(reply)]
    definitions = tuple(_definitions(words, tools))
    if words.chance(0.5):
        return Case("tool_call", tuple(messages[:-2]), definitions)
    return Case("tool_result", tuple(messages), definitions, answer=parts, wrong=wrong)


def built_in_case(words: Words) -> Case:
    """The tools that Llama 3.1 knows by name: a web search, or arithmetic."""
    search, math = (
        ToolDefinition(tool_name=name, input_shields=[], output_shields=[]) for name in ("web_search", "math")
    )
    if words.chance(0.5):
        query = words.choice((words.phrase, words.person, words.city, words.title))()
        form = words.choice(
            ("Search the web for {}.", "Search for {}.", "Look up {} on the web.", "Find {} on the internet.")
        )
        request, call = form.format(query), ToolCall(tool_name="brave_search", arguments={"query": query})
    else:
        query = f"{words.number()} {words.choice(('+', '-', '*', '/'))} {words.number()}"
        form = words.choice(("What is {}?", "Compute {}.", "Calculate {}", "How much is {}?", "Solve {}."))
        request, call = form.format(query), ToolCall(tool_name="wolfram_alpha", arguments={"query": query})
    tools = (search, math) if words.chance(0.5) else (search if call.tool_name == "brave_search" else math,)
    messages = [user(request), assistant("", call)]
    if words.chance(0.6):
        value = words.value() if call.tool_name == "brave_search" else str(words.number())
        messages += [tool_result(call.tool_name, value), assistant(f"The result is {value}.")]
        return Case("tool_result", tuple(messages), tools, answer=(value,))
    return Case("tool_call", tuple(messages), tools)


def _tools(words: Words) -> list[Tool]:
    tools: dict[str, Tool] = {}
    wanted = words.choice((1, 1, 2, 2, 3))
    while len(tools) < wanted:
        tool = _tool(words)
        tools[tool.name] = tool
    return list(tools.values())


def _tool(words: Words) -> Tool:
    verb = words.choice(list(_VERBS))
    noun = words.noun() if words.chance(0.85) else f"{words.noun()} {words.noun()}"
    joined = noun.replace(" ", "_")
    name = words.choice((f"{verb}_{joined}",) * 4 + (f"{joined}_{verb}", _camel(f"{verb}_{joined}"), joined))
    count = words.choice((1, 1, 1, 2, 2, 3))
    arguments: dict[str, Argument] = {}
    while len(arguments) < count:
        argument = _argument(words)
        arguments[argument.name] = argument
    description = words.choice(
        (
            f"{verb.capitalize()} the {noun}.",
            f"{verb.capitalize()} a {noun}",
            f"Use this to {verb} the {noun}.",
            f"{noun.capitalize()} tool",
            "",
            f"{verb.capitalize()} the {noun} {words.choice(('in', 'of', 'for', 'by'))} {' and '.join(arguments)}.",
        )
    )
    starts = tuple(f"{start} {words.choice(('the', 'the', 'a'))} {noun}" for start in _VERBS[verb])
    imperative = f"{'look up' if verb == 'lookup' else verb} the {noun}"
    return Tool(name, description, tuple(arguments.values()), starts, imperative)


def _argument(words: Words) -> Argument:
    """A name of this split with values of any kind, or (in training) a common name with its usual wordings."""
    if words.split == "train" and words.chance(0.4):
        argument = words.choice(_NATURAL)
        if split_of(argument.name) == words.split:
            return argument
    form = words.random.random()
    if form < 0.55:
        name = words.own(ARGUMENTS)
    elif form < 0.75:
        name = words.pseudo(2)
    else:
        name = words.until(
            lambda: f"{words.own(ARGUMENTS)}_{words.choice(('name', 'id', 'type', 'code', words.noun()))}"
        )
    kind = words.random.random()
    if kind < 0.7:
        return Argument(name, "string", (), Words.value)
    if kind < 0.9:
        return Argument(name, "integer", (), Words.number)
    if kind < 0.95:
        return Argument(name, "number", (), Words.decimal)
    return Argument(name, "boolean", (), lambda w: w.chance(0.5))


def _request(words: Words, tool: Tool) -> tuple[str, dict[str, Json]]:
    """What the user says, and the arguments it amounts to, in the tool's own order."""
    arguments = {argument.name: argument.draw(words) for argument in tool.arguments}
    spoken = []
    for argument in tool.arguments:
        value = arguments[argument.name]
        text = json.dumps(value) if not isinstance(value, str) else value
        quoted = f'"{text}"' if isinstance(value, str) and words.chance(0.1) else text
        alone = len(arguments) == 1 and words.chance(0.3)
        if argument.natural and words.chance(0.7):
            form = words.choice(argument.natural)
        elif alone and argument.type != "boolean":
            form = words.choice(("{v}", "for {v}", "in {v}", "of {v}", "with {v}"))
        else:
            form = words.choice(_NAMED_FORMS)
        name = argument.name.replace("_", " ") if words.chance(0.3) else argument.name
        spoken.append(form.replace("{n}", name).replace("{v}", quoted))
    if words.chance(0.4):
        words.random.shuffle(spoken)
    request = words.choice(tool.requests)
    form = words.choice(_REQUEST_FORMS)
    joined = words.choice((" and ", ", ", " ", ", ", " and ")).join(spoken)
    text = form.replace("{r}", request).replace("{l}", tool.imperative).replace("{t}", tool.name).replace("{a}", joined)
    return text, arguments


def _result(words: Words) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """A tool's result, the reply that reports it, and what the reply must hold."""
    form = words.random.random()
    if form < 0.55:
        values: dict[str, Json] = {}
        for _ in range(words.choice((1, 1, 2, 2, 3))):
            values[words.noun()] = words.value() if words.chance(0.6) else words.number()
        parts = [f"the {key.replace('_', ' ')} is {value}" for key, value in values.items()]
        said = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        return json.dumps(values), f"{said[0].upper()}{said[1:]}.", tuple(str(v) for v in values.values()), ()
    if form < 0.9:
        value = words.value() if words.chance(0.7) else str(words.number())
        return words.choice((value, value, f'"{value}"', f"result: {value}")), f"The result is {value}.", (value,), ()
    cause = f"{words.choice(('no', 'unknown', 'missing', 'wrong'))} {words.noun()}"
    return json.dumps({"error": cause}), f"The tool failed: {cause}.", (cause,), ()


def _small_turn(words: Words) -> list[Message]:
    """A turn that needs no tool though there are some."""
    messages = [*(chat_case if words.chance(0.7) else unknown_case)(words).messages]
    return messages[-2:]


def _definitions(words: Words, tools: list[Tool]) -> list[ToolDefinition]:
    style = words.random.random()
    described = words.chance(0.5)
    definitions = []
    for tool in tools:
        schemas: dict[str, Json] = {}
        for argument in tool.arguments:
            schema: dict[str, Json] = {"type": argument.type}
            if described and words.chance(0.7):
                plain = argument.name.replace("_", " ")
                schema["description"] = words.choice(
                    (f"The {plain}", f"the {plain}", plain, f"{plain.capitalize()} to use", f"The {plain}.")
                )
            schemas[argument.name] = schema
        parameters: dict[str, Json] = schemas
        if style > 0.8:
            parameters = {
                "type": "object",
                "properties": schemas,
                "required": [argument.name for argument in tool.arguments],
            }
        definitions.append(
            ToolDefinition(
                tool_name=tool.name,
                description=tool.description or None,
                parameters=parameters,
                input_shields=[],
                output_shields=[],
            )
        )
    return definitions


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
