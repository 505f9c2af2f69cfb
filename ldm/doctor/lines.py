"""A line of what `ldm doctor` tells, and lines for a shell that mend what is wrong."""

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

OK, LACKS, BROKEN = "ok", "lacks", "broken"  # LACKS: something beside drawing doesn't work; BROKEN: drawing doesn't
PACKAGE = Path(__file__).resolve().parent.parent  # ldm/


class Line(NamedTuple):
    """One fact. A fault is a sentence, and `command` one line for a shell that mends it ("": nothing so short does)."""

    name: str
    text: str
    verdict: str = OK
    fault: str = ""
    command: str = ""


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def quoted(word: object) -> str:
    """In double quotes, which all shells know, where it needs some."""
    return str(word) if re.fullmatch(r"[\w./:\\=+-]+", str(word)) else f'"{word}"'


def python() -> str:
    """How a shell calls the interpreter that runs now."""
    found = shutil.which("python")
    running = Path(sys.executable)  # in a virtual environment a link: the folder tells which environment it is
    same = found and Path(found).parent == running.parent and Path(found).resolve() == running.resolve()
    return "python" if same else quoted(running)


def checkout() -> Path | None:
    """The folder of pyproject.toml and constraints.txt; None where ldm was installed as a wheel."""
    home = PACKAGE.parent
    return home if all((home / name).is_file() for name in ("pyproject.toml", "constraints.txt")) else None


def current() -> Path | None:
    """The current folder; None if somebody has deleted it."""
    try:
        return Path.cwd()
    except OSError:
        return None


def install(packages: Sequence[str], extra: str | None = None) -> str:
    """The line that installs packages in tested versions; in a checkout those of an `extra` ("": what ldm needs)."""
    home = checkout()
    if home is None:
        return " ".join([python(), "-m pip install", *map(quoted, packages)])
    here = home == current()
    pins = quoted("constraints.txt" if here else home / "constraints.txt")
    if extra is None:
        return " ".join([python(), "-m pip install -c", pins, *map(quoted, packages)])
    return f"{python()} -m pip install -c {pins} -e " + quoted(
        f"{'.' if here else home}{f'[{extra}]' if extra else ''}"
    )


def unset(name: str) -> str:
    return f"set {name}=" if sys.platform == "win32" else f"unset {name}"
