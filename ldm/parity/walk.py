"""The road, station by station: both sides do the same, and every answer is held against the reference's."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.errors import LDMError, nearest
from ldm.parity import weights
from ldm.parity.blocks import Divergence, Walked, look_inside, walk_inside
from ldm.parity.calls import cast
from ldm.parity.compare import BAD, DIFFERS, HALF, Line, held, skipped
from ldm.parity.drawn import widened
from ldm.parity.inputs import AWKWARD, Plan, given
from ldm.parity.pictures import drawn_alike
from ldm.parity.schedulers import compared
from ldm.parity.sides import Part, Side
from ldm.parity.timing import both

NETWORKS = ("text_encoder", "text_encoder_2", "vae_encode", "vae_decode", "unet", "transformer", "controlnet")
PARTS = {  # the words of --only, in the road's order, and the stations they stand for
    "weights": ("weights",),
    "tokenizer": ("tokenizer",),
    "text": ("text_encoder", "text_encoder_2"),
    "vae": ("vae_encode", "vae_decode"),
    "unet": ("unet",),
    "transformer": ("transformer",),
    "controlnet": ("controlnet",),
    "samplers": ("samplers",),
    "pipelines": ("pipelines",),
}
TITLES = {"vae_encode": "VAE encode", "vae_decode": "VAE decode", "unet": "UNet", "controlnet": "ControlNet"}


@dataclass(frozen=True)
class Walk:
    """Both sides and the plan. Against a port ours is the reference, otherwise theirs."""

    ours: Side
    theirs: Side
    plan: Plan

    @property
    def port(self) -> bool:
        return self.theirs.name != "diffusers"

    def hold(self, station: str, what: str, ours: Tensor, theirs: Tensor, **bound: object) -> Line:
        tested, reference = (theirs, ours) if self.port else (ours, theirs)
        return held(station, what, tested, reference, **bound)


def check_parts(names: tuple[str, ...]) -> None:
    """Raise LDMError for words of --only that stand for no station."""
    for name in names:
        if name not in PARTS:
            raise LDMError(f"--only knows no part {name!r}: {', '.join(PARTS)}.{nearest(name, PARTS)}")


@torch.no_grad()
def along(
    walk: Walk, keep_going: bool = False, say: Callable[[str], None] = lambda name: None
) -> Iterator[Line | Walked | Divergence]:
    """Every line as it is known, and behind a line that differs where inside it begins. Stops there, or goes on.

    `say` is told what comes next.
    """
    whole = {"weights": all_weights, "tokenizer": tokenizers, "samplers": samplers, "pipelines": pipelines}
    for name, inner in PARTS.items():
        if walk.plan.only and name not in walk.plan.only:
            continue
        for part in inner:
            say(part.replace("_", " "))
            bad = ""  # the station that differs: its other lines are still told
            for found in whole[part](walk) if part in whole else network(walk, part):
                if isinstance(found, Line) and bad not in ("", found.station) and not keep_going:
                    return
                yield found
                bad = found.station if isinstance(found, Line) and found.verdict in BAD else bad
            if bad and not keep_going:
                return


def all_weights(walk: Walk) -> Iterator[Line | Divergence]:
    """Every tensor of every network, by its name."""
    seen = set()
    for name in NETWORKS:
        mine, other = walk.ours.parts.get(name), walk.theirs.parts.get(name)
        part = name.partition("_")[0] if name.startswith("vae") else name
        if mine is None or part in seen:
            continue
        if other is not None and other.module is not None:
            seen.add(part)
            yield from weights.compare(part, mine.module, other, walk.port)
    if not seen:
        yield skipped("weights", "the port shows no modules")


def tokenizers(walk: Walk) -> Iterator[Line]:
    if not walk.theirs.tokenizers:
        yield skipped("tokenizer", f"{walk.theirs.name} offers none")
    for name, theirs in walk.theirs.tokenizers.items():
        mine = walk.ours.tokenizers.get(name)
        if mine is None:
            yield skipped(name, "ours has no such part")
            continue
        try:
            timed = both(lambda mine=mine: mine(AWKWARD), lambda theirs=theirs: theirs(AWKWARD), torch.device("cpu"))
        except Exception as error:
            yield failed(name, f"ids of {len(AWKWARD)} awkward prompts", error, walk)
            continue
        line = walk.hold(name, f"ids of {len(AWKWARD)} awkward prompts", timed.ours, timed.theirs)
        if line.verdict == DIFFERS and timed.ours.shape == timed.theirs.shape:
            line = replace(line, note=first_apart(timed.ours, timed.theirs))
        yield timed.on(line)


def first_apart(ours: Tensor, theirs: Tensor) -> str:
    """What is known of tokens that differ: which prompt, where, and whether the padding or the end explains it."""
    row = int((ours != theirs).any(dim=1).nonzero()[0])
    at = int((ours[row] != theirs[row]).nonzero()[0])
    a, b = ours[row].tolist(), theirs[row].tolist()
    text = f"prompt {AWKWARD[row][:30]!r}, position {at}: ours {a[at]}, theirs {b[at]}"
    if at > 0 and len(set(a[at:])) == len(set(b[at:])) == 1:
        return f"{text}; only the padding differs: {a[-1]} and {b[-1]}"
    if sorted(a) != sorted(b) and len(set(a) ^ set(b)) == 1:
        return f"{text}; one side lacks the id {(set(a) ^ set(b)).pop()} everywhere: begin or end of text?"
    return text


def network(walk: Walk, name: str) -> Iterator[Line | Walked | Divergence]:
    """One network on one input: a line for every output, and one for all blocks inside; if one differs, where."""
    mine, other = walk.ours.parts.get(name), walk.theirs.parts.get(name)
    title = TITLES.get(name, name.replace("_", " "))
    if mine is None:
        return  # this model has no such part
    if other is None:
        yield skipped(title, f"{walk.theirs.name} offers none")
        return
    inputs = given(name, walk.ours, walk.plan)
    try:
        timed = both(lambda: mine.run(*inputs), lambda: other.run(*inputs), walk.plan.device)
    except Exception as error:
        if not walk.port:
            raise
        yield failed(title, "", error, walk)
        return
    truths = truth_of(mine if walk.port else other, inputs) if walk.plan.dtype in HALF else {}
    bad = ""
    for what, theirs in timed.theirs.items():
        line = walk.hold(title, what, timed.ours[what], theirs, truth=truths.get(what))
        bad = bad or what * (line.verdict in BAD)
        yield timed.on(line)
    if not bad and (found := walk_inside(name, title, next(iter(timed.theirs)), walk.ours, walk.theirs, walk.plan)):
        yield from found
        bad = next(iter(timed.theirs)) * (found[0].verdict in BAD)
    if bad:
        yield look_inside(name, title, bad, walk.ours, walk.theirs, walk.plan, inputs)


def truth_of(reference: Part, inputs: tuple) -> dict[str, Tensor]:
    """What the reference answers in float32, with the very same half-precision numbers as weights and inputs."""

    with widened(reference.module) if reference.module is not None else nullcontext():
        return reference.run(*cast(inputs, torch.float32))


def failed(station: str, what: str, error: Exception, walk: Walk) -> Line:
    text = " ".join(str(error).split())[:200]
    return Line(station, what, DIFFERS, note=f"{walk.theirs.name} failed: {type(error).__name__}: {text}")


def samplers(walk: Walk) -> Iterator[Line]:
    if walk.port:
        yield skipped("samplers", "a port is asked for none")
        return
    from ldm.parity import reference

    yield from compared(reference.scheduler, reference.quiet, walk.theirs.own["scheduler"], walk.plan.steps)


def pipelines(walk: Walk) -> Iterator[Line]:
    if walk.port:
        yield skipped("pipelines", "a port is asked for none")
        return
    yield from drawn_alike(walk.ours, walk.theirs, walk.plan)
