"""What the site shows beside docs/*.md: changelog, contributing, cards, figures, notebooks.

Documents link to files of the repository as they lie there, so that the links work in a checkout as
well; here these files become part of the site, and the links lead to them.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "ipr_jax/models/mini-sudoku.md": "models/mini-sudoku.md",
    "ipr_jax/models/mini-sudoku-transformer.md": "models/mini-sudoku-transformer.md",
    "ipr_jax/models/digits-sudoku.md": "models/digits-sudoku.md",
    "ipr_jax/models/mnist-sudoku-transformer.md": "models/mnist-sudoku-transformer.md",
    "ipr_jax/models/even-pixels-transformer.md": "models/even-pixels-transformer.md",
}
"""Where a file of the repository is in the site."""

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
"""The address of a link or picture, without what follows a hash."""


def place_of(path: str) -> str:
    """Where the site has a file of the repository: pages elsewhere, figures where they are."""
    return PAGES.get(path, re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/")))


def shown(notebook: Path) -> str:
    """A notebook as Markdown, with its outputs: text, and pictures in the page."""
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif picture := output.get("data", {}).get("image/png"):
                parts.append(f"![what it draws](data:image/png;base64,{picture.strip()})")
    return "\n\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Add the files, all results of the benchmarks among them, and the notebooks as pages."""
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        place = place_of(str(notebook.relative_to(ROOT)))
        files.append(File.generated(config, place, content=shown(notebook)))
    results = [path for path in (ROOT / "benchmarks" / "results").rglob("*") if path.is_file()]
    for path in (*PAGES, *(str(path.relative_to(ROOT)) for path in sorted(results))):
        files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Let links that leave docs/ lead to where the site has the file; of a folder, to its list."""
    place = page.file.src_uri
    source = next((path for path, there in PAGES.items() if there == place), f"docs/{place}")

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        if (ROOT / path).is_dir():
            path = f"{path}/{min(each.name for each in (ROOT / path).iterdir())}"
        return posixpath.relpath(place_of(path), posixpath.dirname(place) or ".")

    return LINK.sub(moved, markdown)
