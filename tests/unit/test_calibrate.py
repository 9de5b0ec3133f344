"""The calibration's probes read accumulators that are emulated here: planted parameters come out, and no others."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import calibrate
from benchmarks.calibration import cuda, elementary, probes, subjects, verdict
from benchmarks.calibration.bound import Point, Product, needed_extra, needed_k_step, sweep
from benchmarks.calibration.elementary import Domain, Worst, bit_patterns, read_record
from benchmarks.calibration.probes import BF16, E4M3, FP16, FP32, Operand, Unreadable
from benchmarks.calibration.subjects import Subject, multiply_instructions
from kerneltest.model import IEEE_FP32, WGMMA_8BIT, WGMMA_16BIT, AccModel
from kerneltest.model.numerics import EX2_APPROX, TANH_APPROX


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulated:
    """A tensor core in float64: align what enters in a step, add, round to ``bits``; then on to the next step.

    ``align`` counts the bits kept below the largest addend (None: all), ``promote`` the products after which the sum
    goes to an fp32 accumulator; ``order`` permutes K first.
    """

    bits: int = 24
    rounding: str = "rz"
    k_step: int = 16
    align: int | None = 25
    align_rounding: str = "rz"
    promote: int | None = None
    order: tuple[int, ...] | None = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """float64 a and b [n, K] -> float64 [n]."""
        if self.order is not None:
            a, b = a[:, self.order], b[:, self.order]
        total, inner = torch.zeros(len(a), dtype=torch.float64), torch.zeros(len(a), dtype=torch.float64)
        for start in range(0, a.shape[1], self.k_step):
            step = slice(start, start + self.k_step)
            inner = self._step(inner, a[:, step], b[:, step])
            if self.promote is not None and (start + self.k_step) % self.promote == 0:
                total, inner = (total + inner).float().double(), torch.zeros_like(inner)
        return (total + inner).float().double() if self.promote is not None else inner

    def _step(self, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        addends = torch.cat([c[:, None], a * b], 1)
        if self.align is not None:
            # The exponent of a product is that of its factors, so that 1.5 * 1.5 is not aligned to 2.
            exponents = torch.cat([_exponent(c)[:, None], _exponent(a) + _exponent(b)], 1)
            exponents[addends == 0] = -10_000
            unit = torch.ldexp(torch.ones_like(c), exponents.max(1).values.clamp(min=-500) - self.align)[:, None]
            cut = {"rz": torch.trunc, "floor": torch.floor, "rn": torch.round}[self.align_rounding]
            addends = cut(addends / unit) * unit
        return _round(addends.sum(1), self.bits, self.rounding)


def _exponent(x: Tensor) -> Tensor:
    return torch.frexp(x).exponent - 1


def _round(x: Tensor, bits: int, rounding: str) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    cuts: dict[str, Callable[[Tensor], Tensor]] = {
        "rz": torch.trunc,
        "rne": torch.round,
        "rna": _away,
        "floor": torch.floor,
        "ceil": torch.ceil,
    }
    return torch.ldexp(cuts[rounding](torch.ldexp(mantissa, torch.tensor(bits))), exponent - bits)


def _away(x: Tensor) -> Tensor:
    return x.sign() * (x.abs() + 0.5).floor()


TENSOR_CORE_16BIT = Emulated()
TENSOR_CORE_8BIT = Emulated(bits=14, k_step=32, align=13)
SERIAL_FMA = Emulated(rounding="rne", k_step=1, align=None)

PLANTED = {
    "bf16, two alignment bits": (TENSOR_CORE_16BIT, BF16),
    "fp16, two alignment bits": (TENSOR_CORE_16BIT, FP16),
    "no alignment bits": (replace(TENSOR_CORE_16BIT, align=23), BF16),
    "one alignment bit, steps of 8": (replace(TENSOR_CORE_16BIT, align=24, k_step=8), FP16),
    "steps of 4": (replace(TENSOR_CORE_16BIT, align=23, k_step=4), FP16),
    "rounded to nearest": (replace(TENSOR_CORE_16BIT, rounding="rne"), BF16),
    "ties away from zero": (replace(TENSOR_CORE_16BIT, rounding="rna"), BF16),
    "rounded up": (replace(TENSOR_CORE_16BIT, rounding="ceil"), BF16),
    "rounded down": (replace(TENSOR_CORE_16BIT, rounding="floor"), BF16),
    "alignment to nearest": (replace(TENSOR_CORE_16BIT, align_rounding="rn"), BF16),
    "alignment down": (replace(TENSOR_CORE_16BIT, align_rounding="floor"), BF16),
    "23 bits": (replace(TENSOR_CORE_16BIT, bits=23), BF16),
    "fp8": (TENSOR_CORE_8BIT, E4M3),
    "fp8, promoted every 128": (replace(TENSOR_CORE_8BIT, promote=128), E4M3),
    "fp8, promoted every 64": (replace(TENSOR_CORE_8BIT, promote=64), E4M3),
    "fp8, more alignment than accumulator": (replace(TENSOR_CORE_8BIT, align=16), E4M3),
    "serial FMA": (SERIAL_FMA, FP32),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_was_planted_is_measured(name: str) -> None:
    planted, operand = PLANTED[name]
    found = probes.measure(planted, operand)
    assert found.layout.regular
    assert (found.bits, found.rounding, found.layout.k_step, found.layout.promote) == (
        planted.bits,
        planted.rounding,
        planted.k_step,
        planted.promote,
    )
    assert found.align == found.align_with_c == planted.align
    assert found.align_rounding == (planted.align_rounding if planted.align is not None else None)


def test_each_plant_measures_as_itself_alone() -> None:
    # Two plants that read the same would let a wrong declaration pass.
    found = {name: probes.measure(planted, operand) for name, (planted, operand) in PLANTED.items()}
    same = {(one, other) for one in found for other in found if one < other and found[one] == found[other]}
    assert same == {("bf16, two alignment bits", "fp16, two alignment bits")}  # one core, two formats


def test_positions_of_a_step_need_not_be_neighbours() -> None:
    order = tuple(torch.arange(512).view(-1, 2, 16).transpose(1, 2).flatten().tolist())
    found = probes.measure(replace(TENSOR_CORE_16BIT, order=order), BF16)
    assert set(found.layout.steps[0]) == set(order[:16])
    assert (found.layout.k_step, found.bits, found.align) == (16, 24, 25)


def shared(*parts: slice) -> probes.Dots:
    """An accumulator for each of the parts of the steps of 16; their sums are added in fp32, in a tree."""

    def dots(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.view(len(a), -1, 16), b.view(len(b), -1, 16)
        sums = [TENSOR_CORE_16BIT(a[:, part].flatten(1), b[:, part].flatten(1)) for part in parts]
        while len(sums) > 1:
            sums = [(left + right).float().double() for left, right in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    return dots


@pytest.mark.parametrize("parts", [(slice(16), slice(16, None)), (slice(0, None, 2), slice(1, None, 2))])
def test_two_accumulators_read_as_a_promotion_which_they_are(parts: tuple[slice, slice]) -> None:
    found = probes.measure(shared(*parts), BF16)
    assert (found.layout.k_step, found.layout.promote, found.layout.regular) == (16, 256, True)


def test_a_tree_of_accumulators_is_not_called_regular() -> None:
    found = probes.measure(shared(*(slice(start, start + 8) for start in (0, 8, 16, 24))), BF16)
    assert (found.layout.regular, found.layout.promote) == (False, None)
    assert (found.layout.k_step, found.bits, found.rounding) == (16, 24, "rz")


def test_one_step_for_all_is_not_read() -> None:
    with pytest.raises(Unreadable, match="enter in one step"):
        probes.measure(replace(TENSOR_CORE_16BIT, k_step=512), BF16)


def test_results_of_no_accumulator_are_not_read() -> None:
    noise = torch.Generator().manual_seed(0)
    with pytest.raises(Unreadable, match="dust does not count"):
        probes.measure(lambda a, b: torch.rand(len(a), generator=noise, dtype=torch.float64), BF16)
    with pytest.raises(Unreadable, match="dust does not count"):
        probes.measure(lambda a, b: torch.full((len(a),), torch.nan, dtype=torch.float64), BF16)
    with pytest.raises(Unreadable, match="neither kept nor dropped"):
        probes.read_kept(torch.tensor([1.5, 1.3], dtype=torch.float64), base=1.0)
    with pytest.raises(Unreadable, match="no rounding"):
        probes.read_rounding(torch.tensor([2.5, -2.5, 2.0, -2.0], dtype=torch.float64), 24)
    with pytest.raises(Unreadable, match="no alignment"):
        probes.read_align_rounding(torch.tensor([0.5, 0.0], dtype=torch.float64), 24)


@pytest.mark.parametrize("operand", [BF16, FP16, E4M3, FP32], ids=lambda operand: operand.name)
def test_factors_are_exact_or_refused(operand: Operand) -> None:
    powers = 2.0 ** torch.arange(operand.low, operand.top + 1, dtype=torch.float64)
    a, b = probes.factors(powers[None], operand)
    assert torch.equal(a * b, powers[None])
    assert torch.equal(a.to(operand.dtype).double(), a)
    with pytest.raises(ValueError, match="no two values"):
        probes.factors(torch.full((1, 1), 1 + 2.0**-operand.t, dtype=torch.float64), operand)


def product_of(planted: Emulated) -> Product:
    """The matrix product that these dot products make."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        pairs = planted(a.repeat_interleave(len(b), 0), b.repeat(len(a), 1))
        return pairs.view(len(a), len(b))

    return product


