"""The axes of attention over a paged KV cache: what a case says of lengths, shapes and options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
# The scale of ``dyadic`` inputs: integer scores times this make weights of powers of two.
LN_2 = math.log(2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Query and KV tokens of one request; either may be 0."""

    qo_len: int
    kv_len: int

    def __post_init__(self) -> None:
        if self.qo_len < 0 or self.kv_len < 0:
            raise ValueError(f"lengths must be at least 0, got {self.qo_len} and {self.kv_len}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPrefill:
    """Axes of a case. ``group`` query heads share a KV head; ``spare_pages`` lie in the cache and belong to nobody.

    ``shuffled``: physical pages in random order, so that a request's pages are neither contiguous nor ascending.
    ``sm_scale`` multiplies the scores; None means 1 / √head_dim.
    """

    requests: tuple[Request, ...]
    dtype: str
    head_dim: int
    kv_heads: int
    group: int
    page_size: int
    causal: bool
    shuffled: bool
    spare_pages: int
    sm_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("head_dim", "kv_heads", "group", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.requests:
            raise ValueError("requests must not be empty")
        if self.spare_pages < 0:
            raise ValueError(f"spare_pages must be at least 0, got {self.spare_pages}")

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def total_qo(self) -> int:
        return sum(request.qo_len for request in self.requests)

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return 1.0 / math.sqrt(self.head_dim) if self.sm_scale is None else self.sm_scale

    def pages(self, request: Request) -> int:
        """Pages that the request references."""
        return -(-request.kv_len // self.page_size)
