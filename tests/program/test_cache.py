"""Caches of transformers whose layers have room: whatever is done to them, they show what transformers' own do."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from ctypes import memmove

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

import bigkernels
from bigkernels.program import _cache, _cache_layers
from bigkernels.program import _records as records
from bigkernels.program._cache import CacheShape, Description, describe
from bigkernels.program._cache_int8 import (
    CastLayer,
    CastSlidingWindowLayer,
    Int8Layer,
    Int8SlidingWindowLayer,
    decode,
    encode,
)
from bigkernels.program._cache_layers import BufferedLayer, BufferedSlidingWindowLayer, buffered

GROUPS, D, DV, WINDOW = 2, 4, 6, 7
# As models call the argument; older releases know one name only.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
SHAPES = (CacheShape(GROUPS, D, DV), CacheShape(GROUPS, D, DV, WINDOW))


@pytest.fixture(autouse=True)
def settled(monkeypatch) -> list[int]:
    """How often late threads were waited for: there are none here."""
    calls = [0]

    def settle() -> None:
        calls[0] += 1

    for module in (_cache_layers, _cache):
        monkeypatch.setattr(module, "settle", settle)
    return calls


def new(batch: int, tokens: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(batch, GROUPS, tokens, n, generator=generator) for n in (D, DV))


def same(a: Tensor | None, b: Tensor | None) -> None:
    assert (a is None) == (b is None)
    if a is not None:
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b)


def same_layers(theirs, ours) -> None:
    same(theirs.keys, ours.keys)
    same(theirs.values, ours.values)
    assert theirs.is_initialized == ours.is_initialized
    assert theirs.get_seq_length() == ours.get_seq_length()
    assert theirs.get_max_length() == ours.get_max_length()
    for n in (1, 5):
        assert theirs.get_mask_sizes(n) == ours.get_mask_sizes(n)
    for name, value in theirs.__dict__.items():
        if name not in ("keys", "values", "_sliding_window_tensor"):
            assert getattr(ours, name) == value, name


def program_step(cache: DynamicCache, k: list[Tensor], v: list[Tensor], shapes=SHAPES) -> Description | str:
    """What a run of a program does to a cache: writes by the addresses that it is told, then moves on."""
    found = describe(cache, shapes, k[0].shape[0], k[0].shape[2], k[0].dtype)
    if isinstance(found, str):
        return found
    assert found.packed.dtype == torch.int64 and found.packed.shape[0] == len(shapes)
    with found:
        _write(found, k, v)
        found.advance(k[0].shape[2])
    return found


def _write(found: Description, k: list[Tensor], v: list[Tensor]) -> None:
    for i, (keys, values) in enumerate(zip(k, v, strict=True)):
        layer = records.LayerCache.from_address(found.packed[i].data_ptr())
        tokens = keys.shape[2]
        assert layer.held + tokens <= layer.capacity
        writes = [
            (layer.k, keys, (layer.k_batch, layer.k_head, layer.k_token)),
            (layer.v, values, (layer.v_batch, layer.v_head, layer.v_token)),
        ]
        if layer.bits == 8:
            scales, strides = [], (layer.scale_batch, layer.scale_head, 1)
            for j, address in enumerate((layer.k_scale, layer.v_scale)):
                codes, scale = encode(writes[j][1])
                writes[j] = (writes[j][0], codes, writes[j][2])
                scales.append((address, scale[..., None], strides))
            writes += scales
        else:
            dtype = next(dtype for dtype, number in _cache.TYPES.items() if number == layer.type)
            writes = [(address, x.to(dtype), strides) for address, x, strides in writes]
        for address, x, strides in writes:
            for b in range(x.shape[0]):
                for h in range(x.shape[1]):
                    for t in range(tokens):
                        at = b * strides[0] + h * strides[1] + (layer.held + t) * strides[2]
                        row = x[b, h, t].contiguous()
                        memmove(address + at * x.element_size(), row.data_ptr(), row.nbytes)


class Pair:
    """The same operations on a cache that transformers' modules fill and on one that modules and a program fill in
    turns."""

    def __init__(self, seed: int, bits: int | torch.dtype = 0):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = self.random.choice((1, 2, 3))
        make = lambda: DynamicCache.__new__(DynamicCache)  # noqa: E731
        self.theirs, self.ours = make(), make()
        self.bits = bits
        kinds = {0: (DynamicLayer, DynamicSlidingWindowLayer), 8: (Int8Layer, Int8SlidingWindowLayer)}.get(
            bits, (CastLayer, CastSlidingWindowLayer)
        )
        super(DynamicCache, self.theirs).__init__(layers=[DynamicLayer(), DynamicSlidingWindowLayer(WINDOW)])
        super(DynamicCache, self.ours).__init__(layers=[kinds[0](), kinds[1](WINDOW)])
        if bits not in (0, 8):
            for layer in self.ours.layers:
                layer.kept = bits
        self.recording = False

    def both(self, f) -> None:
        results = []
        for cache in (self.theirs, self.ours):
            try:
                results.append(f(cache))
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as e:
                results.append((type(e), str(e)))
        theirs, ours = results
        if isinstance(theirs, list):
            for a, b in zip(theirs, ours, strict=True):
                same(a, b)
        else:
            assert theirs == ours

    def append(self) -> None:
        tokens = self.random.choice((1, 1, 1, 2, 5, 70))
        states, known = self.states(tokens)
        self.both(lambda c: [x for i, s in enumerate(states if c is self.ours else known) for x in c.update(*s, i)])

    def states(self, tokens: int) -> tuple[list, list]:
        """New keys and values, and what they are in 8 bits or another dtype."""
        states = [new(self.batch, tokens, self.generator) for _ in SHAPES]
        if not self.bits:
            return states, states
        if self.bits != 8:
            return states, [tuple(x.to(self.bits).float() for x in s) for s in states]
        return states, [tuple(decode(*encode(x), torch.float32) for x in s) for s in states]

    def step(self) -> None:
        tokens = self.random.choice((1, 1, 1, 3, 8))
        states, known = self.states(tokens)
        for i, s in enumerate(known):
            self.theirs.update(*s, i)
        found = program_step(self.ours, *(list(x) for x in zip(*states, strict=True)))
        assert isinstance(found, Description), found

    def filled(self) -> bool:
        return all(x.is_initialized and x.keys.numel() for x in self.theirs.layers)

    def record(self) -> None:
        self.both(lambda c: c.activate_past_recording())

    def crop(self) -> None:
        n = self.random.choice((0, -1, -2, -5, 3))
        held = self.theirs.layers[0].get_seq_length()
        window = self.theirs.layers[1]
        if window.is_initialized and n < 0 and window.keys.shape[-2] + n < min(WINDOW - 1, held + n):
            return  # a window that has lost what it would need
        if not window.is_initialized and n:
            return
        if window.cumulative_length >= WINDOW and not window.record_past:
            self.both(lambda c: c.layers[1].crop(n))  # refused
            return
        self.both(lambda c: c.crop(n))

    def reorder(self) -> None:
        idx = torch.tensor([self.random.randrange(self.batch) for _ in range(self.batch)])
        self.both(lambda c: c.reorder_cache(idx))

    def repeat(self) -> None:
        if self.batch < 5 and self.filled():
            self.both(lambda c: c.batch_repeat_interleave(2))
            self.batch *= 2

    def select(self) -> None:
        if self.batch > 1 and self.filled():
            self.both(lambda c: c.batch_select_indices(torch.arange(self.batch - 1)))
            self.batch -= 1

    def reset(self) -> None:
        self.both(lambda c: c.reset())

    def copy(self) -> None:
        self.theirs, self.ours = copy.deepcopy(self.theirs), copy.deepcopy(self.ours)

    def pickle(self) -> None:
        old = self.ours
        self.ours = pickle.loads(pickle.dumps(old))
        if not self.bits:
            assert {type(x) for x in self.ours.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}

    def set(self) -> None:
        if self.theirs.layers[0].is_initialized:
            for cache in (self.theirs, self.ours):
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys + 1, layer.values * 2

    def write(self) -> None:
        if self.theirs.layers[0].is_initialized:
            for cache in (self.theirs, self.ours):
                cache.layers[0].keys[..., -1:, :] = 3.0

    def offload(self) -> None:
        self.both(lambda c: [layer.offload() for layer in c.layers][:0])
        self.both(lambda c: [layer.prefetch() for layer in c.layers][:0])

    def compare(self) -> None:
        for theirs, ours in zip(self.theirs.layers, self.ours.layers, strict=True):
            same_layers(theirs, ours)
        for n in (1, 4):
            assert [self.theirs.get_mask_sizes(n, i) == self.ours.get_mask_sizes(n, i) for i in range(2)]


OPERATIONS = (
    "append",
    "step",
    "step",
    "step",
    "crop",
    "reorder",
    "repeat",
    "select",
    "reset",
    "copy",
    "pickle",
    "set",
    "write",
    "offload",
    "record",
)


@pytest.mark.parametrize("bits", [0, 8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(40))
@torch.no_grad()
def test_any_sequence_of_operations(seed, bits):
    pair = Pair(seed, bits)
    kept = []
    # What reads values of 8 bits and sets them again rounds them again.
    operations = [x for x in OPERATIONS if not bits or x not in ("repeat", "select", "set", "write", "offload")]
    for _ in range(40):
        operation = pair.random.choice(operations)
        getattr(pair, operation)()
        pair.compare()
        # What somebody took out of the cache stays what it was, whatever comes after.
        if pair.random.random() < 0.3 and pair.ours.layers[0].is_initialized:
            view = pair.ours.layers[pair.random.randrange(2)].keys
            kept.append((view, view.clone()))
        if operation == "write":
            kept.clear()
    for view, before in kept:
        assert torch.equal(view, before)


# ---- what a program can use -----------------------------------------------------------------------------------------


def states(batch: int, tokens: int, dtype=torch.float32) -> list[list[Tensor]]:
    return [[x.to(dtype) for x in xs] for xs in zip(*(new(batch, tokens) for _ in SHAPES), strict=True)]


def layers_of(kind: str) -> list:
    if kind == "dynamic":
        return [DynamicLayer(), DynamicSlidingWindowLayer(WINDOW)]
    return [StaticLayer(20), StaticSlidingWindowLayer(20, WINDOW)]


def cache_of(layers: list):
    from transformers.cache_utils import Cache

    return Cache(layers=layers)


@torch.no_grad()
def test_static_layers_are_used_where_they_are():
    theirs, ours = cache_of(layers_of("static")), cache_of(layers_of("static"))
    for tokens in (3, 1, 2):
        k, v = states(2, tokens)
        for i in range(2):
            theirs.update(k[i], v[i], i)
        before = [x.keys for x in ours.layers]
        assert isinstance(program_step(ours, k, v), Description)
        assert all(b is None or b is x.keys for b, x in zip(before, ours.layers, strict=True))
        for a, b in zip(theirs.layers, ours.layers, strict=True):
            same(a.keys, b.keys)
            same(a.values, b.values)
            assert int(a.get_seq_length()) == int(b.get_seq_length()) == int(b.cumulative_length)
    # The modules go on from there.
    k, v = states(2, 1)
    for i in range(2):
        for a, b in zip(theirs.update(k[i], v[i], i), ours.update(k[i], v[i], i), strict=True):
            same(a, b)
    assert "has room for 7" in program_step(ours, *states(2, 1))  # a window that would have to move
    ours.crop(-4)
    assert isinstance(program_step(ours, *states(2, 3)), Description)
    assert "shape" in program_step(ours, *states(1, 1))
    ours.reset()
    assert program_step(ours, *states(2, 3)).past == 3


@torch.no_grad()
def test_a_token_changes_nothing_but_its_length(settled):
    cache = DynamicCache()
    full = (SHAPES[0],) * 2
    found = program_step(cache, *states(1, 5), full)
    addresses = [x._k.data_ptr() for x in cache.layers]
    settled[0] = 0
    for past in range(6, 30):
        assert program_step(cache, *states(1, 1), full) is found and found.past == past
        assert found.packed[:, _cache.FIELD["held"]].tolist() == [past] * 2
    assert settled == [0] and addresses == [x._k.data_ptr() for x in cache.layers]


def swap(cache) -> None:
    cache.layers[1] = copy.deepcopy(cache.layers[1])


EDITS = {
    "crop": lambda c: c.crop(-2),
    "reorder": lambda c: c.reorder_cache(torch.tensor([1, 0])),
    "reset": lambda c: c.reset(),
    "an update by modules": lambda c: [c.update(*new(2, 2), i) for i in range(2)],
    "keys of somebody": lambda c: [setattr(x, "keys", x.keys + 1) for x in c.layers],
    "another layer": swap,
    "all layers": lambda c: setattr(c, "layers", [copy.copy(x) for x in c.layers]),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_edits_between_steps_are_seen(edit, kind):
    theirs, ours = cache_of(layers_of(kind)), cache_of(layers_of(kind))

    def step() -> None:
        k, v = states(2, 1)
        for i in range(2):
            theirs.update(k[i], v[i], i)
        assert isinstance(program_step(ours, k, v), Description)

    for _ in range(3):
        step()
    torch.manual_seed(0)
    EDITS[edit](theirs)
    torch.manual_seed(0)
    EDITS[edit](ours)
    step()
    for a, b in zip(theirs.layers, ours.layers, strict=True):
        length = int(a.get_seq_length())
        assert length == int(b.get_seq_length())
        same(a.keys[:, :, :length], b.keys[:, :, :length])
        same(a.values[:, :, :length], b.values[:, :, :length])


@pytest.mark.parametrize("edit", ["crop", "reorder", "reset", "keys of somebody"])
@torch.no_grad()
def test_late_threads_are_waited_for(edit, settled):
    """Before slots are written again, and before their memory goes."""
    cache = cache_of(layers_of("dynamic"))
    program_step(cache, *states(2, 4))
    settled[0] = 0
    EDITS[edit](cache)
    assert settled[0] > 0
    program_step(cache, *states(2, 4))
    settled[0] = 0
    del cache
    assert settled[0] > 0


@torch.no_grad()
def test_late_threads_are_waited_for_where_nobody_says_what_follows(settled):
    """Tensors of static layers are their owner's, and views of dynamic ones may be written to; a run that failed leaves
    slots to others."""
    program_step(cache_of(layers_of("static")), *states(2, 4))
    assert settled[0] == 1
    cache = cache_of(layers_of("dynamic"))
    found = program_step(cache, *states(2, 4))
    for name in ("keys", "values"):
        settled[0] = 0
        getattr(cache.layers[0], name)
        assert settled[0] == 1
    program_step(cache, *states(2, 1))
    assert settled[0] == 1
    cache.layers[0].keys, cache.layers[1].values  # a program has written again
    assert settled[0] == 3
    cache.update(*new(2, 1), 0)  # and here not: whoever has the keys now is alone
    settled[0] = 0
    cache.layers[0].keys, cache.layers[0].values
    assert settled[0] == 0
    with pytest.raises(KeyboardInterrupt), found:
        raise KeyboardInterrupt
    assert settled[0] == 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_memory_that_moves_under_a_cache(kind):
    """`share_memory_`, as queues of processes call it, puts a storage elsewhere and gives its old memory back."""
    theirs, ours = cache_of(layers_of(kind)), cache_of(layers_of(kind))
    for n in range(5):
        k, v = states(2, 1)
        for i in range(2):
            theirs.update(k[i], v[i], i)
        assert isinstance(program_step(ours, k, v), Description)
        if n == 2:
            before = ours.layers[0].keys.data_ptr()
            ours.layers[0].keys.share_memory_(), ours.layers[1].values.share_memory_()
            assert ours.layers[0].keys.data_ptr() != before
    for a, b in zip(theirs.layers, ours.layers, strict=True):
        same(a.keys, b.keys)
        same(a.values, b.values)


def test_what_cannot_be_used_has_a_reason():
    def reason(layers: list, batch: int = 2, tokens: int = 1, dtype=torch.float32, shapes=SHAPES) -> str:
        found = describe(cache_of(layers), shapes, batch, tokens, dtype)
        assert isinstance(found, str)
        return found

    def filled(kind: str = "dynamic", dtype=torch.float32) -> list:
        layers = layers_of(kind)
        for layer in layers:
            layer.update(*(x.to(dtype) for x in new(2, 3)))
        return layers

    class Own(DynamicLayer):
        pass

    class Update(DynamicCache):
        def update(self, *args, **kwargs):
            return super().update(*args, **kwargs)

    assert "Own" in reason([Own(), DynamicLayer()])
    assert "1 layers, and the model 2" in reason([DynamicLayer()])
    assert "float64" in reason(layers_of("dynamic"), dtype=torch.float64)
    assert "bfloat16" in reason(filled(dtype=torch.bfloat16))
    assert "shape" in reason(filled(), batch=1)
    assert "shape" in reason(filled(), shapes=(CacheShape(1, D, DV),) * 2)
    assert "room for 20" in reason([filled("static")[0], DynamicLayer()], tokens=18)
    assert "window of 7" in reason(filled(), shapes=(SHAPES[0],) * 2)
    layers = filled()
    layers[0].update(*new(2, 1))
    assert "different lengths" in reason(layers)
    layers = filled()
    layers[0].keys.requires_grad_()
    assert "gradients" in reason(layers)
    layers = filled()
    layers[0].update = layers[0].update
    assert "its own `update`" in reason(layers)
    assert "its own `update`" in describe(Update(), SHAPES, 2, 1, torch.float32)
    assert "tuple" in describe(((1, 2),), SHAPES, 2, 1, torch.float32)


def test_autograd_gets_tensors_of_its_own():
    """Gradients flow through what modules append, also after a program has used the cache."""
    cache = cache_of(layers_of("dynamic"))
    with torch.no_grad():
        program_step(cache, *states(2, 3))
    k, v = (x.requires_grad_() for x in new(2, 2))
    keys, values = cache.update(k, v, 0)
    cache.update(*new(2, 1), 0)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k)) and torch.equal(v.grad, torch.ones_like(v))


def test_inference_mode_and_outside():
    cache = cache_of(layers_of("dynamic"))
    with torch.inference_mode():
        program_step(cache, *states(1, 3))
    with torch.no_grad():
        cache.update(*new(1, 1), 0)
        cache.update(*new(1, 1), 1)
        program_step(cache, *states(1, 1))
    with torch.inference_mode():
        cache.update(*new(1, 1), 0)
        cache.crop(-1)
    assert cache.get_seq_length() == 5


def test_a_layer_stays_the_object_it_was():
    layers = [DynamicLayer(), DynamicSlidingWindowLayer(WINDOW)]
    layers[0].mine = "note"
    for layer in layers:
        layer.update(*new(1, 2))
    before = [(x.keys, x.values) for x in layers]
    for layer in layers:
        buffered(layer)
    assert [type(x) for x in layers] == [BufferedLayer, BufferedSlidingWindowLayer]
    assert layers[0].mine == "note" and isinstance(layers[0], DynamicLayer)
    for layer, (k, v) in zip(layers, before, strict=True):
        assert layer.keys is k and layer.values is v


# ---- a cache of the package's own -----------------------------------------------------------------------------------


def tiny():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    return MistralForCausalLM(config).eval()


@torch.no_grad()
def test_modules_and_program_take_turns_on_a_cache_of_8_bits(monkeypatch):
    monkeypatch.undo()  # the threads of a program are there
    ids = torch.randint(3, 64, (2, 20))
    sizes = (9, 1, 1, 4, 1, 1, 3)

    def logits(model, patched: set[int]) -> Tensor:
        cache, out, at = bigkernels.Cache(model, bits=8), [], 0
        for i, n in enumerate(sizes):
            if i in patched:
                with bigkernels.patched(model):
                    out.append(model(input_ids=ids[:, at : at + n], **{CACHE: cache}).logits)
                assert all(layer._lent for layer in cache.layers)
            else:
                out.append(model(input_ids=ids[:, at : at + n], **{CACHE: cache}).logits)
            at += n
        assert {type(x) for x in cache.layers} == {Int8SlidingWindowLayer} and cache.get_seq_length() == 20
        return torch.cat(out, 1)

    model = tiny()
    expected = logits(model, set())
    torch.testing.assert_close(logits(model, {0, 1, 4, 6}), expected, rtol=1e-3, atol=2e-3)
    exact = model(input_ids=ids).logits
    assert (expected - exact).abs().max() < 0.1 * exact.std()


def test_a_cache_of_8_bits_takes_half_of_the_memory():
    cache = bigkernels.Cache(tiny().config, bits=8)
    with torch.no_grad():
        cache.update(*(torch.randn(1, 2, 640, 64).bfloat16() for _ in range(2)), 0)
    layer = cache.layers[0]
    slots = layer._k.shape[2]
    stored = sum(getattr(layer, name).nbytes for name in layer._names)
    assert stored == 2 * 2 * slots * (64 + 4) and layer.keys.dtype == torch.bfloat16
    assert type(bigkernels.Cache(tiny()).layers[0]) is DynamicSlidingWindowLayer
    with pytest.raises(ValueError, match="bits is 4"):
        bigkernels.Cache(tiny(), bits=4)


KEPT = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float32),
]


@pytest.mark.parametrize(("dtype", "kept"), KEPT, ids=lambda dtype: str(dtype)[6:])
@torch.no_grad()
def test_a_cache_of_another_dtype(monkeypatch, dtype, kept):
    """Modules and program in turns, past the window, on the numbers that are kept; and none of them is wider."""
    monkeypatch.undo()
    ids = torch.randint(3, 64, (2, 24))
    sizes = (9, 1, 1, 4, 1, 1, 3, 1, 3)
    model = tiny()
    exact = copy.deepcopy(model).double()(input_ids=ids).logits
    model.to(dtype)
    ours = copy.deepcopy(model)
    bigkernels.patch(ours)

    def logits(patched: set[int]) -> Tensor:
        cache, out, at = bigkernels.Cache(model, dtype=kept), [], 0
        for i, n in enumerate(sizes):
            out.append((ours if i in patched else model)(input_ids=ids[:, at : at + n], **{CACHE: cache}).logits)
            assert i not in patched or all(layer._lent for layer in cache.layers)
            at += n
            if i == 4:
                cache = copy.deepcopy(cache)
            elif i == 5:
                cache = pickle.loads(pickle.dumps(cache))
        for layer in cache.layers:
            assert type(layer) is CastSlidingWindowLayer and cache.get_seq_length() == 24
            assert layer._k.dtype == layer._v.dtype == kept and layer.keys.dtype == layer.values.dtype == dtype
        return torch.cat(out, 1).double()

    step = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    tolerance = max(step[dtype], step[kept]) * exact.abs().max().item()
    for patched in (set(), {0, 1, 4, 6}, set(range(9))):
        assert (logits(patched) - exact).abs().max() < tolerance


def test_dtypes_that_a_cache_cannot_have():
    for options, why in (
        ({"dtype": torch.float64}, "float32, bfloat16"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
        ({"dtype": torch.bfloat16, "bits": 8}, "give bits or dtype"),
    ):
        with pytest.raises(ValueError, match=why):
            bigkernels.Cache(tiny(), **options)
