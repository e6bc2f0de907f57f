"""A self-contained HTML page: no network, no script, pictures embedded. Free of torch."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

__all__ = ["css", "data_uri", "figure", "write_page"]

_PICTURE_BYTES = 300_000  # a larger picture is embedded as a JPEG of at most _PICTURE_SIDE pixels across
_PICTURE_SIDE = 1000

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


def data_uri(path: Path) -> tuple[str, int] | None:
    """(data URI, width in pixels) of a picture, made smaller where it is large; None if unreadable."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            width, data, kind = image.width, path.read_bytes(), "png"
            if image.format != "PNG" or len(data) > _PICTURE_BYTES:
                small = image.convert("RGB")
                small.thumbnail((_PICTURE_SIDE, 4 * _PICTURE_SIDE))
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=85)
                width, data, kind = small.width, buffer.getvalue(), "jpeg"
    except (OSError, ValueError, SyntaxError):  # Pillow's errors; a preview is not worth failing for
        return None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", width


def figure(path: Path, caption: str) -> str:
    """A picture with its caption (text, not HTML); "" where there is no such picture."""
    found = data_uri(path) if path.is_file() else None
    if found is None:
        return ""
    about = escape(caption, quote=True)
    return f'<figure class="picture"><img src="{found[0]}" alt="{about}"><figcaption>{about}</figcaption></figure>'


def css() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")
