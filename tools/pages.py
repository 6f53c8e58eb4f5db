"""Blocks of pages that tools write, between two marks, and what is said of where figures come from."""

import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from chinese import chinese

README, README_ZH, FIGURES = Path("README.md"), Path("README.zh-CN.md"), Path("docs/figures.md")
Marks = tuple[str, str]


def put(page: Path, lines: Sequence[str], marks: Marks) -> None:
    """Replace what stands between two marks of a page."""
    before, rest = page.read_text().split(marks[0])
    page.write_text(before + "\n".join([marks[0], *lines, marks[1]]) + rest.split(marks[1])[1])


def put_everywhere(lines: Sequence[str], marks: Marks, *, source: str) -> None:
    """Write the figures of both READMEs, and those of the page of figures below the words that say what made them."""
    put(README, lines, marks)
    put(README_ZH, chinese(lines), marks)
    put(FIGURES, [source, "", *(line.replace("](docs/", "](") for line in lines)], marks)  # it stands in docs/


def source(command: str, place: str, *, on: str | None = None, code: str | None = None) -> str:
    """Say what made figures, where, when (today unless told) and from which code (the latest commit's)."""
    return f"`{command}` · {place} · {on or date.today()} · commit {code or commit()}"


def commit(*, marked: bool = False) -> str:
    """Return the latest commit; ``marked`` says so where files differ from it, and is empty outside a checkout."""
    git = ["git", "describe", "--always", "--exclude=*", *(["--dirty"] if marked else [])]
    folder = Path(__file__).parent
    return subprocess.run(git, cwd=folder, capture_output=True, text=True, check=not marked).stdout.strip()


def processor() -> str:
    """Return the kind of processor here."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return names[0] if names else platform.machine()
