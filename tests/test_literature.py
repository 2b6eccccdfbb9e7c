"""docs/literature.md: no row without a state, no preset that is gone, and none that is missing."""

from __future__ import annotations

import re
from pathlib import Path

from dit_accel import presets
from dit_accel.recipe import AXES

PAGE = (Path(__file__).parent.parent / "docs" / "literature.md").read_text(encoding="utf-8")
STATES = ("works", "partly", "reference form", "not worth", "open")

# Every system that this package answers to.
_SYSTEMS = """
AdaSpa; PAROAttention; SLA; VMoBA; PSA; Rectified SpaAttn; CLEAR; GNA; FNA; DiNA; SparseD; PBS-Attn; Agent Attention;
SSA; MoH; Routing Transformer; Combiner; LightNet; SeerAttention; DMA; Sparsifiner; SEA; MoA; DuoAttention; Retrieval
heads; S2-Attention; SinkLoRA; Flux Attention; MASFormer; Recycled Attention; BiFormer; LongHeads; HyperAttention;
HiP; DHSA; Superlinear; Landmark attention; SCOUT; FlashVGGT; BASED; Hybrid linear study; Lightning Attention;
TransNormer; Flowformer; Kimi Linear; Local Linear Attention; Quantizable Transformers; EdgeQAT; dLLM quantisation
study; SQA; SHRP; UoE; BAM; DyMU; VFlowOpt; DyVTE; VMTC; CMAI; Fast-dLLM v2; Affine-Scaled Attention; BlockRank;
Sinks; PrFlashAttention; DiffQKV; MFA; low-rank MHSA; DaViT; Mixture-of-Transformers; FlashSVD; Long-Context Attention
Benchmark; CAB; DiTCtrl; ShotAdapter; DRA-Ctrl; DiTraj; RealisMotion; MagicTryOn; SViMo; DeT; Step-Video-T2V;
AM-Adapter; DreamVideo-2; IR-Diffusion; RefAM; BroadWay; InfEdit; HD-Painter; ViMAEdit; AttenCraft; EMMA; AFA; DAA
"""
SYSTEMS = [" ".join(name.split()) for name in _SYSTEMS.split(";")]


def rows(text: str) -> list[list[str]]:
    """Cells of every row of its tables, without heads and rules."""
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in found]
    return [row for row in cells if set(row[0]) != {"-"} and row[0] not in ("system", "preset")]


def here() -> list[str]:
    """What stands for a system in code, of all rows."""
    systems = [row[2] for row in rows(PAGE.partition("## Beside the literature")[0])]
    return [name for cell in systems for name in re.findall(r"`([^`]+)`", cell)]


def test_every_preset_and_stage_that_is_named_exists():
    names = here()
    assert len(names) > 30
    for name in names:
        axis, _, kind = name.partition("=")
        stage, _, field = name.partition(".")
        if kind:
            assert kind in AXES[axis], name
        elif field:
            owner = {"schedule": "schedule", "select": "pooled"}[stage]
            assert field in AXES[stage][owner].__dataclass_fields__, name
        else:
            assert name in presets.PRESETS, name


def test_every_preset_has_a_row():
    beside = [
        name for row in rows(PAGE.partition("## Beside the literature")[2]) for name in re.findall(r"`(\w+)`", row[0])
    ]
    assert set(presets.PRESETS) <= {*here(), *beside}
    assert set(beside) <= set(presets.PRESETS)


def test_every_row_has_a_state_and_a_reason_where_it_must():
    for row in rows(PAGE.partition("## Beside the literature")[0]):
        state = row[3]
        assert state.startswith(STATES), row
        if state.startswith(("partly", "not worth")):
            assert ":" in state or "," in state or " at these lengths" in state, f"{row[0]} gives no reason"
        assert len(row) in (4, 6), row


def test_every_system_has_one_row():
    named = [name.strip() for row in rows(PAGE.partition("## Beside the literature")[0]) for name in _names(row[0])]
    assert len(SYSTEMS) > 80
    for system in SYSTEMS:
        assert named.count(system) == 1, system


def _names(cell: str) -> list[str]:
    """Systems of a row's first cell, without the numbers of their papers."""
    return re.sub(r" \(.*?\)", "", cell).split(",")
