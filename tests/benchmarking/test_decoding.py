"""Counts of a decode: launches, bytes, products and memory of operations that are known."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks import decoding


def test_counts_of_known_operations():
    with torch.device("meta"):
        x, weight = torch.empty(1, 2, 8, 8), torch.empty(4, 2, 3, 3)
    with decoding.Counted() as counted:
        first = torch.nn.functional.conv2d(x, weight).view(1, -1)
        second = first + 1
        del first
        second.clone()
    made = 4 * 6 * 6
    assert counted.launches == {"convolution": 1, "add": 1, "clone": 1}
    assert counted.moved == 4 * (x.numel() + weight.numel() + made + 2 * made + 2 * made)
    assert counted.products == made * 2 * 9
    assert counted.peak == 2 * 4 * made


def test_a_row_for_each_setting(monkeypatch, capsys):
    asked = ["decoding.py", "embedded", "--size", "64x64", "--frames", "9", "--count", "--settings", "frames=2"]
    monkeypatch.setattr(sys, "argv", asked)
    decoding.main()
    plain, grouped = (json.loads(line[line.index("{") :]) for line in capsys.readouterr().out.splitlines()[-2:])
    assert grouped["launches"] < plain["launches"]
    assert grouped["tflop"] == plain["tflop"]
