"""A whole MLA layer in float64, with the terms of its error budget, whatever the form that a kernel computes it in.

k_j = W_UK c_j, v_j = W_UV c_j, s_j = scale (q_nope · k_j + q_pe · r_j), p = softmax(s), o = Σ p_j v_j, of each head.
The matrix products are the decompressed form's; that the absorbed one is the same is proven in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a quantity x_j >= 0 of each key of a row: Σ p x, (Σ p x²)^½ and max x over all keys of the request, [..]."""

    mean: torch.Tensor
    root: torch.Tensor
    largest: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Noises:
    """Deviations of scores whose operand has noise: |scale| (Σ x² y²)^½, x that of the operand and y the other side.

    ``each`` [..]: the root of the mean over keys, by p. ``row``: of Σ_j p_j ε_j, which is less where noise is a key's
    own, or where latents of either sign meet the same query. ``largest``: of the worst key of the request.
    """

    each: torch.Tensor
    row: torch.Tensor
    largest: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTerms:
    """Float64 values of the reference: [total_qo, heads, v_dim] if they end in ``_out``, [total_qo, heads] else.

    A row that sees no key has out = 0, lse = -Inf, the rest 0. |K|_jd = Σ_c |W_UK||c_j| and |V|_jd = Σ_c |W_UV||c_j|.
    Of each key, by the names of what a kernel may round or add up:

    * ``decompressed``: |scale| (Σ |q_nope||k_j| + Σ |q_pe||r_j|), ``key``: its first part alone;
    * ``absorbed``: |scale| (Σ_c |W_UKᵀ q_nope||c_j| + Σ |q_pe||r_j|), ``query``: its first part alone;
    * ``projected``: |scale| Σ_d |q_nope_d| |K|_jd, no less than either first part.

    A sum of products x_i y_i in random order is a walk that ends at their sum; (sum² + 2 Σ x²y²)^½ stands for the
    largest that it has been, as in :mod:`kerneltest.oracle.attention`.
    """

    out: torch.Tensor
    lse: torch.Tensor  # nats
    keys: torch.Tensor  # visible keys of a row
    score_max: torch.Tensor  # max |s|, over all keys of the request
    abs_out: torch.Tensor  # Σ p |v|
    square_out: torch.Tensor  # Σ p² v²
    second_out: torch.Tensor  # Σ p v²
    spread_out: torch.Tensor  # (Σ p (v - o)²)^½
    peak_out: torch.Tensor  # exp(m - lse) Σ |v|, over all keys of the request
    wide_out: torch.Tensor  # Σ p |V|
    wide_second_out: torch.Tensor  # Σ p |V|²
    wide_peak_out: torch.Tensor  # exp(m - lse) Σ |V|
    latent_out: torch.Tensor  # Σ_c |W_UV| |Σ p c|
    latent_noise_out: torch.Tensor  # (Σ_c W_UV² (Σ p c)²)^½
    weight_out: torch.Tensor  # Σ_c |W_UV|
    square_row: torch.Tensor  # Σ p²
    query_sum: torch.Tensor  # |scale| Σ |q_nope|
    latent_sum: torch.Tensor  # |scale| max_j Σ_c |c_j|
    query_noise: Noises  # where each channel of q' = W_UKᵀ q_nope is off by as much as it is large
    query_walk: Noises  # and where it is off by as much as the walk that adds it up
    key_noise: Noises  # the same of each channel of each key
    key_walk: Noises
    score_walk: torch.Tensor  # (Σ p x²)^½ of the walk that adds up a score from k and r
    absorbed_walk: torch.Tensor  # and from c and r
    made_out: torch.Tensor  # Σ p² x² of the walk that adds up a value from c
    latent_square_out: torch.Tensor  # Σ_c W_UV² Σ_j p² c_j²
    sizes: Mapping[str, Sizes]


