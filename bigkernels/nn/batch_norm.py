"""BatchNorm as a module, for images of any number of dimensions."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.batch_norm import batch_norm


class BatchNorm(nn.Module):
    """Normalisation of channels over the batch, a residual and an activation; see `bigkernels.functional.batch_norm`.

    Parameters, buffers and state dict are those of `torch.nn.BatchNorm2d`.

    Args:
        channels: C.
        eps: added to the variance.
        momentum: the share of a batch in the running statistics; None averages over all batches.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics, for evaluation.
        activation: "silu", "gelu", "gelu_tanh", "relu" or None; with a residual "relu" or None.
    """

    num_batches_tracked: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum, self.activation = channels, eps, momentum, activation
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, value)
        for name, fill in (("running_mean", torch.zeros), ("running_var", torch.ones)):
            self.register_buffer(name, fill(channels, device=device, dtype=dtype) if track_running_stats else None)
        count = torch.zeros((), device=device, dtype=torch.int64) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        if self.running_mean is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalise(self, x, self.activation, residual)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}, activation={self.activation!r}"


def normalise(module: nn.Module, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """What a module with the attributes of `torch.nn.BatchNorm2d` computes, the count of batches included."""
    share = 0.0 if module.momentum is None else module.momentum
    tracked = getattr(module, "track_running_stats", True)
    if module.training and tracked and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            share = 1.0 / float(module.num_batches_tracked)
    batch = module.training or (module.running_mean is None and module.running_var is None)
    mean, var = (module.running_mean, module.running_var) if tracked or not module.training else (None, None)
    return batch_norm(
        x,
        mean,
        var,
        module.weight,
        module.bias,
        training=batch,
        momentum=share,
        eps=module.eps,
        activation=activation,
        residual=residual,
    )
