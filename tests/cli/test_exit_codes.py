"""What docs/cli.md says of exit codes."""

from __future__ import annotations

import re
import sys

import pytest

import dit_accel.cli
from tests.cli.documented import PAGE
from tests.cli.test_commands import run


@pytest.mark.parametrize(
    ("raised", "code"),
    [(None, 0), (KeyError("a"), 1), (ValueError("Not this."), 2), (KeyboardInterrupt(), 130)],
    ids=["done", "a fault", "refused", "interrupted"],
)
def test_codes(raised: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr(sys.modules["dit_accel.cli.info"], "quiet_libraries", fail)
    result = run("info", "--device", "cpu", "--json")
    assert result.exit_code == code
    assert bool(result.stdout) == (code == 0)
    if code == 2:
        assert result.stderr == "Error: Not this.\n"
    assert str(code) in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_without_the_extra_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "dit_accel.cli.main")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as left:
        dit_accel.cli.run()
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "Error: dit-accel needs typer for its command line: pip install 'dit-accel[cli]'.\n"
    )
