"""Renders batches of captioned clips on one device: sprite x colour x count x size x motion x background."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from backgrounds import PAINTERS, Canvas, grain
from captions import BACKGROUND_NAMES, MOTION_NAMES, SUBJECTS, Scene
from sprites import SPRITE_FRAMES, SpriteBank

SIZE_FACTORS = (0.33, 0.44, 0.60)
COUNT_FACTORS = (1.0, 0.74, 0.62)
# Fewer pixels than this and the autoencoder's latents, 8 pixels apart, keep no face (0.22 is 42 of 192 pixels).
SMALLEST = 0.22
# Larger copies than this do not fit beside each other.
LARGEST = (0.66, 0.42, 0.31)
SLOTS = 3
PAN = 0.3


@dataclass(frozen=True)
class ClipGeometry:
    """Frames, height and width of a clip in pixels, and the time in seconds between frames."""

    frames: int = 29
    height: int = 192
    width: int = 192
    period: float = 1 / 12

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the 4 x 8 x 8 autoencoder."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8


def _trajectory(
    motion: str, time: torch.Tensor, rng: random.Random, count: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre x, y (as offsets in frame heights) and scale over normalised `time` in [0, 1].

    Nothing moves by more than about 0.05 of the height (9 of 192 pixels) from one frame to the next: a latent
    frame of the autoencoder stands for four frames, and what is quicker dissolves in three of them.
    """
    zero, one = torch.zeros_like(time), torch.ones_like(time)
    # Several copies need the width of the picture for themselves.
    room = 1.0 if count == 1 else 0.65
    x, y = rng.uniform(-0.1, 0.1) * room + zero, rng.uniform(-0.08, 0.08) + zero
    reach = rng.uniform(0.24, 0.36) * room
    sweep = reach * (2 * time - 1)
    bob = 0.015 * torch.sin(2 * math.pi * (time * 2 + rng.random()))
    if motion == "left":
        return x * 0.3 - sweep, y + bob, one
    if motion == "right":
        return x * 0.3 + sweep, y + bob, one
    if motion == "up":
        return x + bob, y * 0.3 - sweep, one
    if motion == "down":
        return x + bob, y * 0.3 + sweep, one
    if motion in ("closer", "away"):
        near = rng.uniform(1.25, 1.4) * (1.0 if count == 1 else 0.85)
        return x, y, 0.55 + (near - 0.55) * (time if motion == "closer" else 1 - time)
    if motion == "circle":
        angle = 2 * math.pi * (time * rng.uniform(0.85, 1.0) + rng.random())
        radius = rng.uniform(0.15, 0.2) * (1.0 if count == 1 else 0.8)
        return x * 0.5 + radius * torch.cos(angle), y * 0.5 + radius * torch.sin(angle), one
    if motion == "bounce":
        hops = rng.choice((1.0, 1.25, 1.5))
        height = rng.uniform(0.22, 0.28)
        # |sin|, with the turn at the ground spread over a few frames.
        phase = math.pi * (time * hops + rng.random())
        return x, 0.14 - height * (torch.sin(phase).square() + 0.02).sqrt(), one
    return x, y, one


def _slots(count: int, extent: float, rng: random.Random) -> list[tuple[float, float]]:
    """Where each of `count` copies of size `extent` stands, as offsets from the trajectory: beside the others."""
    if count == 1:
        return [(0.0, 0.0)]
    if count == 2:
        tilt = rng.uniform(-0.06, 0.06)
        away = max(0.19, 0.51 * extent)
        return [(-away, tilt), (away, -tilt)]
    lift = rng.choice((-0.13, 0.13))
    away = max(0.25, 0.88 * extent)
    return [(-away, lift / 2), (0.0, -lift), (away, lift / 2)]


def latent_cover(cover: torch.Tensor) -> torch.Tensor:
    """`cover` [n, 1, t, h, w] at the latents' places: a latent frame stands for four frames, the first for one."""
    return F.max_pool3d(F.pad(F.max_pool3d(cover, (1, 8, 8)), (0, 0, 0, 0, 3, 0)), (4, 1, 1))


