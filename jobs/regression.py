"""A suite of checks against its baseline: what got worse, and what is to blame.

    pagemill regression suite=smoke action=promote          the first baseline
    pagemill regression suite=smoke                         red: exit code 1
    pagemill regression suite=FILE.yaml baseline=FILE.parquet tracking=none
    pagemill regression suite=smoke suite.checks.smollm2_pydoc.set.protocol.limit=2
    pagemill regression action=promote run=MLFLOW_RUN

A suite (conf/suite/) names jobs, perplexity, compare or throughput, their settings, and limits: absolute,
relative to the baseline, statistical over paired windows, or bits. Every run measures anew. The baseline is
an MLflow run with a tag, or a Parquet file. Another model or engine is what is judged; another text, another
tokenizer or protocol is refused with exit code 2, naming what differs. Three minutes for `smoke`, two cores.

Leaves a record in `table=regressions`, a summary in Markdown, JUnit XML and a report with history, a run in
MLflow unless `tracking=none`, and one JSON line on standard output. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import hydra

from jobs import outcome, schema, suites
from pipeline.regression.settings import RegressionSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCHEMA = schema.register("regression", RegressionSettings)


def main() -> None:
    """Run what the command line says; a suite's file of the user's is made known to Hydra first."""
    before = sys.argv
    sys.argv = [before[0], *suites.with_file(before[1:])]
    try:
        _main()
    except outcome.Stopped as stopped:
        suites.name_file(stopped.error, before)
        raise
    finally:
        sys.argv = before


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="regression")
def _main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        settings = outcome.CURRENT.begin(cfg, SCHEMA)
        settings.validate()
        checks = suites.checks(settings)

        from jobs import gates
        from pipeline.progress import make_progress
        from pipeline.regression import run

        result = run.run(settings, checks, make_progress)
        gates.show(result.summary)
        outcome.CURRENT.finish(result)


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["regression", *sys.argv[1:]]))
