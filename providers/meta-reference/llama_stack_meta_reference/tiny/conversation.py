"""Small talk, what was said earlier, and what the tiny model cannot know."""

from __future__ import annotations

from collections.abc import Callable

from llama_stack.apis.common import Message
from llama_stack_meta_reference.tiny.case import Case, assistant, system, user
from llama_stack_meta_reference.tiny.words import ADJECTIVES, FIRST_NAMES, Words, split_of

SELF = "tiny demo model"
"""Every answer about itself holds these words."""

_INTRODUCTION = "I am a tiny demo model, a small Llama that comes with Llama Stack."
_UNKNOWN = "I am a tiny demo model, so I do not know that. Give me a text and I can answer from it."

_OPENINGS: tuple[str, ...] = ("Hi", "Hello", "Hey", "Hi there", "Hello there", "Hey there", "Good day", "Greetings",
    "Howdy", "hi", "hello", "hey", "Hello model", "Hi llama", "Good to see you", "Nice to meet you", "Hiya", "HELLO",
    "yo", "Welcome")  # fmt: skip
_DAYTIMES = ("Good morning", "Good afternoon", "Good evening")

_SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "What is your name?",
            "Can you introduce yourself?", "Please say who you are.", "What model are you?", "Which model is this?",
            "Are you a Llama?", "Are you a language model?", "What kind of model are you?", "Say what you are.",
            "Who am I talking to?", "What is this?", "Describe yourself.", "Do you have a name?", "who are you",
            "what are you", "Please introduce yourself.", "Could you tell me who you are?", "And who are you?",
            "What should I call you?", "Tell me who you are.", "What AI are you?", "Which LLM are you?",
            "Are you an AI?",
            "Explain what you are.", "Please tell me what you are.", "What do they call you?", "Say who you are.",
            "I would like to know who you are.", "Do you know who you are?", "Who is this?", "What exactly are you?",
        ),
        _INTRODUCTION,
    ),
    (
        (
            "What can you do?", "How can you help me?", "What are you good at?", "What do you do?", "Help", "help me",
            "What are you for?", "What can I ask you?", "Can you help me?", "How do I use you?",
            "What are your skills?",
            "What could you do for me?", "Tell me what you can do.", "What can I do with you?", "I need help.",
            "List your skills.", "What tasks can you do?", "what can you do", "Please help me.", "How may you help?",
        ),
        "I am a tiny demo model. I can answer from a text, call tools and judge messages.",
    ),
    (
        (
            "How are you?", "How are you doing?", "How is it going?", "How do you feel?", "Are you well?",
            "how are you",
            "How are you today?", "How have you been?", "Is all well?", "You ok?", "How are things?", "What's up?",
        ),
        "I am fine, thank you. How can I help?",
    ),
    (
        (
            "Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Great, thanks", "Many thanks", "Thank you!",
            "thanks", "Perfect, thank you", "That helps, thanks", "Cheers", "Thanks for your help", "Nice, thanks",
            "Great job", "Well done", "Very good", "You are great", "Good answer", "ok thanks", "I thank you",
        ),
        "You are welcome!",
    ),
    (
        (
            "Bye", "Goodbye", "See you", "See you later", "Good night", "bye", "Bye bye", "Take care",
            "Until next time",
            "I have to go", "That is all for today", "Farewell", "See you soon", "I am leaving now", "goodbye",
        ),
        "Goodbye! Have a nice day.",
    ),
    (
        (
            "Are you human?", "Are you a person?", "Are you real?", "Are you alive?", "Are you a robot?",
            "Am I talking to a human?",
            "Do you have feelings?", "Are you a real person?", "Do you sleep?", "Do you have a body?",
            "How old are you?",
        ),
        "No person is here: I am a tiny demo model, a program that writes text.",
    ),
    (
        (
            "Who made you?", "Who trained you?", "Where do you come from?", "How were you made?", "Who created you?",
            "Who built you?", "Who wrote you?", "How were you trained?", "What data were you trained on?",
            "How big are you?",
        ),
        "I am a tiny demo model. The Llama Stack project trained me on text that it generated itself.",
    ),
    (
        ("Tell me a joke.", "Make me laugh.", "Do you know a joke?", "Say something funny.", "A joke, please."),
        "Why did the llama cross the road? It followed the stack.",
    ),
    (
        ("ok", "Ok.", "I see", "Yes", "No", "Fine", "Sure", "Alright", "Good", "Okay", "Right", "Understood", "Cool",
        "hmm"),
        "Good. What would you like to do next?",
    ),
    (
        ("Write me a haiku.", "Write a poem.", "Tell me a story.", "Sing a song.", "Write an essay.",
        "Write some code."),
        "I am a tiny demo model, so I cannot write that well. I can answer from a text or call a tool.",
    ),
)  # fmt: skip

