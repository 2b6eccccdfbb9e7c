"""Rows of whole runs of the embedded model, for reuse_front.py: each set answers one question."""

from __future__ import annotations

from itertools import product

REUSE = (
    "mass:density=.3",
    "mass:density=.3,dense_fraction=.1",
    *(f"dense+first_block:threshold={threshold}" for threshold in (0.05, 0.08, 0.12, 0.2)),
    "dense+energy:threshold=.15",
    "dense+energy:threshold=.3",
    "dense+energy:threshold=.5,max_skipped=3",
    "dense+forecast:interval=2",
    "dense+forecast:interval=3",
    "dense+listed:computed=(0,1,2,3,4,6,8,11,14,17,20,23,26,29),order=1",
    "dense+listed:computed=(0,1,2,4,7,10,14,18,22,26,29),order=1",
    "dense+listed:computed=(0,1,2,5,9,14,19,24,29),order=1",
    "mass:density=.3,dense_fraction=.1+energy:threshold=.3",
    "mass:density=.3,dense_fraction=.1+energy:threshold=.5,max_skipped=3",
    "balanced",
    "fast",
    "max",
    "balanced:threshold=.2",
    "fast:threshold=.45",
)

PROFILES = ("balanced", "fast", "max")

# The front of the docs: steps skipped alone, sparse attention alone, both. Lists are of 30 steps, and serve 10 too.
FAST_LIST = "listed:computed=(0,1,2,4,6,9,12,16,20,24,27,29),order=1"
NINE_LIST = "listed:computed=(0,1,3,6,10,15,20,24,27),order=1,slope=.5,correction=1"
FRONT = (
    "mass:density=.3,means=True@schedule.own_dense=True",
    "mass:density=.3",
    "mass:density=.25,dense_fraction=.1",
    "mass:density=.15,dense_fraction=.1",
    "dense+first_block:threshold=.05",
    "dense+first_block:threshold=.12",
    "dense+energy:threshold=.3",
    f"dense+{FAST_LIST}",
    f"dense+{NINE_LIST}",
    "mass:density=.2",
    *(f"carried:density={density}{means}" for density in (0.2, 0.1) for means in ("", ",means=True")),
    "mass:density=.25,dense_fraction=.1+first_block:threshold=.12",
    "mass:density=.25,dense_fraction=.1+energy:threshold=.3",
    f"ear:density=.26,dense_fraction=0.0@schedule.choose_every=1+{NINE_LIST}",
    f"mass:density=.25,dense_fraction=.034+{NINE_LIST}",
    *(f"{name}:density={density},means=False" for name, density in (("balanced", 0.3), ("fast", 0.25), ("max", 0.25))),
    *PROFILES,
)

# What ranks pairs of blocks, and which rows share a budget; the laboratory's best, with and without block means.
BEST = "ear:density={}"
SCORES = (
    *(f"mass:density={density}" for density in (0.1, 0.12, 0.15, 0.2)),
    *(BEST.format(density) for density in (0.1, 0.12, 0.15, 0.2)),
    *(f"ear:density={density},budget='row'" for density in (0.1, 0.2)),
    *(f"mass:density={density}@select.budget=layer" for density in (0.1, 0.2)),
    *(f"ear:density={density},budget='head'" for density in (0.1, 0.2)),
    *(f"mass:density={density}@compensate=residual" for density in (0.1, 0.2)),
    *(BEST.format(density) + "@compensate=residual" for density in (0.1, 0.15, 0.2)),
    *(f"mass:density={density},block=(64,64)" for density in (0.1, 0.2)),
    *(BEST.format(density) + ",block=(64,64)" for density in (0.08, 0.1, 0.2)),
    *(f"pooled:density={density}" for density in (0.1, 0.2)),
)

# The dense phase: its length, later searches (each a dense step), a density that falls, dense layers. Of 30 steps the
# shares make 1, 2, 3 and 4 dense; a fifth is in the set of scores.
SHARES = (0.034, 0.067, 0.1, 0.134)
LATER = "@schedule.refresh_at=(0.0,{})"
# Early steps at a higher density in place of dense ones, planned anew at a fifth and at half of the run.
FALLING = ("((0.0,0.5),(0.19,0.5),(0.2,0.15),(0.5,0.1))", "((0.0,0.4),(0.19,0.4),(0.2,0.2),(0.5,0.1))")
DENSE_PHASE = (
    *(BEST.format(density) + f",dense_fraction={share}" for density, share in product((0.1, 0.2), SHARES)),
    *(BEST.format(0.3) + f",dense_fraction={share}" for share in SHARES[:3]),
    *(
        BEST.format(density) + f",dense_fraction={share}" + LATER.format(later)
        for density, share in product((0.1, 0.2), (0.034, 0.1))
        for later in ("0.2", "0.4", "0.2,0.5")
    ),
    *(
        BEST.format(0.1) + f",dense_fraction={share}" + LATER.format("0.2,0.5") + f",schedule.density_points={points}"
        for share, points in product((0.034, 0.1), FALLING)
    ),
    *(
        BEST.format(density) + f",dense_fraction=.1@schedule.dense_layers={layers}"
        for density, layers in product((0.1, 0.2), ("(0,)", "(-1,)"))
    ),
    *(f"mass:density={density},dense_fraction=.1" for density in (0.1, 0.2, 0.3)),
)

