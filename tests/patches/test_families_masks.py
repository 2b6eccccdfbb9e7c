"""Masks of pairs: a key mask where they say no more."""

import pytest
import torch

import dit_accel
from dit_accel.layout import TokenLayout
from dit_accel.patches import masks
from tests.patches.test_families import FULL
from tests.tiny_registry import MODELS

LAYOUT = TokenLayout((1, 2, 3), 2, 12)  # latents at 2 to 7


def _outer(hidden):
    keys = torch.ones(2, 12, dtype=torch.bool)
    keys[0, list(hidden)] = False
    return keys, keys[:, None, None, :] & keys[:, None, :, None]


@pytest.mark.parametrize("hidden", [(), (10, 11), (0, 9)])
@pytest.mark.parametrize("at_a_time", [1, 2**28])
def test_keys_times_queries_is_a_key_mask(hidden, at_a_time, monkeypatch):
    monkeypatch.setattr(masks, "_PAIRS_AT_A_TIME", at_a_time)
    keys, pairs = _outer(hidden)
    assert torch.equal(masks.key_mask_of_pairs(pairs, LAYOUT), keys)
    # What padded rows see is nobody's business, also where they see all.
    for row in hidden:
        pairs[0, :, row] = True
    assert torch.equal(masks.key_mask_of_pairs(pairs, LAYOUT), keys)


@pytest.mark.parametrize(
    ("row", "column"),
    [(3, 4), (7, 0), (0, 5), (9, 10), (1, 1)],
    ids=["between latents", "a latent and text", "text and a latent", "text", "a token and itself"],
)
def test_a_mask_that_hides_a_pair_is_more_than_a_key_mask(row, column):
    _, pairs = _outer((10, 11))
    pairs[1, 0, row, column] = False
    assert masks.key_mask_of_pairs(pairs, LAYOUT) is None


def test_a_hidden_latent_still_reads():
    """Its output is the model's, so its row counts although no other reads it."""
    keys, pairs = _outer((4,))
    assert masks.key_mask_of_pairs(pairs, LAYOUT) is None
    pairs[0, 0, 4] = keys[0]
    assert torch.equal(masks.key_mask_of_pairs(pairs, LAYOUT), keys)


def test_a_mask_is_looked_at_once_a_forward(monkeypatch):
    tiny = MODELS["hunyuan-1.5"]
    model = tiny.build()
    looked = []
    monkeypatch.setattr(
        "dit_accel.patches.forwards.key_mask_of_pairs",
        lambda mask, layout: looked.append(1) or masks.key_mask_of_pairs(mask, layout),
    )
    with dit_accel.patch(model, FULL) as handle:
        for _ in range(3):
            tiny.run(model)
        assert handle.summary().sparse_calls == 6
    assert len(looked) == 3


def test_other_masks_of_pairs_run_sparse_as_they_are(monkeypatch):
    tiny = MODELS["hunyuan-1.5"]
    model = tiny.build()
    plain = tiny.run(model)
    monkeypatch.setattr("dit_accel.patches.forwards.key_mask_of_pairs", lambda mask, layout: None)
    with dit_accel.patch(model, FULL) as handle:
        assert (tiny.run(model) - plain).abs().max() <= 1e-9 * plain.abs().max()
        assert not handle.summary().dense_calls


def test_causal_blocks_of_frames_run_sparse_as_they_are():
    tiny = MODELS["skyreels"]
    model = tiny.build()
    model._set_ar_attention(2)
    plain = tiny.run(model)
    calls = []
    with dit_accel.patch(model, FULL) as handle, handle.observe(lambda _, call: calls.append(call)):
        assert (tiny.run(model) - plain).abs().max() <= 1e-9 * plain.abs().max()
        assert all(call.pairs is not None for call in calls)
        assert not handle.summary().dense_calls


def test_a_repeated_block_finds_the_key_mask_of_its_forward():
    """Gradients through checkpointed blocks are those of the model's own attention over all blocks."""
    tiny = MODELS["hunyuan-1.5"]
    gradients = []
    for recipe in ("dense", FULL):
        model = tiny.build()
        model.enable_gradient_checkpointing()
        with dit_accel.patch(model, recipe):
            given = tiny.given()
            given["hidden_states"].requires_grad_()
            model(**given, return_dict=False)[0].square().sum().backward()
        gradients.append(given["hidden_states"].grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-9 * gradients[0].abs().max()


def test_a_mask_that_is_added_is_read_as_pairs_once_a_forward():
    tiny = MODELS["omnigen"]
    model = tiny.build()
    given = tiny.given()
    calls = []
    with dit_accel.patch(model, FULL) as handle, handle.observe(lambda _, call: calls.append(call)):
        tiny.run(model, given)
        # Another prompt's mask, in the next forward.
        given["attention_mask"][:, :, 3] = 0
        tiny.run(model, given)
        assert not handle.summary().dense_calls
    for first, second, hidden in ((0, 1, 2), (2, 3, 3)):
        assert calls[first].pairs is not None
        assert calls[first].pairs.data_ptr() == calls[second].pairs.data_ptr()
        assert calls[first].pairs[0, 0, 20].nonzero()[0] == 2
        assert int((~calls[first].pairs[0, 0, 20]).sum()) == hidden
    assert torch.equal(calls[0].pairs[0, 0, 2:9, 2:9], torch.ones(7, 7).tril().bool())
