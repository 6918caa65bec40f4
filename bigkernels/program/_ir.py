"""A model's step as operations on rows: what is found in a model, before it has addresses.

Between operations are values, by number: each is (rows, width), one row a token, in float32. `Graph.hidden` is what
goes in (the embedded tokens, by the model's own code), `Graph.logits` what comes out. The operations are in the order
in which they run; each value is made once. `_reference.py` runs them in plain PyTorch, in any dtype: that is what they
mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer where the model keeps it: read at each use, never copied."""

    module: nn.Module
    name: str

    def get(self) -> Tensor:
        return getattr(self.module, self.name)


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer that is no module of its own: a parameter that the model's code multiplies with.

    `transposed`: the parameter is (in, out), as Conv1D of transformers has it.
    """

    stored: Stored
    stored_bias: Stored | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        return self.stored.get()

    @property
    def bias(self) -> Tensor | None:
        return None if self.stored_bias is None else self.stored_bias.get()


@dataclass(frozen=True)
class NormSpec:
    """kind: "rms" or "layer". The weight has `offset` added to it; None is all ones."""

    kind: str
    size: int
    eps: float
    weight: Stored | None = None
    bias: Stored | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Norm:
    """out = scale * norm(x), over groups of `spec.size` columns, + residual_scale * residual"""

    x: int
    out: int
    spec: NormSpec
    residual: int | None = None
    scale: float = 1.0
    residual_scale: float = 1.0


@dataclass(frozen=True)
class Combine:
    """out = sum of scale * x [* channel]: terms are (x, scale, channel or None), at most 4"""

    out: int
    terms: tuple[tuple[int, float, Stored | None], ...]


@dataclass(frozen=True)
class Activate:
    """out = scale * act(x[x_column:]) [* (up[up_column:] + up_offset)], then softcap.

    act: silu, gelu, gelu_tanh, relu, relu2, sigmoid, identity, tanh or quick_gelu. `limit` cuts x from above and up on
    both sides.
    """

    x: int
    out: int
    act: str
    width: int
    up: int | None = None
    x_column: int = 0
    up_column: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    limit: float = 0.0
    alpha: float = 1.702
    up_offset: float = 0.0


@dataclass(frozen=True)
class Product:
    """out = layer(x[x_column:]): `module` is a linear layer (nn.Linear, a quantized one, transformers' Conv1D, or a
    StoredLinear). A layer with adapters is several products and a sum.
    """

    x: int
    out: int
    module: nn.Module | StoredLinear
    x_column: int = 0


@dataclass(frozen=True)
class HeadsOf:
    """Head h is the `d` columns of value x that begin at columns[h]."""

    x: int
    columns: tuple[int, ...]
    d: int


@dataclass(frozen=True)
class Heads:
    """Norms (each head) and rotates queries and keys; keys and values are appended to the cache of `layer`.

    `k` and `v` are None where a layer reads the cache of another. `angles` is an index of `Graph.angles`, or None.
    The first `rotary` elements of a head are rotated; pairs are (2 i, 2 i + 1) if `interleaved`, else (i, i + half).
    """

    q: HeadsOf
    k: HeadsOf | None
    v: HeadsOf | None
    out: int
    layer: int
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    angles: int | None = None
    rotary: int = 0
    interleaved: bool = False


@dataclass(frozen=True)
class Attend:
    """Causal attention of q, (heads * d), over the cache of `layer`: out (heads * dv).

    `window`: keys that a token sees, itself included; 0 is all. `alibi`: a slope a head, adds slope * (key - query).
    """

    q: int
    out: int
    layer: int
    heads: int
    groups: int
    d: int
    dv: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Stored | None = None
    alibi: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """The stacked weights of experts, by their names in `module`: parameters, or `QuantizedExperts`.

    gate and up lie in one, (E, 2 I, K), or (E, K, 2 I) if `transposed`: gate's rows before up's, or in turn if
    `interleaved`. down is (E, K, I), or (E, I, K). With `up_first`, halves are the other way round. Biases are (E, 2 I)
    and (E, K), or None.
    """

    module: nn.Module
    gate_up: str
    down: str
    gate_up_bias: str | None = None
    down_bias: str | None = None
    transposed: bool = False
    interleaved: bool = False
    up_first: bool = False


@dataclass(frozen=True)
class Experts:
    """out = sum over the `top` experts e of a row of weight_e * down_e(act(gate_e x) * (up_e x + up_offset)).

    The router is `logits` (experts), by softmax or sigmoid, the largest `top`, made to sum to 1 with `renormalize`,
    times `scale`; or the model's own code, which gave `weights` and `chosen` (top) each. `limit` and `alpha` are those
    of `Activate`.
    """

    x: int
    out: int
    stacked: ExpertWeights
    experts: int
    top: int
    act: str
    logits: int | None = None
    weights: int | None = None
    chosen: int | None = None
    renormalize: bool = False
    sigmoid: bool = False
    scale: float = 1.0
    limit: float = 0.0
    alpha: float = 1.702
    up_offset: float = 0.0


@dataclass(frozen=True)
class Call:
    """Values `outs` = function(*values `xs`), each (B, S, width): the model's own code in the middle of the program.

    `cached`: it keeps something of the tokens in the cache, and is given a `_context.Context`, too.
    """

    xs: tuple[int, ...]
    outs: tuple[int, ...]
    function: Callable
    path: str
    cached: bool = False


@dataclass(frozen=True)
class Keep:
    """out = the last rows of each sequence of x: what the head is asked for. Later values have those rows only."""

    x: int
    out: int


Operation = Norm | Combine | Activate | Product | Heads | Attend | Experts | Call | Keep


@dataclass(frozen=True)
class Angles:
    """A rotary embedding: `module(x, position_ids, *extra)` gives (cos, sin), (B or 1, S, rotary) each, of the dtype
    that the model rotates with, for x of its hidden states' `dtype`; `table` where they depend on a token's position
    alone, so that they may be tabulated (not for dynamic scaling).
    """

    module: Callable
    extra: tuple
    rotary: int
    table: bool
    dtype: torch.dtype = torch.float32


@dataclass
class Graph:
    """What was found in a model.

    Attributes:
        widths: of the values, by number.
        embed: (input_ids or inputs_embeds, position_ids) to the hidden states (B, S, width) that the first operation
            reads: the model's own code before its first block.
        layers: how many caches there are; `owned`, those that calls keep.
        padded: whether sequences may have padding in front, and tokens other positions than their places.
        own_cache: whether the cache has to be of the kind that the model's configuration asks for.
        position_ids: whether the model's forward takes them; if not, a token's position is its place in the cache.
        counted: whether it is that where they are not given, without padding and with it.
        modules: all modules whose code the program stands for; what is called instead of them must be watched.
    """

    widths: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    angles: list[Angles] = field(default_factory=list)
    hidden: int = 0
    logits: int = -1
    layers: int = 0
    owned: set[int] = field(default_factory=set)
    padded: bool = True
    own_cache: bool = False
    embed: Callable | None = None
    position_ids: bool = True
    counted: tuple[bool, bool] = (True, True)
    modules: list[nn.Module] = field(default_factory=list)

    def value(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1
