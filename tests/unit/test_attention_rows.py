"""The passes over rows of scores, run by Triton's interpreter, against the same step by step.

The interpreter is chosen when Triton is imported, so it runs in a process of its own: this file, as a program.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kerneltest.oracle import attention_terms as terms
from kerneltest.oracle.attention_terms import (
    BIASED,
    TENSORS,
    Attended,
    attention_terms,
    row_spread_step_by_step,
    row_terms_step_by_step,
    weight_spread,
)

Values = dict[str, torch.Tensor]
# Fewer keys at a time than in earnest: most rows take several turns, and the last one is not full.
KEYS = 16


def rows(
    keys: int,
    *,
    batch: int = 1,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 3,
    scale: float = 1.0,
    shift: float = 0.0,
    seed: int = 0,
) -> Values:
    """Scores of mean ``shift`` and deviation ``scale``, and all that goes with them; every key is seen."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, kv_heads, group * queries, keys

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    s = scale * normal(*shape) + shift
    return {
        "s": s,
        "dot": s.abs() + normal(*shape).abs(),
        "along": normal(*shape),
        "centre": normal(*shape[:-1]),
        "seen": torch.ones(batch, queries, keys, dtype=torch.bool),
    }


def causal(sample: Values, *, longest: int) -> Values:
    """The last query sees ``longest`` keys, each one before it one less."""
    queries, keys = sample["seen"].shape[1:]
    last = longest - queries + torch.arange(queries)
    return sample | {"seen": sample["seen"] & (torch.arange(keys) <= last[:, None])}


def padded(sample: Values, lengths: list[int]) -> Values:
    """Requests of a batch have fewer keys than its width."""
    live = torch.arange(sample["s"].shape[-1]) < torch.tensor(lengths)[:, None]
    return sample | {"seen": sample["seen"] & live[:, None]}


@cache
def samples() -> dict[str, Values]:
    """Built the same way in both processes."""
    found = {f"{keys} keys": rows(keys, seed=keys) for keys in (1, 2, 15, 16, 17, 48, 83)}
    found["causal"] = causal(rows(40, queries=7), longest=40)
    found["causal, rows without keys"] = causal(rows(19, queries=7), longest=3)
    found["padded"] = padded(rows(33, batch=3, queries=2), [33, 1, 18])
    found["padded, a request without keys"] = padded(rows(33, batch=3), [0, 33, 5])
    found["causal and padded"] = padded(causal(rows(33, batch=3, queries=5), longest=31), [33, 4, 18])
    wide = rows(33, batch=3)
    found["one mask for the batch"] = causal(wide, longest=20) | {"seen": causal(wide, longest=20)["seen"][:1]}
    found["a part of a wider mask"] = wide | {
        "seen": (torch.randn(3, 3, 70, generator=torch.Generator().manual_seed(1)) > 0)[..., 1:67:2]
    }
    found["one query a head"] = rows(40, queries=1, group=1, kv_heads=1)
    for scale in (30.0, 500.0):
        found[f"scores of {scale:.0f}"] = causal(rows(50, scale=scale), longest=45)
    # The masked key has the largest score by far: exp of it is infinite, and nobody may notice.
    hidden = causal(rows(20), longest=19)
    hidden["s"][..., -1] = 2000.0
    found["a masked giant"] = hidden
    found["all scores are equal"] = rows(33, scale=0.0, shift=700.0)
    found["all scores are negative"] = rows(33, shift=-900.0)
    found["20,000 keys"] = rows(20_000, kv_heads=1, group=1, queries=2)
    return found


def step_by_step(sample: Values) -> Values:
    """What must come out, by name: the fields, the arrays p, p A and p², and the spread."""
    s, dot = sample["s"].clone(), sample["dot"].clone()
    square, fields = row_terms_step_by_step(s, dot, sample["seen"])
    spread = row_spread_step_by_step(sample["s"].clone(), sample["along"].clone(), sample["centre"], sample["seen"])
    return fields | {"p": s, "p A": dot, "p²": square, "spread": spread}


def in_one_pass(sample: Values, module: Any) -> Values:
    s, dot = sample["s"].clone(), sample["dot"].clone()
    square, fields = module.row_terms(s, dot, sample["seen"])
    spread = module.row_spread(sample["s"], sample["along"], sample["centre"], sample["seen"])
    return fields | {"p": s, "p A": dot, "p²": square, "spread": spread}


def different(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of what differs by more than the order of a sum explains; nothing but -Inf and finite numbers is the same.

    The log-sum-exp is a sum with the peak, and as exact as the larger of the two.
    """
    assert got.keys() == expected.keys()
    found = []
    for name, value in expected.items():
        floor = 1e-12 if name == "lse" else 0.0
        same = got[name].shape == value.shape and got[name].dtype == value.dtype == torch.float64
        if not (same and torch.allclose(got[name], value, rtol=1e-13, atol=floor)):
            found.append(name)
    return found


@cache
def problems() -> dict[str, Attended]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 5), (2, 37), (2, 37)))
    seen = causal(rows(37, batch=2, queries=5), longest=35)["seen"]
    plain = Attended(q=q, k=k, v=v, seen=seen, scale=0.4)
    bias = 5 * torch.randn(2, 4, 5, 37, generator=generator, dtype=torch.float64)
    return {
        "plain": plain,
        "softcap": Attended(q=q, k=k, v=v, seen=seen[:1], scale=4.0, softcap=3.0),
        "bias": replace(plain, bias=bias),
        "bias and softcap": replace(plain, bias=bias, softcap=3.0),
        "v narrower than k": Attended(q=q, k=k, v=v[..., :5], seen=seen, scale=-0.4),
    }


def all_of(x: Attended) -> Values:
    found = attention_terms(x)
    filters = found.out.square() - 0.5
    spreads = {f"spread {c}": weight_spread(x, found.out, filters, centred=c) for c in (False, True)}
    names = TENSORS if x.bias is None else (*TENSORS, *BIASED)
    return {name: getattr(found, name) for name in names} | spreads


def interpreted(file: Path, *bugs: Path) -> dict[str, dict[str, Values]]:
    """By the name of the file of Triton's code, "" for ours, and by that of the sample or problem."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__, str(file), *map(str, bugs)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Values]] = pickle.loads(file.read_bytes())
    return found


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Values]:
    return interpreted(tmp_path_factory.mktemp("rows") / "values")[""]


