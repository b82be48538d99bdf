"""Fused attention functions, and sums with a product, written out in operators that can be quantized one by one.

To a function mode `scaled_dot_product_attention` and `multi_head_attention_forward` are one call each. A prepared
model computes them as the device does: projections, scaled query times key, mask, softmax, times value. The result
equals torch's to rounding (about 1e-7 in float32), which is why such models are compared within a tolerance.
What is not covered keeps torch's own function and is noted as unknown: learnt key and value biases, static keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def safe_softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax that gives 0 for a row that is masked as a whole, as torch's attention does; one operator to a mode."""
    if has_torch_function_unary(scores):
        out: Tensor = handle_torch_function(safe_softmax, (scores,), scores, dim=dim)
        return out
    hidden = torch.isneginf(scores).all(dim, keepdim=True)
    return torch.softmax(scores, dim).masked_fill(hidden, 0.0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * q k^T + mask) v; q [..., L, E], k and v [..., S, E], as torch's function of the long name."""
    if enable_gqa:
        repeats = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
    softmax = torch.softmax if attn_mask is None else safe_softmax
    weights = softmax(_masked(scores, attn_mask, keep=True), dim=-1)
    return torch.matmul(F.dropout(weights, dropout_p, training=dropout_p > 0.0), value)


def _masked(scores: Tensor, mask: Tensor | None, keep: bool) -> Tensor:
    """Scores with a float mask added, or -inf where a boolean mask is not `keep`."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(torch.logical_not(mask) if keep else mask, float("-inf"))
    return scores + mask


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: None,
    bias_v: None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: None = None,
    static_v: None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Query [L, B, E] (or [L, E]), key and value [S, B, E]; the signature is torch's own."""
    # Long: the signature takes half of the lines.
    batched = query.dim() == 3
    if not batched:
        same = (key is query, value is key)
        query = query.unsqueeze(1)
        key = query if same[0] else key.unsqueeze(1)
        value = key if same[1] else value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    q, k, v = _projections(
        (query, key, value),
        in_proj_weight,
        in_proj_bias,
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
    )
    q, k, v = (t.reshape(t.shape[0], batch * num_heads, width // num_heads).transpose(0, 1) for t in (q, k, v))
    scores = torch.bmm(q * (width // num_heads) ** -0.5, k.transpose(1, 2))
    scores = _masked(scores, attn_mask, keep=False)
    if key_padding_mask is not None:
        padding = key_padding_mask.view(batch, 1, 1, -1).expand(-1, num_heads, -1, -1)
        scores = _masked(scores, padding.reshape(batch * num_heads, 1, -1), keep=False)
    # asked for no weights, torch calls scaled_dot_product_attention
    masked = attn_mask is not None or key_padding_mask is not None
    weights = (safe_softmax if masked and not need_weights else torch.softmax)(scores, dim=-1)
    mixed = torch.bmm(F.dropout(weights, dropout_p, training=training), v)
    out = F.linear(mixed.transpose(0, 1).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    out = out if batched else out.squeeze(1)
    if not need_weights:
        return out, None
    weights = weights.view(batch, num_heads, length, -1)
    weights = weights.mean(dim=1) if average_attn_weights else weights
    return out, weights if batched else weights.squeeze(0)


def _projections(
    inputs: tuple[Tensor, Tensor, Tensor], packed: Tensor | None, bias: Tensor | None, separate: Any
) -> list[Tensor]:
    query, key, value = inputs
    if separate is None and packed is not None and query is key and key is value:
        return list(F.linear(query, packed, bias).chunk(3, dim=-1))
    weights = separate if separate is not None else packed.chunk(3)  # type: ignore[union-attr]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _add_product(
    input: Tensor, *factors: Tensor, beta: float = 1, alpha: float = 1, out: Tensor | None = None, **named: Tensor
) -> Tensor:
    """The sum beta * input + alpha * (left @ right): addmm, baddbmm, addmv; only the names of the factors differ."""
    left, right = (*factors, *(named[name] for name in _FACTORS if name in named))
    result = torch.matmul(left, right)
    result = result if alpha == 1 else result * alpha
    if beta != 0:
        result = result + (input if beta == 1 else input * beta)
    return result if out is None else out.copy_(result)


def _any(args: Any, kwargs: Any) -> bool:
    return True


def _plain_heads(args: Any, kwargs: Any) -> bool:
    learnt = (*args[7:9], *(kwargs.get(name) for name in ("bias_k", "bias_v", "static_k", "static_v")))
    add_zero = args[9] if len(args) > 9 else kwargs.get("add_zero_attn", False)
    return all(value is None for value in learnt) and not add_zero


_FACTORS = ("mat1", "mat", "batch1", "mat2", "vec", "batch2")
_PARTS: dict[Any, tuple[Callable[..., bool], Callable[..., Any]]] = {
    F.scaled_dot_product_attention: (_any, attention),
    F.multi_head_attention_forward: (_plain_heads, multi_head_attention),
    **{
        getattr(owner, name): (_any, _add_product)
        for owner in (torch, Tensor)
        for name in ("addmm", "baddbmm", "addmv")
    },
}


def decomposition(function: Any, args: Any, kwargs: Any) -> Callable[..., Any] | None:
    """The function written out, or None where torch's own is one operator (or is not covered)."""
    found = _PARTS.get(function)
    return found[1] if found is not None and found[0](args, kwargs) else None
