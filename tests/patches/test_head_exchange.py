"""Ulysses' exchange by itself: what comes where, with gradients, and how often it is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.patches.exchange_ranks import CASES, exchanged
from tests.patches.ulysses_ranks import ended


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[str, dict[str, Any]]]:
    """What each process found."""
    path = tmp_path_factory.mktemp("ranks")
    assert ended(request.param, exchanged, path) == [0] * request.param
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_tokens_come_in_the_models_order_and_go_back_with_their_gradients(ranks: Any, name: str) -> None:
    for found in ranks:
        one = found[name]
        assert torch.equal(one["there"], one["expected"])
        assert torch.equal(one["back"], one["mine"])
        assert torch.equal(one["as they came"], one["mine"])
        assert torch.equal(one["gradient"], one["expected gradient"])
        assert one["heads side by side"]


@pytest.mark.parametrize("name", ["one stream", "text and latents"])
def test_a_tensor_is_copied_once_on_each_way(ranks: Any, name: str) -> None:
    for found in ranks:
        assert found[name]["copies"] == (1.0, 1.0)
