"""The pages of the docs site: .ci/run builds it, and these need no mkdocs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dit_accel
from dit_accel.recipe import PROTOCOLS

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
IDENTIFIERS = re.findall(r"^::: (\S+)$", API, re.MULTILINE)


@pytest.mark.parametrize("name", dit_accel.__all__)
def test_the_page_of_the_api_has_each_public_name(name: str) -> None:
    thing = getattr(dit_accel, name)
    full = f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else thing.__name__
    assert full in IDENTIFIERS or full.rpartition(".")[0] in IDENTIFIERS


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
