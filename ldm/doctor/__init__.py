"""What works here, what doesn't, and the line that mends it: the facts behind `ldm doctor`.

    for section in examine():
        for line in section.lines:
            print(line.name, line.text)

A probe is a function that yields lines. What it looks at is its argument, so that a test can be another machine. A
probe that raises becomes a line, and those after it go on. Packages are asked for their version, not imported, but
torch and what the embedded model draws with.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ldm.doctor import devices, drawing, memory, packages, places
from ldm.doctor.lines import BROKEN, LACKS, Line, told

PROBES = (
    ("Versions", packages.versions),
    ("Optional packages", packages.optional),
    ("Places", places.places),
    ("Devices", devices.devices),
    ("Memory", memory.memory),
    ("Drawing", drawing.drawing),
    ("Environment", places.environment),
)


class Section(NamedTuple):
    title: str
    lines: list[Line]


class Mend(NamedTuple):
    """Faults, each a sentence, and the one line that mends them all ("": none does)."""

    faults: list[str]
    command: str


def examine(probes: Iterable[tuple[str, Callable[[], Iterable[Line]]]] | None = None) -> Iterator[Section]:
    """Every probe's lines, section by section, as they are known. Never raises (but for Ctrl-C)."""
    for title, probe in PROBES if probes is None else probes:
        lines = []
        try:
            for line in probe():
                lines.append(line)
        except Exception as error:
            lines.append(Line(title.lower(), f"could not be told: {told(error)}", LACKS))
        yield Section(title, lines)


def works(sections: Iterable[Section]) -> bool:
    """Whether everything works that drawing needs."""
    return not any(line.verdict == BROKEN for section in sections for line in section.lines)


def to_mend(sections: Iterable[Section]) -> list[Mend]:
    """What to do, what stops drawing first; faults that one command mends stand together."""
    lines = [line for section in sections for line in section.lines if line.command or line.verdict == BROKEN]
    found: dict[str, list[str]] = {}
    for line in sorted(lines, key=lambda line: line.verdict != BROKEN):
        faults = found.setdefault(line.command, [])
        if line.fault not in faults:
            faults.append(line.fault)
    return [Mend(faults, command) for command, faults in found.items()]
