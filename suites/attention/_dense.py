"""Attention whose keys lie in one tensor, not in pages: it is paged attention with pages of one token, in order.

So the operators made here have the input strategies, the reference, the budget and the relations of ``paged_prefill``;
what is theirs is the form of their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import (
    Bounded,
    Call,
    Case,
    ErrorBudget,
    InputStrategy,
    Materials,
    Numerics,
    Operator,
    Related,
    Relation,
    Size,
    Variant,
)

from ._cases import Kind, of_kind
from ._checks import require, require_number
from .paged_prefill import PagedPrefill, Request, paged_prefill

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

    from kerneltest.oracle.attention_terms import AttentionTerms

Tensors = Mapping[str, "torch.Tensor"]
RELATIONS = (
    "value_sign",
    "value_scale",
    "score_scale",
    "head_permutation",
    "repeat",
    "split",
    "key_permutation",
    "duplicate_keys",
)
OF_SEVERAL_REQUESTS = ("batch_order", "batch_size", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseAttention:
    """Axes of a case. ``group`` query heads share a KV head; K and V have ``kv_heads`` heads and no pages.

    ``layout``: K and V are [tokens, kv_heads, d] ("NHD") or [kv_heads, tokens, d] ("HND"). All else is that of paged
    prefill.
    """

    requests: tuple[Request, ...]
    dtype: str
    head_dim: int
    kv_heads: int
    group: int
    causal: bool
    head_dim_vo: int | None = None
    sm_scale: float | None = None
    window_left: int = -1
    softcap: float = 0.0
    layout: str = "NHD"
    alibi: bool = False
    return_lse: bool = True

    def __post_init__(self) -> None:
        _ = self.paged  # which refuses what cannot be

    @property
    def paged(self) -> PagedPrefill:
        """The same requests over pages of one token."""
        shared = {name: getattr(self, name) for name in _shared(self)}
        return PagedPrefill(**shared, page_size=1, shuffled=False, spare_pages=0)

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def v_dim(self) -> int:
        return self.paged.v_dim

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return self.paged.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the tensors of a dense operator look, beside those of K and V.

    ``batched``: several requests, told apart by int32 ``qo_indptr`` and ``kv_indptr`` [batch + 1]; otherwise there is
    one. ``rows``: whether ``q``, ``out`` and ``lse`` have a leading dimension of queries, or belong to a single one.
    """

    batched: bool
    rows: bool = True


def dense_operator(
    name: str, layout: Layout, kinds: Mapping[Kind, int] | None = None, relations: Sequence[str] = RELATIONS
) -> Operator:
    """An operator of that name. ``kinds``: how often each is drawn, with no more than one option that needs a module of
    its own; None: kinds and options are those of paged prefill.
    """

    def cases(size: Size) -> st.SearchStrategy[Case[DenseAttention]]:
        return _cases(name, layout, kinds, relations, size)

    def materialize(case: Case[DenseAttention]) -> Materials:
        """Host tensors, all of them from ``case.seed``; raises ValueError for a case that this operator has not."""
        _check(case, layout)
        return unpaged(case, layout, paged_prefill.materialize(paged_case(case)).inputs)

    def reference(case: Case[DenseAttention], inputs: Tensors, device: str) -> AttentionTerms:
        return paged_prefill.reference(paged_case(case), pages(case, inputs), device)  # type: ignore[no-any-return]

    def budget(
        case: Case[DenseAttention], terms: AttentionTerms, numerics: Numerics, strategy: InputStrategy
    ) -> Mapping[str, ErrorBudget]:
        whole = paged_prefill.budget(paged_case(case), terms, numerics, strategy)
        return whole if layout.rows else {output: _without_rows(given) for output, given in whole.items()}

    def locate(case: Case[DenseAttention], output: str, index: tuple[int, ...]) -> str:
        if layout.rows:
            return paged_prefill.locate(paged_case(case), output, index)
        return f"head {index[0]}" if output == "lse" else f"head {index[0]}, dim {index[1]}"

    def simpler(case: Case[DenseAttention]) -> Iterator[Case[DenseAttention]]:
        seen = {case}
        for other in paged_prefill.simpler(paged_case(case)):
            dense = _from_paged(case, other)
            # A step that changes what only pages have is none.
            if dense not in seen:
                seen.add(dense)
                yield dense

    def captures(case: Case[DenseAttention]) -> st.SearchStrategy[Case[DenseAttention]]:
        assert paged_prefill.captures is not None, "paged_prefill says what a graph of it may be captured with"
        longer = paged_prefill.captures(paged_case(case)).map(lambda other: _from_paged(case, other))
        # Of K and V in the layout HND it is not the leading dimension that grows.
        return longer if case.axes.layout == "NHD" else longer.map(lambda other: _with_keys_of(case, other))

    def explain(case: Case[DenseAttention], inputs: Tensors, outputs: Tensors) -> str | None:
        if case.axes.v_dim != case.axes.head_dim:
            return None  # V is cut off, and with it half of what names a token
        whole = outputs if layout.rows else {output: value.unsqueeze(0) for output, value in outputs.items()}
        return paged_prefill.explain(paged_case(case), pages(case, inputs), whole)

    return Operator(
        name=name,
        axes=DenseAttention,
        inputs=paged_prefill.inputs,
        cases=cases,
        materialize=materialize,
        reference=reference,
        budget=budget,
        locate=locate,
        simpler=simpler,
        relations=tuple(_relation(paged_prefill.relation(one), layout) for one in relations),
        captures=captures if layout.batched else None,
        explain=explain,
    )


