"""The model families that can be patched. A new family is one file and one entry here.

Videos first, then images; within each the most used ones first. The order says nothing else, since no class is of two
families.
"""

from __future__ import annotations

from .allegro import ALLEGRO
from .cogvideox import COGVIDEOX
from .cosmos import COSMOS
from .easyanimate import EASYANIMATE
from .family import Family
from .flux import FLUX, FLUX2
from .helios import HELIOS
from .hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, MOTIF_VIDEO
from .kandinsky import KANDINSKY5
from .ltx import LTX
from .ltx2 import LTX2
from .mochi import MOCHI
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .wan import ANYFLOW, WAN
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    WAN,
    ANYFLOW,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    FRAMEPACK,
    LTX2,
    LTX,
    COSMOS,
    COGVIDEOX,
    KANDINSKY5,
    MOTIF_VIDEO,
    HELIOS,
    MOCHI,
    ALLEGRO,
    EASYANIMATE,
    FLUX,
    FLUX2,
    QWEN_IMAGE,
    Z_IMAGE,
    SD3,
)


def family_of(model: object) -> Family | None:
    """The family of a transformer, by the name of its class or of a base class; None if unknown."""
    names = [cls.__name__ for cls in type(model).__mro__]
    for family in FAMILIES:
        if any(name in family.transformers for name in names):
            return family
    return None


__all__ = ["FAMILIES", "Family", "family_of"]
