"""What cannot work is said in one sentence before anything is touched."""

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.patches import seam
from dit_accel.stages.select.static import Window
from tests.recipes import POOLED
from tests.tiny import TINY


class UnheardOfTransformer(torch.nn.Module):
    pass


class Pipeline:
    def __init__(self, transformer):
        self.components = {"transformer": transformer, "vae": torch.nn.Identity()}


def test_an_unknown_transformer_names_the_class_and_where_the_known_ones_are():
    with pytest.raises(ValueError) as error:
        dit_accel.patch(Pipeline(UnheardOfTransformer()), "pooled")
    for word in ("UnheardOfTransformer", "no known family", "dit-accel info", "register_family"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match=r"Pipeline has no transformer. Known families: Wan, "):
        dit_accel.patch(Pipeline(None))
    with pytest.raises(ValueError, match="takes a diffusers pipeline or transformer, got str"):
        dit_accel.patch("wan", "pooled")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "fastest"}, "Unknown recipe 'fastest'; known are"),
        ({"recipe": "pooled", "density": 0}, r"must lie in \(0, 1\], got 0"),
        ({"recipe": "pooled", "sparsity": 0.8}, "has no option 'sparsity'"),
        ({"recipe": "pooled", "backend": "cuda"}, "Unknown backend 'cuda'; known are auto"),
    ],
)
def test_bad_arguments_touch_nothing(arguments, message):
    pipe = TINY["wan"].build()
    users = {key: replacement.users for key, replacement in seam._replacements.items()}
    with pytest.raises(ValueError, match=message):
        dit_accel.patch(pipe, **arguments)
    assert not pipe.transformer._forward_pre_hooks
    assert {key: replacement.users for key, replacement in seam._replacements.items()} == users


def test_a_window_larger_than_the_grid():
    tiny = TINY["wan"]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    error = pytest.raises(ValueError, match="spans 50 tokens, but the grid has 6 in height")
    with dit_accel.patch(pipe, Recipe(select=Window(window=(3, 50, 3)))), error:
        tiny.run(pipe)
    assert torch.equal(tiny.run(pipe), plain)


def test_a_named_backend_that_cannot_run_raises():
    tiny = TINY["wan"]
    pipe = tiny.build()
    error = pytest.raises(ValueError, match=r"'triton' cannot run attention here: .*float64")
    with dit_accel.patch(pipe.to(torch.float64), POOLED, backend="triton"), error:
        tiny.run(pipe)


def test_automatic_choice_stays_dense_where_a_sequence_is_short_and_says_so():
    tiny = TINY["wan"]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    with dit_accel.patch(pipe) as handle:
        assert torch.equal(tiny.run(pipe), plain)
        summary = handle.summary()
    (reason,) = summary.dense_calls
    assert "126 tokens, too few to gain" in reason
    assert "no recipe was given" in str(summary)
    assert summary.sparse_calls == 0


def test_nan_is_counted_in_the_summary():
    tiny = TINY["wan"]
    pipe = tiny.build()
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_q.weight[0, 0] = float("nan")
    with dit_accel.patch(pipe, POOLED) as handle:
        out = tiny.run(pipe, steps=1)
        assert out.isnan().any()
        assert handle.summary().nan_calls >= 1
        assert "gave NaN" in str(handle.summary())
