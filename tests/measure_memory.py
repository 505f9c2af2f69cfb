"""What do the switches of `ldm.memory` save, and what do they cost? Every one against the plain path, as a table.

    python tests/measure_memory.py                       on the CPU, with all cores: some minutes
    python tests/measure_memory.py --device cuda         on a GPU
    python tests/measure_memory.py --only vae            one of scenes, unet, vae, load

`scenes` is the embedded model: eight pictures, five guided steps, decoding. `unet` is Stable Diffusion 1.5's at full
width with random weights: one guided call for a picture of 512 x 512. `vae` is its VAE, decoding such a picture.
`load` reads a file of some 550 MB. Every case is a fork of its own. Of memory stand there, above what the process had
before: what was held when computing began (the weights), and the most there was. On the CPU that is resident memory
(getrusage), on a GPU what PyTorch has allocated there. Seconds are the processor's on the CPU, which a busy machine
doesn't lengthen, those of the clock on a GPU; `--threads 1` counts them best, for threads that wait count, too.
"""

import argparse
import os
import platform
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ldm
from ldm import memory
from ldm.errors import LDMError
from ldm.io.weights import blank, load_weights, save_weights
from ldm.models.unet import CROSS_DOWN, CROSS_UP, DOWN, UP, UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.precision import autocasting
from ldm.tiles import in_tiles

MIB = 2**20
SD_UNET = {"cross_attention_dim": 768}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
LOADED = {
    "block_out_channels": (128, 256, 512, 512),
    "cross_attention_dim": 768,
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
}
Compute = Callable[[], Tensor]


class Held:
    """Parts as `ldm.memory` asks for them."""

    def __init__(self, **parts: nn.Module):
        self.named, self.where = parts, None
        vars(self).update(parts)

    def parts(self) -> dict[str, nn.Module]:
        return self.named


