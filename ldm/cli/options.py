"""What the commands share: a parser that answers in one sentence, and the kinds of values that options take."""

import argparse
import math
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ldm.errors import LDMError, nearest

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from ldm.cli.additions import Additions
    from ldm.pipeline import Pipeline

DTYPES = ("float32", "float16", "bfloat16", "float64")
DEVICES = ("cpu", "cuda", "mps")


class Parser(argparse.ArgumentParser):
    """argparse without its page of usage before the sentence, and without abbreviated options."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (-\S+): ", r"\1 ", message)
        choice = re.fullmatch(r"argument (\w+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            known = re.findall(r"[\w-]+", choice[3])
            message = f"unknown {choice[1].lower()} {choice[2]!r}: {', '.join(known)}.{nearest(choice[2], known)}"
        stop = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"ldm: {message[0].upper()}{message[1:]}{stop} See `{self.prog} --help`.\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Say which words of the command line have no meaning here."""
        known = set(re.findall(r"--[\w-]+", self.format_usage()))
        option = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
        if option is None:
            self.error(f"{unknown[0]!r} is one word too many: put words that belong together in quotation marks")
        self.error(f"unknown option {option}.{nearest(option, known)}")


def read_again(add: Callable[["argparse._ActionsContainer"], None], told: list[str], what: str) -> argparse.Namespace:
    """Words that a record keeps, read by the options that `add` declares; nothing in them is taken on trust.

    Raises LDMError for others. `what`: whose words they are, and what they tell of.
    """
    parser = Parser(prog=what, add_help=False)
    add(parser)
    parser.error = lambda message: (_ for _ in ()).throw(LDMError(f"{what}: {message}."))
    args, unknown = parser.parse_known_args(told)
    if unknown:
        raise LDMError(f"{what} in words that ldm doesn't know: {unknown[0]!r}.")
    return args


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The kind of option that is a whole number between two ends."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {number}")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {number}")
        return number

    return read


def real(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The kind of option that is a finite number between two ends."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        if not least <= number <= most:
            ends = f"{least:g} or more" if math.isinf(most) else f"between {least:g} and {most:g}"
            raise argparse.ArgumentTypeError(f"must be {ends}, not {text}")
        return number

    return read


def one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    """The kind of option that is one of a few words."""

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"must be {' or '.join(known)}, not {text!r}.{nearest(text, known)}")
        return text

    return read


def dtypes(text: str) -> str:
    """The kind of option that `dtypes_of` reads: a dtype for all parts, and others for some."""
    dtypes_of(text)
    return text


def dtypes_of(text: str) -> dict[str, str]:
    """ "float16,vae=float32" -> {"rest": "float16", "vae": "float32"}: what `ldm.load` takes."""
    first, *others = text.split(",")
    found = {"rest": one_of(DTYPES)(first)}
    for word in others:
        part, _, dtype = word.partition("=")
        if not dtype:
            raise argparse.ArgumentTypeError(f"must read DTYPE,PART=DTYPE, like float16,vae=float32, not {text!r}")
        found[part] = one_of(DTYPES)(dtype)
    return found


