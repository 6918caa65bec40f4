"""Other ways to take a step: inside the backward pass, from host memory, with float32 gradients; and Muon's groups."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from optimizer_formulas import FORMULAS
from torch import nn

from bigkernels import optim
from bigkernels.optim import _muon, _offload

ALGORITHMS = tuple(FORMULAS)
X = torch.randn(16, 70, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 3))


def train(m: nn.Module, o, steps: int = 4) -> list[torch.Tensor]:
    for step in range(steps):
        o.zero_grad()
        (m(X) - step).square().mean().backward()
        o.step()
    return [p.detach() for p in m.parameters()]


def make(name: str, m: nn.Module, **options):
    return getattr(optim, name)(m.parameters(), **({"momentum": 0.9} if name == "SGD" else {}), **options)


# ---- in backward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "ema_decay": 0.9}], ids=str)
def test_steps_in_backward_are_the_same_steps(name: str, options: dict) -> None:
    plain, fused = model(), model()
    expected = train(plain, make(name, plain, **options))
    o = make(name, fused, **options)
    optim.step_in_backward(fused, o)
    found = train(fused, o)
    # Muon orthogonalises matrices of one shape together otherwise, and alone here.
    if name == "Muon":
        torch.testing.assert_close(found, expected)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_are_freed_as_they_are_used() -> None:
    m = model()
    o = optim.AdamW(m.parameters())
    alive: list[int] = []
    grads: list[weakref.ref] = []

    def watch(p: torch.Tensor) -> None:
        grads.append(weakref.ref(p.grad))
        alive.append(sum(g() is not None for g in grads))

    for p in m.parameters():  # before the step's own hook
        p.register_post_accumulate_grad_hook(watch)
    optim.step_in_backward(m, o)
    train(m, o, 2)
    assert len(alive) == 12 and max(alive) == 1
    assert all(p.grad is None for p in m.parameters())


def test_clipping_by_the_norm_before() -> None:
    m, twin = model(), model()
    with pytest.raises(ValueError, match="previous"):
        optim.step_in_backward(m, optim.SGD(m.parameters(), lr=0.1, max_grad_norm=0.5))
    o, plain = optim.SGD(m.parameters(), lr=0.1, max_grad_norm=0.5), torch.optim.SGD(twin.parameters(), lr=0.1)
    optim.step_in_backward(m, o, clip="previous")
    last = None
    for step in range(4):
        for these, opt in ((m, o), (twin, plain)):
            opt.zero_grad()
            (these(X) - step).square().mean().backward()
        norm = optim.get_total_norm([p.grad for p in twin.parameters()])
        used = norm if last is None else last  # the first step knows its own
        for p in twin.parameters():
            p.grad.mul_((0.5 / (used + 1e-6)).clamp(max=1.0))
        o.step(), plain.step()
        assert o.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        last = norm
        torch.testing.assert_close(list(m.parameters()), list(twin.parameters()))


def test_batches_in_parts_and_divisors() -> None:
    m, twin = model(), model()
    o, plain = optim.AdamW(m.parameters()), optim.AdamW(twin.parameters())
    handle = optim.step_in_backward(m, o)
    handle.divisor = 12
    for _ in range(2):
        with handle.accumulate():
            m(X[:6]).square().sum().backward()
        m(X[6:12]).square().sum().backward()
        o.step()
        o.zero_grad()
        twin(X[:6]).square().sum().backward()
        twin(X[6:12]).square().sum().backward()
        plain.step(divisor=12)
        plain.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), twin.parameters(), strict=True))
    handle.remove()
    train(m, o, 1), train(twin, plain, 1)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), twin.parameters(), strict=True))
    assert m[0].weight.grad is not None


def test_tied_parameters_step_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self) -> torch.Tensor:
            return self.head(self.embedding(torch.arange(9))).square().sum()

    m = Tied()
    o = optim.AdamW(m.parameters())
    optim.step_in_backward(m, o)
    m().backward()
    o.step()
    assert o.state[m.embedding.weight]["step"] == 1


def test_what_cannot_step_in_backward() -> None:
    m = model()
    o = optim.AdamW(m.parameters())
    with pytest.raises(TypeError, match="AdamW"):
        optim.step_in_backward(m, torch.optim.AdamW(m.parameters()))
    with pytest.raises(ValueError, match="clip"):
        optim.step_in_backward(m, o, clip="now")
    with pytest.raises(ValueError, match="not the model's"):
        optim.step_in_backward(m, optim.AdamW([nn.Parameter(torch.zeros(3))]))
    optim.step_in_backward(m, o)
    with pytest.raises(ValueError, match="already"):
        optim.step_in_backward(m, o)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(m(X).sum()).backward()
    with pytest.raises((RuntimeError, AssertionError)):
        scaler.step(o)


def test_schedulers_go_on() -> None:
    m = model()
    o = optim.SGD(m.parameters(), lr=1.0)
    optim.step_in_backward(m, o)
    scheduler = torch.optim.lr_scheduler.StepLR(o, 1, 0.5)
    for _ in range(3):
        m(X).sum().backward()
        o.step()
        scheduler.step()
    assert o.param_groups[0]["lr"] == 0.125


# ---- in host memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n != "Muon"])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "max_grad_norm": 0.1, "ema_decay": 0.9}], ids=str)
def test_steps_in_host_memory_are_the_same_steps(name: str, options: dict, monkeypatch, device) -> None:
    monkeypatch.setattr(_offload, "_BUCKET", 3000)  # several buckets
    plain, moved = model(), model().to(device)
    expected = train(plain, make(name, plain, **options))
    o = make(name, moved, **options)
    optim.offload_states(o)
    if device.type == "cpu":
        found = train(moved, o)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(o._schedule.plans) > 1
    else:
        global X
        before, X = X, X.to(device)
        try:
            found = [p.cpu() for p in train(moved, o)]
        finally:
            X = before
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(t.device.type == "cpu" for s in o.state.values() for t in s.values())


def test_what_others_write_into_a_parameter_is_seen() -> None:
    m = model()
    o = optim.SGD(m.parameters(), lr=0.0)
    optim.offload_states(o)
    train(m, o, 2)
    with torch.no_grad():
        m[0].weight.fill_(0.25)
    train(m, o, 1)
    assert torch.equal(m[0].weight, torch.full((80, 70), 0.25))


def test_states_move_and_load() -> None:
    m, twin = model(), model()
    o, plain = optim.AdamW(m.parameters()), optim.AdamW(twin.parameters())
    train(m, o, 2), train(twin, plain, 2)
    optim.offload_states(o)
    train(m, o, 1), train(twin, plain, 1)
    saved = copy.deepcopy(o.state_dict())
    o.load_state_dict(saved)
    train(m, o, 1), train(twin, plain, 1)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), twin.parameters(), strict=True))


def test_what_cannot_be_offloaded() -> None:
    m = model()
    with pytest.raises(ValueError, match="Muon"):
        optim.offload_states(optim.Muon(m.parameters()))
    with pytest.raises(ValueError, match="AdamW"):
        optim.offload_states(torch.optim.AdamW(m.parameters()))
    with pytest.raises(ValueError, match="float64"):
        optim.offload_states(optim.AdamW(m.double().parameters()))


# ---- gradients in float32 -------------------------------------------------------------------------------------------


def test_gradients_added_up_in_float32() -> None:
    """Many small gradients on a large one: bfloat16 loses all of them."""
    kept, lost = (nn.Parameter(torch.zeros(100, dtype=torch.bfloat16)) for _ in range(2))
    optim.accumulate_in_float32([kept])
    for size in (1.0, *[2.0**-9] * 64):
        for p in (kept, lost):
            (p * size).sum().backward()
    assert kept.grad.dtype == torch.float32 and torch.equal(kept.grad, torch.full((100,), 1.0 + 64 * 2.0**-9))
    assert torch.equal(lost.grad, torch.ones(100, dtype=torch.bfloat16))
    optimizer = optim.SGD([kept], lr=1.0)
    optimizer.step(divisor=65)
    assert torch.equal(kept, torch.full((100,), -(1.0 + 64 * 2.0**-9) / 65).bfloat16())


# ---- Muon -----------------------------------------------------------------------------------------------------------


def test_muons_groups_of_a_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
            self.up, self.experts = nn.Linear(32, 64), nn.Parameter(torch.randn(4, 32, 16))
            self.lm_head = nn.Linear(32, 50)

    hidden, rest = optim.muon_groups(Model(), adamw_lr=1e-4)
    assert [n for n, _ in hidden["params"]] == ["experts", "up.weight"]
    assert {n for n, _ in rest["params"]} == {
        "embed_tokens.weight",
        "norm.weight",
        "norm.bias",
        "up.bias",
        "lm_head.weight",
        "lm_head.bias",
    }
    assert rest["adamw_lr"] == 1e-4 and hidden["use_muon"] and not rest["use_muon"]
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    hidden, rest = optim.muon_groups(transformers.LlamaForCausalLM(config))
    assert len(hidden["params"]) == 2 * 7 and "model.embed_tokens.weight" in dict(rest["params"])


def test_muon_takes_stacks_in_batches(monkeypatch) -> None:
    """Matrices of one shape together or one by one, and stacks or their matrices: the same steps."""

    def run(batch: int, stacked: bool) -> torch.Tensor:
        monkeypatch.setattr(_muon, "_BATCH", batch)
        torch.manual_seed(0)
        stack = torch.randn(6, 48, 40)
        params = [nn.Parameter(stack.clone())] if stacked else [nn.Parameter(x.clone()) for x in stack]
        o = optim.Muon(params, lr=0.1)
        for _ in range(3):
            for p in params:
                p.grad = p.detach().sin()
            o.step()
        return params[0].detach() if stacked else torch.stack([p.detach() for p in params])

    first = run(2**24, True)
    for batch, stacked in ((1, True), (2**24, False), (3 * 48 * 40, False), (1, False)):
        torch.testing.assert_close(run(batch, stacked), first, rtol=1e-5, atol=1e-6)


def test_muon_leaves_matrices_without_gradients() -> None:
    a, b = (nn.Parameter(torch.randn(20, 30)) for _ in range(2))
    o = optim.Muon([a, b], lr=0.1)
    a.grad = b.grad = torch.randn(20, 30)
    o.step()
    b.grad, kept = None, b.detach().clone()
    o.step()
    assert torch.equal(b, kept) and o.state[a]["step"] == 2 and o.state[b]["step"] == 1


def test_muon_large_matrices_by_halves_of_products() -> None:
    p, q = (nn.Parameter(torch.randn(300, 700, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    o, theirs = optim.Muon([p], lr=0.1), torch.optim.Muon([q.data.double().requires_grad_()], lr=0.1)
    p.grad = torch.randn(300, 700)
    wide = theirs.param_groups[0]["params"][0]
    wide.grad = p.grad.double()
    o.step(), theirs.step()
    # torch orthogonalises in bfloat16 whatever the parameter's dtype.
    assert (p.double() - wide).abs().max() < 0.1 * 0.05
    singular = torch.linalg.svdvals((q - p).detach() / 0.1 - 0.1 * q.detach())
    assert 0.6 < singular.min() and singular.max() < 1.3
