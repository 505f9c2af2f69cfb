"""What every training loop of this folder shares: the run's folder, the rate, the averaged weights, the picture sheets.

The loops themselves stay in the open, one a file. Everything random in a step is drawn from (seed, step), so a run that
was killed and resumed takes the very steps that an unbroken one takes.
"""

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm.errors import LDMError, say_on_stderr
from ldm.io.atomic import atomic_file
from ldm.io.folders import write_json
from ldm.io.weights import read_tensors, save_weights
from ldm.train import parallel
from ldm.train.muon import Muon, split_parameters


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all that is random in one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


MOST_SKIPPED = 20  # a single bad batch is passed over and must not end a night's work; so many are no accident


def trapezoid(step: int, steps: int, warmup: int = 100, cooldown: float = 0.3) -> float:
    """Factor on the learning rate: a linear rise, a plateau, and over the last `cooldown` of the run a linear fall.

    As good as half a cosine, and a run's length need not be known before its last third (Hagele et al. 2024).
    """
    return min((step + 1) / warmup, (steps - step) / (cooldown * steps), 1.0)


class Optimizer:
    """Muon for the matrices and AdamW for the rest, at one rate, with the gradient's norm clipped."""

    def __init__(self, models: list[nn.Module], lr: float, clip: float = 1.0):
        groups = [split_parameters(model) for model in models]
        matrices, rest = [p for m, _ in groups for p in m], [p for _, r in groups for p in r]
        self.lr, self.clip, self.parameters, self.skipped = lr, clip, matrices + rest, 0
        # As groups, of which either may be empty: a LoRA is all matrices, a word's vectors are none.
        self.muon = Muon([{"params": matrices}], lr)
        self.adamw = torch.optim.AdamW([{"params": rest}], lr, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, loss: Tensor, rate: float) -> float:
        """Backward pass and update at `rate` times the learning rate; returns the gradient's norm before clipping."""
        loss.backward()
        parallel.average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip).item()
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped == MOST_SKIPPED:
            raise LDMError(
                f"The loss has not been a finite number for {MOST_SKIPPED} steps: this training has failed. "
                "Begin again in another folder with a smaller --lr."
            )
        return norm

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def write_model(folder: Path, model: nn.Module, stem: str, config: object = None) -> None:
    """`config.json` and the weights; `stem` is diffusers' "diffusion_pytorch_model" or transformers' "model"."""
    if not parallel.leads():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model.state_dict(), folder / f"{stem}.safetensors")
    write_json(folder / "config.json", (config or model.config).to_json())  # last: it says that the model is there


def begin_from(model: nn.Module, file: Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
    """Give `model` the weights of a finished one, to train it further. What `file` lacks keeps its random beginning.

    Raises LDMError for a tensor of `file` that the model has no place for.
    """
    found = {rename(name): tensor.float() for name, tensor, _ in read_tensors(file) if rename(name) is not None}
    own = model.state_dict()
    for name, tensor in found.items():
        if name not in own or own[name].shape != tensor.shape:
            raise LDMError(f"{file}: {name} {tuple(tensor.shape)} has no place in the {type(model).__name__} to train.")
    model.load_state_dict(found, strict=False)
    left = sorted(set(own) - set(found))
    if parallel.leads():
        say_on_stderr(f"beginning from {file}" + (f", but not {', '.join(left)}" if left else ""))


class EMA:
    """Exponential moving average of a model's weights, the weights one ships (Ho et al. 2020, appendix B).

    The decay rises to `decay` as (1 + step) / (10 + step), so that the random beginning is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.state_dict().items():
            self.average[name].lerp_(p, 1 - decay)

    def of(self, model: nn.Module) -> nn.Module:
        """A copy of `model` with the averaged weights, to measure and to keep."""
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(self.average)
        return averaged.requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, p in state.items():
            self.average[name].copy_(p)  # onto the device that this run is on


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C; the function that is yielded tells whether it came."""
    came = False

    def hold(signum, frame):
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    old = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, old)


class Run:
    """One training's folder: `state.pt` (everything needed to go on), `log.jsonl`, and sheets of samples."""

    def __init__(self, folder: Path, parts: dict, recipe: object, save_every: float = 120.0):
        """`parts` are the objects with a state_dict that make up the state; `save_every` is in seconds.

        `recipe` is a dataclass with the number of `steps`. It may differ from the one that the run began with; what
        differs is said on stderr.
        """
        self.folder, self.parts, self.total, self.save_every = Path(folder), parts, recipe.steps, save_every
        self.recipe = asdict(recipe)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step, self.seconds = 0, 0.0
        if (self.folder / "state.pt").exists():
            state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
            lacking = sorted(set(parts) - set(state))
            if lacking:
                raise LDMError(
                    f"{self.folder / 'state.pt'} was begun by another version of ldm and lacks {', '.join(lacking)}: "
                    "remove that folder, or choose another --run."
                )
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]
            self.compare(state.get("recipe", {}))
        self.cut_log()

    def compare(self, before: dict) -> None:
        """Say in what the recipe differs from the one so far: a forgotten option is easily taken for a default."""
        for name, value in before.items():
            if name not in ("steps", "device", "sheet_every") and value != self.recipe.get(name) and parallel.leads():
                what = "has no effect on a run that has begun" if name == "init" else f"was {value!r} until now"
                now = f"{name} {self.recipe[name]!r}" if name in self.recipe else f"{name}, which is no more,"
                say_on_stderr(f"{self.folder}: {now} {what}.")

    def cut_log(self) -> None:
        """Drop the lines of steps that were taken but not saved before a kill: they will be taken again."""
        log = self.folder / "log.jsonl"
        if parallel.leads() and log.exists():
            lines = log.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]  # a kill may tear the last one
            kept = [line for line in whole if json.loads(line)["step"] <= self.step]
            if kept != lines:
                with atomic_file(log, "w") as file:
                    file.writelines(kept)

    def steps(self) -> Iterator[int]:
        """Count from where the run stands to its end, with a progress bar; saves now and then, and at the end.

        Ctrl-C lets the step in hand finish, saves, and then stops; a second Ctrl-C stops at once.
        """
        start = saved = time.monotonic()
        before = self.seconds
        todo, quiet = range(self.step, self.total), not parallel.leads()
        self.bar = tqdm(todo, initial=self.step, total=self.total, desc=self.folder.name, disable=quiet)
        with interruptible() as interrupted:
            for step in self.bar:
                yield step
                self.step, self.seconds = step + 1, before + time.monotonic() - start
                stop = parallel.any_of_us(interrupted())
                if time.monotonic() - saved > self.save_every or stop or self.step == self.total:
                    self.save()
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt

    def save(self) -> None:
        if not parallel.leads():
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_file(self.folder / "state.pt") as file:
            torch.save({**state, "step": self.step, "seconds": self.seconds, "recipe": self.recipe}, file)

    def log(self, step: int, **numbers: float) -> None:
        """One line of the log, and the same beside the progress bar."""
        if not parallel.leads():
            return
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()})
        line = {"step": step, "seconds": round(self.seconds, 1), **{k: float(f"{v:.6g}") for k, v in numbers.items()}}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def sheet(self, step: int, images: Tensor, columns: int) -> None:
        """Write `images` (B, 3, H, W) in [-1, 1] as one picture, `columns` wide."""
        if not parallel.leads():
            return
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        rows = [np.concatenate(pixels[i : i + columns], axis=1) for i in range(0, len(pixels), columns)]
        Image.fromarray(np.concatenate(rows, axis=0)).save(self.folder / f"sheet-{step:06d}.png")
