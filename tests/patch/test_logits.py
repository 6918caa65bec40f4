"""Logits of a training step: a tensor for every library, computed when it is read, and with a place in the graph."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bigkernels
from bigkernels.patch._logits import Logits

transformers = pytest.importorskip("transformers")
CONFIG = dict(
    vocab_size=210,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ONLY_LOSS = dict(attention=False, norm=False, rope=False, mlp=False)
IDS = torch.randint(0, 210, (2, 9), generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(2, 9, 210, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).train()
    ours = copy.deepcopy(plain)
    bigkernels.patch(ours, **ONLY_LOSS)
    return plain, ours


def run(model):
    return model(input_ids=IDS, labels=IDS)


def gradients(model, use):
    """Whatever `use(model, its output)` returns, and the gradients of what it ran backward."""
    model.zero_grad()
    out = run(model)
    assert isinstance(out.logits, torch.Tensor)
    value = use(model, out)
    return value, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found, expected, rtol=2e-5):
    (value, grads), (exact, exact_grads) = found, expected
    if isinstance(exact, torch.Tensor):
        torch.testing.assert_close(value.detach(), exact.detach(), rtol=rtol, atol=1e-6)
    else:
        assert value == exact
    assert grads.keys() == exact_grads.keys()
    for name, g in exact_grads.items():
        torch.testing.assert_close(grads[name], g, rtol=0, atol=rtol * g.abs().max().item())


class SquaredGap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, t):
        ctx.save_for_backward(z - t)
        return (z - t).square().mean()

    @staticmethod
    def backward(ctx, g):
        (d,) = ctx.saved_tensors
        return g * 2 * d / d.numel(), None


@torch.jit.script
def scripted(z: torch.Tensor, t: torch.Tensor):
    return (z - t).square().mean()


def gap(z):
    return (z - TEACHER).square().mean()


def compiled(backend):
    def use(z):
        torch._dynamo.reset()
        return torch.compile(gap, backend=backend)(z)

    return use


def logprobs(z):
    return torch.gather(torch.log_softmax(z[:, :-1].float(), -1), 2, IDS[:, 1:, None]).mean()


def write_in_a_view(z):
    z[:, :-1].mul_(2)
    return z.square().mean()


def mask(z):
    z[..., 3] = -5.0
    return z.logsumexp(-1).mean()


TERMS = {
    "plain": gap,
    "own function": lambda z: SquaredGap.apply(z, TEACHER),
    "checkpoint, reentrant": lambda z: checkpoint(gap, z, use_reentrant=True),
    "checkpoint": lambda z: checkpoint(gap, z, use_reentrant=False),
    "jit.script": lambda z: scripted(z, TEACHER),
    "compile, eager": compiled("eager"),
    "compile, aot_eager": compiled("aot_eager"),
    "vmap": lambda z: torch.func.vmap(lambda a, b: (a - b).square().mean())(z, TEACHER).mean(),
    "torch.ops": lambda z: torch.ops.aten.mse_loss(z, TEACHER),
    "KLDivLoss": lambda z: nn.KLDivLoss(reduction="batchmean")(torch.log_softmax(z, -1), torch.softmax(TEACHER, -1)),
    "cross_entropy": lambda z: F.cross_entropy(z.view(-1, 210), IDS.view(-1), label_smoothing=0.1),
    "log probabilities": logprobs,
    "stack": lambda z: torch.stack([z, z]).square().mean(),
    "einsum": lambda z: torch.einsum("btv,btv->", z, TEACHER) / z.numel(),
    "mask": lambda z: z[IDS > 100].square().mean(),
    "rows": lambda z: sum(row.square().mean() for row in z),
    "float": lambda z: z.float().double().square().mean(),
    "transposed": lambda z: (z.mT @ z).square().mean(),
    "a module": lambda z: nn.Identity()(z).square().mean(),
    "is_tensor": lambda z: gap(z) if torch.is_tensor(z) else torch.tensor(0.0),
    "written to": lambda z: z.div_(2.0).square().mean(),
    "written to by index": mask,
    "written to in a view": write_in_a_view,
    "written to after a copy": lambda z: z.float().clone().mul_(0).sum() + z.square().mean(),
    "into a given tensor": lambda z: torch.add(z.detach(), 1, out=torch.empty(z.shape)).mean() + gap(z),
    "factors": lambda z: (torch.tanh(2 * z / 3) * 4).square().mean(),
}


@pytest.mark.parametrize("term", TERMS)
def test_terms_beside_the_loss(models, term):
    """The gradient of the loss and of something made of the logits."""

    def use(model, out):
        found = TERMS[term](out.logits)
        (out.loss + 3 * found).backward()
        return found

    same(*(gradients(model, use) for model in models[::-1]))


def of_the_loss(hook):
    def use(model, out):
        out.logits.register_hook(hook)
        out.loss.backward()

    return use


def write(grad):
    grad[:, :3] = 0


def read_and_write(grad):
    view = grad.view(-1, 210)
    grad.norm()
    view[:5] = 0


def write_by_numpy(grad):
    grad.numpy()[..., :50] = 0


def retain(model, out):
    out.logits.retain_grad()
    out.loss.backward()
    return out.logits.grad


def ask_for_it(model, out):
    (grad,) = torch.autograd.grad(out.loss, out.logits, retain_graph=True)
    (out.logits * grad).sum().backward()
    return grad


def twice(model, out):
    out.loss.backward(retain_graph=True)
    out.loss.backward()


def term_first(model, out):
    (out.logits.square().mean() + 2 * out.loss).backward()


def one_after_the_other(model, out):
    out.loss.backward(retain_graph=True)
    out.logits.square().mean().backward()


def again(model, out):
    (grad,) = torch.autograd.grad(out.loss, [model.lm_head.weight], create_graph=True)
    (grad.square().sum() + out.loss).backward()


def written_after(model, out):
    out.logits.detach().zero_()
    out.loss.backward()


USES = {
    "a hook that reads": of_the_loss(lambda g: g.norm() and None),
    "a hook that clamps": of_the_loss(lambda g: g.clamp(-1e-4, 1e-4)),
    "a hook that halves": of_the_loss(lambda g: g / 2),
    "a hook that writes": of_the_loss(write),
    "a hook that reads and writes": of_the_loss(read_and_write),
    "a hook that writes by numpy": of_the_loss(write_by_numpy),
    "retain_grad": retain,
    "autograd.grad": ask_for_it,
    "backward twice": twice,
    "a term first": term_first,
    "one after the other": one_after_the_other,
    "create_graph": again,
    "written to after the loss": written_after,
}


@pytest.mark.parametrize("use", USES)
def test_gradients_go_through_the_logits(models, use):
    """What happens to the logits' gradient on its way has its effect, though nobody computes it otherwise."""
    same(*(gradients(model, USES[use]) for model in models[::-1]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"label_smoothing": 0.2},
        {"weight": torch.linspace(0.1, 2, 50)},
        {"weight": torch.linspace(0.1, 2, 50), "label_smoothing": 0.2},
        {"ignore_index": 9},
    ],
    ids=lambda o: "+".join(o) or "mean",
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_gradient_of_logits(options, softcap):
    """Its elements, of every option and behind every step, against PyTorch in float64."""
    leaves = [torch.randn(2, 6, 16), torch.randn(50, 16), torch.randn(50)]
    target = torch.randint(0, 50, (12,))
    target[3] = target[7] = options.get("ignore_index", -100)

    def losses(leaves, lazy):
        hidden, weight, bias = leaves
        z = Logits.of(None, hidden, weight, bias) if lazy else F.linear(hidden, weight, bias)
        first, z = z, z.float() if lazy else z
        z = z / 4 if softcap is None else softcap * torch.tanh(z / softcap)
        rows = z.view(-1, 50)
        if lazy:
            given = dict(options)
            loss = rows.cross_entropy(target, given.pop("weight", None), **given)
        else:
            given = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            loss = F.cross_entropy(rows, target, **given)
        return loss, first, z

    found = [
        losses([t.to(dtype).requires_grad_() for t in leaves], lazy)
        for dtype, lazy in ((torch.float32, True), (torch.float64, False))
    ]
    assert found[0][1].made is None
    ours, exact = (torch.autograd.grad(loss, z) for loss, *z in found)
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double() + 0, b, rtol=1e-4, atol=1e-6)


