"""Tools described in the prompt: which one to call, with which arguments, and what to make of its result.

The requests are plain on purpose. They name the tool's verb and noun and each argument by its name, in one of a few
wordings; what a held-out case has new is every name and every value. A network of this size learns to read a tool it
has never seen in the time that a laptop has, and does not learn the many ways in which people leave names out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from llama_stack.apis.common import Json, Message, ToolCall, ToolDefinition
from llama_stack_meta_reference.tiny.case import Case, assistant, system, tool_result, user
from llama_stack_meta_reference.tiny.conversation import system_prompt
from llama_stack_meta_reference.tiny.words import ARGUMENTS, Words


@dataclass(frozen=True)
class Tool:
    """A tool: what it does to what, and its arguments with their JSON types, in order."""

    verb: str
    noun: str
    arguments: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.verb}_{self.noun}"

    @property
    def definition(self) -> ToolDefinition:
        """The tool as the system prompt describes it."""
        return ToolDefinition(
            tool_name=self.name,
            description=f"{self.verb.capitalize()} the {self.noun}.",
            parameters={name: {"type": kind} for name, kind in self.arguments.items()},
        )


_VERBS = (
    "get", "find", "create", "delete", "update", "book", "send", "check", "list", "set", "start", "stop", "count",
    "order", "open", "convert", "measure", "track", "rate", "plan", "move", "print", "read", "add",
)  # fmt: skip
_REQUESTS = (
    "{V} the {n} with {a}.", "Please {v} the {n} with {a}.", "Can you {v} the {n} with {a}?", "{V} the {n}: {a}",
)  # fmt: skip
_SPOKEN = ("{n} {v}", "{n} {v}", "the {n} {v}", "{n} = {v}")


def tool_case(words: Words) -> Case:
    """One or two tools and a request that leads to a call; half the cases go on to the result and its report.

    Training cases may hold several requests in turn, for a description is read once for all of them.
    """
    tools = [_tool(words) for _ in range(words.choice((1, 1, 2)))]
    messages: list[Message] = [system(system_prompt(words))] if words.chance(0.2) else []
    answer: tuple[str, ...] = ()
    for _ in range(words.choice((1, 2, 3)) if words.split == "train" else 1):
        tool = words.choice(tools)
        request, arguments = _request(words, tool)
        result, reply, answer = _result(words)
        messages += [
            user(request),
            assistant("", ToolCall(tool_name=tool.name, arguments=arguments)),
            tool_result(tool.name, result),
            assistant(reply),
        ]
    definitions = tuple(tool.definition for tool in tools)
    if words.chance(0.5):
        return Case("tool_call", tuple(messages[:-2]), definitions)
    return Case("tool_result", tuple(messages), definitions, answer=answer)


def built_in_case(words: Words) -> Case:
    """The tools that Llama 3.1 knows by name: a web search, or arithmetic."""
    search, math = (ToolDefinition(tool_name=name) for name in ("web_search", "math"))
    if words.chance(0.5):
        query = words.choice((words.phrase, words.person, words.city))()
        request = words.choice(("Search the web for {}.", "Search for {}.")).format(query)
        call = ToolCall(tool_name="brave_search", arguments={"query": query})
    else:
        query = f"{words.number()} {words.choice(('+', '-', '*', '/'))} {words.number()}"
        request = words.choice(("What is {}?", "Compute {}.")).format(query)
        call = ToolCall(tool_name="wolfram_alpha", arguments={"query": query})
    tools = (search, math) if words.chance(0.5) else (search if call.tool_name == "brave_search" else math,)
    return Case("tool_call", (user(request), assistant("", call)), tools)


def _tool(words: Words) -> Tool:
    arguments: dict[str, str] = {}
    for _ in range(words.choice((1, 1, 2) if words.split == "train" else (1, 1, 1, 2))):
        name = _argument_name(words)
        arguments[name] = "integer" if words.chance(0.2 if words.is_wide else 0.1) else "string"
    return Tool(words.choice(_VERBS), words.noun(), arguments)


def _argument_name(words: Words) -> str:
    """Held-out cases use the usual names. In the end training uses nouns too: few names would be learnt by heart.

    ``type`` is never held out: beside the schema's own ``type`` it would measure something else.
    """
    if words.is_wide:
        return words.own(ARGUMENTS) if words.chance(0.7) else words.pseudo(2)
    if words.split == "train" and words.chance(0.85):
        return words.noun() if words.chance(0.6) else words.pseudo(2)
    return words.own([name for name in ARGUMENTS if name != "type"]) if words.chance(0.9) else words.pseudo(2)


def _request(words: Words, tool: Tool) -> tuple[str, dict[str, Json]]:
    """What the user says, and the arguments it amounts to, in the tool's own order."""
    arguments: dict[str, Json] = {
        name: words.number() if kind == "integer" else words.value() for name, kind in tool.arguments.items()
    }
    spoken = words.choice(_SPOKEN)
    said = " and ".join(spoken.replace("{n}", name).replace("{v}", str(value)) for name, value in arguments.items())
    text = words.choice(_REQUESTS).replace("{V}", tool.verb.capitalize()).replace("{v}", tool.verb)
    return text.replace("{n}", tool.noun).replace("{a}", said), arguments


def _result(words: Words) -> tuple[str, str, tuple[str, ...]]:
    """A tool's result, the reply that reports it, and what the reply must hold."""
    if words.chance(0.5):
        value = words.value() if words.chance(0.7) else str(words.number())
        return value, f"The result is {value}.", (value,)
    key, value = words.noun(), words.value()
    return json.dumps({key: value}), f"The {key} is {value}.", (value,)
