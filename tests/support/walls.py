"""Memory that ends where a page begins that cannot be touched: a kernel that reads or writes beyond it ends the process."""

import ctypes
import mmap

import numpy as np
import pytest
import torch

needs_walls = pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs a page that may not be read")


def before_a_wall(tensor):
    """A copy of a tensor that ends where unreadable memory begins."""
    size, page = max(tensor.nbytes, 1), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    array = np.frombuffer(memory, np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(array.ctypes.data + pages * page), ctypes.c_size_t(page), 0) == 0
    flat = torch.from_numpy(array[pages * page - tensor.nbytes : pages * page]).view(tensor.dtype)
    return flat.view(tensor.shape).copy_(tensor)
