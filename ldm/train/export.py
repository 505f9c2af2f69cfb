"""Put what was trained together: a folder in diffusers' format, in half precision, that diffusers itself can load."""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm import conditions, scenes
from ldm.checkpoints.places import EMBEDDING, LORA, embedded, find_model
from ldm.control import Control
from ldm.convert.described import DIFFUSERS
from ldm.errors import LDMError
from ldm.io.atomic import atomic_folder
from ldm.io.folders import folder_hash, read_fields, read_json, write_json
from ldm.io.weights import read_tensors, save_weights
from ldm.loading import load, load_controlnet
from ldm.models.controlnet import ControlNetConfig
from ldm.train.data import tiled
from ldm.train.examples import unstyled
from ldm.train.flow import SCHEDULER as FLOW
from ldm.train.flow import TOKENS
from ldm.train.parallel import leads
from ldm.train.unet import SCHEDULER

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


FLOW_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": DIFFUSERS,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def copy_part(source: Path, target: Path, stem: str, prefix: str = "", drop: tuple[str, ...] = ()) -> None:
    """One network's configuration and weights, in fp16; `prefix` goes before every name, `drop` stays behind."""
    target.mkdir()
    tensors = {
        prefix + name: t.clone() for name, t, _ in read_tensors(source / f"{stem}.safetensors") if name not in drop
    }
    save_weights(tensors, target / f"{stem}.safetensors", torch.float16)
    write_json(target / "config.json", read_json(source / "config.json"))


def export(run: Path, target: Path, defaults: dict, name: str = "unet") -> None:
    """Write `target` (weights/scenes) and `target`-extras from the run's folder. Older folders are replaced as a whole.

    Raises LDMError if something else than an exported model stands there, or if the UNet was trained with another VAE.

    A model card (README.md) that stands in the old folder is carried over: it is written by hand, after measuring.
    """
    extras = target.with_name(target.name + "-extras")
    for folder, mark in ((target, "model_index.json"), (extras, "checker")):
        if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
            raise LDMError(
                f"{folder} holds something else than an exported model, and would be replaced: name another."
            )
    trained_with = read_json(run / name / "trained-with.json")
    for part, known in trained_with.items():
        if folder_hash(run / part) != known:
            raise LDMError(f"{run / name} was trained with another {part} than {run / part}: train it on, or anew.")
    with atomic_folder(target) as new:
        copy_part(run / "vae", new / "vae", "diffusion_pytorch_model")
        copy_part(run / name / "unet", new / "unet", "diffusion_pytorch_model")
        # The UNet reads the tokens' vectors alone; the outer `text_model.` is what every version of transformers reads.
        copy_part(run / name / "text", new / "text_encoder", "model", "text_model.", drop=("text_projection.weight",))
        config = read_json(new / "text_encoder" / "config.json")
        write_json(new / "text_encoder" / "config.json", {**config, "architectures": ["CLIPTextModel"]})
        (new / "tokenizer").mkdir()
        for file in (run / "tokenizer").iterdir():
            (new / "tokenizer" / file.name).write_bytes(file.read_bytes())
        (new / "scheduler").mkdir()
        write_json(new / "scheduler" / "scheduler_config.json", {**SCHEDULER, "_diffusers_version": DIFFUSERS})
        write_json(new / "model_index.json", INDEX)
        write_json(new / "ldm.json", defaults)
        keep_card(target, new)
        draw_samples(new)
    with atomic_folder(extras) as new:
        copy_part(run / "clip" / "text", new / "clip_text", "model")
        copy_part(run / "clip" / "vision", new / "clip_vision", "model")
        (new / "checker").mkdir()
        tensors = {key: tensor.clone() for key, tensor, _ in read_tensors(run / "checker" / "checker.safetensors")}
        save_weights(tensors, new / "checker" / "checker.safetensors", torch.float16)
        keep_card(extras, new)


def export_depth_reader(source: Path, target: Path) -> None:
    """Write a trained depth reader into the folder `target`, in fp16; what else is there stays."""
    if leads():
        target.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.clone() for name, tensor, _ in read_tensors(source / "depth_reader.safetensors")}
        save_weights(tensors, target / "depth_reader.safetensors", torch.float16)


def export_controlnet(source: Path, target: Path) -> None:
    """Write a trained ControlNet as `target`, in fp16. A card that stands there is carried over, with its pictures."""
    check_controlnet_place(target)
    if not leads():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as new:
        new.rmdir()
        copy_part(source, new, "diffusion_pytorch_model")
        keep_card(target, new)


