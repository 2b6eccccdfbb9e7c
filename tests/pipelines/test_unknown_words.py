"""Words that a model was never taught are named, and a tokenizer that spells any word has none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

import dit_accel
from dit_accel.pipelines import companion, load
from dit_accel.pipelines.unknown_words import note_on, unknown_words


@pytest.fixture(scope="module")
def embedded() -> SimpleNamespace:
    return SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(companion.folder_of("embedded") / "tokenizer"))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a green dragon flying left over the sea at night", []),
        ("a cyan giraffe skiing on mars, at night, a cyan one", ["cyan", "giraffe", "skiing", "on", "mars"]),
        ("Ein grüner Drache", ["ein", "grüner", "drache"]),
        ("", []),
    ],
)
def test_the_built_in_models_words(embedded: SimpleNamespace, prompt: str, words: list[str]) -> None:
    assert [word.lower() for word in unknown_words(embedded, prompt)] == words


def test_the_sentence() -> None:
    assert note_on([]) == ""
    assert note_on(["cyan", "mars"]) == "The model was never taught 'cyan', 'mars'."


def test_pipelines_that_cannot_tell() -> None:
    assert unknown_words(SimpleNamespace(tokenizer=None), "x") == []
    assert unknown_words(SimpleNamespace(), "x") == []
    assert unknown_words(SimpleNamespace(tokenizer=SimpleNamespace(unk_token_id=None)), "x") == []


def test_an_adapter_of_the_package_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load("embedded")
    with dit_accel.load_adapter(pipe, "sla-0.1") as handle:
        assert handle.recipe.compensate.is_learned
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sla-0.1").mkdir()
    with pytest.raises(ValueError, match="adapter"):
        dit_accel.load_adapter(pipe, "sla-0.1")  # the user's own folder goes first
