"""ControlNet for FLUX: a shorter copy of its blocks that reads a second picture, and adds what it sees to the stream.

Zhang et al. 2023, section 3, on the transformer of `ldm.models.flux`: the nets of InstantX, Shakker-Labs and XLabs.
Names are those of diffusers' `FluxControlNetModel`. Shapes as there: B batch, C channels of the latent, h, w its
positions, N patches, L text tokens, D width of the network, P numbers of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.errors import LDMError
from ldm.models.controlnet import ConditioningEmbedding, ControlNetConfig, zero
from ldm.models.flux import Flux, FluxConfig, FluxResiduals, FluxTrunk, Prepared
from ldm.models.patches import PATCH, pack
from ldm.models.unet import Extras
from ldm.models.vae import VAEConfig

HINT = ControlNetConfig(conditioning_embedding_out_channels=(16, 16, 16, 16))  # XLabs' way down, to an eighth


@dataclass(frozen=True)
class FluxControlNetConfig(FluxConfig):
    """The fields of its `config.json`: the transformer's, of which it has fewer blocks, and those of what it reads."""

    num_mode: int | None = None  # a union: one net for so many kinds of picture, told which by a number
    # XLabs: the picture itself is read, through convolutions that end in so many channels; None: its latents are.
    conditioning_embedding_channels: int | None = None

    what: ClassVar[str] = "the ControlNet"
    class_name: ClassVar[str] = "FluxControlNetModel"

    @classmethod
    def from_json(cls, fields: dict) -> "FluxControlNetConfig":
        """Read diffusers' JSON, where `patch_size` is that of XLabs' convolutions' output, and of nothing else."""
        config = super().from_json({k: v for k, v in fields.items() if k != "patch_size"})
        patch = fields.get("patch_size", 1)
        if patch != config.patch_size:
            raise LDMError(
                f"The configuration of the ControlNet asks for 'patch_size' = {patch!s:.80}; one that reads "
                f"{'pictures' if config.reads_pictures else 'latents'} has {config.patch_size}: take its own file."
            )
        return config

    def to_json(self) -> dict:
        """The same as diffusers writes it: a net has no output of its own."""
        fields = super().to_json()
        del fields["out_channels"]
        return fields | {"patch_size": self.patch_size}

    def validate(self) -> None:
        super().validate()
        if self.reads_pictures and self.conditioning_embedding_channels * PATCH**2 != self.in_channels:
            raise LDMError(
                f"The ControlNet's convolutions end in {self.conditioning_embedding_channels} channels, a quarter of a "
                f"patch's {self.in_channels} numbers is needed: take the model's own file."
            )
        if self.num_mode == 0 or not self.num_layers + self.num_single_layers:
            name = "num_mode" if self.num_mode == 0 else "num_layers and num_single_layers"
            raise LDMError(f"The ControlNet has {name} 0: nothing would come out of it.")

    @property
    def reads_pictures(self) -> bool:
        """Whether it looks at the picture itself (XLabs), and not at its latents."""
        return self.conditioning_embedding_channels is not None

    @property
    def patch_size(self) -> int:
        """What diffusers calls so in its JSON: the side of a patch of what XLabs' convolutions make."""
        return PATCH if self.reads_pictures else 1


