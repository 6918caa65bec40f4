"""Raw operators refuse what forward did not return; `tests/guard` looks for what they would do with it."""

from __future__ import annotations

import pytest
import torch
from raw_calls import recorded

from bigkernels._samples import SAMPLES

pytestmark = pytest.mark.usefixtures("library")

WRONG = {
    "shorter": lambda t: t.narrow(-1, 0, t.shape[-1] - 1).clone(),
    "in 16 bits": lambda t: t.half(),
    "one dimension more": lambda t: t[None],
    "expanded": lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape) if t.dim() == 1 else t[None, :0],
}
MADE = {
    "attention": ("out", "lse", "grad"),
    "varlen_attention": ("out", "lse", "grad"),
    "cross_entropy": ("lse", "divisor", "grad"),
    "linear_cross_entropy": ("state", "dx", "dw", "divisor", "grad"),
    "rms_norm": ("rstd", "grad"),
    "layer_norm": ("mean", "rstd", "grad"),
}
FIRST = {
    "attention": "plain",
    "varlen_attention": "causal",
    "cross_entropy": "reduction mean",
    "linear_cross_entropy": "reduction mean",
    "rms_norm": "odd",
    "layer_norm": "odd",
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize(("operator", "name"), [(o, n) for o, names in MADE.items() for n in names])
def test_what_forward_returned_is_checked(operator: str, name: str, how: str) -> None:
    sample = next(s for s in SAMPLES[operator] if s.name == FIRST[operator])
    *_, (function, arguments) = recorded(sample, sample.inputs(torch.float32), "cpu")
    at = [a.name for a in function._schema.arguments].index(name)
    given = arguments[at]
    if (how in ("shorter", "expanded") and given.dim() == 0) or (how == "expanded" and name == "grad"):
        pytest.skip("no shorter scalar, and gradients are often expanded")
    with pytest.raises(RuntimeError, match="bigkernels"):
        function(*arguments[:at], WRONG[how](given), *arguments[at + 1 :])


def test_other_labels_than_forwards_are_refused() -> None:
    sample = next(s for s in SAMPLES["linear_cross_entropy"] if s.name == "reduction mean")
    *_, (function, arguments) = recorded(sample, sample.inputs(torch.float32), "cpu")
    at = [a.name for a in function._schema.arguments].index("target")
    fewer = arguments[at].clone()
    fewer[:3] = -100
    with pytest.raises(RuntimeError, match="other tokens count than in forward"):
        function(*arguments[:at], fewer, *arguments[at + 1 :])


def test_packed_weights_are_bytes_of_their_own() -> None:
    ops, x, weight = torch.ops.bigkernels, torch.randn(40, 129), torch.randn(70, 129)
    packed = ops.linear_pack(weight, torch.float32)
    for wrong in (packed[:1].expand(packed.shape), packed.float(), packed[:-1], torch.stack((packed, packed), 1)[:, 0]):
        with pytest.raises(RuntimeError, match="packed is of another weight"):
            ops.linear_fwd(x, weight, None, wrong)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        ops.linear_pack(weight, torch.int64)


def test_an_expanded_cache_is_not_written() -> None:
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16)
    cache, one = torch.randn(2, 8, 2, 16), torch.randn(1, 8, 2, 16).expand(2, 8, 2, 16)
    lengths = torch.tensor([3, 3], dtype=torch.int32)
    for caches in ((one, cache), (cache, one)):
        with pytest.raises(RuntimeError, match="may not be expanded"):
            torch.ops.bigkernels.append_kv_(q, k, k, *caches, lengths, None, None, None, None, None, False)
