"""Hooks of MkDocs: pages made from the repository, and links that leave the folder docs/.

Pages in docs/ link to files of the repository, so that they can be read there as well. In the site
such a link leads to the page that is made from the file, if there is one, or to the repository.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LOG = logging.getLogger("mkdocs.hooks")  # a warning fails a strict build

FROM_ROOT = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "vulnerabilities.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that are a file of the root as it stands."""
PAGES = {
    **{source: page for page, source in FROM_ROOT.items()},
    "protos/stepstate/v1/stepstate.proto": "contract.md",
    "service/stepstate/config.py": "configuration.md",
    "service/stepstate/metrics/collector.py": "metrics.md",
    "service/stepstate/errors.py": "api/errors.md",
    "service/stepstate/client": "api/client.md",
    "service/stepstate/cli": "commands.md",
    "deploy/alerts.yml": "alerts.md",
}
"""The page that is made from a file or folder, for links to it."""

_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_TARGET = re.compile(r"""(\]\(|(?:src|href)=")([^)\s"]+)""")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    pages = {page: (ROOT / source).read_text() for page, source in FROM_ROOT.items()}
    for uri, text in (pages | reference.pages()).items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Rewrites links to files of the repository."""
    uri = page.file.src_uri
    source = FROM_ROOT.get(uri, f"docs/{uri}")
    blob = f"{config.repo_url}/blob/main/"
    raw = blob.replace("github.com", "raw.githubusercontent.com").replace("/blob/", "/")

    def follow(found: re.Match[str]) -> str:
        target, _, anchor = found[2].partition("#")
        if target.startswith((blob, raw)):
            path = target.removeprefix(blob).removeprefix(raw)
        elif "://" in target or not target:
            return found[0]
        else:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        return found[1] + _place(path, uri, blob) + ("#" + anchor if anchor else "")

    return _outside_code(markdown, follow)


def _outside_code(markdown: str, follow: Callable[[re.Match[str]], str]) -> str:
    pieces, last = [], 0
    for block in _FENCED.finditer(markdown):
        pieces += [_TARGET.sub(follow, markdown[last : block.start()]), block[0]]
        last = block.end()
    return "".join([*pieces, _TARGET.sub(follow, markdown[last:])])


def _place(path: str, uri: str, blob: str) -> str:
    """Where a file of the repository is, seen from a page."""
    page = PAGES.get(path, "")
    if path.startswith("docs/") and not (ROOT / path).is_dir():
        page = path.removeprefix("docs/")  # MkDocs checks that it exists
    if page:
        return posixpath.relpath(page, posixpath.dirname(uri) or ".")
    if not (ROOT / path).exists():
        LOG.warning("%s links to %s, which is not in the repository", uri, path)
    return blob + path
