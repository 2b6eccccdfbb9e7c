"""The table at real length: rows are what the files say, of one run, and the page shows ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import long_table
from benchmarks.long_table import BEGIN, END, HEADS, PAGE, page, read, table
from dit_accel.quality.results import DENSE, result_to_json, summary_to_json
from tests.quality import cards


def presets_table(**facts: Any) -> dict[str, Any]:
    """What verify_presets writes of the runs of :func:`tests.quality.cards.report`, of the same model and machine."""
    report, card = cards.report(), cards.card()
    row = {"row": "mass@0.3", "method": "mass", "asked_density": 0.3, "recipe": {}, "plans": None, "failed": None}
    row |= {"dense_seconds": report.summary(DENSE).total_seconds.to_json(), "fvd": 12.34}
    row |= summary_to_json(report.summary("fast"))
    row["each"] = [result_to_json(one) for one in report.results if one.recipe == "fast"]
    row["metrics"]["psnr"] |= {"mean": 36.0, "low": 31.0, "high": 41.0}
    said = {name: card[name] for name in ("device", "platform", "versions", "sequence")}
    said |= {
        "settings": {"model": "org/model", "steps": 30, "compile": True, "dtype": "bfloat16", "size": None},
        "call": {"guidance_scale": 5.0},
        "prompts": 2,
        "processes_on_a_gpu": 1,
        "gpus": 1,
        "command": "python -m benchmarks.verify_presets --model org/model --out /somewhere/else --compile",
    }
    return {"facts": said | facts, "fvd_missing": None, "rows": [row], "failed": {}, "agreement": {}}


def write(folder: Path, name: str, data: dict[str, Any]) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def rows_of(text: str) -> list[list[str]]:
    """Cells of the rows of a table in Markdown, the heads first."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in lines}) == 1
    return lines


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m benchmarks.long_table --write"


def test_a_card_is_a_table(tmp_path: Path) -> None:
    text = table([read(write(tmp_path, "card", cards.card()))])
    assert text.startswith(
        "org/model, 5 frames of 80 x 48 (1,920 tokens), 30 steps, guidance 5, bfloat16, compiled, 2 clips, "
        "NVIDIA H0, torch 2. In brackets the range"
    )  # fmt: skip
    assert text.index("```\ndit-accel verify org/model\n```") < text.index("| recipe |")
    heads, row = rows_of(text)
    assert tuple(heads) == HEADS
    # Dense runs take 10 and 12 s, the others 4 and 6.
    assert row == [
        "`fast`", "0.420", "13 of 30", "11.00", "5.00", "2.25 (1.50 to 3.38)", "35.00 (30.00 to 40.00)",
        "0.9000 (0.9000 to 0.9000)", "-", "1.500 (1.500 to 1.500)",
    ]  # fmt: skip


def test_both_files_are_one_table_the_nearest_to_dense_first(tmp_path: Path) -> None:
    files = [write(tmp_path, "card", cards.card()), write(tmp_path, "table", presets_table())]
    text = table([read(path) for path in files])
    heads, first, second = rows_of(text)
    assert heads == [*HEADS, "FVD", "command"]
    assert (first[0], first[6], first[-2:]) == ("`mass@0.3`", "36.00 (31.00 to 41.00)", ["12.3", "2"])
    assert (second[0], second[-2:]) == ("`fast`", ["-", "1"])
    # The reader has no use for the folder of who ran it.
    assert "\ndit-accel verify org/model\npython -m benchmarks.verify_presets --model org/model --compile\n" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": {"type": "cuda", "name": "NVIDIA H1"}}, "one table is of one run, .* NVIDIA H0.* NVIDIA H1"),
        ({"call": {"guidance_scale": 4.0}}, "guidance 5.* guidance 4"),
        ({"prompts": 3}, "2 clips.* 3 clips"),
        ({"processes_on_a_gpu": 8}, r"table\.json has seconds of 8 processes on one GPU"),
        ({"sequence": 1}, r"table\.json is neither a card nor a table"),
    ],
)
def test_what_is_not_of_one_run_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    files = [write(tmp_path, "card", cards.card()), write(tmp_path, "table", presets_table(**changes))]
    with pytest.raises(ValueError, match=said):
        table([read(path) for path in files])


