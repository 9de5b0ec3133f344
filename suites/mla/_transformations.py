"""How a case of absorbed MLA is transformed for each relation, and what the answers then say of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from kerneltest.model import FORMATS, FP32, Bounded, Case, Inapplicable, Materials, Numerics, Related, Variant

from ..attention._transformations import TRANSFORMATIONS as OF_ATTENTION
from . import _materials
from ._axes import Mla
from ._relations import as_attention

Answer = Mapping[str, Bounded]
# Even, so that a kernel that multiplies q and k by the root of the scale each still divides by a power of two.
POWER = 2


def transform(name: str, case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    """The variants of the relation of that name; those that attention has too are made by attention."""
    if name in OWN:
        return OWN[name](case, materials)
    # Of its keys' size: the values of q and k are bounded by it. What it says of the output's shape is not used.
    inner = as_attention(case, case.axes.key_dim)
    of_attention = {theirs: ours for ours, theirs in _materials.PAGES.items()}
    dressed = Materials(
        inputs=_materials.as_attention(materials.inputs),
        dead=tuple(
            replace(one, tensor=theirs)
            for theirs, ours in of_attention.items()
            for one in materials.dead
            if one.tensor == ours
        ),
        outputs=materials.outputs,
    )
    return tuple(
        replace(related, variants=tuple(_undressed(case, variant) for variant in related.variants))
        for related in OF_ATTENTION[name](inner, dressed)
    )


def _undressed(case: Case[Mla], variant: Variant) -> Variant:
    axes = variant.case.axes
    changed = replace(case.axes, requests=axes.requests, causal=axes.causal, sm_scale=axes.sm_scale)
    return Variant(
        case=replace(case, axes=changed, relation=""), materials=_materials.from_attention(case, variant.materials)
    )


def latent_sign(case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    x = materials.inputs

    def back(answers: Sequence[Answer], _numerics: Numerics) -> Answer:
        return _on_out(answers[0], lambda out: replace(out, value=-out.value))

    variant = _with(case, materials, q_nope=-x["q_nope"], ckv_pages=-x["ckv_pages"])
    return (Related(variants=(variant,), back=back),)


def latent_scale(case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    x, fmt = materials.inputs, FORMATS[case.axes.dtype]
    keys = max(request.kv_len for request in case.axes.requests)
    # A dead slot may hold anything, and is poisoned later.
    largest = float(x["ckv_pages"].abs().max()) * 2.0 ** (POWER + 1)
    if largest > fmt.max or largest * keys > FP32.max:
        raise Inapplicable("the latents are too large to be multiplied by 4")
    quarter = x["q_nope"] / 2**POWER
    if not torch.equal(quarter * 2**POWER, x["q_nope"]):
        raise Inapplicable("q_nope is too small to be divided by 4")

    def back(answers: Sequence[Answer], _numerics: Numerics) -> Answer:
        def divided(out: Bounded) -> Bounded:
            value = out.value / 2**POWER
            # Below the normal range there are fewer digits: what was rounded to them once need not come back. Products
            # below that of fp32 may be flushed to zero.
            lost = torch.where(value.abs() <= 2.0**fmt.emin, 2 * fmt.eta, 0.0) + (keys + 1) * 2.0**FP32.emin
            return Bounded(value=value, error=out.error / 2**POWER + lost)

        return _on_out(answers[0], divided)

    variant = _with(case, materials, q_nope=quarter, ckv_pages=x["ckv_pages"] * 2**POWER)
    return (Related(variants=(variant,), back=back),)


def head_permutation(case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    x, heads = materials.inputs, case.axes.heads
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(case.seed))
    if torch.equal(order, torch.arange(heads)):
        order = order.flip(0)
    home = order.argsort()

    def back(answers: Sequence[Answer], _numerics: Numerics) -> Answer:
        return {
            name: Bounded(value=given.value[:, home], error=given.error[:, home]) for name, given in answers[0].items()
        }

    variant = _with(case, materials, q_nope=x["q_nope"][:, order], q_pe=x["q_pe"][:, order])
    return (Related(variants=(variant,), back=back),)


def _with(case: Case[Mla], materials: Materials, **inputs: torch.Tensor) -> Variant:
    return Variant(case=replace(case, relation=""), materials=replace(materials, inputs={**materials.inputs, **inputs}))


def _on_out(answer: Answer, change: Callable[[Bounded], Bounded]) -> Answer:
    return {name: change(given) if name == "out" else given for name, given in answer.items()}


OWN: Mapping[str, Callable[[Case[Mla], Materials], tuple[Related, ...]]] = {
    function.__name__: function for function in (latent_sign, latent_scale, head_permutation)
}
