"""Test set-up: no network, interpreted Triton without a GPU, a printed reason for GPU skips, and how many examples the
property tests draw."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import HealthCheck, settings

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; run with `pytest -m gpu` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, otherwise the CPU (Triton interpreted)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
