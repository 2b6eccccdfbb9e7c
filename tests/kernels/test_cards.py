"""Portable kernels compiled for every card without a GPU: they fit its shared memory, and what does not is found."""

import pytest

pytest.importorskip("triton")

from benchmarks.card_list import CARDS, card
from benchmarks.cards import KNOWN_SPILLS, REPRESENTATIVE, compiled, faults
from dit_accel.kernels.common.support import COMPILED_FOR

FORWARD = "block_sparse_fwd_kernel"
TILES = {"BLOCK_Q": 128, "BLOCK_K": 64, "TILE_Q": 128, "TILE_K": 64, "BLOCK_D": 128}


def row(**changed):
    """A kernel of sm_89 without a fault: 32 KiB of queries, two buffers of keys and values, a KiB of tables."""
    good = {"card": "sm_89", "call": "forward 128 bfloat16 128x64 permuted", "kernel": FORWARD, "registers": 255}
    good |= {"spills": 64, "products": ["mma.sync bf16"], "shared": 97 << 10, "tensor_columns": 0, "warps": 8}
    return {**good, "stages": 3, "tiles": TILES, **changed}


@pytest.mark.parametrize("on", CARDS, ids=lambda on: on.name)
def test_representative_kernels_fit(on):
    rows = compiled(on, REPRESENTATIVE[on.name])
    assert {found["call"] for found in rows} == set(REPRESENTATIVE[on.name])
    assert not faults(rows, on)
    # Exact float32 alone goes without a matrix unit.
    assert any(found["products"] for found in rows if found["kernel"] == FORWARD)


def test_a_configuration_that_outgrows_its_card_is_found():
    """Launchers are told of more memory than there is, and the compiler is not."""
    on = card("sm_89")
    rows = compiled(on, ["backward 128 bfloat16 128x64 in order"], pretend_kib=163)
    assert max(found["shared"] for found in rows) > on.shared_kib << 10
    (fault,) = faults(rows, on)
    assert "block_sparse_bwd_dq_kernel: takes 131072 bytes of shared memory of 101376." in fault
    assert not faults(rows, card("sm_80"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shared": (99 << 10) + 1}, "takes 101377 bytes of shared memory of 101376"),
        ({"shared": (97 << 10) + 1}, "takes 99329 bytes of shared memory, 99328 are counted"),
        ({"spills": 65}, "spills 65 bytes a thread, 64 are allowed"),
        ({"products": []}, "multiplies by no matrix unit, not mma.sync"),
        ({"products": ["mma.sync bf16", "wgmma bf16"]}, "multiplies by wgmma bf16, not mma.sync"),
        ({"tensor_columns": 513}, "takes 513 columns of tensor memory of 512"),
    ],
)
def test_each_fault_is_a_sentence(changed, said):
    assert not faults([row()], card("sm_89"))
    found = faults([row(), row(**changed)], card("sm_89"))
    assert said in found[0]
    assert all("sm_89, forward 128 bfloat16 128x64 permuted, block_sparse_fwd_kernel" in text for text in found)


@pytest.mark.parametrize(("name", "in_half"), [("sm_80", False), ("sm_86", True), ("sm_120", True)])
def test_int8_sums_values_in_float16_where_that_is_twice_as_fast(name, in_half):
    call = {"card": name, "call": "int8 128 bfloat16 128x64 permuted", "kernel": "quantized_fwd_kernel", "spills": 0}
    half, single = (row(**call, products=["mma.sync s8", f"mma.sync f16{where}"]) for where in (" in f16", ""))
    right, wrong = (half, single) if in_half else (single, half)
    assert not faults([right], card(name))
    (fault,) = faults([wrong], card(name))
    assert f"must {'' if in_half else 'not '}sum values in float16" in fault


def test_what_does_not_compile_is_a_fault():
    (fault,) = faults([{"card": "sm_89", "call": "forward 8", "error": "ValueError: no"}], card("sm_89"))
    assert fault == "sm_89, forward 8: does not compile (ValueError: no)."


def test_a_known_spill_may_not_grow():
    known = {("sm_89", row()["call"], FORWARD): 100}
    assert not faults([row(spills=100)], card("sm_89"), known)
    assert "spills 101 bytes a thread, 100 are allowed" in faults([row(spills=101)], card("sm_89"), known)[0]
    # Another call's is not excused.
    assert faults([row(spills=100, call="forward 128 float16 128x64 permuted")], card("sm_89"), known)


def test_backward_kernels_may_spill():
    dq = row(kernel="block_sparse_bwd_dq_kernel", spills=500)
    assert not faults([dq], card("sm_89"))


def test_known_spills_are_of_cards_and_are_spills():
    for (name, _, kernel), spilled in KNOWN_SPILLS.items():
        assert card(name)
        assert "fwd" in kernel
        assert spilled > 64


def test_the_package_says_of_the_same_cards_that_it_compiles_for_them():
    assert [on.name for on in CARDS] == list(COMPILED_FOR)
