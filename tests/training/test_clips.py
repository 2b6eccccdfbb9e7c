"""Clips of every kind: pictures of other colours, captions that are missing or odd, and clips that change later."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel.pipelines.random_wan import build_random_wan
from dit_accel.training.clips import read_video
from dit_accel.training.data import encode_clips
from dit_accel.training.origin import RECORD
from dit_accel.training.samples import LatentFolder

SIZE = {"width": 32, "height": 32, "frames": 1}


@pytest.fixture(scope="module")
def pipe():
    return build_random_wan()


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


def red(side: int = 32) -> Image.Image:
    return Image.new("RGB", (side, side), (200, 10, 10))


def add(folder, name: str, caption: str | None = "a red square", image: Image.Image | None = None) -> None:
    (image or red()).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def levels(path) -> list[int]:
    """The middle pixel's colour in 0..255."""
    return [round(127.5 * (float(value) + 1)) for value in read_video(path, 16, 16, 1)[0, :, 0, 8, 8]]


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("CMYK", ".jpg", [200, 10, 10]),
        ("RGBA", ".png", [200, 10, 10]),
        ("P", ".png", [200, 10, 10]),
        ("P", ".gif", [200, 10, 10]),
        ("YCbCr", ".jpg", [200, 10, 10]),
        ("RGB", ".webp", [200, 10, 10]),
        ("L", ".png", [67, 67, 67]),
        ("L", ".jpg", [67, 67, 67]),
        ("LA", ".png", [67, 67, 67]),
        ("1", ".png", None),
    ],
)
def test_pictures_of_every_mode_are_rgb(tmp_path, mode, suffix, expected):
    path = tmp_path / f"picture{suffix}"
    red().convert(mode).save(path)
    if expected is None:
        assert len(set(levels(path))) == 1
    else:
        assert levels(path) == pytest.approx(expected, abs=6)


