"""Designed dot products that show how an accumulator adds, and what their results mean. CPU tensors only.

A probe is a row of exact products, most of them 0. Random data would show only how large the errors are; a probe shows
the mechanism: the products of one step are aligned to the largest exponent among them and the accumulator, cut off
below a last bit, added, and the sum is cut off once more. After Fasi, Higham, Mikaitis and Pranesh, "Numerical
behavior of NVIDIA tensor cores" (2021), with probes of our own.

Everywhere 1 means ``Operand.one``: narrow formats need their whole range, so 1 is a large product there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# float64 a [n, K] and b [n, K], values of the operand's format -> float64 [n], the sums over K of a * b.
Dots = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A format of factors: ``t`` significant bits, ``top`` the exponent of the largest probe, ``low`` of the smallest.

    A power of two from 2^low to 2^top is the product of two values of the format, subnormals included.
    """

    name: str
    dtype: torch.dtype
    t: int
    top: int
    low: int

    @property
    def one(self) -> float:
        return 2.0**self.top

    @property
    def depth(self) -> int:
        """The largest t for which probes use 2^-t. Two bits are left for mantissas of probes."""
        return min(48, self.top - self.low - 2)


BF16 = Operand(name="bf16", dtype=torch.bfloat16, t=8, top=0, low=-120)
FP16 = Operand(name="fp16", dtype=torch.float16, t=11, top=0, low=-48)
E4M3 = Operand(name="e4m3", dtype=torch.float8_e4m3fn, t=4, top=16, low=-18)
FP32 = Operand(name="fp32", dtype=torch.float32, t=24, top=0, low=-120)


class Unreadable(ValueError):
    """The results fit no accumulator of the family: what a probe said would be a guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which positions of K enter in one step, in the order of the steps.

    With promotion every group after the first ``promote`` positions is a whole block. ``regular`` is False where the
    groups are not of equal size, as when several accumulators share a dot product; then ``k_step`` is the smallest.
    """

    steps: tuple[tuple[int, ...], ...]
    k_step: int
    promote: int | None
    regular: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulator:
    """What the probes say of an accumulator.

    ``bits`` significant bits stay from step to step, and the sum is rounded to them by ``rounding``. Inside a step
    whatever lies below 2^-``align`` of the largest addend is dropped, by ``align_rounding``; ``align`` is None where
    nothing is, or where a step is one product, and ``align_with_c`` is the same where the largest is the accumulator.
    """

    layout: Layout
    bits: int
    rounding: str
    align: int | None
    align_with_c: int | None
    align_rounding: str | None

    @property
    def extra_bits(self) -> int | None:
        """Alignment bits below the last bit of the accumulator."""
        return None if self.align is None else self.align - (self.bits - 1)

    @property
    def worst_step(self) -> float:
        """Bound on the error of one step, in units of one rounding of the sum, for any data.

        Each of k_step products and the accumulator loses less than 2^-align of the largest magnitude, which is at most
        Σ|a||b|; the sum then loses one rounding.
        """
        if self.align is None:
            return 1.0
        unit = 2.0 ** -(self.bits if self.rounding in {"rne", "rna"} else self.bits - 1)
        return 1.0 + (self.layout.k_step + 1) * 2.0**-self.align / unit


def factors(products: Tensor, operand: Operand) -> tuple[Tensor, Tensor]:
    """Split float64 products [n, K] into a and b [n, K] of the format with a * b = products, exactly.

    Raises ValueError where the format has no such factors.
    """
    mantissa, exponent = torch.frexp(products)
    exponent = exponent - 1
    low = exponent.div(2, rounding_mode="floor")
    b = torch.where(products == 0, 0.0, torch.ldexp(torch.ones_like(products), low))
    a = torch.ldexp(2 * mantissa, exponent - low)
    if not (torch.equal(_cast(a, operand), a) and torch.equal(_cast(b, operand), b) and torch.equal(a * b, products)):
        raise ValueError(f"no two values of {operand.name} multiply to these products")
    return a, b


def _cast(x: Tensor, operand: Operand) -> Tensor:
    return x.to(operand.dtype).double()


