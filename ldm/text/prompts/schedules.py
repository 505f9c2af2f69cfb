r"""Other words at other steps, as the web UI has it (`[a:b:0.5]`, `[a|b]`): a prompt becomes stages.

1. `[a:b:0.5]`   a for the first half of the steps that are run, then b. `[a:b:8]` a for the first 8 steps, then b: a
                 number with a point is a share, one without is a number of steps, and a share is cut to whole steps.
                 `[b:0.5]` and `[:b:0.5]`: b from there on. `[a::0.5]`: a until then.
2. `[a|b|c]`     a at the first step, b at the second, c at the third, a again at the fourth.
3. They may be nested, in each other and in the brackets of weights, `(`, `)`, `[`, `]`, which stay in the text.
   Between brackets of weights there may be one `:`, and none in `[w]`.
4. A backslash keeps the sign behind it from meaning anything, and stays in the text.
5. A bracket without its partner, and brackets that follow none of these rules, are signs; so are then all brackets
   that are open around them, for inside brackets only whole ones may stand.
6. A `|` outside of such brackets, a backslash at the end, or more than 100 brackets in each other: the prompt has no
   stages, and all of it is text. (The web UI's grammar doesn't know the first two, and gives up without a word.)

Of a run from a picture by strength the steps that are run count; a run of two models (`ldm.ensemble`) is one road.
(The web UI takes shares of all steps there, and counts from the first that is run: at strength 0.4 `[a:b:0.5]` is a.)
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Union

SIGNS = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.S)
NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")
DEEPEST = 100
CLOSES = {"]": "[", ")": "("}


class Switch(NamedTuple):
    """`before`, and behind the step that `number` names, `after`. Without a `before` it was never written."""

    before: tuple["Node", ...] | None
    after: tuple["Node", ...]
    number: str

    def last(self, steps: int) -> int:
        """The last of so many steps at which it is `before`, counted from 1; 0 or less: it never is."""
        value = float(self.number) * (steps if "." in self.number else 1)
        return int(min(value, steps)) if value > 0 else 0


class Turns(NamedTuple):
    """One after the other, step by step."""

    choices: tuple[tuple["Node", ...], ...]


Node = Union[str, Switch, Turns]  # noqa: UP007 (a name that stands in its own definition)


class Open:
    """A bracket that isn't closed yet, and what stands behind it, in parts between `:` or `|`."""

    def __init__(self, sign: str):
        self.sign, self.parts, self.between = sign, [[]], []

    def flat(self) -> list[Node]:
        """The bracket and its content as they stand."""
        nodes = [self.sign, *self.parts[0]]
        for sign, part in zip(self.between, self.parts[1:], strict=True):
            nodes += [sign, *part]
        return nodes

    def closed(self, sign: str) -> list[Node] | None:
        """What it means, or None for what follows no rule."""
        kinds = "".join(self.between)
        if self.sign == "(":
            return [*self.flat(), sign] if kinds in ("", ":") else None
        if not kinds:
            return [*self.flat(), sign]
        if set(kinds) == {"|"}:
            return [Turns(tuple(joined(part) for part in self.parts))]
        *before, after, number = map(joined, self.parts) if len(self.parts) > 1 else ()
        if kinds not in (":", "::") or len(number) != 1 or not isinstance(number[0], str):
            return None
        return [Switch(before[0] if before else None, after, number[0])] if NUMBER.fullmatch(number[0]) else None


def parse(prompt: str) -> tuple[Node, ...]:
    """A prompt as text, switches and turns. Any string is one."""
    nodes = nodes_of(prompt)
    return joined([prompt] if nodes is None else nodes)


def nodes_of(prompt: str) -> list[Node] | None:
    """The same in pieces, or None of a prompt that by rule 6 has no stages."""
    whole: list[Node] = []
    stack: list[Open] = []

    def give_up(nodes: list[Node]) -> bool:
        """Make signs of all that is open; whether the prompt then has a `|` in the wrong place."""
        wrong = any("|" in each.between for each in stack)
        whole.extend(node for each in stack for node in each.flat())
        whole.extend(nodes)
        stack.clear()
        return wrong

    for sign in SIGNS.findall(prompt):
        here = stack[-1].parts[-1] if stack else whole
        wrong = sign == "\\"
        if sign in CLOSES.values():
            stack.append(Open(sign))
            wrong = len(stack) > DEEPEST
        elif sign in CLOSES:
            meant = stack[-1].closed(sign) if stack and stack[-1].sign == CLOSES[sign] else None
            if meant is None:
                wrong = give_up([sign])
            else:
                stack.pop()
                (stack[-1].parts[-1] if stack else whole).extend(meant)
        elif sign == "|" and not (stack and stack[-1].sign == "["):
            wrong = True
        elif sign in (":", "|") and stack:
            stack[-1].between.append(sign)
            stack[-1].parts.append([])
        else:
            here.append(sign)
        if wrong:
            return None
    return None if give_up([]) else whole


def joined(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The same, neighbouring texts put together."""
    found: list[Node] = []
    for node in nodes:
        if isinstance(node, str) and found and isinstance(found[-1], str):
            found[-1] += node
        elif node != "":
            found.append(node)
    return tuple(found)


def change(nodes: Sequence[Node]) -> bool:
    """Whether a prompt has other words at other steps."""
    return not all(isinstance(node, str) for node in nodes)


def write(nodes: Sequence[Node]) -> str:
    """The prompt that was parsed."""
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif isinstance(node, Turns):
            text += f"[{'|'.join(map(write, node.choices))}]"
        else:
            before = "" if node.before is None else f"{write(node.before)}:"
            text += f"[{before}{write(node.after)}:{node.number}]"
    return text


def text_at(nodes: Sequence[Node], step: int, steps: int) -> str:
    """The prompt at step 1, 2, ... of so many."""
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif isinstance(node, Turns):
            text += text_at(node.choices[(step - 1) % len(node.choices)], step, steps)
        else:
            text += text_at((node.before or ()) if step <= node.last(steps) else node.after, step, steps)
    return text


class Script(NamedTuple):
    """What all pictures of a batch are told at a step."""

    prompts: tuple[str, ...]
    negatives: tuple[str | None, ...]


def scripts(
    prompts: Sequence[str], negatives: Sequence[str | None], dialect: str, behind: int, steps: int
) -> tuple[list[Script], list[int]]:
    """The different scripts of a run, and the number of the one that is told at each step from `behind` + 1 on.

    Only a1111's prompts change; of the others there is one script for all steps.
    """
    if dialect != "a1111":
        return [Script(tuple(prompts), tuple(negatives))], [0]
    nodes = {text: parse(text) for text in (*prompts, *negatives) if text is not None}
    found: dict[Script, int] = {}
    turns = []
    for step in range(behind + 1, max(steps, behind + 1) + 1):
        at = {text: text_at(each, step, steps) for text, each in nodes.items()} | {None: None}
        script = Script(tuple(at[text] for text in prompts), tuple(at[text] for text in negatives))
        turns.append(found.setdefault(script, len(found)))
    return list(found), turns


class Stage(NamedTuple):
    """The prompt from step `first` to step `last`, counted from 1."""

    first: int
    last: int
    text: str


def stages(prompt: str, steps: int) -> list[Stage]:
    """What the prompt is in so many steps: one stage where it is the same all the way."""
    nodes, found = parse(prompt), []
    if not change(nodes):
        return [Stage(1, max(steps, 1), prompt)]
    for step in range(1, max(steps, 1) + 1):
        text = text_at(nodes, step, steps)
        first = found.pop().first if found and found[-1].text == text else step
        found.append(Stage(first, step, text))
    return found
