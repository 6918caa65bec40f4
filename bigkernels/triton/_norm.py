"""The kernels of rms_norm and layer_norm. Where MEAN is None rows are not centred, and that is RMSNorm.

All are limited by memory: the forward pass reads a row once and keeps it in registers, the backward pass too, adding
up its share of the weight gradient in registers over all the rows that it walks. Rows too long for that are read twice,
the second time from cache, and the weight gradient gets a kernel of its own that walks columns. Partial sums go to a
float32 buffer, one line a program, and are added in a fixed order: no atomics, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_2, processors, since

# The longest rows that fit the registers of one program: 32 float32 values of each operand a thread in the forward
# pass; the backward pass holds two more operands and the sums.
FORWARD_ROW = 16384
BACKWARD_ROW = 8192


@triton.jit
def forward_rows(
    X,
    RESIDUAL,
    WEIGHT,
    BIAS,
    Y,
    TOTAL,
    MEAN,
    RSTD,
    rows,
    stride_x,
    stride_residual,
    eps,
    offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    mask = (row < rows)[:, None] & inside[None, :]
    x = tl.load(X + (row * stride_x)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        x += tl.load(RESIDUAL + (row * stride_residual)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        # What the next layer and the backward pass see is the rounded sum.
        total = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + (row * D)[:, None] + cols[None, :], total, mask=mask)
        x = total.to(tl.float32)
    # Before the reduction, so that these loads are under way while it waits.
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32) + offset
    if BIAS is not None:
        bias = tl.load(BIAS + cols, mask=inside, other=0.0).to(tl.float32)
    if MEAN is not None:
        mean = tl.sum(x, 1) / D
        tl.store(MEAN + row, mean, mask=row < rows)
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(RSTD + row, rstd, mask=row < rows)
    y = x * rstd[:, None]
    if WEIGHT is not None:
        y *= weight[None, :]
    if BIAS is not None:
        y += bias[None, :]
    tl.store(Y + (row * D)[:, None] + cols[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def forward_long(
    X,
    RESIDUAL,
    WEIGHT,
    BIAS,
    Y,
    TOTAL,
    MEAN,
    RSTD,
    stride_x,
    stride_residual,
    eps,
    offset,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # A lane of the block sees every BLOCK-th column: its mean and the sum of its squared deviations (Welford 1962).
    mean = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + lane
        mask = cols < D
        x = tl.load(X + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL is not None:
            x += tl.load(RESIDUAL + row * stride_residual + cols, mask=mask, other=0.0).to(tl.float32)
            x = x.to(TOTAL.dtype.element_ty).to(tl.float32)
        if MEAN is not None:
            delta = tl.where(mask, x - mean, 0.0)
            mean += delta / (start // BLOCK + 1)
            square += delta * (x - mean)
        else:
            square += x * x
    center = 0.0
    if MEAN is not None:
        seen = ((D - 1 - lane) // BLOCK + 1).to(tl.float32)
        center = tl.sum(mean * seen, 0) / D
        square += seen * (mean - center) * (mean - center)
        tl.store(MEAN + row, center)
    rstd = tl.rsqrt(tl.sum(square, 0) / D + eps)
    tl.store(RSTD + row, rstd)
    for start in range(0, D, BLOCK):
        cols = start + lane
        mask = cols < D
        x = tl.load(X + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL is not None:
            x += tl.load(RESIDUAL + row * stride_residual + cols, mask=mask, other=0.0).to(tl.float32)
            total = x.to(TOTAL.dtype.element_ty)
            tl.store(TOTAL + row * D + cols, total, mask=mask)
            x = total.to(tl.float32)
        y = (x - center) * rstd
        if WEIGHT is not None:
            y *= tl.load(WEIGHT + cols, mask=mask, other=0.0).to(tl.float32) + offset
        if BIAS is not None:
            y += tl.load(BIAS + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + row * D + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def backward_rows(
    GRAD,
    X,
    WEIGHT,
    MEAN,
    RSTD,
    GRAD_TOTAL,
    DX,
    DWEIGHT,
    DBIAS,
    rows,
    stride_grad,
    stride_x,
    stride_total,
    offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        grad = tl.load(GRAD + (row * stride_grad)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + (row * stride_x)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)[:, None]
        if MEAN is not None:
            x -= tl.load(MEAN + row, mask=row < rows, other=0.0)[:, None]
        normed = x * rstd
        if DWEIGHT is not None:
            dweight += grad * normed
        if DBIAS is not None:
            dbias += grad
        if WEIGHT is not None:
            grad *= weight[None, :]
        dx = grad - normed * (tl.sum(grad * normed, 1) / D)[:, None]
        if MEAN is not None:
            dx -= (tl.sum(grad, 1) / D)[:, None]
        dx *= rstd
        if GRAD_TOTAL is not None:
            total = tl.load(GRAD_TOTAL + (row * stride_total)[:, None] + cols[None, :], mask=mask, other=0.0)
            dx += total.to(tl.float32)
        tl.store(DX + (row * D)[:, None] + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
        first += tl.num_programs(0) * ROWS
    line = tl.program_id(0).to(tl.int64) * D
    if DWEIGHT is not None:
        tl.store(DWEIGHT + line + cols, tl.sum(dweight, 0), mask=inside)
    if DBIAS is not None:
        tl.store(DBIAS + line + cols, tl.sum(dbias, 0), mask=inside)


@triton.jit
def backward_long(
    GRAD,
    X,
    WEIGHT,
    MEAN,
    RSTD,
    GRAD_TOTAL,
    DX,
    stride_grad,
    stride_x,
    stride_total,
    offset,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    rstd = tl.load(RSTD + row)
    mean = 0.0
    if MEAN is not None:
        mean = tl.load(MEAN + row)
    plain = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + lane
        mask = cols < D
        grad = tl.load(GRAD + row * stride_grad + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if WEIGHT is not None:
            grad *= tl.load(WEIGHT + cols, mask=mask, other=0.0).to(tl.float32) + offset
        plain += grad
        product += grad * ((x - mean) * rstd)
    along = tl.sum(product, 0) / D
    shift = 0.0
    if MEAN is not None:
        shift = tl.sum(plain, 0) / D
    for start in range(0, D, BLOCK):
        cols = start + lane
        mask = cols < D
        grad = tl.load(GRAD + row * stride_grad + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if WEIGHT is not None:
            grad *= tl.load(WEIGHT + cols, mask=mask, other=0.0).to(tl.float32) + offset
        dx = rstd * (grad - shift - (x - mean) * rstd * along)
        if GRAD_TOTAL is not None:
            dx += tl.load(GRAD_TOTAL + row * stride_total + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + row * D + cols, dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit
def backward_columns(
    GRAD,
    X,
    MEAN,
    RSTD,
    DWEIGHT,
    DBIAS,
    rows,
    stride_grad,
    stride_x,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        grad = tl.load(GRAD + (row * stride_grad)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if DWEIGHT is not None:
            x = tl.load(X + (row * stride_x)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            if MEAN is not None:
                x -= tl.load(MEAN + row, mask=row < rows, other=0.0)[:, None]
            dweight += grad * (x * tl.load(RSTD + row, mask=row < rows, other=0.0)[:, None])
        if DBIAS is not None:
            dbias += grad
        first += tl.num_programs(1) * ROWS
    line = tl.program_id(1).to(tl.int64) * D
    if DWEIGHT is not None:
        tl.store(DWEIGHT + line + cols, tl.sum(dweight, 0), mask=inside)
    if DBIAS is not None:
        tl.store(DBIAS + line + cols, tl.sum(dbias, 0), mask=inside)


def _warps(elements: int) -> int:
    """16 elements a thread: two 16-byte loads of a 16-bit operand, four of float32."""
    return min(16, max(4, elements // 512))


def run_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    offset: float,
) -> None:
    """Normalise the rows of `x` (rows, D), plus `residual`, into `y`; also `total`, `mean` (or None) and `rstd`."""
    count, size = x.shape
    stride_residual = 0 if residual is None else residual.stride(0)
    if size > FORWARD_ROW:
        launch(
            forward_long,
            (count,),
            x,
            residual,
            weight,
            bias,
            y,
            total,
            mean,
            rstd,
            x.stride(0),
            stride_residual,
            eps,
            offset,
            D=size,
            BLOCK=4096,
            num_warps=8,
        )
        return
    block = power_of_2(size)
    at_once = max(1, 2048 // block)
    launch(
        forward_rows,
        (triton.cdiv(count, at_once),),
        x,
        residual,
        weight,
        bias,
        y,
        total,
        mean,
        rstd,
        count,
        x.stride(0),
        stride_residual,
        eps,
        offset,
        D=size,
        ROWS=at_once,
        BLOCK=block,
        num_warps=_warps(block * at_once),
    )


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    grad_total: Tensor | None,
    dx: Tensor,
    offset: float,
    *,
    dweight: bool,
    dbias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Write `dx`; return the float32 gradients of weight and bias where asked for."""
    count, size = x.shape
    stride_total = 0 if grad_total is None else grad_total.stride(0)
    # Rows that are not aligned take more registers: an address for each element.
    long = size > (BACKWARD_ROW if size % 16 == 0 else BACKWARD_ROW // 2)
    block = 512 if long else power_of_2(size)
    at_once = max(1, 2048 // block)
    warps = _warps(block * at_once)
    columns = triton.cdiv(size, block)
    # Enough programs to fill the GPU: registers hold about 24 warps a multiprocessor.
    groups = min(triton.cdiv(count, at_once), triton.cdiv(processors(x.device) * max(1, 24 // warps), columns))
    partial = [
        torch.empty((groups, size), dtype=torch.float32, device=x.device) if wanted else None
        for wanted in (dweight, dbias)
    ]
    if not long:
        # Triton 3.8 leaves 80 registers to several rows of float32 on the newest GPUs, and spills.
        registers = 96 if at_once > 1 and x.dtype == torch.float32 and since(3, 8) else None
        launch(
            backward_rows,
            (groups,),
            grad,
            x,
            weight,
            mean,
            rstd,
            grad_total,
            dx,
            *partial,
            count,
            grad.stride(0),
            x.stride(0),
            stride_total,
            offset,
            D=size,
            ROWS=at_once,
            BLOCK=block,
            num_warps=warps,
            maxnreg=registers,
        )
    else:
        launch(
            backward_long,
            (count,),
            grad,
            x,
            weight,
            mean,
            rstd,
            grad_total,
            dx,
            grad.stride(0),
            x.stride(0),
            stride_total,
            offset,
            D=size,
            BLOCK=4096,
            num_warps=8,
        )
        if dweight or dbias:
            launch(
                backward_columns,
                (columns, groups),
                grad,
                x,
                mean,
                rstd,
                *partial,
                count,
                grad.stride(0),
                x.stride(0),
                D=size,
                ROWS=at_once,
                BLOCK=block,
                num_warps=warps,
            )
    first, second = (p.sum(0) if p is not None else None for p in partial)
    return first, second
