"""Prompts for comparisons: in the embedded model's grammar, and plain enough for any model."""

from __future__ import annotations

DEFAULT_PROMPTS: tuple[str, ...] = (
    "a green dragon flying left over the sea at night",
    "a red fish bouncing over the sea at night",
    "an orange helicopter moving away over the sea",
    "a big blue heart bouncing in space",
    "a yellow butterfly flying up over the sea at night",
    "a purple bus flying left in a cloudy sky",
    "a small rocket standing still over the desert",
    "a green whale circling in a forest",
    "two orange cars coming closer over a city at night",
    "a tiger flying left over the sea at night",
    "a small bee flying right over the sea",
    "an elephant flying down at sunset",
    "an orange dinosaur coming closer over a meadow",
    "a rabbit moving away over snowy mountains",
    "three yellow dragons flying up over a city at night",
    "a small yellow car flying up at sunset",
)
"""Sixteen scenes: every motion, every background, one to three subjects, plain and recoloured ones.

For the embedded model all are combinations of subject, motion and background kept out of its training.
"""