def check_controlnet_place(target: Path) -> None:
    """Raise LDMError if something else than a ControlNet stands there: before hours of training, not after them."""
    config = target / "config.json"
    ours = config.is_file() and read_fields(config).get("_class_name") == ControlNetConfig.class_name
    if target.is_dir() and any(target.iterdir()) and not ours:
        raise LDMError(f"{target} holds something else than a ControlNet, and would be replaced: name another.")


def export_flow(source: Path, target: Path, base: str, steps: int = 25, guidance: float = 4.0) -> None:
    """Write a trained transformer as the model folder `target`, in fp16.

    Its other parts are those of `base`: named in `ldm.json` where that is an embedded model, otherwise copied. A card
    that stands there is carried over, with its pictures.
    """
    check_flow_place(target)
    if not leads():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as new:
        copy_part(source, new / "transformer", "diffusion_pytorch_model")
        (new / "scheduler").mkdir()
        write_json(new / "scheduler" / "scheduler_config.json", {**FLOW, "_diffusers_version": DIFFUSERS})
        write_json(new / "model_index.json", FLOW_INDEX)
        drawn = {"steps": steps, "guidance": guidance, "width": 128, "height": 128, "max_sequence_length": TOKENS}
        if base in embedded():
            drawn = {"parts_of": base, **drawn}
        else:
            for part in ("tokenizer", "text_encoder", "vae"):
                shutil.copytree(find_model(base) / part, new / part)
        write_json(new / "ldm.json", drawn)
        keep_card(target, new)
    draw_samples(target)


def check_flow_place(target: Path) -> None:
    """Raise LDMError if something else than such a model stands there: before hours of training, not after them."""
    ours = (target / "transformer").is_dir() and (target / "model_index.json").is_file()
    if target.exists() and not ours and not (target.is_dir() and not any(target.iterdir())):
        raise LDMError(f"{target} holds something else than such a model, and would be replaced: name another.")


def check_addition_place(target: Path, mark: str) -> None:
    """Raise LDMError if something else than such a LoRA or word stands there: before the training, not after it."""
    if target.exists() and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
        raise LDMError(f"{target} holds something else than a {mark}, and would be replaced: name another.")


def export_lora(source: Path, target: Path, base: str, style: str) -> None:
    """Write a trained LoRA as `target`, with a picture of what it does; a card that stands there is carried over."""
    export_addition(source / LORA, target)
    draw_style(base, target, style)
    if base == "scenes":
        draw_together(base, target)


def export_word(source: Path, target: Path, base: str, thing: str) -> None:
    """Write a trained word as `target`, with a picture of what it does; a card that stands there is carried over."""
    export_addition(source / EMBEDDING, target)
    draw_word(base, target, thing)


