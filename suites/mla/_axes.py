"""The axes of multi-head latent attention (MLA) over a paged cache of latents, and what it shares with attention.

All heads read one latent of ``kv_lora_rank`` channels and one key of ``rope_dim`` channels a token (DeepSeek-V2, arXiv
2405.04434). With the projections absorbed that is attention with a single KV head, K = [latent, rope key], V = latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kerneltest.model import Case

from ..attention.paged_prefill import DTYPES, PagedPrefill, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Channels of a model: of the latent, of the rotated key, and of a head's key and value before absorption."""

    kv_lora_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int


# DeepSeek-V2 and V3 come first; the other is for shrinking, and for kernels that take any size.
DEEPSEEK = Dims(kv_lora_rank=512, rope_dim=64, nope_dim=128, v_dim=128)
SMALL = Dims(kv_lora_rank=32, rope_dim=16, nope_dim=16, v_dim=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla:
    """Axes of a case. ``spare_pages`` lie in the cache and belong to nobody.

    ``shuffled``: physical pages in random order, so that a request's pages are neither contiguous nor ascending.
    ``sm_scale`` multiplies the scores; None means 1 / √(nope_dim + rope_dim): the size of a head's key before
    absorption, and never that of the latent one. ``return_lse``: the log-sum-exp is asked for (without it there is no
    output ``lse``).
    """

    requests: tuple[Request, ...]
    dtype: str
    dims: Dims
    heads: int
    page_size: int
    causal: bool
    shuffled: bool
    spare_pages: int
    sm_scale: float | None = None
    return_lse: bool = True

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "rope_dim", "nope_dim", "v_dim"):
            if getattr(self.dims, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self.dims, name)}")
        for name in ("heads", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.requests:
            raise ValueError("requests must not be empty")
        if self.spare_pages < 0:
            raise ValueError(f"spare_pages must be at least 0, got {self.spare_pages}")

    @property
    def rank(self) -> int:
        return self.dims.kv_lora_rank

    @property
    def key_dim(self) -> int:
        """Channels of a latent key: 576 of DeepSeek's."""
        return self.dims.kv_lora_rank + self.dims.rope_dim

    @property
    def total_qo(self) -> int:
        return sum(request.qo_len for request in self.requests)

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return 1.0 / math.sqrt(self.dims.nope_dim + self.dims.rope_dim) if self.sm_scale is None else self.sm_scale

    def pages(self, request: Request) -> int:
        """Pages that the request references."""
        return -(-request.kv_len // self.page_size)

    def as_attention(self, head_dim: int) -> PagedPrefill:
        """The same batch as attention with one KV head, whose heads have ``head_dim`` channels."""
        return PagedPrefill(
            requests=self.requests,
            dtype=self.dtype,
            head_dim=head_dim,
            kv_heads=1,
            group=self.heads,
            page_size=self.page_size,
            causal=self.causal,
            shuffled=self.shuffled,
            spare_pages=self.spare_pages,
            sm_scale=self.scale,
            return_lse=self.return_lse,
        )


def as_attention(case: Case[Mla], head_dim: int) -> Case[PagedPrefill]:
    """The same batch as a case of ``paged_prefill`` with heads of that size: of its keys, or of its outputs."""
    return Case(operator="paged_prefill", axes=case.axes.as_attention(head_dim), inputs=case.inputs, seed=case.seed)
