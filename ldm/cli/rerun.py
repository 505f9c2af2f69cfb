"""`ldm rerun picture.png`: draw a picture again from what its file says of itself, and compare."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import added, additions, given, wishes
from ldm.cli.draw import draw
from ldm.cli.generate import SETTINGS
from ldm.cli.jobs import prepare_file
from ldm.cli.options import (
    BITS,
    CASTS,
    MEMORY,
    add_device,
    add_memory,
    allow_pickle,
    dtypes_of,
    find_device,
    open_model,
    progress,
    said,
)
from ldm.cli.record import (
    SURROUNDS,
    differences,
    make_record,
    pixel_hash,
    read_record,
    reading_of,
    told_of_additions,
    told_of_memory,
)
from ldm.errors import LDMError
from ldm.io.png import save_png
from ldm.text.prompts import DIALECTS

if TYPE_CHECKING:
    from PIL import Image

HELP = """Draw a picture again from the settings in its PNG, and compare the two.

Says "identical", or "within one grey level" (as a picture that was drawn in a batch may be), or how far they are apart
and what is different now: the model, the versions, the device. Exit status 1 if they differ by more."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("rerun", help="draw a picture again from its PNG, and compare", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument("picture", help="a PNG that ldm drew")
    p.add_argument("--model", help="the model, if it is not where it was (default: the one the picture names)")
    p.add_argument("--out", metavar="PNG", help="write the new picture there (default: it is only compared)")
    p.add_argument("--overwrite", action="store_true", help="replace whatever --out names")
    added.add(p, "where it is now, if it is not where it was; its weight or word stays what the picture says")
    add_device(p, default=None)
    allow_pickle(p)
    add_memory(p.add_argument_group("memory and time"), autocast=False)


def run(args: argparse.Namespace) -> int:
    from ldm.io.pictures import open_picture

    old = read_record(args.picture)
    image = open_picture(args.picture)
    try:
        dtypes_of(old["dtype"])
    except argparse.ArgumentTypeError:
        raise additions.torn(args.picture) from None
    if old["autocast"] not in (None, *CASTS) or old["dialect"] not in DIALECTS or old["quantise"] not in (None, *BITS):
        raise additions.torn(args.picture)
    if args.out:
        prepare_file(Path(args.out), args.overwrite)
    new_image, new = draw_again(args, old, image.size)
    if args.out:
        save_png(new_image, args.out, new)
        print(args.out)
    return report(args.picture, old, image, new, new_image)


def draw_again(args: argparse.Namespace, old: dict, size: tuple[int, int]) -> tuple["Image.Image", dict]:
    """The new picture, drawn alone, and its record; `size` is that of the old picture."""
    from ldm.checkpoints.places import check_here

    reading = reading_of(old) | said(args, ("allow_pickle",))
    changing = {name: old[name] for name in ("autocast", "quantise") if old[name] is not None}
    memory = said(args, MEMORY) | changing
    wish = wishes.read_words(old["pictures"], args.picture)
    found = additions.find_again(old, args, args.picture)
    try:
        if not args.model:
            check_here(old["model"], reading.get("variant"), args.allow_pickle)
        if "parts_of" in reading:
            check_here(reading["parts_of"], reading.get("variant"), args.allow_pickle)
        for name, variant in wishes.models(wish, given.variant_of_others(reading)).items():
            check_here(name, variant, args.allow_pickle)
        device = args.device or device_of(old)
        pipe, model_hash = open_model(args.model or old["model"], old["dtype"], device, memory, reading, found)
    except LDMError as error:
        hint = "" if args.model else f" (The picture names the model {old['model']!r}; --model says where it is now.)"
        raise LDMError(f"{error}{hint}") from error
    options = {name: old[name] for name in ("seed", *SETTINGS) if name != "steps_are"}  # the steps are in total here
    opened = given.open_given(wish, pipe, args.model or old["model"], memory, reading, found)
    opened.lead(old["width"], old["height"])
    now = opened.record()
    for name in {**now, **old["given"]}:
        if now.get(name) != old["given"].get(name):
            raise LDMError(f"{args.picture}: what was given as {name} is another one now, so it can't be drawn again.")
    settings = pipe.settings(old["prompt"], **options)
    if opened.size(settings, pipe.vae.config.factor) != size:
        raise additions.torn(args.picture)
    with progress(opened.total(pipe, settings)) as bar:
        bar.set_description("drawing again")
        bar.clear()
        result = draw(pipe, old["prompt"], opened, lambda step: bar.update(), clip_skip=old["clip_skip"], **options)
    name = args.model or old["model"]
    record = make_record(pipe, name, model_hash(), settings, old["clip_skip"], batch=1, given=opened)
    told = {"memory": told_of_memory(memory), "reading": old["reading"]}
    told |= told_of_additions(found)
    return result.images[0], record | told | {"pixels": pixel_hash(result.images[0])}


def device_of(old: dict) -> str:
    """The device it was drawn on, or the CPU where there is none such."""
    try:
        find_device(old["device"])
        return old["device"]
    except LDMError:
        print(f"There is no device {old['device']!r} here: drawing on the CPU.", file=sys.stderr)
        return "cpu"


def report(path: str, old: dict, image: "Image.Image", new: dict, new_image: "Image.Image") -> int:
    """Print how far the pictures are apart, and why if they are; the exit status."""
    import numpy as np

    apart = np.abs(np.asarray(image, dtype=np.int16) - np.asarray(new_image, dtype=np.int16)).max(axis=2)
    where = f"{int((apart > 0).sum())} of {apart.size} pixels"
    if apart.max() == 0:
        print(f"{path}: identical.")
    elif apart.max() == 1:
        print(f"{path}: within one grey level ({where} differ).")
    else:
        print(f"{path}: different in {where}, by up to {int(apart.max())} grey levels of 255.")
    names = ("model_hash", *(n for n in SURROUNDS if n != "batch" or apart.any()))
    changed = differences(old, new, names)
    if pixel_hash(image) != old.get("pixels"):
        same = "; those that were are drawn again exactly" if new["pixels"] == old.get("pixels") else ""
        changed.append(f"pixels: the file's are not those that were drawn, it was edited since{same}")
    for line in changed:
        print(f"  {line}")
    if apart.max() > 1 and not changed:
        print("  nothing that the file records is different: the processor or the number of threads may be")
    return int(apart.max() > 1)
