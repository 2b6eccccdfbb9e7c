"""Pictures, videos, other pipelines, schedulers and LoRAs: what is read, what is refused, and what is made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from dit_accel.pipelines.encode import write_animation, write_mp4
from dit_accel.pipelines.generate import Generated, generate, output_path, save
from dit_accel.pipelines.inputs import Inputs
from dit_accel.pipelines.prepare import as_pipeline, load_loras, prepared, refuse_offload
from tests.tiny import TINY

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(FRAMES[0]).save(path)
    return path


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(FRAMES, path, 8.0, crf=0)
    return path


class Edit:
    def __call__(self, prompt, image=None, mask_image=None, last_image=None):
        pass


class TextOnly:
    def __call__(self, prompt):
        pass


def test_inputs_are_named_as_the_call_names_them(picture, clip):
    one = Inputs.read([picture], picture, picture)
    assert {name: value.size for name, value in one.arguments(Edit()).items()} == {
        "image": (48, 32),
        "mask_image": (48, 32),
        "last_image": (48, 32),
    }
    several = Inputs.read([picture, picture]).arguments(Edit())
    assert [image.mode for image in several["image"]] == ["RGB", "RGB"]
    assert Inputs.read().arguments(TextOnly()) == {}
    assert len(Inputs.read(video=clip).arguments(TINY_V2V())["video"]) == 5


class TINY_V2V:
    def __call__(self, video, prompt):
        pass


def test_what_a_pipeline_does_not_take_names_what_it_does(picture, clip):
    with pytest.raises(ValueError, match="Edit takes no video; it takes image and last image and mask"):
        Inputs.read(video=clip).arguments(Edit())
    with pytest.raises(ValueError, match="TextOnly takes no image; it takes a prompt alone"):
        Inputs.read([picture]).arguments(TextOnly())


def test_files_that_cannot_be_read(tmp_path, picture):
    (tmp_path / "text").write_text("no picture")
    with pytest.raises(ValueError, match=r"There is no picture at .*gone\.png"):
        Inputs.read([tmp_path / "gone.png"])
    with pytest.raises(ValueError, match="text cannot be read as a picture"):
        Inputs.read(mask=tmp_path / "text")
    with pytest.raises(ValueError, match="There is no video at"):
        Inputs.read(video=tmp_path / "gone.mp4")
    with pytest.raises(ValueError, match="text cannot be read as a video"):
        Inputs.read(video=tmp_path / "text")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        Inputs.read([tmp_path])


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations(suffix, tmp_path):
    path = save(Generated(FRAMES, 1.0, 8.0, True, 0), tmp_path / f"a{suffix}")
    with Image.open(path) as made:
        assert made.n_frames == 5
        assert suffix == ".webp" or abs(made.info["duration"] - 125) < 10  # a gif counts in hundredths
        made.seek(3)
        if suffix == ".webp":
            assert np.array_equal(np.asarray(made.convert("RGB")), FRAMES[3])
    with pytest.raises(ValueError, match="there are no frames"):
        write_animation([], tmp_path / "b.gif", 8.0)
    assert not (tmp_path / "b.gif").exists()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_pictures(suffix, tmp_path):
    path = save(Generated(FRAMES[:1], 1.0, 1.0, False, 0), tmp_path / f"a{suffix}")
    with Image.open(path) as made:
        assert made.size == (48, 32)
    with pytest.raises(ValueError, match=r"makes an image, saved as \.png or \.webp or \.jpg; got a\.mp4"):
        output_path(tmp_path / "a.mp4", False)
    with pytest.raises(ValueError, match=r"makes a video, saved as \.mp4 or \.gif or \.webp; got a\.png"):
        output_path(tmp_path / "a.png", True)


def test_another_pipeline_scheduler_and_loras_together(tmp_path):
    pipe = TINY["wan"].build()
    other = TINY["wan"].build().transformer
    torch.manual_seed(3)
    other.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    state = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(other).items()}
    torch.save(state, tmp_path / "pytorch_lora_weights.bin")
    plain = TINY["wan"].run(pipe)
    made = prepared(
        pipe, "WanVideoToVideoPipeline", "UniPCMultistepScheduler", [str(tmp_path)], None, False, torch.device("cpu")
    )
    assert type(made).__name__ == "WanVideoToVideoPipeline"
    assert made.transformer is pipe.transformer
    assert isinstance(made.scheduler, UniPCMultistepScheduler)
    assert made.scheduler.config.flow_shift == 3.0 or made.scheduler.config.get("shift") == 3.0
    assert made.get_active_adapters() == ["lora-0"]
    assert not torch.equal(TINY["wan"].run(pipe), plain)


def test_what_cannot_be_prepared():
    pipe = TINY["wan"].build()
    with pytest.raises(ValueError, match="diffusers has no pipeline 'WanTransformer3DModel'"):
        as_pipeline(pipe, "WanTransformer3DModel")
    with pytest.raises(ValueError, match="FluxPipeline"):
        as_pipeline(pipe, "FluxPipeline")
    with pytest.raises(ValueError, match="diffusers has no scheduler 'Euler'"):
        prepared(pipe, None, "Euler", (), None, False, torch.device("cpu"))
    with pytest.raises(ValueError, match="The LoRA 'no/such/lora' cannot be loaded"):
        load_loras(pipe, ["no/such/lora"])
    with pytest.raises(ValueError, match="must be one of model, sequential, group, got 'disk'"):
        refuse_offload("disk", torch.device("cuda"))
    with pytest.raises(ValueError, match="the device is the CPU"):
        refuse_offload("model", torch.device("cpu"))


def test_generate_takes_further_arguments():
    pipe = TINY["wan"].build()
    seen = {}

    class Watched(type(pipe)):
        def __call__(self, *args, **kwargs):
            seen.update(kwargs)
            raise KeyboardInterrupt

    pipe.__class__ = Watched
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, "a cat", inputs={"max_sequence_length": 8})
    assert seen["max_sequence_length"] == 8
