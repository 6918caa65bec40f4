"""Public names follow the rules of `CONTRIBUTING.md`, and names that were given up work and warn."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import pkgutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bigkernels
from bigkernels import checkpointing, functional, losses, memory, nn, quantization

# What has another name here, with the name that it has: `CONTRIBUTING.md` says why.
ARGUMENTS = {
    "class_weights": "class_weight", "dim": "hidden_size", "size": "hidden_size, head_dim, ...", "heads": "num_heads",
    "n_heads": "num_heads", "key_heads": "num_kv_heads", "kv_heads": "num_kv_heads",
    "num_key_value_heads": "num_kv_heads", "head_size": "head_dim", "value_size": "value_head_dim",
    "experts": "num_experts", "pages": "num_pages", "config": "format", "gram": "hessian", "w": "weight",
    "turned": "transposed", "book": "codebook", "logps": "logprobs", "log_probs": "logprobs",
    "ref_logps": "ref_logprobs", "old_logps": "old_logprobs", "entropy": "return_entropy", "lse": "return_lse",
    "directory": "folder", "dir": "folder", "least": "min_nbytes", "labels_smoothing": "label_smoothing",
    "epsilon": "eps", "in_dim": "in_features", "out_dim": "out_features",
}  # fmt: skip
# Classes of other libraries give these their names.
THEIRS = {
    ("bigkernels.integrations.transformers.Quantizer.update_attn_implementation", "config"),
    ("bigkernels.nn.QuantizedExperts.size", "dim"),
    # A dimension of a tensor, which has this name in torch.
    ("bigkernels.distributed.gather_sequence", "dim"),
    ("bigkernels.distributed.shard_sequence", "dim"),
}
# What changes a model, how it is undone, and the context that does both.
UNDONE = [
    ("patch", "unpatch", "patched"),
    ("quantize", "dequantize", "quantized"),
    ("apply_checkpointing", "remove_checkpointing", "checkpointed"),
]
CACHES = ("k_cache", "v_cache", "cache_seqlens")


def public_modules() -> list[types.ModuleType]:
    """Modules of ours that say what they give to others."""
    found = [bigkernels]
    for info in pkgutil.walk_packages(bigkernels.__path__, "bigkernels."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # an extra that is not installed
                continue
            if hasattr(module, "__all__"):
                found.append(module)
    return found


def callables() -> Iterator[tuple[str, inspect.Signature]]:
    """Public functions, classes and their public methods, by the paths that they are imported by."""
    for module in public_modules():
        for name in module.__all__:
            value = getattr(module, name)
            path = f"{module.__name__}.{name}"
            if inspect.isclass(value):
                if not issubclass(value, (tuple, BaseException)):
                    yield path, inspect.signature(value)
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{path}.{method}", inspect.signature(function)
            elif inspect.isroutine(value):
                yield path, inspect.signature(value)


def test_one_word_a_thing():
    paths = dict(callables())
    assert len(paths) > 100 and "bigkernels.nn.Attention" in paths
    wrong = [
        f"{path}({name}): {ARGUMENTS[name]}"
        for path, signature in paths.items()
        for name in signature.parameters
        if name in ARGUMENTS and (path, name) not in THEIRS
    ]
    assert not wrong, "\n".join(wrong)
    for path, signature in paths.items():
        names = tuple(signature.parameters)
        if set(CACHES) <= set(names):
            assert names[1:4] == CACHES, f"{path}: caches come after the queries, in this order"
        for name, parameter in signature.parameters.items():
            if parameter.default is True or parameter.default is False:
                assert name in ("causal", "bias") or not name.startswith(("no_", "not_")), f"{path}({name})"
            if parameter.annotation == "Format" or "Format |" in str(parameter.annotation):
                assert name in ("format", "config"), f"{path}({name}): format"


def test_what_is_done_is_undone_by_a_name_and_by_a_context():
    for do, undo, context in UNDONE:
        for name in (do, undo, context):
            assert name in bigkernels.__all__
        given = inspect.signature(getattr(bigkernels, do)).parameters
        found = inspect.signature(getattr(bigkernels, context)).parameters
        assert list(found)[0] == "model" and list(inspect.signature(getattr(bigkernels, undo)).parameters) == ["model"]
        assert found.keys() <= given.keys() | {"options"}


def messages() -> Iterator[tuple[str, str]]:
    """The beginnings of strings that read like an error of ours."""
    package = Path(bigkernels.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
                node = node.values[0]
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("bigkernels."):
                path, colon, rest = node.value.partition(": ")
                if colon and rest and " " not in path:
                    yield f"{file.relative_to(package)}:{node.lineno}", path


def test_errors_begin_with_a_path_that_can_be_imported():
    found = list(messages())
    assert len(found) > 100
    wrong = []
    for where, path in found:
        value = bigkernels
        try:
            for i, part in enumerate(path.split(".")[1:], 2):
                value = getattr(value, part, None) or importlib.import_module(".".join(path.split(".")[:i]))
        except ImportError:
            wrong.append(f"{where}: {path}")
    assert not wrong, "\n".join(wrong)


def renamed(old: str, new: str):
    return pytest.warns(DeprecationWarning, match=f"{old}.* is deprecated, use {new}")


def test_arguments_by_their_old_names():
    logits, target, weight = torch.randn(5, 7), torch.tensor([0, 3, 6, 1, 1]), torch.rand(7)
    expected = functional.cross_entropy(logits, target, class_weight=weight)
    with renamed("functional.cross_entropy: the argument weight", "class_weight"):
        assert torch.equal(functional.cross_entropy(logits, target, weight=weight), expected)
    with renamed("linear_logprobs: the argument entropy", "return_entropy"):
        _, entropy = functional.linear_logprobs(torch.randn(5, 4), torch.randn(7, 4), target, entropy=True)
    assert entropy.shape == (5,)
    with pytest.raises(TypeError, match="weight and class_weight are given"):
        functional.cross_entropy(logits, target, weight, weight=weight, class_weight=weight)


def test_append_kv_in_its_old_order():
    q, new, lengths = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.tensor([3, 5])
    expected, positional, by_name = (torch.zeros(2, 6, 2, 8) for _ in range(3))
    functional.append_kv_(q, expected, expected.clone(), lengths, new, new)
    assert expected.any()
    with renamed("append_kv_: the order q, k, v, k_cache", "q, k_cache"):
        functional.append_kv_(q, new, new, positional, positional.clone(), lengths)
    with renamed("append_kv_: the order", "q, k_cache"):
        functional.append_kv_(q, new, new, k_cache=by_name, v_cache=by_name.clone(), cache_seqlens=lengths)
    assert torch.equal(positional, expected) and torch.equal(by_name, expected)


def test_class_weights_of_saved_losses():
    loss = nn.CrossEntropyLoss(torch.rand(7))
    with renamed("CrossEntropyLoss: the attribute weight", "class_weight"):
        assert loss.weight is loss.class_weight
    other = nn.CrossEntropyLoss(torch.zeros(7))
    other.load_state_dict({"weight": loss.class_weight})  # as versions before saved it
    assert torch.equal(other.class_weight, loss.class_weight)
    before = pickle.loads(pickle.dumps(loss))
    before.__setstate__({**loss.__dict__, "_buffers": {"weight": loss.class_weight}})
    assert torch.equal(before.class_weight, loss.class_weight)


@pytest.mark.parametrize(
    "kind, given, before",
    [
        (
            nn.Attention,
            {"hidden_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
            {"dim": 8, "heads": 4, "key_heads": 2, "head_size": 6},
        ),
        (nn.RMSNorm, {"hidden_size": 8}, {"size": 8}),
        (nn.LayerNorm, {"hidden_size": 8}, {"size": 8}),
        (nn.RotaryEmbedding, {"rotary_dim": 8}, {"size": 8}),
    ],
)
def test_sizes_of_modules(kind, given, before):
    module = kind(**given)
    with pytest.warns(DeprecationWarning) as warned:
        other = kind(**before)
    assert [str(w.message).split(": ")[0] for w in warned] == [f"bigkernels.nn.{kind.__name__}"] * len(given)
    assert repr(module) == repr(other)
    for (new, value), old in zip(given.items(), before, strict=True):
        with renamed(f"the attribute {old}", new):
            assert getattr(module, old) == getattr(module, new) == value
    pickled = module.__getstate__() if hasattr(module, "__getstate__") else dict(module.__dict__)
    names = dict(zip(given, before, strict=True))
    module.__setstate__({names.get(name, name): value for name, value in pickled.items()})
    assert repr(module) == repr(other) and not before.keys() & vars(module).keys()


def test_sizes_of_modules_without_attributes():
    with renamed("GatedMLP: the argument size", "hidden_size"):
        assert nn.GatedMLP(size=4, intermediate_size=6).down_proj.out_features == 4
    with pytest.warns(DeprecationWarning, match="KVCache"):
        cache = nn.KVCache(2, 8, key_heads=1, head_size=4, value_size=6, page_size=4, pages=5)
    assert cache.keys.shape == (5, 4, 1, 4) and cache.values.shape == (5, 4, 1, 6)


def test_formats_by_their_old_names():
    model, w = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.randn(8, 64)
    with renamed("bigkernels.quantize: the argument config", "format"):
        bigkernels.quantize(model, config="int8")
    with renamed("the attribute config", "weight_format"):
        assert model[0].config == model[0].weight_format == quantization.Int8()
    with pytest.warns(DeprecationWarning, match="quantize_weight: the argument (w|config) is"):
        q = functional.quantize_weight(w=w, config="int8")
    with pytest.warns(DeprecationWarning, match="fake_quantize: the argument (w|config) is"):
        assert torch.equal(quantization.fake_quantize(w=w, config="int8"), q.dequantize())
    with renamed("QuantizedWeight: the attribute config", "format"):
        assert q.config == q.format
    with renamed("QuantizedWeight: the argument config", "format"):
        other = quantization.QuantizedWeight(config=q.format, shape=q.shape, dtype=q.dtype, tensors={})
    assert other.format == q.format
    with renamed("quantization: named", "resolve_format"):
        assert quantization.named("int8") == quantization.resolve_format("int8")
    with renamed("checkpointing: named", "resolve_policy"):
        assert checkpointing.named("int8") == checkpointing.resolve_policy("int8")
    experts = torch.randn(3, 64, 8)
    with renamed("from_parameter: the argument turned", "transposed"):
        made = nn.QuantizedExperts.from_parameter(experts, "int8", turned=True)
    assert made.shape == experts.shape and made.num_experts == 3
    with renamed("the attribute turned", "transposed"):
        assert made.turned
    restored = nn.QuantizedExperts.from_parameter(torch.zeros(3, 64, 8), "int8", transposed=True)
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored.dequantize(), made.dequantize())
    assert b'"turned": 1' in bytes(made.state_dict()["format"].tolist())  # a name in saved files


def test_losses_and_memory_by_their_old_names():
    given = torch.randn(4), torch.randn(4), torch.tensor([True, False, True, True]), None
    expected = losses.kto_loss(*given).loss
    with pytest.warns(DeprecationWarning, match="kto_loss: the argument (logps|ref_logps) is"):
        found = losses.kto_loss(logps=given[0], ref_logps=given[1], desirable=given[2], kl_logratios=None)
    assert torch.equal(found.loss, expected)
    with pytest.warns(DeprecationWarning, match="offload: the argument (directory|least) is"):
        assert checkpointing.offload(directory="/tmp", least=5) == checkpointing.offload("/tmp", min_nbytes=5)
    with renamed("bigkernels: reuse_memory", "bigkernels.memory.reuse_memory"):
        assert bigkernels.reuse_memory is memory.reuse_memory
