"""Metamorphic relations: each is true of the reference, says something, and is judged as its kernel declares."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import case, draws, paged, reference, tensors
from hypothesis import assume, given
from hypothesis import strategies as st

from kerneltest import discovery
from kerneltest.engine.chase import draw
from kerneltest.model import (
    FP16,
    FP32,
    IEEE_FP32,
    Bounded,
    Call,
    Case,
    Device,
    Inapplicable,
    Kernel,
    Numerics,
    Outcome,
    Pattern,
    Place,
    Size,
    Status,
    Unsupported,
)
from kerneltest.worker.execute import execute
from kerneltest.worker.poison import fill_dead
from kerneltest.worker.relations import differs
from kerneltest.worker.rig import Rig

transformations = importlib.import_module(f"{discovery.PACKAGE}.attention._transformations")
OPERATOR = paged.paged_prefill
NAMES = tuple(relation.name for relation in OPERATOR.relations)
IN_NATS = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FP32, lse_base="e")
IN_BITS = replace(IN_NATS, lse_base="2")
CPU = Device(kind="cpu", ordinal=0, name="cpu", sm=(0, 0), units=1)
drawn = paged.cases(Size(batch=3, qo_len=20, kv_len=150, heads=8))
# Several of everything: requests, heads, groups, pages, and keys before the first query's own.
RICH = case((3, 9), (2, 6), kv_heads=2, group=2, shuffled=True, spare_pages=1, dtype="float32")


def exact(of: Case[Any], inputs: Mapping[str, torch.Tensor], numerics: Numerics) -> dict[str, Bounded]:
    """The reference's answer, as a kernel without any error would give it."""
    terms = reference.terms_of(of.axes, inputs)
    lse = terms.lse if numerics.lse_base == "e" else terms.lse / math.log(2.0)
    return {name: Bounded(value=v, error=torch.zeros_like(v)) for name, v in (("out", terms.out), ("lse", lse))}


def widened(answer: Mapping[str, Bounded], by: float) -> dict[str, Bounded]:
    return {
        name: replace(given, error=given.error + by * given.value.abs().nan_to_num(posinf=0.0).clamp(min=1.0))
        for name, given in answer.items()
    }


@draws(400)
@given(of=drawn, name=st.sampled_from(NAMES), numerics=st.sampled_from([IN_NATS, IN_BITS]))
def test_a_relation_is_true_of_the_reference(of: Case[Any], name: str, numerics: Numerics) -> None:
    assume(OPERATOR.relation(name).applies(of))
    assert_true_of_the_reference(of, name, numerics)


def assert_true_of_the_reference(of: Case[Any], name: str, numerics: Numerics) -> None:
    relation, materials = OPERATOR.relation(name), paged.materialize(of)
    original = widened(exact(of, materials.inputs, numerics), 1e-12)
    try:
        found = relation.transform(of, materials)
    except Inapplicable:
        return
    assert found
    for related in found:
        answers = [exact(v.case, v.materials.inputs, numerics) for v in related.variants]
        mapped = related.back(answers, numerics)
        assert mapped.keys() == {"out", "lse"}
        for output, expected in mapped.items():
            assert not bool(differs(original[output], expected).any()), output
            # Some of it is known, and what is known is known exactly.
            assert bool((expected.error < 1e-30).any())


@draws(150)
@given(of=drawn, name=st.sampled_from(NAMES))
def test_what_is_dead_in_a_variant_is_not_seen_and_everything_else_is(of: Case[Any], name: str) -> None:
    relation = OPERATOR.relation(name)
    assume(relation.applies(of))
    try:
        transformed = relation.transform(of, paged.materialize(of))
    except Inapplicable:
        return
    for variant in (v for related in transformed for v in related.variants):
        axes, inputs = variant.case.axes, {k: v.clone() for k, v in variant.materials.inputs.items()}
        clean = exact(variant.case, inputs, IN_NATS)
        fill_dead(inputs, variant.materials.dead, dict.fromkeys(Place, Pattern.NAN))
        for output, found in exact(variant.case, inputs, IN_NATS).items():
            assert torch.equal(found.value, clean[output].value)
            if output != "lse" or axes.return_lse:
                assert tuple(found.value.shape) == variant.materials.outputs[output].shape
        live = tensors.by_slot(axes, inputs["v_pages"].float()).isfinite().all(-1).all(-1)
        seen = torch.zeros_like(live)
        for part in transformations.parts(variant.case, inputs):
            slots = torch.arange(len(part.pages) * axes.page_size).view(-1, axes.page_size)
            seen[part.pages.long()] |= slots < part.keys
        assert torch.equal(live, seen)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "repeat"])