def points(planted: Emulated, operand: Operand, model: AccModel, k: int) -> dict[str, Point]:
    """The sweep at one length, by data."""
    product = product_of(planted)
    swept = sweep(product, operand, model, rows=6, device="cpu", lengths=(k,), designed_lengths=(k,))
    return {point.data: point for point in swept}


def test_gamma_of_fused_multiply_adds_holds_on_designed_data() -> None:
    found = points(SERIAL_FMA, FP32, IEEE_FP32, 2048)
    assert max(point.used for point in found.values()) <= 1
    assert found["designed"].used > 0.98  # and is no farther off than its spare steps


@pytest.mark.parametrize(
    ("planted", "operand", "model", "roundings"),
    [(TENSOR_CORE_16BIT, BF16, AccModel(24, "rz", 16), 3.8), (TENSOR_CORE_8BIT, E4M3, AccModel(14, "rz", 32), 25.0)],
    ids=["bf16", "fp8"],
)
def test_alignment_loses_more_than_one_rounding_a_step(
    planted: Emulated, operand: Operand, model: AccModel, roundings: float
) -> None:
    # 16 products just below 2^-25 are four roundings of a 24-bit sum, 32 below 2^-13 as many of a 14-bit one.
    found = points(planted, operand, replace(model, extra=0), 512)["designed"]
    assert roundings < found.used <= probes.measure(planted, operand).worst_step


