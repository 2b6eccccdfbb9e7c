"""Pictures and videos that a pipeline starts from: read before the model is loaded, named as its call names them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a pipeline's call may name each input, the first that it has.
NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "images", "reference_images"),
    "last image": ("last_image", "image_last"),
    "mask": ("mask_image", "mask"),
    "video": ("video",),
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a pipeline is given besides a prompt.

    Attributes:
        images: PIL images: to start from, to edit, or references, in order.
        last_image: the frame to end with.
        mask: white where an image is made anew.
        video: PIL images, the frames of a video.
    """

    images: tuple[Any, ...] = ()
    last_image: Any = None
    mask: Any = None
    video: tuple[Any, ...] = ()

    @classmethod
    def read(
        cls,
        images: list[Path] | None = None,
        last_image: Path | None = None,
        mask: Path | None = None,
        video: Path | None = None,
    ) -> Inputs:
        """Read files.

        Raises:
            ValueError: a file is missing, or cannot be read as a picture or a video.
        """
        return cls(
            tuple(map(_picture, images or ())),
            None if last_image is None else _picture(last_image),
            None if mask is None else _picture(mask),
            () if video is None else _frames(video),
        )

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """As arguments of a pipeline's call.

        Raises:
            ValueError: the pipeline takes no such input.
        """
        values = {
            "image": self.images[0] if len(self.images) == 1 else list(self.images) or None,
            "last image": self.last_image,
            "mask": self.mask,
            "video": list(self.video) or None,
        }
        takes = inspect.signature(type(pipe).__call__).parameters
        found: dict[str, Any] = {}
        for kind, value in values.items():
            if value is None:
                continue
            name = next((name for name in NAMES[kind] if name in takes), None)
            if name is None:
                known = [kind for kind, names in NAMES.items() if any(name in takes for name in names)]
                raise ValueError(
                    f"{type(pipe).__name__} takes no {kind}; it takes {' and '.join(known) or 'a prompt alone'}. "
                    "Another pipeline over the same weights may: --pipeline CLASS."
                )
            # A call that names it so wants a mask for each frame.
            found[name] = [value] * len(self.video) if name == "mask" and self.video else value
        return found


def _picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"There is no picture at {path}.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {str(error).rstrip('.')}.") from error


def _frames(path: Path) -> tuple[Any, ...]:
    import imageio.v3 as iio
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"There is no video at {path}.")
    try:
        frames = tuple(Image.fromarray(frame).convert("RGB") for frame in iio.imiter(path))
    except Exception as error:  # each of its plugins has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a video: {reason.rstrip('.')}.") from error
    if not frames:
        raise ValueError(f"{path} holds no frames.")
    return frames
