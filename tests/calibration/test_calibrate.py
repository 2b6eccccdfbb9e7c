"""Offline plans: what is chosen, when it serves, and when it refuses."""

import itertools
import math

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from dit_accel import CalibrationArtifact, Recipe, calibrate, patch, presets
from dit_accel.frozen_planner import FrozenPlanner
from dit_accel.kernels.mask.packed import PackedBlockMask, pack_bits, unpack_bits
from dit_accel.layout import TokenLayout
from dit_accel.patches.artifact import CalibratedTransformer
from dit_accel.patches.fingerprint import Fingerprint
from dit_accel.planner import Planner
from dit_accel.stages.order.axes import AXIS_ORDERS, AxisOrder
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.select.frozen import FrozenMasks, bucket_edges
from dit_accel.stages.select.gate import GlobalGate
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from tests.stages.oracle import masked_attention
from tests.tiny import TINY

BLOCK = (32, 32)
PARO = presets.paro(density=0.4, precision="model", dense_fraction=0.2, block=BLOCK)
STEPS = {"num_inference_steps": 5}


def _prompts(family, count=2):
    """Arguments in place of a prompt."""
    return [
        {k: v for k, v in TINY[family].call(torch.Generator().manual_seed(n)).items() if k not in ("generator",)}
        for n in range(count)
    ]


def _calls(pipe, prompts, seeds=(0, 1), steps=5):
    """Every dense call of the prompts' runs, as the calibration has them."""
    found = []
    for prompt, seed in zip(prompts, seeds, strict=False):
        with patch(pipe, "dense") as handle, handle.observe(lambda name, call: found.append((name, call))):
            generator = torch.Generator().manual_seed(seed)
            pipe(**{**STEPS, "num_inference_steps": steps, **prompt}, generator=generator, output_type="latent")
    return found


def _mean_mass(calls, rows, block):
    """float64 ``[H, nq, nk]``: mean exact mass of block pairs over calls and their batches."""
    total, count = 0.0, 0
    for call in calls:
        for b in range(call.q.shape[0]):
            q, k = (x[b].double().transpose(0, 1) for x in (call.q, call.k))
            prob = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
            maps = []
            for h in range(q.shape[0]):
                order = rows[h].long()
                permuted = prob[h][order][:, order]
                maps.append(
                    torch.stack(
                        [
                            torch.stack([part.sum() for part in band.split(block[1], 1)])
                            for band in permuted.split(block[0], 0)
                        ]
                    )
                )
            total, count = total + torch.stack(maps), count + 1
    return total / count


@pytest.fixture(scope="module")
def paro(tmp_path_factory):
    """A calibrated tiny pipeline: pipeline, prompts, artifact, file."""
    pipe, prompts = TINY["wan"].build(2), _prompts("wan")
    pipe.set_progress_bar_config(disable=True)
    path = tmp_path_factory.mktemp("calibration") / "paro.safetensors"
    seen = []
    artifact = calibrate(
        pipe, prompts, PARO, out=path, buckets=3, generate_kwargs=STEPS, axis_prompts=1, progress=seen.append
    )
    assert [state.done for state in seen] == list(range(1, 16))
    assert {state.total for state in seen} == {15}
    assert [state.stage for state in seen] == ["axis orders"] * 5 + ["masks"] * 10
    assert seen[-1].seconds_left == 0.0
    return pipe, prompts, artifact, path


def test_paro_masks_are_the_best_by_mean_exact_mass(paro):
    pipe, prompts, artifact, _ = paro
    part = artifact.transformers["transformer"]
    assert isinstance(part.recipe.order, AxisOrder)
    assert {name for layer in part.recipe.order.axes for name in layer} <= set(AXIS_ORDERS)
    layout = part.masks.layout
    assert layout == TokenLayout((3, 6, 7), 0, 126)
    sigmas = pipe.scheduler.sigmas.tolist()[1:5]  # the first fifth of five steps is dense
    assert part.masks.edges == pytest.approx(((sigmas[0] + sigmas[1]) / 2, (sigmas[1] + sigmas[2]) / 2))
    calls = _calls(pipe, prompts)
    device = torch.device("cpu")
    for layer, (bucket, steps) in itertools.product(range(2), enumerate([(1,), (2,), (3, 4)])):
        here = [call for _, call in calls if call.layer == layer and call.step.index in steps]
        assert len(here) == 2 * 2 * len(steps)  # prompts, branches
        rows = part.recipe.order.rows(layout, device, layer)
        rows = torch.arange(126) if rows is None else rows
        mass = _mean_mass(here, rows.expand(2, -1), BLOCK)
        kept = unpack_bits(part.masks.bits[bucket, layer], 4)
        for h, i in itertools.product(range(2), range(4)):
            best = set(mass[h, i].argsort(descending=True)[:2].tolist())  # ceil(0.4 * 4)
            assert set(kept[h, i].nonzero()[:, 0].tolist()) == best | {i}


