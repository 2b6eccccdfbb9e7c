"""The model families that can be patched. A new family is one file and one entry here.

Videos first, then images; within each the most used ones first. The order says nothing else, since no class is of two
families.
"""

from __future__ import annotations

from .cogvideox import COGVIDEOX
from .family import Family
from .flux import FLUX
from .hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from .ltx import LTX
from .ltx2 import LTX2
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .wan import ANYFLOW, WAN

FAMILIES: tuple[Family, ...] = (
    WAN,
    ANYFLOW,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    LTX2,
    LTX,
    COGVIDEOX,
    FLUX,
    QWEN_IMAGE,
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
