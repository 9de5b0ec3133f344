"""Appending to pages: what the caches must be afterwards, and which words are found for what they must not be."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from attention_cases import draws
from hypothesis import given

from kerneltest import discovery
from kerneltest.model import Case, Size, encode

PACKAGE = f"{discovery.PACKAGE}.attention"
append = importlib.import_module(f"{PACKAGE}.page_append")
axes_of = importlib.import_module(f"{PACKAGE}._page_append_axes")
worker = importlib.import_module(f"{PACKAGE}._page_append")
OPERATORS = {op.name: op for op in (append.page_append, append.mla_page_append)}
SIZE = Size(batch=3, qo_len=9, kv_len=40, heads=8)


def case(*requests: tuple[int, int], inputs: str = "normal", **axes: Any) -> Case[Any]:
    given_ = {"dtype": "bfloat16", "page_size": 4, "shuffled": True, "spare_pages": 1, "kv_heads": 2, "head_dim": 64}
    made = axes_of.PageAppend(
        requests=tuple(axes_of.Append(before=before, new=new) for before, new in requests), **given_ | axes
    )
    return Case(operator="page_append", axes=made, inputs=inputs, seed=0)


def rejected(case_: Case[Any], outputs: dict[str, torch.Tensor]) -> list[Any]:
    operator = OPERATORS[case_.operator]
    terms = operator.reference(case_, operator.materialize(case_).inputs, "cpu")
    return list(operator.certify(case_, terms, append.Exact(), outputs))


def right(case_: Case[Any]) -> dict[str, torch.Tensor]:
    operator = OPERATORS[case_.operator]
    terms = operator.reference(case_, operator.materialize(case_).inputs, "cpu")
    return {name: terms[name].clone() for name in operator.certified}


@pytest.mark.parametrize("name", OPERATORS)
def test_reference_is_what_plain_loops_give(name: str) -> None:
    operator = OPERATORS[name]

    @draws(40)
    @given(operator.cases(SIZE))
    def prop(case: Case[Any]) -> None:
        made = operator.materialize(case)
        x, axes = made.inputs, case.axes
        terms = operator.reference(case, x, "cpu")
        for stream in axes_of.streams(case):
            cache, token = x[f"{stream}_pages"].clone(), 0
            for number, request in enumerate(axes.requests):
                pages = x["kv_indices"][int(x["kv_indptr"][number]) : int(x["kv_indptr"][number + 1])].tolist()
                # The table has room for all tokens, and the last page is as full as is said.
                total = request.before + request.new
                last = int(x["kv_last_page_len"][number])
                assert (len(pages) - 1) * axes.page_size + last == total if total else last == 0 and not pages
                slots = [(page, slot) for page in pages for slot in range(axes.page_size)]
                for page, slot in slots[request.before : request.before + request.new]:
                    value = x[f"append_{stream}"][token]
                    if axes.layout == "HND":
                        cache[page, :, slot] = value
                    else:
                        cache[page, slot] = value
                    token += 1
            bits = worker.BITS[cache.element_size()]
            assert torch.equal(cache.view(bits), terms[f"{stream}_cache"].view(bits))
        assert operator.certified == tuple(made.outputs)
        assert Case.from_json(encode(case), operator.axes) == case
        assert rejected(case, {n: terms[n] for n in operator.certified}) == []
        for one in operator.simpler(case):
            operator.materialize(one)

    prop()


def test_a_token_in_the_wrong_place_is_named() -> None:
    one = case((1, 2), (0, 1))
    outputs = right(one)
    inputs = append.page_append.materialize(one).inputs
    page = int(inputs["kv_indices"][0])
    outputs["v_cache"][page, 1] = inputs["v_pages"][page, 1]
    (found,) = rejected(one, outputs)
    assert (found.kind, found.output) == ("Mismatch", "v_cache")
    assert found.what == "1 of 3 new tokens did not arrive as they are"
    assert found.details == (
        f"first at page {page}, slot 1, head 0, dim 0",
        f"new token 0 of request 0 belongs to page {page}, slot 1",
    )


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_slot_that_nobody_appends_to_is_named(layout: str) -> None:
    one = case((1, 2), layout=layout)
    outputs = right(one)
    page = int(append.page_append.materialize(one).inputs["kv_indices"][0])
    if layout == "HND":
        outputs["k_cache"][page, 1, 3, 5] += 1
    else:
        outputs["k_cache"][page, 3, 1, 5] += 1
    (found,) = rejected(one, outputs)
    assert found.what == "1 of 6 slots were changed to which nothing is appended"
    assert found.details == (
        f"first at page {page}, slot 3, head 1, dim 5",
        f"nothing is appended to page {page}, slot 3",
    )


def test_the_sign_of_zero_and_the_payload_of_nan_count() -> None:
    one = case((0, 4), inputs="bits", spare_pages=0)
    outputs = right(one)
    assert bool(outputs["k_cache"].isnan().any())
    assert rejected(one, outputs) == []
    bits = outputs["k_cache"].view(torch.int16)
    bits[outputs["k_cache"].isnan().nonzero()[0].tolist()[0]] ^= 1
    assert len(rejected(one, outputs)) == 1
    zero = case((0, 1))
    outputs = right(zero)
    outputs["k_cache"].view(torch.int16)[:] ^= torch.tensor(-(2**15), dtype=torch.int16)
    assert len(rejected(zero, outputs)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": (axes_of.Append(before=3, new=0),)}, "some request must get a token"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float8_e4m3fn, got 'int8'"),
        ({"layout": "DHN"}, "layout must be NHD or HND, got 'DHN'"),
        ({"page_size": 0}, "must be at least 1"),
    ],
)
def test_axes_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        replace(case((0, 1)).axes, **change)
