"""Address space with holes on a CUDA device: the driver's virtual memory management."""

from __future__ import annotations

import torch

from kerneltest.model import Device
from kerneltest.worker.driver import Driver
from kerneltest.worker.pages import NoGuards, Parts, Region


class CudaPages:
    """Memory of one CUDA device, mapped by hand."""

    granule: int
    head: int

    def __init__(self, device: Device) -> None:
        """Raises :class:`NoGuards` where the driver cannot map memory by hand, or cannot be asked to."""
        self._device = device
        try:
            self._driver = Driver(device.ordinal)
        except ImportError as error:
            raise NoGuards(f"guard pages need the package cuda-bindings (extra 'cuda'): {error}") from error
        if not self._driver.attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
            raise NoGuards(f"{device.name} has no virtual memory management, which guard pages need")
        api = self._driver.api
        self._memory = api.CUmemAllocationProp()
        self._memory.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access = api.CUmemAccessDesc()
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for part in (self._memory, self._access):
            part.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            part.location.id = int(self._driver.device)
        least = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granule = int(self._driver.call("cuMemGetAllocationGranularity", self._memory, least))
        # torch, and Triton as well, ask the driver what a tensor's address is.
        self.head = self.granule

    def take(self, span: int, parts: Parts) -> Region:
        call, reserved = self._driver.call, span + 2 * self.granule
        with self._driver.current():
            start = int(call("cuMemAddressReserve", reserved, self.granule, 0, 0)) + self.granule
            mapped: list[tuple[int, int]] = []
            try:
                for begin, end in parts:
                    memory = call("cuMemCreate", end - begin, self._memory, 0)
                    try:
                        call("cuMemMap", start + begin, end - begin, 0, memory, 0)
                    finally:
                        call("cuMemRelease", memory)  # the mapping keeps it
                    mapped.append((begin, end))
                    call("cuMemSetAccess", start + begin, end - begin, [self._access], 1)
                data = torch.as_tensor(_Bytes(start, span), device=self._device.torch_name)
                if data.data_ptr() != start:
                    raise RuntimeError(f"torch copied {span} bytes that it was to use in place")
            except BaseException:
                self._free(start, span, tuple(mapped))
                raise
        return Region(data, parts)

    def drop(self, region: Region) -> None:
        with self._driver.current():
            self._driver.call("cuCtxSynchronize")
            self._free(region.data.data_ptr(), region.data.numel(), region.parts)

    def _free(self, start: int, span: int, parts: Parts) -> None:
        for begin, end in parts:
            self._driver.call("cuMemUnmap", start + begin, end - begin)
        self._driver.call("cuMemAddressFree", start - self.granule, span + 2 * self.granule)


class _Bytes:
    """Memory in the form that torch takes it over without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }
