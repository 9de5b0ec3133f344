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
    Case,
    ErrorBudget,
    InputStrategy,
    Materials,
    Numerics,
    Operator,
    OutputSpec,
    Related,
    Relation,
    Size,
    Variant,
)

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

    ``head_dim_vo``: of V and of the output; None means ``head_dim``, that of q and K. ``sm_scale`` multiplies the
    scores; None means 1 / √head_dim. The causal mask is aligned at the bottom right.
    """

    requests: tuple[Request, ...]
    dtype: str
    head_dim: int
    kv_heads: int
    group: int
    causal: bool
    head_dim_vo: int | None = None
    sm_scale: float | None = None

    def __post_init__(self) -> None:
        _ = self.paged  # which refuses what cannot be
        if self.head_dim_vo is not None and not 1 <= self.head_dim_vo <= self.head_dim:
            raise ValueError(f"head_dim_vo must be 1 to head_dim = {self.head_dim}, got {self.head_dim_vo}")

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
        return self.head_dim if self.head_dim_vo is None else self.head_dim_vo

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return self.paged.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the tensors of a dense operator look: ``k`` [total_kv, kv_heads, d], ``v`` [total_kv, kv_heads, d_v].

    ``batched``: several requests, told apart by int32 ``qo_indptr`` and ``kv_indptr`` [batch + 1]; otherwise there is
    one. ``rows``: whether ``q``, ``out`` and ``lse`` have a leading dimension of queries, or belong to a single one.
    """

    batched: bool
    rows: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the cases of an operator are specialised for: dtype, head dimension of q and K, and of V if another."""

    dtype: str
    head_dim: int
    head_dim_vo: int | None = None


def dense_operator(name: str, layout: Layout, kinds: Sequence[Kind], relations: Sequence[str] = RELATIONS) -> Operator:
    """An operator of that name. ``kinds``: each is drawn as often as it is named; the first is the simplest."""

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
        simplest = kinds[0]
        kind = {name: getattr(simplest, name) for name in ("dtype", "head_dim", "head_dim_vo")}
        if any(getattr(case.axes, name) != value for name, value in kind.items()):
            yield replace(case, axes=replace(case.axes, **kind))
        seen = {case}
        for other in paged_prefill.simpler(paged_case(case)):
            axes = replace(other.axes, head_dim=case.axes.head_dim, dtype=case.axes.dtype)
            dense = _from_paged(case, replace(other, axes=axes))
            # A step that changes what only pages have is none.
            if dense not in seen:
                seen.add(dense)
                yield dense

    def captures(case: Case[DenseAttention]) -> st.SearchStrategy[Case[DenseAttention]]:
        assert paged_prefill.captures is not None, "paged_prefill says what a graph of it may be captured with"
        return paged_prefill.captures(paged_case(case)).map(lambda other: _from_paged(case, other))

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


def pages(case: Case[DenseAttention], inputs: Tensors) -> dict[str, torch.Tensor]:
    """The inputs as those of ``paged_prefill``: views, on the device where they are."""
    import torch

    requests, k = case.axes.requests, inputs["k"]

    def indptr(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(k.device, torch.int32)

    keys = [request.kv_len for request in requests]
    return {
        "q": inputs["q"] if inputs["q"].dim() == 3 else inputs["q"].unsqueeze(0),
        "k_pages": k.unsqueeze(1),
        "v_pages": inputs["v"].unsqueeze(1),
        "qo_indptr": indptr([request.qo_len for request in requests]),
        "kv_indptr": indptr(keys),
        "kv_indices": torch.arange(len(k), dtype=torch.int32, device=k.device),
        "kv_last_page_len": torch.tensor([min(n, 1) for n in keys], dtype=torch.int32, device=k.device),
    }


def unpaged(case: Case[DenseAttention], layout: Layout, inputs: Tensors) -> Materials:
    """The tensors of ``paged_prefill`` with pages of one token as those of a dense operator: keys in order."""
    axes, order = case.axes, inputs["kv_indices"].long()
    k, v = (inputs[name][order, 0] for name in ("k_pages", "v_pages"))
    q = inputs["q"] if layout.rows else inputs["q"].squeeze(0)
    tensors = {"q": q, "k": k, "v": v[..., : axes.v_dim].contiguous()}
    if layout.batched:
        tensors |= {name: inputs[name] for name in ("qo_indptr", "kv_indptr")}
    return Materials(
        inputs=tensors,
        dead=(),
        outputs={
            "out": OutputSpec(shape=(*q.shape[:-1], axes.v_dim), dtype=axes.dtype),
            "lse": OutputSpec(shape=tuple(q.shape[:-1]), dtype="float32"),
        },
    )


def _check(case: Case[DenseAttention], layout: Layout) -> None:
    if not layout.batched and len(case.axes.requests) != 1:
        raise ValueError(f"{case.operator} has one request, got {len(case.axes.requests)}")
    if not layout.rows and case.axes.requests[0].qo_len != 1:
        raise ValueError(f"{case.operator} has one query, got {case.axes.requests[0].qo_len}")


def _cases(
    name: str, layout: Layout, kinds: Sequence[Kind], relations: Sequence[str], size: Size
) -> st.SearchStrategy[Case[DenseAttention]]:
    """Cases of ``paged_prefill`` without what only pages have; of a single request, the first that asks something."""
    from hypothesis import strategies as st

    def build(drawn: Case[PagedPrefill], kind: Kind) -> Case[DenseAttention]:
        requests, causal = drawn.axes.requests, drawn.axes.causal
        if not layout.batched:
            requests = (next(request for request in requests if request.qo_len),)
        if not layout.rows:
            requests, causal = (replace(requests[0], qo_len=1),), False
        axes = DenseAttention(
            requests=requests,
            dtype=kind.dtype,
            head_dim=kind.head_dim,
            head_dim_vo=kind.head_dim_vo,
            kv_heads=drawn.axes.kv_heads,
            group=drawn.axes.group,
            causal=causal,
            sm_scale=drawn.axes.sm_scale,
        )
        case = Case(operator=name, axes=axes, inputs=drawn.inputs, seed=drawn.seed)
        relation = drawn.relation
        applies = relation in relations and paged_prefill.relation(relation).applies(paged_case(case))
        return replace(case, relation=relation) if applies else case

    return st.builds(build, paged_prefill.cases(size), st.sampled_from(list(kinds)))


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
