"""What a user should know of a prompt before it is drawn: signs without a meaning in its dialect, what isn't done."""

import re

from ldm.errors import nearest
from ldm.text.prompts import a1111, compel, schedules
from ldm.text.prompts.chunks import by_sentences, in_chunks
from ldm.text.prompts.compel import shortened
from ldm.text.prompts.phrases import Phrase
from ldm.text.tokenizer import Tokenizer

STAGES = re.compile(r"\[[^\[\]:|]*(?:\|[^\[\]:|]*)+\]|\[(?:[^\[\]:]*:){1,2}\s*[.\d]+\s*\]")
# What looks like a dialect's, and means nothing in compel; and what means nothing in a1111. Of (w) itself nothing is
# said, for so people write anyway, nor of a single + or - behind what may be a name or the first half of a word.
WEBUIS = (
    re.compile(r"\([^()]*:\s*[+-]?[.\d]+\s*\)"),
    re.compile(r"\bBREAK\b"),
    STAGES,
    re.compile(r"(?<!\\)\[(?=[^\[\]]*\w)[^\[\]]*\]"),
)
COMPELS = (
    re.compile(r"(?:\b\w+|[)\"])(?:\+\++|--+)(?![\w+-])"),
    re.compile(r"(?:\)[+-]|\b[a-z]{2,}\+)(?![^\s,.;:)\]\"])|\)\d*\.\d+"),
    re.compile(r"\)\.(?:and|blend|swap|attend)\("),
)
DOUBLE = re.compile(r"\(\([^()]+\)[^()]*\)")  # compel has it too, with a weight behind it
LOOKS = {  # in the prompts of a dialect: (a sign, whose it is), the first that is found is told
    "plain": [*((sign, "a1111") for sign in WEBUIS), *((sign, "compel") for sign in COMPELS), (DOUBLE, "a1111")],
    "a1111": [(sign, "compel") for sign in COMPELS],
    "compel": [(sign, "a1111") for sign in WEBUIS],
}
AND = re.compile(r"\bAND\b")
LORA = re.compile(r"<(?:lora|lyco):[^<>]*>")
WORD = re.compile(r"<(?=[^<>\s]*\w)[^<>\s]*>")  # how embeddings are usually called
# How a learnt word may stand in a prompt of a dialect: by itself, and in brackets that weigh it.
BARE, WEIGHED = "a {} b", {"a1111": "a ({}:1.2) b", "compel": "a ({})1.2 b"}


def notices(prompt: str, dialect: str, tokenizer: Tokenizer, flux: bool = False) -> tuple[str, ...]:
    """Sentences, each a line; `tokenizer` tells whether a plain prompt is too long. Raises LDMError for no text.

    `flux`: it is read by FLUX, which knows no dialects.
    """
    ids = tokenizer.encode(prompt)
    found = list(compel.parse(prompt).notices) if dialect == "compel" else []
    signs = ((looks.search(prompt), name) for looks, name in LOOKS[dialect])
    if sign := next(((shortened(mark[0]), name) for mark, name in signs if mark), None):
        mark, name = sign
        how = ", as FLUX reads all signs" if flux else f"; dialect={name!r} (--dialect {name}) reads it as {name} does"
        found.append(f"{mark!r} is read as it stands{how}.")
    if dialect == "plain" and not flux and len(ids) > tokenizer.max_length - 2:
        found.append("Longer prompts are read in chunks with dialect='a1111' (--dialect a1111).")
    if dialect == "a1111" and AND.search(prompt):
        found.append("AND is read as a word: for several prompts at once there is ldm.guidance.all_of.")
    if dialect == "a1111" and schedules.nodes_of(prompt) is None and STAGES.search(prompt):
        found.append(
            "The prompt is the same at every step, for it has a | outside of [a|b], a backslash at its end, or too "
            f"many brackets in each other: {shortened(prompt)!r}."
        )
    if sign := LORA.search(prompt):
        found.append(f"{shortened(sign[0])!r} is read as words: add a LoRA to the model (pipe.add_lora, --lora).")
    return (*found, *unknown_words(prompt, tokenizer))


# ---------------------------------------------------------------------------------------------------- learnt words


def unknown_words(prompt: str, tokenizer: Tokenizer) -> list[str]:
    """A sentence, if something in the prompt is written as a learnt word is, and none such is on."""
    for sign in WORD.finditer(LORA.sub(" ", prompt)):
        if not any(piece in tokenizer.added for piece in tokenizer.pieces(sign[0])):
            return [
                f"{shortened(sign[0])!r} is read letter by letter, for no learnt word of that name is on "
                f"(pipe.add_embedding, --embedding).{nearest(sign[0], tokenizer.words)}"
            ]
    return []


def how_to_write(word: str, tokenizer: Tokenizer) -> str:
    """Of a learnt word that the tokenizer knows: a sentence, if a dialect takes signs of it for its own; or ""."""
    said, unnamed = [], False
    for dialect in WEIGHED:
        spelt, everywhere = spelling(word, dialect, tokenizer)
        unnamed |= not spelt
        if not spelt:
            said.append(f"{dialect} can't name it")
        elif spelt != word:
            said.append(f"in {dialect} write it {spelt}{' and outside of brackets' * (not everywhere)}")
        elif not everywhere:
            said.append(f"{dialect} finds it outside of brackets alone")
    if not said:
        return ""
    mend = ", so call it otherwise to use it there (word='...', --embedding FILE:WORD)" * unnamed
    return f"{word!r} has signs that dialects take for theirs: {'; '.join(said)}{mend}."


def spelling(word: str, dialect: str, tokenizer: Tokenizer) -> tuple[str, bool]:
    """How a prompt in the dialect names a learnt word, "" if it can't, and whether that holds in brackets too."""
    escaped = a1111.write(((Phrase(word),),)) if dialect == "a1111" else re.sub(r'[()"]', r"\\\g<0>", word)
    heard = [each for each in (word, escaped) if hears(tokenizer, BARE.format(each), dialect, word)]
    best = next((each for each in heard if hears(tokenizer, WEIGHED[dialect].format(each), dialect, word)), "")
    return (best, True) if best else (heard[0] if heard else "", False)


def hears(tokenizer: Tokenizer, prompt: str, dialect: str, word: str) -> bool:
    """Whether a prompt says the learnt word, at every step."""
    if dialect == "a1111":
        nodes = schedules.parse(prompt)
        if schedules.change(nodes):
            return False
        texts = [in_chunks(tokenizer, a1111.parse("".join(nodes)))]
    else:
        texts = [by_sentences(tokenizer, text) for mix in compel.parse(prompt).mixes for text in mix.texts]
    first = tokenizer.words[word][0]  # the others always follow it
    return all(any(token.piece == first for chunk in chunks for token in chunk) for chunks in texts)
