"""What the UNet is told of words: read by the text encoders, in the prompts' dialect, and other ones at other steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.errors import say_on_stderr
from ldm.guidance import Network
from ldm.network import Beside, guided, in_turn, tell, unguided
from ldm.run import finite
from ldm.schedules import Schedule
from ldm.settings import Settings
from ldm.text import words as plain
from ldm.text.prompts import check_dialect
from ldm.text.prompts.notices import notices
from ldm.text.prompts.reading import Asked, filled, read_chunks
from ldm.text.prompts.schedules import Script, scripts
from ldm.text.prompts.table import parts_of
from ldm.text.words import Reader, Words, nothing

if TYPE_CHECKING:
    from ldm.parts import Parts


def readers(pipe: "Parts") -> list[Reader]:
    """The text encoders, each with its tokenizer."""
    first = [Reader(pipe.tokenizer, pipe.text_encoder)]
    return first if pipe.text_encoder_2 is None else [*first, Reader(pipe.tokenizer_2, pipe.text_encoder_2)]


def read(pipe: "Parts", prompts: Sequence[str], clip_skip: int = 0, dialect: str = "plain") -> Words:
    """Sentences -> what the text encoders say of them; of a prompt with stages (`[a:b:0.5]`), give one of them.

    Says on stderr what of a plain one was cut off behind the 77th token.
    """
    with pipe.precision():
        if check_dialect(dialect) == "plain":
            words = plain.read(readers(pipe), prompts, pipe.device, clip_skip, pipe.xl)
        else:
            words = read_chunks(readers(pipe), prompts, Asked(dialect, pipe.device, clip_skip, pipe.xl))
    finite(words.context, "the text encoder")
    return words


def network(
    pipe: "Parts", settings: Settings, schedule: Schedule, clip_skip: int, together: bool, beside: Beside
) -> Network:
    """The UNet told what to draw, with classifier-free guidance unless its scale is 1 or less.

    A UNet distilled from guided ones (LCM) is told the scale instead. Where the words change on the way, all that they
    ever are is read here, before the loop.
    """
    pulls = settings.guidance > 1 and not pipe.distilled
    if not pulls and any(settings.negative):
        why = "In a model that is told its guidance" if pipe.distilled else "Without guidance (1 or less)"
        say_on_stderr(f"{why} the negative prompt does nothing.")
    negatives = settings.negative if pulls else (None,) * len(settings.negative)
    texts = dict.fromkeys([*settings.prompt, *(text for text in negatives if text is not None)])
    for line in dict.fromkeys(line for text in texts for line in notices(text, settings.dialect, pipe.tokenizer)):
        say_on_stderr(line)
    first, behind, steps = settings.road(schedule)
    found, turns = scripts(settings.prompt, negatives, settings.dialect, behind, steps)
    check_lengths(pipe, found[0].prompts, settings.dialect)
    networks = []
    for script in found:
        words = read(pipe, script.prompts, clip_skip, settings.dialect)
        against = None
        if pulls:
            words, against = read_negative(pipe, script, words, settings.dialect, clip_skip)
        networks.append(made(pipe, settings, words, against, together, beside))
    return in_turn(networks, turns, first)


def check_lengths(pipe: "Parts", prompts: Sequence[str], dialect: str) -> None:
    """Say on stderr where pictures of a batch depend on their neighbours: beside longer prompts."""
    if dialect == "plain" or len(set(prompts)) < 2:
        return
    counts = {sum(len(part.chunks) for part in parts_of(pipe.tokenizer, prompt, dialect)) for prompt in prompts}
    if len(counts) > 1:
        say_on_stderr(
            f"The prompts have {min(counts)} to {max(counts)} chunks: in one batch shorter ones are filled up with the "
            "empty prompt's, and their pictures differ a little from those drawn one by one (one_by_one, --one-by-one)."
        )


def made(
    pipe: "Parts", settings: Settings, words: Words, against: Words | None, together: bool, beside: Beside
) -> Network:
    """The UNet told these words, away from those `against`; None: unguided."""
    cond = tell(pipe.unet, words, settings.sizes, settings.noise_level, settings.guidance)
    if against is None:
        return unguided(pipe.unet, cond, beside)
    uncond = tell(pipe.unet, against, settings.negative_sizes, settings.noise_level)
    return guided(pipe.unet, uncond, cond, settings.guidance, beside, together)


def read_negative(
    pipe: "Parts", script: Script, words: Words, dialect: str = "plain", clip_skip: int = 0
) -> tuple[Words, Words]:
    """The prompts' `words` and the negative ones', both of one length; zeros where there is no negative.

    As in diffusers, `clip_skip` is the prompt's alone; in a dialect it is both's, as it is in those.
    """
    if all(each is None for each in script.negatives):
        return words, nothing(words)
    skip = 0 if dialect == "plain" else clip_skip
    found = read(pipe, [each or "" for each in script.negatives], skip, dialect)
    most = max(found.context.shape[1], words.context.shape[1])
    if most > min(found.context.shape[1], words.context.shape[1]):
        empty = read(pipe, [""], skip, dialect).context
        words, found = filled(words, most, empty), filled(found, most, empty)
    zeros = [k for k, each in enumerate(script.negatives) if each is None]
    for tensor in found:
        if tensor is not None:
            tensor[zeros] = 0
    return words, found
