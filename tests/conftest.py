"""Test set-up: no network, interpreted Triton without a GPU, a printed reason for GPU skips, and how many examples the
property tests draw."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent

if not torch.cuda.is_available():
    # Triton reads this once, at its first import.
    os.environ["TRITON_INTERPRET"] = "1"

# How many examples: 20 unless asked for, and in CI always the same ones. `--hypothesis-profile deep` looks for longer.
EXAMPLES = int(os.environ.get("DIT_ACCEL_EXAMPLES", "20"))
_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=EXAMPLES, derandomize=True, database=None, **_SHARED)
settings.register_profile("usual", max_examples=EXAMPLES, **_SHARED)
settings.register_profile("deep", max_examples=50 * EXAMPLES, **_SHARED)
settings.load_profile("ci" if os.environ.get("CI") else "usual")

# Files whose tests take ten seconds or more in all, on one core; `make check` leaves them out.
SLOW = frozenset(
    (
        "benchmarking/test_reuse_front",
        "benchmarking/test_verify_presets",
        "cli/test_bad_input",
        "cli/test_batch",
        "cli/test_bench_shared",
        "cli/test_calibrate",
        "cli/test_commands",
        "cli/test_compare_inspect",
        "cli/test_finetune",
        "cli/test_finetune_shared",
        "cli/test_generate_inputs",
        "cli/test_going_on",
        "cli/test_output",
        "cli/test_processes",
        "cli/test_tune",
        "cli/test_verify",
        "cli/test_waiting",
        "integrations/test_comfyui",
        "kernels/test_against",
        "kernels/test_block_mass",
        "kernels/test_cards",
        "kernels/test_compiled",
        "kernels/test_fuzz_operator",
        "kernels/test_gate",
        "kernels/test_hopper_compiled",
        "kernels/test_launch_configs",
        "kernels/test_linear_branch",
        "kernels/test_pair_protocol",
        "kernels/test_plus_linear_branch",
        "kernels/test_ptx",
        "kernels/test_pyramid",
        "kernels/test_quantized",
        "kernels/test_query_pairs",
        "kernels/test_rectified",
        "kernels/test_selection",
        "kernels/test_selection_pairs",
        "kernels/test_triton",
        "kernels/test_tuning",
        "patches/test_compose",
        "patches/test_controls",
        "patches/test_families",
        "patches/test_families_cached",
        "patches/test_families_progress",
        "patches/test_families_special",
        "patches/test_fingerprint",
        "patches/test_memory",
        "patches/test_modular",
        "patches/test_passthrough",
        "patches/test_repeated_blocks",
        "patches/test_reuse",
        "patches/test_reuse_compose",
        "patches/test_reuse_families",
        "patches/test_reuse_runs",
        "patches/test_run_identity",
        "patches/test_ring",
        "patches/test_ring_kept",
        "patches/test_ring_learned",
        "patches/test_tasks",
        "patches/test_together",
        "patches/test_trained_in_parallel",
        "patches/test_ulysses",
        "pipelines/test_architectures",
        "pipelines/test_call_defaults",
        "pipelines/test_companion_models",
        "pipelines/test_embedded",
        "pipelines/test_training_examples",
        "properties/test_compositions",
        "properties/test_runs",
        "quality/test_compare",
        "quality/test_report_in_a_browser",
        "stages/test_grid_rules",
        "stages/test_head_rules",
        "stages/test_invariants",
        "stages/test_tile_simulator",
        "stages/test_window",
        "test_backends",
        "test_docs_code",
        "test_docs_in_a_browser",
        "test_extending_examples",
        "test_import",
        "training/test_adapter",
        "training/test_adapter_storage",
        "training/test_clipped_softmax",
        "training/test_few_steps",
        "training/test_finetune",
        "training/test_gradients",
        "training/test_lent",
        "training/test_learned_gate",
        "training/test_linear_branch_stage",
        "training/test_origin",
        "training/test_noise",
        "training/test_published",
        "training/test_routed_heads",
        "training/test_runs",
        "training/test_users_lora",
        "training/test_vsa",
        "tuning/test_tune",
        "ui/test_page",
        "ui/test_studio",
    )
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(TESTS).with_suffix("").as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; run with `pytest -m gpu` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def _collects_what_is_new() -> None:
    """What was made before a module's tests takes no part in their collections of garbage: torch, diffusers and some
    thousand tests are millions of objects, at which each collection would look."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _casts_on_every_cpu() -> Iterator[None]:
    """Autoencoders of tests are cast as asked, also on a CPU that emulates the dtype: they are small."""
    from dit_accel.acceleration import decoding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "emulates", lambda _dtype: False)
        yield


@pytest.fixture(autouse=True)
def _gives_the_seam_back() -> Iterator[None]:
    """Each test ends its patches. What it leaves would end in the middle of another test, whenever it is collected."""
    yield
    seam = sys.modules.get("dit_accel.patches.seam")
    if seam is None or not seam._replacements:
        return
    gc.collect()
    seam.restore_unused()
    assert not seam._replacements, f"this test, or one before it, left diffusers patched: {sorted(seam._replacements)}"


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, otherwise the CPU (Triton interpreted)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
