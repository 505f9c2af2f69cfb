"""`ldm fetch`: models from the hub, before they are needed; and the list of those that have short names."""

import argparse
from typing import TYPE_CHECKING

from ldm.errors import LDMError, bytes_in_words, printable

if TYPE_CHECKING:
    from ldm.hub.fetching import Plan

HELP = """Fetch models from the hub into the cache that all Hugging Face libraries share; what is there stays.

  ldm fetch                          the models that have short names, and which are here
  ldm fetch sd15 --variant fp16      one of them
  ldm fetch ORG/NAME[@REVISION]      any repository in diffusers' format; its branch "main" if none is named
  ldm fetch ORG/NAME/FILE            one original file of a repository (.safetensors)
  ldm fetch clip-vocab               CLIP's vocabulary, which original files lack

Only the files that ldm reads are fetched, at one commit, and checked against the hub's hashes; the same command goes on
where it was stopped. HF_HOME moves the cache, HF_ENDPOINT names a mirror of the hub, HF_HUB_OFFLINE forbids requests,
HF_TOKEN (or `hf auth login`) opens gated models. ~/.cache/ldm keeps listings, and the vocabulary if it had to come from
elsewhere than the hub (XDG_CACHE_HOME moves it)."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("fetch", help="fetch models from the hub, or list those with short names", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument("names", nargs="*", metavar="NAME", help="a short name, or ORG/NAME[@REVISION][/FILE]")
    p.add_argument("--variant", metavar="NAME", help="which set of weights, as fp16 (default: those without a name)")
    p.add_argument("--dry-run", action="store_true", help="only say what would be fetched")
    p.add_argument("--update", action="store_true", help="ask the hub whether a branch has moved, even if it is here")
    p.add_argument(
        "--allow-pickle", action="store_true", help="take .bin and .ckpt files, too, where there is nothing else"
    )


def run(args: argparse.Namespace) -> None:
    if not args.names:
        for name in ("variant", "dry_run", "update", "allow_pickle"):
            if getattr(args, name):
                args.parser.error(f"--{name.replace('_', '-')} needs the name of a model")
        print(table())
        return
    from ldm.hub.fetching import sources_of

    for name in args.names:
        sources_of(name)  # a mistake in the last name is told before gigabytes of the first
    try:
        for name in args.names:
            fetch(name, args.variant, args.allow_pickle, args.update, args.dry_run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped; what came is kept, and the same command goes on from there.") from None


def fetch(name: str, variant: str | None, allow_pickle: bool, update: bool, dry_run: bool) -> None:
    from ldm.hub import fetching as hub

    place = None if update else hub.local(name, variant, allow_pickle)
    if place is None and hub.is_offline():
        place = hub.fetch(name, variant, allow_pickle)  # says what is to be done
    if place is None:
        todo = hub.plan(name, variant, allow_pickle)
        print(listed(todo))
        if dry_run:
            return
        place = hub.carry_out(todo, say=lambda line: None)  # the table has said it
    print(f"{name} is here: {place}")
    for line in to_use(name, variant):
        print(printable(line))


def listed(todo: "Plan") -> str:
    """A plan as a small table: each file, its size, and whether it is here. The licence is a stranger's text."""
    missing = {file.name for file in todo.missing}
    width = max(len(file.name) for file in todo.files)
    rows = [
        f"  {file.name:<{width}}  {bytes_in_words(file.size) if file.size else '?':>9}"
        + "  here" * (file.name not in missing)
        for file in todo.files
    ]
    return "\n".join(map(printable, [str(todo), *rows]))


def to_use(name: str, variant: str | None) -> tuple[str, ...]:
    """The lines that draw with it, or say what it is for; none for what only goes with something else."""
    from ldm.inspect import inspect

    if name == "clip-vocab":
        return ("Original files find it by themselves.",)
    report = inspect(name, variant)
    return report.use if not report.faults else (f"ldm inspect {name}   # tells what is wrong with it",)


def table() -> str:
    """The zoo, a line a model."""
    from ldm.hub.fetching import local
    from ldm.hub.zoo import zoo

    def is_here(name: str) -> str:
        try:
            return "yes" if any(local(name, variant, say=lambda line: None) for variant in (None, "fp16")) else ""
        except LDMError:  # without huggingface_hub nothing is known
            return "?"

    head = ("name", "here", "size", "licence", "what it is")
    rows = [(m.name, is_here(m.name), m.size, m.licence + " (gated)" * m.gated, m.what) for m in zoo().values()]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    lines = (
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
