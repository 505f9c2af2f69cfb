r"""The grammar of compel's dialect: a text becomes nodes, by the alternatives and the order of the library's parser.

Its library reads like this: alternatives in their order, without going back to one that matched; spaces may stand
before whatever isn't said to follow at once.
"""

import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ldm.text.prompts.phrases import bounded

UP, DOWN = 1.1, 0.9
SPACES = " \n\t\r"
SYNTAX = '()",.+-='
NUMBER = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+)|-?\d+", re.A)
KEYWORD = re.compile(r"[-\w]+", re.A)
QUOTED = re.compile(r'"((?:\\"|[^"\n\r])*)"')
WORD = re.compile(
    rf"(?:\\[{re.escape(SYNTAX)}]|[+-](?![{SPACES}{re.escape(SYNTAX)}]|\Z)|-?[0-9]+"
    rf"|[^{re.escape(string.whitespace + SYNTAX)}])+"
)
FREE = re.compile(rf"[^{string.whitespace}]+")


class Node(NamedTuple):
    """A part of a prompt: its kind, how it is written, and what is inside; `weight` multiplies that of all inside."""

    kind: str  # "word", "group", "swap" or "lora"
    raw: str
    inside: tuple["Node", ...] = ()
    weight: float = 1.0


class Reader:
    """The grammar over one text. Each rule is given a position, and answers (what it read, where it ends) or None."""

    def __init__(self, text: str):
        self.text, self.known = text, {}

    def at(self, rule: Callable, start: int) -> tuple | None:
        """A rule's answer, worked out once: alternatives that begin alike would double the work at each bracket."""
        key = (rule.__name__, start)
        if key not in self.known:
            self.known[key] = rule(start)
        return self.known[key]

    def skip(self, start: int) -> int:
        while start < len(self.text) and self.text[start] in SPACES:
            start += 1
        return start

    def sign(self, sign: str, start: int) -> int | None:
        """The end of a sign, before which there may be spaces."""
        start = self.skip(start)
        return start + len(sign) if self.text.startswith(sign, start) else None

    def signs(self, start: int, *signs: str) -> int | None:
        for sign in signs:
            start = None if start is None else self.sign(sign, start)
        return start

    def first(self, rules: Sequence[Callable], start: int) -> tuple | None:
        return next((found for rule in rules if (found := self.at(rule, start)) is not None), None)

    def many(self, rules: Sequence[Callable], start: int) -> tuple[list[Node], int]:
        nodes = []
        while (found := self.first(rules, start)) is not None:
            nodes.append(found[0])
            start = found[1]
        return nodes, start

    # -------------------------------------------------------------------------------- words, brackets, quotes

    def word(self, start: int) -> tuple | None:
        found = WORD.match(self.text, self.skip(start))
        return found and (Node("word", found[0]), found.end())

    def free(self, start: int) -> tuple | None:
        """Anything up to the next space."""
        found = FREE.match(self.text, self.skip(start))
        return found and (Node("word", found[0]), found.end())

    def point(self, start: int) -> tuple | None:
        start = self.skip(start)
        return (Node("word", self.text[start]), start + 1) if self.text[start : start + 1] in (",", ".") else None

    def bracketed(self, start: int) -> tuple | None:
        start = self.skip(start)
        if self.sign("(", start) is None:
            return None
        nodes, end = self.many(self.inside + (self.point,), start + 1)
        end = self.sign(")", end)
        return None if end is None else (Node("group", self.text[start:end], tuple(nodes)), end)

    def quoted(self, start: int) -> tuple | None:
        return self.quotes(start, lambda reader: reader.inside + (reader.point,))

    def quoted_prompt(self, start: int) -> tuple | None:
        """Quotes around what only a whole prompt may hold."""
        return self.quotes(start, lambda reader: reader.anything)

    def quotes(self, start: int, rules: Callable) -> tuple | None:
        found = QUOTED.match(self.text, self.skip(start))
        if found is None:
            return None
        text = re.sub(r"\\[tnfr]", " ", found[1])
        if not text.strip():
            return Node("group", found[0], (Node("word", ""),)), found.end()
        reader = Reader(re.sub(r'\\?"', r"\"", text))  # quotes inside are signs
        nodes, end = reader.many(rules(reader), 0)
        return None if reader.skip(end) < len(reader.text) else (Node("group", found[0], tuple(nodes)), found.end())

    # -------------------------------------------------------------------------------- weights and operators

    @property
    def targets(self) -> tuple[Callable, ...]:
        """What an operator may stand behind."""
        return self.quoted, self.bracketed, self.word

    @property
    def inside(self) -> tuple[Callable, ...]:
        """What may stand inside brackets, commas and full stops aside."""
        return self.lora, self.weighted, self.swapped, self.bracketed, self.quoted, self.word

    @property
    def anything(self) -> tuple[Callable, ...]:
        """What a prompt is made of."""
        return self.swapped, self.lora, self.weighted, self.quoted, self.bracketed, self.free

    def amount(self, start: int, numbers: bool = True) -> tuple[float, int] | None:
        """A weight: signs or a number."""
        sign = self.text[start : start + 1]
        if sign and sign in "+-":
            end = start
            while self.text[end : end + 1] == sign:
                end += 1
            power = min(end - start, 200)  # 1.1 ** 200 is beyond `phrases.MOST` by far
            return bounded((UP if sign == "+" else DOWN) ** power), end
        found = NUMBER.match(self.text, start) if numbers else None
        return found and (bounded(float(found[0])), found.end())

    def weighted(self, start: int) -> tuple | None:
        """`(...).attend(1.3)`, `(...)1.3`, `word++`."""
        start = self.skip(start)
        if (target := self.first(self.targets, start)) is not None:
            opened = self.signs(target[1], ".attend", "(")
            amount = None if opened is None else self.amount(self.skip(opened))
            end = None if amount is None else self.sign(")", amount[1])
            if end is not None:
                return Node("group", self.text[start:end], (target[0],), amount[0]), end
        for rules, numbers in ((self.targets[:2], True), (self.targets[2:], False)):
            if (target := self.first(rules, start)) is not None:
                if (amount := self.amount(target[1], numbers)) is not None:
                    return Node("group", self.text[start : amount[1]], (target[0],), amount[0]), amount[1]
        return None

    def swapped(self, start: int) -> tuple | None:
        start = self.skip(start)
        target = self.first(self.targets, start)
        end = None if target is None else self.signs(target[1], ".swap", "(")
        if end is None:
            return None
        _, end = self.many(self.inside, end)
        if (comma := self.sign(",", end)) is not None:
            end = self.options(comma)[1]
        end = self.sign(")", end)
        return None if end is None else (Node("swap", self.text[start:end], (target[0],)), end)

    def lora(self, start: int) -> tuple | None:
        start = self.skip(start)
        found = re.compile("useLora|withLora").match(self.text, start)
        opened = found and self.sign("(", found.end())
        name = opened and KEYWORD.match(self.text, self.skip(opened))
        if not name:
            return None
        end = name.end()
        if (comma := self.sign(",", end)) is not None and (number := NUMBER.match(self.text, self.skip(comma))):
            end = number.end()
        end = self.sign(")", end)
        return None if end is None else (Node("lora", self.text[start:end]), end)

    def options(self, start: int) -> tuple[list[str], int]:
        """Numbers, words and `word=value` between commas; of the last the word alone."""
        found, comma = [], start
        while comma is not None:
            at = self.skip(comma)
            word, number = KEYWORD.match(self.text, at), NUMBER.match(self.text, at)
            equals = self.sign("=", word.end()) if word else None
            value = equals and re.compile(f"{NUMBER.pattern}|{KEYWORD.pattern}", re.A).match(
                self.text, self.skip(equals)
            )
            if not (value or number or word):
                break
            found.append((word if value else number or word)[0])
            start = (value or number or word).end()
            comma = self.sign(",", start)
        return found, start

    def operator(self, *names: str) -> tuple[list[Node], list[str], int] | None:
        """`("...", "...").name(options)` at the beginning: its targets, its options, its end."""
        targets, comma = [], self.sign("(", self.skip(0))
        end = None
        while comma is not None:
            found = self.first((*self.targets, self.quoted_prompt), comma)
            if found is None:
                break
            targets.append(found[0])
            end = found[1]
            comma = self.sign(",", end)
        end = None if end is None else self.sign(")", end)
        opened = next((at for name in names if end is not None and (at := self.signs(end, name, "("))), None)
        if opened is None:
            return None
        options, end = self.options(opened)
        end = self.sign(")", end)
        return None if end is None else (targets, options, end)
