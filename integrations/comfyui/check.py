"""Tries the nodes on ComfyUI's own models: tiny, with random weights, sampled on the CPU.

    python integrations/comfyui/check.py /path/to/ComfyUI

Needs an environment with ComfyUI's requirements and dit_accel. Starts no server. Prints one line a model and exits with
1 if anything is not as it must be.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 5


def load_nodes() -> Any:
    """The node package, as ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location(
        "dit_accel_comfyui", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dit_accel_comfyui"] = module
    spec.loader.exec_module(module)
    return module


def known_to(parameters: type, **values: Any) -> dict[str, Any]:
    """Those of the values that this version's parameters of a model have."""
    return {name: value for name, value in values.items() if name in parameters.__annotations__}


def main(comfyui: str) -> int:
    sys.path.insert(0, comfyui)
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_patcher
    import comfy.samplers
    import comfy.supported_models as known
    import torch
    from comfy.ldm.flux.model import FluxParams
    from comfy.ldm.hunyuan_video.model import HunyuanVideoParams
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    rope = {"axes_dim": [8, 12, 12], "theta": 256, "qkv_bias": True, "mlp_ratio": 2.0}
    flux = {"vec_in_dim": 16, "context_in_dim": 16, "hidden_size": 64, "num_heads": 2, "depth": 1} | rope
    size = {"depth_single_blocks": 2, "guidance_embed": True, "out_channels": 16}
    wan = {"image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 64, "num_heads": 2, "num_layers": 3}
    ltx = {"image_model": "ltxv", "attention_head_dim": 32, "num_attention_heads": 2, "num_layers": 3}
    cases = {
        "Wan": (known.WAN21_T2V, wan | {"text_dim": 16, "freq_dim": 32}, (1, 16, 3, 30, 34), 3),
        "HunyuanVideo": (
            known.HunyuanVideo,
            flux
            | size
            | {"image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2]}
            | known_to(HunyuanVideoParams, byt5=False, meanflow=False, meanflow_sum=False)
            | known_to(HunyuanVideoParams, use_cond_type_embedding=False, vision_in_dim=None),
            (1, 16, 3, 30, 34),
            3,
        ),
        "LTX": (
            known.LTXV,
            ltx | {"cross_attention_dim": 64, "caption_channels": 16, "in_channels": 128},
            (1, 128, 3, 15, 17),
            3,
        ),
        "Flux": (
            known.Flux,
            flux
            | size
            | {"image_model": "flux", "in_channels": 16, "patch_size": 2}
            | known_to(FluxParams, txt_ids_dims=[]),
            (1, 16, 50, 54),
            3,
        ),
    }
    nodes = load_nodes()
    failed = False
    for name, (kind, config, shape, layers) in cases.items():
        torch.manual_seed(0)
        settings = kind(config)
        settings.set_inference_dtype(torch.float32, None)
        base = settings.get_model({}, "", device="cpu").eval()
        for parameter in base.parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
        model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
        prompts = [[[torch.randn(1, 9, 16), {"pooled_output": torch.randn(1, 16), "guidance": 3.5}]] for _ in range(2)]
        if name in ("HunyuanVideo", "LTX"):
            for (prompt,) in prompts:
                prompt[1]["attention_mask"] = torch.tensor([[1] * 7 + [0] * 2])
        noise = torch.randn(shape)
        distilled = "guidance_embed" in config

        def sample(patcher: Any, noise: Any = noise, prompts: Any = prompts, distilled: bool = distilled) -> Any:
            guider = comfy.samplers.CFGGuider(patcher)
            guider.set_conds(*prompts)
            guider.set_cfg(1.0 if distilled else 3.0)
            sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
            with torch.inference_mode():
                latent = torch.zeros_like(noise)
                return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)

        dense = sample(model)
        node = nodes.NODE_CLASS_MAPPINGS["DitAccelPatchModel"]()
        summarise = nodes.NODE_CLASS_MAPPINGS["DitAccelSummary"]()
        (full,) = node.patch(model, "mass", 1.0, 0.2)
        (sparse,) = node.patch(model, "mass", 0.3, 0.2)
        compiled = sparse.clone()
        set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model"])
        (back,) = nodes.NODE_CLASS_MAPPINGS["DitAccelUnpatchModel"]().unpatch(sparse)
        scale = float(dense.double().std())
        at_full = float((sample(full) - dense).double().pow(2).mean().sqrt()) / scale
        eager = sample(sparse)
        in_eager = nodes.nodes._patch_of(sparse).summary().sparse_calls
        compiled_differs = float((sample(compiled) - eager).abs().max())
        at_part = float((eager - dense).double().pow(2).mean().sqrt()) / scale
        (text,) = summarise.summarise(sparse, None)["result"]
        ran = nodes.nodes._patch_of(sparse).summary()
        forwards = ran.sparse_calls + sum(ran.dense_calls.values())
        checks = {
            # The compiler may reorder what attention is given.
            "compiled is alike": compiled_differs <= 1e-4 * scale and ran.sparse_calls == in_eager,
            "full density is dense": at_full < 1e-4,
            "sparse differs": at_full < at_part < 1.0,
            "unpatched is dense": bool((sample(back) == dense).all()),
            "the model itself is dense": bool((sample(model) == dense).all()),
            # Without guidance so few steps have no dense one.
            "sparse in its steps": ran.sparse_calls * STEPS == (STEPS if distilled else STEPS - 1) * forwards,
            "each layer once a forward": len(ran.layers) == layers and forwards % (layers * STEPS) == 0,
            "no hook is left": not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules()),
        }
        bad = [check for check, holds in checks.items() if not holds]
        failed |= bool(bad)
        print(f"{name}: error {at_full:.1e} at density 1, {at_part:.1e} at {ran.density:.2f}; {'; '.join(bad) or 'ok'}")
        if bad:
            print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
