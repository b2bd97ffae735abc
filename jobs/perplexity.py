"""Perplexity of a GGUF model over a text.

    pagemill perplexity model.path=FILE.gguf data.path=TEXT.txt protocol.limit=8
    python -m jobs.perplexity experiment=demo

    pagemill perplexity 'sweep={model.path:[a.gguf,b.gguf],protocol.window:[512,2048]}' data=pydoc sort=ppl

Minutes on a laptop for a small model. Leaves the tables `windows` and `runs` under `paths.results`, a run in
MLflow unless `tracking=none`, and one JSON line on standard output. Interrupted, it goes on where it stopped.
With `sweep` every combination is a point, and all points share one pool of workers.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from jobs import grid, outcome, schema
from pipeline.settings import PerplexitySettings

SCHEMA = schema.register("perplexity", PerplexitySettings)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="perplexity")
def main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        swept = outcome.CURRENT.swept(cfg, SCHEMA)
        settings = None if swept else outcome.CURRENT.begin(cfg, SCHEMA)

        import pipeline
        from pipeline.progress import make_progress

        if settings is not None:
            outcome.CURRENT.finish(pipeline.evaluate(settings, make_progress()))
        else:
            outcome.CURRENT.finish(pipeline.evaluate_all(grid.expand(cfg, SCHEMA), make_progress()))


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["perplexity", *sys.argv[1:]]))
