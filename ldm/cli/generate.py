"""`ldm generate`: from sentences to PNG files, each of which can tell how it was made."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import added, additions, given, wishes
from ldm.cli.draw import draw, explain
from ldm.cli.inside import SHEET, Inside, other_run
from ldm.cli.jobs import Job, batches, make_folder, obstacle, plan, prepare, prepare_sheet, read_prompts
from ldm.cli.options import (
    LEVELS,
    MEMORY,
    READING,
    SEED,
    add_levels,
    add_memory,
    add_model_options,
    one_of,
    open_model,
    progress,
    real,
    said,
    whole,
)
from ldm.cli.record import DECIDES, make_record, pixel_hash, told_of_additions, told_of_memory, told_of_reading
from ldm.errors import LDMError
from ldm.io.png import save_png
from ldm.text.prompts import DIALECTS

if TYPE_CHECKING:
    from tqdm import tqdm

    from ldm.sampling import Step
    from ldm.settings import Settings

# Options that `ldm.settings.choose_settings` knows.
SETTINGS = (
    "negative", *LEVELS, "guidance", "eta", "width", "height", "strength", "steps_are", "image_guidance", "noise_level",
    "sizes", "negative_sizes", "dialect", "true_guidance", "max_sequence_length",
)  # fmt: skip
MOST_PIXELS = 16_384  # along a side: beyond it is a slip of the finger, and would only eat the memory

HELP = """Draw pictures from a sentence, or from a file of sentences.

  ldm generate "a large red house on snow at night" --seed 7 --out picture.png
  ldm generate "a small blue fish" --count 4 --save-steps inside/
  ldm generate --prompts prompts.txt --out pictures/
  ldm generate "a large (red:1.3) house on snow by day" --dialect a1111 --lora scenes-neon:0.8

Each PNG carries its prompt, seed, settings and the model's hash: `ldm rerun picture.png` draws it again."""

NAMES = """where the pictures go:
  --out name.png     that file; with --count, name-SEED.png. An earlier picture by ldm of that name is replaced.
  --out folder/      PROMPT-SEED.png in it. A picture that is there already is not drawn again, so a long run that
                     was stopped goes on when the same command is given again. One that was drawn with other
                     settings is never replaced unless you say --overwrite.
  no --out           as a folder: the present one, or pictures/ with --prompts.
"""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser(
        "generate", help="draw pictures from words and pictures", description=HELP, epilog=f"{wishes.HELP}\n{NAMES}"
    )
    p.set_defaults(run=run, parser=p)
    p.add_argument("prompt", nargs="?", help='what to draw; "" draws without a prompt')
    p.add_argument(
        "--prompts", metavar="FILE", help="a text file, one prompt a line; lines that begin with # don't count"
    )
    p.add_argument("--out", metavar="PATH", help="a .png file or a folder (see below)")
    p.add_argument("--overwrite", action="store_true", help="replace whatever has the name of a picture to be drawn")
    p.add_argument("--save-steps", metavar="DIR", help="write the predicted picture at every step, and a contact sheet")
    add_model_options(p)
    add_settings(p.add_argument_group("the pictures (what is left out is as the model's folder says)"))
    added.add(p.add_argument_group(added.TITLE))
    wishes.add(p.add_argument_group("pictures given (see below)"))
    add_memory(p.add_argument_group("memory and time"))
    batch = p.add_argument_group("several pictures")
    batch.add_argument("--count", type=whole(1), default=1, metavar="N", help="pictures for each prompt (default: 1)")
    batch.add_argument(
        "--batch", type=whole(1), default=4, metavar="N", help="how many are drawn together (default: 4)"
    )
    alone = "draw each alone: bit for bit as if it were the only one; in a batch it may be off by a grey level"
    batch.add_argument("--one-by-one", action="store_true", help=alone)


