"""Random attention problems: four families of shapes, four input strategies, everything from one seed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kerneltest.model import InputStrategy
from kerneltest.oracle.attention_terms import (
    TENSORS,
    Attended,
    AttentionTerms,
    attention_terms,
    from_tensors,
    weight_spread,
)

PAGE = 16
# The cache is padded to whole tiles of the largest kind, so that every kernel may cut it as it likes.
LARGEST_TILE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of attention call. ``keys`` and ``rows`` are ranges, log-uniform; ``v_dim`` below ``head_dim``
    means that V is the first columns of K, as in multi-head latent attention. ``causal``: aligned at the bottom right.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    keys: tuple[int, int]
    rows: tuple[int, int] = (1, 1)
    causal: bool = False
    softcap: float = 0.0
    scale: float = 0.0

    @property
    def latent(self) -> bool:
        return self.v_dim < self.head_dim


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="decode",
            batch=4,
            heads=8,
            kv_heads=2,
            head_dim=128,
            v_dim=128,
            keys=(40, 1500),
            softcap=30.0,
            scale=1 / math.sqrt(128),
        ),
        Family(
            name="long",
            batch=2,
            heads=8,
            kv_heads=2,
            head_dim=128,
            v_dim=128,
            keys=(6_000, 16_000),
            scale=1 / math.sqrt(128),
        ),
        # The keys are those of the prefix; those of the rows come on top.
        Family(
            name="prefill",
            batch=2,
            heads=4,
            kv_heads=2,
            head_dim=128,
            v_dim=128,
            keys=(1, 300),
            rows=(65, 140),
            causal=True,
            scale=1 / math.sqrt(128),
        ),
        # The scale belongs to the 128 + 64 columns before K is absorbed, not to the 512 + 64 that are multiplied.
        Family(
            name="mla",
            batch=2,
            heads=16,
            kv_heads=1,
            head_dim=576,
            v_dim=512,
            keys=(40, 1500),
            scale=1 / math.sqrt(192),
        ),
    )
}

STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        InputStrategy(name="normal", tier="generic"),
        InputStrategy(name="dyadic", tier="exact"),
        InputStrategy(name="count", tier="exact"),
        InputStrategy(name="poison", tier="generic"),
    )
}

# The share of nonzero elements in q and k of dyadic inputs makes scores with a standard deviation of √2 (in powers of
# two): wide enough that maxima move and accumulators are rescaled, narrow enough that no key drowns.
DYADIC_VARIANCE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A padded batch of requests. All values are representable in bfloat16 and held in float32.

    ``q`` [batch, heads, rows, head_dim]; ``k`` [batch, kv_heads, slots, head_dim]; ``v`` [.., v_dim]; the slots of a
    request past its ``lengths`` hold what an earlier request left there: numbers of the same kind, or NaN.
    ``seen`` [batch, rows, slots]. ``buffer`` is what the output held before the launch.
    """

    family: Family
    tier: Literal["exact", "hard", "generic"]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: tuple[int, ...]
    seen: torch.Tensor
    scale: float
    softcap: float
    buffer: float

    def request(self, number: int) -> Problem:
        """The problem of one request alone, with the padding of its batch."""
        one = slice(number, number + 1)
        return replace(
            self, q=self.q[one], k=self.k[one], v=self.v[one], lengths=self.lengths[one], seen=self.seen[one]
        )

    def cut(self, slots: int) -> Problem:
        """The same requests with no more padding than that."""
        return replace(self, k=self.k[:, :, :slots], v=self.v[:, :, :slots], seen=self.seen[..., :slots])

    def tokens(self, number: int) -> slice:
        """The rows of the outputs that belong to a request."""
        rows = self.q.shape[2]
        return slice(number * rows, (number + 1) * rows)

    def live(self) -> torch.Tensor:
        """[batch, slots]: which slots hold a key of the request."""
        return torch.arange(self.k.shape[-2]) < torch.tensor(self.lengths)[:, None]

    def attended(self) -> Attended:
        """What the reference sees: no slot that is not a key."""
        dead = ~self.live()[:, None, :, None]
        keys = max(self.lengths)
        k, v = (x[:, :, :keys].masked_fill(dead[:, :, :keys], 0.0) for x in (self.k, self.v))
        seen = self.seen[..., :keys]
        return Attended(q=self.q, k=k, v=v, seen=seen, scale=self.scale, softcap=self.softcap)


def reference(x: Attended) -> AttentionTerms:
    """The float64 reference, laid out like the outputs: [tokens, heads] and [tokens, heads, v_dim]."""
    terms = attention_terms(x)
    return with_spread(from_tensors({name: by_token(getattr(terms, name)) for name in TENSORS}), x)


