"""Optimizers that torch lacks or that its version of is not for every machine, as their authors wrote them: a loop over
parameters, a few calls of PyTorch each. They compete, and in float64 they give the exact results."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import foreach_lerp_

_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


class Loop:
    """What they share: options, and the states of each parameter, which start at zero."""

    states: tuple[str, ...] = ()

    def __init__(self, params: Sequence[Tensor], **options: float | tuple[float, float]):
        self.params = params
        self.options = options
        self.steps = 0
        self.state = {p: {name: torch.zeros_like(p.detach()) for name in self.states} for p in params}

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for p in self.params:
            self.update(p, p.grad, *self.state[p].values(), **self.options)

    def update(self, p: Tensor, g: Tensor, *states: Tensor, **options: float) -> None:
        raise NotImplementedError


class Lion(Loop):
    """Chen et al. 2023, https://arxiv.org/abs/2302.06675."""

    states = ("exp_avg",)

    def update(self, p, g, average, *, lr, betas, weight_decay) -> None:
        p.mul_(1 - lr * weight_decay)
        p.add_(average.lerp(g, 1 - betas[0]).sign_(), alpha=-lr)
        average.lerp_(g, 1 - betas[1])


class LAMB(Loop):
    """You et al. 2020, https://arxiv.org/abs/1904.00962, with the bias of the averages taken out."""

    states = ("exp_avg", "exp_avg_sq")

    def update(self, p, g, first, second, *, lr, betas, eps, weight_decay) -> None:
        first.lerp_(g, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        root = (second / (1 - betas[1] ** self.steps)).sqrt_().add_(eps)
        direction = (first / (1 - betas[0] ** self.steps)).div_(root).add_(p, alpha=weight_decay)
        p.sub_(direction * (lr * p.norm() / direction.norm()))


class Muon(Loop):
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with products in a given dtype.

    torch.optim.Muon takes bfloat16, whose products take minutes where the processor has no instructions for them.
    """

    states = ("momentum_buffer",)

    def __init__(self, params: Sequence[Tensor], products: torch.dtype, **options: float):
        super().__init__(params, **options)
        self.products = products

    def update(self, p, g, average, *, lr, momentum, weight_decay) -> None:
        average.lerp_(g, 1 - momentum)
        x = g.lerp(average, momentum).to(self.products)
        rows, columns = x.shape
        x = x.T if rows > columns else x
        x = x / x.norm()
        a, b, c = _NEWTON_SCHULZ
        for _ in range(5):
            hessian = x @ x.T
            x = torch.addmm(x, torch.addmm(hessian, hessian, hessian, beta=b, alpha=c), x, beta=a)
        p.mul_(1 - lr * weight_decay)
        p.add_(x.T if rows > columns else x, alpha=-lr * max(1.0, rows / columns) ** 0.5)


class ClippedAndAveraged:
    """What a training loop does around a step of torch's: clip the gradients to a norm, and average the parameters.

    Args:
        max_norm: None where the gradients have been clipped before.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None, decay: float):
        self.optimizer, self.max_norm, self.decay = optimizer, max_norm, decay
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.averages = [p.detach().clone() for p in self.params]

    @property
    def state(self) -> dict[Tensor, dict]:
        averages = zip(self.params, self.averages, strict=True)
        return {p: {**self.optimizer.state[p], "ema": average} for p, average in averages}

    @torch.no_grad()
    def step(self) -> None:
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.max_norm)
        self.optimizer.step()
        foreach_lerp_(self.averages, self.params, 1 - self.decay)
