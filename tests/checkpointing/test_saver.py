"""What "int8" and "fp8" keep: how many tensors, in how many bytes, which are computed again, and how exact it is."""

from __future__ import annotations

import gc

import pytest
import torch
from pretend_gpu import PretendGpu, pretend, put
from segments import compare, gradients, relative
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import bigkernels.functional as BF
from bigkernels import checkpoint, saved_activations
from bigkernels.checkpointing import _saver, int8, resolve_policy
from bigkernels.checkpointing._saver import Exact, Packed, Saver
from bigkernels.memory import peak

WIDTH, ROWS = 128, 64
formats = pytest.mark.parametrize("format", ["int8", "fp8"])


class Kept:
    """What a saver has kept of everything that autograd saved in a function."""

    def __init__(self, fn, *args, policy="int8", constants=()):
        saver, packs = Saver(resolve_policy(policy), constants), []

        def pack(t):
            packs.append(saver.pack(t))
            return packs[-1]

        with saved_tensors_hooks(pack, saver.unpack):
            self.out = fn(*args)
        kept = {id(p.kept): p.kept for p in packs if isinstance(p, Packed)}.values()
        self.stored = [k for k in kept if isinstance(k, _saver._Stored)]
        self.recipes = [k for k in kept if isinstance(k, _saver._Recomputed)]
        self.exact = [p.tensor for p in packs if isinstance(p, Exact)]
        self.packs, self.saver = packs, saver

    @property
    def nbytes(self) -> int:
        return sum(k.values.nbytes + k.scale.nbytes for k in self.stored)


@pytest.fixture
def w() -> Tensor:
    return nn.Parameter(torch.randn(WIDTH, WIDTH))


@pytest.fixture
def x() -> Tensor:
    return (torch.randn(ROWS, WIDTH).requires_grad_() * 1).contiguous()


def coded(*sizes: int) -> int:
    return sum(n + 4 * -(-n // 128) for n in sizes)


# ---- counts ----------------------------------------------------------------------------------------------------------


@formats
def test_one_tensor_saved_by_several_nodes(format: str, w, x) -> None:
    kept = Kept(lambda: x @ w + (x.sin() @ w) * x.exp() + x.mT.mT @ w, policy=format)
    # x by two products and a sine; sine of x; exp of x, as a result and as a factor; the factor
    assert len(kept.stored) == 4 and not kept.recipes
    assert kept.nbytes == coded(*[ROWS * WIDTH] * 4)


def test_parts_of_one_product(w, x) -> None:
    """q, k and v of a fused projection are parts of one tensor, which is kept once."""
    wide = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))

    def fn():
        q, k, v = (x @ wide).chunk(3, dim=-1)
        return (q @ k.T).softmax(-1) @ v

    kept = Kept(fn)
    assert sorted(k.values.numel() for k in kept.stored) == [ROWS * ROWS, ROWS * WIDTH, ROWS * 3 * WIDTH]
    assert kept.nbytes == coded(ROWS * WIDTH, 3 * ROWS * WIDTH, ROWS * ROWS)


def test_a_small_part_of_a_large_tensor(x) -> None:
    """The rest is not kept with it."""
    large = torch.randn(ROWS * 16, WIDTH).requires_grad_() * 1
    kept = Kept(lambda: large[:, ::16].exp() + large[:, :8].sin())
    assert sum(k.values.numel() for k in kept.stored) == 3 * ROWS * WIDTH - ROWS * WIDTH


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t.view(8, 8, WIDTH).transpose(0, 1),
        lambda t: t.view(8, 8, 4, 32).permute(0, 2, 1, 3),
        lambda t: t[None, :, None],
        lambda t: t[:, :100],
        lambda t: t[3:],
        lambda t: t[::2, 1::2],
        lambda t: t[:, None].expand(ROWS, 3, WIDTH),
        lambda t: t.expand(2, ROWS, WIDTH),
        lambda t: t.flatten()[5:-3],
        lambda t: t.diagonal()[None].expand(ROWS * 2, -1),
        lambda t: t.unfold(0, 8, 4),
    ],
)
def test_views(view, w, x) -> None:
    """Shapes and strides are what they were; values within a step of the scale of what lies beside them."""
    for t in (x, (x.view(8, 8, WIDTH).transpose(0, 1) * 1).reshape(ROWS, WIDTH)):
        saver = Saver(int8())
        v = view(t)
        packed = saver.pack(v)
        back = saver.unpack(packed)
        assert back.shape == v.shape
        if v.numel() >= _saver._LEAST:
            assert isinstance(packed, Packed)
        assert (back - v).abs().max() <= float(t.detach().abs().max()) / 125 * 0.5001
        if v.numel() >= _saver._LEAST and v.is_contiguous():
            assert back.stride() == v.stride()


