"""The optimizers: arguments and defaults of their torch namesakes, and those that all share (`Optimizer`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ._optimizer import Optimizer
from ._reference import RULES

Betas = tuple[float | Tensor, float | Tensor]


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), as torch.optim.Adam.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate; a tensor on the parameters' GPU is read there.
        betas: decays of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: added to the gradient times the parameter, or decoupled.
        amsgrad: divide by the largest second average so far (Reddi et al. 2018).
        maximize: ascend.
        foreach, fused, capturable: accepted for torch's sake: every step is fused, and can be captured in a CUDA graph.
        differentiable: not supported.

    The other arguments: see `Optimizer`.
    """

    _rule = RULES["adam"]
    _torch_options = ("decoupled_weight_decay",)

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "ema_decay": ema_decay,
        }
        super().__init__(params, options, max_grad_norm=max_grad_norm)


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), as torch.optim.AdamW: Adam with decoupled
    weight decay. The arguments: see `Adam` and `Optimizer`."""

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            cautious=cautious,
            state_dtype=state_dtype,
            rounding=rounding,
            ema_decay=ema_decay,
            max_grad_norm=max_grad_norm,
            decoupled_weight_decay=True,
        )


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, as torch.optim.SGD.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate.
        momentum: decay of the sum of past gradients; 0 keeps none.
        dampening: the part of a gradient that does not enter the momentum.
        weight_decay: added to the gradient times the parameter, or decoupled.
        nesterov: look ahead by one momentum.
        maximize: ascend.
        foreach, fused, differentiable: see `Adam`. Sparse gradients are made dense.

    The other arguments: see `Optimizer`.
    """

    _rule = RULES["sgd"]
    _takes_sparse = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "ema_decay": ema_decay,
        }
        super().__init__(params, options, max_grad_norm=max_grad_norm)


class RMSprop(Optimizer):
    """RMSprop (Hinton, lecture 6e, 2012), as torch.optim.RMSprop.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate.
        alpha: decay of the average of squared gradients.
        eps: added to its root.
        weight_decay: added to the gradient times the parameter, or decoupled.
        momentum: decay of the sum of past steps; 0 keeps none.
        centered: divide by an estimate of the variance (Graves 2013, https://arxiv.org/abs/1308.0850).
        maximize: ascend.
        foreach, capturable, differentiable: see `Adam`.

    The other arguments: see `Optimizer`.
    """

    _rule = RULES["rmsprop"]

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        options = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "ema_decay": ema_decay,
        }
        super().__init__(params, options, max_grad_norm=max_grad_norm)


class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan and Singer 2011), as torch.optim.Adagrad.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate.
        lr_decay: step t has lr / (1 + (t - 1) lr_decay).
        weight_decay: added to the gradient times the parameter, or decoupled.
        initial_accumulator_value: where the sums of squares start.
        eps: added to their root.
        maximize: ascend.
        foreach, fused, differentiable: see `Adam`. Sparse gradients are made dense.

    The other arguments: see `Optimizer`.
    """

    _rule = RULES["adagrad"]
    _takes_sparse = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        options = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "ema_decay": ema_decay,
        }
        super().__init__(params, options, max_grad_norm=max_grad_norm)


class Adamax(Optimizer):
    """Adamax (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), as torch.optim.Adamax: the step is divided by the
    largest gradient of late instead of a root of squares.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate.
        betas: decays of the first moment and of the largest gradient.
        eps: added to the gradient's magnitude.
        weight_decay: added to the gradient times the parameter, or decoupled.
        maximize: ascend.
        foreach, differentiable, capturable: see `Adam`.

    The other arguments: see `Optimizer`.
    """

    _rule = RULES["adamax"]

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "ema_decay": ema_decay,
        }
        super().__init__(params, options, max_grad_norm=max_grad_norm)


class Lion(Optimizer):
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675): steps of one size, in the direction of a sign.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate; a third to a tenth of AdamW's.
        betas: decays for the step and for what is kept.
        weight_decay: decoupled unless `decoupled_weight_decay` is False; three to ten times AdamW's.
        maximize: ascend.

    The other arguments: see `Optimizer`.
    """

    _rule = RULES["lion"]

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        options = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "ema_decay": ema_decay,
        }
        super().__init__(params, options, max_grad_norm=max_grad_norm)


class LAMB(Optimizer):
    """LAMB (You et al. 2020, https://arxiv.org/abs/1904.00962): Adam's direction, as long as the parameter is.

    The decay is part of the direction; each tensor's step has the norm of the tensor times lr. The second pass reads
    the states as they are stored, so in 16 and 8 bits it takes their rounding in.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate.
        betas: decays of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: the part of the parameter in the direction.
        maximize: ascend.

    The other arguments: see `Optimizer`.
    """

    _rule = RULES["lamb"]

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "ema_decay": ema_decay,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, options, max_grad_norm=max_grad_norm)
