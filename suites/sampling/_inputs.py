"""The values of a case: distributions or logits by the name of an input strategy, and parameters of each row."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kerneltest.model import Case, Materials, OutputSpec

from ._axes import Rows

# How far the head of a heavy tail is above it, in nats: 2^-24 of the mass to most of it at usual vocabularies.
GAPS = (2.0, 6.0, 10.0, 12.0, 14.0, 16.0, 18.0)
SCALES = (1.0, 0.25, 3.0, 6.0)
Values = Callable[[int, int, torch.Generator], torch.Tensor]


def materials(case: Case[Rows], *, logits: bool, outputs: dict[str, OutputSpec], draws: bool) -> Materials:
    """Host tensors, all of them from ``case.seed``.

    ``logits`` or ``probs`` [rows, V]; if parameters differ by row, ``top_k`` int32, ``top_p`` and ``min_p`` float32
    [rows]; of random operators ``seed`` and ``offset``, int64 [1], and, if there are any, ``indices`` [outputs].
    """
    axes = case.axes
    random = torch.Generator().manual_seed(case.seed)
    rows = 1 if axes.shared else axes.rows
    values = (logits_of if logits else probs_of)(case.inputs, rows, axes.vocabulary, random)
    inputs = {"logits" if logits else "probs": values.to(getattr(torch, axes.dtype)).expand(axes.rows, -1).contiguous()}
    if axes.per_row:
        descending = values.float().nan_to_num(neginf=-1e30).sort(-1, descending=True).values
        if logits:
            descending = descending.softmax(-1)
        of_rows = descending.expand(axes.rows, -1)
        inputs |= {name: PARAMETERS[name](of_rows, getattr(axes, name), random) for name in axes.parameters}
    if draws:
        if axes.indices:
            dtype = getattr(torch, axes.indices)
            inputs["indices"] = torch.randint(axes.rows, (axes.outputs,), generator=random).to(dtype)
        inputs["seed"], inputs["offset"] = torch.tensor([case.seed]), torch.tensor([0])
    return Materials(inputs=inputs, dead=(), outputs=outputs)


def probs_of(inputs: str, rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """Distributions in float32 [rows, V]; raises KeyError for a strategy that there is none of."""
    if inputs in PROBS:
        return PROBS[inputs](rows, vocabulary, random)
    if inputs == "unnormalised":
        share = 0.3 + 0.6 * torch.rand(rows, 1, generator=random)
        return _softmax(_generic(rows, vocabulary, random)) * share
    return _softmax(LOGITS[inputs](rows, vocabulary, random))


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """In float64 before it is rounded: torch's own in float32 has sums that are off by 5e-4 on a CPU."""
    return logits.double().softmax(-1).float()