GROUPS: dict[str, type[Sizes] | type[Noises]] = {
    **dict.fromkeys(("decompressed", "key", "absorbed", "query", "projected"), Sizes),
    **dict.fromkeys(("query_noise", "query_walk", "key_noise", "key_walk"), Noises),
}
NOISES = tuple(name for name, group in GROUPS.items() if group is Noises)
TENSORS = tuple(field.name for field in fields(LayerTerms) if field.name not in (*NOISES, "sizes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One request: ``q_nope`` [heads, rows, nope], ``q_pe`` [heads, rows, rope], ``latent`` [keys, rank], ``rope``
    [keys, rope], ``w_uk`` [heads, nope, rank], ``w_uv`` [heads, v_dim, rank], all float64; ``seen`` [rows, keys].
    """

    q_nope: torch.Tensor
    q_pe: torch.Tensor
    latent: torch.Tensor
    rope: torch.Tensor
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    seen: torch.Tensor
    scale: float


def layer_terms(inputs: Mapping[str, torch.Tensor], *, causal: bool, sm_scale: float, device: str) -> LayerTerms:
    """Terms for every row of a batch, on ``device``, from the host tensors of ``mla_attention``."""
    total, heads = inputs["q_nope"].shape[:2]
    wide = (total, heads, inputs["w_uv"].shape[1])

    def zeros(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    tensors = {name: zeros(wide if name == "out" or name.endswith("_out") else wide[:2]) for name in TENSORS}
    tensors["lse"].fill_(float("-inf"))
    groups = {name: {field.name: zeros(wide[:2]) for field in fields(group)} for name, group in GROUPS.items()}
    for rows, request in requests(inputs, causal=causal, sm_scale=sm_scale, device=device):
        found, found_groups = _terms(request)
        for name, value in found.items():
            tensors[name][rows] = value.transpose(0, 1)
        for name, group in found_groups.items():
            for part, value in group.items():
                groups[name][part][rows] = value.transpose(0, 1)
    grouped: dict[str, Any] = {name: group(**groups[name]) for name, group in GROUPS.items()}
    named: dict[str, Any] = {**tensors, **{name: grouped.pop(name) for name in NOISES}}
    return LayerTerms(**named, sizes=grouped)


def requests(
    inputs: Mapping[str, torch.Tensor], *, causal: bool, sm_scale: float, device: str
) -> Iterator[tuple[slice, Layer]]:
    """The requests that have rows and keys, gathered by plain indexing; slots past a request's length are cut off."""
    x = {name: value.to(device) for name, value in inputs.items()}
    w_uk, w_uv = x["w_uk"].double(), x["w_uv"].double()
    qo, pages = inputs["qo_indptr"].tolist(), inputs["kv_indptr"].tolist()
    for number, keys in enumerate(inputs["kv_len"].tolist()):
        rows = slice(*qo[number : number + 2])
        count = rows.stop - rows.start
        if keys == 0 or count == 0:
            continue
        table = x["kv_indices"][slice(*pages[number : number + 2])].long()
        key = torch.arange(keys, device=device)
        last = torch.arange(count, device=device) + keys - count if causal else torch.full_like(key[:1], keys)
        yield (
            rows,
            Layer(
                q_nope=x["q_nope"][rows].transpose(0, 1).double(),
                q_pe=x["q_pe"][rows].transpose(0, 1).double(),
                latent=x["ckv_pages"][table].flatten(0, 1)[:keys].double(),
                rope=x["kpe_pages"][table].flatten(0, 1)[:keys].double(),
                w_uk=w_uk,
                w_uv=w_uv,
                seen=(key <= last.unsqueeze(-1)).expand(count, keys).contiguous(),
                scale=sm_scale,
            ),
        )


def _terms(x: Layer) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """By name, [heads, rows] and [heads, rows, v_dim]."""

    def walk(end: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return end.square() + 2 * steps

    scale, q_abs = abs(x.scale), x.q_nope.abs()
    k, v = x.latent @ x.w_uk.mT, x.latent @ x.w_uv.mT  # [heads, keys, ..]
    k_wide, v_wide = x.latent.abs() @ x.w_uk.abs().mT, x.latent.abs() @ x.w_uv.abs().mT
    absorbed = x.q_nope @ x.w_uk  # [heads, rows, rank]
    s = (x.q_nope @ k.mT + x.q_pe @ x.rope.T) * x.scale
    rope = x.q_pe.abs() @ x.rope.abs().T * scale
    key, query = q_abs @ k.abs().mT * scale, absorbed.abs() @ x.latent.abs().T * scale
    of_keys = {
        "decompressed": key + rope,
        "key": key,
        "absorbed": query + rope,
        "query": query,
        "projected": q_abs @ k_wide.mT * scale,
    }
    masked = s.masked_fill(~x.seen, -torch.inf)
    peak = masked.amax(-1)
    alive = peak > -torch.inf
    peak = torch.where(alive, peak, 0.0)
    p = (masked - peak.unsqueeze(-1)).exp()
    total = p.sum(-1)
    # 1 / Σ exp(s - m), which is exp(m - lse)
    share = torch.where(alive, 1 / total, 0.0).unsqueeze(-1)
    p = p * share
    out, latent, square = p @ v, p @ x.latent, p.square()
    latent_square = x.latent.square()
    # Σ x² y² of what a score adds up, [heads, rows, keys]
    of_key, of_query = x.q_nope.square() @ k.square().mT, absorbed.square() @ latent_square.T
    of_rope = x.q_pe.square() @ x.rope.square().T * x.scale**2
    w_abs = x.w_uv.abs()
    some = alive.unsqueeze(-1).double()
    terms = {
        "out": out,
        "lse": torch.where(alive, peak + total.log(), -torch.inf),
        "keys": x.seen.sum(-1, dtype=torch.float64).expand(total.shape),
        "score_max": s.abs().amax(-1) * alive,
        "abs_out": p @ v.abs(),
        "square_out": square @ v.square(),
        "second_out": p @ v.square(),
        "spread_out": _spread(p, v, out),
        "peak_out": share * v.abs().sum(-2, keepdim=True),
        "wide_out": p @ v_wide,
        "wide_second_out": p @ v_wide.square(),
        "wide_peak_out": share * v_wide.sum(-2, keepdim=True),
        "latent_out": latent.abs() @ w_abs.mT,
        "latent_noise_out": (latent.square() @ x.w_uv.square().mT).sqrt(),
        "weight_out": w_abs.sum(-1).unsqueeze(1) * some,
        "square_row": square.sum(-1),
        "query_sum": q_abs.sum(-1) * scale * alive,
        "latent_sum": x.latent.abs().sum(-1).amax() * scale * alive.double(),
        "score_walk": (p * walk(s, of_key * x.scale**2 + of_rope)).sum(-1).sqrt(),
        "absorbed_walk": (p * walk(s, of_query * x.scale**2 + of_rope)).sum(-1).sqrt(),
        "made_out": square @ walk(v, latent_square @ x.w_uv.square().mT),
        "latent_square_out": square @ latent_square @ x.w_uv.square().mT,
    }
    groups = {
        name: {
            "mean": (p * value).sum(-1),
            "root": (p * value.square()).sum(-1).sqrt(),
            "largest": value.amax(-1) * alive,
        }
        for name, value in of_keys.items()
    }
    # By what each channel of a key, or of an absorbed query, is off, squared; of every key or row.
    for name, off in (("key_noise", k.square()), ("key_walk", walk(k, latent_square @ x.w_uk.square().mT))):
        of_scores = x.q_nope.square() @ off.mT
        groups[name] = {
            "each": scale * (p * of_scores).sum(-1).sqrt(),
            "row": scale * (square * of_scores).sum(-1).sqrt(),
            "largest": scale * of_scores.amax(-1).sqrt() * alive,
        }
    query_walk = walk(absorbed, x.q_nope.square() @ x.w_uk.square())
    for name, off in (("query_noise", absorbed.square()), ("query_walk", query_walk)):
        groups[name] = {
            "each": scale * (off * (p @ latent_square)).sum(-1).sqrt(),
            "row": scale * (off * latent.square()).sum(-1).sqrt(),
            "largest": scale * (off @ latent_square.T).amax(-1).sqrt() * alive,
        }
    return terms, groups


def _spread(p: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """(Σ p (v - o)²)^½ of each channel, from v less its mean over all keys, which costs few digits."""
    centre = v.mean(-2, keepdim=True)
    moved = v - centre
    variance = p @ moved.square() - (out - centre * p.sum(-1, keepdim=True)).square()
    return variance.clamp(min=0.0).sqrt()
