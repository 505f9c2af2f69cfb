"""`ldm train`: draw the training pictures, train the parts of the model of scenes one after the other, export them."""

import argparse
import importlib
import os
from dataclasses import fields, replace
from pathlib import Path

from ldm.cli.options import SEED, add_device, find_device, one_of, real, whole
from ldm.errors import LDMError, say_on_stderr

# In the order in which they build on each other; each is a module of `ldm.train` with a `Recipe` and a `train`.
STAGES = {
    "vae": "the autoencoder: pictures to latents and back",
    "clip": "the text encoder, together with one of images",
    "checker": "the network that reads from a picture what it shows",
    "unet": "the UNet, which removes noise; needs vae and clip",
}
DEPTH_READER = "the network that tells the depth in a picture, by which a ControlNet of depth is judged"
CONTROLNET = "a ControlNet for a finished model, which draws by edges or by depth"
LORA = "a LoRA for a finished model, which brings it a style"
FLOW = "a small FLUX (flow matching), which reads the words and draws the latents of a finished model"
WORD = "a word for a finished model: vectors for what it has no word for (textual inversion)"
MODULES = {"depth-reader": "depth_reader", "word": "inversion"}  # where a stage's module has another name
NEEDS = {"unet": ("vae", "clip")}
BEGINS_FROM = {  # what --init reads
    "vae": ("vae/diffusion_pytorch_model.safetensors",),
    "unet": ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
    "flow": ("transformer/diffusion_pytorch_model.safetensors",),
}
LORA_HELP = """Train a LoRA: small changes beside a finished model's layers, which bring it a style.

  ldm train lora                                               neon light, in some ten minutes
  ldm generate "a green boat on sand" --lora runs/scenes/lora-neon:0.8

The pictures are drawn by ldm.scenes, and captions don't name their style. To train on pictures of your own, call
ldm.train.lora.train(folder, Recipe(...), of=...) in Python, whose `of` gives pictures and captions. What the recipe
says where an option is left out stands in ldm.train.lora.Recipe."""
FLOW_HELP = """Train a small FLUX: a transformer that predicts which way a latent flows from noise to a picture.

  ldm train flow --processes 2                                 an hour and a half on two cores
  ldm train flow --to my-flow && ldm generate "a green boat on sand" --model my-flow

Text encoder and VAE are those of a finished model (--base) and stay as they are; the folder that --to writes has the
transformer alone, and names that model for the rest. What the recipe says where an option is left out stands in
ldm.train.flow.Recipe."""
WORD_HELP = """Train a word: vectors for what a finished model has no word for (textual inversion).

  ldm train word                                               <mushroom>, in some ten minutes
  ldm generate "a red <mushroom> on sand" --embedding runs/scenes/word-mushroom

The pictures are drawn by ldm.scenes. To train on pictures of your own, call
ldm.train.inversion.train(folder, Recipe(...), of=...) in Python, whose `of` gives pictures and captions. What the
recipe says where an option is left out stands in ldm.train.inversion.Recipe."""
HELP = """Train the embedded model of scenes from nothing, or what is added to a finished model.

  ldm train all                      everything, in order: some hours on two cores
  ldm train vae --steps 200          one stage
  ldm train controlnet               one that draws by edges, for the embedded model; --condition depth for the other
  ldm train flow                     a small FLUX for the embedded model's VAE and text encoder
  ldm train lora                     a style, neon light, for the embedded model
  ldm train word                     a word, <mushroom>, for the embedded model
  ldm train export --to my-model     put the parts together: a model folder for `ldm generate --model my-model`

Ctrl-C saves and stops; the same command goes on from there. Losses go to STAGE/log.jsonl in the run's folder, pictures
to STAGE/sheet-*.png."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("train", help="train the embedded model, a ControlNet, a LoRA or a word", description=HELP)
    stages = p.add_subparsers(metavar="STAGE", required=True, title="stages")
    for name, what in STAGES.items():
        add_stage(stages.add_parser(name, help=what, description=f"Train {what}."), name)
    add_stage(
        stages.add_parser("all", help="all of these, in this order", description="Train everything, in order."), "all"
    )
    add_depth_reader(stages.add_parser("depth-reader", help=DEPTH_READER, description=f"Train {DEPTH_READER}."))
    add_controlnet(stages.add_parser("controlnet", help=CONTROLNET, description=f"Train {CONTROLNET}."))
    add_flow(stages.add_parser("flow", help=FLOW, description=FLOW_HELP))
    add_lora(stages.add_parser("lora", help=LORA, description=LORA_HELP))
    add_word(stages.add_parser("word", help=WORD, description=WORD_HELP))
    add_export(stages.add_parser("export", help="put the trained parts together as a model folder"))


def add_stage(p: argparse.ArgumentParser, stage: str) -> None:
    recipe = "(default: the recipe's)"
    p.set_defaults(run=run, parser=p, stage=stage)
    p.add_argument(
        "--run", dest="folder", metavar="DIR", default="runs/scenes", help="the run's folder (default: runs/scenes)"
    )
    add_device(p)
    p.add_argument("--pictures", type=whole(32), metavar="N", help=f"training pictures {recipe}")
    p.add_argument(
        "--steps", type=whole(1), metavar="N", help=f"steps of training{', of each stage' * (stage == 'all')} {recipe}"
    )
    p.add_argument("--seed", type=SEED, help=f"of everything random {recipe}")
    p.add_argument(
        "--processes",
        type=whole(1),
        default=1,
        metavar="N",
        help="share every batch (but CLIP's) among N processes: one for each core, or GPU, is fastest (default: 1)",
    )
    if stage != "all":  # one size or rate for four networks would suit none of them
        p.add_argument("--batch", type=whole(1), metavar="N", help=f"pictures a step {recipe}")
        p.add_argument("--lr", type=real(0), metavar="RATE", help=f"learning rate {recipe}")
    if stage in ("vae", "unet", "all"):
        p.add_argument("--init", metavar="DIR", help="begin from the weights of this model folder, not at random")
    if stage in ("unet", "all"):
        p.add_argument(
            "--text",
            type=one_of(("frozen", "tuned")),
            help=f"frozen or tuned: whether the text encoder learns on {recipe}",
        )
        p.add_argument(
            "--name",
            default="unet",
            metavar="NAME",
            help="the UNet's folder in the run, to try several (default: unet)",
        )


def add_depth_reader(p: argparse.ArgumentParser) -> None:
    add_stage(p, "depth-reader")
    p.add_argument(
        "--to", metavar="DIR", help="write it there in half precision, too: NAME-depth-extras beside a model"
    )


def add_controlnet(p: argparse.ArgumentParser) -> None:
    add_stage(p, "controlnet")
    p.add_argument("--condition", type=one_of(("canny", "depth")), help="canny or depth (default: canny)")
    p.add_argument("--base", metavar="MODEL", help="the model it is for: a name or a folder (default: scenes)")
    p.add_argument(
        "--to", metavar="DIR", help="write it there, in half precision, when it is trained: a model that is there is "
        "replaced, but for its card (default: only the run's folder has it)",
    )  # fmt: skip


def add_flow(p: argparse.ArgumentParser) -> None:
    add_stage(p, "flow")
    p.add_argument("--init", metavar="DIR", help="begin from the transformer of this model folder, not at random")
    p.add_argument(
        "--base", metavar="MODEL", help="the model whose text encoder and VAE it takes: a name or a folder (default: "
        "scenes)",
    )  # fmt: skip
    p.add_argument(
        "--precision", type=one_of(("bfloat16", "float32")),
        help="what products are computed in: bfloat16 or float32 (default: the recipe's)",
    )  # fmt: skip
    p.add_argument(
        "--to", metavar="DIR", help="write it there as a model folder, in half precision, when it is trained: a model "
        "that is there is replaced, but for its card (default: only the run's folder has it)",
    )  # fmt: skip


def add_lora(p: argparse.ArgumentParser) -> None:
    recipe = "(default: the recipe's)"
    add_stage(p, "lora")
    p.add_argument(
        "--style", metavar="STYLE", help="the style of ldm.scenes that it brings: neon, which the model doesn't know, "
        "or one that it does, such as watercolor (default: neon)",
    )  # fmt: skip
    p.add_argument("--rank", type=whole(1), metavar="N", help=f"how many rows each layer's two factors share {recipe}")
    p.add_argument("--alpha", type=real(), metavar="A", help=f"the change is A/rank of the factors' product {recipe}")
    p.add_argument(
        "--layers", type=one_of(("attention", "transformers", "all")),
        help=f"which it changes: attention, transformers or all {recipe}",
    )  # fmt: skip
    add_addition(p)


def add_word(p: argparse.ArgumentParser) -> None:
    recipe = "(default: the recipe's)"
    add_stage(p, "word")
    p.add_argument("--thing", metavar="THING", help="the thing of ldm.scenes that it names (default: mushroom)")
    p.add_argument("--word", metavar="WORD", help="what prompts call it (default: <mushroom>)")
    p.add_argument("--begin", metavar="WORDS", help=f"words whose vectors it begins from {recipe}")
    p.add_argument("--vectors", type=whole(1, 70), metavar="N", help=f"how many tokens it is {recipe}")
    add_addition(p)


def add_addition(p: argparse.ArgumentParser) -> None:
    """What is asked of everything that is added to a model."""
    p.add_argument("--base", metavar="MODEL", help="the model it is for: a name or a folder (default: scenes)")
    p.add_argument(
        "--to", metavar="DIR", help="write it to this folder, too, with a picture of what it does, and measure it: an "
        "older one is replaced, but for its card (default: only the run's folder has it)",
    )  # fmt: skip
    p.add_argument(
        "--measure", type=whole(0), default=200, metavar="N", help="held-out pictures of each kind to measure on, "
        "where --to is given (default: 200; 0: none)",
    )  # fmt: skip


def add_export(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run=run_export, parser=p)
    p.add_argument(
        "--run", dest="folder", metavar="DIR", default="runs/scenes", help="the run's folder (default: runs/scenes)"
    )
    p.add_argument(
        "--to",
        default="weights/scenes",
        metavar="DIR",
        help="the model folder, beside which DIR-extras takes the checker and CLIP; models that are there are "
        "replaced as a whole (default: weights/scenes)",
    )
    p.add_argument("--name", default="unet", metavar="NAME", help="the UNet's folder in the run (default: unet)")
    p.add_argument("--steps", type=whole(1), default=25, help="steps it is best drawn with (default: 25)")
    p.add_argument("--guidance", type=real(), default=4.0, help="guidance it is best drawn with (default: 4)")
    p.add_argument("--sampler", default="dpm++2m", help="sampler it is best drawn with (default: dpm++2m)")


def run(args: argparse.Namespace) -> None:
    from ldm.train import parallel

    device = str(find_device(args.device))
    folder = Path(args.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LDMError(f"Cannot make the run's folder {folder}: {error.strerror}; choose another --run.") from error
    stages = tuple(STAGES) if args.stage == "all" else (args.stage,)
    for name in (name for stage in stages for name in BEGINS_FROM.get(stage, ()) if args.init):
        if not Path(args.init, name).is_file():
            raise LDMError(f"--init {args.init} lacks {name}: name a model folder in diffusers' format.")
    batch = getattr(args, "batch", None)
    if batch is not None and batch % args.processes:
        raise LDMError(f"A batch of {batch} cannot be shared by {args.processes} processes: choose a multiple.")
    if args.processes > 1 and "RANK" not in os.environ:
        return parallel.spawn(args.processes, args.argv)
    device = parallel.start(device)
    try:
        for stage in stages:
            train_stage(stage, folder, args, device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped in {stage}; {folder} holds what is done, the same command goes on.") from None
    finally:
        parallel.leave()


def train_stage(stage: str, folder: Path, args: argparse.Namespace, device: str) -> None:
    """Build the stage's recipe from the options that were given, and train."""
    for other in NEEDS.get(stage, ()):
        if not list((folder / other).rglob("config.json")):
            raise LDMError(
                f"{folder} has no trained {other} yet, which {stage} needs: `ldm train {other} --run {folder}`."
            )
    from ldm.train.export import (
        check_addition_place,
        check_controlnet_place,
        check_flow_place,
        export_controlnet,
        export_depth_reader,
        export_flow,
    )

    module = importlib.import_module(f"ldm.train.{MODULES.get(stage, stage)}")
    names = [field.name for field in fields(module.Recipe) if field.name != "device"]
    given = {name: getattr(args, name, None) for name in names}
    recipe = replace(module.Recipe(), device=device, **{k: v for k, v in given.items() if v is not None})
    if stage == "controlnet" and args.to:
        check_controlnet_place(Path(args.to))
    if stage == "flow" and args.to:
        check_flow_place(Path(args.to))
    if stage in ("lora", "word") and args.to:
        check_addition_place(Path(args.to), module.FILE)
    module.train(folder, recipe, **({"name": args.name} if stage == "unet" else {}))
    if stage == "controlnet" and args.to:
        export_controlnet(folder / f"controlnet-{recipe.condition}" / "controlnet", Path(args.to))
    if stage == "flow" and args.to:
        export_flow(folder / "flow" / "transformer", Path(args.to), recipe.base)
    if stage == "depth-reader" and args.to:
        export_depth_reader(folder / stage, Path(args.to))
    if stage in ("lora", "word") and args.to:
        export_addition(stage, module.place(folder, recipe), Path(args.to), recipe, args.measure)


def export_addition(stage: str, source: Path, target: Path, recipe: object, count: int) -> None:
    """Write the LoRA or the word there, with its picture, and print what is measured of it."""
    from ldm.metrics import added
    from ldm.train import export
    from ldm.train.parallel import leads

    if not leads():
        return
    new = recipe.style if stage == "lora" else recipe.thing
    (export.export_lora if stage == "lora" else export.export_word)(source, target, recipe.base, new)
    print(target)
    if count:
        try:
            print((added.measure_lora if stage == "lora" else added.measure_word)(target, recipe.base, new, count))
        except LDMError as error:  # a base of another world: what was trained is written all the same
            say_on_stderr(f"It was not measured. {error}")


def run_export(args: argparse.Namespace) -> None:
    from ldm.samplers import find_sampler
    from ldm.train.export import export

    find_sampler(args.sampler)
    folder, target = Path(args.folder), Path(args.to)
    for stage in STAGES:
        if not list((folder / (args.name if stage == "unet" else stage)).rglob("*.safetensors")):
            raise LDMError(f"{folder} has no trained {stage} yet: `ldm train {stage} --run {folder}`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    export(folder, target, {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler}, args.name)
    print(target)
