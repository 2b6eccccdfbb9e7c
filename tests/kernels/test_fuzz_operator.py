"""The fuzzing of the operator: it passes on backends that are right, and sees small faults."""

import json

import pytest
import torch

from benchmarks import fuzz_calls, fuzz_operator
from dit_accel.kernels import block_sparse_attention

SHORT = ["--device", "cpu", "--longest", "70", "--backends", "torch,reference"]


def test_calls_pass_and_are_recorded(tmp_path, capsys):
    path = tmp_path / "fuzz.json"
    assert fuzz_operator.main([*SHORT, "--count", "40", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "numbers 0 to 39: 0 wrong" in printed
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["failures"] == []
    assert sum(tally["calls"] for tally in record["tallies"]) == 40
    assert all(0 < tally["out"] < 1 for tally in record["tallies"])


def test_it_stops_in_time_and_says_where_to_go_on(capsys):
    assert fuzz_operator.main([*SHORT, "--first", "7", "--seconds", "0"]) == 0
    assert "go on with --first 7" in capsys.readouterr().out


def test_a_call_depends_on_its_number_alone():
    shape = fuzz_calls.shapes(3)[5]
    one, same, other = (fuzz_calls.draw(3, number, shape, 2, torch.device("cpu"), 90) for number in (5, 5, 6))
    assert one.describe() == same.describe()
    assert torch.equal(one.q, same.q)
    assert torch.equal(one.mask.kv_indices, same.mask.kv_indices)
    assert one.q.shape != other.q.shape or not torch.equal(one.q, other.q)


def without_key_mask(q, k, v, mask, *, key_mask, **options):
    return block_sparse_attention(q, k, v, mask, key_mask=None, **options)


def of_eleven_bits(q, k, v, mask, **options):
    """Queries as TF32 rounds them, in float32 alone."""
    if q.dtype == torch.float32:
        rounded = ((q.detach().contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        q = q + (rounded - q).detach()
    return block_sparse_attention(q, k, v, mask, **options)


def a_row_unwritten(*call, **options):
    out, lse = block_sparse_attention(*call, **options)
    last = torch.arange(out.shape[1]) == out.shape[1] - 1
    return out.masked_fill(last[:, None, None], torch.nan), lse


def twice_the_last_key(q, k, v, mask, **options):
    """As if a tile reached past the end of the sequence."""
    out, lse = block_sparse_attention(q, k, v, mask, **options)
    return out, torch.logaddexp(lse, lse.new_full((), -2.0))


def values_of_the_neighbour(q, k, v, mask, **options):
    return block_sparse_attention(q, k, v.roll(1, 2), mask, **options)


class WrongGradient(torch.autograd.Function):
    """One in a hundred too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def gradient_of_keys_off(q, k, v, mask, **options):
    return block_sparse_attention(q, WrongGradient.apply(k), v, mask, **options)


def other_bits_each_time(*call, **options):
    out, lse = block_sparse_attention(*call, **options)
    return out, lse + torch.rand(()) * 2.0**-26 * lse.nan_to_num(0.0, 0.0, 0.0).abs().clamp_min(1.0)


def raises(*call, **options):
    raise RuntimeError("no such kernel\nand more")


FAULTS = [
    without_key_mask,
    of_eleven_bits,
    a_row_unwritten,
    twice_the_last_key,
    values_of_the_neighbour,
    gradient_of_keys_off,
    other_bits_each_time,
    raises,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_seen(fault, monkeypatch, capsys):
    monkeypatch.setattr(fuzz_operator, "block_sparse_attention", fault)
    assert fuzz_operator.main([*SHORT, "--count", "60", "--seed", "1"]) == 1
    printed = capsys.readouterr().out
    assert "--seed 1 --first " in printed
    assert ("RuntimeError: no such kernel\n" if fault is raises else "times what is allowed: ") in printed
    assert fault is raises or "Error" not in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--backends", "cuda"], "--backends must be of auto, "),
        (["--dtypes", "float8"], "--dtypes must be of float32, "),
        (["--count", "0"], "--count and --longest must be at least 1"),
    ],
)
def test_bad_arguments_are_named(given, message, capsys):
    with pytest.raises(SystemExit):
        fuzz_operator.main(given)
    assert message in capsys.readouterr().err
