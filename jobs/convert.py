"""A Hugging Face checkpoint as a GGUF file.

    pagemill convert source.dir=FOLDER convert.out=MODEL.gguf
    pagemill convert source.dir=FOLDER convert.out=MODEL.gguf convert.type=q8_0
    pagemill convert source.dir=mamba-130m convert.out=MODEL.gguf convert.tokenizer=gpt-neox-20b

Mamba, Mamba-2, FalconMamba, LLaMA, Mistral, Qwen2, Qwen3; safetensors, or PyTorch's .bin where torch is
installed. Seconds for a small model, minutes for a large one, in little memory: a block of rows is in it at a
time. The file appears whole or not at all.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from jobs import outcome, schema
from pipeline.settings import ConvertSettings

SCHEMA = schema.register("convert", ConvertSettings)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="convert")
def main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        settings = outcome.CURRENT.begin(cfg, SCHEMA)

        from pipeline.convert import convert

        outcome.CURRENT.answer("", convert(settings))


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["convert", *sys.argv[1:]]))
