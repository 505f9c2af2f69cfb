"""The embedded model is loaded and draws, as a test of everything together; its numbers are known."""

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ldm.doctor.devices import mend_torch
from ldm.doctor.lines import BROKEN, LACKS, Line, checkout, quoted, told
from ldm.doctor.packages import everything
from ldm.errors import LDMError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipeline import Pipeline

PROMPT = "a large red house on snow at night"
RUN = {"seed": 7, "steps": 4, "sampler": "ddim", "guidance": 2.0, "width": 64, "height": 64}
# Every 32nd of the 256 numbers of the latent that this run ends with. A model that is trained anew has others:
# `python -c "from ldm.doctor import drawing; print(drawing.fingerprint(drawing.draw('cpu')[0]))"`.
EXPECTED = (1.5729, -0.0734, 3.2168, 2.303, -0.1008, -0.2181, -1.0952, -0.8745)
# Cards round otherwise, in TF32 above all: a thousandth (bfloat16 would 0.009). Wrong weights are off by more.
ALLOWED = 0.02


def fingerprint(x0: "Tensor") -> tuple[float, ...]:
    return tuple(round(number, 4) for number in x0.detach().double().cpu().flatten()[::32].tolist())


def draw(device: str, load: "Callable[..., Pipeline] | None" = None) -> tuple["Tensor", float, float]:
    """The latent of a tiny picture, and how many seconds loading and drawing took."""
    if load is None:
        from ldm.loading import load
    since = time.perf_counter()
    pipe = load("scenes", device=device)
    loaded = time.perf_counter()
    result = pipe(PROMPT, **RUN)
    return result.x0.cpu(), loaded - since, time.perf_counter() - loaded


def here() -> list[str]:
    """The devices to draw on: the processor, and the first card."""
    import torch

    card = ["cuda:0"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    return ["cpu", *card[:1]]


def drawing(devices: Callable[[], list[str]] = here, draw: Callable = draw) -> Iterator[Line]:
    """Whether a picture is drawn, on the processor and on a card, and whether it is the right one."""
    try:
        names = devices()
    except Exception as error:  # torch can't be imported
        fault = f"The embedded model doesn't draw: {told(error)}"
        yield Line("cpu", f"fails: {told(error)}", BROKEN, fault, mend_torch())
        return
    for device in names:
        verdict = BROKEN if device == "cpu" else LACKS
        mend = restore() if device == "cpu" else 'ldm generate "a red house" --device cpu'
        try:
            x0, loading, drawn = draw(device)
        except Exception as error:
            ours = isinstance(error, LDMError)  # of the model's files, as a rule
            why = str(error) if ours else told(error)
            if device == "cpu" and not ours:
                mend = everything() if isinstance(error, ImportError) else mend_torch()
            fault = f"The embedded model doesn't draw on {device}: {why}"
            yield Line(device, f"fails: {why}", verdict, fault, mend)
            continue
        far = distance(fingerprint(x0))
        if far <= ALLOWED:
            yield Line(device, f"right: loaded in {loading:.1f} s, drawn in {drawn:.1f} s")
            continue
        fault = f"The embedded model draws other numbers on {device} than it should (by {far:.2g} of their size): "
        fault += "its weights have changed, or this torch computes wrongly."
        yield Line(device, f"wrong by {far:.2g}", verdict, fault, mend)


def distance(numbers: tuple[float, ...]) -> float:
    """How far numbers are from those expected, root mean square over root mean square; NaN if one of them is."""
    squares = sum((one - other) ** 2 for one, other in zip(numbers, EXPECTED, strict=True))
    return math.sqrt(squares / sum(other**2 for other in EXPECTED))


def restore() -> str:
    """The line that brings the embedded model's files back as they were; "" for an installed package."""
    home = checkout()
    return f"git -C {quoted(home)} checkout -- weights" if home and (home / ".git").exists() else ""
