"""The pages of the docs site: .ci/run builds it, and these need no mkdocs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dit_accel
from dit_accel import kernels
from dit_accel.recipe import PROTOCOLS

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
IDENTIFIERS = re.findall(r"^::: (\S+)$", API, re.MULTILINE)


@pytest.mark.parametrize("name", dit_accel.__all__)
def test_the_page_of_the_api_has_each_public_name(name: str) -> None:
    thing = getattr(dit_accel, name)
    full = f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else thing.__name__
    assert full in IDENTIFIERS or full.rpartition(".")[0] in IDENTIFIERS


@pytest.mark.parametrize("name", [name for name in kernels.__all__ if callable(getattr(kernels, name))])
def test_the_page_of_the_api_has_each_operator(name: str) -> None:
    thing = getattr(kernels, name)
    if name not in ("Choice", "QuantizedInputs"):  # which operators return, and nobody makes
        assert f"{thing.__module__}.{thing.__qualname__}" in IDENTIFIERS


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_the_pages_name_each_protocol(protocol: type) -> None:
    full = f"{protocol.__module__}.{protocol.__qualname__}"
    assert full in IDENTIFIERS
    assert f"`{full}`" in (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_on_extending_runs() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {"__name__": __name__}
    exec(compile(code, "extending.md", "exec", dont_inherit=True), names)
    try:
        recipe = names["recipe"]
        assert isinstance(recipe, dit_accel.Recipe)
        assert recipe.select.density == 0.5
        assert recipe.to_dict()["select"]["kind"] == "careful_mass"
    finally:
        dit_accel.unregister("careful_mass", names["CarefulMass"])


@pytest.fixture(scope="module")
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / ".ci" / "docs_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "text", "found"),
    [
        ("embedded.md", "[a](../examples/train_embedded/README.md#in-pieces)", "[a](train_embedded.md#in-pieces)"),
        ("embedded.md", "![a](images/a.png) [b](recipes.md#x)", "![a](images/a.png) [b](recipes.md#x)"),
        ("design.md", "[a](docs/reuse.md) [b](CHANGELOG.md)", "[a](reuse.md) [b](changelog.md)"),
        ("train_embedded.md", "[a](../../docs/embedded.md)", "[a](embedded.md)"),
        ("recipes.md", "[a](https://x.y/docs/z.md) [b](#here) [c](gone.md)", None),
    ],
)
def test_links_of_the_repository_lead_to_pages(hook: Any, page: str, text: str, found: str | None) -> None:
    made = hook.on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=page)))
    assert made == (text if found is None else found)


def test_references_in_docstrings_are_names(hook: Any) -> None:
    html = "a :func:<code>~dit_accel.patch</code>, :meth:<code>to_dict</code>, :data:<code>a.b</code>, <code>~x</code>"
    assert hook.on_page_content(html) == (
        "a <code>patch</code>, <code>to_dict</code>, <code>a.b</code>, <code>~x</code>"
    )