def with_spread(terms: AttentionTerms, x: Attended) -> AttentionTerms:
    """The same terms, able to say how much noise a filter [tokens, heads, v_dim] lets through: [tokens, heads]."""
    batch, _, rows, _ = x.q.shape

    def by_head(value: torch.Tensor) -> torch.Tensor:
        return value.reshape(batch, rows, *value.shape[1:]).transpose(1, 2)

    def spread(filters: torch.Tensor, centred: bool) -> torch.Tensor:
        return by_token(weight_spread(x, by_head(terms.out), by_head(filters), centred=centred))

    return replace(terms, spread=spread)


def by_token(value: torch.Tensor) -> torch.Tensor:
    """[batch, heads, rows, ...] to [tokens, heads, ...], as attention operators lay out what they return."""
    return value.transpose(1, 2).flatten(0, 1)


def generator(*words: object) -> torch.Generator:
    """A random generator for these words: two trials share nothing, whoever runs them in whatever order."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def draw(family: Family, strategy: InputStrategy, random: torch.Generator) -> Problem:
    """A random problem of the family, with the inputs of the strategy."""
    batch = family.batch
    rows = _log_uniform(random, *family.rows)
    keys = [_log_uniform(random, *family.keys) + (rows if family.causal else 0) for _ in range(batch)]
    slots = -(-max(keys) // LARGEST_TILE) * LARGEST_TILE
    q_shape = (batch, family.heads, rows, family.head_dim)
    k_shape = (batch, family.kv_heads, slots, family.head_dim)
    scale, softcap = family.scale, family.softcap
    if strategy.name == "dyadic":
        q, k = _dyadic(family, q_shape, k_shape, random)
        # Every weight is a power of two; a soft cap would make it anything.
        scale, softcap = math.log(2.0), 0.0
    else:
        q, k = _normal(q_shape, random), _normal(k_shape, random)
    if strategy.name == "count":
        q = torch.zeros(q_shape)
        if family.latent:
            k[..., : family.v_dim] = _one_hot(family, slots)
    if family.latent:
        v = k[..., : family.v_dim]
    elif strategy.name == "count":
        v = _one_hot(family, slots).expand(batch, -1, -1, -1).contiguous()
    else:
        v = _normal((*k_shape[:-1], family.v_dim), random)
    length = torch.tensor(keys)[:, None]
    slot = torch.arange(slots)
    if strategy.name == "poison":
        dead = (slot >= length)[:, None, :, None]
        k.masked_fill_(dead, torch.nan)
        v.masked_fill_(dead, torch.nan)
    last = torch.arange(rows) + length - rows if family.causal else length - 1
    return Problem(
        family=family,
        tier=strategy.tier,
        q=q,
        k=k,
        v=v,
        lengths=tuple(keys),
        seen=slot <= last[..., None],
        scale=scale,
        softcap=softcap,
        buffer=math.nan if strategy.name == "poison" else 0.0,
    )


def _log_uniform(random: torch.Generator, low: int, high: int) -> int:
    share = float(torch.rand((), generator=random))
    return min(high, int(low * (high / low) ** share + 0.5))


def _normal(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random).bfloat16().float()


def _dyadic(
    family: Family, q_shape: tuple[int, ...], k_shape: tuple[int, ...], random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores q·k that are small integers: q and k in {-1, 0, 1}. Where V is a part of K, it stays generic."""
    integers = family.head_dim - family.v_dim if family.latent else family.head_dim
    share = math.sqrt(DYADIC_VARIANCE / integers)
    q, k = torch.zeros(q_shape), torch.zeros(k_shape)
    for x in (q, k):
        even = torch.rand((*x.shape[:-1], integers), generator=random)
        x[..., -integers:] = (even < share / 2).float() - (even > 1 - share / 2).float()
    if family.latent:
        k[..., : family.v_dim] = _normal((*k_shape[:-1], family.v_dim), random)
    return q, k


def _one_hot(family: Family, slots: int) -> torch.Tensor:
    """[kv_heads, slots, v_dim]: which channel each slot is counted in. Two coprime moduli name a slot (by CRT)."""
    slot = torch.arange(slots)
    if family.kv_heads > 1:
        dims = [(slot + head) % (family.v_dim - head % 2) for head in range(family.kv_heads)]
        return torch.stack([torch.nn.functional.one_hot(dim, family.v_dim) for dim in dims]).float()
    half = family.v_dim // 2
    blocks = (torch.nn.functional.one_hot(slot % modulus, half) for modulus in (half, half - 1))
    return torch.cat(list(blocks), -1).float().unsqueeze(0)
