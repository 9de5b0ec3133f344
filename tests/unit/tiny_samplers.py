"""A suite of samplers, right and wrong, over a few tokens of which the first is impossible; not imported but copied.

Each launch draws 4096 rows with random numbers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from kerneltest.model import (
    FP32,
    IEEE_FP32,
    Case,
    Draws,
    InputStrategy,
    Kernel,
    Materials,
    Numerics,
    Operator,
    OutputSpec,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    vocabulary: int
    rows: int = 4096


def materialize(case):
    import torch

    weights = torch.rand(case.axes.vocabulary, generator=torch.Generator().manual_seed(case.seed)) + 0.1
    weights[0] = 0
    tokens = OutputSpec(shape=(case.axes.rows,), dtype="int64")
    return Materials(inputs={"weights": weights}, dead=(), outputs={"tokens": tokens})


def probabilities(case, inputs, device):
    weights = inputs["weights"].double()
    return weights / weights.sum()


def config(vocabulary):
    return Case(operator="draw_tokens", axes=Tokens(vocabulary=vocabulary), inputs="any", seed=7)


operator = Operator(
    name="draw_tokens",
    axes=Tokens,
    inputs=(InputStrategy(name="any"),),
    cases=lambda size: None,
    materialize=materialize,
    reference=lambda case, inputs, device: None,
    budget=lambda case, terms, numerics, strategy: {},
    locate=lambda case, output, index: f"row {index[0]}",
    certified=("tokens",),
    draws=Draws(
        cases=lambda size: (config(40), config(5), config(1000)),
        probabilities=probabilities,
        categories=lambda outputs: outputs["tokens"],
    ),
)


def numerics(case, device):
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FP32)


def sampler(name, change=None, seed=lambda call: call.draw, **more):
    def launch(call):
        import torch

        weights = call.inputs["weights"].double()
        if change:
            weights = change(weights.clone())
        generator = torch.Generator().manual_seed(seed(call))
        # By the inverse of the cumulated weights, in float64.
        ends = weights.cumsum(0)
        u = torch.rand(call.case.axes.rows, dtype=torch.float64, generator=generator) * ends[-1]
        call.outputs["tokens"].copy_(torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1))
        return call.outputs

    return Kernel(name=name, operator=operator, launch=launch, numerics=numerics, **more)


def even_ids(weights):
    weights[::2] *= 1.05
    return weights


def one_impossible(weights):
    weights[0] = weights.sum() / 10000
    return weights


right = sampler("tiny.right")
biased = sampler("tiny.even_ids", even_ids)
frozen = sampler("tiny.frozen", seed=lambda call: call.case.seed)
impossible = sampler("tiny.impossible", one_impossible)
small_only = sampler("tiny.small", unsupported=lambda case, device: "too many" if case.axes.vocabulary > 10 else None)


def spoil(call):
    outputs = right.launch(call)
    call.inputs["weights"][1] *= 2
    return outputs


spoiling = Kernel(name="tiny.spoiling", operator=operator, launch=spoil, numerics=numerics)


def forget(call):
    outputs = {"tokens": right.launch(call)["tokens"].clone()}
    outputs["tokens"][-1] = call.outputs["tokens"].fill_(-1)[0]
    return outputs


outside = Kernel(name="tiny.outside", operator=operator, launch=forget, numerics=numerics)
