"""FLUX's transformer at full size beside diffusers': is it equal, how long does a step take, how much memory?

    python tests/measure_flux.py                                        FLUX.1-dev, bfloat16, 1024 x 1024, on a GPU
    python tests/measure_flux.py --model flux-schnell --size 768x1344 --batch 2
    python tests/measure_flux.py --model tiny-flux --device cpu --size 64x96     the same, small, where there is none

Random weights (every parameter drawn), which both sides share, so that 24 GB are there once. Of each side stand there:
milliseconds of a step (the median of `--repeat`, after one that isn't counted), and the most memory above the weights
while it ran, on a GPU as PyTorch has allocated it. Ours is measured twice: plain, and with what a loop prepares once,
the text and the modulations of its timesteps. The difference is held against diffusers' answer, and both against one in
float32 of the very same numbers (`ldm.parity.drawn.widened`), unless --no-truth is said.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ldm.checkpoints.architectures import find_architecture
from ldm.cli.parity import size
from ldm.models.flux import Flux, FluxConfig
from ldm.models.unet import Extras
from ldm.parity import flux, reference
from ldm.parity.calls import cast
from ldm.parity.compare import rms
from ldm.parity.drawn import draw, give, share, widened

T = 757.0
ROW = "| {:44} | {:>12} | {:>16} | {:>14} |"


def main() -> int:
    args = parsed()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here: `--model tiny-flux --device cpu --size 64x96` runs the same, small.")
        return 0
    dtype = getattr(torch, args.dtype)
    fields = find_architecture(args.model).parts["transformer"]
    ours, theirs = sides(fields, dtype, device)
    weights = sum(p.nbytes for p in ours.parameters()) / 2**20
    config, (width, height) = ours.config, args.size
    given = inputs(config, args, device, dtype)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {args.dtype}, {width} x {height} pixels, batch {args.batch}, {args.tokens} tokens; {where}, "
          f"torch {torch.__version__}, {', '.join(map(' '.join, reference.versions().items()))}; "
          f"{weights:.0f} MiB of weights, shared\n")  # fmt: skip
    print(ROW.format("", "ms a step", "MiB above weights", "off from fp32"))
    print(ROW.format(*["---"] * 4))
    part = flux.transformer(theirs)
    x, t, context, extras = given
    prepared = prepare(ours, context, extras)
    runs = {
        "diffusers": lambda: part.run(*given)["output"],
        "ldm, plain": lambda: ours(x, t, context, Extras(**extras)),
        "ldm, text and modulations prepared": lambda: ours(x, T, prepared),
    }
    with torch.no_grad():
        truth = None
        if not args.no_truth:
            with widened(theirs):
                truth = part.run(*cast(given, torch.float32))["output"]
        found = {name: measured(run, args.repeat, device) for name, run in runs.items()}
    for name, (answer, ms, peak) in found.items():
        error = "" if truth is None else f"{rms(answer, truth):.2e}"
        print(ROW.format(name, f"{ms:.1f}", "" if peak is None else f"{peak:.0f}", error))
    expected = found["diffusers"][0]
    print()
    for name in list(runs)[1:]:
        apart = (found[name][0].double() - expected.double()).abs().max().item()
        largest = expected.double().abs().max().item()
        print(f"{name}: at most {apart:.2e} from diffusers, whose largest value is {largest:.3g}"
              f"{' (equal, bit for bit)' if apart == 0 else ''}.")  # fmt: skip
    return 0


def parsed() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="flux-dev", help="flux-dev, flux-schnell, flux-fill, flux-canny, or tiny-flux")
    p.add_argument("--device", default="cuda")
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    p.add_argument("--size", type=size, default=(1024, 1024), metavar="WxH")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--no-truth", action="store_true", help="don't run it in float32, which takes a minute more")
    return p.parse_args()


def sides(fields: dict, dtype: torch.dtype, device: torch.device) -> tuple[Flux, torch.nn.Module]:
    """Ours and diffusers' transformer, of one set of random weights."""
    diffusers = reference.libraries()[0]
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel.from_config(fields)
    theirs = give(theirs, draw(theirs, dtype, device, seed=0), device)
    config = FluxConfig.from_json(fields)
    return share(partial(Flux, config), theirs, lambda key: key, device), theirs


def inputs(config: FluxConfig, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple:
    """Latents, timesteps, the text and what else it is told; numbers of a run's size."""
    g = torch.Generator(device).manual_seed(1)
    width, height = args.size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    x = normal(args.batch, config.channels_in, height // 8, width // 8)
    context = normal(args.batch, args.tokens, config.joint_attention_dim)
    extras = {"pooled": normal(args.batch, config.pooled_projection_dim)}
    if config.guidance_embeds:
        extras["guidance"] = torch.full((args.batch,), 4.0, device=device)  # which no dtype rounds
    t = torch.full((args.batch,), T, device=device)
    return x, round_t(t, dtype), context, extras


def round_t(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As diffusers rounds it, so that both are told the same."""
    return ((t / 1000).to(dtype) * 1000).float()


@torch.no_grad()
def prepare(ours: Flux, context: Tensor, extras: dict[str, Tensor]) -> object:
    global T
    T = float(round_t(torch.tensor(T), ours.dtype))
    return ours.prepare(context, Extras(**extras), [T])


def measured(run: Callable[[], Tensor], repeat: int, device: torch.device) -> tuple[Tensor, float, float | None]:
    """The answer, the median of milliseconds, and MiB above what was there."""
    cuda = device.type == "cuda"
    answer, times, peak = run(), [], None
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(repeat):
        begun = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - begun))
    if cuda:
        peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return answer, statistics.median(times), peak


if __name__ == "__main__":
    raise SystemExit(main())
