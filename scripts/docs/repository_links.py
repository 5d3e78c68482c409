"""
An MkDocs hook that replaces links to files outside `docs/`, such as `../configuration/lora/experts.yaml`, with links to
the repository. In a clone and on GitHub, the original links work. If a file does not exist, the hook logs a warning,
which is an error in strict mode.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")
logger = logging.getLogger("mkdocs.hooks.repository_links")


def on_page_markdown(markdown: str, /, *, page: Any, config: Any, **kwargs: Any) -> str:
    root, docs = Path(config.config_file_path).resolve().parent, Path(config.docs_dir).resolve()
    source = Path(page.file.abs_src_path)

    def lead_to_repository(link: re.Match) -> str:
        target = (source.parent / link["path"]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            logger.warning("%s links to %s, which does not exist", page.file.src_uri, link["path"])
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(root).as_posix()}{link['anchor'] or ''})"

    return LINK.sub(lead_to_repository, markdown)
