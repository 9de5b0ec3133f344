"""One small attention kernel, emulated in float32 with explicit rounding, and a switch for each planted mistake.

It does what a kernel of the flash-attention kind does: keys in tiles, scores in fp32, exp2, an online softmax whose
accumulators are rescaled whenever the maximum moves, weights rounded before P·V, keys split and merged. All tiles are
computed at once, and only the rescaling walks over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from kerneltest.model import BF16, FP16, FP32, AccModel, Fmt, Numerics
from kerneltest.power.problems import PAGE, Problem, by_token

DTYPES = {BF16: torch.bfloat16, FP16: torch.float16, FP32: torch.float32}
LOG2_E = math.log2(math.e)
# How many of the last tokens of a request a stale copy of its last page lacks.
STALE_TOKENS = 4


class Flaw(Enum):
    """The planted mistakes; the text is what the table calls them."""

    LEAK = "masked slot leaks"
    CAUSAL_EDGE = "causal off by one at a tile's edge"
    CAUSAL_SHORT = "causal short at a tile's start"
    O_NOT_RESCALED = "O not rescaled in one tile"
    NOTHING_RESCALED = "O and l not rescaled in one tile"
    WRONG_D = "scale of the wrong d"
    SCALE_PERCENT = "scale +1 %"
    STALE_PAGE = "last page partly stale"
    WRONG_PAGE = "wrong page"
    HEADS_SWAPPED = "head swapped"
    NO_SOFTCAP = "softcap dropped"
    LAST_DROPPED = "last valid slot dropped"
    FIRST_DROPPED = "slot 0 dropped"
    TILE_TWICE = "KV tile twice"
    TILE_SKIPPED = "KV tile skipped"
    NOT_NORMALISED = "split merge not renormalised"
    PLAIN_MEAN = "split merge a plain mean"
    WRONG_LSE = "split merge with a wrong LSE"
    LSE_BASE = "LSE in base 2, not e"
    ROW_UNWRITTEN = "row not written"
    STALE_TIMES_ZERO = "stale shared memory times 0"
    SCALE_PERMILLE = "scale +0.1 %"
    P_TRUNCATED = "P truncated"
    O_BF16 = "O accumulated in bf16"
    SCORE_BF16 = "argument of exp2 in bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How the kernel computes where it is right; every combination is legal, and declared by :attr:`numerics`."""

    tile: int = 64
    splits: int = 1
    p: Fmt = BF16
    rounded_sum: bool = False
    partial: Fmt = FP32

    def numerics(self, softcap: float = 0.0) -> Numerics:
        """What the kernel declares. A tile's sums are taken by themselves and then added to the accumulators."""
        sums = AccModel(24, "rne", 1, promote=self.tile)
        return Numerics(
            qk=AccModel(24, "rne", 1),
            pv=sums,
            row_sum=sums,
            p=self.p,
            out=BF16,
            l_from="rounded_p" if self.rounded_sum else "fp32",
            partial=self.partial,
            tile=self.tile,
            # torch's tanh is within 2 units in the last place, unlike a GPU's.
            tanh_rel=2.0**-22 if softcap else 0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A flaw and where it strikes: the share of the way through what it may strike (tiles, pages, rows), in [0, 1)."""

    flaw: Flaw
    at: float = 0.0

    def pick(self, first: int, end: int) -> int:
        """A number from ``first`` to ``end`` - 1."""
        return first + int(self.at * (end - first))


def attend(problem: Problem, how: Arithmetic, planted: Planted | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` [tokens, heads, v_dim] in bfloat16 and ``lse`` [tokens, heads] in nats, float32.

    A planted flaw takes one request at a time.
    """
    assert planted is None or len(problem.lengths) == 1, "a flaw strikes one request of a batch"
    flaw = planted.flaw if planted else None
    tiles = -(-max(problem.lengths) // how.tile)
    problem = problem.cut(tiles * how.tile)
    k, v = _load(problem, planted)
    seen = _mask(problem, how.tile, planted)
    s = _scores(problem, k, seen, how, flaw)
    v = _in_tiles(v, how.tile)
    split_of = _splits(problem, how, tiles)
    if planted and tiles > 1 and flaw in (Flaw.TILE_TWICE, Flaw.TILE_SKIPPED):
        order = _order(tiles, planted)
        s, v, split_of = s[:, :, order], v[:, :, order], split_of[:, order]
    tile_max = s.amax(-1)  # [batch, kv_heads, steps, group * rows]
    peak, before = _running_max(tile_max, split_of, how.splits)
    p = torch.exp2(_argument(s - _finite(peak).unsqueeze(-1), flaw))
    rounded = _truncated(p) if flaw is Flaw.P_TRUNCATED else p.to(DTYPES[how.p]).float()
    added_l = (rounded if how.rounded_sum else p).sum(-1)
    added_o = rounded @ v
    rescale = torch.exp2(before - _finite(peak))
    o, den = _accumulate(added_o, added_l, rescale, split_of, planted, how)
    out, lse2 = _merge(o, den, peak, split_of, how, flaw)
    lse = lse2 if flaw is Flaw.LSE_BASE else lse2 * math.log(2.0)
    return _store(problem, out, lse, planted)


def _load(problem: Problem, planted: Planted | None) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as the kernel loads them: zero where there is no key, because 0 times anything but a number is not 0."""
    flaw = planted.flaw if planted else None
    dead = ~problem.live()[:, None, :, None]
    zeroed = problem.k.masked_fill(dead, 0.0)
    latent = problem.family.latent
    v = zeroed[..., : problem.family.v_dim] if latent else problem.v.masked_fill(dead, 0.0)
    if planted is None:
        return zeroed, v
    n = problem.lengths[0]
    if flaw is Flaw.STALE_TIMES_ZERO:
        return zeroed, problem.v
    if flaw is Flaw.LEAK and n < problem.k.shape[-2]:
        zeroed[:, :, n], v[:, :, n] = problem.k[:, :, n], problem.v[:, :, n]
    slots = torch.arange(problem.k.shape[-2])
    if flaw is Flaw.STALE_PAGE:
        in_last_page = (n - 1) % PAGE + 1
        stale = slice(n - min(STALE_TOKENS, in_last_page), n)
        # What the page held before: tokens of the same kind.
        slots[stale] = (slots[stale] + n // 2) % (n - STALE_TOKENS)
    elif flaw is Flaw.WRONG_PAGE and n >= 2 * PAGE:
        page = planted.pick(0, n // PAGE - 1) * PAGE
        slots[page : page + PAGE] += PAGE
    else:
        return zeroed, v
    return zeroed[:, :, slots], v[:, :, slots]


def _mask(problem: Problem, tile: int, planted: Planted | None) -> torch.Tensor:
    """[batch, rows, slots]: the keys that the kernel lets a row see."""
    if planted is None:
        return problem.seen
    seen, n, rows = problem.seen.clone(), problem.lengths[0], problem.seen.shape[1]
    match planted.flaw:
        case Flaw.LEAK if n % tile:
            seen[:, -1, n] = True
        case Flaw.LAST_DROPPED:
            seen[..., n - 1] = False
        case Flaw.FIRST_DROPPED:
            seen[..., 0] = False
        case Flaw.CAUSAL_EDGE | Flaw.CAUSAL_SHORT if problem.family.causal:
            diagonal = torch.arange(rows) + n - rows
            if planted.flaw is Flaw.CAUSAL_EDGE:
                edge = torch.nonzero((diagonal % tile == tile - 1) & (diagonal + 1 < n)).flatten()
                seen[:, edge, diagonal[edge] + 1] = True
            else:
                start = torch.nonzero((diagonal % tile == 0) & (diagonal > 0)).flatten()
                seen[:, start, diagonal[start]] = False
        case _:
            pass
    return seen


def _order(tiles: int, planted: Planted) -> list[int]:
    """The tiles in the order in which they are added."""
    order = list(range(tiles))
    tile = planted.pick(0, tiles)
    order[tile : tile + 1] = [tile, tile] if planted.flaw is Flaw.TILE_TWICE else []
    return order


def _scores(problem: Problem, k: torch.Tensor, seen: torch.Tensor, how: Arithmetic, flaw: Flaw | None) -> torch.Tensor:
    """Scores times log2(e) [batch, kv_heads, tiles, group * rows, tile], -Inf where not seen."""
    family, scale = problem.family, problem.scale
    match flaw:
        case Flaw.WRONG_D:
            scale *= math.sqrt(192 / 576) if family.latent else 1.06
        case Flaw.SCALE_PERCENT:
            scale *= 1.01
        case Flaw.SCALE_PERMILLE:
            scale *= 1.001
        case _:
            pass
    batch, _, rows, dim = problem.q.shape
    q = problem.q.reshape(batch, family.kv_heads, 1, -1, dim)
    s = q @ _in_tiles(k, how.tile).mT
    if problem.softcap and flaw is not Flaw.NO_SOFTCAP:
        s.mul_(scale / problem.softcap).tanh_().mul_(problem.softcap * LOG2_E)
    else:
        s.mul_(scale * LOG2_E)
    hidden = ~seen.reshape(batch, rows, -1, how.tile).transpose(1, 2)  # [batch, tiles, rows, tile]
    return s.masked_fill_(hidden.repeat(1, 1, family.heads // family.kv_heads, 1).unsqueeze(1), -torch.inf)


def _splits(problem: Problem, how: Arithmetic, tiles: int) -> torch.Tensor:
    """[batch, tiles]: the split that each tile of a request belongs to."""
    used = torch.tensor([-(-n // how.tile) for n in problem.lengths])
    each = -(-used // how.splits)
    return (torch.arange(tiles) // each[:, None]).clamp(max=how.splits - 1)


def _running_max(tile_max: torch.Tensor, split_of: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum after each step and before it; every split begins at -Inf."""
    peak, before = torch.full_like(tile_max, -torch.inf), torch.full_like(tile_max, -torch.inf)
    for split in range(splits):
        mine = (split_of == split)[:, None, :, None]
        running = tile_max.masked_fill(~mine, -torch.inf).cummax(2).values
        peak = torch.where(mine, running, peak)
        earlier = torch.cat((torch.full_like(running[:, :, :1], -torch.inf), running[:, :, :-1]), 2)
        before = torch.where(mine, earlier, before)
    return peak, before


def _argument(value: torch.Tensor, flaw: Flaw | None) -> torch.Tensor:
    return value.bfloat16().float() if flaw is Flaw.SCORE_BF16 else value


def _accumulate(
    added_o: torch.Tensor,
    added_l: torch.Tensor,
    rescale: torch.Tensor,
    split_of: torch.Tensor,
    planted: Planted | None,
    how: Arithmetic,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and the denominator l at the end of every split [batch, kv_heads, splits, ...]."""
    flaw = planted.flaw if planted else None
    rescale_o, rescale_l = rescale, rescale
    if planted and flaw in (Flaw.O_NOT_RESCALED, Flaw.NOTHING_RESCALED):
        # The first tiles, where a maximum still moves; where it does not, the flaw changes no bit and does not count.
        step = planted.pick(1, 4)
        kept = rescale.clone()
        kept[:, :, step : step + 1] = 1.0
        rescale_o = kept
        rescale_l = kept if flaw is Flaw.NOTHING_RESCALED else rescale
    o, den = torch.zeros_like(added_o[:, :, 0]), torch.zeros_like(added_l[:, :, 0])
    all_o, all_l = [], []
    for step in range(added_o.shape[2]):
        o = torch.addcmul(added_o[:, :, step], o, rescale_o[:, :, step, :, None])
        den = torch.addcmul(added_l[:, :, step], den, rescale_l[:, :, step])
        if flaw is Flaw.O_BF16:
            o = o.bfloat16().float()
        if how.splits > 1:
            all_o.append(o)
            all_l.append(den)
    if how.splits == 1:
        return o.unsqueeze(2), den.unsqueeze(2)
    last = _last_steps(split_of, how.splits)
    return _take(torch.stack(all_o, 2), last), _take(torch.stack(all_l, 2), last)


def _last_steps(split_of: torch.Tensor, splits: int) -> torch.Tensor:
    """[batch, splits]: the last step of each split; -1 for one that has none."""
    step = torch.arange(split_of.shape[1])
    return torch.stack([torch.where(split_of == split, step, -1).amax(1) for split in range(splits)], 1)


def _take(value: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``value`` [batch, kv_heads, steps, ...] at ``step`` [batch, splits], zero where the step is -1."""
    taken = torch.stack([one[:, index.clamp(min=0)] for one, index in zip(value, step, strict=True)])
    missing = (step < 0)[:, None, :].reshape(len(step), 1, -1, *[1] * (value.dim() - 3))
    return taken.masked_fill(missing, 0.0)


def _merge(
    o: torch.Tensor, den: torch.Tensor, peak: torch.Tensor, split_of: torch.Tensor, how: Arithmetic, flaw: Flaw | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [batch, kv_heads, group * rows, v_dim] and the log-sum-exp in base 2, from those of the splits."""
    # Not l > 0: a NaN is to be seen.
    alive = den != 0
    parts = torch.where(alive.unsqueeze(-1), o / den.unsqueeze(-1), 0.0)
    if how.splits == 1:
        m = _finite(peak[:, :, -1:])
        return parts.squeeze(2), torch.where(alive, m + den.log2(), -torch.inf).squeeze(2)
    parts = parts.to(DTYPES[how.partial]).float()
    m = _take(peak, _last_steps(split_of, how.splits))
    lse = torch.where(alive, m + den.log2(), -torch.inf)
    if flaw is Flaw.WRONG_LSE:
        # The sums of the splits are added as if they had one maximum.
        lse = torch.where(alive, m.masked_fill(~alive, -torch.inf).amax(2, keepdim=True) + den.log2(), -torch.inf)
    top = _finite(lse.amax(2, keepdim=True))
    weight = torch.exp2(lse - top)
    total = weight.sum(2)
    merged_lse = torch.where(total > 0, top.squeeze(2) + total.log2(), -torch.inf)
    if flaw is Flaw.PLAIN_MEAN:
        return parts.sum(2) / alive.sum(2).clamp(min=1).unsqueeze(-1), merged_lse
    merged = (parts * weight.unsqueeze(-1)).sum(2)
    if flaw is not Flaw.NOT_NORMALISED:
        merged = torch.where(total.unsqueeze(-1) > 0, merged / total.unsqueeze(-1), 0.0)
    return merged, merged_lse


def _store(
    problem: Problem, out: torch.Tensor, lse: torch.Tensor, planted: Planted | None
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, rows, _ = problem.q.shape
    out = by_token(out.reshape(batch, heads, rows, -1).bfloat16())
    lse = by_token(lse.reshape(batch, heads, rows))
    if planted and planted.flaw is Flaw.HEADS_SWAPPED:
        order = torch.arange(heads)
        order[[0, -1]] = order[[-1, 0]]
        out, lse = out[:, order], lse[:, order]
    if planted and planted.flaw is Flaw.ROW_UNWRITTEN:
        row = planted.pick(0, rows * heads)
        out[row // heads, row % heads] = problem.buffer
    return out, lse


def _in_tiles(x: torch.Tensor, tile: int) -> torch.Tensor:
    """K or V as [batch, kv_heads, tiles, tile, dim]."""
    return x.reshape(*x.shape[:2], -1, tile, x.shape[-1])


def _truncated(p: torch.Tensor) -> torch.Tensor:
    """Weights cut off after the 8 significant bits of bfloat16."""
    return (p.view(torch.int32) & -0x10000).view(torch.float32)


def _finite(value: torch.Tensor) -> torch.Tensor:
    """The value, 0 where it is -Inf: what a row without a key subtracts from its scores."""
    return torch.where(value == -torch.inf, 0.0, value)
