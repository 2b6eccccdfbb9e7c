"""A hook of mkdocs: pages whose text lies elsewhere, links as GitHub has them, references as Sphinx has them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# By page, the file that it is made of.
ELSEWHERE = {
    "design.md": "DESIGN.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "comfyui.md": "integrations/comfyui/README.md",
    "train_embedded.md": "examples/train_embedded/README.md",
}
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
LINK = re.compile(r"\]\((?!https?:|#)(?P<target>[^)#\s]+)")
# A role of Sphinx around a name, which Markdown has made code of.
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>(?P<short>~?)(?P<name>[\w.]+)</code>")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links between files of the repository lead to their pages; a link to anything else stays, and fails."""
    here = posixpath.dirname(ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def of_page(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, link["target"]))
        inside = path.removeprefix("docs/") if path.startswith("docs/") else link["target"]
        return f"]({PAGE_OF.get(path, inside)}"

    return LINK.sub(of_page, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Leave the names of references: ``~`` asks for the last part alone."""

    def code(role: re.Match[str]) -> str:
        name = role["name"].rpartition(".")[2] if role["short"] else role["name"]
        return f"<code>{name}</code>"

    return ROLE.sub(code, html)
