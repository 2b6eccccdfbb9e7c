"""Every tiny transformer."""

from tests.tiny_flux import FLUX_MODELS
from tests.tiny_images import IMAGE_MODELS
from tests.tiny_models import TinyModel
from tests.tiny_packed import PACKED_MODELS
from tests.tiny_videos import VIDEO_MODELS
from tests.tiny_wan import WAN_MODELS

MODELS: dict[str, TinyModel] = VIDEO_MODELS | WAN_MODELS | FLUX_MODELS | IMAGE_MODELS | PACKED_MODELS