@torch.no_grad()
def random_weights(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """Weights of fan-in scale, gains of norms 1, biases small: a deep network's values stay of order 1. One by one."""
    with blank():
        model = make()
    g, state = torch.Generator().manual_seed(0), {}
    for name, p in model.named_parameters():
        numbers = torch.empty(p.shape, device="cpu").normal_(generator=g)
        if p.dim() > 1:
            numbers.mul_(p[0].numel() ** -0.5)
        else:
            numbers.mul_(0.1).add_(float(name.endswith("weight")))
        state[name] = numbers.to(device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ what is computed


def scenes(device: str, dtype: torch.dtype) -> tuple[Held, Compute]:
    pipe = ldm.load("scenes", dtype, device)
    held = Held(text_encoder=pipe.text_encoder, unet=pipe.unet, vae=pipe.vae)
    ids = torch.cat([pipe.tokenizer(words).ids for words in ["", "a large red house on snow at night"]]).to(device)
    schedule, start = pipe.schedule(5), normal(7, 8, 4, 16, 16).to(device)

    def compute() -> Tensor:
        context = held.text_encoder.context(ids).repeat_interleave(8, dim=0)
        prepared, x = held.unet.prepare(context), start * schedule.start_scale
        for level, after in zip(schedule.levels, schedule.levels[1:], strict=False):
            uncond, cond = held.unet(torch.cat([x, x]).to(dtype), level.t, prepared).to(x.dtype).chunk(2)
            eps = uncond + 4.0 * (cond - uncond)
            x = after.alpha * (x - level.sigma * eps) / level.alpha + after.sigma * eps
        return held.vae.decode(x.to(dtype))

    return held, compute


def unet(device: str, dtype: torch.dtype) -> tuple[Held, Compute]:
    held = Held(unet=random_weights(lambda: UNet(UNetConfig(**SD_UNET)), device, dtype))
    x, context = normal(1, 2, 4, 64, 64).to(device, dtype), normal(2, 2, 77, 768).to(device, dtype)
    return held, lambda: held.unet(x, 500.0, held.unet.prepare(context))


def vae(device: str, dtype: torch.dtype) -> tuple[Held, Compute]:
    held = Held(vae=random_weights(lambda: VAE(VAEConfig(**SD_VAE)), device, dtype))
    z = normal(3, 1, 4, 64, 64).to(device, dtype)
    return held, lambda: held.vae.decode(z)


# ------------------------------------------------------------------------------------------------ how


@contextmanager
def switched(switch: str, held: Held, compute: Compute, device: str) -> Iterator[Compute]:
    """The computation with a switch set; "+" joins two."""
    with ExitStack() as stack:
        for each in switch.split(" + "):
            if each == "scores written out":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            elif each == "attention in slices of 512":
                memory.slice_attention(held, 512)
            elif each == "one picture at a time":
                memory.slice_vae(held)
            elif each == "tiles of 256 pixels":
                decode = held.vae.decode
                held.vae.decode = lambda x0, decode=decode: in_tiles(decode, x0, 32, 8, held.vae.config.factor)
            elif each == "channels last":
                memory.channels_last(held)
            elif each == "autocast to bfloat16":
                stack.enter_context(autocasting(torch.bfloat16, torch.device(device)))
            elif each.startswith("offloaded by "):
                memory.offload(held, device, by=each.removeprefix("offloaded by "))
        yield compute


CASES = {
    "scenes": (
        scenes,
        ["plain", "attention in slices of 512", "one picture at a time", "channels last", "autocast to bfloat16"]
        + ["weights in bfloat16", "offloaded by parts", "offloaded by blocks"],
    ),
    "unet": (
        unet,
        ["plain", "attention in slices of 512", "scores written out", "scores written out + attention in slices of 512"]
        + ["channels last", "autocast to bfloat16", "weights in bfloat16", "offloaded by parts", "offloaded by blocks"],
    ),
    "vae": (
        vae,
        ["plain", "attention in slices of 512", "scores written out", "scores written out + attention in slices of 512"]
        + [
            "tiles of 256 pixels",
            "channels last",
            "autocast to bfloat16",
            "weights in bfloat16",
            "offloaded by blocks",
        ],
    ),
}


# ------------------------------------------------------------------------------------------------ measuring


def resident() -> int:
    """Bytes of this process in memory just now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def measure(name: str, switch: str, device: str, plain: Path) -> dict:
    """In a fork: memory, seconds and the numbers. The first call counts, as it does for whoever draws one picture."""
    now = torch.cuda.memory_allocated if device == "cuda" else resident
    before = now()
    dtype = torch.bfloat16 if switch == "weights in bfloat16" else torch.float32
    held, compute = CASES[name][0](device, dtype)
    with switched(switch, held, compute, device) as run:
        weights = now() - before
        if device == "cuda":
            run()  # kernels are loaded and chosen at the first call
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter if device == "cuda" else time.process_time
        since = clock()
        out = run().float().cpu()
        seconds = clock() - since
    most = peak(device) - before
    if switch == "plain":
        torch.save(out, plain)
    reference = torch.load(plain)
    apart, rms = (out - reference).abs().max().item(), (out - reference).square().mean().sqrt().item()
    said = {"weights": weights / MIB, "peak": most / MIB, "seconds": seconds}
    return said | {"apart": apart, "rms": rms, "size": reference.square().mean().sqrt().item()}


def forked(work: Callable[[], dict], folder: Path) -> dict:
    """What `work` returns, computed in a fork of this process, which must compute nothing itself: a fork of a process
    that runs threads would wait for them for ever."""
    path = folder / "said.pt"
    path.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            torch.save(work(), path)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(0)
    os.waitpid(pid, 0)
    if not path.exists():
        raise LDMError("A case broke off (see above; without a word, there was too little memory).")
    return torch.load(path)


def table(name: str, device: str, folder: Path) -> None:
    print(f"\n| {name} | weights, MiB | peak, MiB | seconds | largest difference | its rms | rms of the numbers |")
    print("|---|---|---|---|---|---|---|")
    for switch in CASES[name][1]:
        said = forked(lambda switch=switch: measure(name, switch, device, folder / "plain.pt"), folder)
        numbers = "{weights:.0f} | {peak:.0f} | {seconds:.2f} | {apart:.1e} | {rms:.1e} | {size:.2f}".format(**said)
        print(f"| {switch} | {numbers} |", flush=True)


def loaded(path: Path, dtype: torch.dtype, device: str) -> dict:
    """In a fork: the peak of resident memory, and of what of it is not a window on the file."""
    most, done = 0, False

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def watch() -> None:
        nonlocal most
        while not done:
            most = max(most, own())
            time.sleep(0.001)

    before, own_before = resident(), own()
    with blank():
        model = UNet(UNetConfig(**LOADED))
    watcher = threading.Thread(target=watch)
    watcher.start()
    since = time.perf_counter()
    load_weights(model, path, dtype, device)
    seconds = time.perf_counter() - since
    done = True
    watcher.join()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    most -= own_before
    return {"model": held, "largest": largest, "own": most, "peak": peak("cpu") - before, "seconds": seconds}


def loading(device: str, folder: Path) -> None:
    path = folder / "model.safetensors"

    def write() -> dict:
        model = random_weights(lambda: UNet(UNetConfig(**LOADED)), "cpu", torch.float32)
        save_weights(model.state_dict(), path)
        return {}

    forked(write, folder)
    print(f"\nA float32 file of {path.stat().st_size / MIB:.0f} MiB, read to {device}")
    print("\n| read as | model, MiB | its largest tensor | peak of own memory | with the file's pages | seconds |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        said = forked(lambda dtype=dtype: loaded(path, dtype, device), folder)
        sizes = " | ".join(f"{said[each] / MIB:.0f}" for each in ("model", "largest", "own", "peak"))
        print(f"| {str(dtype).removeprefix('torch.')} | {sizes} | {said['seconds']:.2f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default=None, choices=[*CASES, "load"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads, torch {torch.__version__}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES if args.only is None else [args.only] if args.only != "load" else []:
            table(name, args.device, Path(folder))
        if args.only in (None, "load"):
            loading(args.device, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