@pytest.mark.parametrize("parts", [lambda t: t.chunk(2), lambda t: (t[1], t[3]), lambda t: (t[1].T, t[3].T)])
@pytest.mark.parametrize("policy", ["offload", "int8", "fp8", "int8+offload"])
def test_parts_that_stay_as_they_are(policy: str, parts) -> None:
    """Too small to be put elsewhere, or divided by: they lie where they did in the memory of the whole."""
    x = torch.rand(4, ROWS, WIDTH) + 0.5

    def fn(x):
        a, b = parts(x * 2)
        return a / b

    def gradient(run):
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        return leaf.grad

    assert torch.equal(gradient(fn), gradient(lambda leaf: checkpoint(fn, leaf, policy=policy)))


def test_layouts_of_dense_tensors_are_kept() -> None:
    for t in (torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last), torch.randn(64, 128).T):
        saver = Saver(int8())
        back = saver.unpack(saver.pack(t))
        assert back.stride() == t.stride()
        torch.testing.assert_close(back, t, atol=float(t.abs().max()) / 250, rtol=0)


def test_a_modified_tensor_is_another(x) -> None:
    saver = Saver(int8())
    y = x.detach().clone()
    first = saver.pack(y)
    before = y.clone()
    y.mul_(-3)
    second = saver.pack(y)
    assert first.kept is not second.kept
    torch.testing.assert_close(saver.unpack(first), before, atol=0.03, rtol=0)
    torch.testing.assert_close(saver.unpack(second), y, atol=0.09, rtol=0)


def test_an_address_used_again_is_another_tensor() -> None:
    saver = Saver(int8())
    packs = []
    for i in range(50):
        packs.append((saver.pack(torch.full((4096,), float(i))), i))
    for packed, i in packs:
        assert (saver.unpack(packed) == i).all()


class Unlike:
    """Small modules, with what is kept of them: (in 8 bits, computed again)."""

    @staticmethod
    def layer_norm(x, w):
        return F.layer_norm(x, (WIDTH,), w[0], w[1]) @ w

    @staticmethod
    def swiglu(x, w):
        return (F.silu(x @ w) * (x @ w.T)) @ w

    @staticmethod
    def gelu(x, w):
        return F.gelu(x @ w) @ w

    @staticmethod
    def our_rms_norm(x, w):
        return BF.rms_norm(x, w[0]) @ w

    @staticmethod
    def our_layer_norm(x, w):
        return BF.layer_norm(x, w[0], w[1]) @ w

    @staticmethod
    def our_glu(x, w):
        return BF.glu(x @ w, x @ w.T) @ w

    @staticmethod
    def gated_and_normed(x, w):
        y = BF.rms_norm(x, w[0])
        return x + BF.glu(y @ w, y @ w.T) @ w


COUNTS = {
    "layer_norm": (1, 1),  # x; its norm
    "swiglu": (3, 2),  # x and the products; silu and what it is multiplied to
    "gelu": (2, 1),
    "our_rms_norm": (1, 1),
    "our_layer_norm": (1, 1),
    "our_glu": (3, 1),
    "gated_and_normed": (3, 2),
}


@formats
@pytest.mark.parametrize("name", COUNTS)
def test_what_is_computed_again(name: str, format: str, w, x) -> None:
    fn = getattr(Unlike, name)
    kept = Kept(fn, x, w, policy=format)
    assert (len(kept.stored), len(kept.recipes)) == COUNTS[name]
    assert kept.nbytes == coded(*[ROWS * WIDTH] * COUNTS[name][0])
    bound = 0.02 if format == "int8" else 0.06
    assert all(0 < e < bound for e in compare(fn, (x, w), [x, w], format))
    # What is computed again is as near as what is kept.
    for packed in kept.packs:
        if isinstance(packed, Packed) and packed.kept in kept.recipes:
            assert kept.saver.unpack(packed).is_contiguous()


def test_recipes_of_strided_results(w) -> None:
    """A product of a part and of a transposed tensor: the layout of its result is that of forward."""
    a = torch.randn(ROWS, 2 * WIDTH).requires_grad_() * 1
    b = torch.randn(WIDTH, ROWS).requires_grad_() * 1
    for f, g in ((a[:, :WIDTH], b.T), (a[:, ::2], b.T), (b.T, a[:, ::2])):
        assert all(e < 0.02 for e in compare(lambda f, g: (f * g) @ w, (f, g), [a, b, w], "int8"))


