"""What `ldm inspect` has found: as data, as a page, as JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from ldm.errors import bytes_in_words, printable
from ldm.io.headers import BITS, Entry, numbers
from ldm.lora.applied import percent

MOST_NAMED = 6  # tensors of a list, on a page that doesn't show all
BAR = 32  # letters of the longest bar
ADDED = ("lora", "embedding")  # kinds of small files, whose numbers are read
RED, YELLOW, GREEN, PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"


class Tensor(NamedTuple):
    """One tensor of a file, by its header. `wanted`: the shape that it should have had (None: this one)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = ""
    wanted: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Part:
    """One network of a model. Names are the file's, with the prefix that it has there; `size` is in bytes.

    `missing` and `extra` are tensors that the configuration asks for or doesn't know, `wrong` those of another shape.
    `dtypes`: {type: how many numbers are stored so}; `parameters`: of all tensors, whether they are asked for or not.
    """

    name: str
    where: str
    tensors: tuple[Tensor, ...] = ()
    missing: tuple[Tensor, ...] = ()
    extra: tuple[Tensor, ...] = ()
    wrong: tuple[Tensor, ...] = ()
    parameters: int = 0
    size: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)


class Strength(NamedTuple):
    """How large the change is that a LoRA makes at weight 1 to a block of so many layers: the Frobenius norm ||dW||.

    `share`: ||dW|| / ||W||, of these layers' own weights in a model that is here; None if there is none.
    """

    block: str
    layers: int
    norm: float
    share: float | None = None