def measure(dots: Dots, operand: Operand, k: int = 512) -> Accumulator:
    """Probe an accumulator with dot products of length ``k``.

    Raises Unreadable when the results fit no accumulator of the family.
    """

    def run(products: Tensor) -> Tensor:
        a, b = factors(products * operand.one, operand)
        return dots(a, b).double().cpu() / operand.one

    layout = read_layout(run(layout_probes(operand, k)), operand)
    if len(layout.steps) < 2:
        raise Unreadable(f"all {k} products enter in one step: nothing passes through the accumulator")
    bits = read_kept(run(bits_probes(operand, layout, k)), base=1.0) + 1
    if bits - 1 >= operand.depth:
        raise Unreadable(f"the accumulator keeps more than the {operand.depth} bits that {operand.name} can probe")
    rounding = read_rounding(run(rounding_probes(layout, bits, k)), bits)
    align = align_with_c = align_rounding = None
    if layout.k_step >= 3:
        align = _unless_exact(read_kept(run(align_probes(operand, layout, k)), base=0.0), operand)
        align_with_c = _unless_exact(read_kept(run(align_with_c_probes(operand, layout, k)), base=0.0), operand)
        if align is not None:
            align_rounding = read_align_rounding(run(align_rounding_probes(layout, align, k)), align)
    return Accumulator(
        layout=layout,
        bits=bits,
        rounding=rounding,
        align=align,
        align_with_c=align_with_c,
        align_rounding=align_rounding,
    )


def _unless_exact(kept: int, operand: Operand) -> int | None:
    return None if kept >= operand.depth else kept


def _dust(operand: Operand, k: int) -> float:
    """A power of two of which ``k`` are lost beside 1 in any accumulator of up to 24 bits and 2 more for alignment."""
    dust = 2.0 ** max(-40, operand.low - operand.top)
    if k * dust > 2.0**-25:
        raise ValueError(f"{k} products are too many for the range of {operand.name}")
    return dust


def layout_probes(operand: Operand, k: int) -> Tensor:
    """Products [k-1, k]: 1 at position 0, -1 at position l = 1 to k-1, dust at all others.

    While the 1 is in the accumulator, dust is lost, and so is what had come before. What enters after the -1 stays. So
    the result counts the products of all steps after the one of l, whatever the accumulator's width.
    """
    products = torch.full((k - 1, k), _dust(operand, k), dtype=torch.float64)
    products[:, 0] = 1.0
    row = torch.arange(k - 1)
    products[row, row + 1] = -1.0
    return products


def read_layout(results: Tensor, operand: Operand) -> Layout:
    """Group the positions by the number of products that had entered when the -1 did. ``results``: [k-1]."""
    k = len(results) + 1
    kept = results / _dust(operand, k)
    if not bool(((kept == kept.round()) & (kept >= 0) & (kept <= k - 2)).all()):
        raise Unreadable(f"dust does not count: of {k - 2} there came back {sorted(set(kept.tolist()))[:16]}")
    entered = (k - kept).int().tolist()
    groups: dict[int, list[int]] = {}
    for position, count in enumerate(entered, start=1):
        groups.setdefault(count, []).append(position)
    ends = sorted(groups)
    steps = [groups[end] for end in ends]
    # One product a step: the -1 at position 1 comes a step later, otherwise in the step of position 0.
    if len(ends) > 1 and ends[1] == ends[0] + 1:
        steps.insert(0, [0])
        ends.insert(0, 1)
    else:
        steps[0].insert(0, 0)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    k_step = min(sizes)
    # The first block is seen step by step; of later ones only the end, where the 1 leaves the sum of the blocks.
    single = next((i for i, size in enumerate(sizes) if size != sizes[0]), len(sizes))
    promote = ends[single - 1] if single < len(sizes) else None
    whole = all(size == promote for size in sizes[single:-1]) and (promote is None or sizes[-1] <= promote)
    regular = whole and sizes[0] == k_step and all(len(s) == size for s, size in zip(steps, sizes, strict=True))
    return Layout(
        steps=tuple(tuple(step) for step in steps),
        k_step=k_step,
        promote=promote if regular else None,
        regular=regular,
    )


def _powers(operand: Operand) -> Tensor:
    return 2.0 ** -torch.arange(1, operand.depth + 1, dtype=torch.float64)


def bits_probes(operand: Operand, layout: Layout, k: int) -> Tensor:
    """Products [depth, k]: 1 in the first step and 2^-t, t = 1 to depth, in the second."""
    powers = _powers(operand)
    products = torch.zeros(len(powers), k, dtype=torch.float64)
    products[:, layout.steps[0][0]] = 1.0
    products[:, layout.steps[1][0]] = powers
    return products