def export_addition(file: Path, target: Path) -> None:
    check_addition_place(target, file.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as new:
        (new / file.name).write_bytes(file.read_bytes())
        keep_card(target, new)


SAMPLES = (  # what the picture beside the card shows, with seeds 0 to 15
    "a large red house on snow at night",
    "a small boat on the sea at sunset, watercolor",
    "a yellow balloon above mountains at dawn, pixel art",
    "a pencil sketch of a green tree on grass by day",
    "a blue car to the left of an orange tree on sand",
    "night, snow, a big red house, pixel art",
    "a large pink flower on grass at dawn with mountains",
    "a white star over the sea at night",
    "a black car on sand at sunset",
    "a purple fish in the sea by day, watercolor",
    "a small brown house on grass by day with mountains",
    "an orange boat on the sea at night, pencil sketch",
    "a red balloon to the right of a green tree on grass",
    "a large yellow star at sunset on sand, watercolor",
    "a blue flower on snow by day",
    "pixel art of a pink fish and a white boat on the sea",
)


def draw_samples(model: Path, columns: int = 8) -> None:
    """`samples.jpg`: a picture for each of `SAMPLES`, as the exported model draws them."""
    tiled(load(model)(SAMPLES).images, columns).save(model / "samples.jpg", quality=88)


BY_EDGES = (
    "a green boat at sunset on sand with mountains",
    "a white boat on snow at night with mountains, watercolor",
    "pixel art of a yellow boat on grass by day with mountains",
)
IN_ITS_PLACE = (
    "a large blue house on grass at dawn with mountains",
    "a large yellow flower on grass at dawn with mountains",
    "a green tree on grass at dawn with mountains",
)
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def with_hole(scene: scenes.Scene) -> tuple[Image.Image, Image.Image, Image.Image]:
    """A scene's picture, the mask around its first thing, and the picture with the mask in red."""
    picture = scenes.render(scene)
    image = Image.fromarray(picture.image)
    rows, columns = (np.flatnonzero(picture.masks[0].any(axis=side)) for side in (1, 0))
    hole = np.zeros(picture.depth.shape, np.uint8)
    hole[max(rows[0] - 6, 0) : rows[-1] + 8, max(columns[0] - 6, 0) : columns[-1] + 8] = 255
    mask, red = Image.fromarray(hole), Image.new("RGB", image.size, "red")
    return image, mask, Image.composite(Image.blend(image, red, 0.6), image, mask)


def draw_steered(model: Path, net: Path, seed: int = 30_000_011) -> None:
    """`steered.jpg` in the ControlNet's folder: a held-out scene, and what can be made of it.

    Its edges, and three pictures drawn by them; a mask in red, and three things drawn in its place; the way from the
    picture to "a large blue house on snow at night", by strength.
    """
    pipe = load(model)
    canny = load_controlnet(net, pipe)
    image, mask, shown = with_hole(scenes.sample(seed, "held-out", n=1, style="plain"))
    edges = conditions.canny(image)
    led = [pipe(words, seed=k, control=[Control(canny, edges)]) for k, words in enumerate(BY_EDGES)]
    filled = [pipe(words, image=image, mask=mask) for words in IN_ITS_PLACE]
    ladder = [pipe("a large blue house on snow at night", seed=1, image=image, strength=s) for s in STRENGTHS]
    tiles = [image, edges, *led, image, shown, *filled, *ladder]
    tiles = [tile if isinstance(tile, Image.Image) else tile.images[0] for tile in tiles]
    tiled(tiles, 5).save(net / "steered.jpg", quality=88)


SHOWN = 8  # pictures in a row
ORDINARY = ("tree", "flower")  # words that the model knows for what is most like the new thing


def draw_style(base: str, folder: Path, style: str, weights: tuple[float, ...] = (0.0, 0.5, 1.0)) -> None:
    """`before-after.jpg` beside the LoRA: a row a weight, the same words and seeds; at last true pictures of the style.

    The scenes are of combinations that it never saw, and their captions don't name the style.
    """
    pipe = load(base)
    shown = [scenes.sample(44_000_000 + k, "held-out", style=style) for k in range(SHOWN)]
    words = [unstyled(scene, scene.seed, full=True) for scene in shown]
    tiles = []
    for weight in weights:
        with pipe.lora(folder / LORA, weight):
            tiles += pipe(words).images
    tiles += [Image.fromarray(scenes.render(scene).image).resize(tiles[0].size) for scene in shown]
    tiled(tiles, SHOWN).save(folder / "before-after.jpg", quality=88)


def draw_together(base: str, folder: Path, net: str = "scenes-canny", seed: int = 30_000_011) -> None:
    """`together.jpg` beside the LoRA: it, a ControlNet and inpainting, alone and all at once.

    A held-out scene and its edges; drawn by the edges without the LoRA, and with it; the mask in red; another thing in
    its place with the LoRA, and the scene's own thing there by LoRA, ControlNet and mask together.
    """
    pipe = load(base)
    canny = load_controlnet(net, pipe)
    scene = scenes.sample(seed, "held-out", n=1, style="plain")
    image, mask, shown = with_hole(scene)
    edges, words = conditions.canny(image), scenes.caption(scene, scene.seed, full=True)
    control = [Control(canny, edges)]
    tiles = [image, edges, pipe(words, control=control).images[0]]
    with pipe.lora(folder / LORA):
        tiles += pipe(words, control=control).images
        tiles += [shown, *pipe(IN_ITS_PLACE[1], image=image, mask=mask).images]
        tiles += pipe(words, image=image, mask=mask, control=control).images
    tiled(tiles, len(tiles)).save(folder / "together.jpg", quality=88)


def draw_word(base: str, folder: Path, thing: str, words: tuple[str, ...] = ORDINARY) -> None:
    """`before-after.jpg` beside the word: a row for each ordinary word, one for the learnt, one of true pictures."""
    pipe = load(base)
    shown = [scenes.sample(44_000_000 + k, "held-out", kind=thing, n=1) for k in range(SHOWN)]
    said = [scenes.caption(scene, scene.seed, full=True) for scene in shown]
    tiles = []
    for word in words:
        tiles += pipe([text.replace(thing, word) for text in said]).images
    with pipe.embedding(folder / EMBEDDING) as learnt:
        tiles += pipe([text.replace(thing, learnt.word) for text in said]).images
    tiles += [Image.fromarray(scenes.render(scene).image).resize(tiles[0].size) for scene in shown]
    tiled(tiles, SHOWN).save(folder / "before-after.jpg", quality=88)


def keep_card(old: Path, new: Path) -> None:
    """Carry over the model card, and the pictures in it that were not drawn anew."""
    for path in (path for pattern in ("README.md", "*.jpg", "*.png") for path in old.glob(pattern)):
        if not (new / path.name).exists():
            (new / path.name).write_bytes(path.read_bytes())
