"""What merging attention states is in float64, how far fp32 may be from it, and its values, forms and relations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kerneltest.model import FP32, Bounded, Case, ErrorBudget, Materials, OutputSpec, Related, Variant
from kerneltest.model.numerics import DIVISION, FLUSHED

from ._merge_axes import STAND_IN, MergeNumerics, MergeStates

# Threads of a block that merge what each of them has merged: no kernel has more of them side by side.
LANES = 32
# Of lg2.approx.ftz.f32, as the PTX manual documents it: absolute for arguments near 1, relative elsewhere.
LG2_APPROX = 2.0**-22
# Standard deviation of the log-sum-exps, and the offset that all of ``large`` share.
SPREAD, FAR, LARGE = 4.0, 200.0, 4096.0


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The states in one form for all operators: ``v`` [rows, states, heads, d], ``s`` [rows, states, heads].

    ``mask`` [rows]: where it is false, the first state stays as it is.
    """

    v: torch.Tensor
    s: torch.Tensor
    mask: torch.Tensor | None = None


def values(case: Case[MergeStates]) -> States:
    """The states of the case's input strategy, ``v`` in its dtype."""
    axes, random = case.axes, torch.Generator().manual_seed(case.seed)
    shape = (axes.rows, axes.states, axes.heads)
    v = torch.randn(*shape, axes.head_dim, generator=random)
    s = torch.randn(shape, generator=random)
    match case.inputs:
        case "generic":
            s = SPREAD * s
        case "far":
            s = FAR * s
        case "large":
            s = s + LARGE * torch.randn(axes.rows, 1, axes.heads, generator=random)
        case "empty" | "stand_in":
            # Of every fourth row no state has keys, beginning with the first.
            none = torch.rand(shape, generator=random) < 0.5
            none[::4] = True
            s = torch.where(none, -torch.inf if case.inputs == "empty" else STAND_IN, SPREAD * s)
            v = v.masked_fill(none.unsqueeze(-1), 0.0)
        case other:
            raise ValueError(f"no values for the input strategy {other!r}")
    mask = torch.rand(axes.rows, generator=random) < 0.5 if axes.masked else None
    return States(v=v.to(getattr(torch, axes.dtype)), s=s, mask=mask)


def materials(case: Case[MergeStates], x: States) -> Materials:
    """The states in the form that the case's operator takes."""
    axes = case.axes
    if case.operator == "merge_states":
        inputs = {"v": x.v, "s": x.s}
    else:
        one, other = ("", "_other") if case.operator == "merge_state_in_place" else ("_a", "_b")
        inputs = {
            f"{name}{suffix}": tensor[:, number].contiguous()
            for number, suffix in enumerate((one, other))
            for name, tensor in (("v", x.v), ("s", x.s))
        }
    if x.mask is not None:
        inputs["mask"] = x.mask
    return Materials(
        inputs=inputs,
        dead=(),
        outputs={
            "out": OutputSpec(shape=(axes.rows, axes.heads, axes.head_dim), dtype=axes.dtype),
            "lse": OutputSpec(shape=(axes.rows, axes.heads), dtype="float32"),
        },
    )


def stacked(case: Case[MergeStates], inputs: Mapping[str, torch.Tensor]) -> States:
    """The inverse of :func:`materials`."""
    mask = inputs.get("mask")
    if case.operator == "merge_states":
        return States(v=inputs["v"], s=inputs["s"], mask=mask)
    one, other = ("", "_other") if case.operator == "merge_state_in_place" else ("_a", "_b")
    v, s = (torch.stack([inputs[name + one], inputs[name + other]], 1) for name in ("v", "s"))
    return States(v=v, s=s, mask=mask)


def states(case: Case[MergeStates], inputs: Mapping[str, torch.Tensor], device: str) -> States:
    """The states on the device, in float64."""
    x = stacked(case, inputs)
    mask = None if x.mask is None else x.mask.to(device)
    return States(v=x.v.to(device).double(), s=x.s.to(device).double(), mask=mask)


