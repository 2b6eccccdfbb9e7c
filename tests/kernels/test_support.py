"""What is said of GPUs that nobody here has, and which kernels they are kept from."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.kernels.attention import variants
from dit_accel.kernels.common import capability
from dit_accel.kernels.common.choice import Case
from dit_accel.kernels.common.support import support
from dit_accel.kernels.quantized.api import why_not_quantized

GPU = torch.device("cuda", 0)


@pytest.fixture
def amd(monkeypatch):
    """An MI250X: its numbers are those of Hopper."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(capability, "compute_capability", lambda index: (9, 0))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(gcnArchName="gfx90a:sramecc+:xnack-", shared_memory_per_block=65536),
    )


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((9, 0), "tested: the kernels were run on sm_90"),
        ((8, 9), "untested: the kernels compile for sm_89, and were not run there"),
        ((12, 0), "untested: the kernels compile for sm_120, and were not run there"),
        ((12, 1), "untested: the kernels were neither compiled for sm_121 nor run there"),
    ],
)
def test_each_gpu_is_told_what_is_known_of_it(numbers, said, monkeypatch):
    monkeypatch.setattr(capability, "compute_capability", lambda index: numbers)
    assert support(GPU) == said


def test_amds_architecture_has_no_options(amd):
    assert support(GPU) == "untested: the kernels were neither compiled for gfx90a nor run there"


def test_without_a_gpu_torch_code_runs():
    assert support(torch.device("cpu")) == "tested: the torch backend"


def test_an_amd_gpu_runs_no_kernel_of_nvidias(amd, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert variants._why_not_gluon(SimpleNamespace(is_cuda=True)) == "it is for NVIDIA's GPUs"
    case = Case(GPU, torch.bfloat16, 128, (128, 64))
    monkeypatch.setattr(capability, "_FA4_INSTALLED", True)
    assert capability.why_not_fa4(case) == "flash-attn-4 is for NVIDIA's GPUs"
    assert capability.why_not_triton(case) is None
    assert why_not_quantized(case, "int8") is None
    assert why_not_quantized(case, "int8_fp8").startswith("FP8 is for NVIDIA's GPUs")


def test_small_numbers_of_capability_are_amds_own(amd, monkeypatch):
    """An architecture of RDNA that begins with a 7 would be too old for NVIDIA."""
    monkeypatch.setattr(capability, "compute_capability", lambda index: (7, 5))
    assert capability.why_not_kernels(Case(GPU)) is None
    monkeypatch.setattr(torch.version, "hip", None)
    assert "8.0 or newer, got 7.5" in capability.why_not_kernels(Case(GPU))


def test_shared_memory_is_read_where_each_maker_says_it(amd, monkeypatch):
    capability.shared_memory.cache_clear()
    assert capability.shared_memory(0) == 65536
    capability.shared_memory.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    found = SimpleNamespace(shared_memory_per_block=49152, shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    assert capability.shared_memory(0) == 101376
    capability.shared_memory.cache_clear()