VIEWS = {
    "unsqueeze": lambda z: z.unsqueeze(0),
    "permute": lambda z: z.permute(2, 0, 1),
    "mT": lambda z: z.mT,
    "row": lambda z: z[0],
    "slices": lambda z: z[..., :-1, 2:],
    "element": lambda z: z[0, 1, 5],
    "flatten": lambda z: z.flatten()[5:],
    "expand": lambda z: z.expand(3, 2, 9, 210),
    "diagonal": lambda z: z.diagonal()[1:],
    "unfold": lambda z: z.unfold(1, 2, 1),
    "as_strided": lambda z: z.as_strided((2,), (1,), 3),
    "cast": lambda z: z.float().half()[:, 2],
    "clone": lambda z: z.clone()[1].mT,
    "detach": lambda z: z.detach()[1],
    "data": lambda z: z.data,
    "contiguous": lambda z: z.contiguous(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_read_nothing(models, name):
    expected, z = (run(model).logits for model in models)
    found, expected = VIEWS[name](z), VIEWS[name](expected)
    assert z.made is None
    for what in ("shape", "dtype", "device", "requires_grad", "is_leaf", "layout"):
        assert getattr(found, what) == getattr(expected, what), what
    assert found.stride() == expected.stride() and found.storage_offset() == expected.storage_offset()
    torch.testing.assert_close(found.detach().add(0), expected.detach(), rtol=1e-5, atol=1e-6)


def has(z, name):
    try:
        return hasattr(z, name)
    except RuntimeError as error:  # as of a matrix's transposed of more dimensions
        return str(error)


@pytest.mark.filterwarnings("ignore:The .grad")
def test_looking_for_a_name_computes_nothing(models):
    """Libraries ask with hasattr what they have been given."""
    plain, ours = (run(model).logits for model in models)
    for name in [*dir(plain), "_asdict", "__array_interface__", "_fields", "items", "keys"]:
        assert has(ours, name) == has(plain, name), name
        assert ours.made is None, name
    assert "not computed" in repr(ours) and ours.nbytes == plain.nbytes and ours.dim() == 3 and len(ours) == 2
    assert ours.made is None


def test_memory_that_is_read_without_an_operator(models):
    expected = run(models[0]).logits.detach()
    z = run(models[1]).logits
    with pytest.raises(RuntimeError, match="requires grad"):
        z.numpy()
    for found in (z.detach().numpy(), z.detach().__array__(), torch.from_dlpack(run(models[1]).logits.detach())):
        torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(run(models[1]).logits.tolist()), expected, rtol=1e-5, atol=1e-6)
    assert run(models[1]).logits.data_ptr() and run(models[1]).logits.untyped_storage().data_ptr()
    file = io.BytesIO()
    torch.save(run(models[1]).logits, file)
    file.seek(0)
    for found in (torch.load(file), pickle.loads(pickle.dumps(run(models[1]).logits))):
        assert type(found) is torch.Tensor and found.requires_grad
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(run(models[1]).logits.detach()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="explicitly by the user"):
        copy.deepcopy(run(models[1]).logits)
    with pytest.raises(RuntimeError, match="shape of logits in place"):
        run(models[1]).logits.unsqueeze_(0)


def test_detached_logits_keep_no_graph(models):
    """A list of them holds hidden states, and nothing of what backward needed."""
    kept = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Token:
        alive = 0

        def __init__(self):
            Token.alive += 1

        def __del__(self):
            Token.alive -= 1

    handle = models[1].model.norm.register_forward_hook(lambda m, a, out: Seen.apply(out))
    try:
        kept += [run(models[1]).logits.detach() for _ in range(3)]
    finally:
        handle.remove()
    assert Token.alive == 0 and all(z.made is None for z in kept)


@pytest.mark.parametrize("how", ["optimizer", "behind the counter", "another weight"])
def test_weights_that_changed_are_an_error_or_right(models, how):
    model = copy.deepcopy(models[1])
    expected = run(models[0]).logits.detach()
    out = run(model)
    out.loss.backward()
    torch.testing.assert_close(out.logits.detach()[0].add(0), expected[0], rtol=1e-5, atol=1e-6)  # before
    out = run(model)
    out.loss.backward()
    if how == "another weight":
        model.lm_head.weight = nn.Parameter(torch.zeros(210, 32))
        torch.testing.assert_close(out.logits.detach().add(0), expected, rtol=1e-5, atol=1e-6)
        return
    if how == "optimizer":
        torch.optim.SGD(model.parameters(), 0.1).step()
    else:
        for p in model.parameters():
            p.data.sub_(p.grad, alpha=0.1)
    with pytest.raises(RuntimeError, match="read `logits` before they change"):
        out.logits.argmax(-1)


@pytest.fixture
def group(tmp_path):
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


def _ddp(model, **options):
    return nn.parallel.DistributedDataParallel(model, **options)


def _fully_shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def _fsdp1(model, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


WRAPPERS = {
    "DDP": (_ddp, True),
    "DDP, unused": (lambda m: _ddp(m, find_unused_parameters=True), True),
    "DDP, static": (lambda m: _ddp(m, static_graph=True), True),
    "fully_shard": (_fully_shard, False),
    "FSDP": (_fsdp1, False),
    "FSDP, parameters": (lambda m: _fsdp1(m, use_orig_params=True), False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(models, group, name):
    """Two steps, with logits read after backward, of the wrapped model as it comes and patched."""
    wrap, lazy = WRAPPERS[name]
    results = []
    for model in models:
        model = wrap(copy.deepcopy(model))
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        found = []
        for _ in range(2):
            out = run(model)
            assert isinstance(out.logits, torch.Tensor)
            if lazy and results:
                assert out.logits.made is None  # which costs nothing
            out.loss.backward()
            found += [out.loss.item(), *out.logits[..., :-1, :].detach().logsumexp(-1).flatten().tolist()]
            optimizer.step()
            optimizer.zero_grad()
        results.append(found)
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_patched_after_fully_shard(models, group):
    """Norms are found although their parameters are spread over ranks until they are called."""
    plain, losses = models[0], []
    for sharded in (False, True):
        model = copy.deepcopy(plain)
        if sharded:
            model = _fully_shard(model)
            report = bigkernels.patch(model)
            assert {"rms_norm", "add + rms_norm", "rope", "attention"} <= {row.what for row in report.patched}
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            loss = run(model).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_accelerate(models, group):
    operations = pytest.importorskip("accelerate.utils.operations")
    expected = run(models[0]).logits
    uses = {
        "convert_to_fp32": operations.convert_to_fp32,
        "find_batch_size": lambda z: torch.tensor(operations.find_batch_size({"a": z})),
        "recursively_apply": lambda z: operations.recursively_apply(lambda t: t * 2, {"a": z})["a"],
        "concatenate": lambda z: operations.concatenate([z, z]),
        "slice_tensors": lambda z: operations.slice_tensors({"a": z}, slice(0, 1))["a"],
        "send_to_device": lambda z: operations.send_to_device({"a": z}, "cpu")["a"],
        "gather": lambda z: _all_gather(group, z.detach().contiguous()),
        "reduce": lambda z: _all_reduce(group, z.detach().clone()),
    }
    for name, use in uses.items():
        found, exact = use(run(models[1]).logits), use(expected)
        torch.testing.assert_close(found.detach().add(0), exact.detach(), rtol=1e-5, atol=1e-6, msg=name)


def _all_gather(dist, z):
    out = torch.empty_like(z)
    dist.all_gather_into_tensor(out, z)
    return out


def _all_reduce(dist, z):
    dist.all_reduce(z)
    return z


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(models, tmp_path, smoothing):
    """Also with a label smoother, which reads the logits, and with metrics in its evaluation."""
    data = [{"input_ids": torch.arange(i, i + 10), "labels": torch.arange(i, i + 10)} for i in range(3, 11)]
    losses = []
    for model in models:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            label_smoothing_factor=smoothing,
            seed=3,
        )
        trainer = transformers.Trainer(
            model=copy.deepcopy(model),
            args=arguments,
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        found = trainer.train().training_loss
        losses += [found, trainer.evaluate()["eval_loss"]]
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_head_with_a_term_of_its_logits(bias):
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    plain.lm_head = bigkernels.nn.QuantizedLinear.from_linear(nn.Linear(32, 210, bias), "int8")
    ours = copy.deepcopy(plain.train())
    assert "linear_cross_entropy" in [row.what for row in bigkernels.patch(ours, **ONLY_LOSS).patched]

    def use(model, out):
        (out.loss + 3 * gap(out.logits)).backward()

    same(*(gradients(model, use) for model in (ours, plain)), 1e-4)


def test_what_a_step_holds(models):
    """Neither the logits nor their gradient exist in a step whose logits nobody reads."""
    out = run(models[1])
    seen = []
    out.logits.register_hook(lambda g: seen.append(g.made))
    out.loss.backward()
    assert out.logits.made is None and seen == [None]
