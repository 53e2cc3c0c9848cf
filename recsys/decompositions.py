"""Decompositions: what torch leaves as one operation, written as several that a device engine was verified to run.

Most of them are the backward of something that picks or slides: a scatter that adds is silently wrong in MNN, so a
one-hot product or a concatenation takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

aten = torch.ops.aten
IntArray = NDArray[np.int64]


def slice_backward(
    grad: Tensor, input_sizes: Sequence[int], dim: int, start: int | None, end: int | None, step: int
) -> Tensor:
    """The gradient between zeros; with a stride, by a one-hot product."""
    size, dim = int(input_sizes[dim]), dim % len(input_sizes)
    places = range(size)[slice(start, end, step)]
    if step != 1:
        return _onehot_product(grad, torch.tensor(list(places)), size, dim)
    parts = [grad]
    if places.start:
        parts.insert(0, _zeros_like(grad, dim, places.start))
    if places.start + len(places) < size:
        parts.append(_zeros_like(grad, dim, size - places.start - len(places)))
    return torch.cat(parts, dim) if len(parts) > 1 else grad.clone()


def _zeros_like(value: Tensor, dim: int, count: int) -> Tensor:
    """Zeros of the same shape, but for ``count`` along ``dim``."""
    shape = [*value.shape]
    shape[dim] = count
    return torch.zeros(shape, dtype=value.dtype)


def select_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """The gradient between zeros."""
    dim %= len(input_sizes)
    index %= int(input_sizes[dim])
    return slice_backward(grad.unsqueeze(dim), input_sizes, dim, index, index + 1, 1)


def embedding_dense_backward(
    grad_output: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """One-hot rows times gradients."""
    if scale_grad_by_freq:
        raise NotImplementedError("an embedding whose gradient is scaled by frequency")
    flat = indices.reshape(-1)
    onehot = (flat[None, :] == torch.arange(num_weights)[:, None]).to(grad_output.dtype)
    if padding_idx >= 0:
        onehot = onehot * (torch.arange(num_weights) != padding_idx)[:, None]
    return onehot @ grad_output.reshape(len(flat), -1)


def index_select_backward(grad: Tensor, self_sizes: Sequence[int], dim: int, index: Tensor) -> Tensor:
    """A one-hot product."""
    return _onehot_product(grad, index, int(self_sizes[dim]), dim % len(self_sizes))


def index_put(self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """An addition at places: a one-hot product over the indexed axes, which must stand together."""
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    first, last = axes[0], axes[-1] + 1
    if not accumulate or axes != list(range(first, last)):
        raise NotImplementedError("an assignment at places, or an addition at places along axes that are apart")
    sizes = [*self.shape]
    shape_of = np.broadcast_shapes(*[tuple(index.shape) for index in indices if index is not None])
    given = [index.expand(shape_of) for index in indices if index is not None]
    flat = torch.zeros_like(given[0])
    for axis, index in zip(axes, given, strict=True):
        flat = flat * sizes[axis] + torch.where(index < 0, index + sizes[axis], index)
    many = 1
    for axis in axes:
        many *= sizes[axis]
    shape = (*sizes[:first], flat.numel(), *sizes[last:])
    spread = values.expand(*sizes[:first], *flat.shape, *sizes[last:]).reshape(shape)
    return self + _onehot_product(spread, flat.reshape(-1), many, first).reshape(sizes)


def nll_loss_forward(
    self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """One-hot: minus the log-probability of the target."""
    onehot, weights = _targets(self, target, weight, ignore_index)
    losses = -(self * onehot).sum(dim=-1)
    total = weights.sum()
    if reduction == 0:
        return losses, total
    return (losses.sum() / total if reduction == 1 else losses.sum()), total


def nll_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """One-hot."""
    onehot, _ = _targets(self, target, weight, ignore_index)
    if reduction == 1:
        grad_output = grad_output / total_weight
    return -onehot * (grad_output[..., None] if reduction == 0 else grad_output)


def mean_of(self: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """The sum by the count."""
    axes = list(dim) if dim else list(range(self.dim()))
    count = 1
    for axis in axes:
        count *= self.shape[axis]
    return self.sum(dim=axes, keepdim=keepdim) / count


def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By sums: torch's own goes by way of an operation that ONNX does not have. Also the mean, and one by the
    deviation, for the backward.
    """
    axes = list(range(-len(normalized_shape), 0))
    mean = mean_of(input, axes, keepdim=True)
    centred = input - mean
    scale = 1.0 / torch.sqrt(mean_of(centred * centred, axes, keepdim=True) + eps)
    out = centred * scale
    if weight is not None:
        out = out * weight
    return (out if bias is None else out + bias), mean, scale