def test_a_patched_run_uses_the_masks_of_its_noise_level(paro):
    pipe, prompts, artifact, path = paro
    part = artifact.transformers["transformer"]
    seen = []

    def watch(_, call):
        if call.plan is None:
            return
        rows = torch.arange(126).expand(1, 1, -1) if call.plan.rows is None else call.plan.rows
        rows = rows.expand(1, 2, -1).long()
        kept = unpack_bits(part.masks.bits[part.masks.bucket(call.step.sigma), call.layer], 4)
        tokens = kept.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :126, :126]
        mask = torch.zeros(2, 126, 126, dtype=torch.bool)
        for h in range(2):
            mask[h][rows[0, h][:, None], rows[0, h][None]] = tokens[h]
        seen.append((call, masked_attention(call.q, call.k, call.v, mask[None])))

    outputs = []

    def tap(layer, out, dense):
        if dense is not None:
            outputs.append(out.clone())
        return out

    with patch(pipe, PARO, calibration=path) as handle, handle.observe(watch), handle.tap_outputs(tap):
        pipe(**{**STEPS, **prompts[0]}, generator=torch.Generator().manual_seed(3), output_type="latent")
        (session,) = handle.sessions.values()
        (trajectory,) = session._thread.runs._trajectories
        (of_layout,) = trajectory.run._kept.entries.values()
        kept = of_layout.plans.values()
        assert kept
        assert all(isinstance(plan.mask, PackedBlockMask) for _, plan in kept)
    assert len(seen) == len(outputs) == 4 * 2 * 2
    for (_, expected), out in zip(seen, outputs, strict=True):
        assert (out.double() - expected).abs().max() <= 4e-6 * expected.abs().max()
    summary = handle.summary()
    assert summary.dense_calls == {"dense phase": 4}
    assert 0.5 <= summary.density <= 0.75
    # One plan per layer and noise level, shared by both branches.
    assert [layer.plans_made for layer in summary.layers] == [3, 3]


@pytest.mark.parametrize("steps", [3, 8, 12])
@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_plans_serve_other_step_counts_and_schedulers(paro, steps, scheduler):
    pipe, prompts, artifact, _ = paro
    before = pipe.scheduler
    if scheduler == "unipc":
        pipe.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    buckets = []
    masks = artifact.transformers["transformer"].masks

    def watch(_, call):
        if call.plan is not None and call.layer == 0 and call.step.branch == "cond":
            buckets.append(masks.bucket(call.step.sigma))

    try:
        with patch(pipe, PARO, calibration=artifact) as handle, handle.observe(watch):
            pipe(**{**STEPS, **prompts[0], "num_inference_steps": steps}, output_type="latent")
    finally:
        pipe.scheduler = before
    dense = math.ceil(0.2 * steps)
    assert handle.summary().sparse_calls == (steps - dense) * 2 * 2
    assert buckets == sorted(buckets)
    assert buckets[-1] == 2


def test_what_does_not_fit_is_named(paro, tmp_path):
    pipe, prompts, _, path = paro
    with pytest.raises(ValueError, match=r"run dit_accel\.calibrate"):
        patch(pipe, PARO)
    with pytest.raises(ValueError, match=r"select.density = 0.4, got 0.2"):
        patch(pipe, PARO.with_fields({"select.density": 0.2}), calibration=path)
    with pytest.raises(ValueError, match=r"order\.kind = 'chosen_axes', got 'raster'"):
        patch(pipe, presets.adaspa(), calibration=path)
    with pytest.raises(ValueError, match="self-attention layers 2, the model has 3"):
        patch(TINY["wan"].build(3), PARO, calibration=path)
    with torch.no_grad():
        other = TINY["wan"].build(2)
        for value in other.transformer.parameters():
            value.add_(1.0)
    with pytest.raises(ValueError, match="other weights"):
        patch(other, PARO, calibration=path)
    with pytest.raises(ValueError, match="There is no calibration at"):
        patch(pipe, PARO, calibration=tmp_path / "none")
    (tmp_path / "bad").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is no calibration file"):
        patch(pipe, PARO, calibration=tmp_path / "bad")
    wider = {**STEPS, **prompts[0], "width": 128}
    with (
        patch(pipe, PARO, calibration=path) as handle,
        pytest.raises(ValueError, match=r"a latent grid of 3x6x7.*of 3x6x8"),
    ):
        pipe(**wider, output_type="latent")
    assert repr(handle).endswith("0 sparse and 0 dense calls>"), "before the dense phase is run"
    with patch(pipe.transformer, PARO, calibration=path) as handle:
        assert handle.summary().sparse_calls == 0
        with pytest.raises(ValueError, match="found by sigma"):
            pipe.transformer(
                hidden_states=torch.randn(1, 16, 3, 12, 14),
                timestep=torch.ones(1),
                encoder_hidden_states=torch.randn(1, 16, 32),
            )


