"""What patching may touch: one instance, undone exactly, carried through copies, files, hooks and wrappers."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import bigkernels


def _attributes(model: nn.Module) -> dict[str, dict]:
    """Every module's own attributes, by identity."""
    return {path: {k: id(v) for k, v in vars(module).items()} for path, module in model.named_modules()}


def test_unpatch_restores_everything(case, run, assert_bitwise):
    before, step = _attributes(case.model), run(case.model, case.inputs)
    bigkernels.patch(case.model)
    assert _attributes(case.model) != before
    bigkernels.unpatch(case.model)
    assert _attributes(case.model) == before
    assert_bitwise(run(case.model, case.inputs), step)


def test_only_the_instance_changes(case, run, assert_bitwise):
    """Another model of the same classes gives bitwise what it gave, and classes and modules keep their contents."""
    other = copy.deepcopy(case.model)
    step = run(other, case.inputs)
    classes = {type(m) for m in case.model.modules()}
    spaces = [vars(cls) for cls in classes] + [vars(sys.modules[cls.__module__]) for cls in classes]
    before = [{k: id(v) for k, v in space.items() if not k.startswith("_abc_")} for space in spaces]
    bigkernels.patch(case.model)
    run(case.model, case.inputs)
    assert [{k: id(v) for k, v in space.items() if not k.startswith("_abc_")} for space in spaces] == before
    assert_bitwise(run(other, case.inputs), step)