def numbers(text: str) -> list[float]:
    """The kind of option that is numbers with commas between them."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, not {text!r}") from None


def name_or_numbers(text: str) -> str | list[float]:
    """The kind of option that is a name, or numbers with commas between them."""
    if re.fullmatch(r"[A-Za-z][\w-]*", text):
        return text
    try:
        return numbers(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}".replace("must be", "must be a name or", 1)) from None


SEED = whole(0, 2**63 - 1)  # what torch takes, with room for the seeds after it


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="scenes", help="an embedded model's name, a folder in diffusers' format, a single file "
        "(.safetensors, .ckpt), or a name of the hub: org/name, or one of those that `ldm fetch` lists (default: "
        "scenes)",
    )  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_device(parser)
    parser.add_argument(
        "--dtype", default="float32", type=dtypes, metavar="DTYPE[,PART=DTYPE...]",
        help=f"{', '.join(DTYPES)}; or float16,vae=float32, for a part that is to have another (default: float32)",
    )  # fmt: skip
    add_reading(parser)


READING = ("variant", "prediction_type", "parts_of", "allow_pickle")  # how a model's files are read


def add_reading(parser: "argparse._ActionsContainer") -> None:
    """How the model's files are read: `READING`. What the picture's record has of them, `ldm rerun` takes from it."""
    parser.add_argument(
        "--variant", metavar="NAME", help="one of several sets of weights: fp16 of a folder; ema of a single file"
    )
    parser.add_argument(
        "--prediction-type", metavar="NAME", help="epsilon or v_prediction, where the files don't say or are mistaken"
    )
    parser.add_argument(
        "--parts-of", metavar="MODEL", help="of a file that is FLUX's transformer alone, as they are published: the "
        "model whose text encoders and VAE are the rest",
    )  # fmt: skip
    allow_pickle(parser)


def allow_pickle(parser: "argparse._ActionsContainer") -> None:
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read .ckpt and .bin files; ldm takes the tensors and runs nothing"
    )


def add_device(parser: argparse.ArgumentParser, default: str | None = "cpu") -> None:
    parser.add_argument("--device", default=default, help="cpu, cuda, cuda:1, mps (default: cpu)")


CASTS = ("bfloat16", "float16")  # what autocast computes in
BITS = {"int8": 8, "int4": 4}  # what weights are quantised to
MEMORY = ("offload", "slice_vae", "slice_attention", "channels_last", "autocast", "quantise", "mapped")


def add_memory(parser: "argparse._ActionsContainer", autocast: bool = True) -> None:
    """Less memory, or less time: `ldm.memory`. The picture is the same within rounding, but for the last two."""
    parser.add_argument(
        "--offload", type=one_of(("parts", "blocks")), metavar="BY", help="keep the weights on the CPU, and bring to "
        "--device the part that is at work, or (blocks) the layer: the least memory, and slow",
    )  # fmt: skip
    parser.add_argument(
        "--mapped", action="store_true", help="leave the weights in their files, and read them as they are used: with "
        "--offload, or on the CPU; --dtype must be that of the files",
    )  # fmt: skip
    parser.add_argument("--slice-vae", action="store_true", help="decode a batch picture by picture")
    parser.add_argument(
        "--slice-attention", type=whole(1), metavar="ROWS", help="so many positions look at the others at a time; of "
        "use only where PyTorch has no fused attention",
    )  # fmt: skip
    parser.add_argument("--channels-last", action="store_true", help="lay convolutions out so: often faster")
    if not autocast:  # what draws a picture again takes them from the picture
        parser.set_defaults(autocast=None, quantise=None)
        return
    parser.add_argument(
        "--autocast", type=one_of(CASTS), metavar="DTYPE", help="compute in it with the weights in "
        "--dtype: this one changes the picture a little",
    )  # fmt: skip
    parser.add_argument(
        "--quantise", type=one_of(tuple(BITS)), metavar="BITS", help="int8 or int4: hold the large weights in 8 or 4 "
        "bits, for FLUX on small cards (needs bitsandbytes); this changes the picture, too",
    )  # fmt: skip


def save_memory(pipe: "Pipeline", wish: dict, device: "torch.device", nets: Sequence["torch.nn.Module"] = ()) -> None:
    """Do to a pipeline, and to ControlNets beside it, what was wished of `MEMORY`."""
    import torch

    from ldm import memory, quantised

    if "slice_attention" in wish:
        memory.slice_attention(pipe, wish["slice_attention"], nets)
    memory.slice_vae(pipe, "slice_vae" in wish)
    if "channels_last" in wish:
        memory.channels_last(pipe, others=nets)
    if "quantise" in wish and not any(quantised.is_quantised(part) for part in pipe.parts().values()):
        quantised.quantise(pipe, BITS[wish["quantise"]])
    if "autocast" in wish:
        pipe.autocast = getattr(torch, wish["autocast"])
    if "offload" in wish:
        memory.offload(pipe, device, wish["offload"], nets)


LEVELS = ("steps", "sampler", "rule", "sigmas", "timesteps", "compat")  # the options that make the table of levels


def add_levels(parser: "argparse._ActionsContainer") -> None:
    """Which levels of noise a run visits, and how it goes from one to the next: `LEVELS`."""
    parser.add_argument("--steps", type=whole(1), metavar="N", help="steps from noise to picture")
    parser.add_argument("--sampler", metavar="NAME", help="ddim, euler, heun, dpm++2m ...: `ldm samplers` lists them")
    parser.add_argument(
        "--rule", metavar="NAME", help="make the table of noise levels as this one of diffusers' schedulers does: "
        "ddpm, ddim, euler, heun, dpm2, dpm, singlestep, deis, unipc, lcm, tcd, flow",
    )  # fmt: skip
    parser.add_argument(
        "--sigmas", type=name_or_numbers, metavar="LEVELS", help="the levels sigma/alpha: spaced, karras, exponential, "
        "beta, ays, ays-xl, even; or N + 1 falling numbers with commas between them",
    )  # fmt: skip
    parser.add_argument(
        "--timesteps", type=numbers, metavar="T,T,...", help="instead: N falling timesteps with commas between them"
    )
    parser.add_argument(
        "--compat", action="store_true", help="do as diffusers does where it departs from a method, and take the rule "
        "of the sampler's class there",
    )  # fmt: skip


def said(args: argparse.Namespace, names: Sequence[str]) -> dict:
    """Those of the options that the command line sets; the others are left to the model's folder."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def find_device(name: str) -> "torch.device":
    """The device of that name. Raises LDMError if there is no such device, here or at all."""
    import torch

    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if match is None:
        raise LDMError(f"Unknown device {name!r}: ldm knows {', '.join(DEVICES)}.{nearest(name, DEVICES)}")
    kind, number = match[1], int(match[2] or 0)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if number >= count:
        here = "this torch sees no such device here" if count == 0 else f"the last one here is {kind}:{count - 1}"
        raise LDMError(f"There is no device {name!r}: {here}. Use --device cpu, or install a torch built for it.")
    return torch.device(name)