def add_settings(p: "argparse._ArgumentGroup") -> None:
    """What decides how a picture looks. Left out, most are as the model's folder says."""
    p.add_argument("--seed", type=SEED, default=0, help="picture k of a prompt is drawn from SEED + k (default: 0)")
    p.add_argument("--negative", metavar="TEXT", help="what to steer away from")
    p.add_argument(
        "--dialect", type=one_of(DIALECTS), metavar="NAME", help="how prompts are read: plain (default), a1111 with "
        "(word:1.2), BREAK, [a:b:0.5] and more than 75 tokens, or compel with word++; `ldm tokens` shows it",
    )  # fmt: skip
    p.add_argument(
        "--guidance",
        type=real(),
        metavar="SCALE",
        help="how strongly the prompt counts; 1 or less: not guided, as Turbo models are drawn. FLUX.1-dev is told it "
        "as a number instead, 3.5 if left out",
    )
    p.add_argument(
        "--true-guidance", type=real(), metavar="SCALE", help="of FLUX.1-dev and its kin, which are told --guidance: "
        "guide away from --negative, as other models do; above 1 a step takes twice the time",
    )  # fmt: skip
    p.add_argument(
        "--max-sequence-length", type=whole(1), metavar="N", help="of FLUX: how many tokens of the prompt are read (if "
        "left out 512, by schnell 256)",
    )  # fmt: skip
    add_levels(p)
    p.add_argument(
        "--eta", type=real(0, 1), help="noise on the way, 0 to 1, of ddim (0 if left out) and tcd (0.3 if left out)"
    )
    p.add_argument("--width", type=whole(1, MOST_PIXELS), metavar="PIXELS", help="a multiple of 8 (of FLUX, 16)")
    p.add_argument("--height", type=whole(1, MOST_PIXELS), metavar="PIXELS", help="a multiple of 8 (of FLUX, 16)")
    p.add_argument(
        "--clip-skip", type=whole(0), default=0, metavar="N", help="last layers of the text encoder to leave out"
    )


def run(args: argparse.Namespace) -> None:
    prompts = wanted(args)
    jobs = plan(prompts, range(args.seed, args.seed + args.count), args.out, many=args.prompts is not None)
    prepare(jobs, args.overwrite)
    if args.save_steps:
        make_folder(Path(args.save_steps))
    if args.explain:
        prepare_sheet(Path(args.explain), "explains", args.overwrite)
    check_places(args, [job.path for job in jobs])
    drawing = Drawing(args)
    drawing.check(jobs[0])
    if args.explain:
        sheet = explain(drawing.given, drawing.settings(jobs[0]))
        save_png(sheet, args.explain, {"explains": drawing.given.words()})
        print(args.explain)
    waiting = drawing.waiting(jobs)
    if len(waiting) < len(jobs):
        drawn = f"{len(jobs) - len(waiting)} of {len(jobs)} pictures are" if len(jobs) > 1 else f"{jobs[0].path} is"
        print(f"{drawn} drawn already.", file=sys.stderr)
    if waiting:
        drawing.draw_all(batches(waiting, 1 if args.one_by_one else args.batch))


def check_places(args: argparse.Namespace, pictures: list[Path]) -> None:
    """Refuse to write over what is read, or one thing over another."""
    written = [path.resolve() for path in pictures]
    explained = Path(args.explain).resolve() if args.explain else None
    if explained in written:
        raise LDMError(f"--explain {args.explain} has the name of a picture that is drawn: choose another.")
    for path in wishes.files(wishes.wishes(args)):
        if path in written or path == explained:
            raise LDMError(f"{path.name} is given, and would be written over: choose another --out.")


