"""Procedural backgrounds: two static layers (far, near) that a slow camera pans over at different speeds.

Every painter returns `(far, near)`: far [n, 3, H, W] opaque and near [n, 4, H, W] with straight alpha, in
[0, 1]. W is wider than the frame by the room the camera needs. Painters follow the order of
`captions.BACKGROUNDS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def grain(height: int, least: int, share: int) -> int:
    """Pixels of the smallest things in a picture: `least`, or a `share`-th of the height if that is more.

    Points of a few pixels carry nothing in a large picture, and the autoencoder spends its latents on them.
    """
    return max(least, round(height / share))


class Canvas:
    """Coordinates, random numbers and noise for `n` images of `height` x `width` pixels."""

    def __init__(self, n: int, height: int, width: int, generator: torch.Generator) -> None:
        self.n, self.height, self.width, self.generator = n, height, width, generator
        device = generator.device
        self.y = ((torch.arange(height, device=device) + 0.5) / height).view(1, 1, height, 1)
        self.x = ((torch.arange(width, device=device) + 0.5) / height).view(1, 1, 1, width)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        size = (self.n, *(shape or (1, 1, 1)))
        return low + (high - low) * torch.rand(size, generator=self.generator, device=self.generator.device)

    def color(self, red: float, green: float, blue: float, spread: float = 0.04) -> Tensor:
        base = torch.tensor([red, green, blue], device=self.generator.device).view(1, 3, 1, 1)
        return (base + self.uniform(-spread, spread, 3, 1, 1)).clamp(0, 1)

    def noise(self, rows: int, columns: int, octaves: int = 3) -> Tensor:
        """Smooth noise [n, 1, H, W] of about unit spread; `rows` x `columns` is the coarsest grid."""
        total = torch.zeros(self.n, 1, self.height, self.width, device=self.generator.device)
        for octave in range(octaves):
            grid = (self.n, 1, min(rows << octave, self.height), min(columns << octave, self.width))
            values = torch.randn(grid, generator=self.generator, device=self.generator.device)
            total += 0.5**octave * F.interpolate(
                values, size=(self.height, self.width), mode="bilinear", align_corners=True
            )
        return total / 1.1

    def ridge(self, level: float, amplitude: float, points: int, octaves: int = 2) -> Tensor:
        """A wavy horizon: its y for every column, [n, 1, 1, W]."""
        line = torch.zeros(self.n, 1, self.width, device=self.generator.device)
        for octave in range(octaves):
            knots = torch.randn(self.n, 1, points << octave, generator=self.generator, device=line.device)
            line += 0.5**octave * F.interpolate(knots, size=self.width, mode="linear", align_corners=True)
        return (level + amplitude * line).unsqueeze(2)

    def below(self, line: Tensor | float) -> Tensor:
        """Soft mask of what lies below `line`, one pixel wide edge."""
        return ((self.y - line) * self.height + 0.5).clamp(0, 1).expand(self.n, 1, self.height, self.width)

    def gradient(self, top: Tensor, bottom: Tensor, end: float = 1.0) -> Tensor:
        return torch.lerp(top, bottom, (self.y / end).clamp(0, 1)).expand(self.n, 3, self.height, self.width)

    def disc(self, cx: Tensor, cy: Tensor, radius: Tensor) -> Tensor:
        distance = ((self.x - cx) ** 2 + (self.y - cy) ** 2).sqrt()
        return ((radius - distance) * self.height + 0.5).clamp(0, 1)

    def glow(self, cx: Tensor, cy: Tensor, radius: Tensor) -> Tensor:
        return torch.exp(-((self.x - cx) ** 2 + (self.y - cy) ** 2) / (2 * radius**2))

    def stars(self, share: float) -> Tensor:
        """Sparse points, two pixels wide or, where a picture is large, a 160th of its height: [n, 1, H, W]."""
        cell = grain(self.height, 2, 160)
        size = (self.n, 1, self.height // cell, self.width // cell)
        points = torch.rand(size, generator=self.generator, device=self.generator.device)
        bright = ((points - (1 - share)) / share).clamp(0, 1)
        bright = torch.where(points > 1 - share, 0.4 + 0.6 * bright, torch.zeros_like(bright))
        return F.interpolate(bright, size=(self.height, self.width), mode="bilinear", align_corners=False)


def mix(under: Tensor, over: Tensor, mask: Tensor) -> Tensor:
    return under + (over - under) * mask


def layer(color: Tensor, mask: Tensor) -> Tensor:
    n, _, height, width = mask.shape
    return torch.cat([color.expand(n, 3, height, width), mask], dim=1)


def night_sea(c: Canvas) -> tuple[Tensor, Tensor]:
    horizon = 0.52
    far = c.gradient(c.color(0.02, 0.03, 0.10, 0.02), c.color(0.10, 0.13, 0.28), horizon)
    far = far + c.stars(0.006) * (1 - c.below(horizon - 0.05))
    cx, cy = c.uniform(0.2, 1.0), c.uniform(0.12, 0.3)
    far = far + 0.25 * c.glow(cx, cy, c.uniform(0.12, 0.16))
    far = mix(far, c.color(0.96, 0.95, 0.85, 0.02), c.disc(cx, cy, c.uniform(0.05, 0.08)))
    waves = c.noise(48, 6, 2)
    water = c.gradient(c.color(0.05, 0.10, 0.24, 0.02), c.color(0.01, 0.03, 0.12, 0.02)) + 0.035 * waves
    path = torch.exp(-((c.x - cx) ** 2) / (2 * (0.05 + 0.12 * (c.y - horizon)) ** 2)) * c.below(horizon)
    water = water + path * (0.16 + 0.14 * waves)
    return far, layer(water, c.below(horizon))


def day_sea(c: Canvas) -> tuple[Tensor, Tensor]:
    horizon = 0.5
    far = c.gradient(c.color(0.38, 0.66, 0.94), c.color(0.80, 0.91, 0.98), horizon)
    far = mix(far, torch.ones_like(far), (0.9 * c.noise(4, 3) - 0.25).clamp(0, 0.8) * (1 - c.below(horizon)))
    water = c.gradient(c.color(0.10, 0.55, 0.72), c.color(0.02, 0.28, 0.52), 1.1) + 0.05 * c.noise(40, 6, 2)
    return far, layer(water, c.below(horizon))


def meadow(c: Canvas) -> tuple[Tensor, Tensor]:
    far = c.gradient(c.color(0.50, 0.76, 0.96), c.color(0.86, 0.94, 0.98), 0.6)
    hill = c.ridge(0.52, 0.035, 4)
    far = mix(far, c.color(0.42, 0.66, 0.36), c.below(hill))
    edge = c.ridge(0.63, 0.02, 3)
    grass = c.gradient(c.color(0.42, 0.74, 0.25), c.color(0.20, 0.52, 0.14)) + 0.035 * c.noise(24, 40, 2)
    grass = mix(grass, c.color(0.98, 0.92, 0.45, 0.06), c.stars(0.008) * c.below(edge + 0.06))
    return far, layer(grass, c.below(edge))


def desert(c: Canvas) -> tuple[Tensor, Tensor]:
    far = c.gradient(c.color(0.55, 0.78, 0.92), c.color(0.98, 0.90, 0.72), 0.6)
    far = mix(
        far,
        c.color(1.0, 0.95, 0.70, 0.02),
        c.disc(c.uniform(0.2, 1.0), c.uniform(0.12, 0.25), c.uniform(0.05, 0.07)),
    )
    far = mix(far, c.color(0.90, 0.72, 0.46), c.below(c.ridge(0.55, 0.04, 3, 1)))
    sand = c.gradient(c.color(0.90, 0.68, 0.38), c.color(0.76, 0.50, 0.24)) + 0.025 * c.noise(30, 5, 2)
    return far, layer(sand, c.below(c.ridge(0.68, 0.05, 3, 1)))


def sky(c: Canvas) -> tuple[Tensor, Tensor]:
    far = c.gradient(c.color(0.24, 0.52, 0.90), c.color(0.66, 0.84, 0.98))
    far = mix(far, c.color(0.95, 0.97, 1.0, 0.02), (0.7 * c.noise(4, 4) - 0.2).clamp(0, 0.75))
    puffs = (1.1 * c.noise(3, 4) - 0.7).clamp(0, 0.95)
    return far, layer(c.color(1.0, 1.0, 1.0, 0.02), puffs)


def space(c: Canvas) -> tuple[Tensor, Tensor]:
    far = c.gradient(c.color(0.02, 0.01, 0.06, 0.02), c.color(0.05, 0.03, 0.13, 0.03))
    tint = c.color(0.38, 0.12, 0.52, 0.12)
    far = far + tint * (0.5 * c.noise(3, 4) - 0.05).clamp(0, 0.8) + c.stars(0.016)
    cx, cy, radius = c.uniform(0.1, 1.2), c.uniform(0.1, 0.9), c.uniform(0.06, 0.12)
    planet = c.color(0.75, 0.52, 0.38, 0.15) * (0.55 + 0.45 * (c.y - cy + c.x - cx) / -radius).clamp(0.25, 1)
    far = mix(far, planet + 0 * far, c.disc(cx, cy, radius))
    return far, layer(c.color(1.0, 1.0, 1.0, 0.0), c.stars(0.004))


def snow(c: Canvas) -> tuple[Tensor, Tensor]:
    far = c.gradient(c.color(0.55, 0.68, 0.84), c.color(0.88, 0.92, 0.97), 0.7)
    peaks, phase = 2.4, c.uniform(0, 1)
    wave = (2 * ((c.x * peaks + phase) % 1.0) - 1).abs()
    crest = 0.28 + 0.34 * wave + 0.02 * (c.ridge(0.0, 1.0, 24, 1))
    rock = mix(
        c.color(0.40, 0.45, 0.56).expand(c.n, 3, c.height, c.width),
        torch.ones_like(far),
        1 - c.below(crest + 0.11),
    )
    far = mix(far, rock, c.below(crest))
    ground = c.gradient(c.color(0.97, 0.98, 1.0, 0.02), c.color(0.80, 0.87, 0.95)) + 0.012 * c.noise(12, 6, 2)
    return far, layer(ground, c.below(c.ridge(0.68, 0.03, 3)))


def night_city(c: Canvas) -> tuple[Tensor, Tensor]:
    far = c.gradient(c.color(0.05, 0.04, 0.15, 0.02), c.color(0.32, 0.18, 0.38), 0.8) + c.stars(0.004)

    def towers(columns: int, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        position = c.x * columns + c.uniform(0, 1)
        index = position.long().clamp(0, 63).expand(c.n, 1, 1, c.width)
        top = torch.gather(c.uniform(low, high, 1, 1, 64), 3, index)
        return position, index, top

    _, _, top = towers(9, 0.45, 0.75)
    far = mix(far, c.color(0.13, 0.10, 0.24), c.below(top))
    position, index, top = towers(6, 0.5, 0.9)
    rows = 26
    lit = c.uniform(0, 1, 1, rows + 1, 64 * 4)
    column = (position * 4).long().clamp(0, 64 * 4 - 1).expand(c.n, 1, c.height, c.width)
    row = (c.y * rows).long().expand(c.n, 1, c.height, c.width)
    cell = torch.gather(lit.flatten(2), 2, (row * (64 * 4) + column).flatten(2)).view(c.n, 1, c.height, c.width)
    pane = ((position * 4) % 1.0 > 0.35) & ((c.y * rows) % 1.0 > 0.4) & (cell > 0.55)
    shade = 0.75 + 0.5 * torch.gather(c.uniform(0, 1, 1, 1, 64), 3, index)
    tower = c.color(0.07, 0.06, 0.13, 0.02) * shade
    tower = mix(tower.expand(c.n, 3, c.height, c.width), c.color(1.0, 0.85, 0.45), 0.85 * pane.float())
    return far, layer(tower, c.below(top))


def forest(c: Canvas) -> tuple[Tensor, Tensor]:
    far = c.gradient(c.color(0.72, 0.86, 0.80), c.color(0.45, 0.66, 0.48), 0.9)

    def firs(count: float, top: float, span: float) -> Tensor:
        position = c.x * count + c.uniform(0, 1)
        index = position.long().clamp(0, 63).expand(c.n, 1, 1, c.width)
        height = torch.gather(c.uniform(0.6, 1.0, 1, 1, 64), 3, index)
        tooth = 1 - (2 * (position % 1.0) - 1).abs()
        return c.below(top + span - span * height * tooth * 1.5)

    far = mix(far, c.color(0.30, 0.54, 0.38), firs(7, 0.25, 0.55))
    far = mix(far, c.color(0.14, 0.38, 0.22), firs(4.5, 0.38, 0.55))
    ground = c.gradient(c.color(0.22, 0.42, 0.16), c.color(0.13, 0.28, 0.10)) + 0.03 * c.noise(24, 24, 2)
    return far, layer(ground, c.below(c.ridge(0.78, 0.02, 4)))


def sunset(c: Canvas) -> tuple[Tensor, Tensor]:
    far = c.gradient(c.color(0.34, 0.20, 0.48), c.color(0.98, 0.48, 0.28), 0.55)
    far = mix(far, c.color(1.0, 0.72, 0.32), ((c.y - 0.45) / 0.3).clamp(0, 1))
    cx, cy = c.uniform(0.35, 0.85), c.uniform(0.55, 0.68)
    far = far + 0.2 * c.glow(cx, cy, c.uniform(0.22, 0.26))
    far = mix(far, c.color(1.0, 0.90, 0.50, 0.03), c.disc(cx, cy, c.uniform(0.11, 0.15)))
    far = mix(far, c.color(0.75, 0.36, 0.40), (0.5 * c.noise(24, 3, 2) - 0.35).clamp(0, 0.6))
    return far, layer(c.color(0.16, 0.08, 0.16, 0.03), c.below(c.ridge(0.78, 0.035, 4)))


PAINTERS: tuple[Callable[[Canvas], tuple[Tensor, Tensor]], ...] = (
    night_sea, day_sea, meadow, desert, sky, space, snow, night_city, forest, sunset,
)  # fmt: skip