def logits_of(inputs: str, rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """Logits in float32 [rows, V], each row with a finite one."""
    if inputs in LOGITS:
        return LOGITS[inputs](rows, vocabulary, random)
    return PROBS[inputs](rows, vocabulary, random).log()


def _generic(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    scale = torch.tensor(SCALES)[torch.randint(len(SCALES), (rows, 1), generator=random)]
    return scale * torch.randn(rows, vocabulary, generator=random)


def _ties(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """Few different values, so that a border lies inside a group of equals more often than not."""
    return torch.randint(-2, 3, (rows, vocabulary), generator=random).float() / 2


def _near_ties(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """Values one or two units in the last place apart."""
    level = torch.tensor([1.0, 1.0, 0.25])[torch.randint(3, (rows, vocabulary), generator=random)]
    base = (level / level.sum(-1, keepdim=True, dtype=torch.float64)).float()
    step = torch.randint(-1, 2, (rows, vocabulary), generator=random, dtype=torch.int32)
    return (base.view(torch.int32) + step).view(torch.float32)


def _masked(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    gone = torch.rand(rows, vocabulary, generator=random) < torch.rand(rows, 1, generator=random)
    # One at least stays.
    gone.scatter_(-1, torch.randint(vocabulary, (rows, 1), generator=random), value=False)
    return _generic(rows, vocabulary, random).masked_fill(gone, -torch.inf)


def _heavy_tail(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """One head above a tail of equals, by a gap of each row's own."""
    gap = torch.tensor(GAPS)[torch.randint(len(GAPS), (rows, 1), generator=random)]
    head = torch.randint(vocabulary, (rows, 1), generator=random)
    return torch.zeros(rows, vocabulary).scatter_(-1, head, gap)


def _peaked(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    head = torch.randint(vocabulary, (rows, 1), generator=random)
    return torch.randn(rows, vocabulary, generator=random).scatter_(-1, head, 30.0)


def _subnormal(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """Most probabilities below 2^-126, where a float32 has no normal numbers, and some that are exactly 0."""
    usual = torch.rand(rows, vocabulary, generator=random) < 0.3
    usual.scatter_(-1, torch.randint(vocabulary, (rows, 1), generator=random), value=True)
    low = -88.0 - 16.0 * torch.rand(rows, vocabulary, generator=random)
    usual_values = _softmax(_generic(rows, vocabulary, random).masked_fill(~usual, -torch.inf))
    return usual_values.where(usual, low.double().exp().float())


def _subnormal_logits(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """Logits around zero of which most are subnormal, of both signs."""
    usual = torch.rand(rows, vocabulary, generator=random) < 0.3
    tiny = torch.randn(rows, vocabulary, generator=random, dtype=torch.float64) * 2.0**-130
    return _generic(rows, vocabulary, random).where(usual, tiny.float())


def _uniform(rows: int, vocabulary: int, _random: torch.Generator) -> torch.Tensor:
    return torch.zeros(rows, vocabulary)


def _large(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """Logits of some hundreds, with a shift that all of a row have in common."""
    shift = 500.0 * torch.randint(-1, 2, (rows, 1), generator=random)
    return shift + 100.0 * torch.randn(rows, vocabulary, generator=random)


def _zipf(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """The tokens of a language: the n-th most frequent has a probability of about 1 / n."""
    order = torch.stack([torch.randperm(vocabulary, generator=random) for _ in range(rows)])
    return -(order + 2.7).log()


def _dyadic(rows: int, vocabulary: int, random: torch.Generator) -> torch.Tensor:
    """Halves, quarters, eighths ... of the mass, each split into equal tokens: multiples of 2^-24 that sum to 1."""
    return torch.stack([_dyadic_row(vocabulary, random) for _ in range(rows)])


def _dyadic_row(vocabulary: int, random: torch.Generator) -> torch.Tensor:
    levels = int(torch.randint(1, min(vocabulary, 10) + 1, (), generator=random))
    probs, room = [], vocabulary - levels  # each level has one token at least
    for level in range(levels):
        exponent = min(level + 1, levels - 1)
        most = min((room + 1).bit_length() - 1, 24 - exponent)
        split = int(torch.randint(0, most + 1, (), generator=random))
        room -= (1 << split) - 1
        probs.append(torch.full((1 << split,), 2.0 ** -(exponent + split)))
    row = torch.nn.functional.pad(torch.cat(probs), (0, room))
    return row[torch.randperm(vocabulary, generator=random)]


def _p(descending: torch.Tensor, scalar: float, random: torch.Generator) -> torch.Tensor:
    """A share of the mass for each row: any, exactly a running sum, tiny, or 1; the first row has the scalar."""
    rows, vocabulary = descending.shape
    place = torch.randint(vocabulary, (rows, 1), generator=random)
    running = descending.double().cumsum(-1).gather(-1, place).squeeze(-1).float()
    kinds = torch.stack([torch.rand(rows, generator=random), running, torch.full((rows,), 1e-6), torch.ones(rows)])
    p = kinds.gather(0, torch.tensor([0, 0, 1, 1, 2, 3])[torch.randint(6, (1, rows), generator=random)]).squeeze(0)
    p[0] = scalar
    return p.clamp(2.0**-20, 1.0)


def _k(descending: torch.Tensor, scalar: int, random: torch.Generator) -> torch.Tensor:
    """A count for each row: 1, few, any, or all; the first row has the scalar."""
    rows, vocabulary = descending.shape
    few = torch.randint(1, min(vocabulary, 64) + 1, (rows,), generator=random)
    anything = torch.randint(1, vocabulary + 1, (rows,), generator=random)
    kinds = torch.stack([torch.ones_like(few), few, few, anything, torch.full_like(few, vocabulary)])
    k = kinds.gather(0, torch.randint(5, (1, rows), generator=random)).squeeze(0)
    k[0] = scalar
    return k.to(torch.int32)


def _min_p(descending: torch.Tensor, scalar: float, random: torch.Generator) -> torch.Tensor:
    """A share of the largest for each row: any, that of some token, all, or nothing; the first row has the scalar."""
    rows, vocabulary = descending.shape
    place = torch.randint(vocabulary, (rows, 1), generator=random)
    ratio = (descending.gather(-1, place) / descending[:, :1]).squeeze(-1)
    kinds = torch.stack([torch.rand(rows, generator=random), ratio, torch.ones(rows), torch.zeros(rows)])
    share = kinds.gather(0, torch.tensor([0, 0, 1, 1, 2, 3])[torch.randint(6, (1, rows), generator=random)]).squeeze(0)
    share[0] = scalar
    return share.clamp(0.0, 1.0)


def _temperature(descending: torch.Tensor, scalar: float, random: torch.Generator) -> torch.Tensor:
    """From 1/50 to 50 for each row, or 1; the first row has the scalar."""
    rows = descending.shape[0]
    any_of_them = (4.0 * (2 * torch.rand(rows, generator=random) - 1)).exp()
    temperature = any_of_them.where(torch.rand(rows, generator=random) < 0.8, 1.0)
    temperature[0] = scalar
    return temperature


LOGITS: dict[str, Values] = {
    "generic": _generic,
    "ties": _ties,
    "masked": _masked,
    "heavy_tail": _heavy_tail,
    "peaked": _peaked,
    "subnormal_logits": _subnormal_logits,
    "uniform": _uniform,
    "zipf": _zipf,
    "large": _large,
}
PROBS: dict[str, Values] = {"near_ties": _near_ties, "subnormal": _subnormal, "dyadic": _dyadic}
PARAMETERS: dict[str, Callable[..., torch.Tensor]] = {
    "top_k": _k,
    "top_p": _p,
    "min_p": _min_p,
    "temperature": _temperature,
}