def align_probes(operand: Operand, layout: Layout, k: int) -> Tensor:
    """Products [depth, k]: 1, -1 and 2^-t, t = 1 to depth, in one step. Rounding the sum cannot lose 2^-t."""
    powers = _powers(operand)
    products = torch.zeros(len(powers), k, dtype=torch.float64)
    products[:, layout.steps[0][0]] = 1.0
    products[:, layout.steps[0][1]] = -1.0
    products[:, layout.steps[0][2]] = powers
    return products


def align_with_c_probes(operand: Operand, layout: Layout, k: int) -> Tensor:
    """As ``align_probes``, but the 1 is in the accumulator when -1 and 2^-t enter."""
    powers = _powers(operand)
    products = torch.zeros(len(powers), k, dtype=torch.float64)
    products[:, layout.steps[0][0]] = 1.0
    products[:, layout.steps[1][0]] = -1.0
    products[:, layout.steps[1][1]] = powers
    return products


def read_kept(results: Tensor, *, base: float) -> int:
    """The largest t up to which every 2^-t came back on top of ``base``. ``results``: [depth], t = 1 first."""
    kept = results == base + 2.0 ** -torch.arange(1, len(results) + 1, dtype=torch.float64)
    count = int(kept.int().cumprod(0).sum())
    # Rounding may bring the bits below up to the last one kept.
    rest = results[count:]
    if not bool(((rest == base) | (rest == base + 2.0**-count)).all()):
        raise Unreadable(f"after {count} bits neither kept nor dropped: {rest.tolist()}")
    return count


def rounding_probes(layout: Layout, bits: int, k: int) -> Tensor:
    """Products [4, k] whose sums are 2 + 3h, -(2 + 3h), 2 + h and -(2 + h), halfway between neighbours 2h apart.

    h is the last bit of an accumulator that holds 1. Alignment does not touch these sums, so the rounding is seen.
    """
    order = [position for step in layout.steps for position in step]
    after = next(i for i, step in enumerate(layout.steps) if order[1] in step) + 1
    if after == len(layout.steps) or order.index(layout.steps[after][0]) >= (layout.promote or k):
        raise Unreadable("no step is left in which the accumulator could be rounded")
    h = 2.0 ** (1 - bits)
    products = torch.zeros(4, k, dtype=torch.float64)
    products[:, order[0]] = 1.0
    products[:, order[1]] = torch.tensor([3 * h, 3 * h, h, h], dtype=torch.float64)
    products[:, layout.steps[after][0]] = 1.0
    return products * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)


# How many h the magnitudes of the four sums lie above 2, by rounding. rna: ties away from zero.
_ROUNDINGS = {
    (2, 2, 0, 0): "rz",
    (4, 4, 0, 0): "rne",
    (4, 4, 2, 2): "rna",
    (2, 4, 0, 2): "floor",
    (4, 2, 2, 0): "ceil",
}


def read_rounding(results: Tensor, bits: int) -> str:
    """The rounding that makes these four ``results`` of ``rounding_probes``."""
    steps = ((results.abs() - 2.0) / 2.0 ** (1 - bits)).tolist()
    found = _ROUNDINGS.get(tuple(steps))
    if found is None:
        raise Unreadable(f"no rounding makes {results.tolist()} with {bits} bits")
    return found


def align_rounding_probes(layout: Layout, align: int, k: int) -> Tensor:
    """Products [2, k]: 1, -1 and ±3/4 of the last aligned bit, in one step."""
    products = torch.zeros(2, k, dtype=torch.float64)
    products[:, layout.steps[0][0]] = 1.0
    products[:, layout.steps[0][1]] = -1.0
    products[:, layout.steps[0][2]] = torch.tensor([3.0, -3.0], dtype=torch.float64) * 2.0 ** -(align + 2)
    return products


def read_align_rounding(results: Tensor, align: int) -> str:
    """What becomes of an addend below the last aligned bit, from the two ``results`` of ``align_rounding_probes``."""
    found = {(0, 0): "rz", (1, -1): "rn", (0, -1): "floor"}.get(tuple((results * 2.0**align).tolist()))
    if found is None:
        raise Unreadable(f"no alignment to {align} bits makes {results.tolist()}")
    return found
