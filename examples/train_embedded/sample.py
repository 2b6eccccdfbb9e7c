"""Draws contact sheets of held-out prompts with a saved pipeline: clips, images, or edits of rendered images."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import (
    BACKGROUND_NAMES,
    COLOR_NAMES,
    MOTION_NAMES,
    SUBJECTS,
    Scene,
    caption,
    is_held_out,
    sample_scene,
)
from diffusers import WanPipeline
from image_task import EDITS, edited, render_edits
from PIL import Image, ImageDraw
from sprites import SpriteBank, load_sprites
from stages import Stage, parse_size

from dit_accel.pipelines.embedded_image import load_embedded_image
from dit_accel.pipelines.embedded_long import load_embedded_long

DRAGON = Scene(0, COLOR_NAMES.index("green"), BACKGROUND_NAMES.index("night sea"), MOTION_NAMES.index("left"))


def held_out_scenes(count: int, seed: int = 7) -> list[Scene]:
    """`count` held-out scenes, single subjects first, every one with another subject."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=True)
        fresh = scene.subject not in {s.subject for s in scenes[-(len(SUBJECTS) - 1) :]}
        if fresh and scene.motion not in {s.motion for s in scenes[-3:]}:
            scenes.append(scene)
    return scenes


def bouncing_scenes(count: int, seed: int = 8) -> list[Scene]:
    """`count` held-out scenes of the quickest motion."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=True)
        if MOTION_NAMES[scene.motion] == "bounce" and scene.subject not in {s.subject for s in scenes}:
            scenes.append(scene)
    return scenes


def load_pipeline(folder: Path, device: str) -> Any:
    """A saved pipeline, whose autoencoder is the embedded model's where it has none."""
    if (folder / "vae").is_dir():
        pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    else:
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
        pipeline = (load_embedded_long if kind == "WanPipeline" else load_embedded_image)(torch.bfloat16, folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def makes_images(pipeline: Any) -> bool:
    return not hasattr(pipeline, "transformer_2")


def generate(
    pipeline: Any,
    prompts: list[str],
    steps: int,
    guidance: float,
    frames: int,
    size: tuple[int, int],
    seed: int,
    images: torch.Tensor | None = None,
) -> np.ndarray:
    """Clips [n, frames, height, width, 3] in [0, 1]; clip i always starts from the noise of seed + i.

    Args:
        images: [n, 3, height, width] in [0, 1] to edit.
    """
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    further: dict[str, Any] = {"num_frames": frames}
    if makes_images(pipeline):
        further = {} if images is None else {"image": images, "_auto_resize": False}
    result = pipeline(
        prompt=prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
        **further,
    )
    return np.asarray(result.images)[:, None] if makes_images(pipeline) else np.asarray(result.frames)


def rendered_edits(
    count: int, size: tuple[int, int], sprites: Path, device: str, seed: int = 7
) -> tuple[torch.Tensor, list[Scene]]:
    """Pictures [count, 3, height, width] in [0, 1] to edit, and the held-out scenes that they are to become."""
    rng, textures = random.Random(seed), torch.Generator(device).manual_seed(seed)
    bank = SpriteBank(load_sprites(sprites), torch.device(device))
    scenes = [sample_scene(rng) for _ in range(count)]
    wanted = [edited(scene, EDITS[i % len(EDITS)], rng, held_out=True) for i, scene in enumerate(scenes)]
    stage = Stage(1, 1, 1, 1, 1.0, size=size)
    _, _, before = render_edits(scenes, wanted, bank, stage, size[0], rng, textures)
    return (before[:, :, 0] + 1) / 2, wanted


def contact_sheet(clips: np.ndarray, prompts: list[str], columns: int = 5, scale: float = 0.5) -> Image.Image:
    """One row of evenly spaced frames per clip with its prompt below, two clips side by side."""
    n, t, h, w, _ = clips.shape
    picks = [round(i * (t - 1) / max(columns - 1, 1)) for i in range(columns)] if t > 1 else [0]
    cell_h, cell_w = int(h * scale), int(w * scale)
    rows = (n + 1) // 2
    block = len(picks) * cell_w + 6
    sheet = Image.new("RGB", (2 * block, rows * (cell_h + 13)), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(n):
        x0, y0 = (i % 2) * block, (i // 2) * (cell_h + 13)
        for c, k in enumerate(picks):
            frame = Image.fromarray((clips[i, k] * 255).round().astype("uint8"))
            sheet.paste(frame.resize((cell_w, cell_h), Image.Resampling.LANCZOS), (x0 + c * cell_w, y0))
        draw.text((x0 + 2, y0 + cell_h), prompts[i], fill="black")
    return sheet


def every_frame_sheet(clips: np.ndarray, prompts: list[str], columns: int = 10, scale: float = 0.5) -> Image.Image:
    """All frames of every clip, `columns` a row, with its prompt below, two clips side by side."""
    n, t, h, w, _ = clips.shape
    cell_h, cell_w = int(h * scale), int(w * scale)
    block_h, block_w = -(-t // columns) * cell_h + 13, columns * cell_w + 6
    sheet = Image.new("RGB", (2 * block_w, (n + 1) // 2 * block_h), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(n):
        x0, y0 = (i % 2) * block_w, (i // 2) * block_h
        for k in range(t):
            frame = Image.fromarray((clips[i, k] * 255).round().astype("uint8"))
            place = (x0 + k % columns * cell_w, y0 + k // columns * cell_h)
            sheet.paste(frame.resize((cell_w, cell_h), Image.Resampling.LANCZOS), place)
        draw.text((x0 + 2, y0 + block_h - 13), prompts[i], fill="black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--bouncing", action="store_true", help="draw bouncing subjects, every frame of them")
    parser.add_argument("--edits", action="store_true", help="of an image model: edit rendered pictures")
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.zip"), help="for --edits")
    parser.add_argument("--sheet", type=Path, default=Path("runs/sheet.png"))
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="clips generated at once")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0])
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--size", type=parse_size, default=(192, 192))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=0.5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(args.pipeline, device)
    references = None
    if args.edits:
        references, scenes = rendered_edits(args.count, args.size, args.sprites, device)
    else:
        scenes = bouncing_scenes(args.count) if args.bouncing else [DRAGON, *held_out_scenes(args.count - 1)]
    prompts = [caption(scene, moving=not makes_images(pipeline)) for scene in scenes]
    # No sheet: --guidance without a number.
    for guidance in args.guidance:
        began = time.monotonic()
        clips = []
        for first in range(0, len(prompts), args.batch):
            part = slice(first, first + args.batch)
            given = None if references is None else references[part]
            seed = args.seed + first
            made = generate(pipeline, prompts[part], args.steps, guidance, args.frames, args.size, seed, given)
            if given is not None:  # each beside what it was made from
                made = np.concatenate([given.cpu().permute(0, 2, 3, 1).numpy()[:, None], made], axis=1)
            clips.append(made)
        draw = every_frame_sheet if args.bouncing else contact_sheet
        columns = {} if args.bouncing else {"columns": min(5, clips[0].shape[1])}
        sheet = draw(np.concatenate(clips), prompts, scale=args.scale, **columns)
        target = args.sheet.with_stem(f"{args.sheet.stem}-g{guidance:g}-f{args.frames}")
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(target)
        held = [is_held_out(s.subject, s.background, s.motion) for s in scenes]
        print(
            f"{target}: {len(prompts)} clips in {time.monotonic() - began:.1f} s, held out {sum(held)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
