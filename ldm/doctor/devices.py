"""Processor and cards, and the types that each really computes in."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

from ldm.doctor import machine
from ldm.doctor.lines import BROKEN, LACKS, OK, Line, gib, install, python, told, unset
from ldm.doctor.packages import NEEDED, installed

TORCH = f"torch>={NEEDED['torch']}"
INDEX = "https://download.pytorch.org/whl/"
DRIVERS = "python -m webbrowser https://www.nvidia.com/drivers"


def devices(
    torch: ModuleType | None = None,
    nvidia: Callable[[], machine.Nvidia | None] = machine.nvidia,
    variables: Mapping[str, str] = os.environ,
) -> Iterator[Line]:
    """Processor and cards, and the types that each really computes in."""
    if torch is None:
        try:
            import torch
        except Exception as error:
            fault = "torch cannot be imported, and nothing is drawn without it."
            yield Line("torch", f"fails: {told(error)}", BROKEN, fault, mend_torch())
            return
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "no word of its instructions")()
    yield Line(
        "cpu",
        f"{machine.cpu_name()}, torch computes on {torch.get_num_threads()} of {machine.cores()} cores, {capability}",
    )
    yield from types(torch, "cpu")
    with warnings.catch_warnings(record=True) as caught:  # an old driver is a warning of torch's
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for k in range(count):
        card = torch.cuda.get_device_properties(k)
        size = f"{gib(card.total_memory)}, compute capability {card.major}.{card.minor}"
        yield Line(f"cuda:{k}", f"{card.name}, {size}, CUDA {torch.version.cuda or torch.version.hip}")
        yield from types(torch, f"cuda:{k}")
    if count == 0:
        why = " ".join(str(caught[0].message).split())[:200] if caught else ""
        yield without_card(torch.version.cuda, nvidia(), variables.get("CUDA_VISIBLE_DEVICES"), why)
    if torch.backends.mps.is_available():
        yield Line("mps", "Apple's GPU, which shares the machine's memory")
        yield from types(torch, "mps")


def types(torch: ModuleType, device: str, trial: Callable[..., machine.Tried] = machine.try_dtype) -> Iterator[Line]:
    """A line for every type that weights can have, tried on the device."""
    float32 = None
    for name in machine.ALLOWED:  # float32 comes first: the others are timed against it
        tried = trial(torch, device, name)
        float32 = tried if name == "float32" else float32
        text, line = machine.verdict(tried, float32), f"{device} {name}"
        if not tried.failed or name != "float32":
            yield Line(line, text, LACKS if tried.failed else OK)
        elif device == "cpu":
            fault = "This torch doesn't compute rightly on this processor."
            yield Line(line, text, BROKEN, fault, mend_torch())
        else:
            fault = f"This torch doesn't compute on {device}: draw on the CPU, or install a torch that is built for it."
            yield Line(line, text, LACKS, fault, 'ldm generate "a red house" --device cpu')


def without_card(built: str | None, card: machine.Nvidia | None, visible: str | None, why: str = "") -> Line:
    """torch sees no CUDA card: is there one, and what keeps torch from it? `built`: the CUDA of this torch."""
    if card is None:
        return Line("cuda", "none")
    names = ", ".join(card.cards)
    if visible is not None and visible.strip() in ("", "-1", "none", "NoDevFiles"):
        fault = f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides the {names}."
        return Line("cuda", f"{names}, hidden", LACKS, fault, unset("CUDA_VISIBLE_DEVICES"))
    if card.cuda is not None and card.cuda < (12, 0):
        fault = f"The driver of the {names} is too old for torch (CUDA {'.'.join(map(str, card.cuda))}): update it."
        return Line("cuda", f"{names}, its driver is too old", LACKS, fault, DRIVERS)
    command = f'{python()} -m pip install --force-reinstall "{TORCH}" --index-url {INDEX}{build_for(card)}'
    if built is None:
        fault = f"There is a {names}, but this torch was built without CUDA."
        return Line("cuda", f"{names}, which this torch can't use", LACKS, fault, command)
    fault = f"There is a {names}, but this torch (CUDA {built}) can't reach it{f': {why}' if why else ''}."
    return Line("cuda", f"{names}, which torch can't reach", LACKS, fault, command)


def build_for(card: machine.Nvidia) -> str:
    """Which of pytorch.org's builds runs on a card: CUDA 13 knows none before 7.5, CUDA 12.6 none from 10.0 on."""
    newest, kind = card.cuda or (12, 0), card.capability or (0, 0)
    if newest >= (13, 0) and kind >= (7, 5):
        return "cu130"
    return "cu128" if newest >= (12, 8) and kind >= (10, 0) else "cu126"


def mend_torch() -> str:
    """The line for a torch that is missing, or that is there and doesn't work."""
    return install([TORCH], "") if installed("torch") is None else f"{install([TORCH])} --force-reinstall"
