"""Memory and disk, and which large models fit: their sizes are counted on networks that have shapes and no numbers."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ldm.doctor import machine
from ldm.doctor.lines import LACKS, OK, Line, gib


class Family(NamedTuple):
    """What shapes a published model's networks, as their config.json files say it; `side` of its pictures in pixels."""

    name: str
    side: int
    unet: dict
    texts: tuple[dict, ...]


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20} | {
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "architectures": ["CLIPTextModelWithProjection"],
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE_WIDTHS = (128, 256, 512, 512)  # of both
FAMILIES = (
    Family("SD 1.5", 512, {"cross_attention_dim": 768}, (CLIP_L,)),
    Family("SDXL", 1024, SDXL, (CLIP_L, CLIP_G)),
)

# The most that drawing one picture takes beside the weights is the VAE's last level, at full size: four of its maps
# (measured: 0.99 GiB at 512 x 512 in float32, where one is 0.25; the UNet with both halves of guidance takes 0.46).
# They are counted in float32: half precision is too narrow for SDXL's VAE.
MAPS = 4
HALF = {"cpu": "bfloat16", "mps": "float16", "cuda": "float16"}  # what computes fast in two bytes


def parameters(family: Family) -> int:
    """How many numbers the networks of a family hold."""
    from ldm.io.weights import blank
    from ldm.models.unet import UNet, UNetConfig
    from ldm.models.vae import VAE, VAEConfig
    from ldm.text.clip import TextConfig, TextEncoder

    with blank():
        networks = [TextEncoder(TextConfig.from_json(fields)) for fields in family.texts]
        networks.append(UNet(UNetConfig.from_json(family.unet)))
        networks.append(VAE(VAEConfig(block_out_channels=VAE_WIDTHS, layers_per_block=2)))
    return sum(p.numel() for network in networks for p in network.parameters())


def needed(family: Family, count: int, bytes_each: int) -> int:
    """Bytes to draw one picture of the family's own size, with `count` weights of so many bytes."""
    return bytes_each * count + MAPS * VAE_WIDTHS[1] * family.side**2 * 4


def memory(
    torch: ModuleType | None = None,
    ram: Callable[[], machine.Ram | None] = machine.ram,
    free_disk: Callable[[Path], int | None] = machine.free_disk,
) -> Iterator[Line]:
    """RAM, the cards' memory, disk, and the large models that fit into them."""
    found, rooms = ram(), {}
    if found is None:
        yield Line("RAM", "the system doesn't tell")
    else:
        limited = ", the limit of this container" if found.limited else ""
        yield Line("RAM", f"{gib(found.total)}{limited}, {gib(found.available)} available")
        rooms["cpu"] = found.available
    for name, folder in disks():
        free = free_disk(folder)
        yield Line(name, f"{'unknown' if free is None else gib(free)} free ({folder})")
    if torch is None:
        import torch
    for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        rooms[f"cuda:{k}"], total = torch.cuda.mem_get_info(k)
        yield Line(f"cuda:{k}", f"{gib(total)}, {gib(rooms[f'cuda:{k}'])} free")
    if torch.backends.mps.is_available():
        most = getattr(torch.mps, "recommended_max_memory", lambda: 2**63)()  # torch 2.4 doesn't tell
        rooms["mps"] = min(most, rooms.get("cpu", 2**63))
        yield Line("mps", f"{gib(rooms['mps'])} of the RAM")
    for family in FAMILIES:
        yield from fits(family, rooms)


def disks() -> Iterator[tuple[str, Path]]:
    """Where models lie: those that travel with ldm, and what the hub's cache holds."""
    from ldm.checkpoints.places import embedded

    for folder in list(embedded().values())[:1]:
        yield "models here", folder.parent
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    yield "downloads", Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))


def fits(family: Family, rooms: dict[str, int]) -> Iterator[Line]:
    """On which device, and in which type, a family's pictures can be drawn; a fault where only two bytes do."""
    count = parameters(family)
    full, half = needed(family, count, 4), needed(family, count, 2)
    device = max(rooms, key=rooms.get, default="cpu")  # the roomiest one is where a fault is told
    for name, room in rooms.items():
        narrow = HALF[name.partition(":")[0]]
        said = ", ".join(
            f"{gib(bytes_)} in {dtype} {'fits' if bytes_ <= room else 'does not fit'}"
            for dtype, bytes_ in (("float32", full), (narrow, half))
        )
        line = Line(f"{family.name} on {name}", said, OK if half <= room else LACKS)
        if name == device and half <= room < full:
            fault = f"{family.name} takes {gib(full)} in float32, and {name} has {gib(room)}: draw with it in {narrow}."
            command = f'ldm generate "a red house" --model FOLDER --device {name} --dtype {narrow}'
            line = line._replace(verdict=LACKS, fault=fault, command=command)
        yield line