def test_a_variant_is_another_call(name: str) -> None:
    materials = paged.materialize(RICH)
    for related in OPERATOR.relation(name).transform(RICH, materials):
        for variant in related.variants:
            found = variant.materials.inputs
            same = [name for name, value in materials.inputs.items() if torch.equal(value, found[name])]
            assert len(same) < len(found)
            assert variant.case.relation == ""


def test_repeating_is_the_same_call() -> None:
    materials = paged.materialize(RICH)
    found = OPERATOR.relation("repeat").transform(RICH, materials)
    assert len(found) == 3
    assert all(v.case is RICH and v.materials is materials for related in found for v in related.variants)


@pytest.mark.parametrize("causal", [False, True])
def test_every_row_is_compared_but_those_that_were_left_out(causal: bool) -> None:
    of = replace(RICH, axes=replace(RICH.axes, causal=causal))
    for name in NAMES:
        if not OPERATOR.relation(name).applies(of):
            continue
        known = torch.zeros(5, dtype=torch.bool)
        for related in OPERATOR.relation(name).transform(of, paged.materialize(of)):
            answers = [exact(v.case, v.materials.inputs, IN_NATS) for v in related.variants]
            known |= related.back(answers, IN_NATS)["out"].error.isfinite().all(-1).all(-1)
        # Every row of both requests is among the first, the last and one more.
        assert bool(known.all()), name


def test_which_relations_apply() -> None:
    def those(of: Case[Any]) -> set[str]:
        return {relation.name for relation in OPERATOR.relations if relation.applies(of)}

    always = {"value_sign", "value_scale", "score_scale", "repeat", "as_mask"}
    assert those(case((1, 0), (0, 3))) == set()
    assert those(case((1, 1))) == {*always, "duplicate_keys"}
    assert those(case((1, 1), causal=True)) == always
    assert those(case((1, 5))) == {*always, "duplicate_keys", "key_permutation", "split", "page_permutation"}
    assert those(case((2, 5), causal=True)) == {*always, "decode", "page_permutation"}
    assert those(case((2, 6), causal=True)) == {*always, "decode", "page_permutation", "split"}
    assert those(RICH) == set(NAMES)
    # What needs keys that all queries see, or keys without an order, says nothing of windows and some masks.
    several = set(NAMES)
    ordered = {"key_permutation", "duplicate_keys"}

    def with_options(**options: Any) -> set[str]:
        return those(replace(RICH, axes=replace(RICH.axes, **options)))

    assert with_options(softcap=2.0, layout="HND", strided_q=True, k_scale=0.5, v_scale=3.0) == several
    assert with_options(causal=True) == several - ordered
    assert with_options(window_left=2) == several - ordered - {"split", "decode"}
    assert with_options(window_left=2, causal=True) == several - ordered - {"split"}
    counted = {"head_permutation", "split", "decode", *ordered}
    assert with_options(alibi=True) == with_options(alibi=True, softcap=2.0) == several - counted
    assert with_options(alibi=True, causal=True) == several - counted
    assert with_options(mask="random") == several - {"split", "as_mask"}
    assert with_options(mask="tree", window_left=2) == several - ordered - {"split", "decode", "as_mask"}


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_left": 2},
    "causal window": {"window_left": 2, "causal": True},
    "soft-cap": {"softcap": 2.0},
    "ALiBi": {"alibi": True},
    "ALiBi and soft-cap": {"alibi": True, "softcap": 2.0, "causal": True},
    "mask": {"mask": "random", "packed_mask": True},
    "tree and window": {"mask": "tree", "window_left": 2},
    "eight bits": {"kv_dtype": "float8_e4m3fn", "k_scale": 0.375, "v_scale": 1.6875},
    "memory": {"layout": "HND", "strided_q": True},
    "another head dimension": {"head_dim_vo": 48},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_relation_is_true_of_the_reference_with_options(options: str, name: str) -> None:
    of = replace(RICH, axes=replace(RICH.axes, **OPTIONS[options]), seed=3)
    if not OPERATOR.relation(name).applies(of):
        return
    assert_true_of_the_reference(of, name, IN_NATS)


