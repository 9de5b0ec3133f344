"""On-chip poison is really there: it is read back, and a different word is not."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kerneltest.worker import driver, onchip  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def chip() -> onchip.OnChip:
    return onchip.OnChip(torch.cuda.current_device())


@pytest.fixture(params=["default", "side"])
def stream(request: pytest.FixtureRequest) -> int:
    """Raw handle of the default stream and of another one."""
    if request.param == "default":
        return int(torch.cuda.default_stream().cuda_stream)
    return int(torch.cuda.Stream().cuda_stream)


def test_limits_are_those_of_the_device(chip: onchip.OnChip) -> None:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    assert chip.sm_count == properties.multi_processor_count
    assert chip.shared_bytes == properties.shared_memory_per_block_optin


@pytest.mark.parametrize("word", [0xFFFFFFFF, 0x3F3F3F3F, 0])
def test_fill_covers_all_shared_memory(chip: onchip.OnChip, stream: int, word: int) -> None:
    assert chip.shared_coverage(word, stream) == 1.0


def test_shared_memory_holds_no_other_word(chip: onchip.OnChip, stream: int) -> None:
    records = chip._empty(2 * chip.sm_count, 2)
    chip.fill_shared(0xFFFFFFFF, stream)
    assert chip._read_shared(0x3F3F3F3F, stream, records) == 0.0
    assert chip._read_shared(0xFFFFFFFF, stream, records) == 1.0  # reading changes nothing


def test_fill_leaves_current_device_and_results_alone(chip: onchip.OnChip) -> None:
    before = torch.arange(1 << 16, device="cuda")
    chip.fill_shared(0xFFFFFFFF, torch.cuda.current_stream().cuda_stream)
    chip.fill_registers(0xFFFFFFFF, torch.cuda.current_stream().cuda_stream)
    assert torch.equal((before + 1).cpu(), torch.arange(1, (1 << 16) + 1))
    assert torch.cuda.current_device() == before.device.index


def test_registers_hold_the_word_rather_than_another(chip: onchip.OnChip, stream: int) -> None:
    word, other = 0x5A5A5A5A, 0x3C3C3C3C
    share = chip.register_coverage(word, stream)
    values = chip._empty(chip.sm_count, onchip._PROBED, onchip._REGISTER_THREADS)
    chip.fill_registers(other, stream)
    assert 0.0 <= share <= 1.0
    assert chip._read_registers(word, stream, values) < share


@pytest.mark.parametrize("word", [-1, 1 << 32])
def test_word_must_be_unsigned_32_bit(chip: onchip.OnChip, word: int) -> None:
    with pytest.raises(ValueError, match="32-bit"):
        chip.fill_shared(word, 0)


def test_compile_error_carries_the_log() -> None:
    with pytest.raises(RuntimeError, match="no_such_type"):
        driver.compile_source("__global__ void broken(no_such_type *p) {}", "sm_90")
