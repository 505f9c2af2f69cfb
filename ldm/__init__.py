"""Latent diffusion written out, so that a person can read it, step through it and trust it.

The road a picture takes: `ldm.text` -> `ldm.noise` -> `ldm.schedules`, `ldm.samplers`, `ldm.sampling`,
`ldm.models` -> `ldm.pipeline`.
"""

import importlib

__version__ = "0.1.0"

PLACES = {  # the public names, and the modules they live in
    "load": "ldm.loading",
    "load_controlnet": "ldm.loading",
    "load_vae": "ldm.loading",
    "Control": "ldm.control",
    "Ensemble": "ldm.ensemble",
    "Sizes": "ldm.sizes",
    "LDMError": "ldm.errors",
    "Pipeline": "ldm.pipeline",
    "Noise": "ldm.noise",
    "SAMPLERS": "ldm.samplers",
    "Step": "ldm.sampling",
    "sample": "ldm.sampling",
    "Schedule": "ldm.schedules",
    "make_schedule": "ldm.schedules",
    "Tokenizer": "ldm.text.tokenizer",
    "TextEncoder": "ldm.text.clip",
    "UNet": "ldm.models.unet",
    "VAE": "ldm.models.vae",
    "watch": "ldm.lab.watch",
    "check": "ldm.lab.check",
}
__all__ = ["__version__", *PLACES]


def __getattr__(name: str):
    """A public name, imported when it is first asked for: `import ldm` itself costs nothing."""
    if name not in PLACES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