@pytest.mark.parametrize(
    ("planted", "operand", "model"),
    [(TENSOR_CORE_16BIT, BF16, WGMMA_16BIT), (TENSOR_CORE_8BIT, E4M3, WGMMA_8BIT)],
    ids=["bf16", "fp8"],
)
def test_with_its_alignment_declared_gamma_is_a_bound(planted: Emulated, operand: Operand, model: AccModel) -> None:
    for k in (64, 512, 2048):
        found = points(planted, operand, model, k)
        assert max(point.used for point in found.values()) <= 1
        assert found["designed"].used > 0.5


def test_without_alignment_bits_random_data_exceed_gamma_too() -> None:
    model = AccModel(14, "rz", 32, extra=2)
    found = points(TENSOR_CORE_8BIT, E4M3, model, 1024)
    assert found["same-sign"].used > 1 > found["zero-mean"].used
    assert points(replace(TENSOR_CORE_8BIT, align=None), E4M3, model, 1024)["same-sign"].used < 1


def test_a_nan_is_infinitely_wrong() -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.full((len(a), len(b)), torch.nan, dtype=torch.float64)

    swept = sweep(product, BF16, WGMMA_16BIT, rows=2, device="cpu", lengths=(16,), designed_lengths=(16,))
    assert [point.used for point in swept] == [math.inf] * 3
    constants = verdict.of_bound(swept, WGMMA_16BIT)
    assert [constant.declared_holds for constant in constants[:4]] == [False] * 4
    assert [constant.measured for constant in constants] == [math.inf] * 5 + [None] * 2


