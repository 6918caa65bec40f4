"""Page-locked memory for GPUs, without one: what is asked of the driver, and that it is given back."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from bigkernels import _page_locked
from bigkernels._page_locked import page_locked

MB = 2**20


@pytest.fixture
def driver(monkeypatch):
    """The runtime's two functions; `registered` is what is page-locked at a time, {address: bytes}."""
    registered: dict[int, int] = {}
    state = SimpleNamespace(registered=registered, refuses=False, of_torch=[])

    def register(address: int, nbytes: int, flags: int) -> int:
        if state.refuses:
            return 2
        assert address % 4096 == nbytes % 4096 == flags == 0
        registered[address] = nbytes
        return 0

    def unregister(address: int) -> int:
        del registered[address]
        return 0

    def of_torch(nbytes: int):
        state.of_torch.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(_page_locked, "_of_torch", of_torch)
    return state


@pytest.mark.parametrize("nbytes", [34 * MB, 3 * MB + 5, MB])
def test_takes_what_is_asked_for(driver, nbytes: int):
    found = page_locked(nbytes)
    assert found.shape == (nbytes,) and found.dtype == torch.uint8
    assert found.fill_(7).sum(dtype=torch.int64) == 7 * nbytes
    assert driver.registered == {found.data_ptr(): -(-nbytes // 4096) * 4096}  # and not the next power of two
    view = found[: MB // 2].view(torch.float32)
    del found
    gc.collect()
    assert len(driver.registered) == 1, "a view is still there"
    del view
    gc.collect()
    assert driver.registered == {} and driver.of_torch == []


def test_small_and_refused_memory_is_torchs(driver):
    assert page_locked(1000).shape == (1000,) and page_locked(0).shape == (0,)
    driver.refuses = True
    assert page_locked(5 * MB).shape == (5 * MB,)
    assert driver.of_torch == [1000, 0, 5 * MB] and driver.registered == {}


def test_buffers_of_saved_tensors_and_of_optimizers(driver, monkeypatch):
    from bigkernels.checkpointing import _places
    from bigkernels.optim import _offload

    pool = _places.Pool()
    pool.make = lambda size: _places.Pinned.make(pool, size)
    _, buffer = pool.take(34 * MB)
    assert sum(driver.registered.values()) == pool.held == 34 * MB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    like = torch.randn(1000, 700).t()
    shadow = _offload._host(like, torch.bfloat16)
    assert shadow.shape == like.shape and shadow.stride() == like.stride() and shadow.dtype == torch.bfloat16
    assert sum(driver.registered.values()) - 34 * MB == -(-like.numel() * 2 // 4096) * 4096
    assert _offload._host(torch.ones(3)).shape == (3,)
