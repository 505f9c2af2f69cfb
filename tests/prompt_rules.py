"""The rules of the web UI's dialect once more, as plainly as they can be written; and prompts made by chance.

Nothing here is shared with `ldm.text.prompts`: where the two agree, each is right or both misread the rules.
"""

import re
from random import Random

BREAK = "BREAK"
SIGNS = ("(", ")", "[", "]", ":", "|", "\\", "\\(", "\\)", "\\[", "\\]", "\\\\", ":1.2)", ":.5)", ": 0.9 )", ":-1)")
WORDS = (
    "a",
    "red",
    "house",
    "on snow",
    ", ",
    ",",
    " ",
    " ",
    "é",
    "BREAK",
    " BREAK ",
    "xBREAK",
    "7",
    "0.5",
    ":3]",
    ":.4]",
)


def by_chance(count: int, seed: int) -> list[str]:
    """Prompts with brackets, escapes, numbers and BREAKs, balanced or not."""
    chance = Random(seed)
    whole = (
        "(red)",
        "((red house))",
        "[snow]",
        "(house:1.3)",
        "[a:b:0.5]",
        "[red|blue]",
        "([c:2]:1.1)",
        "[d::3]",
        "(a:b)",
    )
    kinds = (SIGNS + WORDS, WORDS + whole, SIGNS + WORDS + whole)
    return ["".join(chance.choice(chance.choice(kinds)) for _ in range(chance.randint(1, 22))) for _ in range(count)]


# ------------------------------------------------------------------------------------------ weights


def letters(text: str) -> list[tuple[str, float]]:
    """Every letter with its weight, by rules 1 to 5 of `ldm.text.prompts.a1111`; (BREAK, 1) for each break."""
    found, brackets, at = [], [], 0

    def close(kind: str, factor: float) -> bool:
        mine = [k for k, (sign, _) in enumerate(brackets) if sign == kind]
        if not mine:
            return False
        _, first = brackets.pop(mine[-1])
        for k in range(first, len(found)):
            found[k] = (found[k][0], found[k][1] * factor)
        return True

    while at < len(text):
        sign, rest = text[at], text[at:]
        number = re.match(r":[ \s]*([+-]?[.0-9]+)[ \s]*\)", rest)
        if sign == "\\":
            if rest[1:2] and rest[1] in "()[]\\":
                found.append((rest[1], 1.0))
                at += 1
            at += 1
        elif sign in "([":
            brackets.append((sign, len(found)))
            at += 1
        elif number and any(kind == "(" for kind, _ in brackets):
            try:
                close("(", float(number[1]))
            except ValueError:
                found += [(each, 1.0) for each in number[0][:-1]]
                close("(", 1.1)
            at += len(number[0])
        elif sign in ")]":
            if not close("(" if sign == ")" else "[", 1.1 if sign == ")" else 1 / 1.1):
                found.append((sign, 1.0))
            at += 1
        else:  # a run of letters without signs, in which breaks are looked for
            run = sign if sign == ":" else re.match(r"[^\\()\[\]:]+", rest)[0]
            at += len(run)
            if number and run == ":":  # without its bracket it is words, the bracket too
                run = number[0]
                at += len(run) - 1
            parts = re.split(r"\s*\bBREAK\b\s*", run)
            for k, part in enumerate(parts):
                found += [(BREAK, 1.0)] * (k > 0) + [(each, 1.0) for each in part]
    for kind, first in reversed(brackets):
        for k in range(first, len(found)):
            found[k] = (found[k][0], found[k][1] * (1.1 if kind == "(" else 1 / 1.1))
    return found


# ------------------------------------------------------------------------------------------ stages

OPEN, SHUT = "\ue000", "\ue001"  # signs that were seen to mean nothing, and those that are done with, as numbers
NUMBER = r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"


def at_step(prompt: str, step: int, steps: int) -> str:
    """The prompt at a step, by rules 1 to 6 of `ldm.text.prompts.schedules`: innermost brackets first."""
    if re.search(r"(?<!\\)(\\\\)*\\\Z", prompt):
        return prompt
    kept: list[str] = []

    def keep(text: str) -> str:
        kept.append(text)
        return f"{OPEN}{len(kept) - 1};"

    def stray(match: re.Match) -> str:
        return re.sub(r"[\[\]()]", lambda sign: SHUT + "[]()".index(sign[0]).__str__(), match[0])

    def resolve(match: re.Match) -> str:
        whole, inside = match[0], match[0][1:-1]
        colons, bars = inside.split(":"), inside.split("|")
        if "|" in inside and (whole[0] == "(" or ":" in inside):
            return stray(match)
        if "|" in inside:
            return bars[(step - 1) % len(bars)]
        if whole[0] == "(":
            return keep(whole) if len(colons) <= 2 else stray(match)
        if len(colons) == 1:
            return keep(whole)
        if len(colons) > 3 or not re.fullmatch(NUMBER, colons[-1]):
            return stray(match)
        number = float(colons[-1])
        last = min(steps, int(number * steps if "." in colons[-1] else number))
        before, after = colons[:-1] if len(colons) == 3 else ("", colons[0])
        return keep(before if step <= last else after) if step <= last or after else ""

    text = re.sub(r"\\.", lambda match: keep(match[0]), prompt, flags=re.S)
    inner = re.compile(rf"\[[^\[\](){SHUT}]*\]|\([^\[\](){SHUT}]*\)")
    while inner.search(text):
        text = inner.sub(resolve, text, count=1)
    if "|" in text:
        return prompt
    while OPEN in text:
        text = re.sub(rf"{OPEN}(\d+);", lambda match: kept[int(match[1])], text)
    return re.sub(rf"{SHUT}(\d)", lambda match: "[]()"[int(match[1])], text)
