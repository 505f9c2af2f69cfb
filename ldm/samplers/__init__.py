"""Samplers: each a pure function for one step from a noise level to the next.

A sampler is given `denoise`, the latent `x`, the schedule, the row it stands on, the steps so far and a source of
noise; it returns the `Step`. It keeps nothing: called twice, it answers the same twice. No sampler knows what the
network predicts (PNDM under `compat` excepted), whether there is guidance, or which family of models it drives.

`lines.py` has the lines they are made of, `onestep.py`, `twice.py`, `multistep.py` and `pndm.py` the methods.
"""

from functools import partial
from typing import NamedTuple

from ldm.errors import LDMError, nearest
from ldm.samplers.multistep import deis, dpm, dpmpp, dpmpp_2s, lms, unipc
from ldm.samplers.onestep import ddim, ddpm, euler, euler_ancestral, lcm, tcd
from ldm.samplers.pndm import plms, pndm
from ldm.samplers.twice import dpm2, dpm2_ancestral, flow_heun, heun
from ldm.sampling import Sampler


class Method(NamedTuple):
    """A sampler, and what one wants to know of it before one takes it."""

    step: Sampler
    order: (
        int | None
    )  # halving the steps divides its error by 2^order, given a past; with noise, its law's; None: no law
    evaluations: int  # of the network a step; the ends of a run may take fewer or more
    adds_noise: bool
    rule: str  # that of its class in diffusers, taken under `compat` where the file is another's
    paper: str
    eta: float | None = None  # how much noise it adds where the caller doesn't say; None: it has no such choice


SAMPLERS: dict[str, Method] = {
    "ddpm": Method(ddpm, 1, 1, True, "ddpm", "Ho et al. 2020"),
    "ddim": Method(ddim, 1, 1, False, "ddim", "Song et al. 2021", eta=0.0),
    "euler": Method(euler, 1, 1, False, "euler", "Karras et al. 2022"),
    "euler-a": Method(euler_ancestral, 1, 1, True, "heun", "k-diffusion"),
    "heun": Method(heun, 2, 2, False, "heun", "Karras et al. 2022"),
    "flow-heun": Method(flow_heun, 2, 2, False, "flow", "Heun, in the model's coordinates"),
    "dpm2": Method(dpm2, 2, 2, False, "dpm2", "Lu et al. 2022a, k-diffusion"),
    "dpm2-a": Method(dpm2_ancestral, 2, 2, True, "dpm2", "Lu et al. 2022a, k-diffusion"),
    "lms": Method(lms, 4, 1, False, "heun", "k-diffusion"),
    "plms": Method(plms, 2, 1, False, "ddim", "Liu et al. 2022"),
    "pndm": Method(pndm, 2, 1, False, "ddim", "Liu et al. 2022"),
    "dpm++2m": Method(partial(dpmpp, order=2, sde=False), 2, 1, False, "dpm", "Lu et al. 2022b"),
    "dpm++3m": Method(partial(dpmpp, order=3, sde=False), 3, 1, False, "dpm", "Lu et al. 2022b"),
    "dpm++2m-sde": Method(partial(dpmpp, order=2, sde=True), 2, 1, True, "dpm", "Lu et al. 2022b"),
    "dpm++3m-sde": Method(partial(dpmpp, order=3, sde=True), 2, 1, True, "dpm", "Lu et al. 2022b"),
    "dpm++2s": Method(dpmpp_2s, 2, 1, False, "singlestep", "Lu et al. 2022b"),
    "dpm2m": Method(partial(dpm, order=2), 2, 1, False, "dpm", "Lu et al. 2022a"),
    "dpm3m": Method(partial(dpm, order=3), 3, 1, False, "dpm", "Lu et al. 2022a"),
    "deis2": Method(partial(deis, order=2), 2, 1, False, "deis", "Zhang & Chen 2023"),
    "deis3": Method(partial(deis, order=3), 3, 1, False, "deis", "Zhang & Chen 2023"),
    "unipc1": Method(partial(unipc, order=1), 2, 1, False, "unipc", "Zhao et al. 2023"),
    "unipc2": Method(partial(unipc, order=2), 3, 1, False, "unipc", "Zhao et al. 2023"),
    "unipc3": Method(partial(unipc, order=3), 4, 1, False, "unipc", "Zhao et al. 2023"),
    "unipc1-bh1": Method(partial(unipc, order=1, bh1=True), 2, 1, False, "unipc", "Zhao et al. 2023"),
    "unipc2-bh1": Method(partial(unipc, order=2, bh1=True), 3, 1, False, "unipc", "Zhao et al. 2023"),
    "unipc3-bh1": Method(partial(unipc, order=3, bh1=True), 4, 1, False, "unipc", "Zhao et al. 2023"),
    "lcm": Method(lcm, None, 1, True, "lcm", "Luo et al. 2023"),
    "tcd": Method(tcd, None, 1, True, "tcd", "Zheng et al. 2024", eta=0.3),
}


def find_sampler(name: str) -> Method:
    """The sampler of that name. Raises LDMError that names the nearest one."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise LDMError(f"Unknown sampler {name!r}: ldm has {', '.join(SAMPLERS)}.{nearest(str(name), SAMPLERS)}")
    return SAMPLERS[name]


def table() -> str:
    """All samplers as text: order, evaluations a step, whether they add noise, and where they come from."""
    rows = [
        f"{name:12} {m.order or '–':>5} {m.evaluations:11}   {noise_of(m):18} {m.rule:10} {m.paper}"
        for name, m in SAMPLERS.items()
    ]
    return "\n".join(["sampler      order evaluations   noise              rule       source", *rows])


def noise_of(method: Method) -> str:
    if method.eta is None:
        return "yes" if method.adds_noise else "no"
    return f"eta, {method.eta:g} if unsaid"
