"""The tuner picks what is measured fastest, and the table it writes is the one that is read."""

import json
import re

import pytest
import torch

from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention import tuning
from dit_accel.kernels.common.choice import Case

pytest.importorskip("triton")

KEY = "forward/32x32/d16/in_order"


@pytest.fixture
def table(device):
    from dit_accel.kernels.attention.tune import tune

    count = 0

    def measure(call):
        """Runs every configuration; each third is refused, and later ones are faster."""
        nonlocal count
        count += 1
        result = call()
        first = result[0] if isinstance(result, tuple) else result
        assert first.isfinite().all()
        if count % 3 == 0:
            raise RuntimeError("out of resource: shared memory\nmore")
        return 1.0 / count

    return tune(device, length=64, heads=1, dims=(16,), blocks=((32, 32),), dtype=torch.float16, measure=measure)


def test_the_fastest_configuration_that_runs_wins(table):
    # Six configurations an operation; the third and the sixth are refused, so the fifth is the fastest.
    assert table["entries"] == {
        "backward_dkv/32x32/d16/in_order": [8, 2],
        "backward_dq/32x32/d16/in_order": [8, 2],
        KEY: [8, 3],
        "forward/32x32/d16/permuted": [8, 3],
    }
    refused = [row["error"] for row in table["measured"] if "error" in row and "warps" in row]
    assert refused == ["RuntimeError: out of resource: shared memory"] * 8
    assert table["fa4_fastest"] == []
    assert any(row.get("backend") == "fa4" and "error" in row for row in table["measured"])


def test_what_is_not_reached_in_time_is_left_out(device):
    from dit_accel.kernels.attention.tune import tune

    table = tune(
        device,
        length=64,
        heads=1,
        dims=(16,),
        blocks=((32, 32),),
        dtype=torch.float16,
        measure=lambda call: pytest.fail("measured"),
        seconds=0,
    )
    assert table["entries"] == {}
    assert table["fa4_fastest"] == []
    assert {row["error"] for row in table["measured"] if "warps" in row} == {"out of time"}


def test_candidates_are_compiled_in_other_processes_first(device):
    from dit_accel.kernels.attention.tune import tune

    shape = {"length": 64, "heads": 1, "dims": (16,), "blocks": ((32, 32),), "dtype": torch.float16}
    table = tune(device, **shape, measure=lambda call: 1.0, workers=1)
    assert len(table["entries"]) == 4


@pytest.mark.parametrize(
    ("theirs", "clearly"), [([0.9, 0.9, 0.9], True), ([0.9, 0.99, 0.9], False), ([0.9, 0.9, 1.5], False)], ids=str
)
def test_flash_attn_4_is_listed_where_it_is_clearly_faster_at_every_density(theirs, clearly):
    from dit_accel.kernels.attention.tune import _fa4_fastest

    def call(density, backend):
        return {"triton": 1.0, "fa4": theirs[density]}[backend]

    cases = {KEY: [(density, lambda backend, density=density: call(density, backend)) for density in range(3)]}
    measured = []
    found = _fa4_fastest(cases, lambda call: call(), lambda stage: None, measured, float("inf"))
    assert found == ([KEY] if clearly else [])
    assert [row["ms"] for row in measured] == [ms for pair in zip([1.0] * 3, theirs, strict=True) for ms in pair]
    assert _fa4_fastest(cases, lambda call: call(), lambda stage: None, measured, 0.0) == []
    assert measured[-1]["error"] == "out of time"


def test_another_result_is_a_disagreement():
    from dit_accel.kernels.attention.tune import _disagreement

    ours = torch.randn(1, 64, 2, 16)
    assert _disagreement(ours * 1.001, ours) is None
    assert "differs from ours by" in _disagreement(torch.cat([ours[:, :48], ours[:, :16]], 1), ours)
    assert "differs from ours by" in _disagreement(ours * torch.nan, ours)


@pytest.mark.parametrize(("name", "read"), [("NVIDIA Test 9 SXM", True), ("NVIDIA Other", False)])
def test_a_written_table_is_read_for_its_gpu_only(name, read, table, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**table, "device": "NVIDIA Test 9", "fa4_fastest": [KEY]}))
    monkeypatch.setenv(tuning.TABLE_VARIABLE, str(path))
    monkeypatch.setattr(tuning, "_device_name", lambda index: name)

    class Query:
        is_cuda = True
        dtype = torch.float16
        shape = (1, 64, 1, 16)
        device = torch.device("cuda", 0)

        def element_size(self):
            return 2

    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 32, 32, 64, 64)
    tuning._table.cache_clear()
    if read:
        found = tuning.launch_config("forward", Query(), mask, False)
        assert (found.num_warps, found.num_stages) == (8, 3)
    assert tuning.fa4_is_fastest(Case(Query.device, Query.dtype, 16, (32, 32))) == read
    tuning._table.cache_clear()


GOOD = {"device": "NVIDIA Test", "entries": {KEY: [4, 2]}, "fa4_fastest": []}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "is no table"),
        ("", "is no table"),
        ("{", "is no table"),
        ("7", "device must be a str, got None"),
        (json.dumps({**GOOD, "device": None}), "device must be a str, got None"),
        (json.dumps({"device": "", "fa4_fastest": []}), "entries must be a dict, got None"),
        (json.dumps({**GOOD, "fa4_fastest": {}}), "fa4_fastest must be a list, got {}"),
        (json.dumps({**GOOD, "entries": {KEY: 4}}), "must be warps and stages, got 4"),
        (json.dumps({**GOOD, "entries": {KEY: [4, -1]}}), "must be warps and stages, got"),
        (json.dumps({**GOOD, "entries": {KEY: [4, True]}}), "must be warps and stages, got"),
        (json.dumps({**GOOD, "entries": {KEY: [3, 2]}}), "power of two warps, 32 at most, got 3"),
    ],
)
def test_a_damaged_table_is_one_sentence(content, why, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    for own in (path, tmp_path) if content is None else (path,):
        monkeypatch.setenv(tuning.TABLE_VARIABLE, str(own))
        tuning._table.cache_clear()
        with pytest.raises(ValueError, match=re.escape(why)) as caught:
            tuning._table("NVIDIA Test 9")
        assert str(own) in str(caught.value)
        assert tuning.TABLE_VARIABLE in str(caught.value)
    tuning._table.cache_clear()


def test_our_tables_name_known_operations():
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        tuning._table.cache_clear()
        ours = tuning._table(name)
        assert ours["entries"]
        assert all(key.split("/")[0] in ("forward", "backward_dq", "backward_dkv") for key in ours["entries"])
        assert all(key.startswith("forward/") for key in ours["fa4_fastest"])


@pytest.mark.parametrize(
    ("block", "dim", "warps"),
    [((16, 16), 64, 1), ((16, 16), 16, 1), ((32, 32), 64, 2), ((32, 32), 256, 4), ((64, 64), 64, 4)],
)
def test_small_blocks_get_few_warps(block, dim, warps):
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), *block, 2 * block[0], 2 * block[1])
    assert tuning.launch_config("forward", torch.zeros(1, 2 * block[0], 1, dim), mask, False).num_warps == warps