@pytest.mark.parametrize("alpha", [0, 128])
def test_transparency_is_left_out(tmp_path, alpha):
    image = red().convert("RGBA")
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    image.quantize(4).save(tmp_path / "palette.png")
    assert levels(tmp_path / "a.png") == [200, 10, 10]
    assert levels(tmp_path / "palette.png") == pytest.approx([200, 10, 10], abs=8)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    for level in (0, 20_000, 65_535):
        Image.fromarray(np.full((20, 20), level, np.uint16)).save(tmp_path / "gray.png")
        assert levels(tmp_path / "gray.png") == [level // 257] * 3
        cv2.imwrite(str(tmp_path / "rgb.png"), np.full((20, 20, 3), level, np.uint16))
        assert levels(tmp_path / "rgb.png") == pytest.approx([level // 257] * 3, abs=1)


def test_photographs_are_turned_as_their_camera_was(tmp_path):
    """Orientation 6 is shown a quarter turn clockwise: what is stored at the left is seen at the top."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    video = read_video(tmp_path / "photo.jpg", 32, 32, 1)[0, :, 0]
    assert video[:, :12].min() > 0.9
    assert video[:, 20:].max() < -0.9


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animated_pictures_are_clips(tmp_path, suffix):
    frames = [Image.new("L" if i == 1 else "RGB", (32, 32), 80 * i if i == 1 else (80 * i,) * 3) for i in range(3)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], duration=50)
    video = read_video(tmp_path / f"a{suffix}", 32, 32, 3)
    assert video.shape == (1, 3, 3, 32, 32)
    assert [round(127.5 * (float(v) + 1)) for v in video[0, 0, :, 8, 8]] == pytest.approx([0, 80, 160], abs=4)
    with pytest.raises(ValueError, match="it has 3 frames, 4 are needed"):
        read_video(tmp_path / f"a{suffix}", 32, 32, 4)


def test_a_picture_is_no_video_and_a_broken_one_no_picture(tmp_path):
    red().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="it has 1 frame, 5 are needed"):
        read_video(tmp_path / "a.png", 32, 32, 5)
    whole = (tmp_path / "a.png").read_bytes()
    for name, content in (
        ("cut.png", whole[: len(whole) // 2]),
        ("text.jpg", b"this is no picture"),
        ("none.png", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="it cannot be read: "):
            read_video(tmp_path / name, 32, 32, 1)


def test_what_cannot_be_used_is_named_so_that_a_user_understands(clips, tmp_path, pipe, caplog):
    add(clips, "good.png")
    add(clips, "gray.png", image=red().convert("LA"))
    add(clips, "twin.jpg")
    add(clips, "twin.png", None)
    add(clips, "mute.png", None)
    add(clips, "empty.png", " \n")
    add(clips, "latin.png", None)
    (clips / "latin.txt").write_bytes("ein Äffchen".encode("latin-1"))
    add(clips, "broken.png")
    (clips / "broken.png").write_bytes(b"nothing")
    (clips / "folder.png").mkdir()
    (clips / "lost.txt").write_text("no clip")
    skipped = encode_clips(pipe, clips, tmp_path / "out", **SIZE)
    reasons = {item.name: item.reason for item in skipped}
    assert reasons.keys() == {"twin.png", "mute.png", "empty.png", "latin.png", "broken.png", "lost.txt"}
    assert reasons["twin.png"] == "twin.jpg has the same name, and takes the caption"
    assert reasons["mute.png"] == "its caption is missing"
    assert reasons["empty.png"] == "its caption is empty"
    assert "no UTF-8 text" in reasons["latin.png"]
    assert "it cannot be read: cannot identify image file" in reasons["broken.png"]
    said = caplog.text
    assert "Skipped twin.png: twin.jpg has the same name" in said
    assert "Skipped 6 of 9 files." in said
    assert [sample.name for sample in LatentFolder(tmp_path / "out")] == ["good", "gray", "twin"]


def test_captions_with_a_byte_order_mark_and_other_letters(clips, tmp_path, pipe, monkeypatch):
    prompts = []
    encode = pipe.encode_prompt
    monkeypatch.setattr(
        pipe, "encode_prompt", lambda prompt, *a, **k: prompts.append(prompt) or encode(prompt, *a, **k)
    )
    add(clips, "a.png", "\ufeffein Äffchen, 三\r\n")
    encode_clips(pipe, clips, tmp_path / "out", **SIZE)
    assert prompts in (["ein Äffchen, 三"], [["ein Äffchen, 三"]])


@pytest.mark.parametrize("left", [[], ["notes.md"], ["broken.png"], ["mute.png"]])
def test_a_folder_without_a_usable_clip_is_refused(clips, tmp_path, pipe, left):
    for name in left:
        (clips / name).write_bytes(b"nothing")
    if left == ["broken.png"]:
        (clips / "broken.txt").write_text("a caption")
    message = "holds no clip" if left in ([], ["notes.md"]) else rf"holds no clip that can be used; {left[0]}: it"
    with pytest.raises(ValueError, match=message):
        encode_clips(pipe, clips, tmp_path / "out", **SIZE)
    with pytest.raises(ValueError, match="There is no folder"):
        encode_clips(pipe, clips / "nowhere", tmp_path / "out", **SIZE)


def changed_caption(clips):
    (clips / "a.txt").write_text("a blue square")
    return r"a\.caption = 'a red square', got 'a blue square'"


def changed_clip(clips):
    red(48).save(clips / "a.png")
    return r"a\.file = "


def removed_clip(clips):
    (clips / "a.png").unlink()
    return r"not among the 1 asked for \(a, 1 in all\)"


def another_kind_of_clip(clips):
    (clips / "a.png").rename(clips / "a.webp")
    return r"a\.clip = 'a\.png', got 'a\.webp'"


def another_size(clips):
    return r"width = 32, got 48"


@pytest.mark.parametrize("change", [changed_caption, changed_clip, removed_clip, another_kind_of_clip, another_size])
def test_clips_that_changed_since_are_not_taken_for_the_old_ones(clips, tmp_path, pipe, change):
    add(clips, "a.png")
    add(clips, "b.png")
    encode_clips(pipe, clips, tmp_path / "out", **SIZE)
    message = change(clips)
    size = SIZE | ({"width": 48} if change is another_size else {})
    with pytest.raises(ValueError, match=rf"holds samples .*{message}.*start over"):
        encode_clips(pipe, clips, tmp_path / "out", **size)
    encode_clips(pipe, clips, tmp_path / "out", **size, start_over=True)
    assert len(LatentFolder(tmp_path / "out")) == len([path for path in clips.iterdir() if path.suffix != ".txt"])
    assert len(LatentFolder(tmp_path / "out" / "earlier-1")) == 2


def test_new_clips_are_added_and_mended_ones_encoded(clips, tmp_path, pipe):
    add(clips, "a.png")
    add(clips, "b.png", None)
    encode_clips(pipe, clips, tmp_path / "out", **SIZE)
    first = (tmp_path / "out" / "a.safetensors").stat().st_mtime_ns
    (clips / "b.txt").write_text("now with a caption")
    add(clips, "c.png")
    assert encode_clips(pipe, clips, tmp_path / "out", **SIZE) == []
    assert (tmp_path / "out" / "a.safetensors").stat().st_mtime_ns == first
    assert len(LatentFolder(tmp_path / "out")) == 3


def test_generated_samples_are_not_taken_for_clips(clips, tmp_path, pipe):
    from dit_accel.training.data import generate_samples

    settings = {"width": 32, "height": 32, "num_frames": 1, "num_inference_steps": 1}
    generate_samples(pipe, ["a fish"], tmp_path / "out", settings=settings)
    record = (tmp_path / "out" / RECORD).read_text()
    add(clips, "a.png")
    with pytest.raises(ValueError, match="source = 'the model', got 'clips'"):
        encode_clips(pipe, clips, tmp_path / "out", **SIZE)
    assert (tmp_path / "out" / RECORD).read_text() == record


def test_a_gray_clip_trains_as_its_rgb_twin(clips, tmp_path, pipe):
    add(clips, "gray.png", image=Image.new("L", (32, 32), 90))
    add(clips, "rgb.png", image=Image.new("RGB", (32, 32), (90, 90, 90)))
    encode_clips(pipe, clips, tmp_path / "out", **SIZE)
    gray, rgb = LatentFolder(tmp_path / "out")
    assert torch.equal(gray.latents, rgb.latents)
