"""A video or a picture is written whole, and is read back before it counts as written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from dit_accel.pipelines import encode
from dit_accel.pipelines.encode import refuse_missing_encoder, write_mp4, write_png

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3), np.uint8)


def ffmpeg_that(folder: Path, *lines: str) -> str:
    """A program in ffmpeg's place."""
    path = folder / "ffmpeg"
    path.write_text("\n".join(["#!/bin/sh", "[ $1 = -version ] && echo 'ffmpeg version 6.0' && exit 0", *lines]))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("sides", [(48, 64), (47, 63)])
def test_every_frame_can_be_read_back(tmp_path: Path, count: int, sides: tuple[int, int]) -> None:
    path = tmp_path / "deep" / "a: film.mp4"
    write_mp4(iter(FRAMES[:count, : sides[0], : sides[1]]), path, 23.976, crf=12)
    assert iio.imread(path, plugin="FFMPEG").shape == (count, 48, 64, 3)
    assert [file.name for file in path.parent.iterdir()] == ["a: film.mp4"]


def test_a_picture_can_be_read_back(tmp_path: Path) -> None:
    write_png(FRAMES[0], tmp_path / "a.png")
    assert (iio.imread(tmp_path / "a.png") == FRAMES[0]).all()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["echo \"[vost#0:0 @ 0x1] Unknown encoder 'libx264'\" >&2", "cat >/dev/null", "exit 1"], "Unknown encoder"),
        (["echo 'No space left on device' >&2", "exit 1"], "No space left on device"),
        (["cat >/dev/null", "exit 1"], "failed without a word"),
        (["cat >/dev/null"], "0 of 100 frames"),
        (['for last; do :; done; cat >/dev/null; [ "$last" = - ] || echo broken >"$last"'], "0 of 100 frames"),
    ],
    ids=["no encoder", "gives up early", "silent", "writes nothing", "writes rubbish"],
)
def test_a_video_that_was_not_written_is_an_error(tmp_path, monkeypatch, lines, words) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg_that(tmp_path, *lines))
    with pytest.raises(ValueError, match=f"Cannot write .*a.mp4: .*({words})") as caught:
        write_mp4(iter(np.repeat(FRAMES, 20, axis=0)), tmp_path / "a.mp4", 16.0, crf=12)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a.mp4").read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "ffmpeg"]


def test_lost_frames_are_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encode, "_count_frames", lambda path: 4)
    with pytest.raises(ValueError, match="4 of 5 frames can be read back"):
        write_mp4(FRAMES, tmp_path / "a.mp4", 16.0, crf=12)
    assert list(tmp_path.iterdir()) == []


def test_no_frames_and_no_ffmpeg_are_errors(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="there are no frames"):
        write_mp4([], tmp_path / "a.mp4", 16.0, crf=12)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"Cannot write .*a.mp4: No such file"):
        write_mp4(FRAMES, tmp_path / "a.mp4", 16.0, crf=12)


def test_an_interrupted_video_leaves_nothing(tmp_path: Path) -> None:
    def frames():
        yield FRAMES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mp4(frames(), tmp_path / "a.mp4", 16.0, crf=12)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_encoder_is_known_before_the_work(tmp_path, monkeypatch) -> None:
    refuse_missing_encoder()
    lines = ["echo \"Unknown encoder 'libx264'\" >&2", "cat >/dev/null", "exit 1"]
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg_that(tmp_path, *lines))
    with pytest.raises(ValueError, match="No video can be written: Unknown encoder 'libx264'"):
        refuse_missing_encoder()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"No video can be written: .*No such file"):
        refuse_missing_encoder()


WRITERS = {
    "a.mp4": lambda path: write_mp4(FRAMES, path, 16.0, crf=12),
    "a.png": lambda path: write_png(FRAMES[0], path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, name) -> None:
    (tmp_path / name).write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode, "_encode", full)
    monkeypatch.setattr(iio, "imwrite", full)
    with pytest.raises(ValueError, match=f"Cannot write .*{name}: No space left on device"):
        WRITERS[name](tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"


@pytest.mark.parametrize("name", WRITERS)
def test_a_really_full_disk_is_one_sentence(tmp_path, name) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        with pytest.raises(ValueError, match=f"Cannot write .*{name}: ") as caught:
            WRITERS[name](tmp_path / name)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
