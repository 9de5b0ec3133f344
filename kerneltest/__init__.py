"""kerneltest: a pytest plugin that hunts the bugs in GPU kernels that ``allclose`` cannot see.

This module stays empty on purpose: pytest imports it at every start, in projects that never hunt a kernel.
What the authors of suites need is in :mod:`kerneltest.model`.
"""

__version__ = "0.1.0"
