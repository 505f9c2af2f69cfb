"""Latent diffusion written out, so that a person can read it, step through it and trust it.

The road a picture takes: `ldm.text` -> `ldm.noise` -> `ldm.schedules`, `ldm.guidance`, `ldm.samplers` around
`ldm.models` -> `ldm.pipeline`.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`ldm.load` and `ldm.LDMError`, imported when they are first asked for: `import ldm` itself costs nothing."""
    if name == "load":
        from ldm.loading import load

        return load
    if name == "LDMError":
        from ldm.errors import LDMError

        return LDMError
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
