"""A CUDA device made of CPU tensors: what is "on" it says so, computes the right numbers, and mixes with nothing.

Inside ``MockCuda()`` tensors made on, or moved to, "cuda:0" are wrappers around CPU tensors. It raises where a device
would, when an operation mixes CPU and device tensors; and where a device would silently wait for its queue, when the
host wants a value of it. The kernels that have no CPU form are put in by hand: attention by its definition, those of
``codeact_kernels`` by Triton's interpreter.
"""

from __future__ import annotations

import itertools
import os
from typing import Any
from unittest import mock

import codeact_kernels.layers
import codeact_kernels.linear_nll
import codeact_kernels.loss_slope
import codeact_kernels.segments  # noqa: F401  # registers the operators
import torch
import torch.nn.attention.varlen  # registers torch_attn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from transformers import masking_utils

_FIND_PACKED = masking_utils.find_packed_sequence_indices
CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
aten = torch.ops.aten


class HiddenSyncError(AssertionError):
    """The host would wait for the device here."""


class WrongDeviceError(AssertionError):
    """An operation got a tensor of the device and one of the host."""


class OnDevice(Tensor):
    """A tensor that says it is on cuda:0 and keeps its values in ``inner`` on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("meta"),  # what C++ sees: a CPU build has no guard for the device "cuda"
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def tolist(self) -> Any:
        raise HiddenSyncError("tolist")

    def __repr__(self) -> str:
        return f"OnDevice({tuple(self.inner.shape)}, {self.inner.dtype})"


# Operators whose result has a size, or is a Python number, that only the values tell.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}


def unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def wrap(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) and not isinstance(value, OnDevice) else value


def _attention(q, k, v, bounds_q, bounds_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *_):
    """``torch.nn.attention.varlen`` by its definition, for the causal case with a full window."""
    assert q.dtype in (torch.bfloat16, torch.float16), f"flash attention has no {q.dtype}"
    assert {k.dtype, v.dtype} == {q.dtype}
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert list(window_size) == [-1, 0], "not causal"
    assert max_q == max_k == int(bounds_q.diff().max())
    parts = []
    for start, end in itertools.pairwise(bounds_q.tolist()):
        heads = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
        part = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts), q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.uint64)


def _addmm(total, first, second, out_dtype, *, beta=1, alpha=1, out):
    """``torch.addmm(out_dtype=, out=)`` with the refusals of PyTorch's CUDA and ROCm libraries; the CPU has none."""
    half = (torch.bfloat16, torch.float16)
    assert first.dtype == second.dtype, "mat1 and mat2 must have the same dtype"
    assert out_dtype == first.dtype or (out_dtype == torch.float32 and first.dtype in half)
    assert out.dtype == out_dtype, "out_dtype must be the same as the dtype of the provided out tensor"
    assert total.dtype in (out_dtype, first.dtype), "self dtype must match either out_dtype or mat1 dtype"
    assert torch.version.hip is None, "gemm input type and output type float is not supported for ROCm"
    return out.copy_(beta * total + alpha * (first.float() @ second.float()))


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on the CPU tensors inside, as a device would; or say why a device would not."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    host = [t for t in tensors if not isinstance(t, OnDevice)]
    if func in _WAITS and not (MockCuda.current and MockCuda.current.inside_transformers):
        raise HiddenSyncError(str(func))
    if func is aten._to_copy.default:
        return _copy(args, kwargs)
    # A tensor of one number may come from the host, as a number would.
    if any(t.ndim for t in host):
        raise WrongDeviceError(
            f"{func} got a tensor {tuple(next(t for t in host if t.ndim).shape)} that is not on {CUDA}"
        )
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
        t is not None and t.dtype == torch.bool for t in args[1]
    ):
        raise HiddenSyncError(f"{func} with a mask: the size of the result is on the device")
    if "device" in kwargs:
        assert kwargs["device"] in (None, CUDA, torch.device("cuda"), torch.device("meta"))
        kwargs = {**kwargs, "device": None}
    inner_args, inner_kwargs = tree_map(unwrap, (args, kwargs))
    if func is torch.ops.torch_attn._varlen_attn.default:
        return tree_map(wrap, _attention(*inner_args, **inner_kwargs))
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if func.namespace == "codeact" else {}):
        run = _addmm if func is aten.addmm.dtype_out else func
        result = tree_map(wrap, run(*inner_args, **inner_kwargs))
    if func.namespace != "aten":
        return result
    return return_and_correct_aliasing(func, args, kwargs, result)


def _copy(args: Any, kwargs: dict[str, Any]) -> Any:
    to = kwargs.get("device")
    source = args[0]
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    if isinstance(source, OnDevice) and to == CPU:
        mode = MockCuda.current
        if mode is None or mode.transfers_allowed < 1:
            raise HiddenSyncError(f"a copy of {tuple(source.shape)} to the host")
        mode.transfers_allowed -= 1
        return aten._to_copy.default(source.inner, **rest)
    if not isinstance(source, OnDevice):
        mode = MockCuda.current
        if not (mode is not None and id(source) in mode.pinned and kwargs.get("non_blocking")):
            raise HiddenSyncError(f"a copy of {tuple(source.shape)} to the device from memory that is not pinned")
    return OnDevice(aten._to_copy.default(unwrap(source), **rest))


class MockCuda(TorchDispatchMode):
    """While it is entered there is a device cuda:0.

    One wait is known and not ours to mend: transformers (5.23, ``find_packed_sequence_indices``) looks at one number in
    every forward pass with position_ids and no mask. It is let through there, and counted in ``transformers_waits``.

    Args:
        transfers_allowed: so many copies from the device to the host may be made.
    """

    current: MockCuda | None = None

    def __init__(self, monkeypatch: Any, transfers_allowed: int = 0) -> None:
        super().__init__()
        self.transfers_allowed = transfers_allowed
        self.pinned: dict[int, Tensor] = {}
        self.seen: list[tuple[Any, Any, Any]] = []
        self.inside_transformers = False
        self.transformers_waits = 0
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", self._let_through)
        # What chooses a backend sees a device; only the kernels know that they are interpreted.
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        monkeypatch.setattr(MockCuda, "current", self)

    def _let_through(self, position_ids: Tensor) -> Tensor | None:
        self.inside_transformers = True
        self.transformers_waits += 1
        try:
            return _FIND_PACKED(position_ids)
        finally:
            self.inside_transformers = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen.append((func, args, kwargs))
        if func is aten.is_pinned.default:
            return id(args[0]) in self.pinned
        # In inference mode the composite operator arrives, elsewhere its part.
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            copy = args[0].clone()
            self.pinned[id(copy)] = copy  # held, so that no other tensor gets its id
            return copy
        # So do others; a device sees their parts.
        with self:
            result = func.decompose(*args, **kwargs) if func.namespace == "aten" else NotImplemented
        if result is not NotImplemented:
            return result
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type in ("cuda", "meta")
        if to_device or any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs))):
            return compute(func, args, kwargs)
        return func(*args, **kwargs)


def move_module(module: torch.nn.Module) -> torch.nn.Module:
    """Put parameters and buffers on the device, in place; tied parameters stay tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = torch.nn.Parameter(OnDevice(parameter.detach()), requires_grad=False)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module
