"""How a case of MLA is transformed for each relation, and what the answers then say of the original.

What meets the latents in a score is the query where it is absorbed, and W_UK in a whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from kerneltest.model import FORMATS, FP32, Bounded, Case, Inapplicable, Materials, Related, Variant

from ..attention._transformations import TRANSFORMATIONS as OF_ATTENTION
from . import _materials
from ._axes import Mla, as_attention

Answer = Mapping[str, Bounded]
# Even, so that a kernel that multiplies q and k by the root of the scale each still divides by a power of two.
POWER = 2


def transform(name: str, case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    """The variants of the relation of that name; those that attention has too are made by attention."""
    if name in OWN:
        return OWN[name](case, materials)
    # Of its keys' size: the values of q and k are bounded by it. What it says of the output's shape is not used.
    inner = as_attention(case, case.axes.key_dim)
    dressed = Materials(
        inputs=_materials.as_attention(materials.inputs),
        dead=tuple(replace(one, tensor=_materials.PAGES[one.tensor]) for one in materials.dead),
        outputs=materials.outputs,
    )

    def undressed(variant: Variant) -> Variant:
        axes = variant.case.axes
        changed = replace(case.axes, requests=axes.requests, causal=axes.causal, sm_scale=axes.sm_scale)
        return Variant(
            case=replace(case, axes=changed, relation=""),
            materials=_materials.from_attention(materials, variant.materials),
        )

    return tuple(
        replace(related, variants=tuple(undressed(variant) for variant in related.variants))
        for related in OF_ATTENTION[name](inner, dressed)
    )


def latent_sign(case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    x, met = materials.inputs, _met(materials)

    def back(answers: Sequence[Answer], _numerics: object) -> Answer:
        return _on_out(answers[0], lambda out: replace(out, value=-out.value))

    variant = _with(case, materials, ckv_pages=-x["ckv_pages"], **{met: -x[met]})
    return (Related(variants=(variant,), back=back),)


def latent_scale(case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    x, met, fmt = materials.inputs, _met(materials), FORMATS[case.axes.dtype]
    keys = max(request.kv_len for request in case.axes.requests)
    # What a sum of latents, or of values made of them, may reach.
    largest = float(x["ckv_pages"].abs().max()) * 2.0 ** (POWER + 1) * case.axes.rank
    if largest > fmt.max or largest * keys > FP32.max:
        raise Inapplicable("the latents are too large to be multiplied by 4")
    quarter = x[met] / 2**POWER
    if not torch.equal(quarter * 2**POWER, x[met]):
        raise Inapplicable(f"{met} is too small to be divided by 4")

    def back(answers: Sequence[Answer], _numerics: object) -> Answer:
        def divided(out: Bounded) -> Bounded:
            value = out.value / 2**POWER
            # Below the normal range there are fewer digits: what was rounded to them once need not come back. Products
            # below that of fp32 may be flushed to zero.
            lost = torch.where(value.abs() <= 2.0**fmt.emin, 2 * fmt.eta, 0.0) + (keys + 1) * 2.0**FP32.emin
            return Bounded(value=value, error=out.error / 2**POWER + lost)

        return _on_out(answers[0], divided)

    variant = _with(case, materials, ckv_pages=x["ckv_pages"] * 2**POWER, **{met: quarter})
    return (Related(variants=(variant,), back=back),)


def latent_permutation(case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    x = materials.inputs
    order = _another_order(case.axes.rank, case)
    home = order.argsort()
    moved = [name for name in ("q_nope", "ckv_pages", "w_uk", "w_uv") if name in x]
    if "w_uk" in x:
        moved.remove("q_nope")

    def back(answers: Sequence[Answer], _numerics: object) -> Answer:
        if "w_uv" in x:
            return answers[0]
        return _on_out(answers[0], lambda out: Bounded(value=out.value[..., home], error=out.error[..., home]))

    variant = _with(case, materials, **{name: x[name][..., order] for name in moved})
    return (Related(variants=(variant,), back=back),)


def head_permutation(case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    x = materials.inputs
    order = _another_order(case.axes.heads, case)
    home = order.argsort()

    def back(answers: Sequence[Answer], _numerics: object) -> Answer:
        return {
            name: Bounded(value=given.value[:, home], error=given.error[:, home]) for name, given in answers[0].items()
        }

    moved = {name: x[name][:, order] for name in ("q_nope", "q_pe")}
    moved |= {name: x[name][order] for name in ("w_uk", "w_uv") if name in x}
    return (Related(variants=(_with(case, materials, **moved),), back=back),)


def _met(materials: Materials) -> str:
    """The input that meets the latents in a score."""
    return "w_uk" if "w_uk" in materials.inputs else "q_nope"


def _with(case: Case[Mla], materials: Materials, **inputs: torch.Tensor) -> Variant:
    return Variant(case=replace(case, relation=""), materials=replace(materials, inputs={**materials.inputs, **inputs}))


def _on_out(answer: Answer, change: Callable[[Bounded], Bounded]) -> Answer:
    return {name: change(given) if name == "out" else given for name, given in answer.items()}


def _another_order(count: int, case: Case[Mla]) -> torch.Tensor:
    """A random permutation that moves something."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(case.seed))
    return order.flip(0) if torch.equal(order, torch.arange(count)) else order


OWN: Mapping[str, Callable[[Case[Mla], Materials], tuple[Related, ...]]] = {
    function.__name__: function for function in (latent_sign, latent_scale, latent_permutation, head_permutation)
}
