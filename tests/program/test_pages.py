"""Huge pages under weights that are already there."""

import torch

import bigkernels
from bigkernels.program import _pages, _watch


def test_values_and_addresses_stay_what_they_are():
    generator = torch.Generator("cpu").manual_seed(0)
    tensors = [torch.randn(2**20 + 3, generator=generator, dtype=torch.float32, device="cpu") for _ in range(4)]
    before = [(t.data_ptr(), t.clone()) for t in tensors]
    assert _pages.prefer_huge_pages([*tensors, tensors[0][5:], torch.empty(0, dtype=torch.float32, device="meta")]) >= 0
    for t, (address, values) in zip(tensors, before, strict=True):
        assert t.data_ptr() == address and torch.equal(t, values)


def test_little_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(_pages, "_advise", lambda: 1 / 0)
    assert _pages.prefer_huge_pages([torch.zeros(100, dtype=torch.float32, device="cpu")]) == 0


def test_a_watch_compares_no_codes():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, dtype=torch.float32, device="cpu"))
    bigkernels.quantize(layer, "q4_1", skip=())
    layer(torch.zeros(1, 64, dtype=torch.float32, device="cpu"))
    snapshot = _watch.Snapshot(layer)
    assert not snapshot.tensors and not snapshot.large
