"""Pictures of block maps and of values per layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_PAPER, _INK, _SOFT = (255, 255, 255), (27, 31, 39), (100, 108, 122)
_DROPPED = (206, 210, 217)
_LOW, _HIGH = -2.0, 2.0
"""Range of the colours: decimal logarithm of mass relative to a uniform row."""
_STOPS = ((0.0, (9, 8, 24)), (0.28, (55, 30, 112)), (0.5, (151, 45, 116)), (0.72, (232, 96, 74)),
          (0.88, (252, 183, 90)), (1.0, (253, 250, 206)))  # fmt: skip
_SIDE, _GAP, _LINE = 224, 14, 17


@dataclass(frozen=True, eq=False)
class MapPanel:
    """One map: mass ``[nq, nk]``, optional kept blocks of the same shape, two lines of text."""

    mass: torch.Tensor
    keep: torch.Tensor | None
    caption: str
    detail: str


def map_sheet(title: str, panels: Sequence[Sequence[MapPanel]]) -> Image:
    """Maps in a grid, with a colour scale. With a mask, the map follows again with dropped blocks greyed out.

    Queries run down, keys to the right. Colours are logarithmic: from a hundredth to a hundred times the mass
    of uniform attention.
    """
    from PIL import Image, ImageDraw

    if not panels or not panels[0]:
        raise ValueError("a map sheet needs at least one panel.")
    masked = any(panel.keep is not None for row in panels for panel in row)
    cell_w = (2 * _SIDE + 4 if masked else _SIDE) + _GAP
    # Captions must fit under a single map.
    cell_w = max(cell_w, 244 + _GAP)
    cell_h = _SIDE + 2 * _LINE + _GAP + 6
    head = 76
    width = max(_GAP + cell_w * max(len(row) for row in panels), 470)
    canvas = Image.new("RGB", (width, head + cell_h * len(panels) + 4), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 9), title, fill=_INK, font=_font(15))
    _scale(canvas, draw, _GAP, 36)
    axes = "Down: query blocks. Across: key blocks." + (" Right: what the mask keeps, the rest grey." if masked else "")
    draw.text((_GAP, 54), axes, fill=_SOFT, font=_font(11))
    for i, row in enumerate(panels):
        for j, panel in enumerate(row):
            x, y = _GAP + j * cell_w, head + i * cell_h
            canvas.paste(_map_image(panel.mass, None), (x, y))
            if panel.keep is not None:
                canvas.paste(_map_image(panel.mass, panel.keep), (x + _SIDE + 4, y))
            draw.text((x, y + _SIDE + 3), panel.caption, fill=_INK, font=_font(12))
            draw.text((x, y + _SIDE + 3 + _LINE), panel.detail, fill=_SOFT, font=_font(12))
    return canvas


def value_table(title: str, names: Sequence[str], rows: Sequence[Sequence[float]]) -> Image:
    """Shares in [0, 1] as coloured cells with their numbers: a named row per layer, a column per head."""
    from PIL import Image, ImageDraw

    if not rows or not rows[0]:
        raise ValueError("a value table needs at least one row and column.")
    cell_w, cell_h, left, top = 52, 26, 72, 62
    columns = max(len(row) for row in rows)
    mean = sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    title_font = _font(15)
    width = max(left + cell_w * columns + _GAP, int(title_font.getlength(title)) + 2 * _GAP)
    canvas = Image.new("RGB", (width, top + cell_h * len(rows) + 34), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 9), title, fill=_INK, font=title_font)
    for j in range(columns):
        draw.text((left + (j + 0.5) * cell_w, top - 8), f"head {j}", fill=_SOFT, font=_font(11), anchor="ms")
    for i, row in enumerate(rows):
        y = top + i * cell_h
        draw.text((_GAP, y + cell_h / 2), names[i], fill=_SOFT, font=_font(12), anchor="lm")
        for j, value in enumerate(row):
            colour = tuple(int(c) for c in _colours(np.array([0.1 + 0.9 * min(max(value, 0.0), 1.0)]))[0])
            x = left + j * cell_w
            draw.rectangle((x, y, x + cell_w - 2, y + cell_h - 2), fill=colour)
            dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 140
            ink = _PAPER if dark else _INK
            centre = (x + cell_w / 2 - 1, y + cell_h / 2 - 1)
            draw.text(centre, f"{value:.2f}", fill=ink, font=_font(12), anchor="mm")
    foot = top + cell_h * len(rows) + 8
    draw.text((_GAP, foot), f"mean {mean:.3f}", fill=_INK, font=_font(13))
    return canvas


def _map_image(mass: torch.Tensor, keep: torch.Tensor | None) -> Image:
    from PIL import Image

    uniform = mass.float() * mass.shape[-1]
    pixels = _fit(uniform[None])[0]
    level = (pixels.clamp_min(1e-12).log10() - _LOW) / (_HIGH - _LOW)
    picture = _colours(level.clamp(0, 1).numpy())
    if keep is not None:
        # Where several blocks share a pixel, grey in proportion.
        part = _fit(keep.float()[None])[0, ..., None].numpy()
        picture = part * picture + (1 - part) * np.array(_DROPPED)
    return Image.fromarray(picture.round().astype(np.uint8), "RGB")


def _fit(values: torch.Tensor) -> torch.Tensor:
    """Bring ``[1, nq, nk]`` to the panel's size: whole pixels per block when small, averages when large."""
    shape = tuple(values.shape[1:])
    if max(shape) > _SIDE:
        values = F.interpolate(values[None], size=tuple(min(n, _SIDE) for n in shape), mode="area")[0]
    return F.interpolate(values[None], size=(_SIDE, _SIDE), mode="nearest-exact")[0]


def _colours(level: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """RGB ``[..., 3]`` in 0..255 for levels in [0, 1], evenly growing in lightness."""
    at = [stop for stop, _ in _STOPS]
    return np.stack([np.interp(level, at, [rgb[c] for _, rgb in _STOPS]) for c in range(3)], axis=-1)


def _scale(canvas: Image, draw: ImageDraw, x: int, y: int) -> None:
    """Colour scale with its ends named."""
    from PIL import Image

    font = _font(11)
    text = f"{10**_LOW:g}"
    draw.text((x, y), text, fill=_SOFT, font=font)
    x += int(font.getlength(text)) + 6
    bar = np.broadcast_to(_colours(np.linspace(0, 1, 150))[None], (10, 150, 3))
    canvas.paste(Image.fromarray(bar.round().astype(np.uint8), "RGB"), (x, y + 2))
    draw.text((x + 156, y), f"{10**_HIGH:g} times the mass of uniform attention", fill=_SOFT, font=font)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
