"""The site of `make docs` has the repository's own places, so that a link between pages leads there as it does here."""

from __future__ import annotations

import logging

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tests.docs.markdown_pages import PAGES, ROOT, links

# Not --quiet, which takes warnings from --strict.
logging.getLogger("mkdocs").setLevel(logging.WARNING)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Instead of what lies in docs/: all pages by their paths from the root, and the files that they lead to."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    pages = [*PAGES, *sorted((ROOT / "docs" / "api").glob("*.md"))]
    targets = [page.parent / target.partition("#")[0] for page in pages for target in links(page)]
    for path in dict.fromkeys([*pages, *(path.resolve() for path in targets if path.is_file())]):
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files
