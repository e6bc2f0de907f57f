"""A self-contained HTML page: no network, no script, pictures embedded. Free of torch."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

__all__ = ["css", "embedded", "write_page"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_page(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Write a page of HTML ``sections`` (empty ones are left out), all of it or nothing; returns ``path``."""
    page = _PAGE.format(title=escape(title), css=css(), body="\n".join(filter(None, sections)))
    partial = path.with_name(f"{path.name}.tmp")
    # A lone surrogate from a stranger's file name cannot be written as UTF-8.
    partial.write_text(page, encoding="utf-8", errors="replace")
    os.replace(partial, path)  # never half a page
    return path


def embedded(picture: Path, alt: str) -> str:
    """A PNG as an `<img>` that needs no file beside the page."""
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def css() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")
