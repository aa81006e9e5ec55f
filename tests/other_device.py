"""A device of torch that is not the CPU but computed by it. A kernel that gets tensors of both fails, as on a GPU.

torch keeps one name for devices from outside (PrivateUse1). Here it is `other`, with kernels in Python: each takes the
tensors' contents, which are the CPU's, and calls the CPU's kernel. The registration holds for the whole process, so a
test runs in one of its own.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "other"
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
# Kernels that may read two devices: copies, and those with indices, which CUDA takes from the CPU, too.
MIXING = (*COPIES, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
GROWING = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default)


class OtherTensor(Tensor):
    """A tensor on the device; `contents` are on the CPU."""

    contents: Tensor

    @staticmethod
    def __new__(cls, contents: Tensor) -> "OtherTensor":
        layout = {"strides": contents.stride(), "storage_offset": contents.storage_offset(), "dtype": contents.dtype}
        self: OtherTensor = cls._make_wrapper_subclass(cls, contents.size(), device=torch.device(NAME, 0), **layout)
        self.contents = contents
        return self

    @classmethod
    def __torch_dispatch__(cls, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(kernel, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        """torch has none for tensors of another class."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.contents!r} on {NAME}"


def call(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute on the CPU what a kernel of the device would.

    Raises:
        RuntimeError: tensors are on two devices. (A number in a tensor of no dimension may be on the CPU, as for CUDA.)
    """
    if kernel.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
        return kernel.decompose(*args, **kwargs)  # in inference mode torch leaves that to the device
    tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
    there = [one for one in tensors if isinstance(one, OtherTensor)]
    strays = [tuple(one.shape) for one in tensors if one.dim() and not isinstance(one, OtherTensor)]
    if there and strays and kernel not in MIXING:
        raise RuntimeError(f"{kernel}: tensors of these shapes are on the CPU, others on the device: {strays}")
    asked = kwargs.get("device")
    stays = torch.device(asked).type == NAME if asked is not None else bool(there)
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    found = kernel(*inner(args), **inner(kwargs))
    if kernel is aten.copy_.default:
        return args[0]
    # What a kernel computed in place is the same tensor as before.
    own = {id(one.contents): one for one in there}
    resized = [tuple(one.shape) for one in there if one.shape != one.contents.shape]
    assert not resized, f"{kernel} changes the size of a tensor: GROWING must have the kernel that calls it"
    return (
        tree_map_only(Tensor, lambda one: own[id(one)] if id(one) in own else OtherTensor(one), found)
        if stays
        else found
    )


def inner(arguments: Any) -> Any:
    return tree_map_only(OtherTensor, lambda one: one.contents, arguments)


class Module(_DummyBackendModule):
    """What torch asks of `torch.other`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> list[torch.library.Library]:
    """Make the device known. It is known as long as what is returned is held."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(call, "PrivateUse1")
    # torch's own forms of these call kernels that Python does not have, or make a tensor larger in place.
    for kernel in (*COPIES, *GROWING):
        some.impl(kernel, partial(call, kernel), "PrivateUse1")
    return [every, some]