@draws(100)
@given(st.data())
def test_merging_stays_within_its_errors(data: st.DataObject) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.sampled_from([1e-6, 1e-2, 1.0]))

    def noisy(exactly: torch.Tensor) -> tuple[Bounded, torch.Tensor]:
        error = torch.rand(exactly.shape, generator=random, dtype=torch.float64) * size
        sign = torch.randint(-1, 2, exactly.shape, generator=random)
        return Bounded(value=exactly + sign * error, error=error), exactly

    truth, seen = [], []
    for _ in range(2):
        out, true_out = noisy(torch.randn(40, 2, 3, generator=random, dtype=torch.float64))
        lse, true_lse = noisy(2 * torch.randn(40, 2, generator=random, dtype=torch.float64))
        seen.append({"out": out, "lse": lse})
        exactly = {"out": true_out, "lse": true_lse}
        truth.append({n: Bounded(value=v, error=torch.zeros_like(v)) for n, v in exactly.items()})
    merged, right = (transformations.merge(*answers, 1.0) for answers in (seen, truth))
    for name in ("out", "lse"):
        assert float(right[name].error.max()) == 0
        off = (merged[name].value - right[name].value).abs()
        assert bool((off <= merged[name].error * (1 + 1e-12) + 1e-15).all())


def test_merging_with_a_part_that_saw_nothing() -> None:
    nothing = {"out": torch.zeros(1, 1, 2), "lse": torch.full((1, 1), -torch.inf)}
    something = {"out": torch.ones(1, 1, 2), "lse": torch.full((1, 1), 3.0)}
    parts = [
        {n: Bounded(value=v.double(), error=torch.zeros_like(v).double()) for n, v in part.items()}
        for part in (nothing, something)
    ]
    both = transformations.merge(*parts, 1.0)
    assert (both["out"].value.tolist(), both["lse"].value.tolist()) == ([[[1.0, 1.0]]], [[3.0]])
    none = transformations.merge(parts[0], parts[0], 1.0)
    assert (none["out"].value.tolist(), none["lse"].value.tolist()) == ([[[0.0, 0.0]]], [[-math.inf]])
    assert float(none["out"].error.max()) == 0


def test_values_too_large_to_be_scaled_are_refused() -> None:
    of = case((1, 2), dtype="float16")
    materials = paged.materialize(of)
    for name, tensor in (("value_scale", "v_pages"), ("score_scale", "q")):
        huge = {**materials.inputs, tensor: torch.full_like(materials.inputs[tensor], FP16.max / 4)}
        with pytest.raises(Inapplicable, match="too large"):
            OPERATOR.relation(name).transform(of, replace(materials, inputs=huge))


def test_scaling_forgives_what_subnormal_numbers_lose_and_no_more() -> None:
    of = case((1, 2), dtype="float16")
    (related,) = OPERATOR.relation("value_scale").transform(of, paged.materialize(of))
    value = torch.tensor([4 * 2.0**-14, 4 * 2.0**-14 * (1 + 2.0**-10), 4.0], dtype=torch.float64)
    back = related.back([{"out": Bounded(value=value, error=torch.zeros(3, dtype=torch.float64))}], IN_NATS)["out"]
    assert back.value.tolist() == [2.0**-14, 2.0**-14 * (1 + 2.0**-10), 1.0]
    assert back.error[0] == pytest.approx(2.0**-24)
    assert float(back.error[1:].max()) < 2.0**-120


@pytest.mark.parametrize(
    ("a", "b", "error", "different"),
    [
        (1.0, 1.0, 0.0, False),
        (1.0, 1.0 + 2**-50, 0.0, True),
        (1.0, 1.5, 0.25, False),
        (1.0, 1.5 + 2**-40, 0.25, True),
        (0.0, -0.0, 0.0, False),
        (math.nan, math.nan, 0.0, False),
        (math.nan, 1.0, math.inf, True),
        (math.inf, math.inf, 0.0, False),
        (math.inf, -math.inf, 1.0, True),
        (-math.inf, 1.0, 1.0, True),
        (-math.inf, 0.0, math.inf, False),
    ],
)
def test_when_two_answers_differ(a: float, b: float, error: float, different: bool) -> None:
    one, other = (
        Bounded(value=torch.tensor([x], dtype=torch.float64), error=torch.tensor([error], dtype=torch.float64))
        for x in (a, b)
    )
    assert bool(differs(one, other)) is different
    assert bool(differs(other, one)) is different


