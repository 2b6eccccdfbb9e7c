"""VMoBA's threshold without a sort, against exact arithmetic on the sorted pairs."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from dit_accel.kernels.selection.gate import select_by_threshold

from .test_selection import NAMED


def oracle(gates, threshold, block_q, block_k, seq_len, open_k, open_q):
    """One head, with rational numbers: bool [nq, nk]."""
    nq, nk = gates.shape
    pairs = [(i, j) for i in range(nq) for j in range(nk) if open_k[j] and open_q[i]]
    value = {pair: Fraction(float(gates[pair])) for pair in pairs}
    keep = torch.zeros(nq, nk, dtype=torch.bool)
    if not pairs:
        return keep
    least = min(value.values())
    total = sum(value[pair] - least for pair in pairs)
    own, others = [], []
    for i, j in pairs:
        tokens_q = set(range(i * block_q, min((i + 1) * block_q, seq_len)))
        (own if tokens_q & set(range(j * block_k, (j + 1) * block_k)) else others).append((i, j))
    gained = sum(value[pair] - least for pair in own)
    for pair in own:
        keep[pair] = True
    for place, pair in enumerate(sorted(others, key=lambda pair: (-value[pair], pair))):
        if place and gained >= Fraction(threshold) * total:
            break
        keep[pair] = True
        gained += value[pair] - least
    return keep


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("threshold", [0.05, 0.25, 0.8])
@pytest.mark.parametrize(
    ("seq_len", "block_q", "block_k", "masked", "tied"),
    [(330, 32, 16, False, False), (700, 64, 32, True, False), (330, 32, 16, True, True)],
)
def test_threshold(backend, threshold, seq_len, block_q, block_k, masked, tied, device):
    generator = torch.Generator().manual_seed(1)
    nq, nk = -(-seq_len // block_q), -(-seq_len // block_k)
    gates = torch.randn(2, 2, nq, nk, generator=generator) * 3
    if tied:
        gates = gates.round()  # a few values, both zeros among them
    open_k = torch.rand(2, 1, nk, generator=generator) > (0.3 if masked else -1.0)
    open_q = torch.rand(1, 1, nq, generator=generator) > (0.3 if masked else -1.0)
    options = {"open_k": open_k.to(device), "open_q": open_q.to(device)} if masked else {}
    found = select_by_threshold(
        gates.to(device), threshold, block_q=block_q, block_k=block_k, seq_len=seq_len, backend=backend, **options
    )
    for b in range(2):
        for h in range(2):
            want = oracle(gates[b, h], threshold, block_q, block_k, seq_len, open_k[b, 0], open_q[0, 0])
            assert torch.equal(found[b, h].cpu(), want)


@pytest.mark.parametrize(("kind", "threshold"), [("tied", 0.3), ("tied", 1.0), ("wide", 0.3)])
@pytest.mark.parametrize(("programs", "one_launch"), [(1, False), (5, False), (20, False), (1, True)])
def test_threshold_of_parts(programs, one_launch, kind, threshold, device, monkeypatch):
    """Heads split among programs, more heads than programs, several tiles a row, ties across parts."""
    from dit_accel.kernels.selection.triton import gate as triton_gate

    if one_launch:  # programs do not meet where each has whole heads, so that the interpreter can run it
        monkeypatch.setattr(triton_gate, "interpreted", lambda: False)
    generator = torch.Generator().manual_seed(2)
    seq_len, block_q, block_k, nq, nk = 4790, 256, 16, 19, 300
    gates = torch.randn(2, 1, nq, nk + 4, generator=generator)
    if kind == "tied":
        gates = gates.round()
    else:  # all digits of a float32 differ
        gates *= torch.randint(-40, 40, gates.shape, generator=generator).float().exp2()
    gates = gates[..., :nk]
    open_k = torch.rand(2, 1, nk, generator=generator) > 0.1
    open_q = torch.rand(1, 1, nq, generator=generator) > 0.1
    masks = (None, None) if programs == 5 else (open_k.to(device), open_q.to(device))
    torch.use_deterministic_algorithms(True)  # fills new tensors, so that what is not written differs
    try:
        found = triton_gate.select_by_threshold_triton(
            gates.to(device), threshold, block_q, block_k, seq_len, *masks, programs=programs
        )
    finally:
        torch.use_deterministic_algorithms(False)
    if programs == 5:
        open_k, open_q = torch.ones_like(open_k), torch.ones_like(open_q)
    for b in range(2):
        want = oracle(gates[b, 0], threshold, block_q, block_k, seq_len, open_k[b, 0], open_q[0, 0])
        assert torch.equal(found[b, 0].cpu(), want)


@pytest.mark.parametrize("backend", NAMED)
def test_threshold_without_choice(backend, device):
    """A head of one value keeps all of its pairs, one whose keys are all closed none."""
    gates = torch.full((2, 1, 5, 9), -0.25, device=device)
    open_k = torch.tensor([True, False], device=device).view(2, 1, 1).expand(2, 1, 9)
    found = select_by_threshold(gates, 0.5, block_q=32, block_k=16, seq_len=140, open_k=open_k, backend=backend)
    assert found[0].all()
    assert not found[1].any()
