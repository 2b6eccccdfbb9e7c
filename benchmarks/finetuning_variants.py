"""The trainings that ``sparse_finetuning.py`` compares: methods, a dense control, and one thing changed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

METHOD_STEPS = 300
ABLATION_STEPS = 150


@dataclass(frozen=True)
class Variant:
    """One training.

    Attributes:
        recipe, options, fields: of the patch: a preset, its options, and fields changed after that.
        objective: a name from ``dit_accel.training.objective.OBJECTIVES``.
        train: what is trained.
        rate: factor on the learning rate.
        steps: how long; None trains until the time is over, on the first GPU.
        judged: keeps track of clips against the dense model's, and makes those of which the distance and the
            accuracy are measured.
        leads: compiles its kernels while the clips are being encoded, for the others too.
        density_start: where the density begins that is the recipe's after half of the steps.
        searched: mean density of the blocks to share out among heads by measured errors before the training; None
            keeps one density for all.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "flow"
    train: str = "attention"
    rate: float = 1.0
    steps: int | None = ABLATION_STEPS
    judged: bool = False
    leads: bool = False
    density_start: float | None = None
    searched: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


# Tiles of 16 tokens: 288 to choose from, where blocks of 64 are 72.
FINE: Mapping[str, Any] = {"block": (16, 16), "tile": (4, 2, 2)}
SLA: Mapping[str, Any] = {**FINE, "form": "all_tokens"}
# 14 and 28 of 288 blocks; with a block's own, where it is not among them, 5% and 10% of all pairs.
FIVE, TEN = 0.047, 0.096
# A search counts own blocks too.
FIVE_IN_ALL = 0.0495
SEARCH_PROMPTS = (
    "a blue penguin bouncing over a meadow",
    "two red robots flying left in space",
    "a green dragon flying left over the sea at night",
)

# At 32,760 tokens: 95 % of the blocks left out, in blocks that fast kernels take, and a control, all equally long.
LONG: dict[str, Variant] = {
    "long-sla": Variant(
        "sla",
        {"density": 0.05, "tile": (4, 4, 4), "form": "all_tokens"},
        train="all",
        steps=METHOD_STEPS,
        judged=True,
        leads=True,
    ),
    "long-sparge2": Variant(
        "sparge2",
        {"density": 0.05, "top_p": 0.05, "tile": (4, 4, 4)},
        "distill",
        train="all",
        steps=METHOD_STEPS,
        judged=True,
    ),
    "long-vsa": Variant("vsa", {"density": 0.05}, train="all", steps=METHOD_STEPS, judged=True),
    "long-dense": Variant("dense", train="all", steps=METHOD_STEPS, judged=True),
}

VARIANTS: dict[str, Variant] = {
    # Until the time is over.
    "sla-0.05": Variant(
        "sla",
        {"density": FIVE, **SLA},
        train="all",
        rate=2.0,
        steps=None,
        judged=True,
        leads=True,
        searched=FIVE_IN_ALL,
    ),
    "sla-0.05-distilled": Variant(
        "sla", {"density": FIVE, **SLA}, "distill", train="all", rate=2.5, steps=None, judged=True
    ),
    "sla-0.1": Variant("sla", {"density": TEN, **SLA}, "distill", rate=2.0, steps=None, judged=True),
    # Other methods, as their authors train them.
    "sparge2-0.1": Variant(
        "sparge2", {"density": 0.08, "top_p": 0.1, **FINE}, "distill", steps=METHOD_STEPS, judged=True
    ),
    # Tiles as deep as the clip: the disc goes through all frames, and blocks of fewer frames would all touch it.
    "clear-0.12": Variant(
        "clear",
        {"radius": 4.0},
        "clear",
        steps=METHOD_STEPS,
        judged=True,
        leads=True,
        fields={"order.shape": (8, 2, 2), "select.block": (32, 32)},
    ),
    "ssa-0.1": Variant("ssa", {"density": TEN, **FINE}, "ssa", steps=METHOD_STEPS, judged=True),
    "dense": Variant("dense", steps=METHOD_STEPS, judged=True),
    # Ablations: one thing changed in "flow", which is the paper's form trained by flow matching.
    "flow": Variant("sla", {"density": FIVE, **FINE}, leads=True),
    "no-linear-branch": Variant("ssa", {"density": FIVE, **FINE}),
    "no-negligible": Variant("sla", {"density": FIVE, "negligible_share": 0.0, **FINE}),
    "all-tokens": Variant("sla", {"density": FIVE, **SLA}),
    "distilled": Variant("sla", {"density": FIVE, **FINE}, "distill"),
    "projection-only": Variant("sla", {"density": FIVE, **FINE}, train="learned", rate=5.0),
    "all-weights": Variant("sla", {"density": FIVE, **FINE}, train="all"),
    "density-0.1": Variant("sla", {"density": TEN, **FINE}),
    "density-0.2": Variant("sla", {"density": 0.2, **FINE}),
    "annealed-from-0.3": Variant("sla", {"density": FIVE, **FINE}, density_start=0.3),
    "blocks-of-32": Variant("sla", {"density": 0.05, "block": (32, 32), "tile": (4, 4, 2)}),
    "blocks-of-64-raster": Variant("sla", {"density": 0.05}),
    **LONG,
}