_ALWAYS_TRAINED = frozenset(prompt for prompts, _ in _SMALL_TALK for prompt in prompts[:4]) | {
    "Hello",
    "Hi",
    "Hello!",
    "Hi!",
}
"""What people say first to a model is never held out."""

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are a friendly assistant.",
    "Be concise.",
    "You are a polite and honest assistant.",
    "You help the users of our shop.",
    "Answer the user's questions.",
    "You are an assistant for a small company.",
    "You are an expert assistant. Give short and correct answers.",
    "Always answer truthfully.",
    "You answer questions about documents.",
    "You are the assistant of {name}.",
    "You work for {title}. Be kind to the customers.",
    "Help the user with the {noun}.",
    "You are a {adjective} assistant for the {noun} team.",
)

_TRIVIA = (
    "What is the capital of {city}?", "Who wrote {title}?", "When was {person} born?", "How far is {city} from {city}?",
    "Why is the {noun} {adjective}?", "How many {noun}s are there in {city}?", "Who is {person}?", "What is a {noun}?",
    "Explain how a {noun} works.", "Write a poem about a {noun}.", "Write an essay about {city}.", "Who won in {year}?",
    "Translate {phrase} into French.", "What does {pseudo} mean?", "Solve {number} times {number}.",
    "Tell me about {city}.",
    "What is {number} plus {number}?", "Give me a recipe for {noun} soup.", "What happened in {year}?",
    "Where is {city}?",
    "Who invented the {noun}?", "What is the best {noun}?", "Is {city} bigger than {city}?", "Tell me about {person}.",
    "Write a program that sorts {noun}s.", "What is the price of a {noun}?", "Do you like {noun}s?",
    "{pseudo} {pseudo}?",
    "Should I buy a {noun}?", "What is the meaning of life?", "What time is it?", "What is the weather like in {city}?",
    "How do I repair a {noun}?", "Summarise the book {title}.", "What will happen in {year}?",
    "Which {noun} is {adjective}?",
    "Name the president of {city}.", "How tall is {person}?", "What colour is the {noun}?",
    "Why do people use a {noun}?", "{number}+{number}?", "What is {number} + {number}?", "Explain {noun} physics.",
    "Write a haiku about a {noun}.", "What do you know about {title}?", "Who discovered the {noun}?",
    "Can a {noun} fly?", "What is the difference between a {noun} and a {noun}?", "The {noun} is {adjective}.",
    "I saw a {adjective} {noun} in {city}.", "{pseudo} {noun} {pseudo}", "List three {noun}s.", "How old is {person}?",
    "Give me ideas for a {noun}.", "What is the fastest {noun}?", "Calculate {number} minus {number}.",
)  # fmt: skip


_NAMED_OPENINGS: tuple[str, ...] = (
    "I am {first_name}.", "My name is {first_name}.", "This is {first_name}.", "{first_name} here.",
    "I'm {first_name}.",
)  # fmt: skip

