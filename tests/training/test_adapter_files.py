"""Damaged adapters: one sentence that names the fault, and an untouched pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dit_accel
from dit_accel.training.lora import add_lora
from tests.training.samples import SLA, tiny_pipe

WEIGHT = "blocks.0.attn1.to_q.weight"
BIAS = "transformer/learned/blocks.0.attn1.dit_accel.bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Sound adapters by backbone."""
    root = tmp_path_factory.mktemp("adapters")
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, SLA):
        add_lora(pipe.transformer, ["blocks.0.attn1.to_k"], 2, 2)
        lora = dit_accel.save_adapter(pipe, root / "lora", backbone="lora")
    pipe = tiny_pipe()
    base = {WEIGHT: pipe.transformer.blocks[0].attn1.to_q.weight.detach().clone()}
    pipe.transformer.blocks[0].attn1.to_q.weight.data += 0.25
    with dit_accel.patch(pipe, SLA):
        options: dict[str, Any] = {"backbone": "delta", "trained": [WEIGHT], "base": base, "dtype": torch.int8}
        return {"lora": lora, "delta": dit_accel.save_adapter(pipe, root / "delta", **options)}


def edit_card(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = json.loads((folder / "adapter.json").read_text())
        card.update(changes)
        (folder / "adapter.json").write_text(json.dumps({k: v for k, v in card.items() if v is not ...}))

    return edit


def edit_base(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = json.loads((folder / "adapter.json").read_text())
        change(card["base"]["transformer"])
        (folder / "adapter.json").write_text(json.dumps(card))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter.safetensors")

    return edit


def write(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text) and None


def truncate(folder: Path) -> None:
    data = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(data[: len(data) // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no card": ("delta", lambda folder: (folder / "adapter.json").unlink(), "holds no readable adapter"),
    "no tensors": ("delta", lambda folder: (folder / "adapter.safetensors").unlink(), "holds no readable adapter"),
    "card is a folder": (
        "delta",
        lambda folder: ((folder / "adapter.json").unlink(), (folder / "adapter.json").mkdir()),
        "holds no readable adapter",
    ),
    "empty card": ("delta", write("adapter.json", b""), "holds no readable adapter"),
    "half a card": ("delta", write("adapter.json", b'{"format": 1,'), "holds no readable adapter"),
    "bytes for a card": ("delta", write("adapter.json", b"\xff\xfe\x00"), "holds no readable adapter"),
    "deep card": ("delta", write("adapter.json", b"[" * 100_000), "holds no readable adapter"),
    "empty tensors": ("delta", write("adapter.safetensors", b""), "holds no readable adapter"),
    "half the tensors": ("delta", truncate, "holds no readable adapter"),
    "a list": ("delta", write("adapter.json", b"[1, 2]"), "adapter.json holds a list, not an object"),
    "a number": ("delta", write("adapter.json", b"1"), "adapter.json holds a int, not an object"),
    "no format": ("delta", edit_card(format=...), "has format None, this version reads 1"),
    "later format": ("delta", edit_card(format=9), "has format 9, this version reads 1"),
    "no recipe": ("delta", edit_card(recipe=...), "adapter.json has no recipe"),
    "no base": ("delta", edit_card(base=...), "adapter.json has no base"),
    "no transformer": ("delta", edit_card(base={}), "adapter.json names no transformer"),
    "no backbone": ("delta", edit_card(backbone=...), "adapter.json has no backbone"),
    "text for a recipe": ("delta", edit_card(recipe="sla"), "has a recipe of type str"),
    "list for a base": ("delta", edit_card(base=["transformer"]), "has a base of type list"),
    "other backbone": ("delta", edit_card(backbone="legs"), "backbone must be one of none, full, delta, lora, got"),
    "other recipe kind": ("delta", edit_card(recipe={"select": {"kind": "all"}}), "damaged: Unknown select 'all'"),
    "somebody's recipe kind": (
        "delta",
        edit_card(recipe={"select": {"kind": "all", "from": "others.stages"}}),
        r"not at hand: Unknown select 'all'; .* others\.stages registers it: import that module first",
    ),
    "recipe of texts": ("delta", edit_card(recipe={"select": "pooled"}), "is damaged"),
    "fingerprint is text": ("delta", edit_card(base={"transformer": "Wan"}), "a fingerprint has transformer"),
    "no weights": ("delta", edit_base(lambda base: base.pop("weights")), "a fingerprint has transformer"),
    "heads of text": ("delta", edit_base(lambda base: base.update(heads="two")), "heads in a fingerprint must be of"),
    "weights of text": ("delta", edit_base(lambda base: base["weights"].update(a="b")), "must be a list of numbers"),
    "no LoRA settings": ("lora", edit_card(lora=...), "lora needs rank, alpha and target_modules"),
    "LoRA settings are a list": ("lora", edit_card(lora=[1]), "is damaged"),
    "LoRA without rank": (
        "lora",
        edit_card(lora={"transformer": {"alpha": 2, "target_modules": ["a"]}}),
        "lora needs rank, alpha and target_modules",
    ),
    "LoRA of another rank": (
        "lora",
        edit_card(lora={"transformer": {"rank": 3, "alpha": 2, "target_modules": ["blocks.0.attn1.to_k"]}}),
        r"lora_A.weight has shape \(2, 24\), the model's layer takes \(3, 24\)",
    ),
    "LoRA of other layers": (
        "lora",
        edit_card(lora={"transformer": {"rank": 2, "alpha": 2, "target_modules": ["blocks.0.attn1.to_v"]}}),
        "lora_A.weight is of none of its target modules",
    ),
    "LoRA without a half": (
        "lora",
        edit_tensors(lambda t: t.pop("transformer/lora/blocks.0.attn1.to_k.lora_B.weight")),
        "blocks.0.attn1.to_k.lora_B.weight is missing",
    ),
    "a tensor of nothing": ("delta", edit_tensors(lambda t: t.update(x=torch.ones(2))), "tensor x belongs to none of"),
    "a tensor of no kind": (
        "delta",
        edit_tensors(lambda t: t.update({"transformer/full/" + WEIGHT: torch.ones(24, 24)})),
        "belongs to none of its transformers .* and kinds",
    ),
    "a tensor of another": (
        "delta",
        edit_tensors(lambda t: t.update({"transformer_9/learned/x": torch.ones(2)})),
        "belongs to none of its transformers",
    ),
    "integers without scales": (
        "delta",
        edit_tensors(lambda t: t.pop(f"transformer/scale/{WEIGHT}")),
        f"{WEIGHT} has integers or scales, but not both",
    ),
    "scales without integers": (
        "delta",
        edit_tensors(lambda t: t.pop(f"transformer/delta/{WEIGHT}")),
        f"{WEIGHT} has integers or scales, but not both",
    ),
    "fewer scales": (
        "delta",
        edit_tensors(lambda t: t.update({f"transformer/scale/{WEIGHT}": torch.ones(3)})),
        r"has \(24, 24\) integers and \(3,\) scales",
    ),
    "other shape": (
        "delta",
        edit_tensors(lambda t: t.update({BIAS: torch.ones(5)})),
        r"dit_accel.bias has shape \(5,\); in the model it has shape \(12,\)",
    ),
    "other name": (
        "delta",
        edit_tensors(lambda t: t.update({f"transformer/delta/{WEIGHT}s": torch.ones(24, 24)})),
        f"In the adapter {WEIGHT}s has shape .*; in the model it is missing",
    ),
    "one too few": ("delta", edit_tensors(lambda t: t.pop(BIAS)), "and the recipe's parameters differ"),
}


@pytest.mark.parametrize("patched", [False, True], ids=["alone", "patched"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named_in_one_sentence_and_touches_nothing(damage, patched, saved, tmp_path):
    kind, spoil, words = DAMAGES[damage]
    shutil.copytree(saved[kind], tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    pipe = tiny_pipe(layers=2)
    handle = dit_accel.patch(pipe, SLA) if patched else None
    before = {name: (id(p), p._version, p.data_ptr()) for name, p in pipe.transformer.named_parameters()}
    with pytest.raises(ValueError, match=words) as caught:
        dit_accel.load_adapter(pipe, tmp_path / "adapter")
    assert str(tmp_path) in str(caught.value) or "In the adapter" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {name: (id(p), p._version, p.data_ptr()) for name, p in pipe.transformer.named_parameters()} == before
    assert handle is None or handle.active
    if handle is None:
        with pytest.raises(ValueError, match="is not patched"):
            dit_accel.unpatch(pipe)


def test_sound_adapters_load(saved):
    for folder in saved.values():
        dit_accel.load_adapter(tiny_pipe(), folder).remove()


def test_the_same_lora_is_not_loaded_twice(saved):
    pipe = tiny_pipe()
    handle = dit_accel.load_adapter(pipe, saved["lora"])
    with pytest.raises(ValueError, match=r"are loaded already; take them out with handle\.remove\(\) first"):
        dit_accel.load_adapter(pipe, saved["lora"])
    handle.remove()
    dit_accel.load_adapter(pipe, saved["lora"]).remove()


def test_an_adapter_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    pipe = tiny_pipe()
    (tmp_path / "file").write_text("")
    with dit_accel.patch(pipe, SLA):
        with pytest.raises(ValueError, match="Cannot write in"):
            dit_accel.save_adapter(pipe, tmp_path / "file" / "adapter")
        with pytest.raises(ValueError, match="Cannot write in"):
            dit_accel.save_adapter(pipe, tmp_path / "file")


def test_an_adapter_that_is_there_stays_when_the_next_cannot_be_written(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved["delta"], tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    pipe = tiny_pipe()

    def full(*args: Any, **options: Any) -> None:
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("dit_accel.tensor_files.save_file", full)
    with dit_accel.patch(pipe, SLA), pytest.raises(ValueError, match=r"Cannot write .*No space left on device"):
        dit_accel.save_adapter(pipe, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_loras_that_are_more_than_rank_and_scale_are_not_saved(tmp_path):
    from peft import LoraConfig

    for option in ({"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"blocks.0.attn1.to_q": 4}}):
        pipe = tiny_pipe()
        targets = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k"]
        with dit_accel.patch(pipe, SLA):
            pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, **option), adapter_name="mine")
            with pytest.raises(ValueError, match=f"LoRA layers of one rank and scale, got {next(iter(option))}"):
                dit_accel.save_adapter(pipe, tmp_path, backbone="lora")
            assert not list(tmp_path.iterdir())