class FluxControlNet(FluxTrunk):
    """The trunk's copy, the embedding of the picture beside its own, and a zero layer behind every block."""

    config: FluxControlNetConfig

    def __init__(self, config: FluxControlNetConfig):
        super().__init__(config)
        width = config.width
        self.controlnet_blocks = nn.ModuleList(zero(nn.Linear(width, width)) for _ in self.transformer_blocks)
        self.controlnet_single_blocks = nn.ModuleList(
            zero(nn.Linear(width, width)) for _ in self.single_transformer_blocks
        )
        if config.num_mode is not None:
            self.controlnet_mode_embedder = nn.Embedding(config.num_mode, width)
        if config.reads_pictures:
            self.input_hint_block = ConditioningEmbedding(config.conditioning_embedding_channels, HINT)
        self.controlnet_x_embedder = zero(nn.Linear(config.in_channels, width))

    @classmethod
    def from_transformer(cls, flux: Flux, layers: int = 4, single_layers: int = 10) -> "FluxControlNet":
        """A copy of the transformer's embedders and first blocks that changes nothing yet: its zero layers are zero."""
        shared = {field.name: getattr(flux.config, field.name) for field in fields(FluxConfig)}
        config = FluxControlNetConfig(**shared)
        if flux.config.channels_in != flux.config.channels_out:
            raise LDMError(
                "A ControlNet is copied of a transformer that reads the latent alone, and this one reads "
                f"{flux.config.channels_in - flux.config.channels_out} channels beside it."
            )
        if layers > config.num_layers or single_layers > config.num_single_layers:
            raise LDMError(
                f"The transformer has {config.num_layers} and {config.num_single_layers} blocks: a ControlNet of "
                f"{layers} and {single_layers} can't be copied of it."
            )
        net = cls(replace(config, num_layers=layers, num_single_layers=single_layers, out_channels=None))
        trunk = {name: tensor for name, tensor in flux.state_dict().items() if name in net.state_dict()}
        net.load_state_dict(trunk, strict=False)
        return net.to(flux.x_embedder.weight.device, flux.dtype)

    def condition(self, picture: Tensor) -> Tensor:
        """What it sees (B, N, D), which doesn't change between the steps.

        `picture`: latents (B, C, h, w); where the net `reads_pictures`, the picture (B, 3, H, W) in [-1, 1].
        """
        latents = self.input_hint_block(picture) if self.config.reads_pictures else picture
        return self.controlnet_x_embedder(pack(latents))

    def prepare(
        self, context: Tensor, extras: Extras = Extras(), times: Sequence[float] = (), mode: int | None = None
    ) -> Prepared:
        """As the trunk's; a union is told its `mode` by one more token before the text."""
        prepared = super().prepare(context, extras, times)
        if self.config.num_mode is None:
            return prepared
        number = torch.tensor(mode, device=context.device)
        token = self.controlnet_mode_embedder(number).expand(len(context), 1, -1)
        return prepared._replace(text=torch.cat([token, prepared.text], dim=1))  # (B, 1 + L, D)

    def forward(
        self, x: Tensor, t: Tensor | float, prepared: Prepared, features: Tensor, scale: float = 1.0
    ) -> FluxResiduals:
        """What it adds, one tensor (B, N, D) for each block of its own.

        `x` (B, C, h, w) and `t` are what the transformer reads, `prepared` comes from `prepare`, `features` (B, N, D)
        from `condition`.
        """
        height, width = x.shape[2:]
        rotary = self.rotary(prepared.text.shape[1], height, width, x.device)
        h = self.x_embedder(pack(x)) + features
        streams = self.walk(h, prepared.text, self.vectors(t, prepared), rotary, FluxResiduals())
        layers = [*self.controlnet_blocks, *self.controlnet_single_blocks]
        added = [scale * layer(stream) for layer, stream in zip(layers, streams, strict=True)]
        return FluxResiduals(added[: self.config.num_layers], added[self.config.num_layers :])

    def spread(self, residuals: FluxResiduals, flux: FluxConfig) -> FluxResiduals:
        """The residuals of its own blocks as those of the transformer's, of which there are more.

        A run of neighbours gets the same one; XLabs' nets, which are short, start again from the first.
        """
        return FluxResiduals(
            over(residuals.double, flux.num_layers, around=self.config.reads_pictures),
            over(residuals.single, flux.num_single_layers),
        )


def over(residuals: Sequence[Tensor], blocks: int, around: bool = False) -> Sequence[Tensor]:
    """One of the residuals for each of so many blocks: ceil(blocks / residuals) times each, or all of them `around`."""
    if not residuals:
        return ()
    each = -(-blocks // len(residuals))
    return [residuals[i % len(residuals) if around else i // each] for i in range(blocks)]


def check_flux_base(
    config: FluxControlNetConfig, flux: FluxConfig, vae: VAEConfig, name: str = "The ControlNet"
) -> None:
    """Raise LDMError if what a ControlNet adds has no place in this transformer, or it reads other latents or texts."""
    shared = ("width", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")
    if apart := [field for field in shared if getattr(config, field) != getattr(flux, field)]:
        details = "; ".join(f"{field} {getattr(config, field)}, here {getattr(flux, field)}" for field in apart)
        raise LDMError(f"{name} was made for another base than this model ({details}).")
    for field in ("num_layers", "num_single_layers"):
        if getattr(config, field) > getattr(flux, field):
            raise LDMError(
                f"{name} has {field} {getattr(config, field)}, and this model {getattr(flux, field)}: it was made for "
                "another base."
            )
    if config.channels_in != vae.latent_channels:
        raise LDMError(
            f"{name} reads latents of {config.channels_in} channels, and this model's have {vae.latent_channels}."
        )
    if config.reads_pictures and vae.factor != 2 ** (len(HINT.conditioning_embedding_out_channels) - 1):
        raise LDMError(f"{name} looks at pictures of 8 pixels a position; this model's latents stand for {vae.factor}.")