@dataclass(frozen=True)
class Report:
    """What lies at `place`.

    `what`: in a few words, such as "a Stable Diffusion XL base"; `form`: folder, file, pickle; `reason`: by what it was
    told; `kind`: "pipeline", "controlnet", "vae", "lora", ... `facts`: what else is known, by name. `readable`: ldm has
    a use for it; with no `faults` it is `sound`, which all that ldm can tell without reading a number; of a
    LoRA or an embedding, whose numbers are read, there are `strengths`, and they are finite; `strengths_in` is the
    model of whose weights these have shares.
    """

    place: str
    form: str
    kind: str = "unknown"
    what: str = "nothing that ldm knows"
    reason: str = ""
    parts: tuple[Part, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    strengths: tuple[Strength, ...] = ()
    strengths_in: str = ""
    passed_over: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    use: tuple[str, ...] = ()
    readable: bool = True

    @property
    def sound(self) -> bool:
        return self.readable and not self.faults

    def __str__(self) -> str:
        return page(self)


def make_part(name: str, where: str, entries: Iterable[Entry], **misfits: Sequence[Tensor]) -> Part:
    """A part with its sums."""
    tensors, dtypes, bits = [], {}, 0
    for entry in entries:
        many = numbers(entry.shape)
        tensors.append(Tensor(entry.name, entry.shape, entry.dtype))
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + many
        bits += many * BITS.get(entry.dtype, 8)  # a pickle's may be of a type that safetensors doesn't know
    found = {key: tuple(value) for key, value in misfits.items()}
    return Part(name, where, tuple(tensors), parameters=sum(dtypes.values()), size=bits // 8, dtypes=dtypes, **found)


def as_json(report: Report, keys: bool = False) -> dict:
    """The report as JSON has it; all tensors only if `keys`."""
    fields = {"sound": report.sound} | asdict(report)
    for part, mine in zip(fields["parts"], report.parts, strict=True):
        tensors = part.pop("tensors")
        part["count"] = len(tensors)
        for name in ("missing", "extra", "wrong"):
            part[name] = [each._asdict() for each in getattr(mine, name)]
        if keys:
            part["tensors"] = [each._asdict() for each in mine.tensors]
    fields["strengths"] = [each._asdict() for each in report.strengths]
    return fields


# ---------------------------------------------------------------------------------------------------- the page


def page(report: Report, keys: bool = False, coloured: bool = False) -> str:
    """The most important first; no line of a stranger's reaches the terminal with more than letters in it."""

    def paint(lines: Iterable[str], colour: str) -> list[str]:
        return [f"{colour}{printable(line)}{PLAIN}" if coloured else printable(line) for line in lines]

    reason = [f"  {capital(report.reason)}."] if report.reason else []
    lines = [f"{report.place}: {report.what}", f"  {capital(report.form)}.", *reason]
    text = [printable(line) for line in lines]
    if report.faults:
        text += ["", "What is wrong", *paint([f"! {fault}" for fault in report.faults], RED)]
    body = table(report.parts)
    for part in report.parts:
        lists = (("lacks", part.missing), ("has in another shape", part.wrong), ("has and should not", part.extra))
        for title, listed in lists:
            body += ["", f"What {part.name} {title} ({len(listed)})", *named(listed, keys)] if listed else []
    width = max(map(len, report.facts), default=0)
    facts = [f"  {name:{width}}  {told}" for name, told in report.facts.items()]
    body += ["", "Properties", *facts] if facts else []
    body += bars(report.strengths, report.strengths_in)
    text += map(printable, body)
    if report.warnings:
        text += ["", "To know", *paint([f"- {line}" for line in report.warnings], YELLOW)]
    passed = ["", "Passed over", *(f"  {line}" for line in report.passed_over)] if report.passed_over else []
    use = ["", "To use it", *(f"  {line}" for line in report.use)] if report.use else []
    text += map(printable, passed + use)
    if keys:
        for part in report.parts:
            text += map(printable, ["", f"Tensors of {part.name}", *named(part.tensors, True)])
    return "\n".join([*text, "", *paint([verdict(report)], GREEN if report.sound else RED)])


def table(parts: Sequence[Part]) -> list[str]:
    """Names, parameters, types, bytes and places in columns, and their sum."""
    rows = [(p.name, f"{p.parameters:,}", types(p.dtypes), bytes_in_words(p.size), p.where) for p in parts]
    if len(parts) > 1:
        dtypes: dict[str, int] = {}
        for part in parts:
            for dtype, many in part.dtypes.items():
                dtypes[dtype] = dtypes.get(dtype, 0) + many
        size = bytes_in_words(sum(part.size for part in parts))
        rows.append(("in all", f"{sum(part.parameters for part in parts):,}", types(dtypes), size, ""))
    if not rows:
        return []
    rows = [("Parts", "parameters", "type", "size", "where"), *((f"  {row[0]}", *row[1:]) for row in rows)]
    wide = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [f"{a:{wide[0]}}  {b:>{wide[1]}}  {c:{wide[2]}}  {d:>{wide[3]}}  {e}".rstrip() for a, b, c, d, e in rows]
    return ["", *lines]


def bars(strengths: Sequence[Strength], base: str = "") -> list[str]:
    """One bar a block, as long as its change is large. `base`: the model whose weights the shares are of."""
    if not strengths:
        return []
    most = max(each.norm for each in strengths) or 1.0
    rows = [
        (name, f"{layers} layer{'s' * (layers != 1)}", f"{norm:.3g}", "" if share is None else f"{percent(share)}  ")
        for name, layers, norm, share in strengths
    ]
    a, b, c, d = (max(len(row[i]) for row in rows) for i in range(4))
    lines = [
        f"  {name:{a}}  {many:>{b}}  {norm:>{c}}  {share:>{d}}{'#' * round(BAR * each.norm / most)}".rstrip()
        for (name, many, norm, share), each in zip(rows, strengths, strict=True)
    ]
    share = f", and its share of the weights' own in {base}" if base else ""
    return ["", f"How much it changes at weight 1 (Frobenius norm{share})", *lines]


def types(dtypes: dict[str, int]) -> str:
    """ "F16", or "F16, F32" with the most frequent first."""
    return ", ".join(sorted(dtypes, key=lambda name: (-dtypes[name], name))[:3]) + ", ..." * (len(dtypes) > 3)


def named(tensors: Sequence[Tensor], all_of_them: bool) -> list[str]:
    """One tensor a line: its name, its shape and type, and the shape that was wanted."""
    shown = tensors if all_of_them else tensors[:MOST_NAMED]
    width = max((len(each.name) for each in shown), default=0)
    lines = []
    for name, shape, dtype, wanted in shown:
        instead = f" instead of {shape_in_words(wanted)}" if wanted is not None else ""
        lines.append(f"  {name:{width}}  {shape_in_words(shape)}{' ' * bool(dtype)}{dtype}{instead}")
    rest = len(tensors) - len(shown)
    return lines + ([f"  and {rest} more (--keys names them all)"] if rest else [])


def shape_in_words(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) if shape else "one number"


def verdict(report: Report) -> str:
    if report.faults:
        return "ldm does not load it."
    if not report.readable:
        return "ldm does not read such a thing."
    if report.kind in ADDED:
        return "Every tensor of it has its use, and every number is finite."
    return "Every tensor of it is there; the numbers were not read." if report.parts else "Nothing is wrong."


def capital(text: str) -> str:
    """As a sentence begins; ldm's own name stays small."""
    return text if text.startswith("ldm ") else text[:1].upper() + text[1:]