def empty_permuted(size: Sequence[int], physical_layout: Sequence[int], **options: Any) -> Tensor:
    """Zeros: nothing reads what was not written, and no engine has undefined values."""
    return torch.zeros(size, dtype=options.get("dtype"))


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """A product of unfolded patches and the weights."""
    _plain(transposed, groups, input)
    patches, (high, wide) = _unfold(input, weight.shape[2:], stride, padding, dilation)
    out = patches @ weight.reshape(weight.shape[0], -1).T
    if bias is not None:
        out = out + bias
    return out.reshape(input.shape[0], high, wide, weight.shape[0]).permute(0, 3, 1, 2)


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Products with the unfolded patches; what flows back to the input is folded together again."""
    _plain(transposed, groups, input)
    count, channels = grad_output.shape[:2]
    flat = grad_output.permute(0, 2, 3, 1).reshape(count, -1, channels)
    back = slope = sums = None
    if output_mask[0]:
        patches = flat @ weight.reshape(channels, -1)
        back = _fold_back(patches, input.shape, weight.shape[2:], stride, padding, dilation)
    if output_mask[1]:
        patches, _ = _unfold(input, weight.shape[2:], stride, padding, dilation)
        rows = flat.reshape(-1, channels)
        slope = (rows.T @ patches.reshape(len(rows), -1)).reshape(weight.shape)
    if output_mask[2]:
        sums = grad_output.sum(dim=[0, 2, 3])
    return back, slope, sums


def avg_pool2d(
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean over unfolded patches."""
    kernel, stride = _pool(kernel_size, stride, padding, ceil_mode, divisor_override, count_include_pad)
    batch, channels = self.shape[:2]
    patches, (high, wide) = _unfold(self, kernel, stride, (0, 0), (1, 1))
    mean = patches.reshape(batch, high * wide, channels, kernel[0] * kernel[1]).sum(dim=3) / (kernel[0] * kernel[1])
    return mean.permute(0, 2, 1).reshape(batch, channels, high, wide)