@pytest.mark.parametrize("name", samples())
def test_one_pass_says_the_same(name: str, one_pass: dict[str, Values]) -> None:
    assert different(one_pass[name], step_by_step(samples()[name])) == []


@pytest.mark.parametrize("name", problems())
def test_the_reference_is_the_same_with_it(name: str, one_pass: dict[str, Values]) -> None:
    for term, value in all_of(problems()[name]).items():
        torch.testing.assert_close(one_pass[name][term], value, rtol=1e-12, atol=1e-14, msg=term)


def test_the_samples_are_worth_comparing() -> None:
    seen = {name: step_by_step(sample) for name, sample in samples().items()}
    assert (seen["causal, rows without keys"]["keys"] == 0).any()
    assert (seen["causal, rows without keys"]["lse"].isinf() == (seen["causal, rows without keys"]["keys"] == 0)).all()
    assert (seen["padded, a request without keys"]["keys"][0] == 0).all()
    assert (seen["scores of 500"]["p"] == 0).any()
    assert seen["a masked giant"]["score_max"].min() == 2000
    for values in seen.values():
        assert not any(value.isnan().any() for value in values.values())


# What is right, what a bug makes of it, the sample that sees it, and where it shows.
PLANTED = {
    "peak": ("tl.where(seen != 0, s, float(", "tl.where(seen == seen, s, float(", "a masked giant", "p"),
    "mask": ("tl.where(seen != 0, tl.exp(s - peak), 0.0)", "tl.exp(s - peak)", "padded", "p"),
    "count": ("count += seen", "count += (at < keys).to(tl.int32)", "causal", "keys"),
    "no_key": ("peak + tl.log(total), float(", "peak + tl.log(total), -float(", "causal, rows without keys", "lse"),
    "dot_max": ("tl.where(alive, tl.max(largest), 0.0)", "tl.max(largest)", "causal, rows without keys", "dot_max"),
    "largest": ("tl.maximum(largest, tl.abs(s))", "tl.maximum(largest, s)", "all scores are negative", "score_max"),
    "heads": ("(row // rows_of_batch)", "(row // rows)", "padded", "keys"),
    "queries": ("(row % rows) * row_stride", "(row // rows) * row_stride", "causal", "keys"),
    "mask_stride": (
        "seen_ptr + at * key_stride, mask=inside",
        "seen_ptr + at, mask=inside",
        "a part of a wider mask",
        "p",
    ),
    "alive": ("tl.where(alive, 1 / total, 0.0)", "1 / total", "causal, rows without keys", "share"),
    "tail": ("range(0, keys, KEYS)", "range(0, keys - KEYS + 1, KEYS)", "17 keys", "p"),
    "powers": ("fourths += square * square", "fourths += square * p", "causal", "fourth_row"),
    "order": (
        "square = p * p\n        weighted = dot * p",
        "square = p * p\n        weighted = dot",
        "causal",
        "dot_row",
    ),
    "centre": ("p * (along - centre)", "p * along - centre", "causal", "spread"),
    "float32": ("tl.exp(s - peak)", "tl.exp((s - peak).to(tl.float32)).to(tl.float64)", "scores of 30", "p"),
}


@pytest.fixture(scope="module")
def with_bugs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Values]]:
    folder = tmp_path_factory.mktemp("bugs")
    source = (Path(terms.__file__).parent / "attention_rows.py").read_text()
    for name, (right, wrong, _, _) in PLANTED.items():
        assert right in source, right
        (folder / f"{name}.py").write_text(source.replace(right, wrong))
    return interpreted(folder / "values", *(folder / f"{name}.py" for name in PLANTED))


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(bug: str, with_bugs: dict[str, dict[str, Values]]) -> None:
    _, _, name, where = PLANTED[bug]
    assert where in different(with_bugs[bug][name], step_by_step(samples()[name]))


def test_without_a_gpu_it_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kerneltest.oracle.attention_rows", None)
    assert attention_terms(problems()["plain"]).out.isfinite().all()


def main(file: str, *bugs: str) -> None:
    found: dict[str, dict[str, Values]] = {}
    for path in bugs or ("",):
        name = Path(path).stem
        if path:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module("kerneltest.oracle.attention_rows")
        usual = module.CONSTANTS["KEYS"]
        found[name] = {}
        for sample in [PLANTED[name][2]] if path else samples():
            module.CONSTANTS["KEYS"] = usual if sample == "20,000 keys" else KEYS
            found[name][sample] = in_one_pass(samples()[sample], module)
        module.CONSTANTS["KEYS"] = KEYS
        if not path:
            terms._in_one_pass = lambda s: True
            terms.row_terms_step_by_step = terms.row_spread_step_by_step = None  # type: ignore[assignment]
            found[name] |= {problem: all_of(x) for problem, x in problems().items()}
    Path(file).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
