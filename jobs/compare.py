"""Variants of a GGUF model against their base: which quantization to ship.

    pagemill compare base.path=F16.gguf 'variants=[Q8_0.gguf,Q4_K_M.gguf]' data.path=TEXT.txt
    pagemill compare base.path=F16.gguf 'variants=[Q8_0,Q6_K,Q4_K_M]' data=pydoc stop=decided
    pagemill compare experiment=quant_ladder 'limits={kld_mean: 0.05, same_top: ">=0.9"}'

Every window goes through the base and all variants at once, so all differences are paired. A type in place of
a file is quantized into `paths.cache`. Minutes for a small model. Leaves the tables `tokens` and
`comparisons` and a report under `paths.results`, a run in MLflow with a child per variant unless
`tracking=none`, and one JSON line on standard output. Variants that an earlier comparison computed are not
computed again; a broken limit gives exit code 1.

`sensitivity.by=group` (or `tensor`, `layer`), with one variant, puts its tensors into the base's places, one
kind of matrix after the other or as `sensitivity.groups=[attn_v,ffn_down,...]` says, and ranks them by
divergence per byte saved; no file is written. `sensitivity.target_bytes=N` or `target_bpw=B` proposes and
evaluates a mixture of the two for that size.

`logits.out=FILE` writes the base's logits, 16 bits each, as `llama-perplexity --kl-divergence-base FILE`
does, before the comparison or, without variants, in its place. Such a file can be `base.path`; data.path is
then needed to check the tokens only.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from jobs import outcome, schema
from pipeline.compare.settings import CompareSettings

SCHEMA = schema.register("compare", CompareSettings)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Run one composed config."""
    with outcome.CURRENT.run():
        _need_no_text(cfg)
        settings = outcome.CURRENT.begin(cfg, SCHEMA)

        from pipeline import compare
        from pipeline.compare.report import terminal
        from pipeline.progress import make_progress

        result = compare.compare(settings, make_progress())
        if result.exit_code in (0, 1) and not settings.dry_run and result.summary["variants"]:
            terminal.show(result.summary, result.summary["base"]["name"])
        outcome.CURRENT.finish(result)


def _need_no_text(cfg: DictConfig) -> None:
    """A base that is a file of logits brings its tokens along."""
    from pipeline.compare.logit_files import is_logit_file

    given = not OmegaConf.is_missing(cfg.base, "path")
    if given and OmegaConf.is_missing(cfg.data, "path") and is_logit_file(cfg.base.path):
        cfg.data.path = ""


if __name__ == "__main__":
    from jobs import cli

    cli.leave(cli.run(["compare", *sys.argv[1:]]))
