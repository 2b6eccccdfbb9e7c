"""What decoding takes under each setting of ``--vae``: seconds on this machine, or launches, bytes and memory by count.

    python benchmarks/decoding.py wan2.1 --settings frames=4 channels_last,bf16,frames=4
    python benchmarks/decoding.py hunyuanvideo --size 1280x720 --frames 129 --dtype float16 --settings tile=512
    python benchmarks/decoding.py wan2.1 --count --settings frames=4
    python benchmarks/decoding.py embedded --dtype bfloat16 --settings channels_last,frames=4 --profile [--by-trial]

Weights are random. HunyuanVideo decodes in tiles, as users let it. Counted are the operations that torch dispatches,
views aside, the tensors that they read and write, and those that live together, on the meta device.
"""

from __future__ import annotations

import argparse
import json
import time
import weakref
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.video_processor import VideoProcessor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.acceleration.decoding import set_vae
from dit_accel.pipelines.pixels import pixels_of

PATCHED = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
# Configs of diffusers' classes; the built-in one has no trained weights here either.
AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan2.1": ("AutoencoderKLWan", {}),
    "wan2.2": (
        "AutoencoderKLWan",
        {**PATCHED, "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "scale_factor_spatial": 16},
    ),
    "embedded": (
        "AutoencoderKLWan",
        {
            **PATCHED,
            "base_dim": 32,
            "decoder_base_dim": 40,
            "dim_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
        },
    ),
    "hunyuanvideo": ("AutoencoderKLHunyuanVideo", {}),
}
VIEWS = {
    "view",
    "permute",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "expand",
    "transpose",
    "_unsafe_view",
    "split",
    "split_with_sizes",
    "alias",
    "detach",
    "t",
}


class Counted(TorchDispatchMode):
    """Launches, bytes read and written, products in convolutions, and the most bytes that live together."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved = self.products = self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        results = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        for each in results:
            storage = each.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, size)
        name = operation.overloadpacket.__name__
        if name not in VIEWS:
            self.launches[name] += 1
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            self.moved += sum(each.numel() * each.element_size() for each in given + results)
            if name == "convolution":
                self.products += made.numel() * args[1][0].numel()
        return made

    def _freed(self, size: int) -> None:
        self.live -= size

    def report(self) -> dict[str, Any]:
        return {
            "launches": self.launches.total(),
            "gigabytes": round(self.moved / 1e9),
            "tflop": round(2 * self.products / 1e12, 1),
            "peak_gigabytes": round(self.peak / 1e9, 1),
        }


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    kind, settings = AUTOENCODERS[name]
    channels = settings.get("z_dim", 16)
    if kind == "AutoencoderKLWan":
        settings = {**settings, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    torch.manual_seed(0)
    with torch.device(device):
        vae = getattr(diffusers, kind)(**settings)
    if name == "hunyuanvideo":
        vae.enable_tiling()
    return vae.to(dtype).eval().requires_grad_(False)


def timed(vae: Any, latents: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of decoding, of 8-bit frames on the host, and of what diffusers' "np" would take in their place."""
    processor = VideoProcessor()
    found: dict[str, list[float]] = {"decode": [], "to 8 bits": [], "np": []}
    for _ in range(1 + repeats):
        begin = now()
        sample = vae.decode(latents).sample
        decoded = now()
        pixels_of(SimpleNamespace(frames=processor.postprocess_video(sample, "pt")), channels_first=True)
        levels = now()
        processor.postprocess_video(sample, "np")
        for name, seconds in zip(found, (decoded - begin, levels - decoded, now() - levels), strict=True):
            found[name].append(round(seconds, 4))
    return {name: seconds[1:] for name, seconds in found.items()}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("autoencoder", choices=AUTOENCODERS)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--settings", nargs="*", default=[], help="of --vae; as it is comes first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", action="store_true", help="count on the meta device, and time nothing")
    parser.add_argument("--profile", action="store_true", help="how long the GPU waits, and its longest kernels")
    parser.add_argument("--by-trial", action="store_true", help="let cuDNN choose its convolutions by trying them")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = args.by_trial
    device = "meta" if args.count else "cuda" if torch.cuda.is_available() else "cpu"
    vae = build(args.autoencoder, device, getattr(torch, args.dtype))
    width, height = (int(side) // vae.spatial_compression_ratio for side in args.size.split("x"))
    channels = getattr(vae.config, "z_dim", None) or vae.config.latent_channels
    latents = torch.randn(1, channels, (args.frames - 1) // 4 + 1, height, width, device=device, dtype=vae.dtype)
    for settings in ("", *args.settings):
        undo = set_vae(SimpleNamespace(vae=vae), settings)[0] if settings else lambda: None
        if args.count:
            with torch.no_grad(), Counted() as counted:
                vae.decode(latents)
            found: dict[str, Any] = counted.report()
        else:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                found = timed(vae, latents, args.repeats)
            if device == "cuda":
                found["peak_gigabytes"] = [round(torch.cuda.max_memory_allocated() / 1e9, 1)]
            if args.profile and device == "cuda":
                from gpu_idle import measured  # of the folder that a script runs in

                with torch.no_grad():
                    found |= measured(partial(vae.decode, latents), 1)
        undo()
        print(settings or "as it is", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
