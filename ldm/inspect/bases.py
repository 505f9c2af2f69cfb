"""What a LoRA or a word may be added to: the models that ldm knows by their configurations, and one that is named."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from ldm.checkpoints.architectures import PUBLISHED
from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.fit import CONFIGS
from ldm.checkpoints.folder import open_folder
from ldm.checkpoints.places import EMBEDDING, INDEX, LORA, embedded
from ldm.checkpoints.single import open_single
from ldm.errors import LDMError
from ldm.inspect.told import PROMPT

ADDED = (LORA, EMBEDDING)  # what marks the folder of something that is added to a model


class Base(NamedTuple):
    """A model's configurations by part. `name` and `checkpoint`, with its weights, where it is one of this machine."""

    title: str
    configs: Mapping[str, Any]
    name: str = ""
    checkpoint: Checkpoint | None = None

    @property
    def texts(self) -> dict[str, Any]:
        """Its text encoders' configurations, in order."""
        return {part: config for part, config in self.configs.items() if part.startswith("text_encoder")}

    def vocabulary(self, part: str) -> Any:
        """The vectors (vocabulary, D) of a text encoder's words; None where they can't be read here."""
        name = "embeddings.token_embedding.weight"
        if self.checkpoint is None:
            return None
        try:
            weights = self.checkpoint.weights(part)
            names = [each for each in weights.entries if each.removeprefix("text_model.") == name]
            return weights.read(names[0]) if names else None
        except LDMError:
            return None


def of_embedded() -> list[Base]:
    """The embedded models."""
    return [of_place(folder, name) for name, folder in embedded(INDEX).items()]


def of_place(place: Path, name: str) -> Base:
    """A model in a folder or a file, which a command line calls `name`. Raises LDMError for what is no whole model."""
    opened = open_folder if place.is_dir() else open_single
    checkpoint = opened(place, None, "transformers", allow_pickle=True, say=lambda line: None)
    title = f"the embedded {name}" if name in embedded(INDEX) else name
    return Base(title, checkpoint.configs, name, checkpoint)


def beside(base: Base | None) -> dict[str, Base]:
    """All that an addition may go with, by title: the model that was named first, then what ldm knows."""
    return {each.title: each for each in ([base] if base is not None else []) + of_embedded() + [*published()]}


@cache
def published() -> tuple[Base, ...]:
    """Each model that ldm knows by its title, without its VAE; those that differ in nothing else, once."""
    found: dict[str, Base] = {}
    for each in PUBLISHED:
        configs = {part: CONFIGS[part].from_json(fields) for part, fields in each.parts.items() if part != "vae"}
        found.setdefault(each.title, Base(each.title, configs))
    return tuple(found.values())


def line_of_base(known: Iterable[Base], prompt: str = "") -> str:
    """A prompt and a model for `ldm generate`: the first that goes with it, if it is one of this machine."""
    first = next(iter(known), None)
    if first is not None and first.name == "scenes":  # which is drawn with where no model is named
        return quote(prompt or "a large red house on snow at night")
    name = first.name if first is not None else ""
    return f"{quote(prompt) if prompt else PROMPT} --model {quote(name) if name else 'MODEL'}"
