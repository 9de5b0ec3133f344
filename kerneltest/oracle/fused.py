"""The comparison in one pass over the memory: what :func:`kerneltest.oracle.compare.compare` does on a GPU.

A program walks over tiles of the output. Nearly every tile holds nothing to report: all elements are well inside their
intervals, and no share of the budget is above the largest that this program has met. That is proven in float32 with
slack for its rounding; only where the proof fails does the tile get the exact judgement in float64. What a program saw
is a column of a table, which a second kernel condenses. There are no atomics: the same bits give the same verdict.

The noise's energy needs every element. Of float32 outputs it is float64. Of 16-bit outputs, t significant bits, it is
float32 wherever the proof holds: a reference rounded to float32 is off by 2^(t - 24) of half the output's last bit at
most, and the variance is a third of that half's square or more. So a row's energy E is off by less than
2^(t - 22) E^½ + 4^(t - 23) + 2^-19 E: about 2^-14 for bf16 and 2^-11 for fp16, where E is about 1.
"""

# Triton gives its language no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kerneltest.model import FORMATS, ErrorBudget
from kerneltest.model.numerics import TYPICAL_ROUNDING, WORST_ROUNDING
from kerneltest.oracle.rounding import Z


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Elements of a tile, warps and registers a thread of a program, stages of the pipeline that loads, programs."""

    tile: int = 128
    warps: int = 1
    stages: int = 3
    registers: int
    programs: int = 2112


# One warp a program, so that it never waits for another to agree on a tile; 4 elements a thread, which are loads of 8
# and 16 bytes; two tiles on their way while the third is judged. A Hopper GPU of 132 multiprocessors holds 16 such
# programs on each at up to 128 registers.
PLAIN, NOISY = Tuning(registers=96), Tuning(registers=128)

# Rows of the table: counts of nonfinite, outside and unlikely, flat index of the first bad element and of the one with
# the largest share (NOWHERE: none), and that share as an integer.
FIELDS = 6
# Columns that are condensed at a time.
COLUMNS = 1024
NOWHERE = tl.constexpr(2**62)
EXPONENT_BITS = tl.constexpr(0x7FF00000)
FLOAT32_EXPONENT = tl.constexpr(0x7F800000)
# What float32 makes of the sum and product of a few numbers is off by less than 2^-21, and less than 2^-147 where they
# are subnormal.
SLACK_REL = tl.constexpr(1 - 2.0**-20)
SLACK_ABS = tl.constexpr(2.0**-100)
# From here on a sum might overflow float32.
LARGE = tl.constexpr(2.0**126)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the pass saw, on the host: counts, the largest share, flat indices, and the element that is shown."""

    nonfinite: int
    outside: int
    unlikely: int
    first: int | None
    worst: int
    used: float
    actual: float
    expected: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What the pass writes, on the device: ``row_energy`` (float64, with noise only) has the output's shape without the
    last dimension. ``summary``: see :meth:`read`.
    """

    summary: torch.Tensor
    row_energy: torch.Tensor | None

    def read(self) -> Seen:
        """Wait for the device, once."""
        summary = self.summary.cpu()
        nonfinite, outside, unlikely, first, worst = summary[:5].tolist()
        used, actual, expected, bound = summary[5:].view(torch.float64).tolist()
        return Seen(
            nonfinite=nonfinite,
            outside=outside,
            unlikely=unlikely,
            first=None if first == NOWHERE.value else first,
            worst=worst,
            used=used,
            actual=actual,
            expected=expected,
            bound=bound,
        )


@triton.jit
def _high_word(x):
    return (x.to(tl.int64, bitcast=True) >> 32).to(tl.int32)


@triton.jit
def _from_high_word(word):
    return (word.to(tl.int64) << 32).to(tl.float64, bitcast=True)


@triton.jit
def _rounded(x, T: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr):
    """``round_to``: adding and taking off 1.5 2^(e + 53 - t) leaves no bit below 2^(e - t + 1), ties to even.

    One addition rounds once. Above the format's range e no longer matters, so it is held where nothing overflows.
    """
    exponent = _high_word(x) & EXPONENT_BITS
    exponent = tl.minimum(tl.maximum(exponent, (EMIN + 1023) << 20), (EMAX + 1 + 1023) << 20)
    shift = _from_high_word((exponent + ((53 - T) << 20)) | 0x00080000)
    rounded = (x + shift) - shift
    infinity = tl.full([], float("inf"), tl.float64)
    largest = tl.full([], (2.0 - 2.0 ** (1 - T)) * 2.0**EMAX, tl.float64)
    return tl.where(tl.abs(rounded) > largest, tl.where(x > 0, infinity, -infinity), rounded)


@triton.jit
def _within(value, ref, bound, T: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr):
    """Is the value in [RN(ref - bound), RN(ref + bound)]? NaN is not."""
    return (_rounded(ref - bound, T, EMIN, EMAX) <= value) & (value <= _rounded(ref + bound, T, EMIN, EMAX))


@triton.jit
def _half_ulp(far, T: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr):
    exponent = tl.maximum(_high_word(far) & EXPONENT_BITS, (EMIN + 1023) << 20)
    exponent = tl.where(exponent == EXPONENT_BITS, (EMAX + 1023) << 20, exponent)
    return _from_high_word(exponent - (T << 20))


@triton.jit
def _binade_below(value, EMIN: tl.constexpr):
    """2^e for a number (float32) between 2^e and 2^(e + 1), half of that for a power of two; at least 2^EMIN.

    2^-T of it is at most the distance from a number of the format to where rounding leaves it for a neighbour: the one
    below a power of two is nearer.
    """
    bits = (tl.abs(value) * (1 - 2.0**-24)).to(tl.int32, bitcast=True)
    return (tl.maximum(bits, (EMIN + 127) << 23) & FLOAT32_EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def _energy(error, far, det, sigma, T: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr):
    det_third = det.to(tl.float64) * tl.full([], 1 / 3, tl.float64)
    sigma = sigma.to(tl.float64)
    half = _half_ulp(far, T, EMIN, EMAX)
    variance = sigma * sigma + half * half * tl.full([], 1 / 3, tl.float64) + det_third * det_third
    return tl.where(variance > 0, error * error / variance, 0.0)


@triton.jit
def _energy_in_float32(error, far_bits, det, sigma, T: tl.constexpr):
    """The same in units of 2^(e - 1), where far = |ref| + hard is between 2^e and 2^(e + 1): no square underflows.

    Complementing the exponent of a float32 number makes 2^(1 - e) of 2^e.
    """
    scale = (~far_bits & FLOAT32_EXPONENT).to(tl.float32, bitcast=True)
    error, det, sigma = error * scale, det * scale, sigma * scale
    deviations = error * tl.rsqrt(tl.fma(sigma, sigma, tl.fma(det * det, 1 / 9, 4.0 ** (1 - T) / 3)))
    return deviations * deviations


@triton.jit(do_not_specialize=["count", "tiles"])
def _compare_kernel(
    actual_ptr,
    ref_ptr,
    hard_ptr,
    det_ptr,
    sigma_ptr,
    energy_ptr,
    table_ptr,
    width,  # elements of a row
    segments,  # of a row
    count,  # of all segments
    tiles,
    T: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MINUS_INF: tl.constexpr,
    LIKELY: tl.constexpr,  # standard deviations of typical rounding that no error exceeds
    NOISE: tl.constexpr,
    ON_GRID: tl.constexpr,  # is every number of the output one of the format?
    SIXTEEN: tl.constexpr,  # and that of 16 bits?
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    infinity = tl.full([], float("inf"), tl.float64)
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    nonfinites = tl.full([], 0, tl.int64)
    outsides = tl.full([], 0, tl.int64)
    unlikelies = tl.full([], 0, tl.int64)
    first = tl.full([], NOWHERE, tl.int64)
    worst = tl.full([], NOWHERE, tl.int64)
    # Shares are compared as integers: for numbers that are not negative the order is the same, NaN above all.
    most = tl.full([], -1, tl.int64)
    # A little less than the largest share: what stays below in float32 is below; 0 before anything was seen.
    limit = tl.full([], 0.0, tl.float32)
    # Rounding a reference to float32 changes an error by 2^(T - 23) of the margin at most; four times that.
    off: tl.constexpr = 2.0 ** (T - 21) if SIXTEEN else 0.0
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        segment = tile * ROWS + row
        if NOISE:
            column = (segment % segments) * COLS
            at = ((segment // segments).to(tl.int64) * width + column)[:, None] + col
            here = (segment < count)[:, None] & (col < (width - column)[:, None])
        else:
            at = (segment.to(tl.int64) * COLS)[:, None] + col
            here = at < width
        value_in = tl.load(actual_ptr + at, mask=here, other=0.0)
        ref = tl.load(ref_ptr + at, mask=here, other=0.0)
        hard_in = tl.load(hard_ptr + at, mask=here, other=0.0)
        if NOISE:
            det_in = tl.load(det_ptr + at, mask=here, other=0.0)
            sigma_in = tl.load(sigma_ptr + at, mask=here, other=0.0)

        if ON_GRID:
            # The margin is at most what RN adds to the bound: for a number of the format, error < bound + margin means
            # that it lies inside, and that its true share is below error / (bound + margin). NaN and Inf fail.
            value32 = value_in.to(tl.float32)
            binade = _binade_below(value32, EMIN)
            bound = hard_in.to(tl.float32)
            if SIXTEEN:
                ref32 = ref.to(tl.float32)
                error32 = value32 - ref32
                size = tl.abs(error32)
                far32 = tl.abs(ref32) + bound
            else:
                error = value_in.to(tl.float64) - ref
                size = tl.abs(error.to(tl.float32)) + SLACK_ABS
                far32 = bound
            reach = tl.fma(bound, limit, binade * ((limit - off) * 2.0**-T))
            sure = size < reach
            if NOISE:
                det32 = det_in.to(tl.float32)
                sigma32 = sigma_in.to(tl.float32)
                # The error is below one bound already; NaN in the other one fails.
                reach = tl.fma(det32, SLACK_REL, binade * ((SLACK_REL - off) * 2.0**-T))
                reach = tl.fma(sigma32, LIKELY * SLACK_REL, reach)
                sure = sure & (size < reach)
            if not SIXTEEN:
                # Where nothing is below what is reached, no error is no news either; the first tile always is.
                sure = sure | ((error == 0) & (reach < tl.where(most >= 0, LARGE, -1.0)))
            sure = sure & (far32 < LARGE)
            if NOISE and SIXTEEN:
                # By a power of two float32 cannot tell half an ulp from twice that; up to 2^EMIN both are the same.
                far_bits = tl.maximum(far32.to(tl.int32, bitcast=True), ((EMIN + 127) << 23) + 16)
                sure = sure & (((far_bits + 4) & 0x007FFFF8) != 0)
            look = tl.max((sure == 0).to(tl.int32)) > 0
        else:
            look = True

        if look:
            # As in compare, line by line. Every comparison is written so that NaN fails it.
            value = value_in.to(tl.float64)
            error = value - ref
            hard = hard_in.to(tl.float64)
            far = tl.abs(ref) + hard
            finite = tl.abs(value) < infinity
            infinite = tl.abs(ref) == infinity
            within = _within(value, ref, hard, T, EMIN, EMAX)
            as_expected = tl.where(ref > 0, value == ref, value <= tl.full([], MINUS_INF, tl.float64))
            right = tl.where(infinite, as_expected, finite | within)
            nonfinite = here & (right == 0)
            outside = here & right & (infinite == 0) & (within == 0)
            nonfinites += tl.sum(nonfinite.to(tl.int32))
            outsides += tl.sum(outside.to(tl.int32))
            first = tl.minimum(first, tl.min(tl.where(nonfinite | outside, at, NOWHERE)))
            judged = finite & (infinite == 0)
            share = tl.where(judged, tl.abs(error) / (hard + _half_ulp(far, T, EMIN, EMAX)), 0.0)
            bits = tl.where(here, share.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, -1)
            largest = tl.max(bits)
            worst = tl.where(largest > most, tl.min(tl.where(bits == largest, at, NOWHERE)), worst)
            most = tl.maximum(most, largest)
            limit = tl.minimum(most.to(tl.float64, bitcast=True), 1.0).to(tl.float32) * SLACK_REL
            if NOISE:
                likely = det_in.to(tl.float64) + tl.full([], LIKELY, tl.float64) * sigma_in.to(tl.float64)
                likely = tl.where(hard <= likely, hard, tl.where(likely < hard, likely, hard + likely))
                unlikely = here & (infinite == 0) & (_within(value, ref, likely, T, EMIN, EMAX) == 0)
                unlikelies += tl.sum(unlikely.to(tl.int32))
                energies = tl.where(judged, _energy(error, far, det_in, sigma_in, T, EMIN, EMAX), 0.0)
                row_energy = tl.sum(energies, 1) / tl.full([], width, tl.float64)
        elif NOISE and SIXTEEN:
            energies32 = _energy_in_float32(error32, far_bits, det32, sigma32, T)
            row_energy = (tl.sum(energies32, 1) / width).to(tl.float64)
        elif NOISE:
            error = value_in.to(tl.float64) - ref
            energies = _energy(error, tl.abs(ref) + hard_in.to(tl.float64), det_in, sigma_in, T, EMIN, EMAX)
            row_energy = tl.sum(energies, 1) / tl.full([], width, tl.float64)
        if NOISE:
            tl.store(energy_ptr + segment, row_energy, mask=segment < count)

    cell = table_ptr + tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(cell, nonfinites)
    tl.store(cell + programs, outsides)
    tl.store(cell + 2 * programs, unlikelies)
    tl.store(cell + 3 * programs, first)
    tl.store(cell + 4 * programs, worst)
    tl.store(cell + 5 * programs, most)


@triton.jit(do_not_specialize=["programs"])
def _condense_kernel(summary_ptr, table_ptr, actual_ptr, ref_ptr, hard_ptr, programs, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    nonfinite = tl.zeros([BLOCK], tl.int64)
    outside = tl.zeros([BLOCK], tl.int64)
    unlikely = tl.zeros([BLOCK], tl.int64)
    first = tl.full([BLOCK], NOWHERE, tl.int64)
    worst = tl.full([BLOCK], NOWHERE, tl.int64)
    most = tl.full([BLOCK], -1, tl.int64)
    for start in range(0, programs, BLOCK):
        here = start + column < programs
        cell = table_ptr + start + column
        nonfinite += tl.load(cell, mask=here, other=0)
        outside += tl.load(cell + programs, mask=here, other=0)
        unlikely += tl.load(cell + 2 * programs, mask=here, other=0)
        first = tl.minimum(first, tl.load(cell + 3 * programs, mask=here, other=NOWHERE))
        place = tl.load(cell + 4 * programs, mask=here, other=NOWHERE)
        share = tl.load(cell + 5 * programs, mask=here, other=-1)
        worst = tl.where(share > most, place, tl.where(share == most, tl.minimum(worst, place), worst))
        most = tl.maximum(most, share)
    largest = tl.max(most)
    nonfinites = tl.sum(nonfinite)
    first_bad = tl.min(first)
    worst_at = tl.min(tl.where(most == largest, worst, NOWHERE))
    shown = tl.where(nonfinites > 0, first_bad, worst_at)
    tl.store(summary_ptr, nonfinites)
    tl.store(summary_ptr + 1, tl.sum(outside))
    tl.store(summary_ptr + 2, tl.sum(unlikely))
    tl.store(summary_ptr + 3, first_bad)
    tl.store(summary_ptr + 4, worst_at)
    tl.store(summary_ptr + 5, largest)
    tl.store(summary_ptr + 6, tl.load(actual_ptr + shown).to(tl.float64).to(tl.int64, bitcast=True))
    tl.store(summary_ptr + 7, tl.load(ref_ptr + shown).to(tl.int64, bitcast=True))
    tl.store(summary_ptr + 8, tl.load(hard_ptr + shown).to(tl.float64).to(tl.int64, bitcast=True))


# False when TRITON_INTERPRET=1 made triton.jit return an interpreted function.
_COMPILED = isinstance(_compare_kernel, triton.runtime.JITFunction)


def launch(actual: torch.Tensor, budget: ErrorBudget, tuning: Tuning | None = None) -> Pass:
    """Start the pass on the device of ``budget.ref`` and return without waiting for it.

    ``actual`` (any float dtype) has the shape of ``budget.ref`` (float64) and at least one element. ``hard`` and the
    noise's ``det`` and ``sigma`` may be of any float dtype: they are widened in registers.
    """
    ref, noise, shape = budget.ref, budget.noise, budget.ref.shape
    tuning = tuning or (NOISY if noise else PLAIN)
    # Without noise nothing belongs to a row, and the output is a single long one.
    width = shape[-1] if noise and shape else ref.numel()
    rows = ref.numel() // width
    cols = min(tuning.tile, triton.next_power_of_2(width)) if noise else tuning.tile
    segments = triton.cdiv(width, cols)
    tiles = triton.cdiv(rows * segments, tuning.tile // cols)
    programs = min(tuning.programs, tiles)

    def laid_out(tensor: torch.Tensor) -> torch.Tensor:
        # The interpreter takes subnormal bf16 numbers for zero.
        widen = not _COMPILED and tensor.dtype == torch.bfloat16
        return tensor.to(ref.device, torch.float32 if widen else tensor.dtype).expand(shape).contiguous()

    on_grid = _on_grid(actual.dtype, budget)
    actual, ref, hard = laid_out(actual), laid_out(ref), laid_out(budget.hard)
    det, sigma = (laid_out(noise.det), laid_out(noise.sigma)) if noise else (hard, hard)
    energy = torch.empty((rows, segments) if noise else 1, dtype=torch.float64, device=ref.device)
    table = torch.empty(FIELDS, programs, dtype=torch.int64, device=ref.device)
    summary = torch.empty(FIELDS + 3, dtype=torch.int64, device=ref.device)
    with torch.accelerator.device_index(ref.device.index):
        _compare_kernel[(programs,)](
            actual,
            ref,
            hard,
            det,
            sigma,
            energy,
            table,
            width,
            segments,
            rows * segments,
            tiles,
            T=budget.out.t,
            EMIN=budget.out.emin,
            EMAX=budget.out.emax,
            MINUS_INF=budget.minus_inf,
            LIKELY=Z * WORST_ROUNDING / TYPICAL_ROUNDING,
            NOISE=noise is not None,
            ON_GRID=on_grid,
            SIXTEEN=on_grid and budget.out.t <= FORMATS["float16"].t,
            ROWS=tuning.tile // cols,
            COLS=cols,
            STAGES=tuning.stages,
            num_warps=tuning.warps,
            maxnreg=tuning.registers,
            # A product and a sum are rounded one by one, as everywhere else.
            enable_fp_fusion=False,
        )
        _condense_kernel[(1,)](summary, table, actual, ref, hard, programs, BLOCK=COLUMNS, num_warps=8)
    row_energy = None
    if noise:
        row_energy = (energy.sum(-1) if segments > 1 else energy).reshape(shape[:-1])
    return Pass(summary=summary, row_energy=row_energy)


def _on_grid(dtype: torch.dtype, budget: ErrorBudget) -> bool:
    """Is every finite number of the dtype one of the output format?"""
    fmt = FORMATS.get(str(dtype).removeprefix("torch."))
    return fmt is not None and fmt.t <= budget.out.t and fmt.emin - fmt.t >= budget.out.emin - budget.out.t
