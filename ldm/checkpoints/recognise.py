"""What a weight file is, told by its keys and shapes: never by its name, which anybody can give.

Three questions, in this order. *Is it something else?* Some keys are found in one kind of file alone, as a LoRA's.
*Which parts lie where?* Each part has a tensor that no other has, below one of a few prefixes. *Of which model are
they?* The parts are compared, every key and every shape, with each published architecture, or with the configurations
that the file itself carries (ldm writes them into the metadata): the one without a misfit is it, and the nearest one,
if none is. What is left over then is something known that takes no part in drawing, or unknown, and told.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ldm.checkpoints import names
from ldm.checkpoints.architectures import PUBLISHED, Architecture
from ldm.checkpoints.fit import CONFIGS, Fit, Group, Misfit, Place, Shapes, called, find_parts, rank
from ldm.checkpoints.kinds import REFUSED, other_kind, quantised
from ldm.checkpoints.own import METADATA, own_architecture
from ldm.errors import LDMError
from ldm.io.folders import some
from ldm.io.headers import Entry
from ldm.models.controlnet import ControlNetConfig
from ldm.models.flux import FluxConfig
from ldm.models.unet import UNetConfig
from ldm.text.t5 import T5Config

TITLES = {
    "unet": "UNet",
    "transformer": "transformer",
    "vae": "VAE",
    "controlnet": "ControlNet",
    "text_encoder": "text encoder",
}
TITLES |= {"text_encoder_2": "second text encoder"}
KONTEXT = (
    "but its metadata call it a FLUX.1 Kontext, which reads another picture's patches, and ldm doesn't: take another"
)
FIRST = {"vae": ("encoder.conv_in",) * 2, "transformer": ("img_in", "x_embedder")}  # layer, in either layout
MARKS = ("v_pred", "ztsnr")  # keys without numbers: it predicts the velocity; its last step has no signal left


@dataclass(frozen=True)
class Found:
    """What was recognised.

    `kind`: "pipeline" (a UNet or a transformer, and other parts); one part's name, if it is alone; or something that
    ldm doesn't read ("lora", "flux2", ..., "unknown"), with `advice`. `reason`: what it is, and by what that was seen;
    follows an "is".
    `candidates`: the published architectures of these very shapes. There are several where they differ in what shapes
    don't show: in what the network predicts (`predicting`), in a lone VAE's scaling factor (`scaling_factors`).
    `architecture` is the first, `configs` are its configurations of the file's `parts`.
    `missing`, `wrong`, `unknown`: the file's names that are not there, misshapen, and of nothing that is known.
    """

    kind: str
    reason: str
    advice: str = ""
    candidates: tuple[Architecture, ...] = ()
    parts: Mapping[str, Place] = field(default_factory=dict)
    configs: Mapping[str, names.Config] = field(default_factory=dict)
    marks: frozenset[str] = frozenset()
    passed_over: tuple[Group, ...] = ()
    missing: tuple[str, ...] = ()
    wrong: tuple[Misfit, ...] = ()
    unknown: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()  # the parts of the architecture that the file doesn't have
    own: bool = False  # the configurations are the file's own, from its metadata
    refused: str = ""  # why it isn't read, although it is known

    @property
    def architecture(self) -> Architecture | None:
        return self.candidates[0] if self.candidates else None

    @property
    def backbone(self) -> str:
        """The name of the part that predicts, "unet" or "transformer"; "" if the file has neither."""
        return next((part for part in ("transformer", "unet") if part in self.parts), "")

    @property
    def scaling_factors(self) -> tuple[float, ...]:
        """Those that a VAE of these shapes may have: several for a lone VAE of Stable Diffusion's usual shapes."""
        found = [
            CONFIGS["vae"].from_json(each.parts["vae"]).scaling_factor
            for each in self.candidates
            if "vae" in each.parts
        ]
        return tuple(dict.fromkeys(found))

    def predicting(self, prediction: str) -> Architecture | None:
        """Of the candidates the one whose scheduler says `prediction`, else the first."""
        said = (each for each in self.candidates if each.scheduler.get("prediction_type", "epsilon") == prediction)
        return next(said, self.architecture)

    def origins(self, part: str, ema: bool = False) -> dict[str, names.Origin]:
        """Where each tensor of the part lies in the file; with `ema`, its moving average."""
        found = names.origins(part, self.configs[part], *self.parts[part])
        return {key: names.averaged(origin) for key, origin in found.items()} if ema else found

    @property
    def has_ema(self) -> bool:
        """Whether the file holds moving averages of the UNet's weights too."""
        passed = (name for group in self.passed_over for name in group.names)
        return any(name.startswith(names.EMA + "diffusion_model") for name in passed)

    def check(self, place: object) -> None:
        """Raise LDMError unless it is something that ldm reads, complete, with nothing unknown in it."""
        if not self.parts:
            raise LDMError(f"{place} is {self.reason}: {self.advice}.")
        if self.refused:
            raise LDMError(f"{place} is {self.reason}; {self.refused}.")
        faults = []
        if self.missing:
            faults.append(f"missing {some(self.missing)}")
        if self.wrong:
            faults.append("wrong shape: " + some([f"{n} is {shape} instead of {w}" for n, shape, w in self.wrong]))
        if self.unknown:
            faults.append(f"unknown {some([repr(name[:100]) for name in self.unknown])}")
        if faults:
            raise LDMError(
                f"{place} is {self.reason}; but {'; '.join(faults)}: take a sound copy of a model of that kind."
            )

    def check_pipeline(self, place: object) -> None:
        """`check`, and raise LDMError if a part of a whole model is lacking."""
        self.check(place)
        if not self.backbone or self.lacks:
            lacking = self.lacks or ("unet",)
            advice = (
                "take a checkpoint with all parts, or put this one into a model's folder, converted by `ldm convert`"
            )
            if self.backbone == "transformer":
                advice = "take these from another FLUX.1: parts_of=FOLDER (--parts-of FOLDER)"
            raise LDMError(
                f"{place} is {self.reason}, and no whole model: it lacks the "
                f"{' and the '.join(TITLES[part] for part in lacking)}; {advice}."
            )


