import json

import pytest

from dit_accel.quality.inspect_pipeline import inspect_pipeline
from tests.recipes import POOLED
from tests.tiny import TINY


def test_a_run_is_pictured(tmp_path):
    tiny = TINY["hunyuan"]
    pipe = tiny.build()
    recipe = POOLED.with_fields({"schedule.dense_fraction": 0.3})
    found = inspect_pipeline(pipe, lambda: tiny.run(pipe), tmp_path, recipe=recipe, layers=[1])
    assert found.steps == (0, 1, 2)
    for order in ("raster", "tiles", "recipe"):
        assert 0 < found.mean_density(order) <= 1
        assert (tmp_path / f"maps_{order}_layer01.png").exists()
    recalls = [f.recall for f in found.findings if f.order == "recipe"]
    assert all(0 < recall <= 1 for recall in recalls)
    assert json.loads((tmp_path / "patterns.json").read_text())
    assert not pipe.transformer._forward_pre_hooks


def test_nothing_observed_is_an_error(tmp_path):
    tiny = TINY["wan"]
    pipe = tiny.build()
    with pytest.raises(ValueError, match="nothing to inspect"):
        inspect_pipeline(pipe, lambda: tiny.run(pipe), tmp_path, recipe=POOLED, steps=[77])
    assert not pipe.transformer._forward_pre_hooks
