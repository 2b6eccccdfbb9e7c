"""The caption grammar of the embedded model: what a scene is, what it is called, which scenes are held out.

A scene is one subject with a colour, a count, a size, a motion and a background. `caption` writes it as a
sentence of the grammar; `vocabulary` lists every word the grammar can produce; `is_held_out` splits the
combinations.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """One animated sprite. `codepoint` names its file, `facing` is -1 when it looks left, +1 right, 0 ahead.

    `hue` is the name of the drawn colour when the sprite may be recoloured, else None.
    """

    name: str
    plural: str
    codepoint: str
    facing: int
    hue: str | None = None


SUBJECTS: tuple[Subject, ...] = (
    Subject("dragon", "dragons", "1f409", -1, "green"),
    Subject("dinosaur", "dinosaurs", "1f996", -1, "green"),
    Subject("whale", "whales", "1f40b", -1, "blue"),
    Subject("fish", "fish", "1f41f", -1, "blue"),
    Subject("bird", "birds", "1f426", -1, "red"),
    Subject("octopus", "octopuses", "1f419", 0, "orange"),
    Subject("crab", "crabs", "1f980", 0, "red"),
    Subject("car", "cars", "1f697", -1, "red"),
    Subject("bus", "buses", "1f68c", -1, "orange"),
    Subject("heart", "hearts", "2764-fe0f", 0, "red"),
    Subject("star", "stars", "2b50", 0, "yellow"),
    Subject("monster", "monsters", "1f47e", 0, "purple"),
    Subject("butterfly", "butterflies", "1f98b", 0, "orange"),
    Subject("helicopter", "helicopters", "1f681", -1, "orange"),
    Subject("penguin", "penguins", "1f427", -1),
    Subject("panda", "pandas", "1f43c", 0),
    Subject("tiger", "tigers", "1f405", -1),
    Subject("horse", "horses", "1f40e", -1),
    Subject("cat", "cats", "1f408", -1),
    Subject("elephant", "elephants", "1f418", -1),
    Subject("owl", "owls", "1f989", 0),
    Subject("ghost", "ghosts", "1f47b", 0),
    Subject("robot", "robots", "1f916", 0),
    Subject("rocket", "rockets", "1f680", 1),
    Subject("airplane", "airplanes", "2708-fe0f", 1),
    Subject("rabbit", "rabbits", "1f407", -1),
    Subject("bee", "bees", "1f41d", -1),
    Subject("ladybug", "ladybugs", "1f41e", 0),
)

# Hue of each colour word on the unit circle (red = 0); sprites are rotated in HSV so that their drawn hue
# lands here.
COLORS: dict[str, float] = {
    "red": 0.985,
    "orange": 0.075,
    "yellow": 0.145,
    "green": 0.375,
    "blue": 0.575,
    "purple": 0.755,
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)

BACKGROUNDS: tuple[tuple[str, ...], ...] = (
    ("over the sea at night", "above the sea at night", "over the dark sea at night"),
    ("over the sea", "above the sea", "over the blue sea"),
    ("over a meadow", "above a meadow", "over green grass"),
    ("over the desert", "above the desert", "in the desert"),
    ("in a cloudy sky", "in the sky", "among the clouds"),
    ("in space", "in space among the stars", "in outer space"),
    ("over snowy mountains", "above snowy mountains", "in the snow"),
    ("over a city at night", "above a city at night", "over the city at night"),
    ("in a forest", "in the forest", "in the woods"),
    ("at sunset", "in front of a sunset", "in a sunset"),
)

MOTIONS: tuple[tuple[str, ...], ...] = (
    ("flying left", "moving left", "going left", "moving to the left"),
    ("flying right", "moving right", "going right", "moving to the right"),
    ("flying up", "moving up", "rising", "going up"),
    ("flying down", "moving down", "falling", "going down"),
    ("coming closer", "approaching", "zooming in"),
    ("moving away", "flying away", "zooming out"),
    ("circling", "flying in a circle", "moving in a circle"),
    ("bouncing", "jumping", "hopping"),
    ("standing still", "staying still", "floating still"),
)
MOTION_NAMES: tuple[str, ...] = ("left", "right", "up", "down", "closer", "away", "circle", "bounce", "still")
BACKGROUND_NAMES: tuple[str, ...] = (
    "night sea", "sea", "meadow", "desert", "sky", "space", "snow", "night city", "forest", "sunset",
)  # fmt: skip
SIZES: tuple[str, ...] = ("small", "", "big")
COUNTS: tuple[str, ...] = ("one", "two", "three")


@dataclass(frozen=True)
class Scene:
    """Indices into the tables above. `color` is None for the colour the sprite was drawn in."""

    subject: int
    color: int | None
    background: int
    motion: int
    count: int = 1
    size: int = 1


def is_held_out(subject: int, background: int, motion: int) -> bool:
    """Whether this combination is kept out of training (one in ten, by a hash)."""
    name = f"{SUBJECTS[subject].name}|{BACKGROUND_NAMES[background]}|{MOTION_NAMES[motion]}"
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Draws one scene from the training combinations, or from the held-out ones."""
    while True:
        subject = rng.randrange(len(SUBJECTS))
        background = rng.randrange(len(BACKGROUNDS))
        motion = rng.randrange(len(MOTIONS))
        if is_held_out(subject, background, motion) == held_out:
            break
    color = rng.randrange(len(COLOR_NAMES)) if SUBJECTS[subject].hue is not None else None
    count = rng.choices((1, 2, 3), (0.72, 0.18, 0.10))[0]
    size = rng.choices((0, 1, 2), (0.15, 0.65, 0.2))[0]
    return Scene(subject, color, background, motion, count, size)


def caption(scene: Scene, rng: random.Random | None = None, moving: bool = True) -> str:
    """One sentence for the scene: the canonical one without `rng`, otherwise a random paraphrase.

    A still picture shows no motion: without `moving` none is said.
    """
    subject = SUBJECTS[scene.subject]
    motions, places = MOTIONS[scene.motion], BACKGROUNDS[scene.background]
    words: list[str] = []
    if scene.count == 1:
        words.append("one" if rng is not None and rng.random() < 0.15 else "a")
    else:
        words.append(COUNTS[scene.count - 1])
    if SIZES[scene.size]:
        words.append(SIZES[scene.size])
    if scene.color is not None:
        color = COLOR_NAMES[scene.color]
        # The drawn colour may go unsaid, so that "a dragon" means the usual green one.
        if not (rng is not None and color == subject.hue and rng.random() < 0.5):
            words.append(color)
    words.append(subject.name if scene.count == 1 else subject.plural)
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    motion = motions[0] if rng is None else rng.choice(motions)
    place = places[0] if rng is None else rng.choice(places)
    body = " ".join(words)
    if not moving:
        return f"{body} {place}"
    if rng is not None and rng.random() < 0.15:
        return f"{place} , {body} {motion}"
    return f"{body} {motion} {place}"


def parse_words(text: str) -> list[str]:
    """Splits like the tokenizer does: lower case, runs of letters, punctuation dropped."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted; special tokens are not included."""
    words: set[str] = {"a", "an", *COLOR_NAMES, *COUNTS, *(s for s in SIZES if s)}
    for subject in SUBJECTS:
        words.update((subject.name, subject.plural))
    for group in (*MOTIONS, *BACKGROUNDS):
        for phrase in group:
            words.update(parse_words(phrase))
    return sorted(words)
