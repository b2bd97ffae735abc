"""What people see of a comparison: a table at the terminal, markdown, CSV, and a page of HTML.

    summary   the job's JSON object: what the terminal, markdown and CSV tell
    pairs     beside it the tables of `table=tokens`: what the page's pictures and texts are made from

`terminal.show` prints; `write` writes `comparison.md`, `comparison.csv` and, where the extra `report` is
installed, `comparison.html`, one file without a link to anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)

STEM = "comparison"
"""The files are `comparison.md`, `comparison.csv` and `comparison.html`."""

NO_EXTRA = (
    "no HTML report: Altair and vl-convert-python are not installed; pip install 'pagemill[report]' brings "
    "them, and the same command then writes the page from the stored tables"
)


class Decoder(Protocol):
    """What the page asks of a tokenizer; `engine.Tokenizer` is one."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that token ids stand for."""
        ...


@dataclass(frozen=True)
class Pair:
    """Base and one variant, target by target.

    Attributes:
        name: of the variant, as in the summary's `variants`.
        windows: rows of `table=tokens` in window order. Read from it: `window`, `document`, `first_token`,
            `first_scored`, `distance`, `n_scored`, `kld_sum`; of windows whose tokens were kept the list
            columns `nll_base`, `nll`, `kld`, `top_base`, `top`, of others the sketch `dp_keys`, `dp_counts`.
    """

    name: str
    windows: pa.Table


@dataclass(frozen=True)
class Pairs:
    """All that the page shows beside the summary.

    Attributes:
        base: name of the base.
        pairs: one for each variant that was scored, in any order.
        tokens: (n,) int32, the token stream that `first_token` counts in; None where it is not at hand.
        provenance: what to tell in the last table, label -> value in that order; a value may be a mapping,
            whose entries become lines of their own, or None, which leaves the line out. Digests, protocol,
            versions, command, numerics belong here.
        documents: names of the documents by their rank, where they have names.
    """

    base: str
    pairs: Sequence[Pair]
    tokens: NDArray[np.int32] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[str] = ()


def write(
    summary: Mapping[str, Any], pairs: Pairs, out_dir: Path, *, tokenizer: Decoder | None = None
) -> Path:
    """Write the comparison's markdown, CSV and HTML into a folder, which is made; a file there is replaced.

    The same arguments give the same bytes. Without the extra `report` there is no HTML, which is logged.

    Args:
        summary: the job's JSON object (contract.md 5, `compare`), each variant with the figures of
            `pipeline.compare.statistics` under their names; a missing or null one shows as a dash.
        pairs: the tables behind it.
        tokenizer: for the texts; without one, or without `pairs.tokens`, the page says why it shows none.

    Returns:
        The page, or the markdown where no page could be made.

    Raises:
        OSError: the folder cannot be written.
    """
    from pipeline.compare.report import markdown
    from pipeline.report.text import flat, write_whole

    told = flat(pairs.provenance)
    out_dir.mkdir(parents=True, exist_ok=True)
    plain = write_whole(out_dir / f"{STEM}.md", markdown.document(summary, pairs.base, told))
    write_whole(out_dir / f"{STEM}.csv", markdown.comma_separated(summary))
    try:
        from pipeline.compare.report import page
    except ModuleNotFoundError as missing:
        if missing.name not in ("altair", "vl_convert"):
            raise
        _log.warning(NO_EXTRA)
        return plain
    return write_whole(out_dir / f"{STEM}.html", page.render(summary, pairs, tokenizer))
