"""What a user should know of a prompt before it is drawn: signs without a meaning in its dialect, what isn't done."""

import re

from ldm.text.prompts import compel, schedules
from ldm.text.prompts.compel import shortened
from ldm.text.tokenizer import Tokenizer

# What in a plain prompt looks like a dialect's: (a sign, whose it is), the first that is found is told.
STAGES = re.compile(r"\[[^\[\]:|]*(?:\|[^\[\]:|]*)+\]|\[(?:[^\[\]:]*:){1,2}\s*[.\d]+\s*\]")
LOOKS = (
    (re.compile(r"\([^()]*:\s*[+-]?[.\d]+\s*\)"), "a1111"),
    (re.compile(r"\bBREAK\b"), "a1111"),
    (STAGES, "a1111"),
    (re.compile(r"(?:\w+|[)\"])(?:\+\++|--+)(?![\w+-])|\)(?:[+-]|\d*\.\d+)"), "compel"),
    (re.compile(r"\)\.(?:and|blend|swap|attend)\("), "compel"),
)
AND = re.compile(r"\bAND\b")
LORA = re.compile(r"<lora:[^<>]*>")


def notices(prompt: str, dialect: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Sentences, each a line; `tokenizer` tells whether a plain prompt is too long. Raises LDMError for no text."""
    ids = tokenizer.encode(prompt)
    if dialect == "compel":
        return compel.parse(prompt).notices
    found = []
    if dialect == "plain":
        for looks, name in LOOKS:
            if sign := looks.search(prompt):
                mark = shortened(sign[0])
                found.append(
                    f"{mark!r} is read as it stands; dialect={name!r} (--dialect {name}) reads it as {name} does."
                )
                break
        if len(ids) > tokenizer.max_length - 2:
            found.append("Longer prompts are read in chunks with dialect='a1111' (--dialect a1111).")
    elif AND.search(prompt):
        found.append("AND is read as a word: for several prompts at once there is ldm.guidance.all_of.")
    if dialect == "a1111" and schedules.nodes_of(prompt) is None and STAGES.search(prompt):
        found.append(
            "The prompt is the same at every step, for it has a | outside of [a|b], a backslash at its end, or too "
            f"many brackets in each other: {shortened(prompt)!r}."
        )
    if sign := LORA.search(prompt):
        found.append(f"{shortened(sign[0])!r} is read as words: add a LoRA to the model (pipe.add_lora, --lora).")
    return tuple(found)
