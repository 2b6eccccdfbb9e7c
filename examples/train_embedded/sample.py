"""Saves the stock pipeline from averaged weights and draws contact sheets of held-out prompts."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from pathlib import Path

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
from checkpoint import load_tensors
from diffusers import AutoencoderKLWan, WanPipeline
from model import assemble, build_text_encoder, build_transformer
from PIL import Image, ImageDraw

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


def export_pipeline(ema: Path, vae: Path, out: Path, layers: int, heads: int, head_dim: int) -> None:
    """Writes the pipeline folder in bfloat16 with `save_pretrained`."""
    trained = load_tensors(ema, "ema")
    transformer = build_transformer(layers, heads, head_dim)
    text_encoder = build_text_encoder()
    transformer.load_state_dict({k[12:]: v for k, v in trained.items() if k.startswith("transformer.")}, strict=True)
    missing = text_encoder.load_state_dict(
        {k[13:]: v for k, v in trained.items() if k.startswith("text_encoder.")}, strict=False
    )
    # The input embedding is stored once and tied to a second name.
    if set(missing.missing_keys) - {"encoder.embed_tokens.weight", "shared.weight"} or missing.unexpected_keys:
        raise RuntimeError(f"text encoder weights do not fit: {missing}")
    text_encoder.tie_weights()
    autoencoder = AutoencoderKLWan.from_pretrained(vae, torch_dtype=torch.float32)
    pipeline = assemble(transformer.to(torch.bfloat16), text_encoder.to(torch.bfloat16), autoencoder.to(torch.bfloat16))
    pipeline.save_pretrained(out, safe_serialization=True)
    # transformers 5 writes a new name for its fast tokenizer; the old one is understood by 4.57 as well.
    for file in (out / "model_index.json", out / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    # Where the autoencoder was read from is nobody's business.
    config = out / "vae" / "config.json"
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    files = sorted(f for f in out.rglob("*") if f.is_file() and f.name != "checksums.json")
    digests = {f.relative_to(out).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    (out / "checksums.json").write_text(json.dumps(digests, indent=2) + "\n")


def generate(
    pipeline: WanPipeline, prompts: list[str], steps: int, guidance: float, frames: int, size: int, seed: int
) -> np.ndarray:
    """Clips [n, frames, size, size, 3] in [0, 1]; clip i always starts from the noise of seed + i."""
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    result = pipeline(
        prompts,
        height=size,
        width=size,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    )
    return np.asarray(result.frames)


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
    parser.add_argument("--ema", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--saved", action="store_true", help="draw a pipeline that is already there: export nothing")
    parser.add_argument("--bouncing", action="store_true", help="draw bouncing subjects, every frame of them")
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae"))
    parser.add_argument("--pipeline", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--sheet", type=Path, default=Path("runs/sheet.png"))
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0])
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--scale", type=float, default=0.5)
    args = parser.parse_args()
    if not args.saved:
        export_pipeline(args.ema, args.vae, args.pipeline, args.layers, args.heads, args.head_dim)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = WanPipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    scenes = bouncing_scenes(args.count) if args.bouncing else [DRAGON, *held_out_scenes(args.count - 1)]
    prompts = [caption(scene) for scene in scenes]
    # No sheet: --guidance without a number.
    for guidance in args.guidance:
        began = time.monotonic()
        clips = generate(pipeline, prompts, args.steps, guidance, args.frames, args.size, args.seed)
        draw = every_frame_sheet if args.bouncing else contact_sheet
        sheet = draw(clips, prompts, scale=args.scale)
        target = args.sheet.with_stem(f"{args.sheet.stem}-g{guidance:g}-f{args.frames}")
        sheet.save(target)
        held = [is_held_out(s.subject, s.background, s.motion) for s in scenes]
        print(
            f"{target}: {len(prompts)} clips in {time.monotonic() - began:.1f} s, held out {sum(held)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