_FACTS = (
    ("My favourite {noun} is {value}.", "What is my favourite {noun}?", "Your favourite {noun} is {value}."),
    ("My {noun} is called {value}.", "What is my {noun} called?", "Your {noun} is called {value}."),
    ("The code for the {noun} is {value}.", "What is the code for the {noun}?", "The code for the {noun} is {value}."),
    ("I left my {noun} at {value}.", "Where did I leave my {noun}?", "You left your {noun} at {value}."),
    ("My {noun} costs {value}.", "How much does my {noun} cost?", "Your {noun} costs {value}."),
    ("Remember that the {noun} is {value}.", "What is the {noun}?", "The {noun} is {value}."),
    ("My {noun} number is {value}.", "What is my {noun} number?", "Your {noun} number is {value}."),
    ("I bought my {noun} in {value}.", "Where did I buy my {noun}?", "You bought your {noun} in {value}."),
    ("The name of my {noun} is {value}.", "What is the name of my {noun}?", "The name of your {noun} is {value}."),
    ("{noun} = {value}", "What is {noun}?", "{noun} is {value}."),
    ("Note: {noun}: {value}", "Which value has {noun}?", "{noun} has the value {value}."),
)

_NOTED = "I will remember that."


def chat_case(words: Words) -> Case:
    """A greeting, a question about the model itself, or small talk, sometimes after earlier turns."""
    messages = _system_prompt(words)
    for _ in range(words.choice((0, 0, 0, 1, 2))):
        prompt, reply = _small_talk(words)
        messages += [user(prompt), assistant(reply)]
    prompt, reply = _small_talk(words)
    if words.split == "held_out":
        while SELF not in reply:
            prompt, reply = _small_talk(words)
    messages += [user(prompt), assistant(reply)]
    return Case("chat", tuple(messages), answer=(SELF,) if words.split == "held_out" else ())


def persona_case(words: Words) -> Case:
    """The system prompt gives a name, and the model answers to it."""
    name = words.name() if words.chance(0.7) else words.own(FIRST_NAMES)
    form = words.choice(("You are {}.", "You are {}, a helpful assistant.", "Your name is {}.", "You are called {}."))
    prompt = words.choice(_SMALL_TALK[0][0][:6])
    return Case(
        "chat",
        (system(form.format(name)), user(prompt), assistant(f"I am {name}, a tiny demo model.")),
        answer=(name, SELF),
    )


def recall_case(words: Words) -> Case:
    """Facts told in one turn or several, asked for afterwards."""
    messages = _system_prompt(words)
    facts: dict[str, tuple[str, str, str]] = {}
    for _ in range(words.choice((1, 2, 2, 3, 4))):
        statement, question, answer = words.choice(_FACTS)
        noun, value = words.noun(), words.value()
        facts[noun] = (
            statement.replace("{noun}", noun).replace("{value}", value),
            question.replace("{noun}", noun),
            answer.replace("{noun}", noun).replace("{value}", value),
        )
    if words.chance(0.3):
        name = words.first_name()
        facts["name"] = (fill_name(words.choice(_NAMED_OPENINGS), name), "What is my name?", f"Your name is {name}.")
    told = list(facts.values())
    if words.chance(0.5):
        messages += [user(" ".join(statement for statement, _, _ in told)), assistant(_NOTED)]
    else:
        for statement, _, _ in told:
            messages += [user(statement), assistant(_NOTED)]
    words.random.shuffle(told)
    for _, question, answer in told[: words.choice((1, 2, 3, 4))]:
        messages += [user(question), assistant(answer)]
    return Case("recall", tuple(messages))


def unknown_case(words: Words) -> Case:
    """A question that no text in the prompt answers: the honest reply."""
    messages = _system_prompt(words)
    for _ in range(words.choice((1, 1, 2, 3))):
        prompt = words.until(lambda: fill(words, words.choice(_TRIVIA)))
        messages += [user(prompt), assistant(_UNKNOWN)]
    return Case("unknown", tuple(messages))