def _shared(axes: DenseAttention) -> set[str]:
    """The names of the axes that paged attention has as well."""
    return {field.name for field in fields(axes)} & {field.name for field in fields(PagedPrefill)}


def paged_case(case: Case[DenseAttention]) -> Case[PagedPrefill]:
    """The case in pages of one token."""
    return Case(
        operator=paged_prefill.name,
        axes=case.axes.paged,
        inputs=case.inputs,
        seed=case.seed,
        relation=case.relation,
    )


def _from_paged(like: Case[DenseAttention], case: Case[PagedPrefill]) -> Case[DenseAttention]:
    """A case in pages of one token, without pages; what pages do not have is that of ``like``."""
    axes = replace(like.axes, **{name: getattr(case.axes, name) for name in _shared(like.axes)})
    return replace(like, axes=axes, inputs=case.inputs, seed=case.seed, relation=case.relation)


def _with_keys_of(case: Case[DenseAttention], other: Case[DenseAttention]) -> Case[DenseAttention]:
    requests = tuple(
        replace(longer, kv_len=own.kv_len) for own, longer in zip(case.axes.requests, other.axes.requests, strict=True)
    )
    return replace(other, axes=replace(other.axes, requests=requests))


def pages(case: Case[DenseAttention], inputs: Tensors) -> dict[str, torch.Tensor]:
    """The inputs as those of ``paged_prefill``: views, on the device where they are."""
    import torch

    requests, hnd = case.axes.requests, case.axes.layout == "HND"
    # [tokens, 1, kv_heads, d], and [tokens, kv_heads, 1, d] in the layout HND
    k, v = (inputs[name].transpose(0, 1).unsqueeze(2) if hnd else inputs[name].unsqueeze(1) for name in ("k", "v"))

    def indptr(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(k.device, torch.int32)

    keys = [request.kv_len for request in requests]
    return {
        "q": inputs["q"] if inputs["q"].dim() == 3 else inputs["q"].unsqueeze(0),
        "k_pages": k,
        "v_pages": v,
        "qo_indptr": indptr([request.qo_len for request in requests]),
        "kv_indptr": indptr(keys),
        "kv_indices": torch.arange(len(k), dtype=torch.int32, device=k.device),
        "kv_last_page_len": torch.tensor([min(n, 1) for n in keys], dtype=torch.int32, device=k.device),
    }


def unpaged(case: Case[DenseAttention], layout: Layout, inputs: Tensors) -> Materials:
    """The tensors of ``paged_prefill`` with pages of one token as those of a dense operator: keys in order."""
    from ._tensors import specs

    axes, order = case.axes, inputs["kv_indices"].long()
    k, v = (inputs[name][order] for name in ("k_pages", "v_pages"))
    k, v = (x.squeeze(2).transpose(0, 1) if axes.layout == "HND" else x.squeeze(1) for x in (k, v))
    q = inputs["q"] if layout.rows else inputs["q"].squeeze(0)
    tensors = {"q": q, "k": k.contiguous(), "v": v.contiguous()}
    if layout.batched:
        tensors |= {name: inputs[name] for name in ("qo_indptr", "kv_indptr")}
    return Materials(
        inputs=tensors,
        dead=(),
        outputs=specs(axes.paged, tuple(q.shape[:-1])),
    )


def check_dense(call: Call) -> None:
    """What a kernel of ours checks of a call: shapes, dtypes and devices, and that the scale is a number.

    Raises ValueError or TypeError that names the first tensor that is wrong. What integers hold is not looked at.
    """
    import torch

    axes: DenseAttention = call.case.axes
    tokens = sum(request.kv_len for request in axes.requests)
    rows = () if call.case.operator == "single_decode" else (axes.paged.total_qo,)
    batch = len(axes.requests)

    def keys(dim: int) -> tuple[int, int, int]:
        return (axes.kv_heads, tokens, dim) if axes.layout == "HND" else (tokens, axes.kv_heads, dim)

    shapes: dict[str, tuple[int, ...]] = {
        "q": (*rows, axes.q_heads, axes.head_dim),
        "k": keys(axes.head_dim),
        "v": keys(axes.v_dim),
        "qo_indptr": (batch + 1,),
        "kv_indptr": (batch + 1,),
        "out": (*rows, axes.q_heads, axes.v_dim),
        "lse": (*rows, axes.q_heads),
    }
    dtypes = dict.fromkeys(shapes, getattr(torch, axes.dtype))
    dtypes |= {"lse": torch.float32, "qo_indptr": torch.int32, "kv_indptr": torch.int32}
    require({**call.inputs, **call.outputs}, shapes, dtypes)
    require_number("sm_scale", axes.scale)


def _check(case: Case[DenseAttention], layout: Layout) -> None:
    if not layout.batched and len(case.axes.requests) != 1:
        raise ValueError(f"{case.operator} has one request, got {len(case.axes.requests)}")
    if not layout.rows and case.axes.requests[0].qo_len != 1:
        raise ValueError(f"{case.operator} has one query, got {case.axes.requests[0].qo_len}")


def _cases(
    name: str, layout: Layout, kinds: Mapping[Kind, int] | None, relations: Sequence[str], size: Size
) -> st.SearchStrategy[Case[DenseAttention]]:
    """Cases of ``paged_prefill`` without what only pages have; of a single request, the first that asks something."""
    from hypothesis import strategies as st

    from kerneltest.strategies import weighted

    def build(drawn: Case[PagedPrefill], kind: Kind | None) -> Case[DenseAttention]:
        given: dict[str, Any] = {
            field.name: getattr(drawn.axes, field.name)
            for field in fields(DenseAttention)
            if field.name in PagedPrefill.__dataclass_fields__
        }
        if kind:
            given = of_kind(given, kind)
        if not layout.batched:
            given["requests"] = (next(request for request in drawn.axes.requests if request.qo_len),)
        if not layout.rows:
            given |= {"requests": (replace(given["requests"][0], qo_len=1),), "causal": False}
        case = Case(operator=name, axes=DenseAttention(**given), inputs=drawn.inputs, seed=drawn.seed)
        applies = drawn.relation in relations and paged_prefill.relation(drawn.relation).applies(paged_case(case))
        return replace(case, relation=drawn.relation) if applies else case

    return st.builds(build, paged_prefill.cases(size), weighted(kinds) if kinds else st.none())


def _relation(base: Relation, layout: Layout) -> Relation:
    """A relation of paged attention, on cases without pages."""

    def applies(case: Case[DenseAttention]) -> bool:
        return base.applies(paged_case(case))

    def transform(case: Case[DenseAttention], materials: Materials) -> tuple[Related, ...]:
        inner = Materials(inputs=pages(case, materials.inputs), dead=(), outputs={})

        def dense(variant: Variant) -> Variant:
            other = _from_paged(case, variant.case)
            return Variant(case=other, materials=unpaged(other, layout, variant.materials.inputs))

        return tuple(
            Related(variants=tuple(map(dense, related.variants)), back=_back(related.back, layout))
            for related in base.transform(paged_case(case), inner)
        )

    return replace(base, applies=applies, transform=transform)


Answer = Mapping[str, Bounded]
Back = Callable[[Sequence[Answer], Any], Answer]


def _back(base: Back, layout: Layout) -> Back:
    if layout.rows:
        return base

    def back(answers: Sequence[Answer], numerics: Any) -> Answer:
        with_rows = [
            {name: Bounded(value=one.value.unsqueeze(0), error=one.error.unsqueeze(0)) for name, one in answer.items()}
            for answer in answers
        ]
        found = base(with_rows, numerics)
        return {name: Bounded(value=one.value.squeeze(0), error=one.error.squeeze(0)) for name, one in found.items()}

    return back


def _without_rows(budget: ErrorBudget) -> ErrorBudget:
    """The budget of a single query, whose outputs have no dimension for it."""
    noise = budget.noise
    if noise is not None:
        along = noise.along

        def of_one_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            deviation, bias = along(weight.unsqueeze(0))
            return deviation.squeeze(0), bias.squeeze(0)

        noise = replace(
            noise,
            det=noise.det.squeeze(0),
            sigma=noise.sigma.squeeze(0),
            freedom=noise.freedom.squeeze(0),
            along=of_one_row,
        )
    return replace(budget, ref=budget.ref.squeeze(0), hard=budget.hard.squeeze(0), noise=noise)
