"""What a network predicts, the noise or the velocity, where no file says it: it is asked.

At the noisiest step of a schedule nearly nothing of a picture is left: x = alpha * x0 + sigma * eps, with alpha of 0.07
and sigma of 0.998 for Stable Diffusion. A network that predicts eps (Ho et al. 2020) then does well to answer with x
itself. One that predicts v = alpha * eps - sigma * x0 (Salimans & Ho 2022, appendix D) has to answer with its idea of a
picture, turned around, and that has nothing to do with the noise. So pure noise is shown to it, and the correlation of
answer and question tells the one from the other.
"""

import torch

from ldm.models.unet import Extras, UNet
from ldm.noise import Noise

# Above the first it answers with the noise, below the second with something else; between them nothing is said.
NOISE, ELSE = 0.8, 0.4


def measure(unet: UNet) -> tuple[str | None, float]:
    """ "epsilon", "v_prediction" or None, if the answer speaks for neither; and its correlation with the noise."""
    found = answer(unet)
    return ("epsilon" if found > NOISE else "v_prediction" if found < ELSE else None), found


@torch.no_grad()
def answer(unet: UNet, last: int = 999, size: int = 32) -> float:
    """The correlation of noise (1, C, size, size) with what the network says of it, wordless, at its `last` timestep.

    Channels beside the latent's, as inpainting has them, are shown nothing.
    """
    config = unet.config
    noise = Noise.from_seeds([0]).draw((config.out_channels, size, size))
    x = torch.zeros(1, config.in_channels, size, size)
    x[:, : config.out_channels] = noise
    extras = [None, None]
    if config.is_xl:  # the pooled vector, and six numbers of sizes
        sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
        extras = [
            torch.zeros(1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim),
            sizes,
        ]
    context = torch.zeros(1, 77, config.cross_attention_dim)
    weight, given = unet.conv_in.weight, (x, torch.tensor([float(last)]), context, *extras)
    x, t, context, *extras = (None if each is None else each.to(weight.device, weight.dtype) for each in given)
    said = unet(x, t, context, Extras(*extras))
    return float(torch.corrcoef(torch.stack([noise.flatten().double(), said.flatten().double().cpu()]))[0, 1])
