"""The picture of the README: clips of the built-in model, dense, with the default recipe, and with the profile `fast`.

    python benchmarks/readme_picture.py [--steps 30] [--parts outputs/readme_picture]

A row is of one prompt and seed. Each column says how near it is to the first one, the mean PSNR of its clips, and how
long one of them took: seconds of one processor core, text encoder and decoding included. They are of the process
itself, so that other work on the machine moves them little; the columns take turns at each prompt. Clips in the
folder of parts are not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import dit_accel
from dit_accel import presets
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.generate import generate

PROMPTS = (
    "a big orange bus moving away over the sea",
    "three rockets standing still in a forest",
    "a ghost bouncing over the desert",
    "two yellow stars bouncing in space",
)
# The columns; the default recipe stays dense below a few thousand tokens by itself, and is named here.
RECIPES = {"dense": "dense", "patch(pipe)": "auto", 'patch(pipe, "fast")': "fast"}
MARGIN = 44


def kept(part: Path, make: Callable[[], tuple[np.ndarray, float]]) -> tuple[np.ndarray, float]:
    """What an earlier run left in the file, or what is made now, and left there."""
    if not part.exists():
        frames, seconds = make()
        np.savez(part, frames=frames, seconds=seconds)
    with np.load(part) as found:
        return found["frames"], float(found["seconds"])


def clip(pipe: Any, recipe: str, prompt: str, seed: int, settings: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Frames uint8 [F, H, W, 3], and the seconds of one core that they took."""
    chosen = presets.automatic() if recipe == "auto" else presets.resolve(recipe)
    with dit_accel.patch(pipe, chosen) as handle:
        start = time.process_time()
        frames = generate(pipe, prompt, seed=seed, **settings).frames
        seconds = time.process_time() - start
        print(f"{prompt}, {recipe}: {seconds:.1f} s\n{handle.summary()}", flush=True)
    return frames, seconds


def psnr(dense: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB: the mean over clips, uint8 [N, F, H, W, 3]."""
    error = np.square(dense.astype(float) - other.astype(float)).mean(axis=(1, 2, 3, 4))
    return float((10 * np.log10(255.0**2 / error)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--count", type=int, default=len(PROMPTS), help="the first prompts only")
    parser.add_argument("--parts", type=Path, default=Path("outputs/readme_picture"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/dense_default_fast.webp"))
    asked = parser.parse_args()
    asked.parts.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pipe = load("embedded")
    settings = vars(builtins()["embedded"].settings) | {"steps": asked.steps}
    generate(pipe, PROMPTS[0], **settings | {"steps": 1})  # what only a first run does
    columns: dict[str, list[tuple[np.ndarray, float]]] = {label: [] for label in RECIPES}
    for seed, prompt in enumerate(PROMPTS[: asked.count]):
        for label, recipe in RECIPES.items():
            made = partial(clip, pipe, recipe, prompt, seed, settings)
            columns[label].append(kept(asked.parts / f"{asked.steps}-{seed}-{recipe}.npz", made))
    dense = np.stack([frames for frames, _ in next(iter(columns.values()))])
    font = ImageFont.load_default(15)
    prompts, frames, height, width = dense.shape[:4]
    pages = [Image.new("RGB", (width * len(columns), MARGIN + height * prompts), "white") for _ in range(frames)]
    for place, (label, made) in enumerate(columns.items()):
        text = f"{label}\n{np.mean([seconds for _, seconds in made]):.0f} s"
        if place:
            text += f", {psnr(dense, np.stack([one for one, _ in made])):.1f} dB to dense"
        print(text, flush=True)
        for frame, page in enumerate(pages):
            ImageDraw.Draw(page).text((place * width + 4, 3), text, fill="black", font=font)
            for row, (one, _) in enumerate(made):
                page.paste(Image.fromarray(one[frame]), (place * width, MARGIN + row * height))
    pages[0].save(asked.out, save_all=True, append_images=pages[1:], duration=1000 // 12, loop=0, quality=82, method=6)


if __name__ == "__main__":
    main()
