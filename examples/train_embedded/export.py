"""Puts a stock pipeline together from averaged weights, in bfloat16, with the checksums of its files."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_tensors
from diffusers import AutoencoderKLWan
from image_model import assemble_image, build_image_transformer, build_pooled_encoder
from model import TIME_SHIFT, assemble, build_text_encoder, build_transformer
from torch import nn
from trainer import LOG

# What a log without `built` was trained with.
FIRST = {"task": "video", "layers": 8, "heads": 4, "head_dim": 64, "patch": 1, "time_shift": TIME_SHIFT}


def filled(network: nn.Module, trained: dict[str, torch.Tensor], part: str) -> nn.Module:
    """The network with its averaged weights, in bfloat16.

    Raises:
        RuntimeError: names that do not fit.
    """
    own = {name.removeprefix(f"{part}."): value for name, value in trained.items() if name.startswith(f"{part}.")}
    found = network.load_state_dict(own, strict=False)
    # An embedding that has two names is stored once.
    tied = {name for name in found.missing_keys if name in ("encoder.embed_tokens.weight", "shared.weight")}
    buffers = {name for name, _ in network.named_buffers()}
    if set(found.missing_keys) - tied - buffers or found.unexpected_keys:
        raise RuntimeError(f"weights of {part} do not fit: {found}")
    if tied:
        network.tie_weights()
    return network.to(torch.bfloat16)


def put_together(ema: Path, vae: Path | None) -> Any:
    """The stock pipeline of a run; without an autoencoder where it comes from elsewhere."""
    trained, built = load_tensors(ema, "ema"), FIRST | json.loads((ema / LOG).read_text()).get("built", {})
    text_encoder: Any = filled(build_text_encoder(), trained, "text_encoder")
    autoencoder: Any = None
    if vae is not None:
        autoencoder = AutoencoderKLWan.from_pretrained(vae, torch_dtype=torch.float32).to(torch.bfloat16)
    if built["task"] == "image":
        image = build_image_transformer(built["layers"], built["single_layers"], built["heads"])
        pooled = filled(build_pooled_encoder(), trained, "pooled_encoder")
        parts = (filled(image, trained, "transformer"), pooled, text_encoder)
        return assemble_image(*parts, vae=autoencoder, shift=built["time_shift"])
    video = build_transformer(built["layers"], built["heads"], built["head_dim"], built["patch"])
    return assemble(filled(video, trained, "transformer"), text_encoder, autoencoder, built["time_shift"])


def write(pipeline: Any, out: Path) -> None:
    """Writes the folder with `save_pretrained`, and the checksums that loading compares."""
    pipeline.save_pretrained(out, safe_serialization=True)
    # transformers 5 writes a new name for its fast tokenizer; the old one is understood by 4.57 as well.
    for file in (out / "model_index.json", *out.glob("tokenizer*/tokenizer_config.json")):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    # Where a part was read from is nobody's business.
    for config in out.glob("*/config.json"):
        values = json.loads(config.read_text())
        if values.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    files = sorted(f for f in out.rglob("*") if f.is_file() and f.name != "checksums.json")
    digests = {f.relative_to(out).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    (out / "checksums.json").write_text(json.dumps(digests, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ema", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--vae", type=Path, help="autoencoder to put in; none where it is that of `embedded`")
    parser.add_argument("--out", type=Path, default=Path("runs/pipeline"))
    args = parser.parse_args()
    write(put_together(args.ema, args.vae), args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