def attend(call: Call) -> dict[str, torch.Tensor]:
    """A right answer for every case, from the reference itself."""
    answer = exact(call.case, call.inputs, IN_NATS)
    for name, buffer in call.outputs.items():
        buffer.copy_(answer[name].value)
    return dict(call.outputs)


def numerics(of: Case[Any], device: Device) -> Numerics:
    return replace(IN_NATS, batch_invariant=True)


def kernel(launch: Callable[[Call], Any] = attend, **more: Any) -> Kernel:
    return Kernel(**{"name": "k", "operator": OPERATOR, "launch": launch, "numerics": numerics} | more)


def run(of: Kernel, relation: str, on: Case[Any] = RICH) -> Outcome:
    return execute(of, replace(on, relation=relation), Rig(CPU))


@pytest.mark.parametrize("name", NAMES)
def test_a_right_kernel_passes_and_the_relation_was_launched(name: str) -> None:
    outcome = run(kernel(), name)
    assert (outcome.status, outcome.finding, outcome.unchecked_relation) == (Status.PASSED, None, None)
    assert outcome.launches == 2 + {"batch_size": 2, "repeat": 3, "split": 2}.get(name, 1)


def off_by_an_ulp(call: Call) -> dict[str, torch.Tensor]:
    """The answer to any case but the original is off by one unit in the last place, within every budget."""
    attend(call)
    if call.case.relation == "":
        for buffer in call.outputs.values():
            buffer.copy_(buffer.nextafter(torch.tensor(torch.inf)))
    return dict(call.outputs)


EXACT = tuple(relation.name for relation in OPERATOR.relations if relation.promise)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "repeat"])
def test_one_bit_breaks_what_is_promised_to_be_exact(name: str) -> None:
    outcome = run(kernel(off_by_an_ulp), name)
    assert outcome.finding is not None
    assert (outcome.finding.kind, outcome.finding.key) == ("RelationBroken", name)
    assert outcome.finding.identity == ("RelationBroken", "k", name)
    assert "they may differ by" in outcome.finding.details[0]
    assert outcome.finding.details[0].startswith("first at request 0, token 0, head 0")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "repeat"])
def test_one_bit_breaks_nothing_else(name: str) -> None:
    assert run(kernel(off_by_an_ulp, deterministic=False), name).status is Status.PASSED
    assert run(kernel(off_by_an_ulp, inexact={name: "said so"}), name).status is Status.PASSED
    if name in ("batch_order", "batch_size"):
        assert run(kernel(off_by_an_ulp, numerics=lambda of, device: IN_NATS), name).status is Status.PASSED


def wrong_elsewhere(call: Call) -> dict[str, torch.Tensor]:
    """The answer to any case but the original is wrong by far more than its budget."""
    attend(call)
    if call.case.relation == "":
        call.outputs["out"].mul_(1.5)
    return dict(call.outputs)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "repeat"])
def test_no_declaration_excuses_more_than_the_budgets(name: str) -> None:
    outcome = run(kernel(wrong_elsewhere, deterministic=False), name)
    assert outcome.finding is not None
    assert (outcome.finding.kind, outcome.finding.key) == ("RelationBroken", name)


def nan_elsewhere(call: Call) -> dict[str, torch.Tensor]:
    attend(call)
    if call.case.relation == "":
        call.outputs["out"][0] = torch.nan
    return dict(call.outputs)


@pytest.mark.parametrize("name", ["page_permutation", "split", "decode"])
def test_nan_in_one_answer_alone_breaks_every_relation(name: str) -> None:
    outcome = run(kernel(nan_elsewhere, deterministic=False), name)
    assert outcome.finding is not None
    assert outcome.finding.kind == "RelationBroken"


def test_a_stand_in_for_no_key_is_minus_infinity() -> None:
    def stands_in(call: Call) -> dict[str, torch.Tensor]:
        attend(call)
        lse = call.outputs["lse"]
        lse.copy_(torch.where(lse == -torch.inf, -5e4 - call.case.axes.total_qo, lse))
        return dict(call.outputs)

    of = kernel(stands_in, numerics=lambda of, device: replace(IN_NATS, lse_no_key=-4.9e4))
    assert run(of, "batch_size", case((2, 5), (3, 0), dtype="float32")).status is Status.PASSED


