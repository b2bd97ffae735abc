"""Plain parts of reports: provenance in lines, cells of markdown, files that are written whole."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(final: Path, text: str) -> Path:
    """Write a file whole or not at all; the folder is there.

    Raises:
        OSError: it cannot be written.
    """
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)
    return final


def flat(told: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Label and text of each known entry; a mapping's entries carry its label in front."""
    lines: list[tuple[str, str]] = []
    for key, value in told.items():
        name = f"{before} {key}".strip()
        if isinstance(value, Mapping):
            lines += flat(value, name)
        elif isinstance(value, (list, tuple)):
            lines += [(name, ", ".join(map(str, value)))] if value else []
        elif value is not None and value != "":
            lines.append(
                (name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
            )
    return lines


def markdown_cell(text: str) -> str:
    """Text that a table of markdown leaves as it is."""
    text = re.sub(r"[\\|*`<>\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return " ".join(text.split())


def short_paths(text: str) -> str:
    """A text whose absolute paths are their last parts: whoever reads a report has another machine."""
    return _PATH.sub(r"\1", text)


_PATH = re.compile(r"""(?:\bfile://|(?<![\w:/.\\-]))~?/(?:[^\s/'"`,;:)<>|&]+/)+([^\s/'"`,;:)<>|&]+)""")
