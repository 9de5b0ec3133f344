"""The axes of block-sparse attention."""

from __future__ import annotations

from dataclasses import dataclass

from kerneltest.model import Case

from ._axes import PagedPrefill, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSparse:
    """Axes of a case. ``columns`` is a multiple of ``block_columns``; ``group`` query heads share a KV head.

    Which blocks there are is drawn with the values. ``masked``: not all of a block is seen. ``sm_scale`` multiplies the
    scores; None means 1 / √head_dim.
    """

    rows: int
    columns: int
    block_rows: int
    block_columns: int
    dtype: str
    head_dim: int
    kv_heads: int
    group: int
    masked: bool
    sm_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "block_rows", "block_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.columns % self.block_columns:
            raise ValueError(f"columns must be a multiple of {self.block_columns}, got {self.columns}")
        _ = self.paged  # which refuses what cannot be

    @property
    def paged(self) -> PagedPrefill:
        """All rows and columns as one request over pages of one token, without any mask."""
        return PagedPrefill(
            requests=(Request(qo_len=self.rows, kv_len=self.columns),),
            dtype=self.dtype,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            group=self.group,
            page_size=1,
            causal=False,
            shuffled=False,
            spare_pages=0,
            sm_scale=self.sm_scale,
        )

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return self.paged.scale

    @property
    def blocks_down(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def blocks_across(self) -> int:
        return self.columns // self.block_columns


def paged_case(case: Case[BlockSparse]) -> Case[PagedPrefill]:
    """The case as one request that sees everything."""
    return Case(operator="paged_prefill", axes=case.axes.paged, inputs=case.inputs, seed=case.seed)