def open_model(
    name: str,
    dtype: str,
    device: str,
    wish: dict | None = None,
    reading: dict | None = None,
    additions: "Additions | None" = None,
) -> tuple["Pipeline", Callable[[], str]]:
    """The model, and a function that tells its hash: that is computed meanwhile, for large models take seconds.

    `wish`: what of `MEMORY` was said; `reading`: what of `READING`; `additions`: what is added to it.
    """
    from ldm.checkpoints.folder import home_of_parts
    from ldm.checkpoints.places import INDEX, find_model
    from ldm.io.folders import folder_hash
    from ldm.loading import load

    where, wish, reading = find_device(device), wish or {}, reading or {}
    if "offload" in wish and where.type == "cpu":
        raise LDMError("--offload brings to another device what is at work, and the CPU has all of it: say --device.")
    place = find_model(name, INDEX, reading.get("variant"), "allow_pickle" in reading)
    home = home_of_parts(place) if place.is_dir() else None
    places = [place] if home is None else [place, home]
    if "parts_of" in reading:
        places.append(find_model(reading["parts_of"], INDEX, reading.get("variant"), "allow_pickle" in reading))
    model_hash = Background(lambda each: "+".join(map(folder_hash, each)), places)
    found = dtypes_of(dtype)
    kept = "cpu" if "offload" in wish else where
    pipe = load(place, found if len(found) > 1 else found["rest"], kept, mapped="mapped" in wish, **reading)
    if additions is not None:
        additions.put_on(pipe)
    if wish:
        save_memory(pipe, wish, where)
    return pipe, model_hash.result


class Background(threading.Thread):
    """A function that runs while others do; `result` waits for it. A daemon: Ctrl-C doesn't wait."""

    def __init__(self, function: Callable[[list[Path]], str], argument: list[Path]):
        super().__init__(daemon=True)
        self.function, self.argument, self.value, self.error = function, argument, "", None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.function(self.argument)
        except Exception as error:  # told to whoever asks for the result
            self.error = error

    def result(self) -> str:
        self.join()
        if self.error is not None:
            raise self.error
        return self.value


def progress(total: int, unit: str = "step") -> "tqdm":
    """A bar on stderr, if a person is looking at it."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, file=sys.stderr, disable=None, dynamic_ncols=True, leave=False)
