"""The operator ``single_prefill``: the queries of one request attend to its keys, without any table.

``q`` [qo_len, q_heads, d], ``k`` [kv_len, kv_heads, d], ``v`` [kv_len, kv_heads, d_v]; ``out`` [qo_len, q_heads, d_v],
``lse`` [qo_len, q_heads]. Otherwise as paged prefill.
"""

from __future__ import annotations

from ._dense import Kind, Layout, dense_operator

KINDS = (
    *[Kind(dtype="bfloat16", head_dim=128)] * 8,
    Kind(dtype="float16", head_dim=64),
    Kind(dtype="bfloat16", head_dim=192, head_dim_vo=128),
)
LAYOUT = Layout(batched=False)
single_prefill = dense_operator("single_prefill", LAYOUT, KINDS)
