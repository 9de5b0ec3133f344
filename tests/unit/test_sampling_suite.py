"""The sampling suite's cases, values, portfolios and certificates, without a worker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from sampling_cases import CPU, case, draws, module

from kerneltest.model import Call, Operator, Rejection, Size, encode
from kerneltest.model.case import Case

QUICK = Size(batch=2, qo_len=18, kv_len=70, heads=8, rows=4, vocabulary=2100)
WIDE = replace(QUICK, rows=400, vocabulary=262_144)


def operators() -> dict[str, Operator]:
    files = ("unfiltered", "filtered", "renorm", "top_k", "softmax", "speculative")
    found = [one for file in files for one in vars(module(file)).values() if isinstance(one, Operator)]
    return {one.name: one for one in found}


OPERATORS = operators()
RANDOM = {name: one for name, one in OPERATORS.items() if one.draws is not None}


@pytest.mark.parametrize("name", OPERATORS)
def test_cases_keep_to_their_size_survive_json_and_are_built_from_the_seed(name: str) -> None:
    operator = OPERATORS[name]

    @settings(draws(20), phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(operator.cases(QUICK))
    def check(one: Case[Any]) -> None:
        assert one.axes.rows <= QUICK.rows
        assert 2 <= one.axes.vocabulary <= QUICK.vocabulary
        assert Case.from_json(encode(one), operator.axes) == one
        first, again = (operator.materialize(one) for _ in range(2))
        for key, value in first.inputs.items():
            assert torch.equal(value, again.inputs[key]), key
        for less in operator.simpler(one):
            assert less != one
            operator.materialize(less)

    check()


@pytest.mark.parametrize("name", OPERATORS)
def test_largest_cases_stay_small_enough(name: str) -> None:
    @settings(draws(200), phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(OPERATORS[name].cases(WIDE))
    def check(one: Case[Any]) -> None:
        axes = one.axes
        assert axes.rows * axes.vocabulary * (2 * getattr(axes, "tokens", 0) + 1) <= 60_000_000
        if getattr(axes, "outputs", 0):
            assert axes.outputs * axes.vocabulary <= 60_000_000

    check()


@pytest.mark.parametrize("inputs", module("_axes").ALL)
@pytest.mark.parametrize("vocabulary", [2, 3, 64, 5000])
def test_probabilities_add_up_to_one(inputs: str, vocabulary: int) -> None:
    probs = module("_inputs").probs_of(inputs, 5, vocabulary, torch.Generator().manual_seed(1))
    assert probs.dtype is torch.float32
    assert bool((probs >= 0).all())
    torch.testing.assert_close(probs.double().sum(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=2e-7)


def test_inputs_are_what_they_are_called() -> None:
    def probs(name: str, vocabulary: int = 512) -> torch.Tensor:
        return module("_inputs").probs_of(name, 4, vocabulary, torch.Generator().manual_seed(3))

    assert bool((probs("dyadic").double() * 2**24 % 1 == 0).all())
    assert bool((probs("dyadic").double().sum(-1) == 1).all())
    assert all(len(row.unique()) < 10 for row in probs("ties"))
    assert bool((probs("masked") == 0).any(-1).any())
    tiny = probs("subnormal")
    assert int(((tiny > 0) & (tiny < 2.0**-126)).sum()) > 200
    near = probs("near_ties").sort(-1).values.view(torch.int32).diff(dim=-1)
    assert int((near == 1).sum()) > 4
    assert all(len(row.unique()) == 2 for row in probs("heavy_tail"))
    assert float(probs("unnormalised").sum(-1).max()) < 0.95


def test_parameters_of_rows_reach_over_their_range_and_hit_running_sums_exactly() -> None:
    one = case("top_p_renorm", "dyadic", rows=400, vocabulary=64, top_p=0.3, per_row=True)
    inputs = OPERATORS["top_p_renorm"].materialize(one).inputs
    p, probs = inputs["top_p"], inputs["probs"].sort(-1, descending=True).values
    assert (float(p[0]), float(p.max())) == (pytest.approx(0.3), 1.0)
    assert float(p.min()) < 1e-5
    on_the_border = (probs.cumsum(-1) == p.unsqueeze(-1)).any(-1)
    assert int(on_the_border.sum()) > 80


# --- What is drawn from. ---


@pytest.mark.parametrize("name", RANDOM)
def test_portfolio_is_clear_at_its_borders_and_has_something_to_draw(name: str) -> None:
    operator = RANDOM[name]
    assert operator.draws is not None
    cases = operator.draws.cases(replace(QUICK, vocabulary=33_000))
    assert len({one.id for one in cases}) == len(cases) >= 5
    for one in cases:
        operator.strategy(one.inputs)
        p = operator.draws.probabilities(one, operator.materialize(one).inputs, "cpu")
        assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
        assert float(p.max()) < 0.99


def test_portfolio_refuses_a_border_that_depends_on_the_rule_for_ties() -> None:
    one = case("top_k_sampling", "uniform", rows=3, vocabulary=10, top_k=5, shared=True)
    operator = RANDOM["top_k_sampling"]
    assert operator.draws is not None
    with pytest.raises(ValueError, match="depends on the rule at the border"):
        operator.draws.probabilities(one, operator.materialize(one).inputs, "cpu")


@pytest.mark.parametrize("name", RANDOM)
def test_draws_follow_the_distribution_and_differ_from_launch_to_launch(name: str) -> None:
    """No test of goodness of fit, which has a file of its own: the categories are those of the probabilities."""
    operator = RANDOM[name]
    assert operator.draws is not None
    one = operator.draws.cases(QUICK)[0]
    files = ("torch_sort", "torch_multinomial", "torch_speculative")
    kernel = next(k for file in files for k in vars(module(file)).values() if getattr(k, "operator", None) is operator)
    materials = operator.materialize(one)
    p = operator.draws.probabilities(one, materials.inputs, "cpu")

    def drawn(number: int) -> torch.Tensor:
        call = Call(case=one, device=CPU, inputs=materials.inputs, outputs={}, workspace=None, draw=number)  # type: ignore[arg-type]
        assert operator.draws is not None
        return operator.draws.categories(kernel.launch(call))

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    seen = torch.cat([drawn(number) for number in range(20)])
    assert len(seen) == 20 * one.axes.rows or len(seen) == 20 * one.axes.outputs
    share = torch.bincount(seen, minlength=len(p)).double() / len(seen)
    assert float((share - p).abs().max()) < 6 / len(seen) ** 0.5


def test_kernel_that_draws_the_same_each_time_is_seen_in_its_categories() -> None:
    operator = RANDOM["sampling_from_probs"]
    assert operator.draws is not None
    one = operator.draws.cases(QUICK)[1]
    materials = operator.materialize(one)
    call = Call(case=one, device=CPU, inputs=materials.inputs, outputs={}, workspace=None, draw=0)  # type: ignore[arg-type]
    launch = module("torch_multinomial").launch_sampling
    outputs = [launch(replace(call, draw=draw)) for draw in (0, 1)]
    stuck = [launch(replace(replace(call, draw=draw), draw=0)) for draw in (0, 1)]
    assert not torch.equal(*map(operator.draws.categories, outputs))
    assert torch.equal(*map(operator.draws.categories, stuck))


def test_speculation_has_the_target_as_its_outcome() -> None:
    """Leviathan et al., theorem: the first token that is put out follows the target, whatever the draft was."""
    speculation = module("_speculation")
    random = torch.Generator().manual_seed(5)
    draft, target = torch.rand(2, 1, 2, 7, generator=random).double()
    draft, target = draft[:, :1] / draft[:, :1].sum(-1, keepdim=True), target / target.sum(-1, keepdim=True)
    first = torch.zeros(7, dtype=torch.float64)
    for token in range(7):
        inputs = {"draft_probs": draft, "target_probs": target, "draft_token_ids": torch.tensor([[token]])}
        p = speculation.distribution(inputs, "cpu").view(7, 2)
        # Not accepted: what comes instead. Accepted: the token itself.
        first += draft[0, 0, token] * p[:, 0]
        first[token] += draft[0, 0, token] * p[:, 1].sum()
    torch.testing.assert_close(first, target[0, 0])


# --- What a certificate makes of answers. ---


def certified(operator: str, one: Case[Any], semantics: Any, outputs: dict[str, torch.Tensor]) -> list[Rejection]:
    known = OPERATORS[operator]
    terms = known.reference(one, known.materialize(one).inputs, "cpu")
    return list(known.certify(one, terms, semantics, outputs))


def test_near_ties_that_a_renormalisation_merges_are_not_held_against_a_kernel() -> None:
    one = case("top_k_top_p_sampling", "near_ties", rows=4, vocabulary=900, top_k=850, top_p=0.5, order="top_k_first")
    operator = OPERATORS["top_k_top_p_sampling"]
    terms = operator.reference(one, operator.materialize(one).inputs, "cpu")
    semantics = module("_semantics").Semantics(
        mass=module("torch_sort").IN_DOUBLE, row_sum=module("torch_sort").IN_DOUBLE
    )
    support = module("_certify").support_of(one, terms, semantics, logits=False)
    ambiguous = support.possible & ~support.sure
    assert 0 < int(ambiguous.sum()) < 4 * 900
    kept = torch.where(support.possible, terms.probs, 0.0).float()
    renormalised = kept / kept.sum(-1, keepdim=True)
    before = (renormalised.unsqueeze(1) * (renormalised.unsqueeze(1) > renormalised.unsqueeze(2))).double().sum(-1)
    assert not bool((support.sure & (before >= 0.5)).any())


def test_dyadic_rows_leave_nothing_open() -> None:
    operator = OPERATORS["top_p_renorm"]
    one = case("top_p_renorm", "dyadic", rows=50, vocabulary=400, top_p=0.75)
    terms = operator.reference(one, operator.materialize(one).inputs, "cpu")
    for numerics in (module("torch_sort").semantics(one, CPU), module("_semantics").Semantics(relative=True)):
        support = module("_certify").support_of(one, terms, numerics, logits=False)
        assert torch.equal(support.sure, support.possible)


def test_renormalised_values_are_judged_by_the_tokens_that_were_kept() -> None:
    one = case("top_k_renorm", rows=1, vocabulary=40, top_k=10)
    probs = OPERATORS["top_k_renorm"].materialize(one).inputs["probs"]
    semantics = module("_semantics").Semantics()
    kept = probs >= probs.sort(-1, descending=True).values[:, 9:10]
    right = torch.where(kept, probs, 0.0) / torch.where(kept, probs, 0.0).sum()
    for factor, kinds in ((1.0, []), (1 + 1e-4, ["Mismatch"])):
        found = certified("top_k_renorm", one, semantics, {"renorm_probs": right * factor})
        assert [rejection.kind for rejection in found] == kinds
    for wrong, kind in ((right * torch.nan, "NonFinite"), (-right, "Mismatch"), (right * 0, "WrongSupport")):
        assert certified("top_k_renorm", one, semantics, {"renorm_probs": wrong})[0].kind == kind


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_token_that_underflows_in_a_narrow_format_is_not_missed(dtype: str) -> None:
    one = case("top_k_renorm", "peaked", rows=1, vocabulary=40, top_k=40, dtype=dtype)
    probs = OPERATORS["top_k_renorm"].materialize(one).inputs["probs"]
    out = (probs.double() / probs.double().sum()).to(probs.dtype)
    semantics = module("torch_sort").semantics(one, CPU)
    assert certified("top_k_renorm", one, semantics, {"renorm_probs": out}) == []


def test_mask_must_leave_every_bit_of_a_logit() -> None:
    one = case("top_k_mask_logits", rows=1, vocabulary=8, top_k=3)
    logits = OPERATORS["top_k_mask_logits"].materialize(one).inputs["logits"]
    kept = logits >= logits.sort(-1, descending=True).values[:, 2:3]
    semantics = module("_semantics").Semantics()
    right = logits.where(kept, -torch.inf)
    assert certified("top_k_mask_logits", one, semantics, {"masked_logits": right}) == []
    moved = torch.nextafter(right, torch.full_like(right, torch.inf)).where(kept, right)
    assert certified("top_k_mask_logits", one, semantics, {"masked_logits": moved})
    nan = right.where(kept, torch.nan)
    assert certified("top_k_mask_logits", one, semantics, {"masked_logits": nan})[0].kind == "NonFinite"