def recognise(entries: Mapping[str, Entry], place: object, metadata: Mapping[str, str] | None = None) -> Found:
    """What the file or files of these tensors are; `place` is for sentences.

    Raises LDMError only for configurations in the metadata that can't be read.
    """
    shapes = {name: entry.shape for name, entry in entries.items()}
    parts = find_parts(shapes)
    if other := other_kind(shapes, bool({"unet", "transformer", "vae"} & parts.keys())):
        return Found(*other)
    if not parts:
        advice = "name a model, a ControlNet or a VAE of Stable Diffusion 1, 2 or XL, or of FLUX.1"
        return Found("unknown", _nothing(shapes), advice)
    own = METADATA in (metadata or {})
    if own:
        known = (own_architecture(metadata[METADATA], place, len(entries)),)
        parts = called(parts, known[0])
        if strange := [part for part in parts if part not in known[0].parts]:
            what = f"{place} holds a {TITLES[strange[0]]}"
            raise LDMError(f"{what}, of which the configuration in its metadata says nothing: take a sound copy.")
    fits = rank(known if own else PUBLISHED, parts, shapes)
    if not fits:  # parts that no model has together
        return Found("unknown", _unheard_of(parts, shapes), "name a file of one model")
    best = fits[0]
    if not own and 4 * best.misfits > len(best.claimed):
        return Found("unknown", _unheard_of(parts, shapes), "take its diffusers folder, which has the configuration")
    parts = best.parts
    marks = [name for name in (*MARKS, *REFUSED) if name in shapes]
    refused = next((REFUSED[name] for name in marks if name in REFUSED), "")
    if "transformer" in parts and is_kontext(metadata or {}):
        refused = KONTEXT
    draws = bool({"unet", "transformer"} & parts.keys())
    return Found(
        kind="pipeline" if draws and len(parts) > 1 else " and ".join(parts),
        reason=_reason(best, parts, own),
        candidates=_alike(best, fits, parts),
        parts=parts,
        configs=best.configs,
        marks=frozenset(marks),
        passed_over=best.passed_over,
        missing=best.missing,
        wrong=best.wrong,
        unknown=best.unknown,
        lacks=tuple(part for part in best.architecture.parts if part not in parts) if draws else (),
        own=own,
        refused=refused or quantised(entries[name] for name in entries if name in best.claimed),
    )


