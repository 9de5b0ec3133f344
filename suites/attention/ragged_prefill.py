"""The operator ``ragged_prefill``: a batch of requests attends to keys that lie one after another in one tensor.

``q`` [total_qo, q_heads, d], ``k`` [total_kv, kv_heads, d], ``v`` [total_kv, kv_heads, d_v], int32 ``qo_indptr`` and
``kv_indptr`` [batch + 1]; ``out`` [total_qo, q_heads, d_v], ``lse`` [total_qo, q_heads]. Otherwise as paged prefill,
whose modules some libraries use for it.
"""

from __future__ import annotations

from ._dense import OF_SEVERAL_REQUESTS, RELATIONS, Layout, dense_operator

LAYOUT = Layout(batched=True)
ragged_prefill = dense_operator("ragged_prefill", LAYOUT, relations=(*RELATIONS, *OF_SEVERAL_REQUESTS))
