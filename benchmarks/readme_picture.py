"""The picture of the README: clips of the built-in model, dense, with the default recipe, and with the profile `fast`.

    python benchmarks/readme_picture.py [--out docs/images/dense_default_fast.webp]

Same prompts, same seeds. Each row says how near it is to the first one: the mean PSNR of its clips.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import dit_accel
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.generate import generate

PROMPTS = (
    "a big orange bus moving away over the sea",
    "three rockets standing still in a forest",
    "a ghost bouncing over the desert",
    "two yellow stars bouncing in space",
)
# The rows; the default recipe stays dense below a few thousand tokens by itself, and is named here.
RECIPES = {"dense": "dense", "patch(pipe), density 0.3": "mass", 'patch(pipe, "fast")': "fast"}
MARGIN = 22


def clips(recipe: str) -> list[np.ndarray]:
    """Frames uint8 [F, H, W, 3] of each prompt."""
    pipe = load("embedded")
    options = {"density": 0.3} if recipe == "mass" else {}
    settings = vars(builtins()["embedded"].settings)
    with dit_accel.patch(pipe, recipe, **options) as handle:
        made = [generate(pipe, prompt, seed=seed, **settings).frames for seed, prompt in enumerate(PROMPTS)]
        print(handle.summary(), flush=True)
    return made


def psnr(dense: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB: the mean over clips, uint8 [N, F, H, W, 3]."""
    error = np.square(dense.astype(float) - other.astype(float)).mean(axis=(1, 2, 3, 4))
    return float((10 * np.log10(255.0**2 / error)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/dense_default_fast.webp"))
    out = parser.parse_args().out
    rows = {label: clips(recipe) for label, recipe in RECIPES.items()}
    dense = np.stack(next(iter(rows.values())))
    font = ImageFont.load_default(15)
    frames, height, width = dense.shape[1:4]
    pages = []
    for frame in range(frames):
        page = Image.new("RGB", (width * len(PROMPTS), (height + MARGIN) * len(rows)), "white")
        for row, (label, made) in enumerate(rows.items()):
            top = row * (height + MARGIN)
            near = "" if row == 0 else f": {psnr(dense, np.stack(made)):.1f} dB PSNR to dense"
            ImageDraw.Draw(page).text((3, top + 2), label + near, fill="black", font=font)
            for column, clip in enumerate(made):
                page.paste(Image.fromarray(clip[frame]), (column * width, top + MARGIN))
        pages.append(page)
    pages[0].save(out, save_all=True, append_images=pages[1:], duration=1000 // 12, loop=0, quality=82, method=6)


if __name__ == "__main__":
    main()
