"""The operator ``single_decode``: the one new query of one request attends to its keys.

``q`` [q_heads, d], ``k`` and ``v`` [kv_len, kv_heads, d]; ``out`` [q_heads, d], ``lse`` [q_heads]. Otherwise as paged
prefill.
"""

from __future__ import annotations

from ._dense import Kind, Layout, dense_operator

KINDS = (*[Kind(dtype="bfloat16", head_dim=128)] * 8, Kind(dtype="float16", head_dim=64))
LAYOUT = Layout(batched=False, rows=False)
single_decode = dense_operator("single_decode", LAYOUT, KINDS)