def test_a_relation_that_needs_an_output_is_counted_where_there_is_none() -> None:
    only_out = kernel(lambda call: {"out": attend(call)["out"]}, returns=("out",))
    outcome = run(only_out, "split")
    assert outcome.status is Status.PASSED
    assert outcome.unchecked_relation == "it needs lse, which the kernel does not return"
    assert run(only_out, "duplicate_keys").unchecked_relation is None


def test_a_relation_that_has_nothing_to_compare_is_counted() -> None:
    no_budget = replace(OPERATOR, budget=lambda *_: {}, certified=("out", "lse"), certify=lambda *_: ())
    reason = "the kernel does not promise equal bits of it, and no budget judges what it returns"
    assert run(kernel(operator=no_budget, deterministic=False), "value_sign").unchecked_relation == reason
    assert run(kernel(operator=no_budget), "value_sign").unchecked_relation is None


def test_a_variant_that_the_kernel_refuses_is_counted() -> None:
    def refuses(of: Case[Any], device: Device) -> str | None:
        return "one request at a time is too few" if len(of.axes.requests) < 2 else None

    outcome = run(kernel(unsupported=refuses), "batch_size")
    assert outcome.status is Status.PASSED
    reason = "the kernel does not support the transformed case: one request at a time is too few"
    assert outcome.unchecked_relation == reason

    def refuses_late(call: Call) -> dict[str, torch.Tensor]:
        if len(call.case.axes.requests) < 2:
            raise Unsupported("too few")
        return attend(call)

    assert run(kernel(refuses_late), "batch_size").unchecked_relation == "too few"


def test_a_relation_that_says_nothing_of_the_case_is_counted() -> None:
    assert run(kernel(), "batch_size", case((1, 1))).unchecked_relation == "it says nothing of this case"


def test_what_a_variant_does_wrong_by_itself_has_its_own_name() -> None:
    def form(call: Call) -> dict[str, torch.Tensor]:
        attend(call)
        if call.case.relation == "":
            return {"out": call.outputs["out"].double(), "lse": call.outputs["lse"]}
        return dict(call.outputs)

    def raises(call: Call) -> dict[str, torch.Tensor]:
        if call.case.relation == "":
            raise RuntimeError("no")
        return attend(call)

    kinds = [run(kernel(launch), "value_sign").finding for launch in (form, raises)]
    assert [finding.kind for finding in kinds if finding] == ["WrongOutput", "LaunchRaised"]


def test_a_relation_is_not_asked_about_an_answer_that_is_wrong_already() -> None:
    def wrong(call: Call) -> dict[str, torch.Tensor]:
        attend(call)
        call.outputs["lse"].add_(1)
        return dict(call.outputs)

    outcome = run(kernel(wrong), "value_sign")
    assert outcome.finding is not None
    assert (outcome.finding.kind, outcome.launches) == ("Mismatch", 2)


def test_an_unknown_relation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no relation 'mirror'; valid: page_permutation, value_sign"):
        OPERATOR.relation("mirror")
    with pytest.raises(ValueError, match="no relation 'mirror'"):
        kernel(inexact={"mirror": "typed wrongly"})


def test_every_relation_is_drawn_only_where_it_applies_and_dropped_by_a_simpler_step() -> None:
    seen = set()

    def check(of: Case[Any]) -> None:
        seen.add(of.relation)
        if of.relation:
            assert OPERATOR.relation(of.relation).applies(of)
            assert next(iter(paged.simpler(of))) == replace(of, relation="")

    draw(drawn, check, 400, 1)
    assert seen == {"", *NAMES}


def test_what_released_kernels_declare() -> None:
    names = {
        module: importlib.import_module(f"{discovery.PACKAGE}.attention.{module}")
        for module in ("flashinfer", "torch_sdpa", "triton_paged")
    }
    fa2, fa3 = names["flashinfer"].fa2, names["flashinfer"].fa3
    assert set(fa2.inexact) == {"value_scale"}
    assert set(fa3.inexact) == set()
    h100 = dataclasses.replace(CPU, kind="cuda", sm=(9, 0))
    triton, sdpa = names["triton_paged"].triton_prefill, names["torch_sdpa"].sdpa
    assert (set(sdpa.inexact), set(triton.inexact)) == ({"head_permutation"}, set())
    assert [triton.numerics(RICH, device).batch_invariant for device in (CPU, h100)] == [False, True]
    assert [sdpa.numerics(RICH, device).batch_invariant for device in (CPU, h100)] == [True, True]
    assert not fa3.numerics(replace(RICH, axes=replace(RICH.axes, dtype="float16")), h100).batch_invariant
