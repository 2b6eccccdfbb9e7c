"""A hook of mkdocs: pages whose text lies elsewhere in the repository, and links to them as GitHub has them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# By page, the file that it is made of.
ELSEWHERE = {
    "design.md": "DESIGN.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "train_embedded.md": "examples/train_embedded/README.md",
}
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
LINK = re.compile(r"\]\((?!https?:|#)(?P<target>[^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
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