def test_half_of_a_product_is_no_recipe(w, x) -> None:
    """The other operand is not saved where this one needs no gradient."""
    gate = torch.rand(ROWS, WIDTH)
    assert all(e < 0.02 for e in compare(lambda x: (x * gate).exp() @ w, (x,), [w], "int8"))
    assert all(e < 0.02 for e in compare(lambda x: (x * 3.0) @ w, (x,), [x, w], "int8"))


def test_backward_twice_with_recipes(w, x) -> None:
    out = checkpoint(Unlike.gated_and_normed, x, w, policy="int8")
    first = gradients(out, [x, w], retain_graph=True)
    assert all(map(torch.equal, first, gradients(out, [x, w], retain_graph=True)))
    assert all(map(torch.equal, first, gradients(out, [x, w])))


# ---- what stays as it is ---------------------------------------------------------------------------------------------


def test_parameters_and_leaves(x) -> None:
    model = nn.Linear(WIDTH, WIDTH)
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    leaf = torch.randn(ROWS, WIDTH, requires_grad=True)
    kept = Kept(lambda: frozen(model(leaf)))
    assert not kept.stored
    pointers = {p.data_ptr() for p in (model.weight, frozen.weight, leaf)}
    assert {t.untyped_storage().data_ptr() for t in kept.exact} <= pointers


def test_autocasts_copies_of_parameters(x) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    with torch.autocast("cpu", torch.bfloat16):
        kept = Kept(model, x)
    assert len(kept.stored) == 2  # x in bfloat16, and the first layer's output
    assert all(k.values.numel() == ROWS * WIDTH for k in kept.stored)


def test_integers_and_masks(x) -> None:
    index, mask = torch.randint(ROWS, (_saver._LEAST,)), torch.rand(ROWS, WIDTH) < 0.5
    kept = Kept(lambda: x.masked_fill(mask, 0.0).index_select(0, index))
    assert not kept.stored


