"""The laboratory's figures against attention token by token in float64, where blocks are ragged and read in parts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GRID = (3, 7, 9)
TOKENS = 189  # 2 whole blocks of 64 queries and 61 left over; 5 of 32 keys and 29
BLOCK = (64, 32)


@pytest.fixture(scope="module")
def lab() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(BENCHMARKS)
        import lab_score

        yield lab_score


def _call(lab: Any, step: int) -> Any:
    generator = torch.Generator().manual_seed(step)
    q, k, v = (torch.randn(2, TOKENS, 16, generator=generator).mul(1.5).half() for _ in range(3))
    # A logit below zero everywhere: a key of zeros, such as fills a block, would be the largest.
    q[..., 0], k[..., 0] = 6.0, -6.0
    return lab.Recorded(0, 0, "cond", step, GRID, q, k, v)


def _laboratory(lab: Any, selections: tuple[str, ...], stands: tuple[str, ...], **further: Any) -> Any:
    from lab_selections import SELECTIONS
    from lab_stands import MEMORIES, STANDS

    return lab.Laboratory(
        selections=[one for one in SELECTIONS if one.name in selections],
        stands=[one for one in (*STANDS, *MEMORIES) if one.name in stands],
        **{
            "densities": [0.34],
            "search_step": 1,
            "num_steps": 10,
            "tile": (2, 4, 4),
            "block": BLOCK,
            "every": 1,
            "device": torch.device("cpu"),
            "dtype": torch.float64,
            "with_window": False,
            **further,
        },
    )


def _rows(lab: Any, laboratory: Any, *steps: int) -> dict[tuple[str, str], dict[str, Any]]:
    sums = laboratory.run([_call(lab, step) for step in steps], lambda _: None)
    return {(row["selection"], row["stand"]): row for row in lab.rows_of(laboratory, sums)}


def _weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(1, 2) * 16**-0.5).exp()


def _in_order(lab: Any, call: Any) -> list[torch.Tensor]:
    rows = _laboratory(lab, (), ()).rows(call)
    return [x[:, rows].double() for x in (call.q, call.k, call.v)]


def _plan(mass: torch.Tensor) -> torch.Tensor:
    """bool ``[128, 189]``: the pairs that the best three of six key blocks and a query block's own keys are."""
    shown = torch.zeros(128, TOKENS, dtype=torch.bool)
    for block in range(2):
        rows = mass[64 * block : 64 * block + 64]
        of_blocks = [float(rows[:, 32 * n : 32 * n + 32].sum()) for n in range(6)]
        best = sorted(range(6), key=lambda n: -of_blocks[n])[:3]
        for n in {*best, 2 * block, 2 * block + 1}:
            shown[64 * block : 64 * block + 64, 32 * n : 32 * n + 32] = True
    return shown


