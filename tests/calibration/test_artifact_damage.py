"""Damaged calibrations: one sentence that names the fault, and an untouched pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit_accel import patch, unpatch
from tests.calibration.test_runs import RECIPE, pipeline, run


def _header(path: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["dit_accel"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Any:
    path = tmp_path_factory.mktemp("finished") / "file"
    run(pipeline(), path)
    return path


DAMAGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "format": (lambda header, _: header.update(format="x"), "is no calibration of version 1"),
    "version": (lambda header, _: header.update(version=9), "it says 'dit_accel.calibration', version 9"),
    "no transformers": (lambda header, _: header.pop("transformers"), "damaged calibration: 'transformers' is missing"),
    "transformers": (lambda header, _: header.update(transformers=[1]), "is a damaged calibration"),
    "no masks": (lambda _, tensors: tensors.clear(), "'transformer.masks' is missing"),
    "masks": (lambda _, tensors: tensors.update({"transformer.masks": torch.ones(2)}), "frozen masks of 2 buckets"),
    "edges": (lambda header, _: header["transformers"]["transformer"].update(edges=[0.1, 0.2]), "frozen masks of 3"),
    "grid": (lambda header, _: header["transformers"]["transformer"].update(grid=3), "is a damaged calibration"),
    "recipe": (lambda header, _: header.update(recipe="mass"), "is a damaged calibration"),
    "fingerprint": (
        lambda header, _: header["transformers"]["transformer"].update(fingerprint={"heads": 2}),
        "a fingerprint has transformer, layers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_calibration_is_named_in_one_sentence(damage, finished, tmp_path):
    spoil, words = DAMAGES[damage]
    header, tensors = _header(finished)
    spoil(header, tensors)
    save_file(tensors, tmp_path / "file", metadata={"dit_accel": json.dumps(header)})
    pipe = pipeline()
    with pytest.raises(ValueError, match=words) as caught:
        patch(pipe, RECIPE, calibration=tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="is not patched"):
        unpatch(pipe)


@pytest.mark.parametrize("text", [None, "[1]", "{", "null"])
def test_a_file_without_a_header_is_no_calibration(text, finished, tmp_path):
    _, tensors = _header(finished)
    save_file(tensors, tmp_path / "file", metadata=None if text is None else {"dit_accel": text})
    with pytest.raises(ValueError, match=r"is no calibration file: [^\n]+\.$"):
        patch(pipeline(), RECIPE, calibration=tmp_path / "file")
