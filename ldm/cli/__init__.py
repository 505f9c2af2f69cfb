"""The command line: `ldm generate`, `ldm rerun`, `ldm samplers`, `ldm schedule`, `ldm evaluate`, `ldm train` and more.

Each command is a module with two functions: `add` declares its options, `run` does the work. torch is imported
inside `run` alone, so that `ldm --help` answers at once. A user meets sentences, never tracebacks.

Exit status: 0 done, 1 could not be done, 2 the command line was wrong, 130 stopped by Ctrl-C.
"""

import os
import sys
from collections.abc import Sequence

from ldm import __version__
from ldm.cli import (
    compare_samplers,
    condition,
    convert,
    doctor,
    evaluate,
    explain,
    fetch,
    generate,
    inspect,
    merge,
    parity,
    plan,
    rerun,
    samplers,
    schedule,
    tokens,
    train,
)
from ldm.cli.options import Parser
from ldm.errors import STOPPED, LDMError

COMMANDS = (
    generate,
    rerun,
    explain,
    condition,
    samplers,
    schedule,
    tokens,
    evaluate,
    compare_samplers,
    train,
    fetch,
    inspect,
    convert,
    merge,
    plan,
    doctor,
    parity,
)  # `ldm --help` has this order

DONE, FAILED = 0, 1  # 2 is argparse's own
TRACEBACK = "LDM_TRACEBACK"  # an environment variable: set, an error is shown where it happened


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    try:
        args, unknown = parser().parse_known_args(argv)
        if unknown:
            args.parser.refuse(unknown)
        args.argv = list(sys.argv[1:] if argv is None else argv)
        return args.run(args) or DONE
    except SystemExit as leaving:  # argparse: 0 after --help, 2 after a sentence about the command line
        return int(leaving.code or DONE)
    except KeyboardInterrupt as stopped:
        say(str(stopped) or "Stopped.")
        return STOPPED
    except BrokenPipeError:  # `ldm ... | head`: nobody listens any more, and Python would complain once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        say(sentence(error))
        return FAILED


def parser() -> Parser:
    top = Parser(prog="ldm", description="Latent diffusion: draw pictures from sentences, and train what draws them.")
    top.add_argument("--version", action="version", version=f"ldm {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        command.add(commands)
    return top


def say(line: str) -> None:
    print(f"ldm: {line}", file=sys.stderr)


def sentence(error: Exception) -> str:
    """What to tell the user about an error: one line, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, LDMError):
        return text
    if out_of_memory(error, text):
        return (
            "Not enough memory: make the pictures smaller (--width, --height) or the --batch, or try --dtype float16."
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'The system'}: {error.strerror}."
    return f"Unexpected {type(error).__name__}: {text[:300]} (with {TRACEBACK}=1 in the environment it says where)."


def out_of_memory(error: Exception, text: str) -> bool:
    """On a GPU torch has a class for it; on the CPU a RuntimeError, and another one for sizes beyond all measure."""
    words = ("out of memory", "allocate memory", "overflow")
    return isinstance(error, MemoryError | RuntimeError) and (not text or any(word in text.lower() for word in words))
