"""The nodes of ComfyUI on a small fake of what they meet; integrations/comfyui/check.py runs them on the real one."""

from __future__ import annotations

import json

import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.layout import LatentGrid, TokenLayout
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.integrations.comfy_fake import (
    HEADS,
    PACKAGE,
    WIDTH,
    Flux,
    Guider,
    HunyuanVideo,
    LTXVModel,
    Patcher,
    WanModel,
    load_nodes,
)
from tests.stages.oracle import masked_attention, window_tokens

COMFY = load_nodes()
PATCH = COMFY.NODE_CLASS_MAPPINGS["DitAccelPatchModel"]()
UNPATCH = COMFY.NODE_CLASS_MAPPINGS["DitAccelUnpatchModel"]()
SUMMARY = COMFY.NODE_CLASS_MAPPINGS["DitAccelSummary"]()
SIGMAS = [1.0, 0.8, 0.6, 0.3, 0.0]
REACH = (2, 3, 5)
WINDOW = Recipe(order=Tiles((2, 4, 4)), select=Window(window=REACH, block=(32, 32)))
POOLED = Recipe(
    order=Tiles((2, 4, 4)), select=Pooled(density=0.3, block=(32, 32)), schedule=Schedule(dense_fraction=0.2)
)


def _saved(recipe: Recipe, tmp_path) -> str:
    recipe.save(tmp_path / "recipe.json")
    return str(tmp_path / "recipe.json")


def _patched(model, recipe: Recipe, tmp_path, patcher: Patcher | None = None) -> Patcher:
    (found,) = PATCH.patch(patcher or Patcher(model), "default", 0.0, -1.0, _saved(recipe, tmp_path))
    return found


def _latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


VIDEO, IMAGE, PROMPT = _latents(1, WIDTH, 3, 13, 18), _latents(1, WIDTH, 25, 30), _latents(1, 11, WIDTH)
REFERENCE, EDITED = _latents(1, WIDTH, 10, 14), _latents(1, WIDTH, 16, 12)
# By case: the model, its latents, more arguments, and where its tokens are, counted by hand.
CASES = {
    "wan": (WanModel, VIDEO, {}, TokenLayout((3, 7, 9), 0, 189)),
    "wan, more frames": (WanModel, VIDEO, {"time_dim_concat": VIDEO[:, :, :2]}, TokenLayout((5, 7, 9), 0, 315)),
    "ltx": (LTXVModel, VIDEO[..., ::2, ::2], {}, TokenLayout((3, 7, 9), 0, 189)),
    "hunyuan": (HunyuanVideo, VIDEO, {}, TokenLayout((3, 7, 9), 0, 200)),
    "hunyuan, a reference": (HunyuanVideo, VIDEO, {"ref_latent": VIDEO[:, :, :1]}, TokenLayout((3, 7, 9), 63, 263)),
    "flux": (Flux, IMAGE, {}, TokenLayout((1, 13, 15), 11, 206)),
    "flux, to edit": (Flux, IMAGE, {"ref_latents": [EDITED]}, TokenLayout((1, 13, 15), 11, 254)),
}


def _tokens_of(model, x, more) -> torch.Tensor:
    """What the first attention is given: the model with an attention that hands back its values."""
    given: list[torch.Tensor] = []

    def take(original, q, k, v, *args, **kwargs):
        given.append(v)
        return original(q, k, v, *args, **kwargs)

    model(x, None, PROMPT, transformer_options={"optimized_attention_override": take}, **more)
    v = given[1] if isinstance(model, HunyuanVideo) else given[0]  # behind the refiner's
    return v.transpose(1, 2) if v.ndim == 4 else v.unflatten(-1, (HEADS, -1))


