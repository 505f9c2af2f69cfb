r"""The dialect of AUTOMATIC1111's web UI (1.10): a prompt becomes sections of weighted phrases.

1. `(w)` multiplies the weight of what stands inside by 1.1, `[w]` divides it by 1.1, `(w:1.2)` multiplies it by 1.2.
   They may be nested: `((w))` is 1.21.
2. `\(`, `\)`, `\[`, `\]` and `\\` are those signs themselves. A backslash before anything else is dropped.
3. An opening bracket that is never closed counts up to the end of the prompt, by 1.1 or its inverse. A closing one that
   was never opened is a sign among the words, and so is `:1.2)` without its bracket.
4. A number is a sign, and digits and points; before and behind it there may be spaces. `(w:1.2.3)`, at which the web
   UI stops, and numbers beyond 1000 are words: the bracket then counts 1.1. Products end at 1000.
5. `BREAK`, in capitals and a word of its own, ends a chunk: what follows begins the next. Spaces around it go. (In the
   web UI a BREAK inside brackets becomes a word of negative weight; here it breaks, and the brackets go on behind it.)
6. Neighbours of one weight are one phrase. Each is turned into tokens by itself. (In the web UI a phrase of another
   weight without a letter, `a(\:1.2)b`, parts its neighbours; here they are one word.)

What is in chunks, and how they are weighed, stands in `ldm.text.prompts.chunks` and `.weighing`; `[a:b:0.5]` and
`[a|b]` in `.schedules`, which comes first: what it doesn't know as such is left in the text for these rules.
The web UI's `AND` and `<lora:...>` are not among the rules: they are words, and a line says so.
"""

import re
from collections.abc import Sequence

from ldm.text.prompts.phrases import Phrase, as_number, bounded, in_digits

UP, DOWN = 1.1, 1 / 1.1
SIGNS = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\s*\bBREAK\b\s*")

Section = tuple[Phrase, ...]  # what stands between two BREAKs


def parse(text: str) -> tuple[Section, ...]:
    """The sections of a prompt. Any string is one: there is always a section, if without phrases."""
    found: list[list] = []  # [text, weight], and [None, 1.0] for each BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(first: int, factor: float) -> None:
        for each in found[first:]:
            each[1] = bounded(each[1] * factor)

    for match in SIGNS.finditer(text):
        sign, number = match[0], match[1]
        factor = None if number is None or not opened["("] else as_number(number)
        if sign in opened:
            opened[sign].append(len(found))
        elif sign.startswith("\\"):
            found.append([sign[1:], 1.0])
        elif factor is not None:
            multiply(opened["("].pop(), factor)
        elif number is not None and opened["("]:
            found.append([sign[:-1], 1.0])
            multiply(opened["("].pop(), UP)
        elif sign == ")" and opened["("]:
            multiply(opened["("].pop(), UP)
        elif sign == "]" and opened["["]:
            multiply(opened["["].pop(), DOWN)
        else:
            for k, part in enumerate(BREAK.split(sign)):
                found += [[None, 1.0]] * (k > 0) + [[part, 1.0]]
    for first in opened["("]:
        multiply(first, UP)
    for first in opened["["]:
        multiply(first, DOWN)
    return in_sections(found)


def in_sections(found: Sequence[Sequence]) -> tuple[Section, ...]:
    """Cut at the breaks, and neighbours of one weight put together."""
    sections: list[list[Phrase]] = [[]]
    for text, weight in found:
        section = sections[-1]
        if text is None:
            sections.append([])
        elif section and section[-1].weight == weight:
            section[-1] = Phrase(section[-1].text + text, weight)
        elif text:
            section.append(Phrase(text, weight))
    return tuple(map(tuple, sections))


def write(sections: Sequence[Section]) -> str:
    """A prompt that says the same: `parse` makes these very sections of it."""
    return " BREAK ".join("".join(map(written, section)) for section in sections)


def written(phrase: Phrase) -> str:
    escaped = re.sub(r"[()\[\]\\]", r"\\\g<0>", phrase.text)
    escaped = re.sub(r"\bBREAK\b", r"BRE\\AK", escaped)  # a lone backslash is dropped: words, and no break
    bare = phrase.weight == 1 and escaped == escaped.strip()  # spaces beside a BREAK would go
    return escaped if bare else f"({escaped}:{in_digits(phrase.weight)})"
