"""The front of whole runs: a tiny run of all kinds of rows, shards that go on, tables and a picture from the file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = ["mass:density=.3", "dense+listed:computed=(0,2),num_steps=3", "pooled+listed:computed=(0,2),num_steps=3"]
SMALL = ["--steps", "3", "--frames", "5", "--size", "48", "--device", "cpu", "--guidance", "1"]


@pytest.fixture(scope="module")
def front() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(BENCHMARKS)
        import reuse_front

        yield reuse_front


def _main(front: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reuse_front.py", *arguments])
    front.main()


@pytest.fixture(scope="module")
def made(front: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("front") / "front.json"
    with pytest.MonkeyPatch.context() as patched:
        _main(front, patched, "--rows", *ROWS, *SMALL, "--prompts", "2", "--out", str(out))
    return out


def test_a_run_has_what_the_table_needs(front: Any, made: Path) -> None:
    result = json.loads(made.read_text())
    assert list(result["rows"]) == ROWS
    assert list(result["dense_seconds"]) == ["0", "1"]
    for row in result["rows"].values():
        for clip in row["clips"].values():
            assert clip["psnr"] is not None
            assert clip["ssim"] <= 1.0
            assert clip["seconds"] > 0
            assert clip["lpips"] is None or clip["lpips"] >= 0.0
    report = sys.modules["front_report"]
    kinds = {row.name: (row.kind, row.computed) for row in report.rows_of(result)}
    assert kinds == dict(zip(ROWS, [("sparse", 1.0), ("cache", 2 / 3), ("both", 2 / 3)], strict=True))


def test_a_row_says_what_its_linear_layers_are_in(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.acceleration.linears.find_spec", lambda name: object())
    assert front.linear_of("fast/int8") == "int8"
    assert front.linear_of("dense+listed:computed=(0,2)") is None
    assert front.recipe_of("mass:density=.3+listed:computed=(0,2)/fp8") == front.recipe_of(
        "mass:density=.3+listed:computed=(0,2)"
    )
    for row, linear in (("fast/int4", "int4"), ("fast/", ""), ("fast/int8/fp8", "int8/fp8")):
        with pytest.raises(ValueError, match=f"linear must be one of fp8, int8, or None, got '{linear}'"):
            front.recipe_of(row)


def test_a_row_of_an_adapter_runs_with_what_it_learned(
    front: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_accel.pipelines.companion import adapters
    from dit_accel.training.adapter_files import read_adapter

    adapter, out = adapters()["sla-0.1"], tmp_path / "front.json"
    trained = read_adapter(adapter).recipe
    assert front.recipe_of("adapter", adapter) == trained
    changed = front.recipe_of("adapter@select.density=.3", adapter)
    assert changed == trained.with_fields({"select.density": 0.3})
    trained.save(tmp_path / "bare.json")  # the same blocks, without what was learned
    monkeypatch.chdir(tmp_path)
    rows = ["adapter", "bare.json"]
    _main(front, monkeypatch, "--adapter", str(adapter), "--rows", *rows, *SMALL, "--prompts", "1", "--out", str(out))
    found = json.loads(out.read_text())["rows"]
    assert found["adapter"]["recipe"] == found[rows[1]]["recipe"]
    assert found["adapter"]["clips"]["0"]["psnr"] != found[rows[1]]["clips"]["0"]["psnr"]
    with pytest.raises(ValueError, match="adapter"):
        front.recipe_of("adapter")


def test_times_of_linear_layers_in_8_bits_are_not_composed(front: Any, made: Path, tmp_path: Path) -> None:
    result = json.loads(made.read_text())
    result["rows"]["dense/int8"] = result["rows"].pop(ROWS[0])
    (tmp_path / "cast.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    with pytest.raises(SystemExit, match="Times of dense/int8 cannot be composed"):
        front.write_docs([tmp_path / "cast.json"], page, tmp_path / "picture.png")
    assert not page.exists()


def test_rows_that_do_the_same_have_one_label(front: Any, made: Path) -> None:
    report = sys.modules["front_report"]
    row = report.rows_of(json.loads(made.read_text()))[0]
    rows = [replace(row, name=name) for name in ("fast", "max")]
    assert list(report.names_by_place(rows).values()) == [["fast", "max"]]
    assert report.names_by_place([replace(row, name="dense")]) == {}


def test_a_card_is_drawn_by_its_own_times(front: Any, made: Path) -> None:
    from matplotlib import pyplot

    report = sys.modules["front_report"]
    card = json.loads((report.ROOT / "benchmarks" / "results" / "long_scout_h200.json").read_text())
    figure, panel = pyplot.subplots()
    report.draw_card(panel, card, {"sparse": "blue", "both": "red"})
    named = {text.get_text(): text.xy for text in panel.texts}
    pyplot.close(figure)
    assert set(named) == set(report.NAMED_OF_CARD.values())
    (default,) = (recipe for recipe, name in report.NAMED_OF_CARD.items() if name == "default")
    row = next(row for row in card["recipes"] if row["recipe"] == default)
    assert "select.density=0.3" in default  # as patch(pipe) has it
    assert named["default"] == (row["speedup"]["median"], row["metrics"]["psnr"]["mean"])
    assert panel.get_title() == "32,760 tokens, 30 steps, measured"


def test_what_is_made_is_not_made_again(front: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made.read_text()
    monkeypatch.setattr(front, "generate_clip", None)
    _main(front, monkeypatch, "--rows", *ROWS, *SMALL, "--prompts", "2", "--out", str(made))
    assert json.loads(before)["rows"] == json.loads(made.read_text())["rows"]


def test_no_clip_is_begun_after_its_minutes(
    front: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "front.json"
    monkeypatch.setattr(front, "generate_clip", None)
    _main(front, monkeypatch, "--rows", *ROWS, *SMALL, "--minutes", "-1", "--out", str(out))
    assert not out.exists()
    assert "PSNR" in capsys.readouterr().out


def test_shards_go_on_from_the_file_of_all(
    front: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three prompts two are known; their clips are taken over, and one shard makes the third."""
    out = tmp_path / "front.json"
    out.write_text(made.read_text())
    commands = []

    class InThisProcess:
        def __init__(self, command: list[str], **_: Any) -> None:
            commands.append(command[2:])
            _main(front, monkeypatch, *command[2:])

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(front.subprocess, "Popen", InThisProcess)
    given = ["--rows", *ROWS, *SMALL, "--prompts", "3", "--shards", "2", "--out", str(out)]
    _main(front, monkeypatch, *given)
    before, after = json.loads(made.read_text()), json.loads(out.read_text())
    assert list(after["dense_seconds"]) == ["0", "1", "2"]
    for name in ROWS:
        clips = after["rows"][name]["clips"]
        assert sorted(clips) == ["0", "1", "2"]
        for number in ("0", "1"):
            assert clips[number] == before["rows"][name]["clips"][number]
    assert [command[command.index("--first") + 1] for command in commands] == ["0", "2"]
    assert not any("--shards" in command for command in commands)


