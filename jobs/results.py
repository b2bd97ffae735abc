"""Results of all runs so far, chosen, sorted and written as a table, CSV, Markdown or JSON.

    pagemill results results.filter={data_name:wikitext2} results.sort=ppl
    pagemill results results.where="ppl < 30" results.format=csv results.out=runs.csv

Reads the Parquet files under `paths.results`, also while a run adds to them. The text goes to standard
output, before the JSON line, or to `results.out`.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from jobs import outcome, schema
from pipeline.results import ResultsSettings

SCHEMA = schema.register("results", ResultsSettings)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="results")
def main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        settings = outcome.CURRENT.begin(cfg, SCHEMA)

        from pipeline import results

        found = results.results(settings)
        outcome.CURRENT.answer(
            "" if found.out else found.text,
            {
                "table": settings.results.table,
                "n_rows": len(found.rows),
                "columns": found.columns,
                "out": found.out,
            },
        )


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["results", *sys.argv[1:]]))