def wanted(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, or of its file."""
    if (args.prompt is None) == (args.prompts is None):
        args.parser.error("say what to draw: one prompt in quotation marks, or --prompts FILE, and not both")
    prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
    for text in (*prompts, args.negative or ""):
        if any("\ud800" <= char <= "\udfff" for char in text):  # bytes of the command line that Python couldn't read
            raise LDMError("The prompt is not valid UTF-8 text: check the encoding of your terminal.")
    return prompts


class Drawing:
    """What stays the same over all pictures of a command: the model, the settings, the places."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.several = args, args.count > 1 or args.prompts is not None
        self.memory = said(args, MEMORY)
        self.reading = said(args, READING)
        self.additions = additions.find(added.wishes(args), args.allow_pickle)
        self.pipe, self.model_hash = open_model(
            args.model, args.dtype, args.device, self.memory, self.reading, self.additions
        )
        self.given = given.open_given(
            wishes.wishes(args), self.pipe, args.model, self.memory, self.reading, self.additions
        )
        self.options = given.sized(self.given, self.pipe, said(args, SETTINGS))

    def settings(self, job: Job) -> "Settings":
        return self.pipe.settings(job.prompt, seed=job.seed, **self.options)

    def record(self, job: Job, batch: int = 1) -> dict:
        settings, clip_skip = self.settings(job), self.args.clip_skip
        record = make_record(self.pipe, self.args.model, self.model_hash(), settings, clip_skip, batch, self.given)
        told = {"memory": told_of_memory(self.memory), "reading": told_of_reading(self.reading)}
        return record | told | told_of_additions(self.additions)

    def inside(self, job: Job) -> Path:
        """Where the steps of this picture go: the folder itself, or one inside it for each of several pictures."""
        return Path(self.args.save_steps, job.path.stem) if self.several else Path(self.args.save_steps)

    def check(self, job: Job) -> None:
        """Refuse at once, before anything is drawn, what the model cannot do."""
        self.pipe.schedule_of(self.settings(job))

    def waiting(self, jobs: list[Job]) -> list[Job]:
        """The pictures that are still to be drawn. Raises LDMError if something else stands in their places."""
        obstacles, waiting = [], []
        for job in jobs:
            there = job.path.exists() and not job.named
            reasons = [self.in_the_way(job)] if there else []
            if self.args.save_steps:
                reasons.append(other_run(self.inside(job), self.record(job)))
                there = there and (self.inside(job) / SHEET).exists()
            obstacles += [reason for reason in reasons if reason][:1]
            if not there or any(reasons):
                waiting.append(job)
        if obstacles and not self.args.overwrite:
            more = f" (and {len(obstacles) - 1} more like it)" if len(obstacles) > 1 else ""
            raise LDMError(f"{obstacles[0]}{more}: choose another place, or say --overwrite.")
        return waiting

    def in_the_way(self, job: Job) -> str | None:
        # Asked for one by one, a picture that was drawn in a batch is another one: by a grey level.
        return obstacle(job.path, self.record(job), (*DECIDES, "batch") if self.args.one_by_one else tuple(DECIDES))

    def draw_all(self, groups: list[list[Job]]) -> None:
        """Draw batch after batch, and tell the name of each picture as it is written."""
        steps = self.given.total(self.pipe, self.settings(groups[0][0]))
        done, total = 0, sum(map(len, groups))
        with progress(steps * len(groups)) as bar:
            try:
                for group in groups:
                    bar.set_description(f"picture {done + 1} of {total}" if total > 1 else "drawing")
                    for job in self.draw(group, bar):
                        done += 1
                        with bar.external_write_mode():
                            print(job.path, flush=True)
            except KeyboardInterrupt:
                bar.leave = True  # it shows how far we came
                again = "" if groups[0][0].named else "; the same command draws the others"
                raise KeyboardInterrupt(f"Stopped: {done} of {total} pictures are finished{again}.") from None

    def draw(self, group: list[Job], bar: "tqdm") -> Iterator[Job]:
        """Draw one batch and write its pictures; yield each job when its file is whole."""
        records = [self.record(job, len(group)) for job in group]
        inside = []
        if self.args.save_steps:
            inside = [Inside(self.inside(job), record) for job, record in zip(group, records, strict=True)]
        bar.clear()  # the first step may have something to say about the prompt

        def watch(step: "Step | None") -> None:
            shown = self.pipe.decode(step.x0) if inside and step is not None else []
            for each, image in zip(inside if shown else [], shown, strict=True):
                each.add(image, step.level)
            bar.update()

        result = draw(
            self.pipe, group[0].prompt, self.given, watch, seed=group[0].seed, count=len(group),
            clip_skip=self.args.clip_skip, **self.options,
        )  # fmt: skip
        for each in inside:
            each.finish()
        if any(result.changed):
            level = sum(result.changed) / len(result.changed)
            kept = f"the model had changed the pixels to be kept by {level:.1f} grey levels of 255 on average"
            print(f"Outside the mask {kept}; the picture's own are put back.", file=sys.stderr)
        for job, image, record in zip(group, result.images, records, strict=True):
            save_png(image, job.path, record | {"pixels": pixel_hash(image)})
            yield job