def subject_weight(cover: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """How much each place counts in a loss: 1 in the background, 1 + `least` to 1 + `most` on the subject.

    The smaller the subject of a clip, the more each of its places counts, or small ones would never be learnt.
    `cover` is [n, 1, t, h, w] in [0, 1]; the mean of the weights is one.
    """
    share = cover.mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-3)
    weight = 1 + (0.5 / share).clamp(least, most) * cover
    return weight / weight.mean()


@torch.no_grad()
def render_clips(
    scenes: Sequence[Scene],
    bank: SpriteBank,
    geometry: ClipGeometry,
    rng: random.Random,
    generator: torch.Generator,
    frames: int | None = None,
    moment: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders the scenes.

    Args:
        scenes: what to show, one per clip.
        bank: the sprites, on the device of `generator`.
        geometry: size of a whole clip; motion always spans the whole clip.
        rng: draws placement; `generator`: draws textures.
        frames: render only the first so many frames (all by default).
        moment: render one frame alone, of this place in the clip from 0 to 1.

    Returns:
        Clips [n, 3, frames, height, width] in [-1, 1], and how much of each pixel the subject covers,
        [n, 1, frames, height, width] in [0, 1].
    """
    device = generator.device
    n, height, width = len(scenes), geometry.height, geometry.width
    t = geometry.frames if frames is None else frames
    time = torch.arange(geometry.frames, dtype=torch.float32) / max(geometry.frames - 1, 1)
    time = time[:t] if moment is None else torch.tensor([moment])
    t = len(time)

    theta = torch.zeros(n, SLOTS, t, 2, 3)
    present = torch.zeros(n, SLOTS)
    variant = torch.zeros(n, dtype=torch.long)
    phase = torch.zeros(n, SLOTS, t, dtype=torch.long)
    pan = torch.zeros(n, t)
    aspect = width / height
    for i, scene in enumerate(scenes):
        subject = SUBJECTS[scene.subject]
        row = bank.variant[scene.subject]
        variant[i] = row[scene.color or 0]
        motion = MOTION_NAMES[scene.motion]
        x, y, scale = _trajectory(motion, time, rng, scene.count)
        # Whatever looks sideways looks where it goes.
        mirrored = subject.facing != 0 and subject.facing == {"left": 1, "right": -1}.get(motion, 0)
        usual = SIZE_FACTORS[scene.size] * COUNT_FACTORS[scene.count - 1] * rng.uniform(0.93, 1.07)
        usual = min(max(usual, SMALLEST), LARGEST[scene.count - 1])
        extent = usual * scale
        start = rng.randrange(SPRITE_FRAMES)
        for slot, (dx, dy) in enumerate(_slots(scene.count, usual, rng)):
            present[i, slot] = 1
            # grid_sample maps output coordinates to sprite coordinates: the inverse of placing the sprite.
            theta[i, slot, :, 0, 0] = (-1.0 if mirrored else 1.0) * aspect / extent
            theta[i, slot, :, 0, 2] = (-1.0 if mirrored else 1.0) * -2 * (x + dx * scale) / extent
            theta[i, slot, :, 1, 1] = 1 / extent
            theta[i, slot, :, 1, 2] = -2 * (y + dy * scale) / extent
            ticks = torch.arange(t) + start + slot * 11
            phase[i, slot] = ticks % SPRITE_FRAMES
        speed = rng.uniform(-1, 1) * PAN * (0.35 if motion not in ("left", "right") else 0.5)
        if motion == "left":
            speed = -abs(speed)
        elif motion == "right":
            speed = abs(speed)
        pan[i] = speed * (time - 0.5)

    clips = _backgrounds(scenes, pan, geometry, generator)
    cover = torch.zeros(n, 1, t, height, width, device=device)
    # Chosen on the CPU: asking the device how many there are would wait for everything queued there.
    chosen = [present[:, slot].nonzero().flatten() for slot in range(SLOTS)]
    theta, phase, variant = theta.to(device), phase.to(device), variant.to(device)
    for slot in range(SLOTS):
        active = chosen[slot].to(device)
        if active.numel() == 0:
            break
        sprite = bank.frames[variant[active].unsqueeze(1), phase[active, slot]].flatten(0, 1)
        grid = F.affine_grid(
            theta[active, slot].flatten(0, 1), [sprite.shape[0], 4, height, width], align_corners=False
        )
        drawn = F.grid_sample(sprite, grid.to(sprite.dtype) if sprite.is_cuda else grid, align_corners=False)
        drawn = drawn.view(active.numel(), t, 4, height, width).transpose(1, 2).to(clips.dtype)
        alpha = drawn[:, 3:]
        clips[active] = clips[active] * (1 - alpha) + drawn[:, :3]
        cover[active] = torch.maximum(cover[active], alpha)
    return clips.clamp_(0, 1) * 2 - 1, cover


def _backgrounds(
    scenes: Sequence[Scene], pan: torch.Tensor, geometry: ClipGeometry, generator: torch.Generator
) -> torch.Tensor:
    """Paints and pans the backgrounds: [n, 3, t, height, width] in [0, 1]."""
    device = generator.device
    n, t = pan.shape
    height, width = geometry.height, geometry.width
    canvas_width = width + int(PAN * height)
    clips = torch.empty(n, 3, t, height, width, device=device)
    columns = (torch.arange(width, device=device) + 0.5) / height
    middle = (canvas_width - width) / 2 / height
    for kind, painter in enumerate(PAINTERS):
        members = [i for i, scene in enumerate(scenes) if scene.background == kind]
        if not members:
            continue
        index = torch.tensor(members, device=device)
        canvas = Canvas(len(members), height, canvas_width, generator)
        far, near = painter(canvas)
        shift = pan[members].to(device)
        picture = _pan(far.clamp(0, 1), shift * 0.35, columns, middle)
        front = _pan(near.clamp(0, 1), shift, columns, middle)
        if BACKGROUND_NAMES[kind] in ("night sea", "sea"):
            front = _ripple(front, t)
        alpha = front[:, 3:]
        picture = picture * (1 - alpha) + front[:, :3] * alpha
        if BACKGROUND_NAMES[kind] == "snow":
            picture = _snowfall(picture, generator)
        clips[index] = picture
    return clips


def _pan(image: torch.Tensor, shift: torch.Tensor, columns: torch.Tensor, middle: float) -> torch.Tensor:
    """Slides a window over [n, c, h, wide] with sub-pixel steps: [n, c, t, h, w]."""
    n, _c, h, wide = image.shape
    position = (columns.view(1, 1, -1) + middle + shift.unsqueeze(2)) * h - 0.5
    position = position.clamp(0, wide - 1.001)
    left = position.floor().long()
    weight = (position - left).view(n, 1, shift.shape[1], 1, -1)
    batch = torch.arange(n, device=image.device).view(n, 1, 1)
    rows = image.permute(0, 3, 1, 2)  # [n, wide, c, h]
    a = rows[batch, left].permute(0, 3, 1, 4, 2)
    b = rows[batch, left + 1].permute(0, 3, 1, 4, 2)
    return torch.lerp(a, b, weight.expand_as(a))


def _ripple(front: torch.Tensor, t: int) -> torch.Tensor:
    """Lets the water shimmer: brightness bands that drift down the picture, stronger near the viewer."""
    height = front.shape[3]
    y = (torch.arange(height, device=front.device) / height).view(1, 1, 1, height, 1)
    time = torch.arange(t, device=front.device).view(1, 1, t, 1, 1) / 12
    band = torch.sin(2 * math.pi * (14 * y.sqrt() * 2 - 0.8 * time)) * (y - 0.45).clamp(0, 1)
    return torch.cat([front[:, :3] * (1 + 0.22 * band), front[:, 3:]], dim=1)


def _snowfall(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Falling flakes: one random field per clip, rolled down a few pixels per frame."""
    n, _, t, height, width = picture.shape
    cell = grain(height, 3, 110)
    points = torch.rand(n, 1, height // cell, width // cell, generator=generator, device=picture.device)
    flakes = F.interpolate((points > 0.988).float(), size=(height, width), mode="bilinear", align_corners=False)
    frames = torch.stack([torch.roll(flakes, shifts=(cell * k, -k), dims=(2, 3)) for k in range(t)], dim=2)
    return picture + (1 - picture) * frames * 0.85
