"""Weights on a uniform grid: a kernel finds the grid of some rows and rounds to it, in eager or in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpipe.model.gradients import is_owned
from qpipe.plugin import Options
from qpipe.quant.compiled import compiled, turn_off
from qpipe.quant.quantizer import Quantizer
from qpipe.quant.rounding import block_rows, round_to_codes, snap_scale
from qpipe.quant.step_error import open_ended
from qpipe.quant.tensor import QTensor, grouped

SAME_GRID = 1e-4
"""Largest relative difference between scales found in eager and in compiled code; their sums run in another order."""


NEXT_TO_NOTHING = 1e-30
"""Scale of a row of zeros on a grid without a level at 0."""


class GridOptions(Options):
    """What shares a scale."""

    granularity: Literal["tensor", "channel", "group"] = Field("channel", description="what shares a scale")
    group_size: int | None = Field(None, gt=0, description="elements per group; required for granularity `group`")

    @model_validator(mode="after")
    def _group_size_belongs_to_groups(self) -> GridOptions:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("give group_size with granularity `group`, and only there")
        return self


class Grid(NamedTuple):
    """Where the levels of some rows are: `value = (code - zero_point) * scale`.

    Attributes:
        scale: float32, positive, already rounded to its export type; `[rows, 1]`, or `[1, 1]` for all rows.
        zero_point: of the same shape, or one number for all.
        limits: further tensors of the same shape that `GridKernel.codes` needs, such as thresholds.
    """

    scale: Tensor
    zero_point: Tensor | float = 0.0
    limits: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class GridKernel:
    """Arithmetic of a quantizer as a pure function of rows; hashable, so that equal settings share compiled code.

    Attributes:
        low: smallest code.
        high: largest code.
        scale_dtype: scales are rounded to this type.
        rescale: a change of every scale before that, for experiments with wrong step sizes.
    """

    low: int
    high: int
    scale_dtype: torch.dtype = torch.float32
    rescale: Callable[[Tensor], Tensor] | None = None

    def snap(self, scale: Tensor) -> Tensor:
        """Scales as they are exported: rounded to their type, 1 in place of 0."""
        return snap_scale(scale if self.rescale is None else self.rescale(scale), self.scale_dtype)

    def snap_above_zero(self, scale: Tensor) -> Tensor:
        """`snap` for grids without a level at 0: next to nothing in place of 0, so that zeros stay next to zero."""
        return self.snap(scale.clamp_min(max(NEXT_TO_NOTHING, 2 * torch.finfo(self.scale_dtype).smallest_normal)))

    def grid(self, rows: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        """The grid of rows.

        Args:
            rows: float tensor `[rows, width]`.
            axes: what shares a scale: `(1,)` each row, `(0, 1)` all of them.
            state: the quantizer's own tensors, `[rows, 1]` or `[1, 1]`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement grid")

    def codes(self, rows: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """Integral float32 codes of rows on their grid; elementwise. By default the nearest.

        Args:
            rows: float tensor `[rows, width]`.
            grid: as `grid` returned it.
            out: float32 tensor for the result; may be `rows` itself.
        """
        return round_to_codes(rows, grid.scale, grid.zero_point, self.low, self.high, out=out)

    def positions(self, rows: Tensor, grid: Grid) -> Tensor:
        """Where rows are among the levels before they are rounded; the rows themselves by default.

        Override it with `codes` where these are nearest to something else. Only experiments with `rescale` use it.
        """
        return rows.float()

    @property
    def rounds(self) -> bool:
        """True if a code is the level nearest to `positions`; False where codes are found by another rule."""
        own = type(self)
        return own.codes is GridKernel.codes or own.positions is not GridKernel.positions


Gradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class _WithGradient(torch.autograd.Function):
    """See `GridQuantizer.with_gradient`."""

    @staticmethod
    def forward(ctx: Any, quantizer: GridQuantizer, gradient: Gradient, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        ctx.quantizer, ctx.gradient = quantizer, gradient
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (value,) = ctx.saved_tensors
        owned = is_owned(grads[0])
        rows, grad = ctx.quantizer.rows_of(value), ctx.quantizer.rows_of(grads[0].contiguous())
        result = grad if owned else torch.empty_like(grad)
        rest = ctx.gradient(rows, grad, result)
        return None, None, result.view(value.shape), *rest


class GridQuantizer(Quantizer):
    """A weight quantizer that is given by a `GridKernel`.

    Subclasses implement `kernel`, and `state` where they have parameters or buffers. `quantize` is one pass over
    memory: in eager code in blocks of rows that stay in cache, in compiled code fused. Both are bitwise
    `encode().decode()`.
    """

    def __init__(self, options: Any, bits: int) -> None:
        super().__init__()
        self.options = options
        self.bits = bits
        self.group_size: int | None = getattr(options, "group_size", None)
        self.per_tensor: bool = options.granularity == "tensor"
        self.row_wise = not self.per_tensor
        self._proved: set[tuple[int, torch.dtype]] = set()

    def kernel(self) -> GridKernel:
        """The arithmetic, with the scale type and rescaling of `self.context`."""
        raise NotImplementedError(f"{type(self).__name__} must implement kernel")

    def state(self) -> tuple[Tensor, ...]:
        """Tensors `[rows, 1]` (`[1, 1]` per tensor) that the kernel needs; none by default."""
        return ()

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of `rows_of` that share a scale."""
        return (0, 1) if self.per_tensor else (1,)

    def rows_of(self, value: Tensor) -> Tensor:
        """A weight `[channels, ...]` as `[rows, width]`: a row is a channel or, per group, a group.

        Raises:
            SiteError: the group size does not divide the elements of a channel.
        """
        return grouped(value, self.group_size).reshape(-1, self.group_size or max(1, value[:1].numel()))

    def shaped(self, per_row: Tensor, value: Tensor) -> Tensor:
        """`[rows, 1]` or `[1, 1]` in the shape that `QTensor` has for this weight."""
        if self.group_size is not None:
            return per_row.reshape(value.shape[0], -1, 1)
        return per_row.reshape(-1, *(1,) * (value.ndim - 1))

    @torch.no_grad()
    def encode(self, value: Tensor) -> QTensor:
        """Codes, scale and zero point of a weight `[channels, ...]`."""
        rows = self.rows_of(value)
        # Read off the values that the forward pass uses, so that export writes them whatever code made them.
        target = torch.empty_like(rows, dtype=torch.float32)
        grid = joined(self._sweep(rows, target))
        zero = grid.zero_point
        codes = (target / grid.scale + zero).round_().view(value.shape)
        if isinstance(zero, Tensor):
            zero_point = self.shaped(zero, value)
        else:
            zero_point = torch.full((1,), zero, device=value.device)
        return QTensor(codes, self.shaped(grid.scale, value), zero_point, self.bits, self.group_size)

    @torch.no_grad()
    def quantize(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Bitwise `encode(value).decode()`."""
        rows = self.rows_of(value)
        result = torch.empty_like(value, memory_format=torch.contiguous_format) if out is None else out
        if self.context.open_ended:
            result.view(rows.shape).copy_(self._open_ended(rows))
        else:
            self._sweep(rows, result.view(rows.shape))
        return result

    def _open_ended(self, rows: Tensor) -> Tensor:
        """Rows, clipped to the levels of training, on steps that `context.rescale` changes; see `open_ended`."""
        kernel, state = self.kernel(), self.state()
        trained = replace(kernel, rescale=None).grid(rows, self.axes, *state)
        lowest, highest = ((code - trained.zero_point) * trained.scale for code in (kernel.low, kernel.high))
        clipped = kernel.positions(rows, trained).clamp(lowest, highest)
        return open_ended(clipped, lowest, kernel.grid(rows, self.axes, *state).scale)

    def with_gradient(self, value: Tensor, gradient: Gradient, *parameters: Tensor) -> Tensor:
        """The value itself, for `surrogate`; in the backward pass `gradient` says what it and parameters get.

        Args:
            value: the weight.
            gradient: takes rows of the weight, of the incoming gradient, and of the result, which it fills; returns the
                gradients of the parameters. The result may be the incoming gradient itself: what is read after writing
                has changed.
            parameters: of the quantizer. They may be partitioned again by the time of the backward pass: what
                `gradient` needs of their values has to be taken before.
        """
        result: Tensor = _WithGradient.apply(self, gradient, value, *parameters)
        return result

    def _sweep(self, rows: Tensor, target: Tensor) -> list[Grid]:
        """Quantize rows into `target`; the grids met on the way, in the order of rows."""
        if self.context.compiled and rows.device.type == "cpu" and self.context.rescale is None:
            grid = self._sweep_compiled(rows, target)
            if grid is not None:
                return [grid]
        return self._sweep_blocks(rows, target)

    def _sweep_blocks(self, rows: Tensor, target: Tensor) -> list[Grid]:
        kernel, state = self.kernel(), self.state()
        found = [kernel.grid(rows, self.axes, *state)] if self.per_tensor else []
        size = block_rows(rows)
        # Made once: memory fresh from the system costs more than the arithmetic.
        scratch = torch.empty((min(size, rows.shape[0]), rows.shape[1]), dtype=torch.float32, device=rows.device)
        for start in range(0, rows.shape[0], size):
            block, goal = rows[start : start + size], target[start : start + size]
            codes = scratch[: block.shape[0]]
            if block.dtype != torch.float32:
                block = codes.copy_(block)
            if not self.per_tensor:
                found.append(kernel.grid(block, self.axes, *(part[start : start + size] for part in state)))
            grid = found[-1]
            kernel.codes(block, grid, out=codes)
            if isinstance(grid.zero_point, Tensor) or grid.zero_point != 0:
                codes.sub_(grid.zero_point)
            if goal.dtype == torch.float32:
                torch.mul(codes, grid.scale, out=goal)
            else:
                goal.copy_(codes.mul_(grid.scale))
        return found

    def _sweep_compiled(self, rows: Tensor, target: Tensor) -> Grid | None:
        """The same in compiled code; None where that fails, which is logged.

        The first result for every row length and dtype is compared with that of eager mode.
        """
        kernel = self.kernel()
        try:
            grid = _writer(kernel)(rows, target, self.axes, *self.state())
        except Exception as error:  # The compiler's errors have no common base; the eager path does the same work.
            turn_off(self.context, f"compiling for {self.site} failed ({type(error).__name__}: {str(error)[:200]})")
            return None
        key = rows.shape[1], rows.dtype
        if key not in self._proved:
            if not self._agrees(kernel, rows, target, grid):
                turn_off(self.context, f"compiled code differs from eager mode at {self.site}")
                return None
            self._proved.add(key)
        return grid

    def _agrees(self, kernel: GridKernel, rows: Tensor, found: Tensor, grid: Grid) -> bool:
        """True if compiled code rounds as eager code does on the same grid, and finds the same grid up to rounding."""
        expected = (kernel.codes(rows, grid) - grid.zero_point).mul_(grid.scale).to(found.dtype)
        eager = joined(self._sweep_blocks(rows, torch.empty_like(rows)))
        return torch.equal(expected.nan_to_num(), found.nan_to_num()) and torch.allclose(
            grid.scale, eager.scale, rtol=SAME_GRID, atol=0, equal_nan=True
        )


def joined(grids: list[Grid]) -> Grid:
    """The grids of consecutive blocks of rows as one."""
    if len(grids) == 1:
        return grids[0]
    zeros = [grid.zero_point for grid in grids]
    zero = torch.cat([z for z in zeros if isinstance(z, Tensor)]) if isinstance(zeros[0], Tensor) else zeros[0]
    limits = tuple(torch.cat(parts) for parts in zip(*(grid.limits for grid in grids), strict=True))
    return Grid(torch.cat([grid.scale for grid in grids]), zero, limits)


@cache
def _writer(kernel: GridKernel) -> Callable[..., Grid]:
    """Compiled code that quantizes and dequantizes rows into `out`, and returns their grid."""

    def write(rows: Tensor, out: Tensor, axes: tuple[int, ...], *state: Tensor) -> Grid:
        grid = kernel.grid(rows, axes, *state)
        out.copy_((kernel.codes(rows, grid) - grid.zero_point) * grid.scale)
        return grid

    return compiled(write)


def float64_sum(fn: Callable[[Tensor], Tensor], rows: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum of `fn(rows)` over `axes`, kept with size 1, in float64.

    So exact a sum, rounded to float32, does not show in which order it was formed: by how many threads, in blocks or
    not, in eager or in compiled code.

    Args:
        fn: elementwise; on a CPU it is called on blocks of rows, so that nothing of the weight's size is made.
        rows: float tensor `[rows, width]`.
        axes: reduced axes.
    """
    if torch.compiler.is_compiling() or 0 not in axes or block_rows(rows) >= rows.shape[0]:
        return fn(rows).sum(axes, keepdim=True, dtype=torch.float64)
    parts = [fn(block).sum(dtype=torch.float64) for block in rows.split(block_rows(rows))]
    return torch.stack(parts).sum().view(1, 1)


def float64_mean(fn: Callable[[Tensor], Tensor], rows: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean of `fn(rows)` over `axes`; otherwise like `float64_sum`."""
    if torch.compiler.is_compiling() or 0 not in axes:
        return fn(rows).mean(axes, keepdim=True, dtype=torch.float64)
    return float64_sum(fn, rows, axes) / rows.numel()


def mean_magnitude(rows: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`mean |w|` over `axes`, kept with size 1, as float32; from a sum in float64.

    Args:
        rows: float tensor `[rows, width]`.
        axes: reduced axes.
    """
    return float64_mean(torch.abs, rows, axes).float()
