"""Train a small CLIP on scenes and captions: both towers from nothing, contrastively (Radford et al. 2021).

The text tower becomes the text encoder of the diffusion model; the image tower scores pictures against sentences.

Among a hundred other captions the words alone, in any order, find the right one, so from contrast alone a text tower
does not learn what their order says (Yuksekgonul et al. 2023: models "behave like bags-of-words"). So it is also asked
what stands on the left and what on the right (`Reader`).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.weights import save_weights
from ldm.metrics.checker import QUESTIONS, labels
from ldm.text.clip import INITIAL_SCALE, ImageEncoder, TextConfig, TextEncoder, VisionConfig, contrastive_loss
from ldm.text.tokenizer import Tokenizer
from ldm.train.common import Optimizer, Run, step_generator, trapezoid, write_model
from ldm.train.data import Pictures, pictures
from ldm.train.parallel import leader_first, leads
from ldm.train.vocabulary import save_vocabulary, train_vocabulary

WIDTH, LAYERS, HEADS, JOINT = 128, 3, 4, 128
IMAGE_SIZE, PATCH = 64, 8  # the tower looks at pictures of half the size: enough to tell what they show


@dataclass(frozen=True)
class Recipe:
    pictures: int = 12000
    held_out: int = 512  # pictures of held-out combinations, to measure on
    vocabulary: int = 672
    steps: int = 900
    batch: int = 128
    lr: float = 2e-3
    seed: int = 0
    device: str = "cpu"


def text_config(tokenizer: Tokenizer) -> TextConfig:
    return TextConfig(
        vocab_size=len(tokenizer.vocab),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        projection_dim=JOINT,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        with_projection=True,
    )


VISION = VisionConfig(
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    projection_dim=JOINT,
    image_size=IMAGE_SIZE,
    patch_size=PATCH,
)


class CLIP(nn.Module):
    """Both towers and the learned logarithm of the inverse temperature."""

    def __init__(self, text: TextConfig, vision: VisionConfig):
        super().__init__()
        self.text, self.vision = TextEncoder(text), ImageEncoder(vision)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_SCALE))
        initialise(self)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """The contrastive loss of the towers' vectors (B, J)."""
        scale = self.logit_scale.clamp(max=math.log(100)).exp()  # Radford et al. 2021, section 2.5
        return contrastive_loss(image, text, scale)


class Reader(nn.Module):
    """From a caption's pooled vector (B, J): what stands on the left, what on the right, and in which colours."""

    ASKED = ("left kind", "left color", "right kind", "right color")

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(JOINT, len(QUESTIONS[question])) for question in self.ASKED)

    def answers(self, data: Pictures) -> tuple[Tensor, Tensor]:
        """Of every picture: the right answers (N, 4), and which of its captions give them (N, 4)."""
        places = [list(QUESTIONS).index(question) for question in self.ASKED]
        right = torch.tensor([labels(scene) for scene in data.scenes])[:, places]
        given = [
            [len(scene.things) == 1 or "left" in words or "right" in words for words in captions]
            for scene, captions in zip(data.scenes, data.captions, strict=True)
        ]
        return right, torch.tensor(given)

    def loss(self, text: Tensor, right: Tensor, given: Tensor) -> Tensor:
        """Mean cross-entropy of the answers `right` (B, 4) to the captions that were `given` them (B,)."""
        losses = [F.cross_entropy(head(text), right[:, k], reduction="none") for k, head in enumerate(self.heads)]
        return (torch.stack(losses).mean(dim=0) * given).sum() / given.sum().clamp(min=1)

    @torch.no_grad()
    def accuracy(self, text: Tensor, right: Tensor, given: Tensor) -> float:
        """The share of answers that are right, of those that were given."""
        picks = torch.stack([head(text).argmax(dim=1) for head in self.heads], dim=1)  # (B, 4)
        return ((picks == right)[given].float().sum() / (len(self.ASKED) * given.sum()).clamp(min=1)).item()


