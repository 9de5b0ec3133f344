"""The operator ``ragged_prefill``: a batch of requests attends to keys that lie one after another in one tensor.

``q`` [total_qo, q_heads, d], ``k`` [total_kv, kv_heads, d], ``v`` [total_kv, kv_heads, d_v], int32 ``qo_indptr`` and
``kv_indptr`` [batch + 1]; ``out`` [total_qo, q_heads, d_v], ``lse`` [total_qo, q_heads]. Otherwise as paged prefill.
"""

from __future__ import annotations

from ._dense import OF_SEVERAL_REQUESTS, RELATIONS, Kind, Layout, dense_operator

# Each is another module to compile; 192 and 128 are the dimensions of DeepSeek's prefill, not absorbed.
KINDS = (
    *[Kind(dtype="bfloat16", head_dim=128)] * 6,
    Kind(dtype="bfloat16", head_dim=64),
    Kind(dtype="bfloat16", head_dim=256),
    Kind(dtype="float16", head_dim=128),
    Kind(dtype="bfloat16", head_dim=192, head_dim_vo=128),
)
LAYOUT = Layout(batched=True)
ragged_prefill = dense_operator("ragged_prefill", LAYOUT, KINDS, (*RELATIONS, *OF_SEVERAL_REQUESTS))