# Windows of about 0.28 of the blocks, exact to the token, in whole blocks, and with means of what they leave out.
FAR = ("", "@select.whole=True", *(f"@select.whole=True,compensate=residual,compensate.tokens={n}" for n in (0, 16, 8)))
WINDOWS = tuple(
    name + far
    for name in ("gna:window=(1.0,.4,.4)", "clear:radius=4.5,dense_fraction=.2", "sta:tile=(4,4,4),window=(2,3,3)")
    for far in FAR
)

# Blocks chosen anew between searches, from the search's masses moved by pooled scores.
ANEW = (
    *(BEST.format(density) for density in (0.1, 0.2)),
    *(BEST.format(density) + f"@schedule.choose_every={n}" for density, n in product((0.1, 0.2), (1, 2, 4, 8))),
    *(f"mass:density={density}@schedule.choose_every={n}" for density, n in product((0.1, 0.2), (1, 4))),
    *(BEST.format(density) + "@schedule.choose_every=4,compensate=residual" for density in (0.1, 0.2)),
    *(BEST.format(density) + ",block=(64,64)@schedule.choose_every=4" for density in (0.1, 0.2)),
    *(BEST.format(density) + ",dense_fraction=.1@schedule.choose_every=4" for density in (0.1, 0.2)),
)

# Fewer dense steps at the start and some later, whose difference to sparse attention is added after them; and the same
# without it. Of 30 steps the shares make 1, 2 and 3 dense, each point one more. Windows likewise.
POINTS = ("0.2,0.5", "0.2,0.35,0.55,0.75", "0.13,0.23,0.36,0.53,0.73")
_LATER = "schedule.dense_refresh=True,schedule.plan_in_dense_phase=True,schedule.refresh_at=(0.0,{})"
CARRIED = (
    *(
        BEST.format(density) + f",dense_fraction={share}@schedule.refresh_at=(0.0,{points}){more}"
        for density, share, points in product((0.1, 0.2), (0.034, 0.067, 0.1), POINTS)
        for more in (",compensate=carried", "")
    ),
    *(BEST.format(density) + ",dense_fraction=.2@compensate=carried" for density in (0.1, 0.2)),
    *(
        f"gna:window=(1.0,.4,.4),dense_fraction={share}@{_LATER.format(points)},compensate=carried"
        for share, points in product((0.067, 0.1), POINTS)
    ),
)

# Of those the best, with blocks of 64 queries, densities between, and a difference that weighs less sooner or later.
_FINER = (
    "ear:density={},block={},dense_fraction=.034@schedule.refresh_at=(0.0,{}),compensate=carried,compensate.lasts={}"
)
CARRIED_FINER = (
    *(
        _FINER.format(density, block, points, 0.8)
        for density, block, points in product((0.1, 0.15, 0.2), ("(64,64)", "(128,64)"), (POINTS[0], POINTS[2]))
        if density != 0.2 or block == "(64,64)"
    ),
    *(_FINER.format(0.1, "(64,64)", points, lasts) for points, lasts in product((POINTS[0], POINTS[2]), (0.4, 1.0))),
    *(f"ear:density={density},block=(64,64)" for density in (0.1, 0.2)),
    "mass:density=.1",
    "mass:density=.2",
)

# How a list goes on between its steps, attention dense: the line's slope, and what is made good. Lists of 9 steps with
# and without the last step, which goes a tenth as far as the one before; of 8 and 10; those of the profiles.
ENDING = "(0,1,2,4,8,13,18,23,27)"
LISTS_OF_NINE = (
    "(0,1,2,4,7,11,17,23,29)",
    "(0,1,2,4,7,11,16,21,26)",
    "(0,1,2,5,9,14,19,23,27)",
    "(0,1,3,6,10,15,20,24,27)",
    "(0,1,3,6,11,17,22,26,28)",
    "(0,1,2,4,8,13,19,24,28)",
)
OTHER_LISTS = (
    "(0,1,3,7,12,18,23,27)",
    "(0,1,2,4,8,14,20,26)",
    "(0,1,4,9,15,21,26)",
    "(0,1,2,4,8,12,16,20,24,27)",
    "(0,1,3,6,10,14,19,23,26,28)",
    "(0,1,2,4,6,9,12,16,20,24,27,29)",
    "(0,1,2,4,6,9,12,15,18,21,24,27)",
    "(0,1,2,3,4,5,6,8,10,12,14,17,20,23,26,28,29)",
)
CONTINUED = (
    *(
        f"dense+listed:computed={ENDING},order=1,slope={slope},correction={correction}"
        for slope, correction in ((1, 0), (1, 1), (0.7, 1), (0.5, 1), (0.5, 0.7), (0.5, 0), (0.3, 1), (0, 1))
    ),
    *(
        f"dense+listed:computed={computed},order=1{more}"
        for computed in (*LISTS_OF_NINE, *OTHER_LISTS)
        for more in ("", ",slope=.5,correction=1")
    ),
)