def test_needed_extra_and_k_step_by_hand() -> None:
    model = AccModel(24, "rz", 16, extra=2)
    u = 2.0**-23
    inside = Point(data="", k=160, error=11.5 * u, gamma=model.gamma(160))
    assert needed_extra([inside], model) == 2
    assert needed_k_step([inside], model) == 16
    outside = Point(data="", k=160, error=22 * u, gamma=model.gamma(160))
    assert needed_extra([inside, outside], model) == 12
    assert needed_k_step([inside, outside], model) == 8  # 20 + 2 roundings
    assert needed_k_step([Point(data="", k=160, error=1.0, gamma=1.0)], model) is None
    promoted = AccModel(14, "rz", 32, promote=128, extra=0)
    assert needed_extra([Point(data="", k=256, error=4 * 2.0**-13 + 5 * 2.0**-24, gamma=1.0)], promoted) == 3


def held(constants: list[verdict.Constant]) -> dict[str, bool | None]:
    return {constant.name: constant.declared_holds for constant in constants if constant.declared_holds is not None}


TRUE_8BIT = AccModel(14, "rz", 32, promote=128, align=0)


@pytest.mark.parametrize(
    ("declared", "wrong"),
    [
        (TRUE_8BIT, set()),
        (replace(TRUE_8BIT, bits=15), {"bits"}),
        (replace(TRUE_8BIT, bits=13), set()),  # no worse than declared
        (replace(TRUE_8BIT, rounding="rne"), {"rounding"}),
        (replace(TRUE_8BIT, k_step=64), {"k_step"}),
        (replace(TRUE_8BIT, k_step=16), set()),
        (replace(TRUE_8BIT, promote=64), {"promote"}),
        (replace(TRUE_8BIT, align=1), {"alignment bits beyond the accumulator"}),
        (replace(TRUE_8BIT, align=None), {"alignment bits beyond the accumulator"}),
        (replace(TRUE_8BIT, promote=None), set()),
    ],
    ids=str,
)
def test_a_declaration_is_contradicted_in_the_field_that_is_wrong(declared: AccModel, wrong: set[str]) -> None:
    found = probes.measure(replace(TENSOR_CORE_8BIT, promote=128), E4M3)
    holds = held(verdict.of_accumulator(found, declared))
    assert set(holds) == {"bits", "rounding", "k_step", "promote", "alignment bits beyond the accumulator"}
    assert {name for name, value in holds.items() if not value} == wrong


def fake_sweep(kernel: str, first: int, count: int) -> tuple[int, int]:
    """A kernel that is wrong at one number of each run, the last: by 2^-10 of 4 at 4, by less elsewhere."""
    last = first + count - 1
    error = 2.0**-10 if read_record(last)[1] == 4.0 else 2.0**-12

    def record(value: float) -> int:
        return int(struct.unpack("<I", struct.pack("<f", value))[0]) << 32 | last

    return record(4 * error), record(error)


def test_the_worst_of_all_spans_is_reported_with_its_place() -> None:
    spans = ((1.0, 4.0), (-1.0, -8.0))
    domain = Domain(function="f", kernel="f", where="", spans=spans, metric="relative", declared=("F", 2.0**-11))
    worst = elementary.worst(domain, fake_sweep)
    assert worst == Worst(absolute=2.0**-8, absolute_at=4.0, relative=2.0**-10, relative_at=4.0)
    constants = verdict.of_function(domain, worst)
    assert (constants[0].measured, constants[0].declared_holds, constants[1].measured) == (2.0**-10, False, 2.0**-8)
    healthy = replace(domain, declared=("F", 2.0**-10))
    assert verdict.of_function(healthy, worst)[0].declared_holds is True
    absolute = verdict.of_function(replace(domain, metric="absolute", declared=None), worst)
    assert (absolute[0].measured, absolute[0].declared_holds) == (2.0**-8, None)


def test_bit_patterns_count_every_number_of_a_span() -> None:
    assert bit_patterns(1.0, 2.0) == (0x3F800000, 2**23 + 1)
    assert bit_patterns(-1.0, -1.0) == (0xBF800000, 1)
    for span in ((-1.0, 1.0), (2.0, 1.0), (-2.0, -1.0)):
        with pytest.raises(ValueError, match="no run of bit patterns"):
            bit_patterns(*span)
    assert all(bit_patterns(*span)[1] > 2**23 for domain in elementary.DOMAINS for span in domain.spans)