def test_random_state_and_buffers_are_untouched(llama):
    state = torch.get_rng_state()
    tensors = {n: (t.data_ptr(), t._version, t.clone()) for n, t in llama.model.state_dict(keep_vars=True).items()}
    bigkernels.patch(llama.model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in llama.model.state_dict(keep_vars=True).items():
        address, version, value = tensors[name]
        assert (t.data_ptr(), t._version) == (address, version)
        assert torch.equal(t, value)
    assert all(p.grad is None for p in llama.model.parameters())


def test_context_manager(llama, count):
    before = _attributes(llama.model)
    with bigkernels.patched(llama.model, loss=False) as report:
        assert "cross_entropy (next token)" not in count(report)
        assert _attributes(llama.model) != before
    assert _attributes(llama.model) == before
    with pytest.raises(ZeroDivisionError), bigkernels.patched(llama.model):
        raise ZeroDivisionError
    assert _attributes(llama.model) == before


def test_patching_twice_changes_nothing(case, run, assert_bitwise):
    before = _attributes(case.model)
    first, step = bigkernels.patch(case.model), run(case.model, case.inputs)
    second = bigkernels.patch(case.model)
    assert second == first
    assert_bitwise(run(case.model, case.inputs), step)
    bigkernels.unpatch(case.model)
    assert _attributes(case.model) == before


def test_patching_again_with_other_flags(llama, count):
    before = _attributes(llama.model)
    bigkernels.patch(llama.model)
    assert count(bigkernels.patch(llama.model, norm=False, mlp=False, attention=False)) == {
        "rope": 2,
        "cross_entropy (next token)": 1,
        "linear_cross_entropy": 1,
    }
    assert "forward" not in vars(llama.model.model.norm)
    assert "forward" not in vars(llama.model.model.layers[0].mlp)
    bigkernels.unpatch(llama.model)
    assert _attributes(llama.model) == before


FLAGS = {
    "norm": ["rms_norm", "add + rms_norm"],
    "rope": ["rope"],
    "mlp": ["glu (silu)"],
    "loss": ["cross_entropy (next token)", "linear_cross_entropy"],
    "attention": ["attention", "attention mask"],
    "linear": ["linear"],
}


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_alone(llama, count, flag):
    flags = {name: name == flag for name in FLAGS}
    assert sorted(count(bigkernels.patch(llama.model, **flags))) == sorted(FLAGS[flag])


def test_unverified_patching_finds_the_same(case, count):
    assert count(bigkernels.patch(case.model, verify=False)) == case.family.patched


def test_parameters_and_state_dict_keys_survive(case):
    parameters = {name: id(p) for name, p in case.model.named_parameters()}
    keys, modules = list(case.model.state_dict()), {n: id(m) for n, m in case.model.named_modules()}
    bigkernels.patch(case.model)
    assert {name: id(p) for name, p in case.model.named_parameters()} == parameters
    assert list(case.model.state_dict()) == keys
    assert {n: id(m) for n, m in case.model.named_modules()} == modules


def test_signatures_survive(case):
    """Of every module but those whose whole forward is a kernel, which take their one or two tensors."""
    before = {path: inspect.signature(m.forward) for path, m in case.model.named_modules()}
    bigkernels.patch(case.model)
    for path, module in case.model.named_modules():
        if list(module.children()):
            assert inspect.signature(module.forward) == before[path], path


def test_deepcopy_has_its_own_weights(case, run, assert_bitwise, assert_close):
    bigkernels.patch(case.model)
    step = run(case.model, case.inputs)
    twin = copy.deepcopy(case.model)
    assert_bitwise(run(twin, case.inputs), step)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert_bitwise(run(case.model, case.inputs), step)
    changed = run(twin, case.inputs)
    assert not torch.equal(changed.logits, step.logits)
    assert bigkernels.patch(twin) == bigkernels.patch(case.model)
    bigkernels.unpatch(twin)
    assert not any("forward" in vars(m) or "_bigkernels_patch" in vars(m) for m in twin.modules())
    assert_close(run(twin, case.inputs), changed)


def test_pickle_in_this_process(llama, run, assert_bitwise, tmp_path):
    bigkernels.patch(llama.model)
    step = run(llama.model, llama.inputs)
    torch.save(llama.model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    function = again.model.layers[0].mlp.forward
    assert function.args[0] is again.model.layers[0].mlp
    assert function.func is llama.model.model.layers[0].mlp.forward.func
    assert_bitwise(run(again, llama.inputs), step)
    bigkernels.unpatch(again)
    assert not any("forward" in vars(m) or "_bigkernels_patch" in vars(m) for m in again.modules())


OTHER_PROCESS = """
import sys, torch
model, (inputs, logits) = torch.load(sys.argv[1], weights_only=False), torch.load(sys.argv[2])
assert torch.equal(model(**inputs).logits, logits)
patched = [path for path, m in model.named_modules() if "forward" in vars(m)]
import bigkernels
bigkernels.unpatch(model)
assert not any("forward" in vars(m) for m in model.modules())
torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
print(len(patched))
"""


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_pickle_in_another_process(get_case, name, tmp_path):
    case = get_case(name)
    bigkernels.patch(case.model)
    patched = sum("forward" in vars(m) for m in case.model.modules())
    torch.save(case.model, tmp_path / "model.pt")
    torch.save((case.inputs, case.model(**case.inputs).logits), tmp_path / "logits.pt")
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "model.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == patched


def test_save_pretrained(llama, run, assert_close, tmp_path):
    step = run(llama.model, llama.inputs)
    bigkernels.patch(llama.model)
    llama.model.save_pretrained(tmp_path)
    again = type(llama.model).from_pretrained(tmp_path)
    assert not any("forward" in vars(m) for m in again.modules())
    assert_close(run(again, llama.inputs), step)


def test_hooks_fire_and_may_change_values(case, run, assert_close):
    """A hook on every module sees what it saw before, also where two modules are fused into one operator."""
    seen: list[str] = []

    def hook(module, args, output):
        seen.append(type(module).__name__)
        return output * 1.5 if isinstance(output, torch.Tensor) and "Norm" in type(module).__name__ else None

    for module in case.model.modules():
        module.register_forward_hook(hook)
    before = run(case.model, case.inputs)
    calls, seen[:] = list(seen), []
    bigkernels.patch(case.model)
    after = run(case.model, case.inputs)
    assert seen == calls
    assert_close(after, before, 1e-4)


def test_global_hooks_fire(llama, run):
    calls = []
    bigkernels.patch(llama.model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: calls.append(type(m).__name__))
    try:
        run(llama.model, llama.inputs)
    finally:
        handle.remove()
    assert calls.count("LlamaRMSNorm") == 5
    assert calls.count("SiLUActivation") == 2


def test_a_forward_of_the_instance_is_left_alone(llama):
    """accelerate, for one, puts its hooks there."""
    mlp, norm = llama.model.model.layers[0].mlp, llama.model.model.norm
    own = {m: functools.partial(type(m).forward, m) for m in (mlp, norm)}
    for module, forward in own.items():
        module.forward = forward
    report = bigkernels.patch(llama.model)
    assert [row.path for row in report.skipped] == ["", "model.layers.0.mlp", "model.norm"]  # the first: its program
    assert all("replaced" in row.what for row in report.skipped)
    bigkernels.unpatch(llama.model)
    assert all(module.forward is forward for module, forward in own.items())
    with pytest.raises(RuntimeError, match="already replaced"):
        bigkernels.patch(llama.model, strict=True)


def test_a_forward_wrapped_after_patching(llama, run, assert_close):
    """The wrapper is kept by unpatch; what it kept under another name gets the class's forward back."""
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    step = run(llama.model, llama.inputs)
    bigkernels.patch(llama.model)
    mlp = llama.model.model.layers[0].mlp
    accelerate_hooks.add_hook_to_module(mlp, accelerate_hooks.ModelHook())
    assert_close(run(llama.model, llama.inputs), step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bigkernels.unpatch(llama.model)
    assert mlp._old_forward.func is type(mlp).forward
    assert_close(run(llama.model, llama.inputs), step)
    accelerate_hooks.remove_hook_from_module(mlp)
    assert_close(run(llama.model, llama.inputs), step)


def test_a_forward_replaced_after_patching_is_reported(llama):
    bigkernels.patch(llama.model)
    llama.model.model.norm.forward = own = lambda x: x
    with pytest.warns(RuntimeWarning, match=r"model\.norm\.forward was replaced"):
        bigkernels.unpatch(llama.model)
    assert llama.model.model.norm.forward is own


def test_inside_a_parent_module(llama, run, assert_close):
    """As DistributedDataParallel and trainers wrap models: before and after patching, and through its state_dict."""

    class Parent(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    step = run(llama.model, llama.inputs)
    parent = Parent(llama.model)
    report = bigkernels.patch(parent)
    assert all(row.path.startswith("module") for row in report.patched)
    assert_close(run(llama.model, llama.inputs), step)
    state = {k: v * 1.1 for k, v in parent.state_dict().items()}
    parent.load_state_dict(state)
    ours = run(llama.model, llama.inputs)
    bigkernels.unpatch(parent)
    assert_close(ours, run(llama.model, llama.inputs))


def test_strict_raises_and_changes_nothing(llama):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-6

        def forward(self, x):
            return x * (2 + self.eps)

    llama.model.model.scale = Scale()
    before = _attributes(llama.model)
    with pytest.raises(RuntimeError, match=r"strict.*\n.*model\.scale: computes neither RMSNorm nor LayerNorm"):
        bigkernels.patch(llama.model, strict=True)
    assert _attributes(llama.model) == before
    report = bigkernels.patch(llama.model)
    patched = _attributes(llama.model)
    assert [row.path for row in report.skipped] == ["model.scale"]
    with pytest.raises(RuntimeError):
        bigkernels.patch(llama.model, strict=True)
    assert _attributes(llama.model) == patched


@pytest.mark.parametrize("function", [bigkernels.patch, bigkernels.unpatch])
@pytest.mark.parametrize("wrong", [None, "model", torch.zeros(3), nn.Linear])
def test_wrong_argument(function, wrong):
    with pytest.raises(TypeError, match=r"bigkernels\.(un)?patch: model must be a torch\.nn\.Module, got"):
        function(wrong)


def test_meta_and_lazy_modules_are_skipped():
    report = bigkernels.patch(nn.Sequential(nn.LayerNorm(8, device="meta"), nn.Linear(8, 8)))
    assert report.patched == []
    assert [(row.path, row.what) for row in report.skipped] == [("0", "its parameters are not materialised yet")]


def test_nothing_to_patch():
    report = bigkernels.patch(nn.Conv1d(3, 3, 1))
    assert (report.patched, report.skipped, str(report)) == ([], [], "nothing to patch")


def test_report_joins_equal_rows(get_case):
    lines = str(bigkernels.patch(get_case("llama").model, linear=False, decode=False)).splitlines()
    assert lines[0] == "patched: 16"
    assert len(lines) == 12  # a title, a heading, and a line for each of the ten kinds
    assert any(line.split()[:3] == ["2", "model.layers.*.mlp", "glu"] for line in lines)
    columns = {found.start() for line in lines[2:] if (found := re.search(r"\d\.\de[-+]\d\d", line))}
    assert len(columns) == 1  # aligned
