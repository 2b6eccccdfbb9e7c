"""Names of weights in published checkpoints of Wan, as diffusers' transformer has them.

The tables are facts of public repositories: Wan's own names as in github.com/Wan-Video/Wan2.1 and, with ``net.`` before
them, in github.com/NVlabs/rcm and github.com/thu-ml/TurboDiffusion; FastVideo's as in
``fastvideo/configs/models/dits/wanvideo.py`` of github.com/hao-ai-lab/FastVideo; prefixes of LoRAs as in
``lightx2v/utils/lora_loader.py`` of github.com/ModelTC/LightX2V.
"""

from __future__ import annotations

import re

PREFIXES = (
    "net.",
    "module.",
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "model.",
)

_IN_BLOCK = {
    # Wan's own
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
    # FastVideo's
    "to_q": "attn1.to_q",
    "to_k": "attn1.to_k",
    "to_v": "attn1.to_v",
    "to_out": "attn1.to_out.0",
    "norm_q": "attn1.norm_q",
    "norm_k": "attn1.norm_k",
    "to_gate_compress": "attn1.to_gate_compress",
    "ffn.fc_in": "ffn.net.0.proj",
    "ffn.fc_out": "ffn.net.2",
    "self_attn_residual_norm.norm": "norm2",
}
_IN_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "to_out": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
_OUTSIDE = {
    # Wan's own
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    # FastVideo's
    "patch_embedding.proj": "patch_embedding",
    "condition_embedder.text_embedder.fc_in": "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.fc_out": "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_embedder.mlp.fc_in": "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.mlp.fc_out": "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_modulation.linear": "condition_embedder.time_proj",
}
_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")
# A module that wraps the attention's arithmetic, and holds parameters of a compensation.
_INNER = re.compile(r"^(attn\d?)\.(?:.*\.)?(proj_l)$")


def without_prefix(name: str) -> str:
    """A name without what a trainer put before it."""
    found = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name if found is None else without_prefix(name.removeprefix(found))


def diffusers_path(path: str) -> str:
    """The path of a module or bare parameter of Wan, given by its published name without prefix, in diffusers.

    A name of no table comes back as it is: diffusers' own, and those of other families.
    """
    block = _BLOCK.fullmatch(path)
    if block is None:
        return _OUTSIDE.get(path, path)
    number, rest = block.groups()
    head, _, tail = rest.partition(".")
    if head in ("self_attn", "cross_attn", "attn1", "attn2") and tail:
        rest = f"{_IN_BLOCK.get(head, head)}.{_IN_ATTENTION.get(tail, tail)}"
        inner = _INNER.match(rest)
        return f"{number}.{rest}" if inner is None else f"{number}.{inner[1]}.{inner[2]}"
    return f"{number}.{_IN_BLOCK.get(rest, rest)}"
