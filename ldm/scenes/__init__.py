"""The world of pictures our model learns from: scenes, their drawings, captions and ground truth.

    from ldm import scenes
    picture, text = scenes.draw(seed=7)

`world` holds the attributes and the held-out rule, `captions` the words, `shapes` the objects,
`landscape` the backgrounds, `styles` the looks, `render` puts it together.
"""

from .captions import caption, relation
from .render import Picture, render
from .sheet import contact_sheet, draw
from .world import (
    COLORS,
    GROUNDS,
    KINDS,
    NEW_KIND,
    NEW_STYLE,
    PIXELS,
    SIZES,
    STYLES,
    TIMES,
    Scene,
    Thing,
    held_out,
    held_out_combination,
    sample,
)

__all__ = [
    "COLORS",
    "GROUNDS",
    "KINDS",
    "NEW_KIND",
    "NEW_STYLE",
    "PIXELS",
    "SIZES",
    "STYLES",
    "TIMES",
    "Picture",
    "Scene",
    "Thing",
    "caption",
    "contact_sheet",
    "draw",
    "held_out",
    "held_out_combination",
    "relation",
    "render",
    "sample",
]
