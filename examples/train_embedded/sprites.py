"""Animated RGBA sprites: packed into one file, expanded to a bank of recoloured variants on the GPU."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from captions import COLOR_NAMES, COLORS, SUBJECTS
from PIL import Image

SPRITE_FRAMES = 36
SPRITE_SIZE = 96


def pack_sprites(assets: list[Path], out: Path, size: int = SPRITE_SIZE) -> None:
    """Writes one zip with a strip per subject: `SPRITE_FRAMES` frames of `size` pixels, RGBA.

    Args:
        assets: folders that hold `<codepoint>.webp` animations of 256 x 256 pixels.
        out: the zip to write.
        size: pixels of a side, at most the 256 of the animations. Pictures of 480 lines and more want them all.

    Raises:
        FileNotFoundError: when a subject has no animation in any of the folders.
    """
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for subject in SUBJECTS:
            files = [folder / f"{subject.codepoint}.webp" for folder in assets]
            file = next((f for f in files if f.is_file()), None)
            if file is None:
                raise FileNotFoundError(f"no animation {subject.codepoint}.webp for {subject.name!r} in {assets}")
            image = Image.open(file)
            total = getattr(image, "n_frames", 1)
            strip = Image.new("RGBA", (size * SPRITE_FRAMES, size))
            for i in range(SPRITE_FRAMES):
                image.seek(i * total // SPRITE_FRAMES)
                frame = image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
                strip.paste(frame, (i * size, 0))
            buffer = io.BytesIO()
            strip.save(buffer, "WEBP", quality=92, method=4)
            archive.writestr(f"{subject.name}.webp", buffer.getvalue())


def load_sprites(path: Path) -> torch.Tensor:
    """Reads a packed zip. Returns uint8 [subjects, frames, 4, size, size] with straight alpha."""
    strips = []
    with zipfile.ZipFile(path) as archive:
        for subject in SUBJECTS:
            image = Image.open(io.BytesIO(archive.read(f"{subject.name}.webp"))).convert("RGBA")
            strip = torch.from_numpy(np.asarray(image).copy())  # [size, frames * size, 4]
            size = strip.shape[0]
            strips.append(strip.view(size, SPRITE_FRAMES, size, 4).permute(1, 3, 0, 2))
    return torch.stack(strips)


def rgb_to_hsv(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., 3, h, w] in [0, 1] to hue, saturation and value, each [..., h, w] in [0, 1]."""
    red, green, blue = rgb.unbind(-3)
    value, _ = rgb.max(-3)
    chroma = value - rgb.min(-3).values
    safe = chroma.clamp_min(1e-6)
    hue = torch.where(
        value == red,
        ((green - blue) / safe) % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue / 6, chroma / value.clamp_min(1e-6), value


def hsv_to_rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The inverse of `rgb_to_hsv`: three [..., h, w] to [..., 3, h, w]."""
    shift = torch.tensor([5.0, 3.0, 1.0], device=hue.device, dtype=hue.dtype).view(3, 1, 1)
    k = (shift + hue.unsqueeze(-3) * 6) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value.unsqueeze(-3) * (1 - saturation.unsqueeze(-3) * ramp)


def hue_distance(hue: torch.Tensor, centre: float) -> torch.Tensor:
    """Distance on the hue circle, in [0, 0.5]."""
    return ((hue - centre + 0.5) % 1.0 - 0.5).abs()


def drawn_hue(rgba: torch.Tensor, named: float) -> float:
    """The commonest hue near `named` of [frames, 4, h, w] in [0, 1], weighted by alpha and saturation."""
    hue, saturation, value = rgb_to_hsv(rgba[:, :3])
    weight = rgba[:, 3] * saturation * value * (saturation > 0.35) * (hue_distance(hue, named) < 0.1)
    offset = (hue - named + 0.5) % 1.0 - 0.5
    return float((named + (weight * offset).sum() / weight.sum().clamp_min(1e-6)) % 1.0)


class SpriteBank:
    """Every subject in every colour, on one device.

    `frames` is [variants, SPRITE_FRAMES, 4, size, size] half precision (float on the CPU), premultiplied
    alpha. Variant of (subject, colour): `variant[subject][colour]`; subjects that keep their colours have
    one.
    """

    def __init__(self, sprites: torch.Tensor, device: torch.device) -> None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        frames: list[torch.Tensor] = []
        self.variant: list[list[int]] = []
        for index, subject in enumerate(SUBJECTS):
            rgba = sprites[index].to(device).float() / 255
            row: list[int] = []
            targets: list[float | None] = [COLORS[c] for c in COLOR_NAMES] if subject.hue else [None]
            base = drawn_hue(rgba, COLORS[subject.hue]) if subject.hue else 0.0
            for target in targets:
                rgb = rgba[:, :3]
                if target is not None:
                    hue, saturation, value = rgb_to_hsv(rgb)
                    # Only what is near the body's hue turns: the windows of a bus stay blue.
                    turned = torch.where(hue_distance(hue, base) < 0.2, hue + (target - base), hue)
                    rgb = hsv_to_rgb(turned % 1.0, saturation, value)
                row.append(len(frames))
                frames.append(torch.cat([rgb * rgba[:, 3:], rgba[:, 3:]], dim=1).to(dtype))
            self.variant.append(row)
        self.frames = torch.stack(frames)
