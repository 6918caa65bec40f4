"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on plain and quantized linear layers."""

# mypy: ignore-errors

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quantization._owners import note
from ..quantization.layers import Shell, is_linear, is_transposed, rows
from ..quantization.select import as_names, never_called, places, put
from . import _lora_files
from ._weight import LazyWeight
from .quantized_linear import QuantizedLinear


class LoRALinear(nn.Module):
    """``base(x) + alpha / rank * dropout(x) @ A.T @ B.T``: the base is frozen, A (rank, K) and B (N, rank) are trained.

    B starts at zero, so that a fresh adapter changes nothing. On a quantized base (QLoRA, Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314) gradients go through the codes.

    Args:
        base: a `torch.nn.Linear`, a `Conv1D` of transformers or a `QuantizedLinear`; its parameters are frozen.
        rank: of the update, at least 1.
        alpha: scales the update.
        dropout: of the adapter's input, in training.
        dtype: of A and B; that of the base's weight or, quantized, of what was quantized, by default.

    Raises:
        TypeError: the base is another module.
        ValueError: `rank` or `dropout` is out of range.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not _fits(base):
            raise TypeError(
                f"bigkernels.nn.LoRALinear: base is a {type(base).__name__}; accepted are Linear and QuantizedLinear"
            )
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"bigkernels.nn.LoRALinear: rank is {rank} and dropout {dropout}; expected a rank of at "
                "least 1 and a dropout in [0, 1)"
            )
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.out_features, self.in_features = _size(base)
        factory_kwargs = {"device": base.weight.device, "dtype": dtype or base.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **factory_kwargs))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **factory_kwargs))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self._unmerged: nn.Module | None = None

    @property
    def merged(self) -> bool:
        return self._modules.get("_unmerged") is not None

    @classmethod
    def add_to(
        cls,
        model: nn.Module,
        targets: str | tuple[str, ...] = ("*_proj",),
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
    ) -> list[str]:
        """Put adapters on the linear layers of a model whose names match a pattern (as in `fnmatch`), in place, and
        freeze all else. A layer under several names gets one adapter. The output projection of a
        `torch.nn.MultiheadAttention`, which is never called, is left alone with a warning.

        Returns:
            The names of the layers.

        Raises:
            ValueError: no layer's name matches.
        """
        targets = as_names(targets)
        layers = {
            module: paths
            for module, paths in places(model).items()
            if paths[0] and _fits(module) and any(fnmatch.fnmatchcase(path, t) for t in targets for path in paths)
        }
        reasons = [f"{paths[0]}: {reason}" for paths in layers.values() if (reason := never_called(model, paths[0]))]
        layers = {module: paths for module, paths in layers.items() if not never_called(model, paths[0])}
        if not layers:
            raise ValueError(
                f"bigkernels.nn.LoRALinear.add_to: no linear layer is named like {', '.join(targets)}"
                + _hint(model, targets)
                + "".join(f"; {reason}" for reason in reasons)
            )
        if reasons:
            warnings.warn(f"bigkernels.nn.LoRALinear.add_to leaves alone {'; '.join(reasons)}", stacklevel=2)
        for module in model.modules():
            module.requires_grad_(False)  # each, as quantized layers note it
        for base, paths in layers.items():
            put(model, paths, cls(base, rank, alpha, dropout).train(base.training))
        note(model)
        return [paths[0] for paths in layers.values()]

    @classmethod
    def save(cls, model: nn.Module, folder: str | Path) -> None:
        """Write the adapters of a model, and nothing else of it, as PEFT does: `adapter_config.json` and
        `adapter_model.safetensors`, which ``peft.PeftModel.from_pretrained`` reads. Needs `safetensors`.

        Raises:
            ValueError: the model has none.
        """
        _lora_files.save(model, folder, cls)

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path) -> list[str]:
        """Put the low-rank adapters of a folder, PEFT's or of `save`, on a model, in place, and freeze all else; an
        adapter that is there already makes room. Needs `safetensors`.

        Returns:
            The names of the layers.

        Raises:
            ValueError: a file is damaged (the tensor's name is given), a layer is not in the model or of another size,
                or the adapters compute something else than this class (as DoRA); the model is then as it was.
        """
        return _lora_files.load(model, folder, cls, _fits, _size)

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with, without dropout, in the shape of the base's weight: shape, dtype and device,
        and values that are computed when they are read, with gradients for A and B; writing to it raises.
        """
        base = self.base
        if self.merged:
            return base.weight

        def values() -> Tensor:
            update, held = self._update(), base.weight.detach()
            return (held.float() + (update.T if _is_transposed(base) else update)).to(held.dtype)

        if torch.compiler.is_dynamo_compiling():
            return values()
        like = base.weight
        return LazyWeight(like.shape, like.dtype, like.device, values, owner=self, trained=self.lora_a.requires_grad)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

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
        return self._update().detach()

    def _update(self) -> Tensor:
        with torch.autocast(self.lora_a.device.type, enabled=False):
            return self.lora_b.float() @ self.lora_a.float() * (self.alpha / self.rank)

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
            layer = base.requantized(base.qweight.dequantize(torch.float32) + self.delta())
        else:
            layer = Shell(base).filled(
                (rows(base).float() + self.delta()).to(base.weight.dtype), base.bias, False, base
            )
        self._unmerged, self.base = base, layer.requires_grad_(False).train(self.training)

    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.merged:
            self.base, self._unmerged = self._unmerged, None

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, merged={self.merged}"


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_linear(type(module))


def _size(base: nn.Module) -> tuple[int, int]:
    """(N, K)."""
    return (base.out_features, base.in_features) if isinstance(base, QuantizedLinear) else tuple(rows(base).shape)


def _is_transposed(base: nn.Module) -> bool:
    shell = getattr(base, "_shell", None)
    return is_transposed(type(base) if shell is None else shell.kind)


def _hint(model: nn.Module, targets: Iterable[str]) -> str:
    """Patterns are of whole names; other libraries take the last part of one."""
    names = [name for name, module in model.named_modules() if _fits(module)]
    ends = [t for t in targets if any(name.endswith(f".{t}") for name in names)]
    return f"; patterns are of whole names: {', '.join(f'*.{t}' for t in ends)}" if ends else ""
