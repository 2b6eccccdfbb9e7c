"""The plug-in of vllm-omni, against a stand-in of its interface: vllm-omni itself is not installed here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dit_accel.vllm_omni import REPLACES, register
from tests.integrations.omni_fake import Metadata, Names, Registry, Span, Video, installed

ROOT = Path(__file__).parents[2]
GRID, TEXT = (3, 8, 10), 20
OPTIONS = {"recipe": "window", "window": (1, 5, 3), "min_tokens": 1}


@pytest.fixture
def omni(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.delenv(REPLACES, raising=False)
    with installed() as registry:
        yield registry


def layer(omni: Registry, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A layer's attention, as vllm-omni makes it."""
    monkeypatch.setenv(REPLACES, "SAGE_ATTN")
    register()
    made = {"causal": False, "prefix": "blocks.0.attn", "qkv_layout": None, "backend_kwargs": OPTIONS} | changes
    return omni.class_of(Names.SAGE_ATTN).get_impl_cls()(4, 16, 0.2, num_kv_heads=4, unknown_to_us=1, **made)


def draw(tokens: int, kv_heads: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, tokens, heads, 16, generator=generator) for heads in (4, kv_heads, kv_heads))


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=0.2).transpose(1, 2)


def in_window(window: tuple[int, int, int]) -> torch.Tensor:
    """Which pairs a window of frames, rows and columns shows, moved inwards at a border; text, in front, and padding,
    behind, see and are seen."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in GRID))
    tokens = TEXT + len(places) + 4
    wide, sizes = torch.tensor(window), torch.tensor(GRID)
    first = (places - wide // 2).clamp_min(0).minimum(sizes - wide)
    near = ((places[None] >= first[:, None]) & (places[None] < (first + wide)[:, None])).all(-1)
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    seen[TEXT : TEXT + len(places), TEXT : TEXT + len(places)] = near
    return seen


def test_nothing_happens_unasked(omni: Registry) -> None:
    register()
    assert omni.paths == {}


def test_a_name_that_vllm_omni_has_not(omni: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPLACES, "sage")
    with pytest.raises(ValueError, match=r"must name a backend of vllm-omni \(TORCH_SDPA, SAGE_ATTN\), got 'sage'"):
        register()


def test_registering_twice_changes_nothing(omni: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPLACES, "SAGE_ATTN")
    register()
    register()
    assert omni.paths == {Names.SAGE_ATTN: "dit_accel.vllm_omni.backend.SparseBackend"}
    backend = omni.class_of(Names.SAGE_ATTN)
    assert backend.get_name() == "DIT_ACCEL"
    assert backend.get_supported_head_sizes() == []
    assert backend.supports_attention_mask()
    assert backend.get_metadata_cls() is Metadata


def test_a_call_with_its_grid_is_sparse(omni: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text before the latents and padding behind them are read in full; a window of the grid is exact to the token."""
    one = layer(omni, monkeypatch)
    tokens = TEXT + 240 + 4
    q, k, v = draw(tokens)
    out = one.forward(q, k, v, Metadata(video_layout=Video(TEXT, GRID)))
    summary = one.summary()
    assert (summary.sparse_calls, summary.dense_calls) == (1, {})
    assert summary.layers[0].name == "blocks.0.attn"
    assert (out.double() - dense(q, k, v)).abs().max() > 0.01
    torch.testing.assert_close(out.double(), dense(q, k, v, in_window((1, 5, 3))), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_padding_is_hidden_and_heads_are_shared(omni: Registry, monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    one = layer(omni, monkeypatch, backend_kwargs={"recipe": "pooled", "density": 1.0, "min_tokens": 1})
    q, k, v = draw(TEXT + 240 + 4, kv_heads)
    mask = torch.ones(2, TEXT + 240 + 4, dtype=torch.bool)
    mask[:, -4:] = False
    out = one.forward(q, k, v, Metadata(mask, Video(TEXT, GRID)))
    assert one.summary().sparse_calls == 1
    torch.testing.assert_close(out.double(), dense(q, k, v, mask[:, None, None]), atol=1e-5, rtol=0)
    k[:, -4:], v[:, -4:] = 1e4, torch.nan
    torch.testing.assert_close(one.forward(q, k, v.nan_to_num(7.0), Metadata(mask, Video(TEXT, GRID))), out)


def test_references_are_grids_of_their_own(omni: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    one = layer(omni, monkeypatch, backend_kwargs={"recipe": "pooled", "density": 0.3, "min_tokens": 1})
    spans = (Span(TEXT, (1, 8, 10), "reference"), Span(TEXT + 100, GRID, "target"))
    q, k, v = draw(TEXT + 100 + 240)
    out = one.forward(q, k, v, Metadata(video_layout=Video(used_len=TEXT + 340, video_spans=spans)))
    assert one.summary().sparse_calls == 1
    assert out.isfinite().all()


CASES: dict[str, tuple[Any, Any, str]] = {
    "no metadata": (None, {}, "the latent grid is unknown"),
    "no grid": (Metadata(), {}, "the latent grid is unknown"),
    "two targets": (
        Metadata(video_layout=Video(video_spans=(Span(0, (1, 4, 4), "target"), Span(16, (1, 4, 4), "target")))),
        {},
        "the latent grid is unknown",
    ),
    "a part of the sequence": (Metadata(video_layout=Video(TEXT, (9, 9, 9))), {}, "260 tokens do not hold"),
    "short": (
        Metadata(video_layout=Video(TEXT, GRID)),
        {"backend_kwargs": {"recipe": "pooled"}},
        "260 tokens, too few to gain (below 8192)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_known_stays_dense(name: str, omni: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, changes, reason = CASES[name]
    one = layer(omni, monkeypatch, **changes)
    q, k, v = draw(TEXT + 240, kv_heads=2)
    torch.testing.assert_close(one.forward(q, k, v, metadata).double(), dense(q, k, v), atol=1e-5, rtol=0)
    (found,) = one.summary().dense_calls
    assert found.startswith(reason)


def test_a_causal_layer_stays_causal(omni: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    one = layer(omni, monkeypatch, causal=True)
    q, k, v = draw(260)
    triangle = torch.ones(260, 260, dtype=torch.bool).tril()
    torch.testing.assert_close(one.forward(q, k, v).double(), dense(q, k, v, triangle), atol=1e-5, rtol=0)
    assert one.summary().dense_calls == {"causal attention": 1}


def test_layers_and_requests_share_no_plan(omni: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says whose request a call is: another call with other numbers must not read the first one's plan."""
    options = {"recipe": "mass", "density": 0.3, "min_tokens": 1}
    one, two = (layer(omni, monkeypatch, backend_kwargs=options) for _ in range(2))
    first, second = draw(TEXT + 240), tuple(x.flip(1) for x in draw(TEXT + 240))
    metadata = Metadata(video_layout=Video(TEXT, GRID))
    one.forward(*first, metadata)
    assert one.forward(*second, metadata).equal(two.forward(*second, metadata))
    assert one.summary().layers[0].plans_made == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipe": "fast"}, "The recipe has a reuse of blocks' results"),
        ({"densety": 0.1}, "has no option 'densety'"),
        ({"backend": "none"}, "Unknown backend 'none'"),
    ],
)
def test_options_that_cannot_be(
    omni: Registry, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        layer(omni, monkeypatch, backend_kwargs=options)


def test_the_entry_point_imports_nothing() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm_omni.general_plugins"]\ndit_accel = "dit_accel.vllm_omni:register"\n' in text
    code = "import sys; from dit_accel.vllm_omni import register; register(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "False\n", ran.stderr
