"""Tensors at a place in host memory that somebody else owns: plain ones, and weights in oneDNN's form.

oneDNN's form has no strides; what is where in it is said by its metadata, some hundred bytes, equal for equal shapes.
torch has no Python call that makes such a tensor over given bytes: its C interface (aoti_torch) has.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.worker.memory import Bytes
from shared.errors import ModelError


def content(tensor: torch.Tensor) -> Bytes:
    """The bytes of a contiguous tensor in host memory, plain or in oneDNN's form: a view, valid while it lives."""
    if tensor.is_mkldnn:
        address, size = torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    else:
        address, size = tensor.data_ptr(), tensor.nbytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def metadata(packed: torch.Tensor) -> bytes:
    """What oneDNN says of the order of a packed tensor's bytes."""
    of: torch.Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    return of.numpy().tobytes()


def placed(memory: Bytes, shape: Sequence[int], dtype: torch.dtype, form: bytes = b"") -> torch.Tensor:
    """A tensor whose bytes are the first of `memory`, which must outlive it and may be read-only.

    `form`: metadata of oneDNN's form; without it the tensor is plain and contiguous.
    """
    count, least = len(shape), math.prod(shape) * dtype.itemsize
    if len(memory) < least:
        raise ModelError(f"a tensor of {least} bytes does not fit into {len(memory)}")
    sizes = (ctypes.c_int64 * count)(*shape)
    strides = (ctypes.c_int64 * count)(*(math.prod(shape[at + 1 :]) for at in range(count)))
    handle, library = ctypes.c_void_p(), _library()
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(memory.ctypes.data),
        ctypes.c_int64(count),
        sizes,
        strides,
        ctypes.c_int64(0),
        getattr(library, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")(),
        library.aoti_torch_device_type_cpu(),
        0,
        ctypes.byref(handle),
        library.aoti_torch_layout__mkldnn() if form else library.aoti_torch_layout_strided(),
        ctypes.c_char_p(form),
        ctypes.c_int64(len(form)),
    )
    if failed:
        raise ModelError(f"torch can't make a tensor of shape {tuple(shape)} over given memory")
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    tensor: torch.Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(handle, None, None))
    return tensor


@cache
def _library() -> Any:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