def test_what_can_be_rederived_is_when_asked(paro):
    pipe, prompts, artifact, path = paro
    orders = artifact.transformers["transformer"].recipe.order
    wider = {**STEPS, **prompts[0], "width": 128}
    for recipe, call in ((PARO, wider), (PARO.with_fields({"select.density": 0.9}), {**STEPS, **prompts[0]})):
        with patch(pipe, recipe, calibration=path, rederive=True) as handle:
            pipe(**call, output_type="latent")
        engine = handle.sessions["transformer"].engine
        assert engine.recipe.order == orders
        assert engine.recipe.select == recipe.select
        assert handle.summary().sparse_calls == 16
        assert all(layer.plans_made == 8 for layer in handle.summary().layers)  # online: every call


def test_only_masks_of_a_calibration_have_its_planner(paro):
    pipe, _, _, path = paro
    online = Recipe(select=Pooled(density=0.4, block=BLOCK))
    for recipe, options, kind in (
        (PARO, {"calibration": path}, FrozenPlanner),
        (PARO.with_fields({"select.density": 0.9}), {"calibration": path, "rederive": True}, Planner),
        (online, {}, Planner),
    ):
        with patch(pipe, recipe, **options) as handle:
            planner = handle.sessions["transformer"].engine.planner
        assert type(planner) is kind


def test_precision_and_schedule_may_differ(paro):
    pipe, prompts, _, path = paro
    recipe = PARO.with_fields({"precision": "int8", "schedule.dense_fraction": 0.5})
    with patch(pipe, recipe, calibration=path) as handle:
        pipe(**{**STEPS, **prompts[0]}, output_type="latent")
    assert handle.summary().dense_calls == {"dense phase": 12}
    assert "emulated" in handle.summary().backends["quantized_attention"]["torch"]


def test_an_interrupted_calibration_resumes(tmp_path):
    pipe, prompts = TINY["wan"].build(2), _prompts("wan", 3)
    pipe.set_progress_bar_config(disable=True)
    whole = calibrate(pipe, prompts, PARO, generate_kwargs=STEPS)
    path = tmp_path / "file"

    def interrupt(state):
        if state.done == 13:  # in the second run for masks, after one for axis orders
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, prompts, PARO, generate_kwargs=STEPS, out=path, progress=interrupt)
    assert not path.exists()
    with pytest.raises(ValueError, match="another calibration: seeds"):
        calibrate(pipe, prompts, PARO, generate_kwargs=STEPS, out=path, seeds=(7, 8, 9))
    seen = []
    resumed = calibrate(pipe, prompts, PARO, generate_kwargs=STEPS, out=path, progress=seen.append)
    assert [state.done for state in seen] == list(range(11, 21))
    mine, its = (one.transformers["transformer"] for one in (whole, resumed))
    assert torch.equal(mine.masks.bits, its.masks.bits)
    assert (mine.recipe, mine.masks.edges) == (its.recipe, its.masks.edges)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    read = CalibrationArtifact.load(path)
    assert torch.equal(read.transformers["transformer"].masks.bits, mine.masks.bits)
    assert read.recipe == PARO
    assert not handle_is_left(pipe)


def handle_is_left(pipe):
    """Whether an interrupted calibration left its patch."""
    try:
        patch(pipe, "dense").remove()
    except ValueError:
        return True
    return False


RECIPES = {
    "adaspa": Recipe(select=Mass(density=0.4, block=BLOCK)),
    "pooled": Recipe(order=Tiles((2, 4, 4)), select=Pooled(density=0.3, block=BLOCK)),
    "votes": Recipe(order=Tiles((2, 4, 4)), select=GlobalGate(threshold=0.4, block=BLOCK)),
    "per head": Recipe(select=Mass(density=0.5, block=BLOCK, head_densities=((0.3, 0.9),))),
}


