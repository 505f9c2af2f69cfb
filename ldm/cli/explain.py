"""`ldm explain`: a run as a page to step through in any browser."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import added, additions
from ldm.cli.generate import add_settings
from ldm.cli.options import (
    LEVELS,
    MEMORY,
    READING,
    SEED,
    add_memory,
    add_model_options,
    one_of,
    open_model,
    progress,
    real,
    said,
    whole,
)
from ldm.errors import LDMError, say_on_stderr
from ldm.io.atomic import check_writable
from ldm.text.prompts import DIALECTS

if TYPE_CHECKING:
    from tqdm import tqdm

    from ldm.pipeline import Pipeline
    from ldm.run import Run
    from ldm.sampling import Step
    from ldm.settings import Settings

HELP = """Draw a picture and write the inside of its run as a page to step through: at every step the latent,
the predicted picture, the attention to each word, and what guidance adds.

  ldm explain "a large red house on snow at night" --seed 7 --out run.html
  ldm explain "a large red house on snow at night" --with-sampler ddim --with-steps 12

The page is one file, and needs no network. Any of the options --with-... draws a second run and puts it beside the
first: it is as the first one but for what they say."""

SETTINGS = (
    "negative", *LEVELS, "guidance", "eta", "width", "height", "seed", "clip_skip", "dialect", "true_guidance",
    "max_sequence_length",
)  # fmt: skip
BESIDE = ("prompt", "seed", "negative", "steps", "sampler", "guidance", "dialect")  # what --with-... can change


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("explain", help="write the inside of a run as a page to step through", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument("prompt", help='what to draw; "" draws without a prompt')
    p.add_argument("--out", default="run.html", metavar="FILE", help="the page (default: run.html)")
    p.add_argument("--overwrite", action="store_true", help="replace whatever has the name of the page")
    add_model_options(p)
    add_settings(p.add_argument_group("the picture (what is left out is as the model's folder says)"))
    added.add(p.add_argument_group(added.TITLE))
    add_memory(p.add_argument_group("memory and time"))
    second = p.add_argument_group("a second run beside it")
    second.add_argument("--with-prompt", metavar="TEXT", help="of these words")
    second.add_argument("--with-seed", type=SEED, metavar="SEED", help="from this seed")
    second.add_argument("--with-negative", metavar="TEXT", help="steered away from this")
    second.add_argument("--with-steps", type=whole(1), metavar="N", help="of so many steps")
    second.add_argument("--with-sampler", metavar="NAME", help="by this method")
    second.add_argument("--with-guidance", type=real(), metavar="SCALE", help="guided so strongly")
    second.add_argument("--with-dialect", type=one_of(DIALECTS), metavar="NAME", help="its prompt read so")


def run(args: argparse.Namespace) -> None:
    path = Path(args.out)
    prepare_page(path, args.overwrite)
    found = additions.find(added.wishes(args), args.allow_pickle)
    pipe, _ = open_model(args.model, args.dtype, args.device, said(args, MEMORY), said(args, READING), found)
    runs = [{"prompt": args.prompt, **said(args, SETTINGS)}]
    changes = {name: getattr(args, f"with_{name}") for name in BESIDE}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = [checked(pipe, runs[0])]
    if changes:
        runs.append(beside(runs[0], changes))
        settings.append(checked(pipe, runs[1]))
    with progress(sum(each.steps for each in settings)) as bar, counted(pipe, bar):
        bar.clear()  # the first step may have something to say about the prompt
        traces = [pipe.trace(**each) for each in runs]
    traces[0].to_html(path, *traces[1:])
    print(path)


def beside(first: dict, changes: dict) -> dict:
    """What a second run is asked for. Raises LDMError where a change can't go with what the first one says."""
    from ldm.samplers import find_sampler

    second = first | changes
    for name in ("timesteps", "sigmas"):
        if "steps" in changes and isinstance(first.get(name), list):
            raise LDMError(f"--with-steps can't go with --{name}, whose numbers make the steps: leave one of them out.")
    if "sampler" in changes and second.get("eta") and find_sampler(second["sampler"]).eta is None:
        del second["eta"]
        say_on_stderr(f"The second run is drawn without --eta: {second['sampler']} has none.")
    return second


def checked(pipe: "Pipeline", asked: dict) -> "Settings":
    """The settings of a run. Refuses at once, before anything is drawn, what the model cannot do."""
    settings = pipe.settings(**{name: value for name, value in asked.items() if name != "clip_skip"})
    pipe.schedule_of(settings)
    return settings


def prepare_page(path: Path, overwrite: bool) -> None:
    """See that the page can be written, and that nothing is lost but a page of ours."""
    from ldm.lab.page import is_page

    if path.suffix.lower() not in (".html", ".htm"):
        raise LDMError(f"--out {path} must end in .html.")
    check_writable(path)
    if path.exists() and not overwrite and not is_page(path):
        raise LDMError(f"{path} is there already and is no page by ldm: choose another --out, or say --overwrite.")


@contextmanager
def counted(pipe: "Pipeline", bar: "tqdm") -> Iterator[None]:
    """Every step that the pipeline takes moves the bar."""

    def watcher(run: "Run") -> "Run":
        def sampler(*given: object) -> "Step":
            step = run.sampler(*given)
            bar.update()
            return step

        return replace(run, sampler=sampler)

    pipe.watchers.append(watcher)
    try:
        yield
    finally:
        pipe.watchers.remove(watcher)