def _outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor, shown: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Of one head: all tokens, those of a plan, and with them the means of the blocks that it leaves out."""
    kept = weights * shown
    value, weight = kept @ v, kept.sum(1, keepdim=True)
    out = {"exact": weights @ v / weights.sum(1, keepdim=True), "nothing": value / weight}
    for first in range(0, TOKENS, 32):
        tokens = min(32, TOKENS - first)
        key, mean = (x[first : first + 32].mean(0) for x in (k, v))
        more = (tokens * (q @ key * 16**-0.5).exp() * ~shown[:, first])[:, None]
        value, weight = value + more * mean, weight + more
    return out | {"mean": value / weight}


def test_errors_and_mass_of_ragged_blocks_are_those_of_their_tokens(lab: Any) -> None:
    """A plan of step 1 at step 4: alone, with block means, and with a part of what either left out."""
    names = ("nothing", "mean", "carried, less with age", "mean, carried, less with age")
    found = _rows(lab, _laboratory(lab, ("mass",), names), 1, 4)
    calls = {step: _in_order(lab, _call(lab, step)) for step in (1, 4)}
    error, norm, kept_mass = dict.fromkeys(names, 0.0), 0.0, []
    for head in range(2):
        weights = {step: _weights(q[:, :128], k)[head] for step, (q, k, _) in calls.items()}
        shown = _plan(weights[1] / weights[1].sum(1, keepdim=True))
        kept_mass.append(float(((weights[4] * shown).sum(1) / weights[4].sum(1)).mean()))
        then, now = (_outputs(q[head, :128], k[head], v[head], weights[n], shown) for n, (q, k, v) in calls.items())
        for name, over in (("carried, less with age", "nothing"), ("mean, carried, less with age", "mean")):
            now[name] = now[over] + 0.7 * (then["exact"] - then[over])
        norm += float(now["exact"].square().sum())
        for name in names:
            error[name] += float((now[name] - now["exact"]).square().sum())
    for name in names:
        row = found["mass", name]
        assert row["error"] == pytest.approx((error[name] / norm) ** 0.5, rel=1e-9)
        assert row["mass"] == pytest.approx(sum(kept_mass) / 2, rel=1e-9)
        assert row["mass_of_steps"] == {4: pytest.approx(row["mass"])}
        assert row["mean_error_of_steps"] == {4: pytest.approx(row["error"])}


def test_it_matters_not_how_many_blocks_a_search_works_on_at_once(lab: Any) -> None:
    everything = (
        "ear",
        "change of output",
        "change by the mean",
        "cells of 16",
        "pooled + spread",
        "ear, moved by scores",
    )
    stands = ("mean by attention", "mean, spread", "mean, Taylor of each", "means of 8", "mean, bias a pair")
    one, all_at_once = (_rows(lab, _laboratory(lab, everything, stands, at_once=n), 1, 2) for n in (1, 2))
    assert len(one) == 30
    for pair, row in one.items():
        assert row["error"] == pytest.approx(all_at_once[pair]["error"], rel=1e-9)
        assert row["error"] < 30


def test_what_fills_the_last_block_is_read_by_no_selection_and_no_stand(lab: Any) -> None:
    """Large numbers in place of zeros change nothing."""
    from lab_selections import SELECTIONS, Found
    from lab_stands import STANDS
    from lab_sums import Head, added

    q, k, v = (x[0] for x in _in_order(lab, _call(lab, 2)))
    zeros, large = (
        Head(
            q[:128],
            *(torch.cat([x, torch.full((3, 16), fill, dtype=x.dtype)]) for x in (k, v)),
            *BLOCK,
            torch.arange(2),
            TOKENS,
        )
        for fill in (0.0, 9.0)
    )
    found, again = (Found.of(head, True) for head in (zeros, large))
    for selection in SELECTIONS:
        if selection.scores is None:
            one, other = selection.searched(found), selection.searched(again)
        else:
            one, other = selection.scores(found, zeros), selection.scores(again, large)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=selection.name)
    keep = torch.tensor([[[True, False, True, False, True, False], [False, True, True, False, False, False]]])
    for stand in STANDS:
        if stand.estimate is not None:
            few, many = (added(stand.estimate(*pair), ~keep) for pair in ((found, zeros), (again, large)))
            for one, other in zip(few, many, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=stand.name)


def test_density_that_holds_a_share(lab: Any) -> None:
    mass = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.97, 0.01, 0.01, 0.01]])
    assert lab.density_that_holds(mass, 0.8) == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert lab.density_that_holds(mass, 0.95) == pytest.approx((4 / 4 + 1 / 4) / 2)


@pytest.mark.parametrize("density", [None, 0.3])
def test_calls_are_recorded_as_asked(lab: Any, monkeypatch: Any, tmp_path: Path, density: float | None) -> None:
    import recorded_calls

    small = functools.partial(recorded_calls.run, width=64, height=64, frames=5)
    monkeypatch.setattr(recorded_calls, "run", small)
    wanted = recorded_calls.Recording("embedded", (1, 3), 4, layers=(0, 5), guidance=1.0, density=density)
    recorded_calls.record(tmp_path, [(7, "a red ball")], wanted, "cpu")
    calls = list(recorded_calls.read(tmp_path, [7]))
    assert [(call.step, call.layer, call.branch) for call in calls] == [
        (step, layer, "cond") for step in (1, 3) for layer in (0, 5)
    ]
    facts = recorded_calls.facts_of(tmp_path, 7)
    assert facts["trajectory"] == ("dense" if density is None else "mass at 0.3")
    assert (facts["model"], facts["num_steps"], facts["tokens"]) == ("embedded", 4, calls[0].q.shape[1])
    assert (facts["heads"], tuple(facts["grid"])) == (4, calls[0].grid)
