"""Files are checked before the work, and are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dit_accel.files import refuse_unwritable, refuse_unwritable_folder, write_text, written_whole


def test_a_path_that_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("path", ["", "file/a.json", "file/deeper/a.json"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Cannot write in|is a folder"):
        refuse_unwritable(tmp_path / path)


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Cannot write in .*file"):
        refuse_unwritable_folder(tmp_path / "file")


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "sub" / "a.txt", "drei Äpfel, 三")
    assert (tmp_path / "sub" / "a.txt").read_bytes() == "drei Äpfel, 三".encode()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "old")

    def interrupted() -> None:
        with written_whole(tmp_path / "a.txt") as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_an_operating_system_error_becomes_one_sentence(tmp_path: Path) -> None:
    said = r"Cannot write .*a.txt: No space left on device"
    with pytest.raises(ValueError, match=said), written_whole(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")


def test_a_writer_that_wrote_nothing_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was written"), written_whole(tmp_path / "a.mp4"):
        pass


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        refuse_unwritable(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".txt")
    refuse_unwritable(path)
    write_text(path, "text")
    assert path.read_text() == "text"


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot write .*File name too long"):
        refuse_unwritable(tmp_path / ("n" * 300 + ".txt"))


@pytest.mark.parametrize("path", ["file/a.txt", "file/deeper/a.txt", "n" * 300])
def test_what_cannot_even_be_begun_is_one_sentence(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="Cannot write "):
        write_text(tmp_path / path, "text")