def test_the_declared_constants_of_functions_are_those_of_the_model() -> None:
    declared = dict(domain.declared for domain in elementary.DOMAINS if domain.declared is not None)
    assert declared == {"EX2_APPROX": EX2_APPROX, "TANH_APPROX": TANH_APPROX}


def emulated_subject(model: AccModel) -> Subject:
    return Subject(name="emulated", operand=BF16, declared=model, product=product_of(TENSOR_CORE_16BIT))


def test_a_run_reports_what_it_measured_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    # All products for the sake of the diagonal's would take a CPU too long.
    monkeypatch.setattr(subjects, "diagonal", lambda product, device: TENSOR_CORE_16BIT)

    def broken(section: calibrate.Section) -> None:
        section.facts["before"] = math.inf
        raise RuntimeError("NVRTC could not compile:\nmore")

    right = calibrate.run("right", calibrate.accumulator(emulated_subject(WGMMA_16BIT), "cpu"))
    wrong = calibrate.run("wrong", calibrate.accumulator(emulated_subject(AccModel(24, "rne", 32)), "cpu"))
    failed = calibrate.run("failed", broken)
    assert right.error is None
    assert calibrate.exit_code([right]) == 0
    assert calibrate.exit_code([right, failed]) == 2
    assert calibrate.exit_code([right, failed, wrong]) == 1
    assert calibrate.exit_code([]) == 2  # nothing was contradicted because nothing was compared
    assert "| wrong | k_step | 16 | 32 | **NO** |  |" in list(calibrate.table_rows(wrong))
    assert "| right | k_step | 16 | 16 | yes |  |" in list(calibrate.table_rows(right))
    message = "RuntimeError: NVRTC could not compile:"
    assert list(calibrate.table_rows(failed)) == [f"| failed | **not run** |  |  |  | {message} |"]
    assert calibrate.table_row("|x| <= pi", "a") == r"| \|x\| <= pi | a |"
    text = json.loads(calibrate.to_json({"sections": [asdict(section) for section in (right, failed)]}))
    assert text["sections"][0]["constants"][0] == {
        "name": "bits",
        "measured": 24,
        "declared": 24,
        "declared_holds": True,
        "note": "",
    }
    assert (text["sections"][1]["facts"], text["sections"][1]["error"][:12]) == ({"before": "inf"}, "RuntimeError")


@pytest.mark.parametrize(
    ("pointer", "block_m", "imprecise", "instruction"),
    [
        ("bf16", 64, None, "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"),
        ("fp16", 64, None, "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16"),
        ("bf16", 16, None, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("fp8e4nv", 64, None, "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"),
        ("fp8e4nv", 64, 64, "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"),
    ],
)
def test_triton_multiplies_with_the_instruction_that_is_meant(
    pointer: str, block_m: int, imprecise: int | None, instruction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton warns
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.calibration.triton_dot import dot_kernel

    constants = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 128, "IMPRECISE": imprecise}
    signature = {"a_ptr": f"*{pointer}", "b_ptr": f"*{pointer}", "c_ptr": "*fp32", "k": "i32"}
    source = ASTSource(dot_kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert multiply_instructions(compiled.asm["ptx"]) == {instruction}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("file", ["dot.cu", "elementary.cu"])
def test_cuda_sources_compile_and_hold_the_kernels(file: str, tmp_path: Path) -> None:
    source, ptx = Path(cuda.__file__).parent / file, tmp_path / "out.ptx"
    subprocess.run(["nvcc", "-arch=sm_90a", "-ptx", "-o", ptx, source], check=True)
    kernels = {"fma_product"} if file == "dot.cu" else {domain.kernel for domain in elementary.DOMAINS}
    assert set(re.findall(r"\.entry (\w+)", ptx.read_text())) == kernels
    if file == "elementary.cu":
        instructions = {domain.function for domain in elementary.DOMAINS if not domain.function.startswith("__")}
        assert all(f"{instruction} " in ptx.read_text() for instruction in instructions)