def avg_pool2d_backward(
    grad_output: Tensor,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Every place of a patch gets an equal share."""
    kernel, stride = _pool(kernel_size, stride, padding, ceil_mode, divisor_override, count_include_pad)
    batch, channels, high, wide = grad_output.shape
    area = kernel[0] * kernel[1]
    each = grad_output.permute(0, 2, 3, 1).reshape(batch, high * wide, channels, 1) / area
    patches = each.expand(batch, high * wide, channels, area).reshape(batch, high * wide, channels * area)
    return _fold_back(patches, self.shape, kernel, stride, (0, 0), (1, 1))


def max_pool2d_with_indices(
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """The greatest of unfolded patches; the indices say which place of its patch it stands at, the first of equals."""
    kernel, stride = _pool(kernel_size, stride, padding, ceil_mode, None, True)
    batch, channels = self.shape[:2]
    patches, (high, wide) = _unfold(self, kernel, stride, (0, 0), dilation)
    area = kernel[0] * kernel[1]
    patches = patches.reshape(batch, high * wide, channels, area)
    greatest = patches.amax(dim=3, keepdim=True)
    # Counted from behind, so that the greatest count belongs to the first of equals.
    behind = torch.arange(area, 0, -1).to(self.dtype)
    place = area - torch.where(patches == greatest, behind, torch.zeros(())).amax(dim=3)
    shaped = (batch, channels, high, wide)
    return greatest.reshape(batch, -1, channels).permute(0, 2, 1).reshape(shaped), place.permute(0, 2, 1).reshape(
        shaped
    ).to(torch.int64)


def max_pool2d_with_indices_backward(
    grad_output: Tensor,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """The gradient at the place of the greatest, folded together again."""
    kernel, stride = _pool(kernel_size, stride, padding, ceil_mode, None, True)
    batch, channels, high, wide = grad_output.shape
    area = kernel[0] * kernel[1]
    at = indices.permute(0, 2, 3, 1).reshape(batch, high * wide, channels, 1) == torch.arange(area)
    each = grad_output.permute(0, 2, 3, 1).reshape(batch, high * wide, channels, 1)
    patches = torch.where(at, each, torch.zeros(())).reshape(batch, high * wide, channels * area)
    return _fold_back(patches, self.shape, kernel, stride, (0, 0), dilation)


def _onehot_product(values: Tensor, places: Tensor, size: int, dim: int) -> Tensor:
    """Zeros of ``size`` along ``dim``, with ``values`` added at ``places``."""
    onehot = (torch.arange(size)[:, None] == places[None, :]).to(values.dtype)
    moved = values.movedim(dim, 0)
    flat = onehot @ moved.reshape(moved.shape[0], -1)
    return flat.reshape(size, *moved.shape[1:]).movedim(0, dim)


def _targets(self: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    classes = torch.arange(self.shape[-1])
    onehot = (target[..., None] == classes).to(self.dtype)
    if 0 <= ignore_index < self.shape[-1]:
        onehot = onehot * (classes != ignore_index)
    if weight is not None:
        onehot = onehot * weight
    return onehot, onehot.sum(dim=-1)


def _plain(transposed: bool, groups: int, input: Tensor) -> None:
    if transposed or groups != 1 or input.dim() != 4:
        raise NotImplementedError("only plain convolutions of images are decomposed: not transposed, one group")


def _pool(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    divisor: int | None,
    with_padding: bool,
) -> tuple[tuple[int, int], tuple[int, int]]:
    if any(padding) or ceil_mode or divisor is not None:
        raise NotImplementedError("only pools without padding, ceil_mode and divisor are decomposed")
    both = (kernel[0], kernel[-1])
    return both, ((stride[0], stride[-1]) if stride else both)


def _places(
    size: tuple[int, int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[IntArray, int, int]:
    """For every output place and kernel place, where it looks in the padded image, flat, (O * K,)."""
    stride, padding, dilation = ((each[0], each[-1]) for each in (stride, padding, dilation))
    high, wide = (
        (size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    rows = np.arange(high)[:, None] * stride[0] + np.arange(kernel[0])[None, :] * dilation[0]
    columns = np.arange(wide)[:, None] * stride[1] + np.arange(kernel[1])[None, :] * dilation[1]
    width = size[1] + 2 * padding[1]
    flat = rows[:, None, :, None] * width + columns[None, :, None, :]
    return flat.reshape(-1), high, wide


def _unfold(
    image: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """Patches, (B, O, channels * K), gathered by places that are known beforehand; the output's height and width."""
    batch, channels, *size = image.shape
    top, left = padding[0], padding[-1]
    places, high, wide = _places((size[0], size[1]), kernel, stride, padding, dilation)
    if top or left:
        image = _padded(image, top, left)
    flat = image.reshape(batch, channels, -1).index_select(2, torch.from_numpy(places))
    parts = flat.reshape(batch, channels, high * wide, -1).permute(0, 2, 1, 3)
    return parts.reshape(batch, high * wide, -1), (high, wide)


def _padded(image: Tensor, top: int, left: int) -> Tensor:
    batch, channels, high, wide = image.shape
    side = torch.zeros(batch, channels, high, left)
    image = torch.cat([side, image, side], 3) if left else image
    edge = torch.zeros(batch, channels, top, wide + 2 * left)
    return torch.cat([edge, image, edge], 2) if top else image


def _fold_back(
    patches: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What :func:`_unfold` took apart, added together where patches overlap.

    Every place of the image lies in at most so many patches; for each of these a gather brings what the patch holds
    there (an extra column of zeros for none), and the gathers are added. No scatter, and no product as large as the
    image.
    """
    batch, channels, *size = shape
    top, left = padding[0], padding[-1]
    places, high, wide = _places((size[0], size[1]), kernel, stride, padding, dilation)
    padded = (size[0] + 2 * top) * (size[1] + 2 * left)
    order = np.argsort(places, kind="stable")
    ranked = places[order]
    rank = np.arange(len(ranked)) - np.searchsorted(ranked, ranked)
    flat = patches.reshape(batch, high * wide, channels, -1).permute(0, 2, 1, 3).reshape(batch, channels, -1)
    flat = torch.cat([flat, torch.zeros(batch, channels, 1)], 2)
    total = None
    for layer in range(int(rank.max()) + 1):
        source = np.full(padded, len(places), dtype=np.int64)
        source[ranked[rank == layer]] = order[rank == layer]
        part = flat.index_select(2, torch.from_numpy(source))
        total = part if total is None else total + part
    assert total is not None
    image = total.reshape(batch, channels, size[0] + 2 * top, size[1] + 2 * left)
    return image[:, :, top : top + size[0], left : left + size[1]]


OVERRIDES: Mapping[Any, Callable[..., Any]] = {
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
    aten.embedding_dense_backward.default: embedding_dense_backward,
    aten.index_select_backward.default: index_select_backward,
    aten.index_put.default: index_put,
    aten.nll_loss_forward.default: nll_loss_forward,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.mean.dim: mean_of,
    aten.mean.default: mean_of,
    aten.native_layer_norm.default: native_layer_norm,
    aten.empty_permuted.default: empty_permuted,
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.avg_pool2d.default: avg_pool2d,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten.max_pool2d_with_indices.default: max_pool2d_with_indices,
    aten.max_pool2d_with_indices_backward.default: max_pool2d_with_indices_backward,
}
"""Used in place of torch's own decompositions."""
