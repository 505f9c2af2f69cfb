"""How much code FLUX takes here, in diffusers, and in its authors' repository, for the same function.

    python tests/code_size.py

Counted are lines that hold code: no blank lines, comments or docstrings. diffusers' are those of the installed version.
The authors' numbers were counted elsewhere, at commit 802fb47 of black-forest-labs/flux, which has no LoRAs or
ControlNets, and no sampler but Euler's.
"""

import ast
import importlib.metadata
import importlib.util
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = {
    "the transformer": ["models/flux.py", "models/patches.py"],
    "T5 and its tokenizer": ["text/t5.py", "text/t5_tokenizer.py"],
    "its ControlNet": ["models/flux_controlnet.py"],
    "what FLUX alone is asked for": ["flux.py"],
    "pipelines, all families and tasks": [
        "pipeline.py", "parts.py", "run.py", "settings.py", "told.py", "network.py", "guidance.py", "tasks.py",
        "sampling.py", "diffusion.py", "noise.py", "pictures.py",
    ],
    "LoRA keys of kohya, PEFT, XLabs and the authors": ["lora/flux.py"],
    "the authors' files": ["checkpoints/flux_names.py"],
}  # fmt: skip
PIPES = "pipelines/flux/pipeline_flux"
THEIRS = {
    "the transformer": ["models/transformers/transformer_flux.py"],
    "T5 and its tokenizer": None,  # transformers'
    "its ControlNet": ["models/controlnets/controlnet_flux.py"],
    "what FLUX alone is asked for": [],
    "pipelines, all families and tasks": [
        f"{PIPES}.py", f"{PIPES}_img2img.py", f"{PIPES}_inpaint.py", f"{PIPES}_fill.py", f"{PIPES}_control.py",
        f"{PIPES}_control_img2img.py", f"{PIPES}_control_inpaint.py", f"{PIPES}_controlnet.py",
        f"{PIPES}_controlnet_image_to_image.py", f"{PIPES}_controlnet_inpainting.py",
    ],
    "LoRA keys of kohya, PEFT, XLabs and the authors": None,  # within files for all families
    "the authors' files": None,
}  # fmt: skip
AUTHORS = {"model.py": 143, "modules/layers.py": 253, "math.py": 30, "sampling.py": 364, "modules/autoencoder.py": 318}


def lines(path: Path) -> int:
    """Lines that hold code."""
    text = path.read_text(encoding="utf-8")
    docs = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    idle = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    held = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in idle:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - docs)


def total(home: Path, names: list[str] | None) -> int | None:
    return None if names is None else sum(lines(home / name) for name in names)


def table() -> list[tuple[str, int, int | None]]:
    theirs = Path(importlib.util.find_spec("diffusers").origin).parent
    return [(what, total(ROOT / "ldm", names), total(theirs, THEIRS[what])) for what, names in OURS.items()]


def main() -> None:
    print(f"| lines of code | ldm | diffusers {importlib.metadata.version('diffusers')} |\n|---|---|---|")
    for what, mine, other in table():
        print(f"| {what} | {mine} | {'' if other is None else other or '—'} |")
    parts = ", ".join(f"{name} {count}" for name, count in AUTHORS.items())
    print(f"\nThe authors' own: {sum(AUTHORS.values())} lines ({parts}); its text encoders are transformers'.")


if __name__ == "__main__":
    main()
