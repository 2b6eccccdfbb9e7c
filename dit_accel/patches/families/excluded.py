"""Why diffusers' other transformers are of no family: a sentence for each class."""

from __future__ import annotations

from collections.abc import Mapping

_LINEAR = "Its self-attention is linear already."
_NO_GRID = "Its tokens are no grid of latents."
_UNET = "It is a block of a U-Net, whose sequences are short."

EXCLUDED: Mapping[str, str] = {
    # sparse or linear already, or under masks of their own
    "Kandinsky6SRTransformer3DModel": "Its self-attention is sparse already: sliding tiles and NABLA.",
    "AnyFlowFARTransformer3DModel": "It attends to chunks in a cache of keys, under block masks of its own.",
    "WanAnimate2Transformer3DModel": "It attends to packed keys of its references, under a block mask of its own.",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": "Three of four layers attend linearly, and the fourth by code of its own.",
    "SanaWMLTX2RefinerTransformer3DModel": "It is given neither the size of its latents nor the places of its tokens.",
    # too short to gain
    "DiTTransformer2DModel": "An image is 256 to 1,024 tokens, too few to gain.",
    "LatteTransformer3DModel": "It attends within frames of 1,024 tokens and over time apart, too few to gain.",
    "LuminaNextDiT2DModel": "Lumina-Next's images are 4,096 tokens with the rest in cross-attention, too few to gain.",
    "DreamLiteTransformer2DModel": _UNET,
    "Transformer2DModel": _UNET,
    "TransformerTemporalModel": _UNET,
    # no image and no video
    "AceStepTransformer1DModel": _NO_GRID,
    "LongCatAudioDiTTransformer": _NO_GRID,
    "MiniMaxMusic3RVQDepthDecoder": _NO_GRID,
    "MiniMaxMusic3Transformer1DModel": _NO_GRID,
    "PriorTransformer": _NO_GRID,
    "RFD4ProteinaTransformer": _NO_GRID,
    "StableAudio3DiTModel": _NO_GRID,
    "StableAudioDiTModel": _NO_GRID,
    "T5FilmDecoder": _NO_GRID,
}