def is_kontext(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata say that it is FLUX.1 Kontext, whose tensors have the names and shapes of FLUX.1-dev's."""
    said = (metadata.get(f"modelspec.{name}", "") for name in ("architecture", "title"))
    return any("kontext" in each.lower() for each in said)


def _alike(best: Fit, fits: list[Fit], parts: Mapping[str, Place]) -> tuple[Architecture, ...]:
    """Those that fit as well, and differ from the best in something else than what the file shows."""
    equal = [each.architecture for each in fits if each.misfits == best.misfits and each.wrong == best.wrong]
    if {"unet", "transformer", "controlnet"} & parts.keys():
        return tuple(equal)
    one_each: dict[str, Architecture] = {}  # of lone parts, which many models share, one for each configuration
    for each in equal:
        one_each.setdefault(repr([CONFIGS[part].from_json(each.parts[part]) for part in parts]), each)
    return tuple(one_each.values())


# ---------------------------------------------------------------------------------------------------------- in words


def _reason(best: Fit, parts: Mapping[str, Place], own: bool) -> str:
    """What it is, by what that was seen: "a Stable Diffusion XL base: its UNet reads a context of ..."."""
    title, configs = best.architecture.title, best.configs
    draws = "unet" in parts or "transformer" in parts
    if draws and len(parts) > 1:
        what = f"{_article(title)} with a ControlNet" if "controlnet" in parts else _article(title)
    else:
        what = " and ".join(f"a {TITLES[part]}" for part in parts)
        if draws or "controlnet" in parts:
            what += f" of {title if not own else 'a ' + title}"
    if best.misfits:
        what = f"most like {what}"
    seen = []
    for part, config in configs.items():
        if part in ("unet", "transformer", "controlnet"):
            seen.append(f"{f'its {TITLES[part]}' if len(parts) > 1 else 'it'} reads {_of_network(config)}")
        elif part == "vae" and not draws:
            seen.append(f"its latents have {config.latent_channels} channels, at {config.factor} pixels each")
        elif isinstance(config, T5Config):
            seen.extend([f"its {config.num_layers} layers are {config.d_model} wide"] * (not draws))
        elif not draws:
            seen.append(f"its {config.num_hidden_layers} layers are {config.hidden_size} wide")
    return f"{what}{', as its metadata say' if own else ''}: {'; '.join(seen)}"


def _article(title: str) -> str:
    return f"{'an' if title[0] in 'AEIOU' else 'a'} {title}"


def _of_network(config: UNetConfig | FluxConfig | ControlNetConfig) -> str:
    if isinstance(config, FluxConfig):
        return of_transformer(config)
    words = [f"{config.in_channels} channels", f"a context of {config.cross_attention_dim} numbers"]
    if config.is_xl:
        words.append(f"{config.projection_class_embeddings_input_dim} numbers of pooled vector and sizes")
    if config.num_class_embeds is not None:
        words.append(f"one of {config.num_class_embeds} levels of noise")
    if config.time_cond_proj_dim is not None:
        words.append("the guidance scale")
    return f"{', '.join(words[:-1])} and {words[-1]}"


def of_transformer(config: FluxConfig) -> str:
    """What a FLUX reads, in words."""
    words = [f"{config.in_channels} numbers of a patch", f"a context of {config.joint_attention_dim}"]
    words += [f"a pooled vector of {config.pooled_projection_dim}"] + ["the guidance scale"] * config.guidance_embeds
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _unheard_of(parts: Mapping[str, Place], shapes: Shapes) -> str:
    """What was seen of parts that fit no published model."""
    seen = []
    for part, (prefix, layout) in parts.items():
        original, ours = FIRST.get(part, ("input_blocks.0.0", "conv_in"))
        first = f"{prefix}{original if layout == 'original' else ours}.weight"
        layer = "layer" if part == "transformer" else "convolution"
        shape = f" whose first {layer} is {shapes[first]}" if first in shapes else ""
        seen.append(f"a {TITLES[part]}{shape}")
    return f"of no architecture that ldm knows: its {len(shapes)} tensors make {' and '.join(seen)}"


def _nothing(shapes: Shapes) -> str:
    if not shapes:
        return "empty: it holds no tensor"
    return f"nothing that ldm knows: its {len(shapes)} tensors are {some([repr(name[:80]) for name in shapes], 3)}"