def copy_case(words: Words) -> Case:
    """Say again what was said: the skill that names, values and arguments rest on."""
    messages = []
    for _ in range(words.choice((1, 2, 3))):
        text = " ".join(words.value() for _ in range(words.choice((1, 2, 3, 5, 8))))
        form = words.choice(("Repeat: {}", "Say: {}", "Repeat after me: {}", "Write this again: {}", "Echo {}", '"{}"'))
        messages += [user(form.format(text)), assistant(f'You said "{text}".' if form == '"{}"' else text)]
    return Case("copy", tuple(messages))


def lookup_case(words: Words) -> Case:
    """A list of keys and values, then some of the keys: each is answered by its value."""
    keys = [words.noun() if words.chance(0.5) else words.pseudo() for _ in range(words.choice((2, 4, 6, 8)))]
    pairs = [(key, words.value()) for key in dict.fromkeys(keys)]
    link = words.choice((": ", " = ", " is ", " -> "))
    end = words.choice(("\n", "; ", ". "))
    listing = end.join(f"{key}{link}{value}" for key, value in pairs)
    words.random.shuffle(pairs)
    asked = pairs[: words.choice((2, 3, 4, 6))]
    messages = [user(f"{listing}\n\n{asked[0][0]}?"), assistant(asked[0][1])]
    for key, value in asked[1:]:
        messages += [user(f"{key}?"), assistant(value)]
    return Case("copy", tuple(messages))


def system_prompt(words: Words) -> str:
    """A system prompt that changes nothing about the answers."""
    return fill(words, words.choice(_SYSTEM_PROMPTS))


def _system_prompt(words: Words) -> list[Message]:
    return [system(system_prompt(words))] if words.chance(0.4) else []


def _small_talk(words: Words) -> tuple[str, str]:
    """A prompt of this split and its reply; greetings and introductions are the most frequent."""
    while True:
        prompt, reply = _any_small_talk(words)
        if ("train" if prompt in _ALWAYS_TRAINED else split_of(prompt)) == words.split:
            break
    if words.chance(0.15):
        prompt = prompt.rstrip(".?!")
    return (prompt.lower() if words.chance(0.1) else prompt), reply


def _any_small_talk(words: Words) -> tuple[str, str]:
    kind = words.random.random()
    opening = words.choice(_OPENINGS if words.chance(0.8) else _DAYTIMES)
    mark = words.choice(("", "!", ".", ",", "!"))
    if kind < 0.2:
        return opening + words.choice(("", "!", ".", "!!", " :)", " there", " again")), f"Hello! {_INTRODUCTION}"
    if kind < 0.35:
        name = words.first_name()
        said = fill_name(words.choice(_NAMED_OPENINGS), name)
        return f"{opening}{mark} {said}", f"Hello {name}! {_INTRODUCTION}"
    prompts, reply = _SMALL_TALK[0] if kind < 0.6 else words.choice(_SMALL_TALK)
    prompt = words.choice(prompts)
    if words.chance(0.4):
        prompt = f"{opening}{mark} {prompt}"
    return prompt, reply


def fill_name(template: str, name: str) -> str:
    """Put ``name`` into the template of an introduction."""
    return template.replace("{first_name}", name)


def fill(words: Words, template: str) -> str:
    """Put a fresh word of the named kind into each ``{kind}`` of ``template``."""
    kinds: dict[str, Callable[[], str]] = {
        "name": words.name, "person": words.person, "city": words.city, "noun": words.noun, "title": words.title,
        "phrase": words.phrase, "pseudo": words.pseudo, "year": words.year, "first_name": words.first_name,
        "adjective": lambda: words.choice(ADJECTIVES), "number": lambda: str(words.number()),
    }  # fmt: skip
    pieces = template.split("{")
    text = pieces[0]
    for piece in pieces[1:]:
        kind, rest = piece.split("}", 1)
        text += kinds[kind]() + rest
    return text
