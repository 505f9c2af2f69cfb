"""`ldm tokens`: what a prompt becomes before a text encoder reads it. Of the model only its tokenizers are read."""

import argparse
import json
import shutil
import sys
from typing import TYPE_CHECKING

from ldm.cli import added
from ldm.cli.options import add_model, allow_pickle, one_of, whole
from ldm.text.prompts import DIALECTS

if TYPE_CHECKING:
    from ldm.checkpoints.checkpoint import Checkpoint
    from ldm.cli.added import Wish
    from ldm.text.embeddings import Plain
    from ldm.text.tokenizer import Tokenizer

HELP = """Print the tokens of a prompt, as each text encoder of the model reads them: chunk by chunk, their position,
piece, id and weight, what was cut off, and of prompts that change on the way at which steps they are what.

  ldm tokens "a (red:1.3) house, [in fog:at night:0.5]" --dialect a1111 --steps 20
  ldm tokens "a red++ house" --dialect compel --model sdxl

"a</w>" ends a word, "ligh" doesn't. A number in the last column is a weight other than 1."""

IDLE = ("lora", "vae")


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("tokens", help="print the tokens of a prompt, their weights and chunks", description=HELP)
    p.set_defaults(run=run, parser=p)
    p.add_argument("prompt", help="the sentence, in quotation marks")
    add_model(p)
    allow_pickle(p)
    p.add_argument(
        "--dialect", type=one_of(DIALECTS), default="plain", metavar="NAME",
        help="what its signs mean: plain (nothing, the default), a1111 or compel",
    )  # fmt: skip
    p.add_argument("--steps", type=whole(1), metavar="N", help="of the run, where words change on the way")
    p.add_argument(
        "--embedding", type=added.embedding, action="append", default=[], metavar="FILE[:WORD]",
        help="a learnt word, which may be several tokens: a file, its folder, or the name of an embedded one "
        "(scenes-mushroom); may be given several times",
    )  # fmt: skip
    for option in IDLE:  # of `ldm generate`, whose line may have become this one
        p.add_argument(f"--{option}", action="append", help=argparse.SUPPRESS)
    p.add_argument("--json", action="store_true", help="the same for a program")


def run(args: argparse.Namespace) -> None:
    from ldm.checkpoints.places import INDEX, check_here, find_model
    from ldm.errors import say_on_stderr
    from ldm.loading import open_checkpoint
    from ldm.text.prompts.table import tokens_of

    if idle := [f"--{option}" for option in IDLE if getattr(args, option)]:
        say_on_stderr(f"Tokens don't depend on {' or '.join(idle)}, which is passed over.")
    check_here(str(args.model), None, args.allow_pickle)
    checkpoint = open_checkpoint(
        find_model(args.model, INDEX, None, args.allow_pickle), None, "transformers", args.allow_pickle
    )
    steps = args.steps or checkpoint.defaults.steps
    found = tokens_of(with_words(checkpoint, args.embedding, args.allow_pickle), args.prompt, args.dialect, steps)
    for line in found.notices:
        say_on_stderr(line)
    pieces = pieces_of(checkpoint, args.prompt)
    if args.json:
        t5 = {"t5": [{"piece": piece, "id": id} for piece, id in pieces]} if pieces else {}
        print(json.dumps(found.to_json() | t5, indent=1, ensure_ascii=False))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    print("\n".join([*found.lines(width), *piece_lines(pieces, checkpoint.defaults.max_sequence_length)]))


def pieces_of(checkpoint: "Checkpoint", prompt: str) -> list[tuple[str, int]]:
    """What T5 reads of the prompt, of a model that has one: its pieces with their ids, the end too; nothing is cut."""
    tokenizer = checkpoint.tokenizers.get("tokenizer_2")
    if not is_t5(tokenizer):
        return []
    ids = tokenizer.encode(prompt)
    return [*zip(tokenizer.pieces(prompt), ids, strict=True), ("</s>", tokenizer.eos_id)]


def is_t5(tokenizer: object) -> bool:
    from ldm.text.t5_tokenizer import T5Tokenizer

    return isinstance(tokenizer, T5Tokenizer)


def piece_lines(pieces: list[tuple[str, int]], most: int | None) -> list[str]:
    """A line a piece, as far as they are read."""
    if not pieces:
        return []
    read = f", {most} of which are read" if most is not None and len(pieces) > most else ""
    lines = ["", f"text_encoder_2 (T5): {len(pieces)} tokens{read}; the text encoder above gives FLUX its one vector"]
    return lines + [f"{k:4}  {piece:20} {id:6}" for k, (piece, id) in enumerate(pieces)]


def with_words(checkpoint: "Checkpoint", wishes: "list[Wish]", allow_pickle: bool) -> "dict[str, Tokenizer]":
    """The model's tokenizers by their encoders' names, with the words of embeddings. Raises LDMError as adding does."""
    from ldm.checkpoints.places import EMBEDDING, find_file
    from ldm.text.embeddings import knowing, named, open_embedding

    plain, on = plain_of(checkpoint), {}
    for wish in wishes:
        opened = open_embedding(find_file(wish.name, EMBEDDING), allow_pickle)
        added = named(opened, wish.value, plain, on)
        on[added.word] = added
    return {part: knowing(before, on) for part, before in plain.items()}


def plain_of(checkpoint: "Checkpoint") -> "dict[str, Plain]":
    """The text encoders without their numbers: names, tokenizers and the sizes of their tables."""
    import torch

    from ldm.text.embeddings import Plain

    found = {}
    for name, tokenizer in checkpoint.tokenizers.items():
        if is_t5(tokenizer):
            continue
        part = name.replace("tokenizer", "text_encoder")
        config = checkpoint.configs[part]
        found[part] = Plain(part, tokenizer, config, torch.empty(config.vocab_size, config.hidden_size, device="meta"))
    return found
