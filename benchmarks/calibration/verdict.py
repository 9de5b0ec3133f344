"""Measured constants beside the declared ones. A declaration holds where the device is no worse than it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.calibration.bound import Point, needed_extra, needed_k_step
from benchmarks.calibration.elementary import Domain, Worst
from benchmarks.calibration.probes import Accumulator
from kerneltest.model import AccModel

Value = float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A measured constant; ``declared_holds`` is None where kerneltest declares none."""

    name: str
    measured: Value
    declared: Value = None
    declared_holds: bool | None = None
    note: str = ""


def of_accumulator(found: Accumulator, model: AccModel) -> list[Constant]:
    """What the probes read, field by field of AccModel, and what else they say."""
    layout = found.layout
    # An fp32 accumulator that takes each step alone is seen as one of 24 bits.
    promoted = model.promote is None or layout.promote == model.promote or found.bits >= 24
    rounding_holds = found.rounding in {model.rounding, "rne"}
    return [
        Constant(name="bits", measured=found.bits, declared=model.bits, declared_holds=found.bits >= model.bits),
        Constant(name="rounding", measured=found.rounding, declared=model.rounding, declared_holds=rounding_holds),
        Constant(
            name="k_step",
            measured=layout.k_step,
            declared=model.k_step,
            declared_holds=layout.k_step >= model.k_step,
            note="" if layout.regular else "irregular: several accumulators share a dot product",
        ),
        Constant(name="promote", measured=layout.promote, declared=model.promote, declared_holds=promoted),
        Constant(name="bits below the largest addend", measured=found.align, note="None: exact, or one product a step"),
        Constant(name="bits below the accumulator", measured=found.align_with_c, note="where it is the largest addend"),
        Constant(
            name="alignment bits beyond the accumulator",
            measured=found.extra_bits,
            declared=model.align,
            declared_holds=found.extra_bits is None or (model.align is not None and found.extra_bits >= model.align),
        ),
        Constant(name="rounding of aligned addends", measured=found.align_rounding),
        Constant(
            name="worst step, in roundings", measured=found.worst_step, note="derived: 1 + (k_step + 1) / 2^extra"
        ),
    ]


def of_bound(points: Sequence[Point], model: AccModel) -> list[Constant]:
    """The largest share of gamma used by each kind of data, and what gamma would need to be a bound."""
    random = [point for point in points if point.data != "designed"]
    constants = []
    for data in dict.fromkeys(point.data for point in points):
        worst = max((point for point in points if point.data == data), key=lambda point: point.used)
        constants.append(
            Constant(
                name=f"share of gamma, {data} data",
                measured=worst.used,
                declared=1.0,
                declared_holds=worst.used <= 1.0,
                note=f"at K = {worst.k}, error {worst.error:.3g} of Σ|a||b|",
            )
        )
    extra = needed_extra(random, model)
    constants += [
        Constant(name="extra, random data", measured=extra, declared=model.extra, declared_holds=extra <= model.extra),
        Constant(name="extra, all data", measured=needed_extra(points, model), note="with the declared k_step"),
        Constant(name="k_step for gamma, random data", measured=needed_k_step(random, model), note="None: not even 1"),
        Constant(name="k_step for gamma, all data", measured=needed_k_step(points, model), note="None: not even 1"),
    ]
    return constants


def of_function(domain: Domain, worst: Worst) -> list[Constant]:
    """Both errors; the one that the domain is judged by has the declared figure beside it."""
    judged = worst.relative if domain.metric == "relative" else worst.absolute
    at = worst.relative_at if domain.metric == "relative" else worst.absolute_at
    name, declared = domain.declared or ("", None)
    other, value = ("absolute", worst.absolute) if domain.metric == "relative" else ("relative", worst.relative)
    return [
        Constant(
            name=f"{domain.metric} error",
            measured=judged,
            declared=declared,
            declared_holds=None if declared is None else judged <= declared,
            note=f"at x = {at!r}" + (f"; declared as {name}" if name else ""),
        ),
        Constant(name=f"{other} error", measured=value, note="not judged"),
    ]
