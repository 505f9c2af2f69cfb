"""What a walk found, told: a table as it goes, a sentence at the end, and JSON. The page is in `page.py`."""

import math
from dataclasses import asdict, dataclass, field

from ldm.parity.blocks import Divergence, Walked
from ldm.parity.compare import BAD, EQUAL, REFUSED, SKIPPED, Line

COLUMNS = ("station", "what", "largest diff", "relative", "allowed", "ours ms", "theirs ms", "verdict")
ROW = "{:24} {:30} {:>12} {:>9} {:>9} {:>9} {:>9}  {}"
WIDE = 200  # characters of the list of what was tried


@dataclass
class Report:
    """`about` tells what was compared, in words; lines and divergences come as they are found."""

    about: dict[str, str]
    lines: list[Line] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    walked: list[Walked] = field(default_factory=list)  # the blocks of networks that are equal
    finished: bool = False  # whether the walk came to its end: one that was stopped proves nothing of the rest

    def add(self, found: Line | Walked | Divergence) -> None:
        kinds = {Line: self.lines, Walked: self.walked, Divergence: self.divergences}
        kinds[type(found)].append(found)

    @property
    def bad(self) -> list[Line]:
        return [line for line in self.lines if line.verdict in BAD]

    @property
    def equal(self) -> bool:
        """The walk came to its end, something was compared, and nothing differed."""
        return self.finished and not self.bad and any(line.verdict == EQUAL for line in self.lines)

    @property
    def sentence(self) -> str:
        """The end of the table."""
        counted = [line for line in self.lines if line.verdict != SKIPPED]
        sides = f"ldm and {self.about['against']}"
        where = f"on {self.about['model']}, {self.about['dtype']}, {self.about['device']}"
        if not counted:
            return f"Nothing was compared: {self.about['against']} offers none of the stations asked for."
        if self.equal:
            return f"{sides} are equal {where}: {len(counted)} comparisons."
        if not self.bad:
            return f"Stopped after {len(counted)} comparisons, which were equal: nothing is said of the rest ({where})."
        first = self.bad[0]
        verb = "proves nothing" if first.verdict == REFUSED else "differs"
        more = f" ({len(self.bad)} of {len(counted)} comparisons)" if len(self.bad) > 1 else ""
        places = [each.block for each in self.divergences if each.station in (first.station, first.what)]
        at = f", first in {places[0]}" if places and places[0] else ""
        return f"{sides} part {where}: {first.station} {first.what} {verb}{at}{more}.".replace("  ", " ")

    def to_json(self) -> dict:
        """All of it; numbers that JSON has not are null."""
        return finite(
            {
                "about": self.about,
                "equal": self.equal,
                "sentence": self.sentence,
                "lines": [asdict(line) for line in self.lines],
                "divergences": [asdict(each) for each in self.divergences],
                "blocks": {each.station: [asdict(block) for block in each.named] for each in self.walked},
            }
        )


def finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def header() -> str:
    return ROW.format(*COLUMNS)


def row(line: Line) -> str:
    """One line of the table; what there is to say of it follows."""
    if line.verdict == SKIPPED:
        return f"{line.station:24} {SKIPPED}: {line.note}"
    notes = "; ".join(filter(None, (line.note, memory(line))))
    return f"{ROW.format(*cells(line))}  {notes}".rstrip()


def cells(line: Line) -> tuple[str, ...]:
    digits = [small(value) for value in (line.difference, line.relative, line.allowed)]
    times = [ms(value) for value in (line.ours_ms, line.theirs_ms)]
    return (line.station, line.what, *digits, *times, line.verdict)


def small(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def ms(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def memory(line: Line) -> str:
    """Peak memory of both, where it was measured."""
    if line.ours_bytes is None or line.theirs_bytes is None:
        return ""
    return f"peak {line.ours_bytes / 2**20:.0f} and {line.theirs_bytes / 2**20:.0f} MiB"


def paragraph(each: Divergence) -> list[str]:
    """A divergence in lines."""
    if each.note:
        return [f"  {each.station}: {each.note}."]
    inside = f", first seen in {each.first}" if each.first not in ("", each.block) else ""
    inputs = ", ".join(small(error) for error in each.input_errors) or "not compared"
    place = each.block or "the network itself, outside its parts"
    lines = [
        f"  {each.station} begins to differ in {place} ({each.kind}){inside}: by {small(each.error)} of the largest "
        f"value; its inputs by {inputs}"
    ]
    lines += [f"    likely cause: {cause}" for cause in each.causes]
    if not each.causes:
        tried = "; ".join(each.tried)
        lines.append(f"    no cause found; tried: {tried[:WIDE]}{'…' if len(tried) > WIDE else ''}")
    return lines