@pytest.mark.parametrize("case", CASES)
def test_a_window_is_where_the_latents_are(case: str, tmp_path) -> None:
    kind, x, more, layout = CASES[case]
    model = kind()
    patcher = _patched(model, WINDOW, tmp_path)
    tokens = _tokens_of(model, x, more)
    assert tokens.shape[1] == layout.seq_len
    reach = (min(REACH[0], layout.grid[0]), *REACH[1:])
    recipe = WINDOW.with_fields({"select.window": reach})
    patcher = _patched(model, recipe, tmp_path)
    out = patcher.sample(x, PROMPT, [1.0, 0.0], prompts=("a",), **more)[0].unflatten(-1, (HEADS, -1))
    expected = masked_attention(1.5 * tokens, tokens, tokens, window_tokens(layout, reach))
    # One softmax-weighted mean in float32.
    assert (out.double() - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert patcher.get_attachment("dit_accel").summary().sparse_calls == 1


def test_references_are_ordered_as_grids(tmp_path) -> None:
    patcher = _patched(Flux(), POOLED.with_fields({"schedule.dense_fraction": 0.0}), tmp_path)
    runner, seen = patcher.get_attachment("dit_accel").runner, []
    runner.engine.observer = lambda call: seen.append(call.layout)
    patcher.sample(IMAGE, PROMPT, [1.0, 0.0], prompts=("a",), ref_latents=[EDITED])
    assert seen == [TokenLayout((1, 13, 15), 11, 254, (LatentGrid((1, 8, 6), 206),))]

    model = WanModel()
    model.ref_conv = torch.nn.Identity()
    patcher = _patched(model, POOLED.with_fields({"schedule.dense_fraction": 0.0}), tmp_path)
    patcher.get_attachment("dit_accel").runner.engine.observer = lambda call: seen.append(call.layout)
    patcher.sample(VIDEO, PROMPT, [1.0, 0.0], prompts=("a",), reference_latent=REFERENCE)
    assert seen[1:] == [TokenLayout((3, 7, 9), 35, 224, (LatentGrid((1, 5, 7), 0),))]


@pytest.mark.parametrize("kind", [WanModel, Flux])
def test_tokens_of_another_node_stay_dense(kind, tmp_path) -> None:
    model = kind()
    patcher = _patched(model, WINDOW.with_fields({"select.window": (1, 3, 5)}), tmp_path)
    first = model.blocks[0] if kind is WanModel else model.double_blocks[0]

    def add(module, args):
        return (torch.cat([args[0], args[0][:, :3]], dim=1), *args[1:])

    with torch.no_grad():
        handle = first.register_forward_pre_hook(add)
        x = VIDEO if kind is WanModel else IMAGE
        patcher.sample(x, PROMPT, [1.0, 0.0], prompts=("a",))
        handle.remove()
    (reason,) = patcher.get_attachment("dit_accel").summary().dense_calls
    assert "another node adds some" in reason


def test_steps_prompts_and_runs(tmp_path) -> None:
    model = HunyuanVideo(double=1, single=1)
    patcher = _patched(model, POOLED.with_fields({"schedule.refresh_every": 8}), tmp_path)
    dense = Patcher(model).sample(VIDEO, PROMPT, SIGMAS)
    for _ in range(2):  # a second run counts by itself, and makes plans of its own
        out = patcher.sample(VIDEO, PROMPT, SIGMAS)
        summary = patcher.get_attachment("dit_accel").summary()
        assert [layer.name for layer in summary.layers] == ["double_blocks.0", "single_blocks.0"]
        for layer in summary.layers:
            # Two prompts, one dense step of four, and a plan for each prompt.
            assert (layer.sparse_calls, layer.plans_made) == (6, 2)
            assert list(layer.dense_calls.values()) == [2]
        assert torch.equal(out[0], dense[0])
        assert not torch.equal(out[2], dense[2])


def test_a_masked_prompt_is_hidden(tmp_path) -> None:
    model = HunyuanVideo()
    patcher = _patched(model, WINDOW.with_fields({"select.window": REACH}), tmp_path)
    mask = torch.tensor([[1] * 7 + [0] * 4])
    (out,) = patcher.sample(VIDEO, PROMPT, [1.0, 0.0], prompts=("a",), attention_mask=mask)
    tokens = _tokens_of(model, VIDEO, {})
    seen = window_tokens(CASES["hunyuan"][3], REACH).clone()
    seen[..., -4:] = False
    expected = masked_attention(1.5 * tokens, tokens, tokens, seen)
    assert (out.unflatten(-1, (HEADS, -1)).double() - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.tensor([[True, False, True]]), [[True, False, True]] * 2),
        (torch.tensor([0.0, -torch.inf, 0.0]), [[True, False, True]] * 2),
        (torch.zeros(2, 1, 1, 3), [[True] * 3] * 2),
        (torch.tensor([[[0.0, -3e38, 0.0]], [[0.0, 0.0, 0.0]]]), [[True, False, True], [True] * 3]),
        (torch.tensor([[[0.0, -0.5, 0.0]]]), None),
        (torch.zeros(1, 3, 3), None),
        (torch.zeros(1, 2, 1, 3), None),
    ],
    ids=["bool", "of keys", "4-D", "a prompt each", "weights", "of pairs", "of heads"],
)
def test_masks(mask, found) -> None:
    read = COMFY.models.key_mask(mask, 2, 3)
    assert (read is mask) if found is None else (read.tolist() == found)


@pytest.mark.parametrize(
    ("sigma", "index"), [(1.0, 0), (0.9, 0), (0.8, 1), (0.8 * (1 + 4e-6), 1), (0.5, 2), (0.3, 3), (0.0, 3), (2.0, 0)]
)
def test_the_step_is_the_one_begun(sigma: float, index: int) -> None:
    options = {"sample_sigmas": torch.tensor(SIGMAS), "sigmas": torch.tensor([sigma, sigma])}
    options |= {"cond_or_uncond": [0, 1], "uuids": ["x", "y"]}
    step = COMFY.acceleration.step_of(options)
    assert (step.index, step.num_steps, step.branch) == (index, 4, "cond x,uncond y")


