"""One pass over memory between the products of a model's layers, wherever a layer computes what ``ops.layers`` does."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from codeact.ops.layers import fusable, rms_norm, rotate, silu_multiply
from codeact.ops.layers_reference import rotate_reference

_ROTARY = "apply_rotary_pos_emb"


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """While it lasts, RMSNorm, SiLU x gate and rotary embedding take one pass over memory each.

    A module is replaced if it gives on random input what its replacement gives; whatever differs (another activation,
    weights of 1 + w, rotary embedding of a part of a head) stays as it is. With gradients on a GPU only: on the CPU
    what asks for them goes the model's own way.
    """
    changed: list[nn.Module] = []
    rotaries: dict[types.ModuleType, Any] = {}
    try:
        for module in model.modules():
            forward = None if "forward" in module.__dict__ else _norm(module) or _mlp(module)
            if forward is not None:
                setattr(module, "forward", forward)  # noqa: B010 - of this one module
                changed.append(module)
        names = {type(module).__module__ for module in model.modules()}
        for home in (sys.modules[name] for name in names & sys.modules.keys()):
            plain = getattr(home, _ROTARY, None)
            if plain is not None and _rotates_plainly(plain):
                rotaries[home] = plain
                setattr(home, _ROTARY, _fused_rotary(plain))
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]
        for home, plain in rotaries.items():
            setattr(home, _ROTARY, plain)


def _agree(plain: Callable[[], Any], fused: Callable[[], Any], tolerance: float) -> bool:
    """Whether two computations give the same tensors."""
    try:
        with torch.no_grad():
            pairs = list(zip(plain(), fused(), strict=True))
        return all(
            one.shape == other.shape and torch.allclose(one, other, tolerance, tolerance * float(one.abs().max()))
            for one, other in pairs
        )
    except Exception:  # a module of the same parts that takes or gives something else
        return False


def _norm(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The forward of an RMSNorm."""
    weight: Any = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names, plain = [name for name, _ in module.named_parameters()], module.forward
    if names != ["weight"] or not isinstance(epsilon, float) or weight.ndim != 1 or list(module.children()):
        return None
    if len(inspect.signature(plain).parameters) != 1:  # some take a gate as well
        return None

    def forward(hidden_states: Tensor) -> Any:
        if fusable(hidden_states, module.weight):
            return rms_norm(hidden_states, module.weight, epsilon)
        return plain(hidden_states)

    return forward if _same(module, forward, weight, weight.shape[-1]) else None


def _mlp(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The forward of an MLP with a gate."""
    children = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= children <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    wide = torch.linspace(-9, 9, 37)  # weights may be so small that activations look alike
    if not _agree(lambda: [module.act_fn(wide)], lambda: [torch.nn.functional.silu(wide)], 1e-6):
        return None
    plain = module.forward
    weight: Any = getattr(module.gate_proj, "weight", None)

    def forward(x: Tensor) -> Any:
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(silu_multiply(gate, up)) if fusable(gate, up) else plain(x)

    fits = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    return forward if fits and _same(module, forward, weight, weight.shape[1]) else None


def _fused_rotary(plain: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> Any:
        whole = q.ndim == 4 and q.shape[0] == 1 and q.shape[2:] == k.shape[2:] == cos.shape[1:] == sin.shape[1:]
        if more or options or not whole or not fusable(q, k, cos, sin):
            return plain(q, k, cos, sin, *more, **options)
        return rotate(q[0], cos[0], sin[0])[None], rotate(k[0], cos[0], sin[0])[None]

    return apply_rotary_pos_emb


@functools.cache
def _rotates_plainly(plain: Callable[..., Any]) -> bool:
    """Whether a function for rotary embeddings is that of Llama."""
    if list(inspect.signature(plain).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    random = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=random) for shape in ((1, 3, 5, 8), (1, 1, 5, 8), *[(1, 5, 8)] * 2))
    return _agree(lambda: plain(q, k, cos, sin), lambda: [rotate_reference(t, cos[0], sin[0]) for t in (q, k)], 1e-6)


def _same(module: nn.Module, fused: Callable[[Tensor], Tensor], like: Tensor, width: int) -> bool:
    """Whether a module and its replacement give the same for random rows, but for the order of sums; tried once."""
    if not fusable(like.detach()):
        return False
    known, key = module.__dict__.setdefault("_codeact_fusable", {}), (like.device.type, like.dtype)
    if key not in known:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, width, generator=random).to(like.device, like.dtype)
        known[key] = _agree(lambda: [module(x)], lambda: [fused(x)], 4 * torch.finfo(like.dtype).eps)
    return bool(known[key])