def test_other_files_are_named(tmp_path: Path) -> None:
    for name, text in (("empty", "{}"), ("broken", "{"), ("list", "[]")):
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(ValueError, match=rf"{name}\.json is neither a card nor a table"):
            read(tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match="random weights"):
        read(write(tmp_path, "card", cards.card(random_weights=True)))


def _bent(path: str, value: Any, data: Any) -> dict[str, Any]:
    """A copy with another value at a path of keys and numbers."""
    bent = json.loads(json.dumps(data))
    *places, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = bent
    for key in places:
        inner = inner[key]
    inner[last] = value
    return dict(bent)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("settings.call.guidance_scale", "x"),
        ("settings.call.guidance_scale", [1]),
        ("command", None),
        ("clips", "9"),
        ("recipes.0.recipe", 5),
        ("num_steps", "9"),
    ],
)
def test_a_card_that_no_table_can_show_is_named_where_it_is_read(path: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bent\.json is neither a card nor a table of presets: "):
        read(write(tmp_path, "bent", _bent(path, value, cards.card())))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((f"rows.0.{name}", "x") for name in ("density", "computed_share", "total_seconds", "speedup", "metrics")),
        ("rows.0.dense_seconds", {}),
        ("rows.0.fvd", "x"),
        ("rows.0.each.0.shape", [1, 2]),
        ("facts.prompts", "x"),
        ("rows", []),
    ],
)
def test_a_table_that_no_table_can_show_is_named_where_it_is_read(path: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bent\.json is neither a card nor a table of presets: "):
        read(write(tmp_path, "bent", _bent(path, value, presets_table())))


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"[" * 100_000], ids=["no UTF-8", "empty", "deep"])
def test_what_is_no_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bent.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bent\.json is neither a card nor a table of presets: "):
        read(tmp_path / "bent.json")


def test_no_text_of_a_file_ends_its_place_on_the_page(tmp_path: Path) -> None:
    card = _bent("command", "run\n```\n<script>", cards.card())
    card = _bent("recipes.0.recipe", "a`|b\n<b>", card)
    plain, bent = (
        table([read(write(tmp_path, name, one))]).splitlines() for name, one in (("card", cards.card()), ("bent", card))
    )
    assert len(bent) == len(plain)
    assert [line.count("|") for line in bent] == [line.count("|") for line in plain]
    assert bent[3] == "run " + 3 * "'" + " <script>"
    assert bent[-1].startswith("| `a'/b <b>` |")


def test_one_frame_is_one(tmp_path: Path) -> None:
    assert ", 1 frame of 80 x 48" in table([read(write(tmp_path, "card", cards.card() | {"frames": 1}))])


def test_a_bad_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["long_table", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit):
        long_table.main()
    assert "none.json is neither a card nor a table of presets" in capsys.readouterr().err


def test_our_files_change_the_page_and_nothing_around_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_table, "RESULTS", tmp_path)
    (tmp_path / "cards").mkdir()
    write(tmp_path / "cards", "embedded-long-h0", cards.card())
    text = PAGE.read_text(encoding="utf-8")
    changed = page(text)
    assert "`fast` | 0.420" in changed
    assert changed.split(BEGIN)[0] == text.split(BEGIN)[0]
    assert changed.split(END)[1] == text.split(END)[1]
    assert page(changed) == changed


def test_graphs_stand_beside_the_run(tmp_path: Path) -> None:
    graphs = presets_table()
    graphs["facts"]["settings"]["graphs"] = True
    with_graphs = read(write(tmp_path, "graphs", graphs))
    assert "; accelerated side: CUDA graphs. In brackets" in table([with_graphs])
    with pytest.raises(ValueError, match="one table is of one run"):
        table([with_graphs, read(write(tmp_path, "without", presets_table()))])
