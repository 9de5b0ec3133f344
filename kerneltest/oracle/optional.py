"""What the oracle uses where it is installed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; without it a GPU does the same work in more passes."""
    return find_spec("triton") is not None
