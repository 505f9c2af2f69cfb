"""Put what was trained together: a folder in diffusers' format, in half precision, that diffusers itself can load."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm import conditions, scenes
from ldm.control import Control
from ldm.convert.described import DIFFUSERS
from ldm.errors import LDMError
from ldm.io.atomic import atomic_folder
from ldm.io.folders import folder_hash, read_fields, read_json, write_json
from ldm.io.weights import read_tensors, save_weights
from ldm.loading import load, load_controlnet
from ldm.models.controlnet import ControlNetConfig
from ldm.train.data import tiled
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


def draw_steered(model: Path, net: Path, seed: int = 30_000_011) -> None:
    """`steered.jpg` in the ControlNet's folder: a held-out scene, and what can be made of it.

    Its edges, and three pictures drawn by them; a mask in red, and three things drawn in its place; the way from the
    picture to "a large blue house on snow at night", by strength.
    """
    pipe = load(model)
    canny = load_controlnet(net, pipe)
    picture = scenes.render(scenes.sample(seed, "held-out", n=1, style="plain"))
    image = Image.fromarray(picture.image)
    rows, columns = (np.flatnonzero(picture.masks[0].any(axis=side)) for side in (1, 0))
    hole = np.zeros(picture.depth.shape, np.uint8)
    hole[max(rows[0] - 6, 0) : rows[-1] + 8, max(columns[0] - 6, 0) : columns[-1] + 8] = 255
    mask = Image.fromarray(hole)
    edges, red = conditions.canny(image), Image.new("RGB", image.size, "red")
    shown = Image.composite(Image.blend(image, red, 0.6), image, mask)
    led = [pipe(words, seed=k, control=[Control(canny, edges)]) for k, words in enumerate(BY_EDGES)]
    filled = [pipe(words, image=image, mask=mask) for words in IN_ITS_PLACE]
    ladder = [pipe("a large blue house on snow at night", seed=1, image=image, strength=s) for s in STRENGTHS]
    tiles = [image, edges, *led, image, shown, *filled, *ladder]
    tiles = [tile if isinstance(tile, Image.Image) else tile.images[0] for tile in tiles]
    tiled(tiles, 5).save(net / "steered.jpg", quality=88)


def keep_card(old: Path, new: Path) -> None:
    """Carry over the model card, and the pictures in it that were not drawn anew."""
    for path in (path for pattern in ("README.md", "*.jpg", "*.png") for path in old.glob(pattern)):
        if not (new / path.name).exists():
            (new / path.name).write_bytes(path.read_bytes())