CASES = [("flux", "pooled"), *itertools.product(["hunyuan", "cogvideox", "wan2.2"], RECIPES)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_other_recipes_and_families(family, name):
    """Text last, text first, CFG batch of 2, two transformers, images."""
    tiny, recipe = TINY[family], RECIPES[name]
    pipe = tiny.build()
    pipe.set_progress_bar_config(disable=True)
    prompts = _prompts(family)
    artifact = calibrate(pipe, prompts, recipe, generate_kwargs={"num_inference_steps": 3}, buckets=2)
    plans = []

    def watch(_, call):
        plans.append((call.layout, call.plan.mask.to_dense(), call.plan.rows, call.plan.mask))

    with patch(pipe, recipe, calibration=artifact) as handle, handle.observe(watch):
        tiny.run(pipe, steps=4)
    assert handle.summary().sparse_calls == len(plans) > 0
    assert handle.summary().dense_calls == {}
    for layout, kept, rows, mask in plans:
        token = torch.arange(layout.seq_len).expand(1, 1, -1) if rows is None else rows
        other = (token < layout.latent_start) | (token >= layout.latent_start + layout.num_latent)
        pad = -layout.seq_len % 32
        text = torch.nn.functional.pad(other[0, 0], (0, pad)).unflatten(-1, (-1, 32)).any(-1)
        # A padded prompt's blocks without any visible token are the exception.
        empty = ~kept.any(2)
        assert (kept[:, :, :, text] | empty[:, :, None, text]).all()
        assert (kept[:, :, text] | empty[:, :, None]).all()
        own = torch.eye(kept.shape[-1], dtype=torch.bool)
        assert (kept[..., own] | empty).all()
        assert kept.shape[2:] == mask.num_blocks


def test_per_head_densities_are_kept():
    pipe, prompts = TINY["wan"].build(2), _prompts("wan", 1)
    pipe.set_progress_bar_config(disable=True)
    artifact = calibrate(pipe, prompts, RECIPES["per head"], generate_kwargs=STEPS)
    kept = unpack_bits(artifact.transformers["transformer"].masks.bits, 4).double().mean((0, 1, 3, 4))
    # ceil(0.3 * 4) and ceil(0.9 * 4) of 4 blocks, and own blocks
    assert 0.5 <= float(kept[0]) <= 0.75
    assert float(kept[1]) == 1.0


def test_nothing_to_calibrate_is_said():
    pipe = TINY["wan"].build(1)
    for recipe, words in (
        ("na", "nothing to calibrate"),
        ("dense", "nothing to calibrate"),
        ("pbs", "each call anew"),
        ("carried", "calibrate with another compensation"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(pipe, ["a"], recipe)
    with pytest.raises(ValueError, match="non-empty"):
        calibrate(pipe, [], PARO)
    with pytest.raises(ValueError, match="as many as prompts"):
        calibrate(pipe, ["a", "b"], PARO, seeds=(1,))


def test_wan_at_480p_stays_below_64_megabytes(tmp_path):
    layout = TokenLayout((21, 30, 52), 0, 32760)
    recipe = presets.paro()
    bits = torch.zeros(4, 30, 12, 512, 64, dtype=torch.uint8)
    fingerprint = Fingerprint("WanTransformer3DModel", 30, 12, 128, {}, {})
    axes = AxisOrder(tuple(("fhw",) * 12 for _ in range(30)))
    masks = FrozenMasks(layout, recipe.select.block, (0.9, 0.8, 0.7), bits)
    part = CalibratedTransformer(fingerprint, Recipe(axes, recipe.select), masks)
    path = CalibrationArtifact(recipe, {"transformer": part}).save(tmp_path / "wan")
    assert path.stat().st_size <= 64e6


@pytest.mark.parametrize("count", [1, 7, 8, 9, 72])
def test_packing_is_exact(count):
    keep = torch.rand(3, 5, count, generator=torch.Generator().manual_seed(count)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(keep), count), keep)
    assert pack_bits(keep).shape[-1] == -(-count // 8)


@pytest.mark.parametrize(("steps", "buckets", "expected"), [(8, 3, (2, 4)), (8, 1, ()), (2, 4, (1,)), (1, 4, ())])
def test_buckets_share_the_second_half(steps, buckets, expected):
    sigmas = [1.0 - n / steps for n in range(steps)]
    edges = bucket_edges(sigmas, buckets)
    assert edges == pytest.approx(tuple((sigmas[cut - 1] + sigmas[cut]) / 2 for cut in expected))
