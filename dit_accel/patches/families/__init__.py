"""The model families that can be patched. A new family is one file and one entry here; a class without one
says why in ``excluded``.

Videos first, then images; within each the most used ones first. The order says nothing else, since no class is of two
families.
"""

from __future__ import annotations

from collections.abc import Iterable

from .allegro import ALLEGRO
from .aura_flow import AURA_FLOW
from .bria_fibo2 import BRIA_FIBO2
from .cogvideox import COGVIDEOX
from .cogview import COGVIEW
from .controls import CONTROLS
from .cosmos import COSMOS, COSMOS3
from .easyanimate import EASYANIMATE
from .ernie_image import ERNIE_IMAGE
from .excluded import EXCLUDED
from .family import Family
from .flux import BRIA, CHROMA, FLUX, FLUX2, FLUX3, LONGCAT_IMAGE, OVIS_IMAGE
from .helios import HELIOS
from .hidream import HIDREAM
from .hunyuan_image import HUNYUAN_IMAGE
from .hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, MOTIF_VIDEO
from .ideogram4 import IDEOGRAM4
from .joy_image import JOY_IMAGE, JOY_IMAGE_PLUS
from .kandinsky import KANDINSKY5, KANDINSKY6
from .krea2 import KREA2
from .ltx import LTX
from .ltx2 import LTX2
from .lumina2 import LUMINA2
from .minimax_h3 import MINIMAX_H3
from .mochi import MOCHI
from .omnigen import OMNIGEN
from .pixart import PIXART
from .prx import NUCLEUS_MOE, PRX
from .qwen_image import QWEN_IMAGE
from .qwen_image21 import QWEN_IMAGE_21
from .registry import register_family, registered
from .sd3 import SD3
from .wan import ANYFLOW, WAN
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    # videos
    WAN,
    ANYFLOW,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    FRAMEPACK,
    MINIMAX_H3,
    LTX2,
    LTX,
    COSMOS,
    COSMOS3,
    COGVIDEOX,
    KANDINSKY5,
    KANDINSKY6,
    MOTIF_VIDEO,
    HELIOS,
    MOCHI,
    ALLEGRO,
    EASYANIMATE,
    # images
    FLUX,
    FLUX2,
    FLUX3,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    Z_IMAGE,
    SD3,
    KREA2,
    CHROMA,
    HUNYUAN_IMAGE,
    BRIA,
    BRIA_FIBO2,
    HIDREAM,
    COGVIEW,
    LUMINA2,
    AURA_FLOW,
    PIXART,
    ERNIE_IMAGE,
    LONGCAT_IMAGE,
    OVIS_IMAGE,
    JOY_IMAGE,
    JOY_IMAGE_PLUS,
    IDEOGRAM4,
    OMNIGEN,
    PRX,
    NUCLEUS_MOE,
)


def family_of(model: object) -> Family | None:
    """The family of a transformer, by the name of its class or of a base class; None if unknown."""
    return _named(model, (*registered(), *FAMILIES))


def control_family_of(model: object) -> Family | None:
    """How a control network is read, by the name of its class or of a base class; None if unknown."""
    return _named(model, CONTROLS)


def _named(model: object, families: Iterable[Family]) -> Family | None:
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((family for family in families if any(name in family.transformers for name in names)), None)


__all__ = [
    "CONTROLS",
    "EXCLUDED",
    "FAMILIES",
    "Family",
    "control_family_of",
    "family_of",
    "register_family",
    "registered",
]