# What `max` could be, at about a tenth of dense: fewer steps or fewer pairs; pairs chosen anew between searches, or
# something in place of those that are left out; one dense step in place of two.
_CONTINUED = "order=1,slope=.5,correction=1"
_ANEW = ",schedule.choose_every=1"
DRAFT_LISTS = {
    0.15: ENDING,
    0.185: "(0,1,3,7,12,18,23,27)",
    0.18: "(0,1,2,4,9,15,21,26)",
    0.22: "(0,1,4,9,15,21,26)",
    0.12: "(0,1,2,4,8,12,16,20,24,27)",
}
DRAFTS = (
    *(
        BEST.format(density)
        + f",dense_fraction=0.034@schedule.refresh_at=(0.0,){more}+listed:computed={computed},{_CONTINUED}"
        for (density, computed), more in product(
            DRAFT_LISTS.items(), ("", _ANEW, ",compensate=residual", _ANEW + ",compensate=residual")
        )
    ),
    *(
        BEST.format(density)
        + f",dense_fraction=0.0@schedule.refresh_at=(0.0,){more}+listed:computed={computed},{_CONTINUED}"
        for (density, computed), more in product(((0.26, ENDING), (0.3, "(0,1,3,7,12,18,23,27)")), ("", _ANEW))
    ),
    *(
        f"{name}:density={density},dense_fraction=0.034@schedule.refresh_at=(0.0,){_ANEW}"
        f"+listed:computed={ENDING},order=1,slope={slope},correction={correction}"
        for name, density, slope, correction in (
            *product(("ear",), (0.15,), (0.7, 1), (1,)),
            ("ear", 0.15, 0.5, 0),
            ("ear", 0.15, 0.5, 0.7),
            ("ear", 0.12, 0.5, 1),
            ("mass", 0.15, 0.5, 1),
        )
    ),
    # `fast` and `balanced` likewise.
    *(
        f"{name}@schedule.choose_every={anew},reuse.computed={computed},reuse.slope=.5,reuse.correction=1"
        for name, computed in (
            ("fast", "(0,1,2,4,6,9,12,15,18,21,24,27)"),
            ("balanced", "(0,1,2,3,4,5,6,8,10,12,14,16,18,20,22,25,28)"),
        )
        for anew in (0, 1)
    ),
    "fast",
    "balanced",
    *(f"dense+listed:computed={computed},{_CONTINUED}" for computed in DRAFT_LISTS.values()),
    f"max:density=.15@reuse.computed={ENDING}",
    "max:density=.15",
    "max",
)

# Eight steps of 30 at .105 of dense: which, and how they go on.
_EIGHT = "(0,1,3,7,12,18,23,27)"
EIGHT = (
    *(
        f"{name}:density=.185,dense_fraction=0.034@schedule.choose_every=1"
        f"+listed:computed={computed},order=1,slope={slope},correction={correction}"
        for name, computed, slope, correction in (
            *product(("ear",), (_EIGHT,), (0.3, 0.5, 0.7, 1), (1,)),
            *product(("ear",), (_EIGHT,), (0.5, 1), (0, 0.7)),
            *product(
                ("ear",),
                (
                    "(0,1,3,6,11,17,22,27)",
                    "(0,1,3,7,12,18,24,28)",
                    "(0,1,3,7,12,17,22,26)",
                    "(0,1,2,5,10,16,22,27)",
                    "(0,1,4,8,13,18,23,27)",
                ),
                (0.5,),
                (1,),
            ),
            ("mass", _EIGHT, 0.5, 1),
        )
    ),
    f"dense+listed:computed={_EIGHT},order=1,slope=.5,correction=1",
    "max:density=.2",
)

# One mean for each block left out, by its kernel, and what is carried over means.
MEANS = (
    *(BEST.format(density) + more for density in (0.1, 0.2, 0.3) for more in ("", "@compensate=residual")),
    *(f"carried:density={density}{more}" for density in (0.1, 0.2) for more in ("", ",means=True")),
)

SETS = {
    "reuse": REUSE,
    "profiles": PROFILES,
    "front": FRONT,
    "scores": SCORES,
    "dense_phase": DENSE_PHASE,
    "windows": WINDOWS,
    "anew": ANEW,
    "carried": CARRIED,
    "carried_finer": CARRIED_FINER,
    "means": MEANS,
    "continued": CONTINUED,
    "drafts": DRAFTS,
    "eight": EIGHT,
}
