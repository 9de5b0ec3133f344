"""The operator ``single_prefill``: the queries of one request attend to its keys, without any table.

``q`` [qo_len, q_heads, d], ``k`` and ``v`` [kv_len, kv_heads, d]; ``out`` as ``q``, ``lse`` [qo_len, q_heads].
Otherwise as paged prefill.
"""

from __future__ import annotations

from ._cases import COMMON, Kind
from ._dense import Layout, dense_operator

# Few, because each is a module of its own, which no other operator shares; what needs none is fp32.
KINDS = {COMMON: 8, Kind(dtype="float16", head_dim=64): 1, Kind(dtype="float32", head_dim=64): 2}
LAYOUT = Layout(batched=False)
single_prefill = dense_operator("single_prefill", LAYOUT, KINDS)
