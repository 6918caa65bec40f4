"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on plain and quantized linear layers."""

from __future__ import annotations

import fnmatch
import math

import torch
from torch import Tensor, nn

from ..quantization import quantize_weight
from .quantized_linear import QuantizedLinear


class LoRALinear(nn.Module):
    """``base(x) + alpha / rank * dropout(x) @ A.T @ B.T``: the base is frozen, A (rank, K) and B (N, rank) are trained.

    B starts at zero, so that a fresh adapter changes nothing. On a quantized base (QLoRA, Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314) gradients go through the codes.

    Args:
        base: a `torch.nn.Linear` or `QuantizedLinear`; its parameters are frozen.
        rank: of the update, at least 1.
        alpha: scales the update.
        dropout: of the adapter's input, in training.
        dtype: of A and B; that of the base's weight or, quantized, of what was quantized, by default.

    Raises:
        TypeError: the base is another module.
        ValueError: `rank` or `dropout` is out of range.
    """

    def __init__(
        self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, *,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(base, (nn.Linear, QuantizedLinear)):
            raise TypeError(f"bigkernels.nn.LoRALinear: base is a {type(base).__name__}; accepted are Linear and "
                            "QuantizedLinear")  # fmt: skip
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(f"bigkernels.nn.LoRALinear: rank is {rank} and dropout {dropout}; expected a rank of at "
                             "least 1 and a dropout in [0, 1)")  # fmt: skip
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        device = next(iter(base.state_dict().values())).device
        if dtype is None:
            dtype = base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self._unmerged: nn.Module | None = None

    @property
    def merged(self) -> bool:
        return self._modules.get("_unmerged") is not None

    @classmethod
    def add_to(
        cls, model: nn.Module, targets: tuple[str, ...] = ("*_proj",), rank: int = 8, alpha: float = 16.0,
        dropout: float = 0.0,
    ) -> list[str]:  # fmt: skip
        """Put adapters on the linear layers of a model whose names match a pattern (as in `fnmatch`), in place, and
        freeze all else.

        Returns:
            The names of the layers.

        Raises:
            ValueError: no layer's name matches.
        """
        names = [
            name for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, QuantizedLinear)) and any(fnmatch.fnmatchcase(name, t) for t in targets)
        ]  # fmt: skip
        if not names:
            raise ValueError(f"bigkernels.nn.LoRALinear.add_to: no linear layer is named like {', '.join(targets)}")
        model.requires_grad_(False)
        for name in names:
            base = model.get_submodule(name)
            model.set_submodule(name, cls(base, rank, alpha, dropout).train(base.training))
        return names

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self.merged:
            return out
        inner = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        if not torch.is_autocast_enabled(x.device.type):
            inner = inner.to(self.lora_a.dtype)
        update = nn.functional.linear(nn.functional.linear(inner, self.lora_a), self.lora_b)
        return out + (update * (self.alpha / self.rank)).to(out.dtype)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (N, K), in float32."""
        return self.lora_b.detach().float() @ self.lora_a.detach().float() * (self.alpha / self.rank)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into the weight; a quantized one is quantized again, with the error that this brings, and
        where its format is calibrated in the one that needs no data.

        The base is kept aside, so that `unmerge` gives it back bit by bit; a state dict of a merged layer holds both.
        """
        if self.merged:
            return
        base = self.base
        if isinstance(base, QuantizedLinear):
            weight = base.qweight.dequantize(torch.float32) + self.delta()
            made = QuantizedLinear(quantize_weight(weight.to(base.dtype), base.config.blind()), base.bias)
        else:
            made = nn.Linear(base.in_features, base.out_features, base.bias is not None, "meta", base.weight.dtype)
            made.weight = nn.Parameter((base.weight.float() + self.delta()).to(base.weight.dtype))
            made.bias = base.bias
        self._unmerged, self.base = base, made.requires_grad_(False).train(self.training)

    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.merged:
            self.base, self._unmerged = self._unmerged, None

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, merged={self.merged}"
