"""The Hopper kernel compiled without a GPU, and where it keeps things in shared memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_accel.kernels.attention import variants

from .compile_hopper import VARIANTS

ROOT = Path(__file__).parents[2]
FORMS = [name for name in VARIANTS if name.startswith("wide")]


def shared_addresses(ptx: str) -> tuple[set[int], set[int]]:
    """Bytes of barriers, and bytes that plain stores of known address write, as offsets in shared memory."""
    known: dict[str, int] = {}
    barriers: set[int] = set()
    stores: set[int] = set()

    def address(text: str) -> int | None:
        symbol = re.match(r"global_smem(?:\+(\d+))?$", text)
        if symbol:
            return int(symbol[1] or 0)
        register = re.match(r"(%r\d+)(?:\s*\+\s*(\d+))?$", text)
        if register and register[1] in known:
            return known[register[1]] + int(register[2] or 0)
        return None

    for line in ptx.splitlines():
        if found := re.search(r"mov\.b32\s+(%r\d+), global_smem;", line):
            known[found[1]] = 0
        elif found := re.search(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", line):
            if found[2] in known:
                known[found[1]] = known[found[2]] + int(found[3])
        elif found := re.search(r"mbarrier\.init\.shared::cta\.b64\s+\[\s*([^\]]+?)\s*\]", line):
            start = address(found[1])
            assert start is not None, line
            barriers.update(range(start, start + 8))
        elif found := re.search(r"st\.shared(?:\.v(\d))?\.b(\d+)\s+\[\s*([^\]]+?)\s*\]", line):
            start = address(found[3])
            if start is not None:
                stores.update(range(start, start + int(found[1] or 1) * int(found[2]) // 8))
    return barriers, stores


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """PTX and bytes of shared memory of every variant."""
    command = [sys.executable, "-m", "tests.kernels.compile_hopper", *VARIANTS]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, run.stdout.splitlines())}


@pytest.fixture(scope="module")
def compiled(rows) -> dict[str, str]:
    """PTX of every variant."""
    return {name: row["ptx"] for name, row in rows.items()}


def assembled(ptx: str, folder: Path) -> str:
    """What the assembler says of a variant."""
    from triton.knobs import nvidia

    path = folder / "kernel.ptx"
    path.write_text(ptx)
    command = [nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(folder / "kernel.cubin")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "registers" in run.stderr
    return run.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_scratch_lies_on_a_barrier(variant, compiled):
    """An unused barrier is free space to the compiler, and its first state may arrive after what is stored there."""
    barriers, stores = shared_addresses(compiled[variant])
    # Those of keys, values, queries and outputs, and of the queue, whose scratch is one of the stores.
    assert len(barriers) >= 8 * 16
    assert stores
    assert not barriers & stores


@pytest.mark.parametrize("variant", ["half", "half 64", "half D=64", "half means 64", "int8", "int8_fp8", *FORMS])
def test_no_product_waits_for_the_one_before(variant, compiled, tmp_path):
    """The assembler waits after every product as soon as registers are copied between two of them, and only says so."""
    assert "serialized" not in assembled(compiled[variant], tmp_path)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("pairs")])
def test_pairs_spill_next_to_nothing_and_no_product_waits(variant, compiled, tmp_path):
    said = assembled(compiled[variant], tmp_path)
    assert "serialized" not in said
    spilled = max(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    # Of token bits in permuted calls, nearly all of it once a tile: what was seen with the oldest Triton, and a little.
    most = {"pairs rows bits": 32, "pairs int8 rows bits": 48, "pairs int8_fp8 rows bits": 80}
    # Of means, all of it once a tile: see the next test.
    most |= {"pairs means": 72, "pairs means 128 of 16": 72, "pairs means turns": 72, "pairs means rows": 100}
    assert spilled <= most.get(variant, 0)


def loops_of_products(code: str) -> list[list[str]]:
    """Instructions of the innermost loops that multiply, of a disassembled variant."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", code, re.MULTILINE)
    instructions = [(int(at, 16), text) for at, text in found]
    jumps = [(at, re.search(r"\bBRA\b.* `?\(?0x([0-9a-f]+)", text)) for at, text in instructions]
    spans = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    bodies = {span: [text for at, text in instructions if span[0] <= at <= span[1]] for span in spans}
    # Scores, and weights times values. Jumps back from behind a kernel's end close around whole tiles, and are longer.
    return [x for x in bodies.values() if len(x) < 600 and 8 <= sum("HGMMA" in text for text in x) <= 12]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "means" in name])