@pytest.mark.parametrize(
    ("prompts", "scales", "options", "guided"),
    [
        (("positive", "negative"), {"cfg": 3.0}, {}, True),
        (("positive", "negative"), {"cfg": 1.0}, {}, False),
        (("positive", "negative"), {"cfg": 1}, {"disable_cfg1_optimization": True}, True),
        (("positive",), {"cfg": 3.0}, {"disable_cfg1_optimization": True}, False),
        (("positive", "middle", "negative"), {"cfg1": 1.0, "cfg2": 2.0}, {}, True),
        (("positive", "negative"), {"cfg": 1.0, "cfg_of_another": "a list"}, {}, False),
    ],
)
def test_guidance_is_the_guiders(prompts, scales, options, guided) -> None:
    assert COMFY.acceleration.is_guided(Guider(options, prompts, **scales)) is guided


@pytest.mark.parametrize(
    ("prompts", "cfg", "dense"), [(("a", "b"), 3.0, 2), (("a",), 1.0, 0), (("a",), 3.0, 0), (("a", "b"), 1.0, 0)]
)
def test_few_steps_are_all_sparse_without_guidance_alone(prompts, cfg: float, dense: int, tmp_path) -> None:
    recipe = POOLED.with_fields({"schedule.few_steps": 8})
    patcher = _patched(WanModel(), recipe, tmp_path)
    for _ in range(2):
        patcher.sample(VIDEO, PROMPT, SIGMAS, prompts=prompts, cfg=cfg)
        assert sum(patcher.get_attachment("dit_accel").summary().dense_calls.values()) == dense
    assert not patcher.get_attachment("dit_accel")._thread.guided


def test_no_step_without_a_schedule() -> None:
    assert COMFY.acceleration.step_of({}).index is None
    assert COMFY.acceleration.step_of({"sample_sigmas": torch.tensor([1.0]), "sigmas": torch.ones(1)}).index is None


def test_another_attention_stays_below(tmp_path) -> None:
    calls = []

    def other(original, *args, **kwargs):
        calls.append(kwargs["skip_reshape"])
        return original(*args, **kwargs)

    before = Patcher(HunyuanVideo())
    before.model_options["transformer_options"]["optimized_attention_override"] = other
    patcher = _patched(None, POOLED, tmp_path, before)
    patcher.sample(VIDEO, PROMPT, SIGMAS, prompts=("a",))
    # The refiner in each of four steps, and the dense step.
    assert calls == [True] * 5
    (back,) = UNPATCH.unpatch(patcher)
    assert back.model_options["transformer_options"]["optimized_attention_override"] is other


def test_unpatching_leaves_nothing(tmp_path) -> None:
    model = WanModel(2)
    plain = Patcher(model)
    patched = _patched(model, POOLED, tmp_path, plain)
    assert plain.model_options == {"transformer_options": {}}
    assert not plain.wrappers
    (back,) = UNPATCH.unpatch(patched.clone())  # a clone shares the patch
    expected = plain.sample(VIDEO, PROMPT, SIGMAS)
    assert all(torch.equal(a, b) for a, b in zip(back.sample(VIDEO, PROMPT, SIGMAS), expected, strict=True))
    assert not back.attachments
    assert not any(back.wrappers.values())
    assert back.model_options == plain.model_options


def test_hooks_go_with_the_run_also_a_failed_one(tmp_path) -> None:
    model = WanModel(2)
    patcher = _patched(model, POOLED, tmp_path)
    patcher.sample(VIDEO, PROMPT, SIGMAS)
    patcher.diffusion_model(VIDEO, None, PROMPT, transformer_options=patcher.options())  # outside any sampling
    with pytest.raises(RuntimeError, match="stop"), Failing(model.blocks[1]):
        patcher.sample(VIDEO, PROMPT, SIGMAS)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    thread = patcher.get_attachment("dit_accel")._thread
    assert (thread.run, thread.watched, thread.layer, thread.masks) == (None, set(), None, {})
    # What comes after works.
    patcher.sample(VIDEO, PROMPT, SIGMAS)
    assert patcher.get_attachment("dit_accel").summary().sparse_calls == 12


class Failing:
    """A block that fails, while the context is open."""

    def __init__(self, block) -> None:
        self.block = block

    def __enter__(self) -> None:
        def fail(*args, **kwargs):
            raise RuntimeError("stop")

        self.block.self_attn.forward = fail

    def __exit__(self, *_) -> None:
        del self.block.self_attn.forward


