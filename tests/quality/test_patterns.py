"""Block maps against dense fp64 attention, densities and recalls against hand-made cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel.kernels import BlockMask
from dit_accel.quality.inspection import Observation, inspect_patterns, write_inspection
from dit_accel.quality.pattern_images import MapPanel, map_sheet, value_table
from dit_accel.quality.patterns import (
    BlockPattern,
    block_pattern,
    density_for_mass,
    keep_for_mass,
    pattern_change,
    recall_of,
)


def _qk(length: int, heads: int = 2, dim: int = 16, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(batch, length, heads, dim, generator=generator) for _ in range(2))


def _dense(q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """fp64 softmax ``[B, H, S, S]``."""
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return scores.softmax(-1)


def _block_means(share: torch.Tensor, block_q: int, block_k: int) -> torch.Tensor:
    rows = [part.mean(2) for part in share.split(block_q, dim=2)]
    return torch.stack([torch.stack([part.sum(-1) for part in row.split(block_k, dim=-1)], -1) for row in rows], 2)


@pytest.mark.parametrize("length", [128, 100, 65, 33])
def test_mass_is_exact(length: int) -> None:
    q, k = _qk(length)
    pattern = block_pattern(q, k, block=32)
    expected = _block_means(_dense(q, k), 32, 32)
    torch.testing.assert_close(pattern.mass.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(pattern.mass.sum(-1), torch.ones(pattern.mass.shape[:-1]), atol=1e-5, rtol=0)
    assert pattern.row_tokens.sum() == length
    assert pattern.keep is None
    assert pattern.recall is None


def test_permutation_hidden_keys_and_shared_heads() -> None:
    q, k = _qk(100, heads=4)
    k = k[:, :, :2]
    rows = torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(h)) for h in range(4)])[None]
    visible = torch.ones(2, 100, dtype=torch.bool)
    visible[1, 70:] = False
    pattern = block_pattern(q, k, block=32, rows=rows, key_mask=visible)
    share = _dense(q, k.repeat_interleave(2, dim=2), ~visible)
    for h in range(4):
        permuted = share[:, h][:, rows[0, h]][:, :, rows[0, h]]
        expected = _block_means(permuted[:, None], 32, 32)[:, 0]
        torch.testing.assert_close(pattern.mass[:, h].double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("permuted", [False, True])
def test_hidden_pairs_have_no_mass(permuted: bool) -> None:
    q, k = _qk(100)
    heads = q.shape[2]
    generator = torch.Generator().manual_seed(7)
    pairs = torch.rand(2, 1, 100, 100, generator=generator) > 0.4
    pairs[0, 0, 17] = False  # a query of padding
    order = torch.randperm(100, generator=generator) if permuted else torch.arange(100)
    pattern = block_pattern(q, k, block=32, rows=order if permuted else None, pairs=pairs)
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / q.shape[-1] ** 0.5
    share = logits.masked_fill(~pairs, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = _block_means(share[:, :, order][:, :, :, order], 32, 32)
    assert expected.shape[1] == heads
    torch.testing.assert_close(pattern.mass.double(), expected, atol=2e-6, rtol=0)


def test_one_order_for_all_heads() -> None:
    q, k = _qk(96)
    rows = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    one = block_pattern(q, k, block=32, rows=rows).mass
    assert torch.equal(one, block_pattern(q, k, block=32, rows=rows[None, None].int()).mass)
    assert torch.equal(one, block_pattern(q[:, rows], k[:, rows], block=32).mass)


@pytest.mark.parametrize("with_bits", [False, True])
def test_recall_counts_tokens(with_bits: bool) -> None:
    q, k = _qk(150)
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(2, 2, 3, 5, generator=generator) < 0.5
    keep[..., 0] = True
    extra = {}
    if with_bits:
        words = torch.randint(-(2**31), 2**31 - 1, (4, 64, 1), generator=generator).to(torch.int32)
        bit_rows = torch.randint(-1, 4, keep.shape, generator=generator).to(torch.int32)
        extra = {"partial": bit_rows >= 0, "bit_rows": bit_rows, "token_bits": words}
    mask = BlockMask.from_dense(keep, 64, 32, 150, 150, **extra)
    pattern = block_pattern(q, k, mask=mask)
    expected = (_dense(q, k) * mask.to_tokens()).sum((-1, -2)) / 150
    assert pattern.recall is not None
    assert pattern.keep is not None
    torch.testing.assert_close(pattern.recall.double(), expected, atol=2e-6, rtol=0)
    assert torch.equal(pattern.keep, keep)
    if not with_bits:
        whole = recall_of(pattern.mass, pattern.keep, pattern.row_tokens)
        torch.testing.assert_close(whole, pattern.recall, atol=2e-6, rtol=0)


def test_a_broadcast_mask() -> None:
    q, k = _qk(96)
    mask = BlockMask.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.bool), 32, 32, 96, 96)
    pattern = block_pattern(q, k, mask=mask)
    assert pattern.keep is not None
    assert pattern.recall is not None
    assert pattern.keep.shape == (2, 2, 3, 3)
    torch.testing.assert_close(pattern.recall, torch.ones(2, 2), atol=1e-5, rtol=0)


def test_density_of_known_maps() -> None:
    uniform = torch.full((20, 20), 1 / 20)
    assert density_for_mass(uniform, 0.95).item() == pytest.approx(0.95)
    assert density_for_mass(torch.eye(20), 0.95).item() == pytest.approx(1 / 20)
    assert density_for_mass(torch.eye(20), 1.0).item() == pytest.approx(1 / 20)
    row = torch.tensor([[0.6, 0.3, 0.06, 0.04]])
    assert keep_for_mass(row, 0.5).tolist() == [[True, False, False, False]]
    assert keep_for_mass(row, 0.9).tolist() == [[True, True, False, False]]
    assert keep_for_mass(row, 0.95).tolist() == [[True, True, True, False]]


def test_kept_blocks_hold_the_mass_and_no_block_is_spare() -> None:
    mass = block_pattern(*_qk(512), block=32).mass
    keep = keep_for_mass(mass, 0.9)
    assert (mass * keep).sum(-1).min() >= 0.9 - 1e-6
    smallest = mass.masked_fill(~keep, 2.0).amin(-1)
    assert ((mass * keep).sum(-1) - smallest).max() < 0.9


def test_recall_weighs_rows_by_their_queries() -> None:
    mass = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    keep = torch.tensor([[True, False], [True, False]])
    assert recall_of(mass, keep, torch.tensor([64, 32])).item() == pytest.approx((64 * 0.5 + 32) / 96)


def test_change() -> None:
    a, b = torch.eye(4), torch.eye(4).flip(0)
    assert pattern_change(a, a).item() == 0
    assert pattern_change(a, b).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="one shape"):
        pattern_change(a, torch.eye(5))


def test_bad_arguments() -> None:
    q, k = _qk(64)
    with pytest.raises(ValueError, match=r"must be \[B, S, H, D\]"):
        block_pattern(q[0], k)
    with pytest.raises(ValueError, match="matching batch, heads and head size"):
        block_pattern(q, k[..., :8])
    mask = BlockMask.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.bool), 32, 32, 96, 96)
    with pytest.raises(ValueError, match="the mask is for 96 queries and 96 keys, got 64 and 64"):
        block_pattern(q, k, mask=mask)
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\], got 95"):
        density_for_mass(torch.eye(3), 95)


def _observe(layer: int, step: int, order: str, mass: torch.Tensor, masked: bool = False) -> Observation:
    mass = mass.expand(1, 2, *mass.shape)
    keep = torch.eye(mass.shape[-1], dtype=torch.bool).expand(mass.shape) if masked else None
    recall = torch.full((1, 2), 0.75) if masked else None
    pattern = BlockPattern(mass, torch.full((mass.shape[-1],), 64), keep, recall)
    return Observation(layer, step, order, pattern, sigma=1 - step / 10)


def _run() -> list[Observation]:
    eye, shifted = torch.eye(8), torch.eye(8).roll(1, 0)
    uniform = torch.full((8, 8), 1 / 8)
    return [
        _observe(0, 5, "tiles", shifted, masked=True),
        _observe(0, 0, "tiles", eye, masked=True),
        _observe(2, 0, "tiles", uniform),
        _observe(2, 5, "tiles", uniform),
        _observe(0, 0, "raster", uniform),
    ]


def test_findings() -> None:
    inspection = inspect_patterns(_run())
    by_key = {(f.order, f.layer, f.head): f for f in inspection.findings}
    assert len(by_key) == 6
    moving = by_key["tiles", 0, 1]
    assert moving.density == pytest.approx(1 / 8)
    assert moving.recall == pytest.approx(0.75)
    assert moving.mask_density == pytest.approx(1 / 8)
    assert moving.change == pytest.approx(1)
    assert moving.reuse_recall == pytest.approx(0)
    still = by_key["tiles", 2, 0]
    assert still.recall is None
    assert still.change == pytest.approx(0)
    assert still.reuse_recall == pytest.approx(1)
    assert by_key["raster", 0, 0].change is None
    assert inspection.steps == (0, 5)
    assert inspection.mean_density("tiles") == pytest.approx((1 / 8 + 1) / 2)
    with pytest.raises(ValueError, match="order 'hilbert'; known are raster, tiles"):
        inspection.mean_density("hilbert")


def test_bad_observations() -> None:
    with pytest.raises(ValueError, match="no attention call was observed"):
        inspect_patterns([])
    with pytest.raises(ValueError, match="observed twice"):
        inspect_patterns([_run()[0], _run()[0]])


def test_written_files(tmp_path: Path) -> None:
    write_inspection(_run(), tmp_path, facts={"prompt": "a cat"})
    tree = json.loads((tmp_path / "patterns.json").read_text())
    assert tree["facts"] == {"prompt": "a cat"}
    assert tree["mean_density"]["raster"] == pytest.approx(1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "patterns.json",
        "maps_tiles_layer00.png",
        "maps_tiles_layer02.png",
        "maps_raster_layer00.png",
        "density_tiles.png",
        "density_raster.png",
        "recall_tiles.png",
        "change_tiles.png",
    }


@pytest.mark.parametrize("name", ["patterns.json", "maps_tiles_layer02.png", "change_tiles.png"])
def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is a folder"):
        write_inspection(_run(), tmp_path)


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Cannot write .*patterns\.json: "):
        write_inspection(_run(), tmp_path / "file")


def test_map_shows_mass_and_greys_what_is_dropped() -> None:
    eye = torch.eye(4)
    sheet = np.asarray(map_sheet("t", [[MapPanel(eye, torch.ones(4, 4).tril().bool(), "c", "d")]]))
    mass, kept = sheet[76 : 76 + 224, 14 : 14 + 224].astype(int), sheet[76 : 76 + 224, 242 : 242 + 224]
    on, off = mass[28, 28], mass[28, 28 + 56]
    assert on.sum() > off.sum() + 300
    assert (kept[28, 28] == on).all()
    assert kept[28, 28 + 56].tolist() == [206, 210, 217]
    assert (kept[28 + 56, 28] == off).all()


def test_large_maps_are_averaged() -> None:
    mass = torch.full((500, 500), 1 / 500)
    sheet = np.asarray(map_sheet("t", [[MapPanel(mass, None, "c", "d")]]))
    panel = sheet[76 : 76 + 224, 14 : 14 + 224].astype(int)
    assert np.ptp(panel.reshape(-1, 3), axis=0).max() <= 1


def test_empty_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        map_sheet("t", [])
    with pytest.raises(ValueError, match="at least one row"):
        value_table("t", [], [])
