"""The importance matrix of a GGUF model on a text, for `pagemill quantize` and llama-quantize.

    pagemill imatrix model.path=FILE.gguf data.path=TEXT.txt imatrix.out=IMATRIX.gguf protocol.limit=100
    pagemill quantize model.path=FILE.gguf quantize.type=q4_k_m quantize.imatrix=IMATRIX.gguf ...

Every token of every window counts. Takes as long as the perplexity of the same windows. Interrupted, it goes
on where it stopped; the file has the same bytes for any number of workers, threads and shards.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from jobs import outcome, schema
from pipeline.imatrix.settings import ImatrixSettings

SCHEMA = schema.register("imatrix", ImatrixSettings)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="imatrix")
def main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        settings = outcome.CURRENT.begin(cfg, SCHEMA)

        from pipeline.imatrix import collect
        from pipeline.progress import make_progress

        outcome.CURRENT.answer("", collect(settings, make_progress()).summary)


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["imatrix", *sys.argv[1:]]))
