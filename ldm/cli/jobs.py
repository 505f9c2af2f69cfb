"""Which pictures a command line asks for, where each will lie, and whether it lies there already."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ldm.cli.record import differences, read_record
from ldm.errors import LDMError
from ldm.io.atomic import check_writable
from ldm.io.png import read_settings

LONGEST_NAME = 80  # bytes of a prompt in a file's name; some file systems end at 143 bytes


@dataclass(frozen=True)
class Job:
    """One picture to be drawn. `named`: the user chose the very name, and not only the folder."""

    prompt: str
    seed: int
    path: Path
    named: bool


def read_prompts(path: str) -> list[str]:
    """One prompt a line; empty lines and lines that begin with # are passed over."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise LDMError(f"Cannot read the prompts in {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise LDMError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8, one prompt a line."
        ) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise LDMError(f"There is no prompt in {path}: write one a line.")
    return list(dict.fromkeys(prompts))  # a prompt that stands there twice is one picture


def plan(prompts: list[str], seeds: range, out: str | None, many: bool) -> list[Job]:
    """Name the file of every picture. `many`: the prompts come from a file, so `out` can only be a folder.

    `out` "name.png" is the picture itself, or name-SEED.png for several seeds; any folder takes PROMPT-SEED.png.
    """
    folder = Path(out or (".", "pictures")[many])
    if out is not None and not is_folder(out):
        if many and folder.suffix.lower() == ".png":
            raise LDMError(f"--prompts draws many pictures: give --out a folder, not {out}.")
        if not many:
            if folder.suffix.lower() != ".png" or folder.stem.startswith("."):
                raise LDMError(f"--out {out} must end in .png, or in / for a folder.")
            names = {s: folder if len(seeds) == 1 else folder.with_name(f"{folder.stem}-{s}.png") for s in seeds}
            return [Job(prompts[0], seed, names[seed], named=True) for seed in seeds]
    return [Job(p, seed, folder / f"{slug(p)}-{seed}.png", named=False) for p in prompts for seed in seeds]


def is_folder(out: str) -> bool:
    return out.endswith(("/", os.sep)) or Path(out).is_dir()


def slug(prompt: str) -> str:
    """A prompt as part of a file's name: "a red house" -> "a-red-house".

    What that loses (signs, capitals, the end of a long prompt) is made up for by eight digits of a hash, so that two
    prompts never share a name.
    """
    name = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    name = name.encode()[:LONGEST_NAME].decode(errors="ignore").rstrip("-")
    if name and name.replace("-", " ") == prompt:
        return name
    return "-".join(filter(None, (name, hashlib.sha256(prompt.encode()).hexdigest()[:8])))


def prepare(jobs: list[Job], overwrite: bool) -> None:
    """Before anything is drawn: make the folder if we named the files, and see that every file can be written."""
    if not jobs[0].named:
        make_folder(jobs[0].path.parent)
        check_writable(jobs[0].path)
    for job in jobs if jobs[0].named else ():
        prepare_file(job.path, overwrite)


def prepare_file(path: Path, overwrite: bool) -> None:
    """See that a name the user chose can be written, and that nothing is lost: what ldm drew, it can draw again."""
    if path.suffix.lower() != ".png":
        raise LDMError(f"Cannot write {path}: only PNG keeps the settings; give it a name that ends in .png.")
    check_writable(path)
    if path.exists() and not overwrite:
        try:
            read_record(path)
        except LDMError as error:
            raise LDMError(
                f"{path} is there already and was not drawn by ldm: choose another --out, or say --overwrite."
            ) from error


def prepare_sheet(path: Path, mark: str, overwrite: bool = False) -> None:
    """The same for a sheet about pictures, whose PNG holds the word `mark`: only such a one is replaced."""
    prepare_file(path, overwrite=True)
    if path.exists() and not overwrite:
        try:
            ours = mark in read_settings(path)
        except LDMError:
            ours = False
        if not ours:
            raise LDMError(f"{path} is there already and is no such sheet of ldm's: choose another name.")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LDMError(f"Cannot make the folder {folder}: {error.strerror}; choose another place.") from error


def obstacle(path: Path, wanted: dict, names: Sequence[str]) -> str | None:
    """Why the file at `path` is not the picture that `wanted` records; None if it is."""
    try:
        different = differences(read_record(path), wanted, names)
    except LDMError:
        return f"{path} was not drawn by ldm"
    return f"{path} was drawn with other settings ({'; '.join(different)})" if different else None


def batches(jobs: list[Job], most: int) -> list[list[Job]]:
    """Jobs that are drawn together: of one prompt, with seeds that follow each other, at most `most`."""
    runs = [list(g) for _, g in groupby(enumerate(jobs), key=lambda pair: (pair[1].prompt, pair[1].seed - pair[0]))]
    return [[job for _, job in run[i : i + most]] for run in runs for i in range(0, len(run), most)]
