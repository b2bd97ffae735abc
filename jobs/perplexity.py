"""Perplexity of a GGUF model over a text.

    pagemill perplexity model.path=FILE.gguf data.path=TEXT.txt protocol.limit=8
    python -m jobs.perplexity experiment=demo

Minutes on a laptop for a small model. Leaves the tables `windows` and `runs` under `paths.results`, a run in
MLflow unless `tracking=none`, and one JSON line on standard output. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from jobs import outcome, schema
from pipeline.settings import PerplexitySettings

SCHEMA = schema.register("perplexity", PerplexitySettings)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="perplexity")
def main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        settings = outcome.CURRENT.begin(cfg, SCHEMA)

        from pipeline import evaluate
        from pipeline.progress import make_progress

        outcome.CURRENT.finish(evaluate(settings, make_progress()))


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["perplexity", *sys.argv[1:]]))