def test_statistics(w) -> None:
    """A statistic a row stays exact, where it is large enough to be worth coding too."""
    x = torch.randn(64 * _saver._LEAST // 64, 64).requires_grad_() * 1
    weight = nn.Parameter(torch.ones(64))
    for norm in (lambda t: BF.rms_norm(t, weight), lambda t: F.layer_norm(t, (64,), weight)):
        kept = Kept(lambda norm=norm: norm(x))
        assert [k.values.numel() for k in kept.stored] == [x.numel()]
    q = torch.randn(2, 8, 512, 32).requires_grad_() * 1
    kept = Kept(lambda: F.scaled_dot_product_attention(q, q, q))
    assert {k.values.numel() for k in kept.stored} == {q.numel()}
    assert any(t.numel() == 2 * 8 * 512 and t.dtype == torch.float32 for t in kept.exact)


def test_large_tensors_elsewhere_do_not_make_statistics_of_the_rest(x) -> None:
    """As logits in a context that lasts for several steps."""
    logits = torch.randn(ROWS, 32 * WIDTH).requires_grad_() * 1
    kept = Kept(lambda: (logits.exp(), *[(x * i).sin().cos() for i in range(1, 9)]))
    assert len(kept.stored) >= 8


def test_constants(w, x) -> None:
    """Arguments without a gradient: rope's cos and sin, and masks with infinities."""
    cos, mask = torch.rand(ROWS, WIDTH), torch.full((ROWS, ROWS), -torch.inf).triu(1)

    def fn(x, pair, *, mask):
        y = x * pair[0]
        return ((y @ y.T / 64 + mask).softmax(-1) @ y) * pair[0].unsqueeze(0)[0]

    kept = Kept(lambda: fn(x, (cos, 1), mask=mask), constants=[cos, mask])
    assert any(t.data_ptr() == cos.data_ptr() for t in kept.exact)
    for policy in ("int8", "fp8", "recompute+int8"):
        out = checkpoint(fn, x, (cos, 1), policy=policy, mask=mask)
        expected = gradients(fn(x, (cos, 1), mask=mask), [x])
        assert relative(*gradients(out, [x]), *expected) < 0.06


def test_values_without_a_code(x) -> None:
    """Infinities and NaN: the tensor is kept as it is, and not lost."""
    mask = torch.full((ROWS, WIDTH), -torch.inf).triu(1)
    with saved_activations("int8"):
        out = (x * mask.exp()).sin() * torch.maximum(mask, torch.tensor(-1e30))
        saver = Saver(int8())
        assert torch.equal(saver.unpack(saver.pack(mask)), mask)
    assert torch.isfinite(*gradients(out, [x])).all()


@formats
def test_infinities_on_a_gpu(format, monkeypatch) -> None:
    """There nobody waits to hear what is in a tensor: infinities have codes, and what is in no code stays as it is."""
    mask = torch.full((ROWS, ROWS), -torch.inf).triu(1)
    q = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    wide = torch.full((ROWS, WIDTH), 1e300, dtype=torch.float64, requires_grad=True)

    def run():
        weights = (q @ q.transpose(-1, -2) / WIDTH + mask).log_softmax(-1)  # its result is saved, and holds infinities
        return gradients((weights.exp() @ q).square().mean() + (wide * 1e-300).square().mean(), [q, wide])

    expected = run()
    pretend(monkeypatch)
    put(q, wide, mask)
    with PretendGpu(waits="refused"), saved_activations(format):
        found = run()
    assert relative(found[0], expected[0]) < 0.1 and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types(dtype, w) -> None:
    t = torch.randn(ROWS, WIDTH, dtype=dtype).requires_grad_() * 1
    kept = Kept(lambda: t.sin())
    assert kept.nbytes == coded(t.numel())
    back = kept.saver.unpack(kept.packs[0])
    assert back.dtype == dtype and relative(back, t.detach()) < 0.01


def test_types_that_stay() -> None:
    for t in (torch.randn(8192).to(torch.float8_e4m3fn), torch.randn(8192, dtype=torch.complex64), torch.randn(64)):
        saver = Saver(int8())
        packed = saver.pack(t)
        assert isinstance(packed, Exact) and packed.tensor.data_ptr() == t.data_ptr()
    sparse = torch.eye(128).to_sparse()
    assert isinstance(Saver(int8()).pack(sparse), Exact)


def test_written_to_where_it_stays(w) -> None:
    """Autograd's own check does not see through hooks."""
    small = torch.randn(32, requires_grad=True) * 1
    with saved_activations("int8"):
        out = small.sin()
    small.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- exactness, and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, step", [("int8", 0.5 / 125), ("fp8", 1 / 16)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_error_bound(format: str, step: float, scale: float) -> None:
    t = torch.randn(ROWS, WIDTH) * scale
    saver = Saver(resolve_policy(format))
    back = saver.unpack(saver.pack(t))
    largest = t.abs().amax(1, keepdim=True)  # rows are blocks
    bound = largest * step if format == "int8" else t.abs() * step + largest * 2**-15
    assert ((back - t).abs() <= bound * 1.0001).all() and not torch.equal(back, t)


@formats
def test_stochastic_rounding_has_the_mean(format: str) -> None:
    t = torch.randn(ROWS, WIDTH)
    policy = resolve_policy(format)
    policy = type(policy)(code=type(policy.code)(format, stochastic=True))
    backs = []
    state = torch.get_rng_state()
    for _ in range(200):
        saver = Saver(policy)
        backs.append(saver.unpack(saver.pack(t)))
    assert torch.equal(torch.get_rng_state(), state), "the model's generator was used"
    assert not torch.equal(backs[0], backs[1])
    nearest = Saver(resolve_policy(format))
    single = relative(nearest.unpack(nearest.pack(t)), t)
    assert relative(torch.stack(backs).mean(0), t) < single / 3


@formats
def test_memory(format: str, w) -> None:
    """What a graph holds is what was counted."""
    x = torch.randn(1024, WIDTH).requires_grad_() * 1

    def fn(x):
        for _ in range(4):
            x = x + BF.glu(x @ w, x @ w.T) @ w
        return x

    ends = []
    for run in (fn, lambda x: checkpoint(fn, x, policy=format)):
        with peak() as p:
            out = run(x)
        ends.append(p.end - out.nbytes)
        del out
    n = x.numel()
    assert ends[0] >= 4 * 3 * n * 4  # two products and the gated one; x is the sum before
    assert ends[1] <= coded(*[n] * 12) * 1.02, ends


def test_nothing_is_held_after_backward(w, x) -> None:
    """Neither by the saver of a segment, nor by what is kept once for several nodes."""

    def all_kept() -> set[int]:
        return {id(o) for o in gc.get_objects() if type(o) in (_saver._Stored, _saver._Recomputed)}

    before = all_kept()
    out = checkpoint(Unlike.gated_and_normed, x, w, policy="int8").sum()
    kept = all_kept() - before
    assert len(kept) >= 5
    out.backward()
    assert not kept & all_kept()
