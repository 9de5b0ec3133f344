"""The float64 reference of attention on the device says what it says on the host, to 1e-12 where A stays below 100.

A score is a sum of products whose sizes add up to A. Its rounding moves it by a few 2^-53 A, and the weight by as much,
relatively: what is computed from scores in the thousands is as exact as they are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kerneltest.oracle import attention_terms as terms  # noqa: E402
from kerneltest.oracle.attention_terms import BIASED, TENSORS, Attended, attention_terms, weight_spread  # noqa: E402

pytestmark = pytest.mark.gpu


def draw(
    rows,
    keys,
    *,
    batch=1,
    masks=None,
    kv_heads=2,
    group=2,
    dim=64,
    v_dim=64,
    scale=None,
    softcap=0.0,
    dtype=torch.bfloat16,
):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, tokens, width, generator=generator).to(dtype)
        for heads, tokens, width in ((kv_heads * group, rows, dim), (kv_heads, keys, dim), (kv_heads, keys, v_dim))
    )
    seen = torch.ones(masks or batch, rows, keys, dtype=torch.bool)
    return Attended(q=q, k=k, v=v, seen=seen, scale=dim**-0.5 if scale is None else scale, softcap=softcap)


def causal(x, longest):
    """The last row sees ``longest`` keys, each one before it one less: some see none where there are more rows."""
    rows, keys = x.seen.shape[1:]
    last = longest - rows + torch.arange(rows)
    return replace(x, seen=x.seen & (torch.arange(keys) <= last[:, None]))


def biased(x):
    """Scores to which a slope of each head times a distance is added, up to 40."""
    _, heads, rows, _ = x.q.shape
    keys = x.k.shape[-2]
    distance = torch.arange(keys) - torch.arange(rows)[:, None]
    slopes = torch.logspace(-3, 0, heads, dtype=torch.float64) * 40 / keys
    return replace(x, bias=(slopes[:, None, None] * distance).expand(len(x.q), -1, -1, -1))


def padded(x, lengths):
    """Slots past a request's length are zero and not seen, as the suites pad a batch."""
    live = torch.arange(x.k.shape[-2]) < torch.tensor(lengths)[:, None]
    dead = ~live[:, None, :, None]
    return replace(x, k=x.k.masked_fill(dead, 0), v=x.v.masked_fill(dead, 0), seen=x.seen & live[:, None])


CASES = {
    "no mask": lambda: draw(130, 200),
    "one key": lambda: draw(7, 1),
    "one row": lambda: draw(1, 777, kv_heads=1, group=8),
    "rows of whole blocks": lambda: draw(64, 1024),
    "causal": lambda: causal(draw(300, 1111), 1111),
    "causal, rows without keys": lambda: causal(draw(64, 48), 30),
    "padded": lambda: padded(draw(5, 600, batch=4), [600, 1, 513, 77]),
    "padded, a request without keys": lambda: padded(draw(5, 600, batch=3), [0, 600, 512]),
    "causal and padded": lambda: padded(causal(draw(40, 600, batch=3), 580), [600, 3, 550]),
    "one mask for the batch": lambda: causal(draw(40, 300, batch=3, masks=1), 290),
    "softcap": lambda: causal(draw(64, 500, scale=3.0, softcap=30.0), 490),
    "softcap, tiny scores": lambda: draw(64, 500, scale=1e-6, softcap=30.0),
    "bias": lambda: biased(causal(draw(130, 700), 690)),
    "bias, padded": lambda: biased(padded(draw(5, 600, batch=3), [0, 600, 512])),
    "bias and softcap": lambda: biased(causal(draw(64, 500, scale=3.0, softcap=30.0), 490)),
    # Scores of several hundred: all the weight on a key or two, all others below the smallest float64.
    "large scores": lambda: causal(draw(64, 500, scale=30.0), 490),
    "large scores, float32": lambda: draw(64, 500, scale=60.0, dtype=torch.float32),
    "20,000 keys": lambda: causal(draw(16, 20_000), 19_999),
    "narrow and wide": lambda: draw(33, 500, dim=192, v_dim=128, dtype=torch.float16),
    "negative scale": lambda: draw(33, 500, scale=-0.2),
}


def on_device(x):
    bias = None if x.bias is None else x.bias.cuda()
    return replace(x, q=x.q.cuda(), k=x.k.cuda(), v=x.v.cuda(), seen=x.seen.cuda(), bias=bias)


def values(x):
    """Terms and spreads by name, on the host; ``cancels``: the size of what cancels in a spread."""
    found = attention_terms(x)
    # The same filters on both sides, whatever the last bits of the output.
    filters = torch.linspace(-1, 2, found.out.numel(), dtype=torch.float64).reshape(found.out.shape).to(x.q.device)
    result = {name: getattr(found, name) for name in (*TENSORS, *(BIASED if x.bias is not None else ()))}
    result |= {f"spread {centred}": weight_spread(x, found.out, filters, centred=centred) for centred in (False, True)}
    weighted = found.square_out.sqrt() + found.out.abs() * found.square_row.sqrt().unsqueeze(-1)
    result["cancels"] = (filters.abs() * weighted).sum(-1)
    return {name: value.cpu() for name, value in result.items()}


def worst(got, expected):
    """The largest difference of all values, in units of 1e-12 of what it is measured by, and the value's name."""
    shares = {"": 0.0}
    condition = (expected["dot_max"] / 100).clamp(min=1)
    for name, value in expected.items():
        assert got[name].dtype == torch.float64
        assert got[name].shape == value.shape
        # Terms are sums of what is not negative; some cancel, and are measured by what cancels in them.
        size = {
            "out": expected["abs_out"],
            "score_max": expected["dot_max"],
            "lse": expected["dot_row"].clamp(min=1),
            "spread False": expected["cancels"],
            "spread True": expected["cancels"],
        }.get(name, value)
        size = size * (condition if value.ndim == condition.ndim else condition.unsqueeze(-1))
        finite = value.isfinite()
        assert torch.equal(got[name][~finite], value[~finite]), name
        off = torch.where(got[name] == value, 0.0, (got[name] - value).abs() / size)[finite]
        shares[name] = float(off.max()) / 1e-12 if off.numel() else 0.0
        assert not off.isnan().any(), name
    return max((share, name) for name, share in shares.items())


def assert_same(got, expected):
    share, name = worst(got, expected)
    assert share <= 1, (name, share)


@pytest.mark.parametrize("name", CASES)
def test_the_device_says_the_same(name, monkeypatch):
    x = CASES[name]()
    expected = values(x)
    # There is no other way on the device than the one pass.
    monkeypatch.setattr(terms, "row_terms_step_by_step", None)
    monkeypatch.setattr(terms, "row_spread_step_by_step", None)
    assert_same(values(on_device(x)), expected)


def test_without_triton_it_goes_step_by_step(monkeypatch):
    x = CASES["causal and padded"]()
    expected = values(x)
    monkeypatch.setattr(terms, "_has_triton", lambda: False)
    assert_same(values(on_device(x)), expected)


def test_no_keys_at_all():
    x = draw(5, 0)
    assert_same(values(on_device(x)), values(x))


def test_the_same_bits_every_time():
    x = on_device(CASES["20,000 keys"]())
    first, second = values(x), values(x)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("digits", [10, 23])
def test_single_precision_would_show(digits):
    # What a product in TF32 or a term in float32 would do.
    x = CASES["no mask"]()
    less_exact = replace(x, k=x.k.double() * (1 + 2.0**-digits))
    with pytest.raises(AssertionError):
        assert_same(values(on_device(less_exact)), values(x))
