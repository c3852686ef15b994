"""GPTQ: it reduces output errors compared with rounding to nearest, also for unusual weights and inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.quantization.blocks import quantize_blocks, quantize_channels
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.gptq import gptq
from llm_edge.exporter.quantization.hessian import Hessian
from llm_edge.runtime.errors import CheckpointError

FORMS = [
    Blocks(4, 32, symmetric=False),
    Blocks(4, 128, symmetric=False),
    Blocks(4, 16, symmetric=True),
    Blocks(8, 32, symmetric=True),
    Blocks(8, 64, symmetric=False),
]
WIDTHS = (256, 96, 40, 5)  # whole blocks, and rows that end within a block


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, rows: int = 600) -> Tensor:
    """Inputs [rows, width] concentrated in a few directions, with channels of very different size."""
    few = max(width // 8, 1)
    return (numbers(rows, few) @ numbers(few, width, seed=1) + 0.1 * numbers(rows, width, seed=2)) * torch.logspace(
        -1, 1, width
    )


def hessian_of(inputs: Tensor) -> Hessian:
    return Hessian(inputs.T @ inputs / len(inputs))


def error(inputs: Tensor, weight: Tensor, rounded: Tensor) -> float:
    return (inputs @ (weight - rounded).T).square().sum().item()


# ---- accuracy


@pytest.mark.parametrize("width", [256, 96, 40])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_output_errors_are_much_smaller_for_correlated_inputs(form: Blocks, width: int) -> None:
    inputs, weight = correlated(width), numbers(24, width, seed=3)
    nearest = quantize_blocks(weight, form).dequantized(width)
    ours = quantize_blocks(weight, form, hessian_of(inputs)).dequantized(width)
    assert error(inputs, weight, ours) < 0.4 * error(inputs, weight, nearest)
    fresh = correlated(width, rows=2000)[600:]  # inputs not used for rounding
    assert error(fresh, weight, ours) < 0.4 * error(fresh, weight, nearest)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gptq_is_never_worse_than_rounding_to_nearest(form: Blocks) -> None:
    for seed, scale in enumerate((0.0, 0.1, 1.0, 10.0)):  # from inputs in one direction to independent ones
        inputs = numbers(500, 1, seed=seed) @ numbers(1, 96, seed=seed + 10) + scale * numbers(500, 96, seed=seed + 20)
        weight = numbers(16, 96, seed=seed + 30)
        nearest = quantize_blocks(weight, form).dequantized(96)
        ours = quantize_blocks(weight, form, hessian_of(inputs)).dequantized(96)
        assert error(inputs, weight, ours) <= error(inputs, weight, nearest)


def test_gptq_improves_8_bit_channels() -> None:
    inputs, weight = correlated(96), numbers(24, 96, seed=3) * torch.logspace(-3, 3, 24)[:, None]
    data, scales = quantize_channels(weight, [hessian_of(inputs)])
    assert (data.dtype, data.shape, scales.dtype, scales.shape) == ("int8", (24, 96), "float32", (24,))
    assert data.min() >= -127
    steps = weight.abs().amax(1) / 127
    nearest = (weight / steps[:, None]).round() * steps[:, None]
    ours = torch.from_numpy(data).float() * torch.from_numpy(scales)[:, None]
    for row in range(24):
        assert error(inputs, weight[row : row + 1], ours[row : row + 1]) < 0.5 * error(
            inputs, weight[row : row + 1], nearest[row : row + 1]
        )


# ---- algorithm


def levels_of(weight: Tensor, scales: Tensor, zeros: Tensor, size: int, max_level: int) -> Tensor:
    """Round each weight to its nearest level."""
    spread = (part.repeat_interleave(size, 1)[:, : weight.shape[1]] for part in (scales, zeros))
    step, zero = spread
    return (weight / step + zero).round().clamp(0, max_level)


@pytest.mark.parametrize("width", WIDTHS)
def test_independent_inputs_round_every_weight_to_nearest(width: int) -> None:
    weight = numbers(16, width, seed=4)
    groups = -(-width // 32)
    scales, zeros = 0.2 + 0.1 * numbers(16, groups, seed=5).abs(), torch.full((16, groups), 8.0)
    found = gptq(weight, Hessian(torch.eye(width)), scales, zeros, 32, 15)
    assert torch.equal(found, levels_of(weight, scales, zeros, 32, 15))
    assert {0.0, 15.0} <= set(found.unique().tolist()) or width == 5  # some are out of range


def test_the_most_important_columns_are_rounded_first() -> None:
    """The first is rounded before there are errors to compensate; the order of the columns does not matter."""
    inputs = correlated(160)
    weight, hessian = numbers(12, 160, seed=6), hessian_of(inputs)
    scales, zeros = weight.abs().amax(1, keepdim=True) / 7, torch.full((12, 1), 8.0)
    found = gptq(weight, hessian, scales, zeros, 160, 15)
    nearest = levels_of(weight, scales, zeros, 160, 15)
    first = int(hessian.diagonal.argmax())
    assert torch.equal(found[:, first], nearest[:, first])
    assert (found != nearest).any(0).sum() > 80  # most others compensate an error

    order = torch.randperm(160, generator=torch.Generator().manual_seed(7))
    mixed = gptq(weight[:, order], Hessian(hessian.matrix[order][:, order]), scales, zeros, 160, 15)
    assert (mixed != found[:, order]).float().mean() < 0.01  # another summation order may break ties differently


def test_columns_keep_the_scale_of_their_block_when_reordered() -> None:
    """A column uses the scale of the block that contains it, whenever it is rounded."""
    weight = numbers(8, 64, seed=8) * torch.cat([torch.full((32,), 100.0), torch.full((32,), 0.01)])
    form = Blocks(8, 32, symmetric=True)
    rounded = quantize_blocks(weight, form, Hessian(torch.logspace(-2, 2, 64).diag())).dequantized(64)
    assert (rounded - weight)[:, :32].abs().max() < 2.5
    assert (rounded - weight)[:, 32:].abs().max() < 2.5e-4


# ---- the Hessian


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [96, 600])
def test_hessians_are_mean_outer_products(dtype: torch.dtype, width: int) -> None:
    inputs = correlated(width).to(dtype)
    with worker_threads() as threads:
        found = Hessian.of(inputs, threads).matrix
    expected = (inputs.double().T @ inputs.double() / len(inputs)).float()
    assert torch.equal(found, found.T)
    size = expected.diagonal().sqrt()
    assert ((found - expected).abs() / (size[:, None] * size)).max() < 6e-3


@pytest.mark.parametrize(("shared", "outliers"), [(0.0, 1.0), (100.0, 1.0), (0.0, 1000.0), (100.0, 1000.0)])
def test_hessians_stay_positive_definite(shared: float, outliers: float) -> None:
    """With much that all tokens have in common, and with a few huge tokens, they are factorized as if exact."""
    inputs = numbers(2000, 300) + shared * numbers(1, 300, seed=1)
    inputs[::500] = outliers * numbers(4, 300, seed=2)
    inputs = inputs.bfloat16()
    with worker_threads() as threads:
        found = Hessian.of(inputs, threads)
    exact = Hessian((inputs.double().T @ inputs.double() / len(inputs)).float())
    numbers_of_both = found.matrix.double(), exact.matrix.double()
    smallest = [torch.linalg.eigvalsh(matrix).min() for matrix in numbers_of_both]
    assert smallest[0] > 0.9 * smallest[1]


# ---- unusual weights and inputs


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e18])
def test_singular_second_moments_fall_back_to_rounding_to_nearest(scale: float) -> None:
    """A single direction, so small or large that the float32 factorization fails: the export does not."""
    weight = numbers(4, 64, seed=11)
    hessian = torch.full((64, 64), scale)
    found = quantize_blocks(weight, FORMS[0], Hessian(hessian)).dequantized(64)
    assert (found - weight).abs().max() < weight.abs().max() / 4
    assert torch.equal(hessian, torch.full((64, 64), scale))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_channels_that_are_always_zero_are_handled(form: Blocks) -> None:
    inputs, weight = correlated(96), numbers(12, 96, seed=3)
    inputs[:, ::3] = 0
    nearest = quantize_blocks(weight, form).dequantized(96)
    rounded = quantize_blocks(weight, form, hessian_of(inputs)).dequantized(96)
    assert rounded.isfinite().all()
    assert (rounded - weight)[:, ::3].abs().max() < 0.3 * weight.abs().max()  # clipped if that helps the others
    assert error(inputs, weight, rounded) < 0.5 * error(inputs, weight, nearest)
    none_at_all = quantize_blocks(weight, form, Hessian(torch.zeros(96, 96))).dequantized(96)
    assert (none_at_all - weight).square().sum() <= 1.01 * (nearest - weight).square().sum()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_padding_at_the_end_of_a_row_is_zero(form: Blocks, width: int) -> None:
    stored = quantize_blocks(numbers(6, width), form, hessian_of(correlated(width)))
    blocks = form.num_blocks(width)
    assert stored.data.shape == (6, blocks, form.size * form.bits // 8)
    assert stored.scales.shape == (6, blocks)
    assert (stored.zero_points is None) == form.symmetric
    whole = stored.dequantized(blocks * form.size)
    assert whole.shape == (6, blocks * form.size)
    assert torch.equal(whole[:, width:], torch.zeros(6, blocks * form.size - width))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_of_zeros_stay_zero(form: Blocks) -> None:
    weight = numbers(6, 40)
    weight[[0, 4]] = 0
    rounded = quantize_blocks(weight, form, hessian_of(correlated(40))).dequantized(40)
    assert torch.equal(rounded[[0, 4]], torch.zeros(2, 40))
    assert (rounded[1] != 0).any()
    data, scales = quantize_channels(weight, [hessian_of(correlated(40))])
    assert not data[[0, 4]].any()
    assert (scales >= 0).all()


def test_the_hessian_is_not_modified() -> None:
    hessian = hessian_of(correlated(96))
    before = hessian.matrix.clone()
    quantize_blocks(numbers(6, 96), FORMS[0], hessian)
    quantize_channels(numbers(6, 96), [hessian])
    assert torch.equal(hessian.matrix, before)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_weights_are_an_error(number: float) -> None:
    weight = numbers(6, 96)
    weight[2, 5] = number
    hessian = hessian_of(correlated(96))
    for attempt in (lambda: quantize_blocks(weight, FORMS[0], hessian), lambda: quantize_channels(weight, [hessian])):
        with pytest.raises(CheckpointError, match=r"NaN.*damaged"):
            attempt()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_inputs_are_an_error(number: float) -> None:
    hessian = hessian_of(correlated(96))
    hessian.matrix[3, 3] = number
    weight = numbers(6, 96)
    for attempt in (lambda: quantize_blocks(weight, FORMS[0], hessian), lambda: quantize_channels(weight, [hessian])):
        with pytest.raises(CheckpointError, match=r"inputs are NaN or infinity.*damaged"):
            attempt()
