"""Passages about invented people, places and things, and questions that they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama_stack.apis.common import Message
from llama_stack_meta_reference.tiny.case import Case, assistant, system, user
from llama_stack_meta_reference.tiny.conversation import fill, system_prompt
from llama_stack_meta_reference.tiny.words import Words

NOT_SAID = "The text does not say."


@dataclass(frozen=True)
class Attribute:
    """One thing that a passage can say: ``{e}`` is the entity's name, ``{v}`` the value."""

    label: str
    value: Callable[[Words], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of entity: how one is named, and what can be said of it."""

    name: Callable[[Words], str]
    attributes: tuple[Attribute, ...]


_PLACES = ("library", "museum", "hotel", "school", "bridge", "harbour", "factory", "theatre", "garden", "market",
    "tower",
           "station", "hospital", "farm")  # fmt: skip

_EVENTS = ("festival", "meeting", "concert", "race", "fair", "workshop", "course", "exam")
_JOBS = ("baker", "teacher", "doctor", "pilot", "farmer", "painter", "plumber", "nurse", "lawyer", "writer", "singer",
    "driver", "gardener", "tailor", "sailor", "chemist")  # fmt: skip
_FOODS = ("rice", "soup", "apples", "fish", "bread", "pasta", "cheese", "olives", "cake", "plums", "beans", "curry",
    "pizza", "honey", "salad", "eggs", "noodles")  # fmt: skip
_PETS = ("dog", "cat", "parrot", "rabbit", "horse", "hamster", "goat", "turtle")  # fmt: skip
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "grey", "brown", "pink", "golden",
    "silver")  # fmt: skip

_PERSON = Kind(
    Words.person,
    (
        Attribute("job", lambda w: w.choice(_JOBS), ("{e} works as a {v}.", "{e} is a {v}.",
            "{e} earns a living as a {v}."),
                  ("What is the job of {e}?", "What does {e} work as?", "What does {e} do for a living?")),
        Attribute("home", Words.city, ("{e} lives in {v}.", "{e} has a house in {v}.", "The home of {e} is in {v}."),
                  ("Where does {e} live?", "In which city does {e} live?", "Where is the home of {e}?")),
        Attribute("birthplace", Words.city, ("{e} was born in {v}.", "{e} comes from {v}.", "{e} grew up in {v}."),
                  ("Where was {e} born?", "Where does {e} come from?", "Which city does {e} come from?")),
        Attribute("birth year", Words.year, ("{e} was born in the year {v}.", "The birth year of {e} is {v}."),
                  ("When was {e} born?", "In which year was {e} born?", "What is the birth year of {e}?")),
        Attribute("favourite food", lambda w: w.choice(_FOODS), ("{e} likes to eat {v}.",
            "The favourite food of {e} is {v}."),
                  ("What does {e} like to eat?", "What is the favourite food of {e}?", "Which food does {e} like?")),
        Attribute("pet", lambda w: f"a {w.choice(_PETS)} called {w.name()}", ("{e} has {v}.", "{e} owns {v}.",
            "{e} keeps {v}."),
                  ("Which pet does {e} have?", "What pet does {e} own?", "What is the pet of {e}?")),
        Attribute("phone number", lambda w: f"{w.random.randrange(100, 1000)}-{w.random.randrange(1000, 10000)}",
                  ("The phone number of {e} is {v}.", "You can call {e} at {v}.", "{e} can be reached at {v}."),
                  ("What is the phone number of {e}?", "How can I call {e}?", "Which number reaches {e}?")),
        Attribute("friend", Words.person, ("The best friend of {e} is {v}.", "{e} often meets {v}, a friend."),
                  ("Who is the best friend of {e}?", "Who is the friend of {e}?", "Which friend does {e} have?")),
    ),
)  # fmt: skip

_PLACE = Kind(
    lambda w: f"the {w.name()} {w.choice(_PLACES).capitalize()}",
    (
        Attribute("place", Words.city, ("{e} is located in {v}.", "{e} is in {v}.", "{e} stands in {v}.",
            "You find {e} in {v}."),
                  ("Where is {e}?", "In which city is {e}?", "Where can I find {e}?", "What city is {e} in?")),
        Attribute("year", Words.year, ("{e} opened in {v}.", "{e} was built in {v}.", "{e} was founded in {v}."),
                  ("When did {e} open?", "In which year did {e} open?", "When was {e} built?",
                  "When was {e} founded?")),
        Attribute("director", Words.person, ("The director of {e} is {v}.", "{v} is the director of {e}.",
            "{e} is led by {v}."),
                  ("Who is the director of {e}?", "Who leads {e}?", "Who directs {e}?")),
        Attribute("number of rooms", lambda w: str(w.number()), ("{e} has {v} rooms.", "There are {v} rooms in {e}."),
                  ("How many rooms does {e} have?", "How many rooms are in {e}?",
                  "What is the number of rooms of {e}?")),
        Attribute("ticket price", Words.price, ("A ticket for {e} costs {v}.", "The ticket price of {e} is {v}.",
            "Visitors of {e} pay {v}."),
                  ("How much is a ticket for {e}?", "What does a ticket for {e} cost?",
                  "What is the ticket price of {e}?")),
        Attribute("opening time", Words.clock, ("{e} opens at {v}.", "The doors of {e} open at {v}."),
                  ("At what time does {e} open?", "What is the opening time of {e}?",
                  "When do the doors of {e} open?")),
        Attribute("closing day", Words.date, ("{e} is closed on {v}.", "The closing day of {e} is {v}."),
                  ("When is {e} closed?", "On which day is {e} closed?", "What is the closing day of {e}?")),
        Attribute("architect", Words.person, ("{e} was designed by {v}.", "The architect of {e} was {v}.",
            "{v} designed {e}."),
                  ("Who designed {e}?", "Who was the architect of {e}?", "Which architect designed {e}?")),
    ),
)  # fmt: skip

_PRODUCT = Kind(
    lambda w: f"the {w.title()}" if w.chance(0.4) else f"the {w.name()} {w.noun()}",
    (
        Attribute("price", Words.price, ("{e} costs {v}.", "The price of {e} is {v}.", "You can buy {e} for {v}."),
                  ("How much does {e} cost?", "What is the price of {e}?", "How much is {e}?", "What does {e} cost?")),
        Attribute("colour", lambda w: w.choice(_COLOURS), ("{e} is {v}.", "The colour of {e} is {v}.",
            "{e} comes in {v}."),
                  ("What colour is {e}?", "What is the colour of {e}?", "Which colour does {e} have?")),
        Attribute("weight", Words.quantity, ("{e} weighs {v}.", "The weight of {e} is {v}."),
                  ("How much does {e} weigh?", "What is the weight of {e}?", "How heavy is {e}?")),
        Attribute("maker", Words.title, ("{e} is made by {v}.", "The maker of {e} is {v}.", "{v} makes {e}."),
                  ("Who makes {e}?", "Who is the maker of {e}?", "Which company makes {e}?")),
        Attribute("code", Words.code, ("The code of {e} is {v}.", "{e} has the code {v}.",
            "Order {e} under the code {v}."),
                  ("What is the code of {e}?", "Which code does {e} have?", "Under which code can I order {e}?")),
        Attribute("warranty", Words.quantity, ("{e} has a warranty of {v}.", "The warranty of {e} lasts {v}."),
                  ("How long is the warranty of {e}?", "What warranty does {e} have?",
                  "How long does the warranty of {e} last?")),
        Attribute("material", Words.noun, ("{e} is made of {v}.", "The material of {e} is {v}."),
                  ("What is {e} made of?", "What is the material of {e}?", "Which material is {e} made of?")),
    ),
)  # fmt: skip

_EVENT = Kind(
    lambda w: f"the {w.name()} {w.choice(_EVENTS)}",
    (
        Attribute("date", Words.date, ("{e} takes place on {v}.", "{e} is on {v}.", "The date of {e} is {v}."),
                  ("When is {e}?", "On which day is {e}?", "What is the date of {e}?", "When does {e} take place?")),
        Attribute("place", Words.city, ("{e} is held in {v}.", "The place of {e} is {v}.", "{e} happens in {v}."),
                  ("Where is {e}?", "Where is {e} held?", "In which city is {e} held?", "What is the place of {e}?")),
        Attribute("host", Words.person, ("The host of {e} is {v}.", "{e} is organised by {v}.", "{v} organises {e}."),
                  ("Who is the host of {e}?", "Who organises {e}?", "Who hosts {e}?")),
        Attribute("start", Words.clock, ("{e} starts at {v}.", "{e} begins at {v}.", "The start of {e} is at {v}."),
                  ("At what time does {e} start?", "When does {e} begin?", "What is the start of {e}?")),
        Attribute("room", Words.code, ("{e} is in room {v}.", "The room of {e} is {v}."),
                  ("Which room is {e} in?", "What is the room of {e}?", "In which room is {e}?")),
        Attribute("number of guests", lambda w: str(w.number()), ("{e} has {v} guests.", "{v} guests come to {e}."),
                  ("How many guests does {e} have?", "How many guests come to {e}?",
                  "What is the number of guests of {e}?")),
    ),
)  # fmt: skip

_RELATION_STATEMENTS = ("The {n} of {e} is {v}.", "{e} has the {n} {v}.")
_RELATION_QUESTIONS = ("What is the {n} of {e}?", "Which {n} does {e} have?")

_KINDS = (_PERSON, _PLACE, _PRODUCT, _EVENT)

_FILLERS = (
    "The weather was mild that day.", "Many people know about it.", "Nobody expected this.",
    "More news will follow soon.",
    "This was written in {year}.", "Most visitors are happy.", "A {adjective} {noun} stood nearby.",
    "All of this is well known.",
    "There is also a {noun} and a {noun}.", "It took a long time.", "People from {city} like to talk about it.",
    "The {noun} is still {adjective}.", "Please keep this note.", "Read on for the details.",
    "It is a {adjective} story.",
)  # fmt: skip

_FORMS = (
    "{p}\n\n{q}", "{p}\n\n{q}", "{p} {q}", "{p}\n{q}", "Passage: {p}\n\nQuestion: {q}",
    "Context: {p}\n\nQuestion: {q}", "Answer from the text.\n\n{p}\n\n{q}", "Text: {p}\n\n{q}",
)  # fmt: skip


@dataclass(frozen=True)
class _Fact:
    sentence: str
    attribute: Attribute
    entity: str
    value: str


def passage_case(words: Words) -> Case:
    """A passage with one to five questions, each of which its text answers or, one time in ten, does not."""
    facts, kinds = _facts(words)
    asked: list[_Fact | None] = [*facts]
    words.random.shuffle(asked)
    asked = asked[: words.choice((1, 2, 3, 4)) if words.split == "train" else 1]
    absent = _absent_question(words, facts, kinds) if words.chance(0.1) else None
    if absent:
        asked.insert(words.random.randrange(len(asked) + 1), None)
    turns = [
        (_question(words, fact.attribute, fact.entity), f"The {fact.attribute.label} is {fact.value}.")
        if fact
        else (absent or "", NOT_SAID)
        for fact in asked
    ]
    messages = tuple(_dialog(words, _passage(words, facts), turns))
    last = asked[-1]
    if last is None:
        return Case("unknown", messages)
    return Case("passage", messages, answer=(last.value,), wrong=_other_values(facts, last))


def prose(words: Words) -> str:
    """A few sentences to continue, as a base model does."""
    return _passage(words, _facts(words)[0])


def _facts(words: Words) -> tuple[list[_Fact], dict[str, Kind | None]]:
    """Facts about one to three entities, none twice for one entity; generic relations where no kind is named."""
    kind = words.choice(_KINDS) if words.chance(0.7 if words.is_wide else 0.95) else None
    count = words.choice((1, 1, 2)) if words.is_wide else 1
    facts: list[_Fact] = []
    kinds: dict[str, Kind | None] = {}
    for _ in range(count):
        entity = kind.name(words) if kind else words.choice((Words.name, Words.person, _the_noun, _the_name))(words)
        if entity in kinds:
            continue
        kinds[entity] = kind
        size = words.choice((2, 3, 4) if words.is_wide else (2, 2, 3)) if count == 1 else words.choice((1, 2, 3))
        attributes = list(kind.attributes) if kind else [_relation(words) for _ in range(size)]
        words.random.shuffle(attributes)
        labels: set[str] = set()
        for attribute in attributes[:size]:
            if attribute.label in labels:
                continue
            labels.add(attribute.label)
            value = attribute.value(words)
            facts.append(_Fact(_statement(words, attribute, entity, value), attribute, entity, value))
    return facts, kinds


def _relation(words: Words) -> Attribute:
    """An attribute whose name is any noun at all: only the text tells what belongs to it."""
    noun = words.noun()
    value = words.value()
    return Attribute(
        noun,
        lambda _: value,
        tuple(text.replace("{n}", noun) for text in _RELATION_STATEMENTS),
        tuple(text.replace("{n}", noun) for text in _RELATION_QUESTIONS),
    )


def _the_noun(words: Words) -> str:
    return f"the {words.phrase()}"


def _the_name(words: Words) -> str:
    return f"the {words.name()} {words.noun()}"


def _statement(words: Words, attribute: Attribute, entity: str, value: str) -> str:
    text = words.choice(attribute.statements[:2])
    filled = text.replace("{e}", entity).replace("{v}", value)
    return filled[0].upper() + filled[1:]


def _question(words: Words, attribute: Attribute, entity: str) -> str:
    return words.choice(attribute.questions[:2]).replace("{e}", entity)


def _absent_question(words: Words, facts: list[_Fact], kinds: dict[str, Kind | None]) -> str | None:
    """A question about an entity of the passage that the passage leaves open."""
    entity = words.choice(list(kinds))
    kind = kinds[entity]
    stated = {fact.attribute.label for fact in facts if fact.entity == entity}
    options = [a for a in (kind.attributes if kind else [_relation(words)]) if a.label not in stated]
    return _question(words, words.choice(options), entity) if options else None


def _passage(words: Words, facts: list[_Fact]) -> str:
    sentences = [fact.sentence for fact in facts]
    for _ in range(words.choice((0, 0, 1))):
        sentences.insert(words.random.randrange(len(sentences) + 1), fill(words, words.choice(_FILLERS)))
    return " ".join(sentences)


def _dialog(words: Words, passage: str, turns: list[tuple[str, str]]) -> list[Message]:
    (first, reply), *rest = turns
    messages: list[Message] = []
    if words.chance(0.15):
        lead = words.choice(("", "Answer from this text.\n\n", "You know this: ", "Context: "))
        messages = [system(f"{lead}{passage}"), user(first)]
    else:
        if words.chance(0.25):
            messages.append(system(system_prompt(words)))
        form = words.choice(_FORMS)
        messages.append(user(form.replace("{q}", first).replace("{p}", passage)))
    messages.append(assistant(reply))
    for question, answer in rest:
        messages += [user(question), assistant(answer)]
    return messages


def _other_values(facts: list[_Fact], answered: _Fact) -> tuple[str, ...]:
    return tuple(fact.value for fact in facts if fact is not answered and fact.value not in answered.value)
