"""Hook of the documentation: files of the repository that a page links to become files of the site.

On a page they are linked as on a forge, ``../examples/add_a_router.py``; the site holds them as text in ``files/``, a
folder as the list of its files.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def outside(page: str, link: str) -> str | None:
    """Return the path in the repository of what a link leads to; None where that lies in ``docs``."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith(("docs/", "..")) or not (ROOT / path).exists() else path


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to."""
    from mkdocs.structure.files import File

    for page in list(files.documentation_pages()):
        for _, link in LINK.findall(page.content_string):
            path = outside(page.src_uri, link)
            if path is not None and files.get_file_from_path(target := shown(path)) is None:
                content = (ROOT / path).read_text() if (ROOT / path).is_file() else "\n".join(tree(ROOT / path))
                files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links there."""

    def moved(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        return match[1] + posixpath.relpath(shown(path), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)


def shown(path: str) -> str:
    """Return where the site holds a file; as text, which browsers show."""
    return f"files/{path}.txt"


def tree(folder: Path) -> list[str]:
    """List the files of a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
