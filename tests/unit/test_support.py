"""Support certificates: what is sure, what is possible, and that no right kernel falls outside of them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_cases import draws

from kerneltest.model import AccModel, Rejection
from kerneltest.oracle.support import (
    Support,
    Ties,
    check_draws,
    check_kept,
    describe,
    histogram_error,
    mass_above,
    min_p,
    nucleus,
    sums_are_exact,
    top_k,
)

# Five tokens, two of them equal, out of order.
PROBS = torch.tensor([[0.125, 0.5, 0.125, 0.25, 0.0]], dtype=torch.float64)
ZERO = torch.zeros(1, 1, dtype=torch.float64)


def column(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def cut(p: float, *, ties: Ties = "kept", strict: bool = True, error: float = 0.0) -> tuple[list[int], list[int]]:
    """The tokens that are sure, and those that are possible."""
    above = mass_above(PROBS, ties=ties)
    return tokens(nucleus(above, column(p), error=torch.full_like(PROBS, error), p_error=ZERO, strict=strict))


def tokens(support: Support) -> tuple[list[int], list[int]]:
    sure, possible = (mask[0].nonzero().flatten().tolist() for mask in (support.sure, support.possible))
    return sure, possible


def kinds(found: Iterable[Rejection]) -> list[str]:
    return [rejection.kind for rejection in found]


@pytest.mark.parametrize(
    ("p", "ties", "strict", "kept"),
    [
        (0.5, "kept", True, [1]),
        (0.5, "kept", False, [1, 3]),
        (0.76, "kept", True, [0, 1, 2, 3]),
        (0.76, "index", True, [0, 1, 3]),
        (0.76, "reverse", True, [1, 2, 3]),
        (0.875, "index", True, [0, 1, 3]),
        (0.875, "index", False, [0, 1, 2, 3]),
        (1.0, "kept", True, [0, 1, 2, 3]),
        (1.0, "kept", False, [0, 1, 2, 3, 4]),
    ],
)
def test_nucleus_with_exact_sums_is_one_set(p: float, ties: Ties, strict: bool, kept: list[int]) -> None:
    assert cut(p, ties=ties, strict=strict) == (kept, kept)


def test_any_of_equal_tokens_may_be_the_one_that_stays() -> None:
    assert cut(0.76, ties="any") == ([1, 3], [0, 1, 2, 3])


def test_error_of_a_sum_makes_the_border_ambiguous_and_nothing_else() -> None:
    assert cut(0.75, error=1e-7) == ([1, 3], [0, 1, 2, 3])
    assert cut(0.75 - 2e-7, error=1e-7) == ([1, 3], [1, 3])
    assert cut(0.75 + 2e-7, error=1e-7) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_blur_takes_neighbours_for_equals_but_equals_for_what_they_are() -> None:
    near = torch.tensor([[0.4, 0.4 * (1 + 1e-8), 0.1, 0.1]], dtype=torch.float64)
    above = mass_above(near, blur=1e-7)
    torch.testing.assert_close(above.low, torch.tensor([[0.0, 0.0, 0.8, 0.8]], dtype=torch.float64))
    torch.testing.assert_close(above.high, torch.tensor([[0.4, 0.4, 0.8, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("k", "ties", "sure", "possible"),
    [
        (3, "kept", [0, 1, 2, 3], [0, 1, 2, 3]),
        (3, "index", [0, 1, 3], [0, 1, 3]),
        (3, "reverse", [1, 2, 3], [1, 2, 3]),
        (3, "any", [1, 3], [0, 1, 2, 3]),
        (4, "any", [0, 1, 2, 3], [0, 1, 2, 3]),
        (9, "any", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    ],
)
def test_top_k(k: int, ties: Ties, sure: list[int], possible: list[int]) -> None:
    assert tokens(top_k(PROBS, torch.tensor([[k]]), ties=ties)) == (sure, possible)
    # Nothing else is so near that a blur of this size could take it for an equal.
    assert tokens(top_k(PROBS, torch.tensor([[k]]), ties=ties, blur=1e-7)) == (sure, possible)


@pytest.mark.parametrize(
    ("ties", "sure", "possible"),
    [
        ("kept", [2], [0, 1, 2, 3]),
        ("index", [2], [0, 2, 3]),
        ("reverse", [2], [1, 2, 3]),
        ("any", [2], [0, 1, 2, 3]),
    ],
)
def test_top_k_of_blurred_values_leaves_open_what_neighbours_may_do(
    ties: Ties, sure: list[int], possible: list[int]
) -> None:
    values = torch.tensor([[0.2, 0.2, 0.5, 0.2 * (1 + 1e-8), 0.1]], dtype=torch.float64)
    assert tokens(top_k(values, torch.tensor([[2]]), ties=ties, blur=1e-7)) == (sure, possible)


def test_top_k_that_flushes_may_keep_more_subnormal_numbers() -> None:
    tiny = torch.tensor([[1.0, 2.0**-127, 2.0**-130, -(2.0**-140)]], dtype=torch.float64)
    k = torch.tensor([[2]])
    assert tokens(top_k(tiny, k, ties="kept")) == ([0, 1], [0, 1])
    assert tokens(top_k(tiny, k, ties="kept", flushes=True)) == ([0, 1], [0, 1, 2, 3])


def test_min_p_takes_the_product_in_float32() -> None:
    # 0.1 as a float32 is above 0.1, and so is its product with 1.
    probs, share = torch.tensor([[1.0, 0.1, 0.0999]]), torch.tensor([[0.1]])
    assert tokens(min_p(probs, share)) == ([0, 1], [0, 1])


def test_sums_of_multiples_of_the_unit_are_exact() -> None:
    rows = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 2.0**-25], [1.0, 0.5, 0.0]])
    assert sums_are_exact(rows).flatten().tolist() == [True, False, False]


# --- Right kernels, emulated in float32: none may leave the certificate. ---


def rows_of(seed: int, vocabulary: int, scale: float, steps: int) -> torch.Tensor:
    """A distribution in float32; logits are rounded to ``steps`` to the unit, so that there are ties."""
    random = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(2, vocabulary, generator=random) * steps).round() / steps
    return logits.softmax(-1)


def block_mass(probs: torch.Tensor, keep: torch.Tensor, lanes: int) -> torch.Tensor:
    """The sum of what is kept, by lanes that add side by side and are then joined one by one, in float32."""
    x = torch.nn.functional.pad(probs.where(keep, 0.0), (0, -probs.shape[-1] % lanes)).unflatten(-1, (-1, lanes))
    total = torch.zeros_like(x[..., 0, :])
    for step in x.unbind(-2):
        total = total + step
    joined = torch.zeros_like(total[..., 0])
    for lane in total.unbind(-1):
        joined = joined + lane
    return joined


def distributions() -> st.SearchStrategy[torch.Tensor]:
    return st.builds(
        rows_of,
        st.integers(0, 2**32 - 1),
        st.sampled_from((2, 17, 64, 300)),
        st.sampled_from((0.1, 1.0, 4.0)),
        st.sampled_from((2, 1 << 20)),
    )


@given(distributions(), st.floats(2.0**-7, 1.0, width=32), st.sampled_from((4, 32)))
@draws(60)
def test_threshold_on_block_sums_stays_inside(probs: torch.Tensor, p: float, lanes: int) -> None:
    model = AccModel(24, "rne", lanes, extra=lanes)
    above = mass_above(probs.double())
    error = model.gamma(probs.shape[-1]) * above.high
    support = nucleus(above, column(p).expand(2, 1), error=error, p_error=ZERO, strict=True)
    larger = probs.unsqueeze(1) > probs.unsqueeze(2)
    kept = block_mass(probs.unsqueeze(1).expand_as(larger), larger, lanes) < torch.tensor(p)
    assert kinds(check_kept(kept, support, probs, output="out")) == []


@given(distributions(), st.floats(2.0**-7, 1.0, width=32))
@draws(60)
def test_running_sum_in_float32_stays_inside(probs: torch.Tensor, p: float) -> None:
    model = AccModel(24, "rne", 1, extra=0)
    gamma, u = model.gamma(probs.shape[-1]), 2.0**-24
    above = mass_above(probs.double(), ties="index")
    error = gamma * (above.high + probs) + u * above.high
    support = nucleus(above, column(p).expand(2, 1), error=error, p_error=ZERO, strict=False)
    value, order = probs.sort(dim=-1, descending=True, stable=True)
    running = torch.stack(list(_accumulate(value)), -1)
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, ~(running - value > torch.tensor(p)))
    assert kinds(check_kept(kept, support, probs, output="out")) == []


def _accumulate(value: torch.Tensor) -> Iterable[torch.Tensor]:
    total = torch.zeros_like(value[:, 0])
    for x in value.unbind(-1):
        total = total + x
        yield total


def radix(probs: torch.Tensor, p: float, *, atomic: bool, seed: int) -> torch.Tensor:
    """The set that three passes over histograms keep, one row; ``atomic``: buckets are added up in a random order."""
    random = torch.Generator().manual_seed(seed)
    bits = probs.view(torch.int32).long()
    alive = torch.ones_like(probs, dtype=torch.bool)
    target, threshold = torch.tensor(0.0), 0
    for step, (shift, width) in enumerate(((21, 11), (10, 11), (0, 10))):
        bucket = (bits >> shift) & ((1 << width) - 1)
        sums = torch.zeros(1 << width)
        order = torch.randperm(len(probs), generator=random)
        for token in order[alive[order]].tolist():
            if atomic:
                sums[bucket[token]] += probs[token]
        if not atomic:
            exact = torch.zeros(1 << width, dtype=torch.float64).scatter_add_(0, bucket[alive], probs[alive].double())
            sums = (
                (exact.float().view(torch.int32) - 1)
                .clamp(min=0)
                .view(torch.float32)
                .where(exact.float().double() > exact, exact.float())
            )
        count = torch.bincount(bucket[alive], minlength=1 << width)
        if step == 0:
            target = sums.flip(0).view(-1, 32).sum(-1).sum() * torch.tensor(p)
        before, chosen = torch.tensor(0.0), 0
        for index in reversed(range(1 << width)):
            if count[index]:
                chosen = index
                if before + sums[index] >= target:
                    break
                before = before + sums[index]
        target = target - before
        threshold |= chosen << shift
        alive &= bucket == chosen
    return bits >= threshold


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from((64, 400)),
    st.sampled_from((0.1, 1.0, 4.0)),
    st.floats(2.0**-7, 1.0, width=32),
    st.booleans(),
)
@draws(40)
def test_radix_selection_stays_inside(seed: int, vocabulary: int, scale: float, p: float, atomic: bool) -> None:
    probs = rows_of(seed, vocabulary, scale, 4)[:1]
    kept = radix(probs[0], p, atomic=atomic, seed=seed).unsqueeze(0)
    total = probs.double().sum(-1, keepdim=True)
    support = nucleus(
        mass_above(probs.double()),
        p * total,
        error=histogram_error(probs, atomic=atomic),
        p_error=2.0**-24 * p * total,
        strict=True,
    )
    assert kinds(check_kept(kept, support, probs, output="out")) == []


def test_error_of_integer_histograms_does_not_grow_with_the_vocabulary() -> None:
    few, many = (torch.full((1, n), 1.0 / n) for n in (64, 1 << 17))
    assert float(histogram_error(many, atomic=True).max()) > 100 * float(histogram_error(few, atomic=True).max())
    # What is left is the list of buckets inside the border's.
    assert float(histogram_error(many, atomic=False).max()) < 5e-4


# --- Wrong ones are found. ---


def exact(kept: list[int]) -> Support:
    mask = torch.zeros_like(PROBS, dtype=torch.bool)
    mask[0, kept] = True
    return Support(sure=mask, possible=mask)


def test_set_that_lacks_or_has_one_token_more_is_rejected_and_the_token_named() -> None:
    support = exact([1, 3])
    assert kinds(check_kept(exact([1, 3]).sure, support, PROBS, output="out")) == []
    (lost,) = check_kept(exact([1]).sure, support, PROBS, output="out")
    assert "missing" in lost.what
    assert "token 3 of value 0.25: 1 are above it with a mass of 0.5" in lost.details[0]
    (more,) = check_kept(exact([0, 1, 3]).sure, support, PROBS, output="out")
    assert "excludes" in more.what
    assert "1 equal to it" in more.details[0]
    assert kinds(check_kept(exact([1]).sure, support, PROBS, output="out", excused=PROBS == 0.25)) == []


def drawn(values: list[int], support: Support) -> list[Rejection]:
    tokens = torch.tensor(values)
    return list(check_draws(tokens, torch.zeros_like(tokens), support, PROBS))


def test_draws_are_in_range_and_in_the_support() -> None:
    assert drawn([1, 3, 1, 1], exact([1, 3])) == []
    assert "outside of the vocabulary" in drawn([1, 5], exact([1, 3]))[0].what
    assert "outside of the vocabulary" in drawn([-1], exact([1, 3]))[0].what
    (excluded,) = drawn([1, 0], exact([1, 3]))
    assert (excluded.kind, "draw 1" in excluded.details[0]) == ("WrongSupport", True)


def test_token_that_is_expected_often_must_come_up() -> None:
    # A third of 192 draws is 64; one less may miss it.
    assert drawn([1] * 191, exact([1, 3])) == []
    (missing,) = drawn([1] * 192, exact([1, 3]))
    assert "never were" in missing.what
    assert "token 3" in missing.details[0]
    ambiguous = Support(sure=exact([1]).sure, possible=exact([1, 3]).possible)
    assert drawn([1] * 1000, ambiguous) == []


def test_a_logit_is_described_without_a_mass() -> None:
    assert describe(torch.tensor([[1.0, -2.0]]), 0, 1) == "row 0, token 1 of value -2: 1 are above it"
