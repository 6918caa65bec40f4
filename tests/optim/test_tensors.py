"""Parameters and gradients of every kind of shape, place and value; and that results depend on nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_formulas import FORMULAS
from sizes import every_size
from torch import Tensor

from bigkernels import optim
from bigkernels.optim import _formats

ALGORITHMS = tuple(FORMULAS)


def make(name: str, params, **options):
    if name == "SGD":
        options = {"momentum": 0.9, **options}
    return getattr(optim, name)(params, **options)


def step_all(optimizer, params: list[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        p.grad = torch.randn(p.shape, generator=generator).to(dtype or p.dtype)
    optimizer.step()


# ---- layouts --------------------------------------------------------------------------------------------------------

VIEWS = {
    "columns": lambda base: base[:, :16],
    "every second column": lambda base: base[:, ::2],
    "rows": lambda base: base[2:5],
    "turned": lambda base: base.T,
    "turned columns": lambda base: base[:, 3:20].T,
    "one column": lambda base: base[:, 7],
    "one element": lambda base: base[3, 5],
    "nothing": lambda base: base[:, 4:4],
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "ema_decay": 0.9}], ids=["plain", "int8 and average"])
def test_a_view_is_updated_inside_the_view_only(name: str, view: str, options: dict) -> None:
    base = torch.randn(8, 32)
    inside = VIEWS[view](torch.arange(256).view(8, 32)).reshape(-1)
    if name == "Muon" and VIEWS[view](base).dim() != 2:
        options = {**options, "use_muon": False}
    before = base.clone()
    p = torch.nn.Parameter(torch.empty(0))
    p.data = VIEWS[view](base)
    twin = torch.nn.Parameter(VIEWS[view](base).clone().contiguous())
    mine, other = make(name, [p], **options), make(name, [twin], **options)
    for step in range(3):
        step_all(mine, [p], step), step_all(other, [twin], step)
    if name == "LAMB":  # its norm is added up in the order of memory
        torch.testing.assert_close(p, twin)
    else:
        assert torch.equal(p, twin)
    outside = torch.ones(256, dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(base.view(-1)[outside], before.view(-1)[outside])
    if p.numel():
        assert not torch.equal(base, before)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_parameters_and_gradients_of_other_strides(name: str, dtype) -> None:
    start = torch.randn(6, 5, 7, 3).to(dtype)
    params = [
        torch.nn.Parameter(start.clone()),
        torch.nn.Parameter(start.clone().to(memory_format=torch.channels_last)),
    ]
    optimizers = [make(name, [p], rounding="nearest") for p in params]
    for step in range(3):
        g = torch.randn(6, 5, 7, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
        for p, o in zip(params, optimizers, strict=True):
            # One gradient lies as its parameter does, the other the other way round, then every second element of more.
            p.grad = (g, g.to(memory_format=torch.channels_last), g.repeat_interleave(2, 3)[..., ::2])[step]
            o.step()
    if name == "LAMB":
        torch.testing.assert_close(*params)
    else:
        assert torch.equal(*params)
    assert params[1].is_contiguous(memory_format=torch.channels_last)


def test_tied_frozen_and_idle_parameters() -> None:
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    frozen, idle = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    frozen.requires_grad_(False)
    model = torch.nn.ModuleList([embedding, frozen, head, idle])
    optimizer = optim.AdamW(model.parameters(), max_grad_norm=1.0)
    theirs = torch.nn.Parameter(embedding.weight.detach().clone())
    reference = torch.optim.AdamW([theirs])
    kept = [p.detach().clone() for p in (*frozen.parameters(), *idle.parameters())]
    for _ in range(3):
        optimizer.zero_grad()
        head(frozen(embedding(torch.arange(11)))).square().mean().backward()
        theirs.grad = embedding.weight.grad.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        optimizer.step(), reference.step()
    torch.testing.assert_close(embedding.weight, theirs)
    assert all(torch.equal(p, k) for p, k in zip((*frozen.parameters(), *idle.parameters()), kept, strict=True))
    assert set(optimizer.state) == {embedding.weight}
    # What was idle joins in later, with a step count of its own.
    idle(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert optimizer.state[idle.weight]["step"] == 1 and optimizer.state[embedding.weight]["step"] == 4


def test_a_parameter_whose_data_moves_is_followed() -> None:
    p, other = torch.nn.Parameter(torch.ones(300)), torch.ones(300)
    optimizer = optim.SGD([p], lr=1.0)
    p.grad = torch.ones(300)
    optimizer.step()
    old = p.data
    p.data = other
    optimizer.step()
    assert torch.equal(old, torch.zeros(300)) and torch.equal(p, torch.zeros(300))


def test_a_state_that_is_replaced_is_followed() -> None:
    p = torch.nn.Parameter(torch.ones(300))
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5)
    p.grad = torch.ones(300)
    optimizer.step()
    optimizer.state[p]["momentum_buffer"] = torch.full((300,), 4.0)
    optimizer.step()
    assert torch.equal(p, torch.full((300,), 1.0 - 1.0 - 3.0))
    optimizer.state.clear()
    optimizer.step()
    assert torch.equal(p, torch.full((300,), -4.0)) and optimizer.state[p]["step"] == 1


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e-20, 1e10, 1e18])
def test_sizes_near_the_ends_of_float32(name: str, scale: float) -> None:
    p = [torch.nn.Parameter(torch.linspace(-1, 1, 500) * (1 if scale > 1 else scale)) for _ in range(2)]
    mine, theirs = (
        make(name, [p[0]]),
        getattr(torch.optim, name)([p[1]], **({"momentum": 0.9} if name == "SGD" else {})),
    )
    for step in range(3):
        g = torch.randn(500, generator=torch.Generator().manual_seed(step)) * scale
        p[0].grad, p[1].grad = g, g.clone()
        mine.step(), theirs.step()
    torch.testing.assert_close(*p, rtol=1e-5, atol=1e-45 if name == "SGD" else 1e-7)


def test_subnormal_parameters_stay() -> None:
    for dtype, tiny in ((torch.float32, 1e-44), (torch.bfloat16, 2.0**-133), (torch.float16, 2.0**-24)):
        p = torch.nn.Parameter(torch.full((300,), tiny, dtype=dtype))
        assert p[0] > 0
        optimizer = optim.SGD([p], lr=0.5)
        p.grad = torch.zeros(300, dtype=dtype)
        optimizer.step()
        assert torch.equal(p, torch.full((300,), tiny, dtype=dtype))


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n != "Muon"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_what_is_not_finite_shows(name: str, value: float, state_dtype) -> None:
    """As in PyTorch a step makes the element NaN or infinite; in 8 bits its block. Others go on."""
    p = torch.nn.Parameter(torch.ones(8192))
    optimizer = make(name, [p], state_dtype=state_dtype)
    step_all(optimizer, [p], 0)
    p.grad = torch.ones(8192)
    p.grad[5] = value
    optimizer.step(), optimizer.step()
    if name != "Lion" or value != value:  # a sign of infinity is one
        assert not p[5].isfinite()
    if name != "LAMB":  # where the norm is that of all elements
        assert p[256:].isfinite().all()
    if state_dtype != "int8" and name != "LAMB":
        assert p[:5].isfinite().all() and p[6:].isfinite().all()


def test_clipping_by_a_norm_that_is_not_finite_is_torchs() -> None:
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    p.grad, q.grad = torch.tensor([1.0, float("inf"), 2.0, 0.0]), torch.tensor([1.0, float("inf"), 2.0, 0.0])
    optimizer = optim.SGD([p], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    norm = torch.nn.utils.clip_grad_norm_([q], 1.0)
    torch.optim.SGD([q], lr=1.0).step()
    assert optimizer.grad_norm == norm == float("inf")
    torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_what_is_not_finite_in_bfloat16(rounding: str) -> None:
    p = torch.nn.Parameter(torch.zeros(512, dtype=torch.bfloat16))
    optimizer = optim.SGD([p], lr=1.0, rounding=rounding)
    p.grad = torch.zeros(512)[:].to(torch.bfloat16)
    for i, bits in enumerate((0x7F80, -0x80, 0x7FC0, 0x7FFF, -1, 0x7F7F)):
        p.grad.view(torch.int16)[i] = bits
    optimizer.step()
    assert p[0] == -float("inf") and p[1] == float("inf")
    assert p[2:5].isnan().all() and p[5].isfinite() and p[5] < -3e38
    assert torch.equal(p[6:], torch.zeros(506, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "Lion"])
def test_step_counts_past_two_to_the_24(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = make(name, [p], **({"lr_decay": 0.5, "lr": 1e6} if name == "Adagrad" else {}))
    step_all(optimizer, [p], 0)
    count = 2**24
    optimizer.state[p]["step"].fill_(count)
    before = p.detach().clone()
    for more in (1, 2, 3):
        step_all(optimizer, [p], more)
        assert optimizer.state[p]["step"].item() == count + more
    assert not torch.equal(p, before)
    loaded = make(name, [p], **({"lr_decay": 0.5} if name == "Adagrad" else {}))
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state[p]["step"].item() == count + 3


def test_random_numbers_of_steps_past_two_to_the_32() -> None:
    steps = []
    for count in (5, 2**32 + 5):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = optim.SGD([p], lr=2.0**-9, rounding="stochastic")
        p.grad = torch.ones(4096, dtype=torch.bfloat16)
        optimizer.step()
        optimizer.state[p]["step"].fill_(count)
        optimizer.step()
        steps.append(p.detach().clone())
    assert not torch.equal(*steps)


# ---- what results do not depend on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "int8", "max_grad_norm": 1.0},
        {"rounding": "stochastic", "ema_decay": 0.9},
        {"rounding": "kahan", "max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_threads_groups_and_order_do_not_matter(name: str, options: dict) -> None:
    shapes = [(70, 80), (3,), (40_000,), (129, 257), (1,), (300, 500), (16, 16)]

    def run(threads: int, order: list[int], per_group: int) -> list[Tensor]:
        torch.manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(s).to(torch.bfloat16 if i % 2 else torch.float32))
            for i, s in enumerate(shapes)
        ]
        listed = [params[i] for i in order]
        groups = [{"params": listed[i : i + per_group]} for i in range(0, len(listed), per_group)]
        torch.manual_seed(1)
        seed = {"seed": 7} if options.get("rounding") == "stochastic" else {}
        optimizer = make(name, [{**g, **seed} for g in groups], **options)
        with every_size(threads):
            for step in range(3):
                step_all(optimizer, params, step)
        return [p.detach() for p in params]

    n = len(shapes)
    first = run(2, list(range(n)), n)
    # The products of Muon are PyTorch's, whose order of additions may change with the threads.
    others = () if name == "Muon" else ((1, list(range(n)), n), (3, list(range(n)), n), (7, list(range(n)), 3))
    for threads, order, per_group in (
        *others,
        (2, list(range(n))[::-1], n),
        (2, list(range(n)), 2),
        (2, [3, 1, 6, 0, 5, 2, 4], 1),
    ):
        again = run(threads, order, per_group)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (threads, order, per_group)


# ---- storage formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [True, False])
def test_codes_of_8_bits(sign: bool) -> None:
    """Each code is the nearest to its cell; values come back within half a code's step; what is decoded stays."""

    codes = torch.arange(-127, 128, dtype=torch.int8) if sign else torch.arange(256).to(torch.uint8)
    value = _formats.decode8(codes, torch.ones(1))
    assert (value.diff() > 0).all() and value.max() == 1.0
    if sign:
        assert value[127] == 0.0 and torch.equal(value, -value.flip(0))
    else:
        assert value.min() > 0.0
    again, scale = _formats.encode8(value, sign)
    assert torch.equal(again, codes) and scale == 1.0
    x = torch.logspace(-7, 0, 4096, dtype=torch.float64).float()
    x = torch.cat([x, torch.ones(256)])[: 16 * 256].view(16, 256).clone()
    x[:, -1] = 1.0  # every block has the same scale
    coded, scale = _formats.encode8(x.view(-1), sign)
    back = _formats.decode8(coded, scale)
    # Half a cell: of four octaves, the first below 1, all have as many cells an octave, the next four half of them.
    cells = 2.0 ** ((coded.float().abs() + 0.5).log2().floor() - 2)
    assert ((back - x.view(-1)).abs() <= 0.51 / cells * x.view(-1))[x.view(-1) > 4e-8].all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(-40, 30), st.booleans(), st.integers(0, 2**31))
