"""Attention and other functions of torch, by functions that a file has and whose form in it is right."""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph.symbolic import evaluate


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns what ``module(query, key, value, ...)`` returns in evaluation mode; GraphError for unsupported forms."""
    if module.bias_k is not None or module.add_zero_attn or query.dim() != 3:
        raise GraphError('expected attention over batches without added keys')
    heads, width = module.num_heads, module.head_dim
    q, k, v = (
        x.reshape(x.shape[0], x.shape[1], heads, width).transpose(1, 2)
        for x in (p if module.batch_first else p.transpose(0, 1) for p in _projections(module, query, key, value))
    )
    mask = None if attn_mask is None else _additive(attn_mask, q)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q)[:, None, None]
        mask = padding if mask is None else mask + padding
    weights = None
    if need_weights:
        scores = (q * width**-0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.transpose(1, 2)
    out = module.out_proj(out.reshape(out.shape[0], out.shape[1], heads * width))
    return out if module.batch_first else out.transpose(0, 1), weights


def write_out_attention(graph: fx.Graph, most: float = math.inf) -> None:
    """Replaces every fused attention by its two products and the softmax between them, where it needs no more.

    One of more than ``most`` scores for an image stays as it is.
    """
    for node in list(graph.nodes):
        if node.target is not F.scaled_dot_product_attention:
            continue
        names = ('query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal', 'scale', 'enable_gqa')
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        query, key, value, mask = given['query'], given['key'], given['value'], given.get('attn_mask')
        adds = mask is None or mask.meta['example'].is_floating_point()
        shape, keys = query.meta['example'].shape, key.meta['example'].shape[-2]
        if given.get('is_causal') or given.get('enable_gqa') or not adds or math.prod(shape[1:-1]) * keys > most:
            continue
        scale = given.get('scale')
        factor = shape[-1] ** -0.5 if scale is None else scale
        with graph.inserting_before(node):
            scaled = _call(node, torch.mul, query, factor)
            scores = _call(node, torch.matmul, scaled, _call(node, torch.transpose, key, -2, -1))
            if mask is not None:
                scores = _call(node, torch.add, scores, mask)
            result = _call(node, torch.matmul, _call(node, torch.softmax, scores, -1), value)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _call(attention: fx.Node, function: Any, *args: Any) -> fx.Node:
    """Inserts a call that belongs to the module of ``attention``."""
    node = attention.graph.call_function(function, args)
    node.meta.update({key: value for key, value in attention.meta.items() if key != 'example'})
    node.meta['example'] = evaluate(node)
    return node


def _projections(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
    if module._qkv_same_embed_dim and query is key and key is value:
        return F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    if module._qkv_same_embed_dim:
        parts = module.in_proj_weight.chunk(3)
    else:
        parts = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True)]


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    """Returns a mask as numbers to add to the scores ``(N, heads, L, S)``; ``(N * heads, L, S)`` gets their shape."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)
    return mask.reshape(q.shape[0], q.shape[1], mask.shape[1], mask.shape[2]) if mask.dim() == 3 else mask


def spaced(start: Any, end: Any, steps: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """Returns what ``torch.linspace`` does; its own form in a file divides by zero for a single step."""
    number = torch.arange(steps, dtype=dtype, device=device)
    return number / number[-1:].clamp(min=1) * (end - start) + start


def unfold(input: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Returns the windows along an axis that the method of torch does, by an index; a file has no form for it."""
    dim %= input.dim()
    count = (input.shape[dim] - size) // step + 1
    index = torch.arange(count, device=input.device)[:, None] * step + torch.arange(size, device=input.device)
    windows = input.index_select(dim, index.flatten())
    return windows.reshape(*input.shape[:dim], count, size, *input.shape[dim + 1 :]).movedim(dim + 1, -1)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Returns what the function of torch does; its own form in a file has a branch."""
    channels = input.shape[1]
    squares = F.pad(input.square(), [0, 0] * (input.dim() - 2) + [size // 2, (size - 1) // 2])
    power = sum((squares[:, i : i + channels] for i in range(1, size)), squares[:, :channels])
    return input / (power * (alpha / size) + k) ** beta


def computing_in_torch() -> AbstractContextManager[object]:
    """Makes mmcv's deformable attention compute as on a CPU, by functions of torch; no file has its kernel of a GPU."""
    module, name = sys.modules.get('mmcv.ops.multi_scale_deform_attn'), 'IS_CUDA_AVAILABLE'
    return patch.object(module, name, False) if hasattr(module, name) else nullcontext()
