"""Every transformer of diffusers is of a family, or says why it is of none."""

import importlib
import inspect
import pkgutil
import re

import diffusers
import pytest
import torch
from diffusers.models import transformers
from diffusers.models.modeling_utils import ModelMixin
from packaging.version import Version

import dit_accel
from benchmarks.families_table import NEWER, OLDEST, PAGE, README, page, short_table
from dit_accel.patches.families import EXCLUDED, FAMILIES
from tests.tiny import TINY
from tests.tiny_registry import MODELS

# Of transformers that pipelines test, in every way and not only in their forward.
IN_PIPELINES = {
    "wan": "WanTransformer3DModel",
    "wan-vace": "WanVACETransformer3DModel",
    "hunyuan": "HunyuanVideoTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "flux": "FluxTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "qwen-image": "QwenImageTransformer2DModel",
}


def _classes() -> set[str]:
    found = set()
    for info in pkgutil.walk_packages(transformers.__path__, transformers.__name__ + "."):
        module = importlib.import_module(info.name)
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__:
                found.add(name)
    return found


def _documented() -> str:
    """The version of diffusers that docs/families.md is of."""
    return re.search(r"With diffusers ([\d.]+):", PAGE.read_text(encoding="utf-8"))[1]


def _declared() -> list[str]:
    return [name for family in FAMILIES for name in family.transformers]


def test_every_transformer_is_declared_or_excluded():
    assert _classes() - set(_declared()) - set(EXCLUDED) == set()


def test_no_class_is_declared_twice_or_excluded_too():
    declared = _declared()
    assert len(declared) == len(set(declared))
    assert not set(declared) & set(EXCLUDED)


def test_every_class_that_is_named_exists():
    """A name that diffusers has changed would be of no use."""
    if Version(diffusers.__version__) < Version(_documented()):
        pytest.skip(
            f"diffusers {diffusers.__version__} lacks what came up to {_documented()}, of which docs/families.md is"
        )
    assert (set(_declared()) | set(EXCLUDED)) - _classes() == set()
    assert not [name for name in _declared() if not hasattr(diffusers, name)]


def test_the_oldest_version_is_that_of_the_package():
    text = (PAGE.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'"diffusers>=([\d.]+)"', text)[1] == OLDEST


def test_classes_that_the_oldest_version_lacks_are_marked():
    assert set(_declared()) >= NEWER
    if not diffusers.__version__.startswith(f"{OLDEST}."):
        pytest.skip(f"what diffusers {OLDEST} lacks is seen with that version alone (.ci/run)")
    assert set(_declared()) - _classes() == NEWER


def test_every_declared_class_is_tested():
    assert set(IN_PIPELINES) <= set(TINY)
    assert set(_declared()) == {tiny.kind for tiny in MODELS.values()} | set(IN_PIPELINES.values())


@pytest.mark.parametrize("name", EXCLUDED)
def test_a_reason_is_a_sentence(name):
    assert EXCLUDED[name][0].isupper()
    assert EXCLUDED[name].endswith(".")


def test_an_excluded_class_is_refused_with_its_reason():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^SanaTransformer2DModel cannot be patched\. Its self-attention is linear"):
        dit_accel.patch(model)


def test_an_unknown_class_is_refused_with_what_was_looked_for():
    with pytest.raises(ValueError, match=r"Linear is of no known family, and its forward takes no hidden_states"):
        dit_accel.patch(torch.nn.Linear(1, 1))


def test_the_readme_and_the_changelog_are_what_the_registry_says():
    assert page(text := README.read_text(encoding="utf-8"), short_table()) == text, "run benchmarks/families_table.py"
    text = (README.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert int(re.search(r"(\d+) transformer classes", text)[1]) == len(_declared())


def test_the_page_of_families_is_what_the_registry_says():
    text = PAGE.read_text(encoding="utf-8")
    if diffusers.__version__ != _documented():
        pytest.skip(f"the page is of another diffusers than {diffusers.__version__}")
    assert page(text) == text, "run benchmarks/families_table.py"