def test_compiled_models(tmp_path) -> None:
    model = WanModel(2)
    patcher = _patched(model, POOLED.with_fields({"schedule.refresh_every": 8}), tmp_path)
    expected = patcher.sample(VIDEO, PROMPT, SIGMAS)
    # ComfyUI compiles what runs, and the patch has met the module itself.
    patcher.diffusion_model = torch.compile(model, backend="eager")
    for _ in range(2):
        out = patcher.sample(VIDEO, PROMPT, SIGMAS)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        summary = patcher.get_attachment("dit_accel").summary()
        assert (summary.sparse_calls, summary.dense_calls) == (12, {"dense phase": 4})


def test_a_precision_that_was_asked_for(tmp_path, monkeypatch) -> None:
    import tests.integrations.comfy_fake as fake

    real = fake.optimized_attention
    monkeypatch.setattr(fake, "optimized_attention", lambda *a, **kw: real(*a, attn_precision=torch.float64, **kw))
    patcher = _patched(WanModel(), POOLED, tmp_path)
    patcher.sample(VIDEO, PROMPT, SIGMAS, prompts=("a",))
    reasons = patcher.get_attachment("dit_accel").summary().dense_calls
    assert reasons == {"attention in torch.float64 was asked for, of torch.float32 queries": 4}


def test_the_default_stays_dense_where_it_cannot_gain() -> None:
    (patcher,) = PATCH.patch(Patcher(WanModel()), "default", 0.0, -1.0)
    patcher.sample(VIDEO, PROMPT, SIGMAS, prompts=("a",))
    assert "189 tokens, too few to gain (below 2048)" in patcher.get_attachment("dit_accel").summary().dense_calls


def test_widgets() -> None:
    names = COMFY.nodes.runnable_presets()
    assert {"mass", "pooled", "window", "radial", "sage"} <= set(names)
    # These need blocks, trained weights or a calibration.
    assert not {"fast", "balanced", "max", "sla", "paro", "dense"} & set(names)
    for name in names:
        assert COMFY.nodes.recipe_of(name, 0.0, -1.0, "") == presets.resolve(name)
    changed = COMFY.nodes.recipe_of("default", 0.15, 0.4, "")
    assert (changed.select.density, changed.schedule.dense_fraction) == (0.15, 0.4)


def test_what_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"'window' has no density; leave density at 0"):
        PATCH.patch(Patcher(WanModel()), "window", 0.3, -1.0)
    with pytest.raises(ValueError, match="knows no Linear of ComfyUI; known are WanModel"):
        PATCH.patch(Patcher(torch.nn.Linear(1, 1)), "mass", 0.3, -1.0)
    with pytest.raises(ValueError, match=r"reuse of blocks' results \(Listed\)"):
        PATCH.patch(Patcher(WanModel()), "default", 0.0, -1.0, _saved(presets.fast(), tmp_path))
    (patched,) = PATCH.patch(Patcher(WanModel()), "mass", 0.3, -1.0)
    with pytest.raises(ValueError, match="has a patch of dit_accel already"):
        PATCH.patch(patched, "mass", 0.3, -1.0)
    for node in (UNPATCH.unpatch, lambda model: SUMMARY.summarise(model, None)):
        with pytest.raises(ValueError, match="has no patch of dit_accel"):
            node(Patcher(WanModel()))
    patched.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **kw: f(*a, **kw)
    with pytest.raises(ValueError, match="Another node has changed attention"):
        UNPATCH.unpatch(patched)


def test_the_summary_is_text(tmp_path) -> None:
    patcher = _patched(WanModel(), POOLED, tmp_path)
    patcher.sample(VIDEO, PROMPT, SIGMAS)
    shown = SUMMARY.summarise(patcher, {"samples": None})
    (text,) = shown["result"]
    assert shown["ui"] == {"text": (text,)}
    assert "6 sparse calls at density" in text


@pytest.mark.parametrize("name", COMFY.NODE_CLASS_MAPPINGS)
def test_nodes_are_as_comfyui_wants_them(name: str) -> None:
    node = COMFY.NODE_CLASS_MAPPINGS[name]
    assert name in COMFY.NODE_DISPLAY_NAME_MAPPINGS
    inputs = [one for group in node.INPUT_TYPES().values() for one in group]
    function = getattr(node, node.FUNCTION)
    assert inputs == list(function.__code__.co_varnames[1 : function.__code__.co_argcount])
    assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
    json.dumps(node.INPUT_TYPES())  # the page is given it


def test_the_package_can_be_installed() -> None:
    text = (PACKAGE / "pyproject.toml").read_text(encoding="utf-8")
    assert "[tool.comfy]" in text
    assert (PACKAGE / "requirements.txt").read_text(encoding="utf-8").split() == ["dit-accel"]
