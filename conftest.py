"""For the tests of kerneltest itself: what needs a GPU is skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Asked of the driver's files: to ask torch would import it into a process that must stay free of it.
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
