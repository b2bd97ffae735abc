"""What people and CI see of a regression run: a summary for a pull request, JUnit XML, a page of HTML.

    words      what is said of a run, its gates and the changes of its history
    markdown   regression.md: the verdict, what is broken and why; what is kept is folded away
    junit      regression.xml: a test case for each limit
    page       regression.html, where the extra `report` is installed: one file without a link to anywhere

An absolute path is told by its last part: a report is read on other machines.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from pipeline.regression.history import Row, series, with_today
from pipeline.regression.outcome import Outcome

_log = logging.getLogger(__name__)

STEM = "regression"

NO_EXTRA = (
    "no HTML report: Altair and vl-convert-python are not installed; pip install 'pagemill[report]' brings "
    "them"
)


def write(outcome: Outcome, folder: Path, history: Iterable[Row]) -> dict[str, str | None]:
    """Write a run's reports into a folder, which is made; a file there is replaced.

    The same arguments give the same bytes. Without the extra `report` there is no page, which is logged.

    Args:
        history: rows of the suite's recorded runs, as `history.read` has them; with this run's or without.

    Returns:
        Paths of the `summary`, the `junit` and the `report`, which may be None.

    Raises:
        OSError: the folder cannot be written.
    """
    from pipeline.regression.report import junit, markdown
    from pipeline.report.text import write_whole

    found = series(with_today(history, outcome))
    folder.mkdir(parents=True, exist_ok=True)
    summary = write_whole(folder / f"{STEM}.md", markdown.document(outcome, found))
    cases = write_whole(folder / f"{STEM}.xml", junit.document(outcome))
    paths: dict[str, str | None] = {"summary": str(summary), "junit": str(cases), "report": None}
    try:
        from pipeline.regression.report import page
    except ModuleNotFoundError as missing:
        if missing.name not in ("altair", "vl_convert"):
            raise
        _log.warning(NO_EXTRA)
        return paths
    return paths | {"report": str(write_whole(folder / f"{STEM}.html", page.render(outcome, found)))}