def initialise(model: nn.Module) -> None:
    """Small embeddings, as in GPT-2: torch's own are of unit variance and would drown what the layers add."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def shrink(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> what the image tower looks at: (B, 3, 64, 64), each pixel an average."""
    return F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")


def make_tokenizer(folder: Path, data: Pictures, size: int) -> Tokenizer:
    """The vocabulary of the captions, trained unless `folder` already holds it."""
    with leader_first():
        if not (folder / "vocab.json").exists():
            save_vocabulary(folder, *train_vocabulary([words for each in data.captions for words in each], size))
    return Tokenizer.from_folder(folder)


@torch.no_grad()
def held_out(clip: CLIP, reader: Reader, held: Pictures, ids: Tensor, count: int = 256) -> dict[str, float]:
    """`recall`: how often a held-out picture finds its own caption among `count`.

    `read`: the reader's accuracy where a caption tells two things apart; who knows not the sides has 0.5.
    """
    device = clip.logit_scale.device
    images = clip.vision(shrink(held.tensor(slice(0, count)).to(device)))
    text = clip.text(ids[:count].to(device)).pooled
    best = (F.normalize(images, dim=-1) @ F.normalize(text, dim=-1).T).argmax(dim=1)
    recall = (best.cpu() == torch.arange(len(best))).float().mean().item()
    right, given = reader.answers(held)
    two = torch.tensor([len(scene.things) == 2 for scene in held.scenes]) & given[:, 0]
    read = reader.accuracy(text, right[: len(text)].to(device), two[: len(text)].to(device))
    return {"recall": recall, "read": read}


def train(folder: Path, recipe: Recipe = Recipe()) -> None:
    """Train in `folder`/clip, or go on where it stopped; at the end write both towers there as transformers would."""
    data = pictures(folder / "data", recipe.pictures)
    held = pictures(folder / "data", recipe.held_out, "held-out", first=10_000_000)
    tokenizer = make_tokenizer(folder / "tokenizer", data, recipe.vocabulary)
    ids = torch.stack([tokenizer(words).ids for words in data.captions])  # (N, 4, 77)
    held_ids = tokenizer([words[0] for words in held.captions]).ids
    torch.manual_seed(recipe.seed)
    clip, reader = CLIP(text_config(tokenizer), VISION).to(recipe.device), Reader().to(recipe.device)
    right, given = reader.answers(data)
    optimizer = Optimizer([clip, reader], recipe.lr)
    run = Run(folder / "clip", {"clip": clip, "reader": reader, "optimizer": optimizer}, recipe)
    for step in run.steps():  # not shared among processes: every picture is compared with all captions of the batch
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(data), (recipe.batch,), generator=generator)
        wording = torch.randint(ids.shape[1], (recipe.batch,), generator=generator)
        batch = ids[rows, wording]
        # The mask is causal, so nothing behind the last end-of-text can change the pooled vectors: leave it out.
        longest = int((batch == tokenizer.eos_id).int().argmax(dim=1).max()) + 1
        image = clip.vision(shrink(data.tensor(rows.numpy()).to(recipe.device)))
        text = clip.text(batch[:, :longest].to(recipe.device)).pooled
        reading = reader.loss(text, *(v.to(recipe.device) for v in (right[rows], given[rows, wording])))
        value = clip.loss(image, text) + reading
        optimizer.step(value, trapezoid(step, recipe.steps))
        if step % 10 == 9:
            run.log(step + 1, loss=value.item(), reading=reading.item(), scale=clip.logit_scale.exp().item())
        if (step + 1) % 150 == 0 or step + 1 == recipe.steps:
            run.log(step + 1, **held_out(clip, reader, held, held_ids))
    for name, tower in (("text", clip.text), ("vision", clip.vision)):
        write_model(folder / "clip" / name, tower, "model")
    if leads():
        save_weights({"logit_scale": clip.logit_scale.detach()}, folder / "clip" / "logit_scale.safetensors")
