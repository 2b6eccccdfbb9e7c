"""How sparse is the trained attention? Density of 64-token blocks that keeps 95 % of the attention mass.

For every self-attention layer, head and chosen step: the mass of each (query block, key block) pair under
the exact softmax; then, per query block, the fewest key blocks that hold 95 % of its mass. Blocks are runs
of 64 tokens, once in raster order (frame, row, column) and once in tile order (4 x 4 x 4 tokens of frames,
rows and columns).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from dit_accel.stages.order.simple import tile_order

BLOCK = 64
TILE = 4


def block_mass(query: torch.Tensor, key: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Attention mass of each block pair, rows sum to one.

    Args:
        query, key: [heads, tokens, head_dim].
        order: permutation of the tokens, or None for raster order.

    Returns:
        [heads, blocks, blocks] float32.
    """
    if order is not None:
        query, key = query[:, order], key[:, order]
    heads, tokens, dim = query.shape
    blocks = tokens // BLOCK
    mass = torch.empty(heads, blocks, blocks)
    rows = BLOCK * 8
    for start in range(0, tokens, rows):
        part = query[:, start : start + rows]
        scores = torch.softmax((part @ key.mT).float() * dim**-0.5, dim=-1)
        n = part.shape[1] // BLOCK
        mass[:, start // BLOCK : start // BLOCK + n] = scores.view(heads, n, BLOCK, blocks, BLOCK).sum((2, 4)) / BLOCK
    return mass


def density_keeping(mass: torch.Tensor, share: float = 0.95) -> torch.Tensor:
    """[heads]: mean over query blocks of the share of key blocks that hold `share` of the mass."""
    ordered = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    needed = (ordered < share).sum(-1) + 1
    return needed.clamp_max(mass.shape[-1]).float().mean(-1) / mass.shape[-1]


class Recorder:
    """Stands in for the attention processors and measures before it calls them."""

    def __init__(self, layer: int, processor: Any, records: list[dict[str, Any]], order: torch.Tensor) -> None:
        self.layer, self.processor, self.records, self.order = layer, processor, records, order
        self.step: int | None = None

    def __call__(self, attn: Any, hidden_states: Any, encoder: Any = None, mask: Any = None, rotary: Any = None) -> Any:
        if self.step is not None:
            query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
            pair = []
            for x in (query, key):
                x = x.unflatten(2, (attn.heads, -1)).float()
                x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
                cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
                x = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2)
                pair.append(x[0].transpose(0, 1).to(hidden_states.dtype))
            for name, order in (("raster", None), ("tile", self.order)):
                density = density_keeping(block_mass(*pair, order))
                self.records.append(
                    {"layer": self.layer, "step": self.step, "order": name, "density": density.tolist()}
                )
        return self.processor(attn, hidden_states, encoder, mask, rotary)


@torch.no_grad()
def measure(pipeline: WanPipeline, prompt: str, steps: int, measured: list[int], seed: int) -> list[dict[str, Any]]:
    """Generates one clip of 29 frames of 192 x 192 pixels and returns the densities at the measured steps."""
    records: list[dict[str, Any]] = []
    order = tile_order((8, 24, 24), (TILE, TILE, TILE), pipeline.device)
    recorders = []
    for layer, block in enumerate(pipeline.transformer.blocks):
        recorder = Recorder(layer, block.attn1.processor, records, order)
        block.attn1.processor = recorder
        recorders.append(recorder)

    def publish(index: int) -> None:
        for recorder in recorders:
            recorder.step = index if index in measured else None

    def after(_pipe: Any, index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        publish(index + 1)
        return values

    publish(0)
    pipeline(
        prompt, height=192, width=192, num_frames=29, num_inference_steps=steps, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed), output_type="latent", callback_on_step_end=after,
    )  # fmt: skip
    for block, recorder in zip(pipeline.transformer.blocks, recorders):
        block.attn1.processor = recorder.processor
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--prompt", default="a green dragon flying left over the sea at night")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--measured", type=int, nargs="+", default=[0, 3, 6, 9])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path("runs/attention_structure.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = WanPipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16).to(device)
    records = measure(pipeline, args.prompt, args.steps, args.measured, args.seed)
    table: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        table[record["order"]][record["layer"]].append(torch.tensor(record["density"]))
    print("| layer | " + " | ".join(f"{order}: head 0–3" for order in table) + " |")
    means = {order: {k: torch.stack(v).mean(0) for k, v in rows.items()} for order, rows in table.items()}
    for layer in means["raster"]:
        cells = [" ".join(f"{x:.2f}" for x in means[order][layer]) for order in means]
        print(f"| {layer} | " + " | ".join(cells) + " |")
    summary = {order: torch.stack(list(rows.values())).mean().item() for order, rows in means.items()}
    print("mean density for 95 % of the mass:", json.dumps(summary))
    args.report.write_text(json.dumps({"summary": summary, "records": records}))


if __name__ == "__main__":
    main()
