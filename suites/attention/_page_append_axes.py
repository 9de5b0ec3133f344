"""The axes of appending to a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kerneltest.model import Case

DTYPES = ("bfloat16", "float16", "float8_e4m3fn")
# Of DeepSeek's compressed cache: the latent part and the rotated part of a key.
CKV_DIM, KPE_DIM = 512, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """Tokens that a request has, and those that it gets; either may be 0."""

    before: int
    new: int

    def __post_init__(self) -> None:
        if self.before < 0 or self.new < 0:
            raise ValueError(f"lengths must be at least 0, got {self.before} and {self.new}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageAppend:
    """Axes of a case. ``kv_heads``, ``head_dim`` and ``layout`` are those of keys and values; MLA has its own.

    ``shuffled``: physical pages in random order. ``spare_pages`` lie in the cache and belong to nobody.
    """

    requests: tuple[Append, ...]
    dtype: str
    page_size: int
    shuffled: bool
    spare_pages: int
    kv_heads: int = 1
    head_dim: int = 128
    layout: Literal["NHD", "HND"] = "NHD"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.layout not in ("NHD", "HND"):
            raise ValueError(f"layout must be NHD or HND, got {self.layout!r}")
        if not any(request.new for request in self.requests):
            raise ValueError("some request must get a token")
        if min(self.page_size, self.kv_heads, self.head_dim) < 1 or self.spare_pages < 0:
            raise ValueError("page_size, kv_heads and head_dim must be at least 1, spare_pages at least 0")

    def pages(self, request: Append) -> int:
        """Pages of the request afterwards."""
        return -(-(request.before + request.new) // self.page_size)


def streams(case: Case[PageAppend]) -> tuple[str, str]:
    """The names of the two tensors that a token has."""
    return ("ckv", "kpe") if case.operator == "mla_page_append" else ("k", "v")


def locate(case: Case[PageAppend], output: str, index: tuple[int, ...]) -> str:
    """An index in words: "page 3, slot 17, head 2, dim 5"; MLA has no heads."""
    if case.operator == "mla_page_append":
        return f"page {index[0]}, slot {index[1]}, dim {index[2]}"
    slot, head = (index[1], index[2]) if case.axes.layout == "NHD" else (index[2], index[1])
    return f"page {index[0]}, slot {slot}, head {head}, dim {index[3]}"
