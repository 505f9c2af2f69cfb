"""What the network is told of words: read by the text encoders, in the prompts' dialect, other ones at other steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.errors import LDMError, say_on_stderr
from ldm.flux import check_plain, choose_tokens
from ldm.guidance import Network
from ldm.network import Beside, guided, in_turn, tell, unguided
from ldm.run import finite
from ldm.schedules import Schedule
from ldm.settings import Settings
from ldm.text import words as plain
from ldm.text.embeddings import check_table
from ldm.text.prompts import check_dialect
from ldm.text.prompts.notices import notices
from ldm.text.prompts.reading import Asked, filled, length, read_chunks
from ldm.text.prompts.schedules import Script, change, parse, scripts
from ldm.text.prompts.table import parts_of
from ldm.text.words import Reader, Words, nothing

if TYPE_CHECKING:
    from ldm.parts import Parts


def readers(pipe: "Parts") -> list[Reader]:
    """The text encoders, each with its tokenizer. Raises LDMError where learnt words are on other ones."""
    check_table(pipe)
    first = [Reader(pipe.tokenizer, pipe.text_encoder)]
    return first if pipe.text_encoder_2 is None else [*first, Reader(pipe.tokenizer_2, pipe.text_encoder_2)]


def read(
    pipe: "Parts",
    prompts: Sequence[str],
    clip_skip: int = 0,
    dialect: str = "plain",
    max_sequence_length: int | None = None,
) -> Words:
    """Sentences -> what the text encoders say of them. Says on stderr what of a plain one is cut off.

    FLUX reads `max_sequence_length` tokens; None: as many as the model's settings say.

    Raises LDMError for a prompt that has other words at other steps (`[a:b:0.5]`).
    """
    for prompt in prompts if check_dialect(dialect) == "a1111" else ():
        if change(parse(prompt)):
            raise LDMError(
                f"{prompt!r:.80} has other words at other steps, and is read step by step: give what it is at one of "
                "them (ldm.text.prompts.schedules.stages(prompt, steps)[0].text)."
            )
    return hear(pipe, prompts, clip_skip, dialect, tokens=max_sequence_length)


def hear(
    pipe: "Parts",
    prompts: Sequence[str],
    clip_skip: int = 0,
    dialect: str = "plain",
    say: Callable[[str], None] = say_on_stderr,
    tokens: int | None = None,
) -> Words:
    """The same of a prompt as it is at one step: what looks like stages there, is none. `tokens`: of FLUX."""
    tokens = choose_tokens(pipe.model, tokens)
    with pipe.precision():
        if pipe.flux:
            check_plain(dialect, clip_skip)
            words = plain.read_flux(readers(pipe), prompts, pipe.device, tokens, say)
        elif dialect == "plain":
            words = plain.read(readers(pipe), prompts, pipe.device, clip_skip, pipe.xl)
        else:
            words = read_chunks(readers(pipe), prompts, Asked(dialect, pipe.device, clip_skip, pipe.xl, say))
    for tensor, encoder in zip(words, encoders(pipe), strict=True):
        if tensor is not None:
            finite(tensor, encoder)
    return words


def encoders(pipe: "Parts") -> tuple[str, str]:
    """What made the context and the pooled vector, to be named in an error."""
    if not pipe.flux:
        return "the text encoder", "the text encoder"
    return f"the text encoder ({'CLIP' if pipe.text_encoder_2 is None else 'T5'})", "the text encoder (CLIP)"


def network(
    pipe: "Parts", settings: Settings, schedule: Schedule, clip_skip: int, together: bool, beside: Beside
) -> Network:
    """The UNet told what to draw, with classifier-free guidance unless its scale is 1 or less.

    One distilled from guided ones (LCM, FLUX.1-dev) is told the scale, and guided by another, `true_guidance`. Where
    the words change on the way, all that they ever are is read here, before the loop.
    """
    pulls = settings.guidance > 1 and not pipe.distilled
    pulls = pulls or settings.true_guidance > 1
    check_pull(pipe, settings, pulls)
    negatives = settings.negative if pulls else (None,) * len(settings.negative)
    texts = dict.fromkeys([*settings.prompt, *(text for text in negatives if text is not None)])
    asked = (settings.dialect, pipe.tokenizer, pipe.flux)
    for line in dict.fromkeys(line for text in texts for line in notices(text, *asked)):
        say_on_stderr(line)
    first, behind, steps = settings.road(schedule)
    found, turns = scripts(settings.prompt, negatives, settings.dialect, behind, steps)
    check_words(pipe, found, settings.dialect)
    check_lengths(pipe, found, settings.dialect)
    rows = settings.rows(schedule) or range(len(schedule) + 1)  # of strength 0, as inversion, which goes all of them
    times = [schedule[i].t for i in rows]
    beside = replace(beside, times=times, rounded=settings.compat)
    networks, say, tokens = [], once(), settings.max_sequence_length
    for script in found:
        words = hear(pipe, script.prompts, clip_skip, settings.dialect, say, tokens)
        against = None
        if pulls:
            words, against = read_negative(pipe, script, words, settings.dialect, clip_skip, say, tokens)
        networks.append(made(pipe, settings, words, against, together, beside))
    return in_turn(networks, turns, first)


def check_pull(pipe: "Parts", settings: Settings, pulls: bool) -> None:
    """Say on stderr where guidance away from other words does nothing, or little."""
    if not pulls and any(settings.negative):
        why = "In a model that is told its guidance" if pipe.distilled else "Without guidance (1 or less)"
        how = ", unless true_guidance is above 1" if pipe.distilled else ""
        say_on_stderr(f"{why} the negative prompt does nothing{how}.")
    if pulls and pipe.flux and not pipe.distilled and pipe.defaults.guidance <= 1:  # schnell
        say_on_stderr(
            f"This model was distilled to draw without guidance: {settings.guidance:g} doubles the time, and is seldom "
            "better."
        )


def once() -> Callable[[str], None]:
    """`say_on_stderr` for a run: what holds at many steps, and for several encoders, is said once."""
    said = set()

    def say(line: str) -> None:
        if line not in said:
            said.add(line)
            say_on_stderr(line)

    return say


def check_words(pipe: "Parts", found: Sequence[Script], dialect: str) -> None:
    """Say on stderr which learnt words are on, and in none of these prompts."""
    if not pipe.embeddings:
        return
    texts = {text for script in found for text in (*script.prompts, *script.negatives) if text is not None}
    parts = [part for text in texts for part in parts_of(pipe.tokenizer, text, dialect)]
    pieces = {token.piece for part in parts for chunk in (*part.chunks, part.cut) for token in chunk}
    for word in pipe.embeddings:
        if word not in pieces:
            say_on_stderr(f"The learnt word {word!r} is in no prompt of this run, so it does nothing: write it in one.")


def check_lengths(pipe: "Parts", found: Sequence[Script], dialect: str) -> None:
    """Say on stderr where pictures of a batch depend on their neighbours: beside longer prompts, at any step.

    Alone, a picture's context is as long as the longer of its prompt and its negative one; in a batch as the longest.
    """
    if dialect == "plain" or len(found[0].prompts) < 2:
        return
    texts = {text for script in found for text in (*script.prompts, *script.negatives) if text is not None}
    chunks = {text: length(pipe.tokenizer, text, dialect) for text in texts} | {None: 0}
    counts, negative = set(), any(each for script in found for each in script.negatives)
    for script in found:
        own = {max(chunks[one], chunks[other]) for one, other in zip(script.prompts, script.negatives, strict=True)}
        counts |= own if len(own) > 1 else set()
    if counts:
        say_on_stderr(
            f"The prompts{' and negative ones' * negative} have {min(counts)} to {max(counts)} chunks: in one batch "
            "shorter ones are filled up with the empty prompt's, and their pictures differ a little from those drawn "
            "one by one (one_by_one, --one-by-one)."
        )


def made(
    pipe: "Parts", settings: Settings, words: Words, against: Words | None, together: bool, beside: Beside
) -> Network:
    """The UNet told these words, away from those `against`; None: unguided."""
    network, level = pipe.backbone, settings.noise_level
    cond = tell(network, words, settings.sizes, level, settings.guidance, settings.compat)
    if against is None:
        return unguided(network, cond, beside)
    uncond = tell(network, against, settings.negative_sizes, level, settings.guidance, settings.compat)
    scale = settings.true_guidance if pipe.distilled else settings.guidance
    return guided(network, uncond, cond, scale, beside, together)


def read_negative(
    pipe: "Parts",
    script: Script,
    words: Words,
    dialect: str = "plain",
    clip_skip: int = 0,
    say: Callable[[str], None] = say_on_stderr,
    tokens: int | None = None,
) -> tuple[Words, Words]:
    """The prompts' `words` and the negative ones', both of one length; zeros where there is no negative.

    As in diffusers, `clip_skip` is the prompt's alone; in a dialect it is both's, as it is in those.
    """
    if all(each is None for each in script.negatives):
        return words, nothing(words)
    skip = 0 if dialect == "plain" else clip_skip
    found = hear(pipe, [each or "" for each in script.negatives], skip, dialect, say, tokens)
    most = max(found.context.shape[1], words.context.shape[1])
    if most > min(found.context.shape[1], words.context.shape[1]):
        empty = hear(pipe, [""], skip, dialect, say, tokens).context
        words, found = filled(words, most, empty), filled(found, most, empty)
    zeros = [k for k, each in enumerate(script.negatives) if each is None]
    for tensor in found:
        if tensor is not None:
            tensor[zeros] = 0
    return words, found