def merge_budget(x: States, numerics: MergeNumerics) -> dict[str, ErrorBudget]:
    """The budgets of ``out`` and ``lse``.

    With u = 2^-24, c = ln B, m the largest s of a row, w the weights, and T = states + 1 steps, and LANES + 1 more for
    every further round, a weight is off by δ_i = exp Σ - 1, relative, where the sum is that of

    * its exponent is a difference, or a chain of differences of maxima that telescopes to m - s_i, each rounded: c u
      (m - s_i), three times that in base e, where a product with log2 e comes in;
    * each step multiplies it by an exponential and adds it: T (exp_rel + 2u);
    * the log-sum-exp of a state merged before is a sum and a logarithm of a number from 1 to the number of states:
      c (u |s| + 2^-22 (1 + log2 states)) for every further round, with max |s_i| + log_B states for |s|.

    Numerator and denominator move the output by Σ w_i δ_i (|v_i| + |o|) / (1 - Σ w δ), each division by 2^-22 |o|,
    rounding partial outputs by u_part Σ w|v| and η_part in each round, a weight below 2^-126 that is flushed by 2^-126
    |v|. The log-sum-exp, in its base, is off by Σ w δ / (c (1 - Σ w δ)), and for itself and each round u |s| twice, for
    its sum and a product in base e, and 2^-22 (1 + log2 states).
    """
    u, unit = FP32.u, math.log(2.0) if numerics.lse_base == "2" else 1.0
    # States of no keys weigh nothing; where all are such, nothing is left.
    s = torch.where(x.s <= numerics.lse_no_key, -torch.inf, x.s)
    count = s.shape[1]
    lse = torch.logsumexp(s * unit, 1) / unit
    peak = s.amax(1, keepdim=True)
    below = torch.where(s == -torch.inf, 0.0, peak - s)
    w = torch.where(s == -torch.inf, 0.0, ((s - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(1)) * unit).exp())
    size = torch.where(s == -torch.inf, 0.0, s.abs()).amax(1, keepdim=True) + math.log(count) / unit
    logarithm = LG2_APPROX * (1 + math.log2(count))
    steps = count + 1 + numerics.rounds * (LANES + 1)
    exponent = unit * u * below * (1 if numerics.lse_base == "2" else 3) + numerics.rounds * unit * (
        u * size + logarithm
    )
    delta = torch.where(w > 0, (exponent + steps * (numerics.exp_rel + 2 * u)).expm1(), 0.0)
    share = (w * delta).sum(1)
    if bool((share > 0.5).any()):
        raise ValueError("log-sum-exps so large that fp32 cannot tell one from another have no merge")
    away = (1 - share).unsqueeze(-1)
    w_out, v = w.unsqueeze(-1), x.v
    out = (w_out * v).sum(1)
    absolute = (w_out * v.abs()).sum(1)
    moved = (w_out * delta.unsqueeze(-1) * v.abs()).sum(1) + share.unsqueeze(-1) * out.abs()
    hard = moved / away + (1 + numerics.rounds) * DIVISION * out.abs() + FLUSHED * (v.abs().sum(1) + 1)
    if numerics.partial.t < FP32.t:
        hard = hard + numerics.rounds * (numerics.partial.u * absolute + numerics.partial.eta)
    of_sum = (1 + numerics.rounds) * (2 * u * size.squeeze(1) + logarithm) + share / ((1 - share) * unit)
    merged = {"out": (out, numerics.slack * hard), "lse": (lse, numerics.slack * of_sum)}
    if x.mask is not None:
        first = {"out": x.v[:, 0], "lse": x.s[:, 0]}
        merged = {name: _where(x.mask, merged[name], first[name]) for name in merged}
    formats = {"out": numerics.out, "lse": FP32}
    return {
        name: ErrorBudget(ref=ref, hard=bound, out=formats[name], minus_inf=numerics.lse_no_key)
        for name, (ref, bound) in merged.items()
    }


def _where(
    mask: torch.Tensor, merged: tuple[torch.Tensor, torch.Tensor], first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged where the mask is true, else the first state, which must not change by a bit."""
    here = mask.view(-1, *[1] * (first.dim() - 1))
    return torch.where(here, merged[0], first), torch.where(here, merged[1], 0.0)


Answer = Mapping[str, Bounded]


def _variant(case: Case[MergeStates], x: States) -> Variant:
    axes = replace(case.axes, rows=x.v.shape[0], states=x.v.shape[1])
    case = replace(case, axes=axes, relation="")
    return Variant(case=case, materials=materials(case, x))


def _same(answers: Sequence[Answer], _numerics: Any) -> Answer:
    return answers[0]


def value_sign(case: Case[MergeStates], given: Materials) -> tuple[Related, ...]:
    x = stacked(case, given.inputs)

    def back(answers: Sequence[Answer], _numerics: Any) -> Answer:
        return {name: replace(one, value=-one.value) if name == "out" else one for name, one in answers[0].items()}

    return (Related(variants=(_variant(case, replace(x, v=-x.v)),), back=back),)


def row_order(case: Case[MergeStates], given: Materials) -> tuple[Related, ...]:
    x = stacked(case, given.inputs)
    order = torch.arange(case.axes.rows).roll(1)
    home = order.argsort()

    def back(answers: Sequence[Answer], _numerics: Any) -> Answer:
        return {name: Bounded(value=one.value[home], error=one.error[home]) for name, one in answers[0].items()}

    moved = States(v=x.v[order], s=x.s[order], mask=None if x.mask is None else x.mask[order])
    return (Related(variants=(_variant(case, moved),), back=back),)


def repeat(case: Case[MergeStates], given: Materials) -> tuple[Related, ...]:
    return (Related(variants=(Variant(case=case, materials=given),), back=_same),) * 3


def state_order(case: Case[MergeStates], given: Materials) -> tuple[Related, ...]:
    x = stacked(case, given.inputs)
    return (Related(variants=(_variant(case, replace(x, v=x.v.flip(1), s=x.s.flip(1))),), back=_same),)


def split(case: Case[MergeStates], given: Materials) -> tuple[Related, ...]:
    """Each half merged by the kernel, and the two halves in float64."""
    from ._transformations import merge

    x, half = stacked(case, given.inputs), case.axes.states // 2
    halves = (States(v=x.v[:, :half], s=x.s[:, :half]), States(v=x.v[:, half:], s=x.s[:, half:]))

    def back(answers: Sequence[Answer], numerics: Any) -> Answer:
        return merge(answers[0], answers[1], math.log(2.0) if numerics.lse_base == "2" else 1.0)

    return (Related(variants=tuple(_variant(case, part) for part in halves), back=back),)


TRANSFORMATIONS: Mapping[str, Callable[[Case[MergeStates], Materials], tuple[Related, ...]]] = {
    function.__name__: function for function in (value_sign, row_order, repeat, state_order, split)
}
