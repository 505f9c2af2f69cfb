"""What a prompt says beyond its words: weights, chunks behind the 75th token, other words at other steps.

    plain     words and nothing else; what comes behind the 75th token is cut off, and said (the default)
    a1111     the web UI's: `(word:1.2)`, `[word]`, BREAK, `[a:b:0.5]`      `ldm.text.prompts.a1111`, `.schedules`
    compel    the compel library's: `word+`, `(some words)0.8`, `.and()`     `ldm.text.prompts.compel`

    pipe("a (red:1.3) house", dialect="a1111")
    print(tokens_of(pipe.tokenizer, "a (red:1.3) house", "a1111"))            # `ldm.text.prompts.table`

In a dialect CLIP skip holds for the negative prompt too; it counts the layers that are left out, so what the web UI
calls clip skip 2 is `clip_skip=1`. Prompts of other lengths: `ldm.text.prompts.reading`.

The road of a prompt: its stages, where it has other words at other steps (`schedules`); each text's phrases with their
weights (`a1111`, `compel`); their tokens in chunks of 75, each framed as a prompt of its own (`chunks`); the encoder's
vectors, weighted and side by side (`reading`, `weighing`).
"""

from ldm.errors import LDMError, nearest

DIALECTS = ("plain", "a1111", "compel")


def check_dialect(dialect: str) -> str:
    """The dialect itself, or an LDMError with the nearest of those there are."""
    if dialect not in DIALECTS:
        raise LDMError(f"There is no dialect {dialect!r}: {', '.join(DIALECTS)}.{nearest(str(dialect), DIALECTS)}")
    return dialect
