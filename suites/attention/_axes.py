"""The axes of attention over a paged KV cache: what a case says of lengths, shapes and options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

from kerneltest.model import Case, Device

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
# Of the keys and values; "same" as the queries. The others are quantised, and come with a scale each.
KV_DTYPES = ("same", "float8_e4m3fn", "float8_e5m2")
MASKS = ("none", "random", "tree")
LAYOUTS = ("NHD", "HND")
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

    Options, each at its default unless it is drawn. Query i of a request has its own place at key i + kv_len - qo_len.

    * ``window_left``: keys more than so many before its own place are hidden (-1: none are);
    * ``alibi``: slope_h · (j - i) is added to the scaled score of query i and key j, both counted from the first of
      their request, with the slopes of :mod:`._alibi`;
    * ``softcap``: a score s becomes softcap · tanh(s / softcap), after what ``alibi`` adds (0: it stays);
    * ``mask``: which keys a query sees is said by a boolean mask instead of ``causal``, see :mod:`._masks`;
      ``packed_mask``: it is there as bits too, each request from a byte of its own on, the lowest bit first;
    * ``kv_dtype``: of K and V, if not that of q; k stands for k · ``k_scale``, v for v · ``v_scale``;
    * ``layout``: a page is [page_size, kv_heads, d] ("NHD") or [kv_heads, page_size, d] ("HND");
    * ``strided_q``: q is the front part of the heads of a wider tensor, as of the product of a fused projection;
    * ``head_dim_vo``: of V and of the output, None: ``head_dim``, which is that of q and K;
    * ``return_lse``: the log-sum-exp is asked for (without it there is no output ``lse``);
    * ``fixed_split_size``: keys are split into so many pages (0: as the kernel likes), ``disable_split_kv``: not at
      all. Neither changes what is computed.

    Raises ValueError for axes that cannot be.
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
    window_left: int = -1
    softcap: float = 0.0
    mask: str = "none"
    packed_mask: bool = False
    kv_dtype: str = "same"
    k_scale: float = 1.0
    v_scale: float = 1.0
    layout: str = "NHD"
    strided_q: bool = False
    head_dim_vo: int | None = None
    fixed_split_size: int = 0
    disable_split_kv: bool = False
    alibi: bool = False
    return_lse: bool = True

    def __post_init__(self) -> None:
        least = dict.fromkeys(("head_dim", "kv_heads", "group", "page_size"), 1)
        least |= {"spare_pages": 0, "window_left": -1, "softcap": 0, "fixed_split_size": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        for name, valid in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES), ("mask", MASKS), ("layout", LAYOUTS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}")
        for name in ("k_scale", "v_scale", "softcap"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if not self.requests:
            raise ValueError("requests must not be empty")
        if self.head_dim_vo is not None and self.head_dim_vo < 1:
            raise ValueError(f"head_dim_vo must be at least 1, got {self.head_dim_vo}")
        if self.k_scale <= 0 or self.v_scale <= 0:
            raise ValueError(f"k_scale and v_scale must be positive, got {self.k_scale} and {self.v_scale}")
        if self.mask != "none" and self.causal:
            raise ValueError("a mask says what is causal by itself: causal must be false")
        if self.packed_mask and self.mask == "none":
            raise ValueError("there is no mask to be packed")
        if self.fixed_split_size and self.disable_split_kv:
            raise ValueError("keys cannot be split into pieces of a fixed size and not be split at all")

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def q_width(self) -> int:
        """Heads of the tensor that holds q in front; the others are dead."""
        return self.q_heads + 2 * self.kv_heads if self.strided_q else self.q_heads

    @property
    def v_dim(self) -> int:
        return self.head_dim if self.head_dim_vo is None else self.head_dim_vo

    @property
    def kv_format(self) -> str:
        """Torch's name of the dtype of K and V."""
        return self.dtype if self.kv_dtype == "same" else self.kv_dtype

    @property
    def total_qo(self) -> int:
        return sum(request.qo_len for request in self.requests)

    @property
    def mask_bits(self) -> int:
        """Pairs of a query and a key of its request."""
        return sum(request.qo_len * request.kv_len for request in self.requests)

    @property
    def scale(self) -> float:
        """What the scores are multiplied by, beside ``k_scale``."""
        return 1.0 / math.sqrt(self.head_dim) if self.sm_scale is None else self.sm_scale

    def pages(self, request: Request) -> int:
        """Pages that the request references."""
        return -(-request.kv_len // self.page_size)


def common_pages(axes: PagedPrefill, request: Request) -> int:
    """Whole pages that every query of the request sees, leaving it at least one key to see after them.

    0 with a window or a mask, which show no keys to all, and with ALiBi, which counts keys from the first one.
    """
    if axes.window_left >= 0 or axes.mask != "none" or axes.alibi:
        return 0
    return max(0, request.kv_len - (request.qo_len if axes.causal else 1)) // axes.page_size


# What a kernel may be unable to do, in words, and how it is seen that a case asks for it.
OPTIONS: dict[str, tuple[str, Callable[[PagedPrefill], bool]]] = {
    "window_left": ("a sliding window", lambda axes: axes.window_left >= 0),
    "softcap": ("a soft-cap of the scores", lambda axes: axes.softcap > 0),
    "alibi": ("ALiBi", lambda axes: axes.alibi),
    "mask": ("a custom mask", lambda axes: axes.mask != "none"),
    "kv_dtype": ("K and V of another dtype", lambda axes: axes.kv_dtype != "same"),
    "scales": ("scales of K and V", lambda axes: (axes.k_scale, axes.v_scale) != (1.0, 1.0)),
    "layout": ("the layout HND", lambda axes: axes.layout != "NHD"),
    "strided_q": ("strided queries", lambda axes: axes.strided_q),
    "head_dim_vo": ("a head dimension of its own for V", lambda axes: axes.v_dim != axes.head_dim),
    "fixed_split_size": ("pieces of keys of a fixed size", lambda axes: axes.fixed_split_size > 0),
    "disable_split_kv": ("keys that are not split", lambda axes: axes.disable_split_kv),
    "return_lse": ("a call without a log-sum-exp", lambda axes: not axes.return_lse),
}


def lacking(axes: PagedPrefill, *known: str) -> str | None:
    """Why a kernel that knows no more than these :data:`OPTIONS` does not support the axes, or None."""
    for name, (words, asked) in OPTIONS.items():
        if name not in known and asked(axes):
            return f"the kernel does not know {words}"
    return None


def without_options(axes: PagedPrefill) -> PagedPrefill:
    """The axes with every option at its default."""
    named = (field for field in fields(axes) if field.default is not MISSING and field.name != "sm_scale")
    defaults: dict[str, Any] = {field.name: field.default for field in named}
    return replace(axes, **defaults)


def needs_lse(case: Case[PagedPrefill], device: Device) -> str | None:
    """The ``unsupported`` of a kernel that always has a log-sum-exp."""
    return lacking(case.axes, *(OPTIONS.keys() - {"return_lse"}))


def plain(case: Case[PagedPrefill], device: Device) -> str | None:
    """The ``unsupported`` of a kernel that knows no option at all."""
    return lacking(case.axes)
