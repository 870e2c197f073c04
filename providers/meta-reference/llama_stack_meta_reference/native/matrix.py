"""A weight matrix in the order in which the kernels read it.

``float32`` and ``float16`` are the weights themselves. ``int8`` and ``int4`` round them in groups of 64 and 32 inputs,
each with a float16 scale (8.25 and 4.5 bits a weight), and a product with them rounds the activations to int8 as well,
per row and group: a loud row cannot disturb its neighbours. Shape suffixes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from .library import INPUT_MULTIPLE, KINDS, PANEL, CMatrix, library

_LARGEST_HALF = 65504.0


def padded(size: int, multiple: int) -> int:
    """``size``, or the next multiple."""
    return -(-size // multiple) * multiple


def zeros_to_stream(count: int, dtype: torch.dtype) -> Tensor:
    """Return (count,) zeros that are read from end to end: from a page's beginning, in large pages where there are any.

    With small ones the processor waits for page tables beside memory: weights and cache do not fit what it remembers of
    those. Raises ``MemoryError``.
    """
    size = count * dtype.itemsize
    if not size:
        return torch.zeros(0, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    # Written now: whoever plans by what is free must find it taken, and a machine without room must say so here.
    return torch.frombuffer(memory, dtype=dtype).zero_()


class PackedMatrix:
    """Weights (O, I) packed as one of ``KINDS``. Holds the memory that ``c`` points into."""

    def __init__(self, kind: str, parts: list[Tensor]) -> None:
        """``parts`` are stacked, each padded with zero outputs to a whole panel except the last.

        Raises ``ValueError`` for weights beyond the range of float16, which is that of the scales too.
        """
        self.kind, self.inputs = kind, parts[0].shape[1]
        number, kernels = KINDS[kind], library()
        self.outputs = sum(padded(part.shape[0], PANEL) for part in parts[:-1]) + parts[-1].shape[0]
        sizes = [kernels.packed_bytes(number, part.shape[0], self.inputs) for part in parts]
        self.bytes = sum(sizes)
        self._panels = zeros_to_stream(self.bytes, torch.uint8)
        self.c = CMatrix(number, self.outputs, self.inputs, self._panels.data_ptr())
        start = 0
        for part_OI, size in zip(parts, sizes, strict=True):
            weights_OI = part_OI.detach().to("cpu", torch.float32).contiguous()
            if kind != "float32" and float(weights_OI.abs().max()) > _LARGEST_HALF:
                raise ValueError(f"weights beyond {_LARGEST_HALF:g} cannot be held as {kind}; use float32")
            kernels.pack(number, weights_OI.data_ptr(), *weights_OI.shape, self._panels.data_ptr() + start)
            start += size

    def product(self, values_NI: Tensor) -> Tensor:
        """Return (N, O) float32: ``values`` times the transposed weights, as a step of the network computes it."""
        values_NI = values_NI.to(torch.float32).contiguous()
        rows, inputs = len(values_NI), padded(self.inputs, INPUT_MULTIPLE)
        out_NO = torch.empty(rows, padded(self.outputs, PANEL))
        scratch = Scratch(rows, inputs)
        library().product_of(
            *(self.c.kind, self.c.panels, self.outputs, self.inputs, values_NI.data_ptr(), rows, out_NO.data_ptr()),
            *(scratch.floats.data_ptr(), scratch.bytes.data_ptr(), scratch.scales.data_ptr()),
            *(scratch.starts.data_ptr(), torch.get_num_threads()),
        )
        return out_NO[:, : self.outputs]


class Scratch:
    """Room for the activations of ``rows`` rows of up to ``inputs`` padded inputs, as the kernels pack them."""

    def __init__(self, rows: int, inputs: int) -> None:
        self.floats = torch.empty(rows * inputs)
        self.bytes = torch.empty(rows * inputs, dtype=torch.int8)
        groups = rows * (inputs // 32)
        self.scales = torch.empty(groups)
        self.starts = torch.empty(groups, dtype=torch.int32)
