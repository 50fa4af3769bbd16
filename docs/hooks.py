"""Hooks of mkdocs: pages that stand elsewhere in the repository, and the help of every command."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = {
    "examples/raspberry_pi/README.md": "how-to/raspberry_pi.md",
    "examples/models/README.md": "reference/models.md",
    "device_profiles/README.md": "reference/device_profiles.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files outside of docs/, and the pages of the site that they become."""

_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_HELP = re.compile(r"^```help\n(.*?)\n```$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand elsewhere."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Bend links to where pages stand in the site, and run the commands of `help` blocks."""
    site_path = page.file.src_uri
    sources = {page: source for source, page in ELSEWHERE.items()}
    source = sources.get(site_path, f"docs/{site_path}")

    def bend(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            return link[0]  # mkdocs reports it
        if path in ELSEWHERE:
            found = ELSEWHERE[path]
        elif path.startswith("docs/"):
            found = path.removeprefix("docs/")
        else:
            return text  # a file that the site does not have
        there = posixpath.relpath(found, posixpath.dirname(site_path) or ".")
        return f"[{text}]({there}{anchor or ''})"

    markdown = markdown.replace("```sh not-emulated\n", "```sh\n")  # a mark for tests
    return _HELP.sub(lambda block: _help(block[1]), _LINK.sub(bend, markdown))


def _help(command: str) -> str:
    environment = {**os.environ, "COLUMNS": "100"}
    words = [sys.executable, "-m", "bapq_edge.cli", *command.split()[1:], "--help"]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return f"```text\n{found.stdout.rstrip()}\n```"