def test_loops_over_means_and_blocks_spill_nothing(variant, compiled, tmp_path):
    from triton.knobs import nvidia

    assembled(compiled[variant], tmp_path)
    command = [nvidia.cuobjdump.path, "-sass", str(tmp_path / "kernel.cubin")]
    code = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    loops = loops_of_products(code)
    # Of means, of full blocks and of partial ones, of either consumer.
    assert len(loops) >= 6
    assert not [text for body in loops for text in body if re.search(r"\b(LDL|STL)\b", text)]


@pytest.mark.parametrize("variant", FORMS)
def test_forms_of_a_step_spill_next_to_nothing(variant, compiled, tmp_path):
    spilled = max(int(n) for n in re.findall(r"(\d+) bytes spill stores", assembled(compiled[variant], tmp_path)))
    # Outside of the loop of full blocks: what was seen with either Triton, and a little.
    most = {"wide rows D=64": 40, "wide bits D=64": 88}
    assert spilled <= most.get(variant, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shared_memory_is_what_a_program_may_have(variant, rows):
    assert 96 << 10 < rows[variant]["shared"] <= 227 << 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_triton_leaves_the_named_barriers_alone(variant, compiled):
    """The kernel's own have numbers in registers; Triton's numbers are written out."""
    numbers = {int(n) for n in re.findall(r"bar(?:rier)?\.(?:sync|arrive)(?:\.aligned)?\s+(\d+)", compiled[variant])}
    assert {0, 1} <= numbers
    assert max(numbers) < 6  # the kernel's begin there
    own = re.findall(r"bar\.(sync|arrive) %r\d+, %r\d+;", compiled[variant])
    assert "arrive" in own
    assert "sync" in own


@pytest.mark.parametrize("precision", [None, "int8", "int8_fp8"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("permuted", [False, True])
def test_buffers_fit_and_have_a_named_barrier_each(permuted, block_k, dim, precision):
    from dit_accel.kernels.attention.hopper.forward import default_config

    config = default_config(block_k, dim, precision, permuted)
    assert 2 <= config.stages <= 8
    query, value = (1 if precision else 2), (1 if precision == "int8_fp8" else 2)
    # Two tiles of queries, the blocks, and where queries are not as wide as outputs a tile of those, or a block on its
    # way into order: below 227 KiB.
    other = 128 * dim * 2 if precision else block_k * dim * 2 if permuted else 0
    assert 256 * dim * query + config.stages * block_k * dim * (query + value) + other <= 224 * 1024


def test_two_blocks_a_step_are_of_head_dim_64_alone():
    from dit_accel.kernels.attention.hopper.forward import default_config

    shapes = [(64, 64, None, False), (64, 64, None, True), (64, 64, "int8", False), (64, 128, None, False)]
    shapes += [(128, 64, None, False)]
    found = [default_config(*shape) for shape in shapes]
    assert [config.wide_steps for config in found] == [True, True, False, False, False]
    assert not default_config(64, 64, None, pairs=True).wide_steps
    # Stages of 128 keys, and no consumer waits for its turn.
    assert [(config.stages, config.take_turns) for config in found[:2]] == [(4, False)] * 2


@pytest.mark.parametrize(
    ("batch", "heads", "ring"),
    [(1, 12, 3), (2, 12, 7), (1, 40, 12), (1, 24, 7), (1, 7, 2), (1, 4, 2), (1, 1, 1), (9, 2, 2)],
)
def test_keys_in_order_take_their_share_where_two_heads_fit_it(batch, heads, ring):
    from dit_accel.kernels.attention.hopper.forward import RING_SHARE, ring_heads

    assert ring_heads(batch, heads) == ring
    assert 2 * ring <= RING_SHARE * 4 * batch * heads or ring == min(heads, 2)


def test_an_overlap_is_found():
    ptx = """
    mov.b32 	%r9, global_smem;
    add.s32 	%r1, %r9, 64;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
    add.s32 	%r2, %r9, 68;
    @%p6 st.shared.b32 [ %r2 + 0 ], %r170;
    st.shared.v2.b32 	[global_smem+128], {0, 1};
    """
    barriers, stores = shared_addresses(ptx)
    assert barriers == set(range(64, 72))
    assert stores == {68, 69, 70, 71, *range(128, 136)}


def test_the_hopper_kernel_is_found_where_triton_has_gluon(monkeypatch):
    """A name that is not there would be taken for a Triton without Gluon, and every call for the portable kernel."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert variants._why_not_gluon(SimpleNamespace(is_cuda=True)) is None


def test_an_older_triton_has_the_portable_kernel(monkeypatch):
    """3.5 has every name that is imported, and fails at the first call."""
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    variants._why_not_this_triton.cache_clear()
    try:
        assert variants._why_not_gluon(SimpleNamespace(is_cuda=True)) == "it needs Triton 3.6 or newer, this is 3.5.1"
    finally:
        variants._why_not_this_triton.cache_clear()
