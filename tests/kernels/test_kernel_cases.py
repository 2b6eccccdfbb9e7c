"""The parts of the kernel benchmark that need no GPU: times under load, and its check against float64."""

import argparse
import importlib
import importlib.util
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from . import oracle

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("kernel_cases")
    monkeypatch.setattr(module, "DRY", False)
    return module


@pytest.fixture
def script(cases):
    """``kernels.py`` under another name: there is a package that is called ``kernels``."""
    spec = importlib.util.spec_from_file_location("kernels_script", BENCHMARKS / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeGPU:
    """A stream with two clocks, in milliseconds: when the host is done enqueuing, and when the GPU is done."""

    def __init__(self, monkeypatch) -> None:
        self.host = self.device = 0.0
        self.log: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.device = max(gpu.host, gpu.device)

            def query(self) -> bool:
                return self.at <= gpu.host

            def synchronize(self) -> None:
                gpu.synchronize()

            def elapsed_time(self, end) -> float:
                assert gpu.log[-1] == "synchronize", "read before the GPU is done"
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.host = max(self.host, self.device)

    def call(self, name: str, device_ms, host_ms: float = 0.01):
        """Enqueues work; ``device_ms`` may depend on the call before."""

        def launch() -> None:
            before = self.log[-1] if self.log else None
            self.log.append(name)
            self.host += host_ms
            self.device = max(self.host, self.device) + (device_ms(before) if callable(device_ms) else device_ms)

        return launch


def rounds_of(log: list[str], count: int) -> list[tuple[str, ...]]:
    return [tuple(log[at : at + count]) for at in range(0, len(log), count)]


def test_every_round_is_shuffled_and_nothing_waits_before_the_end(cases, monkeypatch):
    gpu = FakeGPU(monkeypatch)
    ms = {"a": 0.5, "b": 1.0, "c": 1.5, "d": 2.0}
    found = cases.load_ms({name: gpu.call(name, value) for name, value in ms.items()}, ms)
    assert found == pytest.approx(ms)
    assert gpu.log.pop() == "synchronize"
    assert "synchronize" not in gpu.log
    rounds = rounds_of(gpu.log, 4)
    assert all(sorted(names) == sorted(ms) for names in rounds)  # each as often as the others
    assert len(rounds) == math.ceil(cases.WARM_UP_MS / 5) + cases.COUNTED_MS // 5
    assert len(set(rounds)) == 24  # every order occurs
    assert 740 <= gpu.device <= 760


def test_orders_repeat_with_the_seed_only(cases, monkeypatch):
    logs = []
    for seed in (0, 0, 1):
        gpu = FakeGPU(monkeypatch)
        cases.load_ms({name: gpu.call(name, 2.0) for name in "abc"}, dict.fromkeys("abc", 2.0), seed)
        logs.append(gpu.log)
    assert logs[0] == logs[1] != logs[2]


def test_the_median_is_over_the_counted_calls_alone(cases, monkeypatch):
    gpu = FakeGPU(monkeypatch)
    base = {"light": 1.0, "heavy": 3.0, "other": 2.0}
    taken: dict[str, list[float]] = {name: [] for name in base}
    warm_up, rounds = math.ceil(cases.WARM_UP_MS / 6), int(cases.COUNTED_MS / 6)
    noise = random.Random(5)

    def takes(name: str):
        def device_ms(before: str | None) -> float:
            ms = base[name] * (0.96 if before == "light" else 1.0) * noise.uniform(0.9, 1.1)
            taken[name].append(ms * (1 if len(taken[name]) >= warm_up else 2))  # another clock while it warms up
            return taken[name][-1]

        return device_ms

    found = cases.load_ms({name: gpu.call(name, takes(name)) for name in base}, base)
    assert found == pytest.approx({name: statistics.median(ms[-rounds:]) for name, ms in taken.items()}, rel=1e-9)


@pytest.mark.parametrize(("ms", "rounds"), [(0.001, 500), (1.0, 225), (400.0, 8)])
def test_rounds_are_bounded(cases, monkeypatch, ms, rounds):
    gpu = FakeGPU(monkeypatch)
    cases.load_ms({name: gpu.call(name, ms, host_ms=0.0001) for name in "ab"}, dict.fromkeys("ab", ms))
    assert len(gpu.log) == 2 * (math.ceil(cases.WARM_UP_MS / (2 * max(ms, cases.ENQUEUE_MS))) + rounds) + 1


def test_a_time_that_is_the_hosts_is_none(cases, monkeypatch):
    gpu = FakeGPU(monkeypatch)
    found = cases.load_ms({"slow host": gpu.call("slow host", 0.1, host_ms=1.0)}, {"slow host": 0.1})
    assert math.isnan(found["slow host"])


def test_work_ahead_hides_a_slow_call_from_the_host(cases, monkeypatch):
    gpu = FakeGPU(monkeypatch)
    found = cases.load_ms(
        {"called": gpu.call("called", 0.5, host_ms=1.0), "graph": gpu.call("graph", 3.0)}, {"called": 0.5, "graph": 3.0}
    )
    assert found == pytest.approx({"called": 0.5, "graph": 3.0})


def test_in_turns_replays_what_can_be_captured(cases, monkeypatch):
    gpu = FakeGPU(monkeypatch)
    calls = {"graph": gpu.call("graph called", 9.0), "plain": gpu.call("plain called", 2.0)}

    class Graph:
        replay = staticmethod(gpu.call("graph replayed", 1.5))

    def captured(call):
        if call is calls["plain"]:
            raise RuntimeError("not permitted when stream is capturing")
        return Graph()

    monkeypatch.setattr(cases, "captured", captured)
    monkeypatch.setattr(cases, "replay_ms", lambda graph: 1.5)
    monkeypatch.setattr(
        cases.triton.testing, "do_bench", lambda call, **_: {calls["graph"]: 9.0, calls["plain"]: 2.0}[call]
    )
    found = cases.in_turns(calls, alone=["graph"])
    assert found["graph"] == pytest.approx({"ms": 9.0, "device_ms": 1.5, "load_ms": 1.5, "alone_ms": 1.5})
    assert found["plain"] == pytest.approx({"ms": 2.0, "device_ms": math.nan, "load_ms": 2.0}, nan_ok=True)
    mixed, _, by_itself = " ".join(gpu.log).removesuffix(" synchronize").partition(" synchronize ")
    assert "graph replayed" in mixed
    assert "plain called" in mixed
    assert "graph replayed" in by_itself
    assert "plain called" not in by_itself


def test_a_dry_run_calls_everything_once(cases, monkeypatch):
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(cases, "DRY", True)
    found = cases.in_turns({name: gpu.call(name, 1.0) for name in "ab"}, alone="b")
    assert gpu.log == ["a", "b"]
    assert all(math.isnan(ms) for times in found.values() for ms in times.values())
    assert [list(times) for times in found.values()] == [
        ["ms", "device_ms", "load_ms"],
        ["ms", "device_ms", "load_ms", "alone_ms"],
    ]


def test_nothing_to_time(cases):
    assert cases.in_turns({}) == {}


def test_the_report_and_its_table_show_the_load(cases, script, monkeypatch, capsys):
    times = {"base": (1.0, 2.0, 4.0, 3.0), "ours": (0.5, 1.0, 1.6, 2.5), "other": (0.5, 1.0, 1.6)}
    monkeypatch.setattr(
        cases, "in_turns", lambda calls, alone: {name: dict(zip(cases.PREFIXES, times[name])) for name in calls}
    )
    report = cases.Report()
    makers = {name: lambda: lambda: None for name in times}
    report.turns(makers, lambda name, call: {"error": 1e-3}, "base", 8e9, section="rows", S=64, tokens="bits")
    ours = report.rows[1]
    assert (ours["load_ms"], ours["load_eff"], ours["load_over_base"]) == pytest.approx((1.6, 5.0, 2.5))
    assert (ours["eff"], ours["over_base"]) == pytest.approx((16.0, 2.0))
    assert (ours["alone_eff"], ours["alone_over_base"]) == pytest.approx((3.2, 1.2))
    assert not [key for key in report.rows[2] if key.startswith("alone")]
    assert (ours["device_eff"], ours["device_over_base"]) == pytest.approx((8.0, 2.0))
    capsys.readouterr()
    script.print_table(report.rows)
    head, _, line, other = capsys.readouterr().out.strip("\n").split("\n")
    assert line.startswith("rows 64 bits ours")
    columns = ("load_ms", "alone_ms", "load over", "alone over")
    cell = {name: line[head.index(name) : head.index(name) + len(name)].strip() for name in columns}
    assert cell == {"load_ms": "1.6", "alone_ms": "2.5", "load over": "2.5", "alone over": "1.2"}
    assert other.endswith("2.5" + 11 * " ")


def attention_case(cases, rows_lead, key_mask: bool):
    heads, length = 3, 200  # the last blocks are short
    q, k, v = (torch.randn(1, length, heads, 16, dtype=torch.float64) for _ in range(3))
    rows = None if rows_lead is None else oracle.random_rows(rows_lead, length)
    hidden = torch.rand(1, length) < 0.6 if key_mask else None
    return q, k, v, rows, hidden


@pytest.mark.parametrize("rows_lead", [None, (1, 1), (1, 3)])
@pytest.mark.parametrize("key_mask", [False, True])
@pytest.mark.parametrize("bits", ["none", "some", "all"])
def test_the_check_agrees_with_the_oracle(cases, rows_lead, key_mask, bits):
    torch.manual_seed(3)
    q, k, v, rows, visible_keys = attention_case(cases, rows_lead, key_mask)
    mask = oracle.random_mask(
        (1, 3), 200, 200, 64, 32, key_mask=visible_keys, rows=rows, bits=bits == "some", density=0.4
    )
    if bits == "all":
        mask = cases.with_token_bits(mask, patterns=5)
        assert not mask.kv_num_full.any()
    seen = oracle.visible_tokens(mask, visible_keys, rows)
    out, _ = oracle.dense_attention(q, k, v, seen, rows)
    assert cases.oracle_error(out, q, k, v, mask, rows, visible_keys) < 1e-12
    # What is left out of the check shows.
    if bits != "none":
        assert (
            cases.oracle_error(out, q, k, v, cases.replace(mask, kv_bits=None, token_bits=None), rows, visible_keys)
            > 0.1
        )
    if key_mask:
        assert cases.oracle_error(out, q, k, v, mask, rows, None) > 0.1
    if rows is not None:
        assert cases.oracle_error(out, q, k, v, mask, None, visible_keys) > 0.1


def test_the_check_knows_queries_that_see_nothing(cases):
    torch.manual_seed(0)
    q, k, v, _, _ = attention_case(cases, None, False)
    mask = cases.with_token_bits(oracle.random_mask((1, 3), 200, 200, 64, 32), patterns=2)
    mask.token_bits[:, 5] = 0
    out, _ = oracle.dense_attention(q, k, v, oracle.visible_tokens(mask))
    assert not out[0, 5].any()
    assert cases.oracle_error(out, q, k, v, mask) < 1e-12
    out[0, 5] = torch.nan
    assert math.isnan(cases.oracle_error(out, q, k, v, mask))


@pytest.mark.parametrize("rows_lead", [None, (1, 3)])
def test_the_check_of_gradients(cases, rows_lead):
    torch.manual_seed(5)
    q, k, v, rows, _ = attention_case(cases, rows_lead, False)
    mask = oracle.random_mask((1, 3), 200, 200, 64, 32, rows=rows)
    leaf, grad = q.requires_grad_(), torch.randn_like(q)
    out, _ = oracle.dense_attention(leaf, k, v, oracle.visible_tokens(mask, None, rows), rows)
    (dq,) = torch.autograd.grad(out, leaf, grad)
    assert cases.query_gradient_error(dq, grad, q, k, v, mask, rows) < 1e-12
    assert cases.query_gradient_error(dq, -grad, q, k, v, mask, rows) > 1
    assert math.isnan(cases.query_gradient_error(dq.fill_(torch.nan), grad, q, k, v, mask, rows))


@pytest.mark.parametrize("everything", [True, False])
def test_the_check_of_sla(cases, everything):
    from dit_accel.kernels.linear.api import linear_branch

    torch.manual_seed(6)
    q, k, v, _, _ = attention_case(cases, None, False)
    critical = oracle.random_mask((1, 3), 200, 200, 64, 32)
    weight, bias = torch.randn(16, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    sparse, _ = oracle.dense_attention(q, k, v, oracle.visible_tokens(critical))
    branch = linear_branch(q, k, v, None if everything else critical, backend="torch")
    out = sparse + branch @ weight.T + bias
    assert cases.sla_error(out, q, k, v, critical, everything, weight, bias) < 1e-12
    assert cases.sla_error(out, q, k, v, critical, not everything, weight, bias) > 1e-3
    assert cases.sla_error(out, q, k, v, critical, everything, weight.T, bias) > 1e-2


def test_full_blocks_are_not_masked(cases):
    """As the contract of BlockMask says: the caller lists a block with a hidden key as partial."""
    torch.manual_seed(0)
    q, k, v, _, visible_keys = attention_case(cases, None, True)
    mask = oracle.random_mask((1, 3), 200, 200, 64, 32)
    out, _ = oracle.dense_attention(q, k, v, oracle.visible_tokens(mask, visible_keys))
    assert cases.oracle_error(out, q, k, v, mask, None, visible_keys) < 1e-12


def test_tile_order(script):
    rows_module = importlib.import_module("kernel_rows")
    tiles = rows_module.tiled_rows(32768, torch.device("cpu"))
    assert tiles.shape == (1, 1, 32768)
    assert tiles.dtype == torch.int32
    assert tiles[0, 0].sort().values.equal(torch.arange(32768, dtype=torch.int32))
    first = tiles[0, 0, :64].long()
    assert (first // (32 * 64)).max() == (first // 64 % 32).max() == (first % 64).max() == 3  # a volume of 4 x 4 x 4
    assert rows_module.tiled_rows(32760, torch.device("cpu")) is None


def dry_pairs(cases, monkeypatch, call):
    """The module of pairs, with ``call`` in place of its kernels."""
    module = importlib.import_module("kernel_pairs")
    torch.manual_seed(0)
    monkeypatch.setattr(cases, "DRY", True)
    monkeypatch.setattr(cases, "extra_memory_share", lambda call, q: 0.0)
    monkeypatch.setattr(module, "inputs", lambda *shape: [torch.randn(1, *shape) for _ in range(3)])
    monkeypatch.setattr(module, "portable", call)
    monkeypatch.setattr(module, "hopper", call)
    return module


def test_the_pairs_section_runs_dry_and_checks_each_form_with_its_own_mask(cases, script, monkeypatch):
    """On the CPU, by another backend in place of the kernels."""
    from dit_accel.kernels import block_sparse_attention

    def call(q, k, v, mask, rows, **_changes):
        return lambda: block_sparse_attention(q, k, v, mask, rows=rows, backend="torch")

    module = dry_pairs(cases, monkeypatch, call)
    report = cases.Report()
    module.section_pairs(report, argparse.Namespace(lengths=[1000], heads=2, head_dim=16))
    assert [row for row in report.rows if not row["error"] < 1e-5] == []
    ops = ["portable", "pairs, free", "pairs, turns", "hopper 128x64"]
    assert [row["op"] for row in report.rows] == ops * (2 * 3 + 1)
    assert [row.get("tokens") for row in report.rows[4:8]] == ["permuted"] * 4


@pytest.mark.parametrize("dim", [64, 128])
def test_the_section_of_steps_runs_dry_and_checks_each_form_with_its_own_mask(dim, cases, monkeypatch):
    """On the CPU, by another backend in place of the kernel; configurations are real ones."""
    from dit_accel.kernels import block_sparse_attention
    from dit_accel.kernels.attention.hopper.forward import HopperConfig

    module = importlib.import_module("kernel_steps")
    torch.manual_seed(0)
    monkeypatch.setattr(cases, "DRY", True)
    monkeypatch.setattr(cases, "extra_memory_share", lambda call, q: 0.0)
    monkeypatch.setattr(module, "inputs", lambda *shape: [torch.randn(1, *shape) for _ in range(3)])

    def call(q, k, v, mask, rows, **changes):
        replace(HopperConfig(3, True), **changes)
        return lambda: block_sparse_attention(q, k, v, mask, rows=rows, backend="torch")

    monkeypatch.setattr(module, "hopper", call)
    report = cases.Report()
    module.section_steps(report, argparse.Namespace(lengths=[1000], heads=2, head_dim=dim))
    assert [row for row in report.rows if not row["error"] < 1e-5] == []
    assert len(report.rows) == 4 * (9 if dim == 64 else 6)
    assert {row["op"] for row in report.rows} >= {"used", "free", "128x128, turns"}


def test_the_section_of_pairs_in_8_bits_runs_dry(cases, monkeypatch):
    """On the CPU, by the reference in place of the kernels."""
    from dit_accel.kernels import block_sparse_attention, quantized_block_sparse_attention

    def call(q, k, v, mask, rows, precision=None, **_changes):
        if precision is None:
            return lambda: block_sparse_attention(q, k, v, mask, rows=rows, backend="torch")
        return lambda: quantized_block_sparse_attention(q, k, v, mask, precision=precision, rows=rows, backend="torch")

    module = dry_pairs(cases, monkeypatch, call)
    report = cases.Report()
    module.section_pairs_in_8_bits(report, argparse.Namespace(lengths=[1000], heads=2, head_dim=16))
    ops = [["portable {}", "pairs {}, free", "pairs {}, turns", "hopper 128x64 {}", "pairs half"]] * 6
    names = ["int8", "int8", "int8_fp8", "int8_fp8", "int8", "int8_fp8"]
    assert [row["op"] for row in report.rows] == [
        op.format(name) for group, name in zip(ops, names, strict=True) for op in group
    ]
    assert [row.get("tokens") for row in report.rows[::5]] == [None, "permuted", None, "permuted", None, None]
    most = {"int8": 2e-2, "int8_fp8": 5e-2, "half": 1e-5}
    for row in report.rows:
        kind = next(name for name in ("int8_fp8", "int8", "half") if name in row["op"])
        assert row["error"] < most[kind], row
        assert kind == "half" or row["error"] > 1e-3


def test_lists_of_neighbours_are_as_alike_as_asked(cases):
    module = importlib.import_module("kernel_pairs")
    torch.manual_seed(0)
    chance, alike = (module.pair_mask(2, 9000, 64, 0.2, x, torch.device("cpu")) for x in (0.0, module.ALIKE))
    assert float(chance.density()) == pytest.approx(float(alike.density())) == pytest.approx(0.2, abs=0.01)
    assert module.shared_share(chance) == pytest.approx(0.2, abs=0.02)
    assert 0.5 < module.shared_share(alike) < 0.9


def test_the_section_of_what_is_carried_runs_dry_and_checks_each_sum(cases, monkeypatch):
    """On the CPU. A sum of another share than the one of the step's age is seen."""
    module = importlib.import_module("kernel_carried")
    monkeypatch.setattr(cases, "DRY", True)
    monkeypatch.setattr(cases, "extra_memory_share", lambda call, q: 0.0)
    monkeypatch.setattr(module, "GRIDS", {1000: (5, 10, 20)})
    monkeypatch.setattr(module, "inputs", lambda *shape: [torch.randn(1, *shape) for _ in range(3)])
    report = cases.Report()
    module.section_carried(report, argparse.Namespace(lengths=[1000], heads=2, head_dim=16))
    ops = ["nothing", "means", "means, two launches", "carried over means, 16 bits", "carried, 16 bits"]
    ops += ["carried, 8 bits", "kept over means, 16 bits", "kept, 16 bits", "kept, 8 bits"]
    ops += ["made: nothing", "made: two launches"] * 2  # blocks of 64 and of 128 queries; a CPU has no one launch
    assert [row["op"] for row in report.rows] == ops * 2
    most = {"nothing": 1e-5, "carried, 16 bits": 1e-6, "carried, 8 bits": 0.01}
    most |= dict.fromkeys(("means", "means, two launches", "made: two launches", "carried over means, 16 bits"), 1e-6)
    assert [row for row in report.rows if row["op"] in most and not row["error"] < most[row["op"]]] == []
    monkeypatch.setattr(module.Carried, "_share", lambda *_: 0.5)
    module.section_carried(report, argparse.Namespace(lengths=[1000], heads=2, head_dim=16))
    later = report.rows[len(report.rows) // 2 :]
    assert [row for row in later if row["op"].startswith("carried") and not row["error"] > 0.1] == []


def test_the_rows_section_runs_dry_and_every_call_is_checked(cases, script, monkeypatch):
    """On a small grid, on the CPU."""
    module = importlib.import_module("kernel_rows")
    torch.manual_seed(0)
    monkeypatch.setattr(cases, "DRY", True)
    monkeypatch.setattr(cases, "extra_memory_share", lambda call, q: 0.0)
    monkeypatch.setattr(module, "GRID", (4, 8, 16))
    monkeypatch.setattr(module, "inputs", lambda *shape: [torch.randn(1, *shape) for _ in range(3)])
    monkeypatch.setattr(module, "random_mask", lambda *sizes: cases.tune.random_mask(*sizes, torch.device("cpu")))
    report = cases.Report()
    module.section_rows(report, argparse.Namespace(lengths=[512, 520], heads=2, head_dim=16))
    wrong = [row for row in report.rows if row["op"] != "portable kernel" and not row["error"] < 1e-5]
    assert not wrong
    sets = {}
    for row in report.rows:
        key = (row["S"], row["block"], row["density"], row.get("tokens"))
        sets.setdefault(key, []).append(row["op"])
    plain = ["in order", "permuted", "copied by torch", "portable kernel"]
    for block in ("128x128", "128x64"):
        for density in (0.05, 0.1, 0.2):
            assert sets.pop((512, block, density, None)) == [*plain[:2], "permuted by tiles", *plain[2:]]
        for density in (0.05, 0.2):
            assert sets.pop((520, block, density, None)) == plain
        for length in (512, 520):
            assert sets.pop((length, block, 0.2, "token bits and key mask")) == ["in order", "permuted"]
    assert not sets


def test_the_sections_of_all_exist(script):
    assert set(script.ALL) < set(script.SECTIONS)