def test_the_kernels_codes_are_the_references(n: int, exponent: int, sparse: bool, seed: int) -> None:
    """SGD's momentum of a first step is its gradient: so the codes of a gradient, from the kernel."""
    n += _formats.LEAST_8BIT
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, generator=generator) * 2.0**exponent
    if sparse:
        g *= torch.rand(n, generator=generator) < 0.01
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = optim.SGD([p], lr=1e-3, momentum=0.9, state_dtype="int8")
    p.grad = g
    optimizer.step()
    codes, scale = _formats.encode8(g, True)
    assert torch.equal(optimizer.state[p]["momentum_buffer_scale"], scale)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], codes)
    squares = optim.Adagrad([q := torch.nn.Parameter(torch.zeros(n))], state_dtype="int8")
    squares.state[q] = {}
    q.grad = g
    squares.step()
    total = _formats.decode8(torch.zeros(n, dtype=torch.uint8), torch.zeros(-(-n // 256))) + g * g
    codes, scale = _formats.encode8(total, False)
    assert torch.equal(squares.state[q]["sum_scale"], scale)
    assert torch.equal(squares.state[q]["sum"], codes)


def test_split_and_join_lose_nothing() -> None:
    """Over float32 patterns of every exponent, the ends of mantissas dense."""
    high = torch.arange(0, 2**16, 3, dtype=torch.int64)
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x1234, 0x9ABC])
    bits = ((high[:, None] << 16) | low).view(-1)
    x = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    param, rest = _formats.split(x)
    back = _formats.join(param, rest)
    finite = ~x.isnan()
    assert torch.equal(back[finite].view(torch.int32), x[finite].view(torch.int32))
    assert back[~finite].isnan().all() and param[~finite].isnan().all()
    near = x[finite & (x.abs() < 3e38)]
    assert ((param[finite & (x.abs() < 3e38)].float() - near).abs() <= 2.0**-8 * near.abs() + 2.0**-134).all()
    # The kernel goes the same way: a step of no size keeps the master weight.
    p = torch.nn.Parameter(param.clone())
    optimizer = optim.SGD([p], lr=0.0, rounding="kahan")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["remainder"].copy_(rest)
    p.data.copy_(param)
    optimizer.step()
    normal = finite & x.isfinite() & (x != 0)
    assert torch.equal(p.detach()[normal], param[normal])
    assert torch.equal(optimizer.state[p]["remainder"][normal], rest[normal])


def test_memory_of_states() -> None:
    p = torch.nn.Parameter(torch.randn(1_000_000))
    found = {}
    for state_dtype in (torch.float32, torch.bfloat16, "int8"):
        optimizer = optim.AdamW([p], state_dtype=state_dtype)
        p.grad = torch.randn(1_000_000)
        optimizer.step()
        found[state_dtype] = sum(t.nbytes for t in optimizer.state[p].values()) / 1_000_000
    assert found[torch.float32] < 8.001 and found[torch.bfloat16] < 4.001 and found["int8"] < 2.1
