r"""The dialect of the compel library (2.5.1): a prompt becomes mixes of weighted phrases.

1. `word+` is 1.1, `word++` 1.1², `word-` 0.9, `word--` 0.9². `(some words)+` and `"some words"-` weigh several, and
   `(some words)1.3` by a number, which must follow at once. `.attend(1.3)` or `.attend(++)` say the same.
2. They may be nested: the weights multiply. Brackets and quotes without a weight mean nothing.
3. `\(`, `\)` and `\"` are those signs themselves. Inside brackets `=`, and `+` or `-` that belong to no word,
   need a backslash, which they keep; a bracket with anything else inside is a sign among the words.
4. `("a cat", "a dog").blend(0.7, 0.3)`, the whole prompt: the mean of what the encoder says of each, so weighted; with
   `no_normalize` behind the numbers their sum.
5. `("a cat", "a dog").and(1, 0.5)`, the whole prompt: one behind the other, each weighted against the empty prompt.
6. `a cat.swap(a dog)` is read as "a cat", and `withLora(file, 0.7)` as nothing: for both the library hands something to
   its caller that ldm doesn't do. A line says so.
7. Where the library stops with an error, and where brackets are more than 50 deep, the prompt is words, and a line says
   so. Weights beyond 1000 end there.

The grammar itself stands in `ldm.text.prompts.grammar`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ldm.text.prompts.grammar import NUMBER, Node, Reader
from ldm.text.prompts.phrases import Phrase, bounded

DEEPEST = 50


class Mix(NamedTuple):
    """Texts that are encoded each by itself, and summed with these weights; of one text, that text itself."""

    texts: tuple[tuple[Phrase, ...], ...]
    weights: tuple[float, ...] = (1.0,)


class Parsed(NamedTuple):
    """What a prompt says: mixes, one behind the other, with the weight of each; and what is to be told of it."""

    mixes: tuple[Mix, ...]
    weights: tuple[float, ...]
    nodes: tuple[Node, ...]
    notices: tuple[str, ...] = ()


class Refused(Exception):
    """What the library stops at."""


def parse(prompt: str) -> Parsed:
    """Any string is a prompt: where the library has none, it is words."""
    spaced = re.sub(r",(\S)", r", \1", prompt)  # as the library does before it reads
    try:
        if deep(spaced) > DEEPEST:
            raise Refused(f"brackets are more than {DEEPEST} deep")
        return read(Reader(spaced))
    except Refused as why:
        notice = f"The prompt is read as words, without weights, for in compel's dialect {why}: {shortened(prompt)!r}"
        return Parsed((Mix(((Phrase(prompt),),)),), (1.0,), (Node("word", spaced),), (notice,))


def write(parsed: Parsed) -> str:
    """A prompt that says the same: `parse` makes these very nodes of it."""
    text = ""
    for node in parsed.nodes:  # in lines, for quotes that end on another than they began on are none
        text += ("" if re.match(r",\S", node.raw) else "\n" if text else "") + node.raw
    return re.sub(r", (\S)", r",\1", text)


def deep(text: str) -> int:
    """The most brackets that are open at once."""
    depth = most = 0
    for sign in re.findall(r"[()]", text):
        depth = depth + 1 if sign == "(" else max(depth - 1, 0)
        most = max(most, depth)
    return most


def shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def read(reader: Reader) -> Parsed:
    """The whole of a prompt. Raises Refused for what the library stops at."""
    text = reader.text
    if (found := reader.operator(".and", ".add")) is not None:
        targets, options, end = found
        weights = amounts(options, len(targets))
        rest = text[end:].strip()
        notices = (f"What stands behind .and() is not read: {shortened(rest)!r}",) if rest else ()
        kept = [(Mix((text,)), weight) for text, weight in zip(flattened(targets), weights, strict=True) if text]
        return parsed(kept, (Node("and", text[:end].strip(), tuple(targets)),), notices)
    before, start = reader.many((reader.lora,), 0)
    at, nodes = Reader(text[start:]), ()
    if (found := at.operator(".blend")) is not None:
        targets, options, own = found
        after, end = at.many((at.lora,), own)
        if at.skip(end) < len(at.text):
            raise Refused("a .blend() is the whole prompt, and something stands behind it")
        total = not (options and options[-1] == "no_normalize")
        weights = amounts(options[: len(options) - (not total)], len(targets))
        texts = flattened(targets)
        if not all(texts) or any(not phrase.joins for text in texts for phrase in text):
            raise Refused("a .blend() takes prompts with words, and without .swap()")
        if total and not sum(weights):
            raise Refused("the weights of a .blend() may not sum to 0")
        mix = Mix(tuple(texts), tuple(w / sum(weights) for w in weights) if total else weights)
        return parsed([(mix, 1.0)], (*before, Node("blend", at.text[:own].strip(), tuple(targets)), *after))
    nodes, end = at.many(at.anything, 0)
    text = flattened([Node("group", "", tuple(nodes))])[0]
    return parsed([(Mix((text,)), 1.0)] if text else [], (*before, *nodes))


def parsed(kept: Sequence[tuple[Mix, float]], nodes: tuple[Node, ...], notices: tuple[str, ...] = ()) -> Parsed:
    """Without a mix that has words it is the empty prompt."""
    kept = kept or [(Mix(((Phrase(""),),)), 1.0)]
    kinds = set(kinds_of(nodes))
    if "swap" in kinds:
        notices += (
            "compel's .swap() is not done: what stands before it is read, and what it would be swapped for isn't",
        )
    if "lora" in kinds:
        notices += ("A LoRA in the prompt is not read: add it to the model (pipe.add_lora, --lora)",)
    mixes, weights = zip(*kept, strict=True)
    return Parsed(mixes, weights, nodes, tuple(f"{each}." if each[-1] not in "'\"" else each for each in notices))


def kinds_of(nodes: Sequence[Node]) -> list[str]:
    return [kind for node in nodes for kind in (node.kind, *kinds_of(node.inside))]


def amounts(options: Sequence[str], count: int) -> tuple[float, ...]:
    """The numbers of `.and()` and `.blend()`, one for each prompt; none are ones."""
    if not all(NUMBER.fullmatch(each) for each in options):
        raise Refused("the options of .and() and .blend() are numbers")
    if options and len(options) != count:
        raise Refused(f"{count} prompts and {len(options)} numbers don't go together")
    return tuple(bounded(float(each)) for each in options) or (1.0,) * count


def flattened(nodes: Sequence[Node]) -> list[tuple[Phrase, ...]]:
    """The phrases of each node; neighbours of one weight are one, with a space between."""
    found = []
    for node in nodes:
        phrases: list[Phrase] = []
        for phrase in phrases_of(node, 1.0):
            last = phrases[-1] if phrases else None
            if last is not None and last.joins and phrase.joins and last.weight == phrase.weight:
                phrases[-1] = Phrase(bare(f"{last.text} {phrase.text}"), last.weight)
            else:
                phrases.append(phrase)
        found.append(tuple(phrases))
    return found


def bare(text: str) -> str:
    """Without backslashes before brackets and quotes. The library does it whenever it copies: of two both go."""
    return re.sub(r'\\([()"])', r"\1", text)


def phrases_of(node: Node, scale: float) -> list[Phrase]:
    if node.kind == "word":
        return [Phrase(bare(bare(node.raw)), scale)]
    scale = bounded(scale * node.weight)
    if node.kind == "swap":
        inner = flattened([Node("group", "", node.inside, scale)])[0] or (Phrase(""),)
        return [phrase._replace(joins=False) for phrase in inner]
    return [phrase for each in node.inside for phrase in phrases_of(each, scale)]
