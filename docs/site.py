"""What mkdocs cannot know: pages and pictures outside of docs/, under the names by which pages link to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = ["CONTRIBUTING.md", *(str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("benchmarks/results/*.png"))]


def on_files(files: Files, config: Any) -> Files:
    """Add them, as if they lay in docs/."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links from and to them at where they are now."""
    for name in OUTSIDE:
        markdown = markdown.replace(f"](../{name})", f"]({name})")
    return markdown.replace("](docs/", "](") if page.file.src_uri in OUTSIDE else markdown
