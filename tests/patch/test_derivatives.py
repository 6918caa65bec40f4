"""Derivatives of gradients, transforms and counts of patched models: those of the unpatched model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

import bigkernels


@pytest.fixture
def eager(get_case):
    """A case whose attention is plain PyTorch: SDPA on CPU has no second derivative."""

    def get(name):
        case = get_case(name)
        case.model.set_attn_implementation("eager")
        return case

    return get


@pytest.fixture
def llama(eager):
    return eager("llama")


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def assert_near(ours: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """No further from float64 than a few times what the unpatched model is."""
    scale = exact.abs().max()
    assert scale > 0
    assert (ours - exact).abs().max() <= 4 * (plain - exact).abs().max() + 1e-6 * scale


def loss_of(model, inputs):
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return model(**inputs, **options)["loss"]


def penalty(model, inputs) -> torch.Tensor:
    """The gradient of the squared norm of the gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss_of(model, inputs), parameters, create_graph=True)
    return flat(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))


@pytest.mark.parametrize("options", [{}, {"loss": False}, {"linear": True}, {"attention": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_penalty(llama, options, training):
    model = llama.model.train(training)
    plain, exact = penalty(model, llama.inputs), penalty(copy.deepcopy(model).double(), llama.inputs)
    bigkernels.patch(model, **options)
    assert_near(penalty(model, llama.inputs), exact, plain)
    assert_near(penalty(model.double(), llama.inputs), exact, plain)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert", "vit"])
def test_gradient_penalty_of_other_families(eager, name):
    case = eager(name)
    plain = penalty(case.model, case.inputs)
    double = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    exact = penalty(copy.deepcopy(case.model).double(), double)
    bigkernels.patch(case.model)
    assert_near(penalty(case.model, case.inputs), exact, plain)


@pytest.mark.parametrize("how", ["transformers", "bigkernels"])
def test_gradient_penalty_with_checkpointing(llama, how):
    model = llama.model.train()
    plain, exact = penalty(model, llama.inputs), penalty(copy.deepcopy(model).double(), llama.inputs)
    bigkernels.patch(model)
    if how == "transformers":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        bigkernels.apply_checkpointing(model, "recompute")
    assert_near(penalty(model, llama.inputs), exact, plain)


def embeds_loss(model, inputs):
    """The loss as a function of what the tokens are embedded to."""
    labels = inputs["labels"]
    return lambda x: model(inputs_embeds=x, labels=labels, use_cache=False).loss


@pytest.mark.parametrize("product", ["hvp", "vhp"])
def test_hessian_products_by_autograd(llama, product):
    model = llama.model.train()
    x = model.get_input_embeddings()(llama.inputs["input_ids"]).detach()
    v = torch.randn_like(x)
    times = getattr(torch.autograd.functional, product)
    exact = times(embeds_loss(copy.deepcopy(model).double(), llama.inputs), x.double(), v.double())[1]
    plain = times(embeds_loss(model, llama.inputs), x, v)[1]
    bigkernels.patch(model)
    assert_near(times(embeds_loss(model, llama.inputs), x, v)[1].double(), exact, plain.double())


def small_loss(model, inputs):
    """By one direction in each sequence, so that whole Jacobians are small."""
    inner = embeds_loss(model, inputs)
    x = model.get_input_embeddings()(inputs["input_ids"]).detach()
    directions = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    return lambda a: inner(x + torch.einsum("i,i...->...", a, directions))


TRANSFORMS = {
    "hessian": lambda f, a: hessian(f)(a),
    "autograd hessian": lambda f, a: torch.autograd.functional.hessian(f, a),
    "vectorized hessian": lambda f, a: torch.autograd.functional.hessian(f, a, vectorize=True),
    "reverse over reverse": lambda f, a: jacrev(jacrev(f))(a),
    "reverse over forward": lambda f, a: jacrev(jacfwd(f))(a),
    "jvp of a gradient": lambda f, a: jvp(grad(f), (a,), (torch.ones_like(a),))[1],
    "vjp of a gradient": lambda f, a: vjp(grad(f), a)[1](torch.ones_like(a))[0],
    "vmap of a gradient": lambda f, a: vmap(grad(f))(torch.stack((a, -a))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(llama, name):
    model = llama.model.train()
    a = torch.tensor([0.1, -0.2, 0.3])
    transform = TRANSFORMS[name]
    exact = transform(small_loss(copy.deepcopy(model).double(), llama.inputs), a.double())
    bigkernels.patch(model)
    found = transform(small_loss(model, llama.inputs), a)
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"loss": False}, {"linear": True}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_each_sample(llama, options, training):
    model = llama.model.train(training)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, ids, labels):
        one = {"input_ids": ids[None], "labels": labels[None], "use_cache": False}
        return functional_call(model, parameters, (), one).loss

    def gradients():
        found = vmap(grad(loss), (None, 0, 0))(parameters, llama.inputs["input_ids"], llama.inputs["labels"])
        return torch.cat([g.flatten(1) for g in found.values()], 1)

    plain = gradients()
    bigkernels.patch(model, **options)
    torch.testing.assert_close(gradients(), plain, rtol=1e-3, atol=2e-5 * plain.abs().max().item())


def test_batches_of_upstream_gradients(llama):
    model = llama.model.train()
    bigkernels.patch(model)
    out = model(**llama.inputs, use_cache=False)
    parameters = list(model.parameters())
    batched = torch.autograd.grad(
        out.loss, parameters, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True
    )
    single = torch.autograd.grad(out.loss, parameters)
    for a, b in zip(batched, single, strict=True):
        torch.testing.assert_close(a, torch.stack((b, -2 * b)), rtol=1e-3, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"linear": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_operations_are_counted_as_of_the_unpatched_model(eager, name, options):
    case = eager(name)
    counts = []
    for patched in (False, True):
        if patched:
            bigkernels.patch(case.model, **options)
        with FlopCounterMode(display=False) as counter:
            loss = loss_of(case.model, case.inputs)
            forward = counter.get_total_flops()
            loss.backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] > 1e6
