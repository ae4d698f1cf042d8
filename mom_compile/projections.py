"""What the three forms of the layer share: routing, gates and the head constants."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import route, small_linear

if TYPE_CHECKING:
    from .mom_attention import MoMAttention


class Routing(NamedTuple):
    """``weights`` ``[B, T, k]`` float32, ``indices`` ``[B, T, k]`` int64, ``logits`` ``[B, T, M]`` float32 or None."""

    weights: Tensor
    indices: Tensor
    logits: Tensor | None


class Gates(NamedTuple):
    """Per token and projection group, ``[B, T, G, HV]`` float32; None where the rule has none."""

    g: Tensor | None
    beta: Tensor | None
    dt: Tensor | None  # multiplies v


class SmallProducts(NamedTuple):
    """Projections in float32: ``logits`` ``[B, T, M]``, ``b`` and ``a`` ``[B, T, G, HV]``; None where there is none."""

    logits: Tensor | None
    b: Tensor | None
    a: Tensor | None


def small_weights(layer: MoMAttention) -> list[Tensor]:
    """The weights of :class:`SmallProducts` in its order, ``[n, D]`` each."""
    weights = [layer.router.weight] if layer.custom_router is None else []
    weights += [layer.b_proj.flatten(0, 1)] if layer.rule.delta else []
    return weights + ([layer.a_proj.flatten(0, 1)] if layer.rule.gate == "scalar" else [])


def small_products(layer: MoMAttention, x: Tensor, packed: bool = False) -> SmallProducts:
    """Router, beta and decay of every token as one float32 product, also under autocast.

    ``packed``: through ``mom::small_linear`` where all is bfloat16. It reads x once and makes no float32 copy of it.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = small_weights(layer)
    if not weights:
        return SmallProducts(None, None, None)
    if packed and all(each.dtype == torch.bfloat16 for each in (x, *weights)):
        return split_small(layer, small_linear(x, torch.cat(weights)))
    weight = torch.cat([w.to(dtype) for w in weights])
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            small = F.linear(x.to(dtype), weight)
    else:
        small = F.linear(x.to(dtype), weight)
    return split_small(layer, small)


def split_small(layer: MoMAttention, small: Tensor) -> SmallProducts:
    """``[B, T, n]``, the product with :func:`small_weights`, in its parts."""
    groups = layer.kv_proj.shape[0]
    parts = list(small.split([w.shape[0] for w in small_weights(layer)], -1))
    logits = parts.pop(0) if layer.custom_router is None else None
    # torch.unflatten throughout: Dynamo of torch 2.11 cannot trace the method under torch.set_default_device.
    b = torch.unflatten(parts.pop(0), -1, (groups, -1)) if layer.rule.delta else None
    a = torch.unflatten(parts.pop(0), -1, (groups, -1)) if layer.rule.gate == "scalar" else None
    return SmallProducts(logits, b, a)


def custom_routing(layer: MoMAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and indices ``[B, T, k]`` of the layer's own router, checked."""
    assert layer.custom_router is not None
    weights, indices = layer.custom_router(x)
    expected = (*x.shape[:2], layer.config.topk)
    if tuple(weights.shape) != expected or tuple(indices.shape) != expected:
        raise ValueError(
            f"router must return weights and indices of shape [B, T, k] = {expected}, got "
            f"{tuple(weights.shape)} and {tuple(indices.shape)}; select topk memories for each token"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return weights.to(dtype), indices.long()


def route_and_gate(
    layer: MoMAttention, x: Tensor, router_indices: Tensor | None, packed: bool = False
) -> tuple[Routing, Gates]:
    """Routing and gates of every token; ``packed`` as for :func:`small_products`."""
    rule = layer.rule
    logits, b, a = small_products(layer, x, packed)
    beta = None if b is None else b.sigmoid()
    g = dt = None
    if a is not None:
        dt = F.softplus(a + layer.dt_bias.to(a.dtype))
        g = -layer.A_log.to(a.dtype).exp() * dt
    gates = Gates(g, beta, dt if rule.name == "mamba2" else None)

    if logits is None:
        return Routing(*custom_routing(layer, x), None), gates
    if router_indices is not None:
        chosen = torch.softmax(logits.gather(-1, router_indices), -1)
        return Routing(chosen, router_indices, logits), gates
    selected, indices = route(logits, layer.config.topk)
    return Routing(selected, indices, logits), gates


def convolution_blocks(key_size: int, value_size: int, groups: int, memories: int, device: torch.device) -> Tensor:
    """Where each memory's q, k and v lie in ``[q, k and v of each group]``, ``[M', blocks]`` int64.

    Everything is counted in blocks of gcd(key_size, value_size) channels, so that one gather of blocks gives all.
    """
    unit = math.gcd(key_size, value_size)
    keys, others = key_size // unit, (key_size + value_size) // unit
    group = torch.arange(memories, device=device).unsqueeze(1) * int(groups > 1)
    q = torch.arange(keys, device=device).expand(memories, keys)
    return torch.cat([q, keys + group * others + torch.arange(others, device=device)], 1)


def retention_gate(value_heads: int, device: torch.device) -> Tensor:
    """``log(1 - 2^(-5-h))`` ``[HV]`` float32. Source: RetNet (arXiv 2307.08621) section 3.1."""
    exponent = torch.arange(value_heads, device=device, dtype=torch.float32) + 5
    return torch.log1p(-torch.exp2(-exponent))


def memory_group_bounds(layer: MoMAttention, group_offset: Tensor) -> Tensor:
    """Row bounds of the projection groups from those of the memories: one group for all with ``single_kv_proj``."""
    if layer.config.single_kv_proj:
        return torch.stack([group_offset[0], group_offset[-1]])
    return group_offset
