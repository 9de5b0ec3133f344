"""The operator ``single_decode``: the one new query of one request attends to its keys.

``q`` [q_heads, d], ``k`` and ``v`` [kv_len, kv_heads, d]; ``out`` as ``q``, ``lse`` [q_heads]. Otherwise as paged
prefill.
"""

from __future__ import annotations

from ._dense import Layout, dense_operator
from .single_prefill import KINDS

LAYOUT = Layout(batched=False, rows=False)
single_decode = dense_operator("single_decode", LAYOUT, KINDS)
