"""Real transformer architectures with random weights, built where they run: nothing is downloaded.

For measuring speed: the time of a forward depends on shapes and dtypes, not on what the weights have learned.
Configs are those of the published checkpoints, as diffusers' conversion scripts and class defaults give them.
"""

from .architecture import Architecture, cast, first_output, materialise
from .images import IMAGE_ARCHITECTURES
from .videos import VIDEO_ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture", "architecture", "cast", "first_output", "materialise"]

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for architecture in (*VIDEO_ARCHITECTURES, *IMAGE_ARCHITECTURES)
}


def architecture(name: str) -> Architecture:
    """A known architecture.

    Raises:
        ValueError: unknown name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"Unknown architecture {name!r}; known are {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]
