"""Memory that CUDA's operators take for themselves while they run, where its size is known.

Source: aten/src/ATen/native/transformers/cuda/{flash_attn/flash_api.cpp, attention_backward.cu} and
aten/src/ATen/native/cuda/SpectralOps.cpp of PyTorch 2.13.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def workspace(operator: Any, args: tuple) -> int:
    """Bytes beside inputs and outputs, 0 where none are known.

    Notebook: 05_where_memory_goes
    """
    measure = WORKSPACES.get(operator)
    return measure(*args) if measure else 0


def _flash_backward(grad_out: Tensor, query: Tensor, *_: Any) -> int:
    """The gradient of the queries is added up in float32, beside a number per row."""
    b, h, length, width = query.shape
    rows = b * h * _up(length, 128)
    return 4 * rows * _up(width, 32) + 4 * rows


def _efficient_backward(grad_out: Tensor, query: Tensor, *_: Any) -> int:
    """The same for inputs of half precision; those of float32 are added up in place."""
    b, h, length, width = query.shape
    rows = b * h * length
    half = query.dtype is not torch.float32
    return 4 * rows + (4 * b * h * _up(length, 64) * width if half else 0)


def _inverse_fft(x: Tensor, *_: Any) -> int:
    """cuFFT destroys its input, so that is copied."""
    return x.numel() * x.element_size()


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


WORKSPACES = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._fft_c2r.default: _inverse_fft,
}
