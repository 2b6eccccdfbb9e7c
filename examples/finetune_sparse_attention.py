"""Fine-tune a video model under sparse-linear attention (SLA) at 5% density, and use the result.

    python examples/finetune_sparse_attention.py --model embedded --steps 500
    accelerate launch examples/finetune_sparse_attention.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

The dense model makes its own training data, so nothing has to be collected, and it is also the teacher: the same
weights with the patch switched off.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import PartialState

import dit_accel
from dit_accel.pipelines import load
from dit_accel.pipelines.generate import generate, save
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.data import generate_samples
from dit_accel.training.finetune import finetune
from dit_accel.training.objective import Objective
from dit_accel.training.samples import LatentFolder

PROMPTS = ["a red fish bouncing over the sea", "a tiger flying left at night", "a small rocket over the desert"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model under SLA.")
    parser.add_argument("--model", default="embedded", help="built-in model, folder, or hub id")
    parser.add_argument("--recipe", default="sla", help="a preset: sla, sparge2, clear, ssa, ...")
    parser.add_argument("--density", type=float, default=0.05, help="kept share of the blocks")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--samples", type=int, default=32, help="clips that the dense model makes")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--height", type=int, default=192)
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--denoising-steps", type=int, default=10)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("outputs/finetune_sparse_attention"))
    arguments = parser.parse_args()

    state = PartialState(cpu=not torch.cuda.is_available())
    on_gpu = state.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    pipe = load(arguments.model, dtype=dtype, device=state.device)
    size = {"width": arguments.width, "height": arguments.height}

    with state.main_process_first():
        generate_samples(
            pipe,
            [PROMPTS[i % len(PROMPTS)] for i in range(arguments.samples)],
            arguments.out / "samples",
            settings={**size, "num_frames": arguments.frames, "num_inference_steps": arguments.denoising_steps},
        )

    result = finetune(
        pipe,
        dit_accel.presets.resolve(arguments.recipe, density=arguments.density),
        LatentFolder(arguments.out / "samples"),
        arguments.out,
        FinetuneConfig(
            steps=arguments.steps,
            learning_rate=1e-4,
            lora_rank=arguments.lora_rank,
            objective=Objective(flow=1.0, velocity=1.0),
            density_start=0.5,
            density_steps=arguments.steps // 4,
            precision="bf16" if on_gpu else "no",
            gradient_checkpointing=on_gpu,
            checkpoint_every=100,
            evaluate_every=50,
        ),
        resume=True,
    )
    if not state.is_main_process:
        return
    first, last = result.curves.evaluations[0], result.curves.evaluations[-1]
    print(f"velocity error against dense: {first['velocity_error']:.3f} before, {last['velocity_error']:.3f} after")

    # What somebody else does with the adapter.
    fresh = load(arguments.model, dtype=dtype, device=state.device)
    handle = dit_accel.load_adapter(fresh, result.adapter)
    clip = generate(fresh, PROMPTS[0], **size, frames=arguments.frames, steps=arguments.denoising_steps)
    print(save(clip, arguments.out / "clip"), handle.summary())


if __name__ == "__main__":
    main()
