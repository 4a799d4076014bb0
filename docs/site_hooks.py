"""Hooks of MkDocs: they make the site from the same pages that are read in the repository.

README.md becomes the first page. A file or a folder of the repository that a page links to becomes a page of its own,
so that each link works: sources as a listing, notebooks with their outputs.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)((?:#[^)]*)?\))")  # "](", the target, and what follows it


def on_files(files, config):
    """Add the first page, and a page for each file or folder of the repository that a page links to."""
    first = _moved((ROOT / "README.md").read_text(encoding="utf-8"), "")
    files.append(File.generated(config, "index.md", content=first))
    pages = [path for pattern in ("*.md", "docs/*.md", "notebooks/*.ipynb") for path in ROOT.glob(pattern)]
    for path in sorted({target for page in pages for target in _targets(page)}):
        files.append(File.generated(config, _page_of(path), content=_shown(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Point the links of a page in docs/ to the pages that stand for files elsewhere."""
    return markdown if page.file.generated_by else _moved(markdown, "docs")


def _moved(markdown: str, folder: str) -> str:
    """Return a page of this folder of the repository with the links that hold in the site."""

    def link(found: re.Match) -> str:
        path = ROOT / posixpath.normpath(posixpath.join(folder, found[2]))
        return found[1] + (_site_path(path) if path.exists() else found[2]) + found[3]

    return LINK.sub(link, markdown)


def _site_path(path: Path) -> str:
    """Return where the site has a path of the repository, relative to the site's pages, which all lie at the top."""
    inside = path.relative_to(ROOT).as_posix()
    if inside == "README.md":
        return "index.md"
    return inside.removeprefix("docs/") if _in_site(path) else _page_of(path)


def _in_site(path: Path) -> bool:
    """Return whether MkDocs finds this file itself."""
    return path.parent == ROOT / "docs" and path.suffix not in (".py", ".txt")


def _page_of(path: Path) -> str:
    return "files-" + path.relative_to(ROOT).as_posix().replace("/", "-") + ".md"


def _targets(page: Path) -> set[Path]:
    """Return the files and folders outside docs/ that a page links to."""
    text = page.read_text(encoding="utf-8")
    found = {(page.parent / match[2]).resolve() for match in LINK.finditer(text)}
    inside = {path for path in found if path.exists() and path.is_relative_to(ROOT)}
    return {path for path in inside if not _in_site(path) and path != ROOT / "README.md"}


def _shown(path: Path) -> str:
    """Return the page of a file or a folder."""
    title = f"# {path.relative_to(ROOT)}\n\n"
    if path.is_dir():
        return title + "\n".join(f"- `{each.name}`" for each in sorted(path.iterdir()) if each.name[0] not in "_.")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    if path.suffix == ".md":
        return _moved(text, path.parent.relative_to(ROOT).as_posix())
    language = {".py": "python", ".json": "json", ".yaml": "yaml", ".h": "cpp", ".cpp": "cpp"}.get(path.suffix, "text")
    return f"{title}````{language}\n{text}\n````\n"


def _cell(cell: dict) -> str:
    """Return a notebook's cell as Markdown, with its text and its pictures."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return _moved(source, "notebooks")
    parts = [f"```python\n{source}\n```"]
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if "image/png" in data:
            parts.append(f"![a picture](data:image/png;base64,{''.join(data['image/png']).strip()})")
        elif text := "".join(output.get("text", data.get("text/plain", ""))):
            parts.append(f"```text\n{text}```" if text.endswith("\n") else f"```text\n{text}\n```")
    return "\n\n".join(parts)
