"""What a sample is: a seeded call of a public function, its results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import functional
from .._compare import Comparison, Scale, compare_all
from ..ops import use


class Draw:
    """Draws tensors; the same seed gives the same values on every device, up to the rounding of the dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return (values * scale + mean).to(self.device, self.dtype)

    def positive(self, *shape: int) -> Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return (values + 0.25).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, dtype=dtype, device="cpu").to(self.device)

    def slopes(self, heads: int) -> Tensor:
        """ALiBi's, float32."""
        return 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float32, device=self.device)

    def angles(self, batch: int, length: int, rotary: int, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
        """cos and sin (batch, length, rotary) as models make them: positions from 0, another start a batch."""
        first, later, pair = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (batch, length, rotary // 2))
        position = later + 7 * first[:, None]
        half = position[..., None].double() * (10000.0 ** (-2 * pair / rotary)).double()
        both = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
        return both.cos().to(self.device, self.dtype), both.sin().to(self.device, self.dtype)


@dataclass(frozen=True)
class Sample:
    """One call of a public function.

    Attributes:
        name: what is special about the case.
        make: draws the tensor arguments, by name.
        options: the other arguments.
        differentiable: the arguments that get gradients.
        written: the arguments that the function writes; each call gets copies of them.
        scale: what the criterion measures roundings of the outputs by.
        gradient_scale: the same for the gradients.
        gradient_roundings: how many roundings the criterion allows the gradients beyond PyTorch's error: more than one
            where backward works from rounded results of forward.
    """

    operator: str
    name: str
    make: Callable[[Draw], dict[str, Tensor]]
    options: dict[str, object] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    scale: Scale = "element"
    gradient_scale: Scale = "element"
    gradient_roundings: float = 1.0

    def with_options(self, **options: object) -> Sample:
        return replace(self, options=self.options | options)

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        return self.make(Draw(dtype, device, seed))

    def call(self, inputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The public function on `inputs`."""
        inputs = inputs | {name: inputs[name].clone() for name in self.written}
        return getattr(functional, self.operator)(**inputs, **self.options)

    def judge(
        self,
        ours: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        *,
        gradient_roundings: float | None = None,
    ) -> dict[str, Comparison]:
        """The criterion of the package for results of this sample; names of gradients start with "grad".

        Args:
            gradient_roundings: instead of the sample's own, which the CPU kernels need.
        """
        if gradient_roundings is None:
            gradient_roundings = self.gradient_roundings
        grads = {name: value for name, value in exact.items() if name.startswith("grad")}
        outputs = {name: value for name, value in exact.items() if name not in grads}
        return compare_all(ours, plain, outputs, scale=self.scale) | compare_all(
            ours, plain, grads, roundings=gradient_roundings, scale=self.gradient_scale
        )

    def results(
        self, inputs: dict[str, Tensor], *, backend: str | None = None, seed: int = 1, backward: bool = True
    ) -> dict[str, Tensor]:
        """Outputs ("out0", ...) and, with `backward`, gradients ("grad x", ...), the upstream gradients being random.

        Args:
            backend: forced by `bigkernels.use`; None lets the operator choose.
            seed: of the upstream gradients: rounded to 16 bits, so that every dtype gets the same ones.
        """
        if self.options.get("dropout_p"):
            torch.manual_seed(0)  # every backend draws the same
        leaves = {k: t.detach() for k, t in inputs.items()}
        if backward:
            leaves |= {name: leaves[name].requires_grad_() for name in self.differentiable}
        with use(backend) if backend else nullcontext(), torch.set_grad_enabled(backward):
            outputs = self.call(leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
            if backward and self.differentiable:
                draw = Draw(torch.float32, outputs[0].device, seed)
                upstream = [_coarse(draw.normal(*out.shape)).to(out.dtype) for out in outputs]
                grads = torch.autograd.grad(outputs, [leaves[n] for n in self.differentiable], upstream)
                results |= {f"grad {n}": g for n, g in zip(self.differentiable, grads, strict=True)}
        return results


def _coarse(values: Tensor) -> Tensor:
    """Values that bfloat16 and float16 both hold exactly."""
    return (values * 16).round().clamp(-127, 127) / 16


def widen(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64; integers as they are."""
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def strided(t: Tensor) -> Tensor:
    """The same values as every second element of a wider tensor."""
    return torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0]


def rows_strided(t: Tensor) -> Tensor:
    """The same values as the first columns of a wider matrix."""
    return torch.cat((t, torch.full_like(t[..., :3], float("nan"))), -1)[..., : t.shape[-1]]
