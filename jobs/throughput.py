"""Tokens per second of a GGUF model: whole windows, prompts, generation of one and of several sequences.

    pagemill throughput model.path=FILE.gguf
    pagemill throughput models=[a.gguf,b.gguf] engine.threads=2 'peer=[llama_cpp,ik_llama_cpp]'

The tests are those of llama-bench and llama-batched-bench: pp512, tg64, tg64@8; ppl512 is what a perplexity
does. Peers (extra `bench`) run in the same rounds, each in a process of its own, with the best of their
settings. Five minutes for a small model on two cores, and as many for each peer. Leaves rows in
`table=throughput`, the same as Markdown and CSV, a run in MLflow unless `tracking=none`, and one JSON line on
standard output.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from jobs import outcome, schema
from pipeline.bench.settings import ThroughputSettings

SCHEMA = schema.register("throughput", ThroughputSettings)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="throughput")
def main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        settings = outcome.CURRENT.begin(cfg, SCHEMA)

        from jobs import speeds
        from pipeline.bench import throughput

        result = throughput.run(settings)
        speeds.show(result.summary)
        outcome.CURRENT.finish(result)


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["throughput", *sys.argv[1:]]))