def test_parts_make_the_whole(front: Any, made: Path) -> None:
    result = json.loads(made.read_text())
    parts = [front.part_of(result, {seed}) for seed in ("1", "0")]
    assert front.merged(parts)["rows"] == result["rows"]
    other = parts[0] | {"settings": {**result["settings"], "steps": 4}}
    with pytest.raises(SystemExit, match="are not of one run"):
        front.merged([parts[1], other])
    changed = json.loads(json.dumps(parts[0]))
    changed["rows"][ROWS[0]]["recipe"]["select"]["density"] = 0.5
    with pytest.raises(SystemExit, match=r"mass:density=\.3 of two versions"):
        front.merged([parts[1], changed])
    with pytest.raises(SystemExit, match="No shard made a clip"):
        front.merged([])


def test_the_docs_are_written_from_the_files(
    front: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = sys.modules["front_report"]
    many = json.loads(made.read_text())
    many["settings"]["steps"] = 30
    many["facts"]["device"] = "NVIDIA <H200>"
    for number, row in enumerate(many["rows"].values()):
        some = next(iter(row["clips"].values()))
        row["clips"] = {str(seed): some | {"psnr": 30.0 + number + seed % 2, "lpips": 0.05} for seed in range(16)}
    file = tmp_path / "thirty.json"
    file.write_text(json.dumps(many))
    page, picture = tmp_path / "page.md", tmp_path / "images" / "front.png"
    page.write_text(f"# Before\n{report.BEGIN}old\n{report.END}behind\n")
    for _ in range(2):
        _main(front, monkeypatch, "--docs", str(file), str(made), "--page", str(page), "--picture", str(picture))
        text = page.read_text()
        assert text.startswith("# Before\n")
        assert text.endswith("behind\n")
        assert "old" not in text
    assert "](images/front.png)" in text
    assert picture.stat().st_size > 1000
    few, of_many = text.split("30 steps,")
    assert "2 clips a row; in brackets the range over clips" in few
    assert "16 clips a row; in brackets the 95% over clips" in of_many
    first = next(line for line in of_many.splitlines() if line.startswith("| both"))
    assert f"| both | `{ROWS[2]}` | 0.67 |" in first
    assert "x | 32.5 (32." in first
    assert "| 0.0500 (0.0500 to 0.0500) |" in first
    with pytest.raises(SystemExit, match="The page lacks the lines"):
        report.page("# Nothing\n", [many], "images/front.png")


def test_composed_times_are_those_that_were_measured(front: Any) -> None:
    """Of `fast` on Wan 2.1 1.3B, three of twelve steps dense; text and decoding as on the dense side."""
    report = sys.modules["front_report"]
    found = json.loads((Path(front.__file__).parent / "results" / "whole_runs_h200.json").read_text())["rows"][0]
    dense, fast = (sum(found[side]["whole"][0]["steps"]) for side in ("dense", "fast"))
    around = found["dense"]["whole"][0]["text"] + found["dense"]["whole"][0]["decode"]
    row = report.Row("fast", "both", 12 / 30, (3 + 9 * 0.217) / 12, 1, 30, {}, own=2 / 12, means=9 / 12)
    assert row.speedup == pytest.approx((dense + around) / (fast + around), rel=0.05)
    assert report.Row("dense", "cache", 1.0, 1.0, 0, 30, {}).speedup == 1.0


def test_searches_count_where_a_recipe_makes_them(front: Any) -> None:
    searches = {"dense": 0, "pooled": 0, "gna": 0, "mass": 1, "fast": 1, "carried": 3}
    found = {row: sys.modules["front_report"].searches_of(front.recipe_of(row).to_dict()) for row in searches}
    assert found == searches


def test_means_count_where_a_recipe_has_them(front: Any) -> None:
    rows = {"dense": False, "mass": False, "mass:means=True": True, "fast": True, "fast:means=False": False}
    rows |= {"carried": False, "carried:means=True": True, "ear@compensate=residual": True}
    found = {row: sys.modules["front_report"].has_means(front.recipe_of(row).to_dict()) for row in rows}
    assert found == rows


def test_the_page_has_a_place(front: Any) -> None:
    report = sys.modules["front_report"]
    text = report.PAGE.read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == text.count(report.END) == 1


@pytest.mark.parametrize("name", ["drafts", "front", "profiles", "reuse"])
def test_rows_of_a_set_are_recipes(front: Any, name: str) -> None:
    kinds = set()
    for row in front.SETS[name]:
        kinds.add(sys.modules["front_report"].kind_of(front.recipe_of(row).to_dict()))
    expected = {"profiles": {"both"}, "drafts": {"cache", "both"}}
    assert kinds == expected.get(name, {"cache", "sparse", "both"})
