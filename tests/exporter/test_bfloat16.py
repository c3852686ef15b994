"""Projections in bfloat16 where the processor has it, and in float32 elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from llm_edge.exporter import bfloat16
from llm_edge.exporter.bfloat16 import fast_projections, multiply


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_projections_of_this_thread_are_fast_and_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "matmul_dtype", lambda: dtype)
    torch.manual_seed(1)
    linear, x = nn.Linear(64, 32), torch.randn(5, 64, requires_grad=True)
    exact = linear(x)
    with fast_projections(), ThreadPoolExecutor(1) as other:
        fast = linear(x)
        torch.testing.assert_close(other.submit(linear, x).result(), exact, rtol=1e-6, atol=1e-6)
    assert fast.dtype is torch.float32
    error = ((fast - exact).norm() / exact.norm()).item()
    assert error < 1e-6 if dtype is torch.float32 else 1e-4 < error < 1e-2
    (gradient,) = torch.autograd.grad(fast.sum(), x)
    assert (gradient - linear.weight.sum(0)).abs().max() < 0.05
    product = multiply(x.detach(), linear.weight.T.detach())
    assert product.dtype is torch.float32
    assert (product - x @ linear.weight.T).norm() < 0.01 * exact.norm()
