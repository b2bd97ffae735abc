"""Metadata of Mamba, FalconMamba and Mamba-2; see engine.hparams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import UnsupportedModel
from engine.hparams import Keys, architecture, n_vocab

if TYPE_CHECKING:
    from engine.gguf import GGUFFile


@dataclass(frozen=True)
class MambaParams:
    """Hyperparameters; GGUF key (after `mamba.` or `mamba2.`) behind each."""

    architecture: str
    n_vocab: int  # rows of token_embd.weight
    n_ctx_train: int  # context_length: a number that nothing depends on
    n_layers: int  # block_count
    width: int  # embedding_length: D
    inner: int  # ssm.inner_size: E
    n_states: int  # ssm.state_size: N
    conv_width: int  # ssm.conv_kernel: W
    dt_rank: int  # ssm.time_step_rank: R; mamba2: H, the number of heads
    n_groups: int  # ssm.group_count: of heads with the same B and C; mamba: 1
    is_normed: bool  # ssm.dt_b_c_rms: FalconMamba's norms of dt, B and C; mamba2: never
    norm_eps: float  # attention.layer_norm_rms_epsilon

    @property
    def is_second(self) -> bool:
        """Mamba-2."""
        return self.architecture == "mamba2"

    @property
    def head_width(self) -> int:
        """Channels that share a step and a rate: P of Mamba-2's heads, 1 in Mamba."""
        return self.inner // self.dt_rank if self.is_second else 1

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, in Mamba-2 also B and C."""
        return self.inner + (2 * self.n_groups * self.n_states if self.is_second else 0)

    @property
    def in_rows(self) -> int:
        """Rows of ssm_in: x and z; Mamba-2: z, x, B, C and dt."""
        return self.inner + self.conv_channels + (self.dt_rank if self.is_second else 0)


def mamba_params(file: GGUFFile) -> MambaParams:
    """Reads and cross-checks the hyperparameters.

    Raises:
        UnsupportedModel: a key is missing, has another type, contradicts another, or switches on what is not
        computed.
    """
    name = architecture(file)
    keys, is_second = Keys(file, name), name == "mamba2"
    params = MambaParams(
        architecture=name,
        n_vocab=n_vocab(file),
        n_ctx_train=keys.integer("context_length"),
        n_layers=keys.integer("block_count"),
        width=keys.integer("embedding_length"),
        inner=keys.integer("ssm.inner_size"),
        n_states=keys.integer("ssm.state_size"),
        conv_width=keys.integer("ssm.conv_kernel"),
        dt_rank=keys.integer("ssm.time_step_rank"),
        n_groups=keys.integer("ssm.group_count", 1) if is_second else 1,
        is_normed=not is_second and keys.flag("ssm.dt_b_c_rms"),
        norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
    )
    if is_second and (params.inner % params.dt_rank or params.dt_rank % params.n_groups):
        raise UnsupportedModel(
            f"{file.path}: ssm.inner_size {params.inner}, heads (ssm.time_step_rank) {params.dt_rank} and "
            f"ssm.group_count {params.n_groups} do not divide by one another"
        )
    # llama.cpp's converter writes 0 heads, and H is what llama.cpp b9190 needs to load Mamba-2
    heads = (0, params.dt_rank) if is_second else (0,)
    keys.refuse_others({"attention.head_count": heads, "ssm.group_count": (1, 0)})
    return params
