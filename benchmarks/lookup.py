"""How many tokens a step look-up decoding would gain on texts that repeat their prompts, without running a network.

    python benchmarks/lookup.py

Each pair is a prompt and the answer that a good model would give: code that is edited, JSON that is filtered or gets
other keys, questions answered by quotation, and one that repeats nothing. The answer is taken as what the network
picks, so the table is the same on every machine. What a step with guesses costs beside one without is for repeats.py.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from llama_stack_meta_reference.inference.drafting import PromptLookup
from llama_stack_meta_reference.llama.checkpoint import open_checkpoint
from llama_stack_meta_reference.llama.tokenizer import load_tokenizer
from llama_stack_meta_reference.tiny.__main__ import CHECKPOINT
from repeats import LOOKUP_TOKENS

_ROOT = Path(__file__).parents[1]
_LETTERS = 9000


def pairs() -> dict[str, tuple[str, str]]:
    """Prompt and answer, by name."""
    draw = random.Random(1)
    code = (_ROOT / "llama_stack" / "stack.py").read_text()[:_LETTERS]
    records = [
        {
            "id": draw.randrange(10**6),
            "name": draw.choice(("Anna Smith", "Bert Li", "Carla Jones")),
            "is_paid": i % 2 == 0,
        }
        for i in range(40)
    ]
    paragraphs = [p for p in (_ROOT / "docs" / "architecture.md").read_text().split("\n\n") if len(p) > 300][:12]
    quotations = (re.split(r"(?<=[.]) ", paragraph.replace("\n", " "))[0] for paragraph in paragraphs)
    return {
        "code with a name changed": (code, code.replace("provider", "supplier")),
        "JSON, some of the records": (json.dumps(records, indent=1), json.dumps(records[::2], indent=1)),
        "JSON, with other keys": (
            json.dumps(records, indent=1),
            json.dumps([{"number": record["id"], "full_name": record["name"]} for record in records]),
        ),
        "questions answered by quotation": (
            "\n\n".join(paragraphs),
            " ".join(f"The text says: {quotation} So that is why." for quotation in quotations),
        ),
        "another text": (code, "\n\n".join(paragraphs)),
    }


def look_up(prompt: list[int], answer: list[int]) -> tuple[int, int, int]:
    """Steps for the answer's tokens after the first, tokens guessed, and guessed rightly."""
    lookup, text, steps, drafted, accepted = PromptLookup(), [*prompt, answer[0]], 0, 0, 0
    while (at := len(text) - len(prompt)) < len(answer):
        guess = lookup.propose(text, min(LOOKUP_TOKENS, len(answer) - at - 1))
        right = next((i for i, token in enumerate(guess) if token != answer[at + i]), len(guess))
        text += answer[at : at + right + 1]
        steps, drafted, accepted = steps + 1, drafted + len(guess), accepted + right
        if guess:
            lookup.learn(len(guess), right)
    return steps, drafted, accepted


def main() -> None:
    """Print the table."""
    tokenizer = load_tokenizer(open_checkpoint(CHECKPOINT).tokenizer)
    print(f"up to {LOOKUP_TOKENS} guesses a step, the tiny model's tokens\n")
    print("| answer | tokens | tokens a step | tokens run a step | of the guesses right |\n|---|---|---|---|---|")
    for name, texts in pairs().items():
        prompt, answer = (tokenizer.encode(text) for text in texts)
        steps, drafted, accepted = look_up(prompt, answer)
        later = len(answer) - 1
        right = f"{accepted / drafted:.0%}" if drafted else ""
        print(f"| {name} | {len(answer)} | {later / steps:.2f} | {1 + drafted / steps:.2f} | {right} |")


if __name__ == "__main__":
    main()
