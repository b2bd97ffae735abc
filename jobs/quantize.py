"""A GGUF file in other types: from F32, F16 or BF16 to any mixture that llama-quantize has a name for.

    pagemill quantize model.path=F16.gguf quantize.type=Q4_K_M quantize.out=Q4_K_M.gguf engine.threads=4
    pagemill quantize model.path=F16.gguf quantize.type=Q2_K quantize.out=Q2_K.gguf quantize.imatrix=I.gguf
    pagemill quantize model.path=F16.gguf quantize.type=Q4_0 quantize.out=NEW.gguf dry_run=true \\
        'quantize.tensor_types=[attn_v=Q8_0,ffn_down=Q6_K]'

The bytes are those of llama-quantize. A file in several parts is joined. Seconds for a small model, minutes
for a large one, in little memory: a few rows for each thread are in it at a time. The file appears whole or
not at all. A dry run lists every tensor.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from jobs import outcome, schema
from pipeline.quantize.settings import QuantizeSettings

SCHEMA = schema.register("quantize", QuantizeSettings)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="quantize")
def main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        settings = outcome.CURRENT.begin(cfg, SCHEMA)

        from jobs import sizes
        from pipeline.quantize import quantize

        summary = quantize(settings)
        sizes.show(summary)
        outcome.CURRENT.answer("", summary)


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["quantize", *sys.argv[1:]]))
