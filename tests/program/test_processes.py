"""Generation in several threads and processes, in ones that fork, and at the end of the interpreter."""

from __future__ import annotations

import ast
import copy
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoders import CACHE, build, generate, given, pair, prompt, shared_pair, uses_program

import bigkernels

TIMEOUT = 120  # seconds, on a machine under load


def test_two_models_in_two_threads():
    models = [shared_pair("llama"), shared_pair("gemma3"), shared_pair("gpt2")]
    expected = [generate(m.theirs) for m in models]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            made = list(pool.map(lambda m: generate(m.ours), models))
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_one_model_in_several_threads():
    """Each with a prompt and a cache of its own."""
    models = shared_pair("llama")
    prompts = [prompt(1 + i % 2, 5 + i, seed=i) for i in range(6)]
    expected = [generate(models.theirs, ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda ids: generate(models.ours, ids), prompts * 2))
    assert all(torch.equal(a, b) for a, b in zip(made, expected * 2, strict=True))


def test_threads_of_different_numbers():
    """torch.set_num_threads holds for the thread that calls it, and may change between calls."""
    models = shared_pair("llama")
    expected = generate(models.theirs)

    def run(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return generate(models.ours)

    try:
        for threads in (1, 7, 2, 3):
            assert torch.equal(run(threads), expected)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(run, 5).result(), expected)
    finally:
        torch.set_num_threads(2)


def test_editing_in_one_thread_while_another_generates_with_a_copy():
    models = pair("llama")
    other = copy.deepcopy(models.ours)
    expected = generate(models.theirs)
    stop = threading.Event()

    def edit():
        while not stop.is_set():
            for p in other.parameters():
                p.data = p.data.clone()
            generate(other, new=2)

    thread = threading.Thread(target=edit)
    thread.start()
    try:
        for _ in range(4):
            assert torch.equal(generate(models.ours), expected)
    finally:
        stop.set()
        thread.join()


def _child(models, queue) -> None:
    torch.set_num_threads(1)  # OpenMP's own threads did not come along
    queue.put(generate(models.ours).tolist())


def test_fork_after_generating():
    models = shared_pair("llama")
    expected = models.same(generate).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_child, args=(models, queue), daemon=True) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=TIMEOUT) for _ in children] == [expected, expected]
    for child in children:
        child.join(TIMEOUT)
        assert child.exitcode == 0
    assert generate(models.ours).tolist() == expected


class _Generated(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return generate(self.model, prompt(1, 5, seed=i), new=4)[0]


def test_workers_of_a_data_loader():
    models = shared_pair("llama")
    generate(models.ours)
    loader = torch.utils.data.DataLoader(
        _Generated(models.ours), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=TIMEOUT
    )
    made = torch.cat(list(loader))
    assert torch.equal(made, torch.stack([_Generated(models.theirs)[i] for i in range(4)]))


# Each in a process of its own, forked before torch has threads: loading it takes longest.
ENDS = """
import atexit, copy, os, sys, threading, torch
from decoders import build, generate
import bigkernels

endings = {
    "a daemon's call": lambda: threading.Thread(target=lambda: generate(model, new=30), daemon=True).start(),
    "a thread's call": lambda: threading.Thread(target=lambda: generate(model, new=5)).start(),
    "a fork": lambda: os._exit(0) if (pid := os.fork()) == 0 else os.waitpid(pid, 0),
    "a call at exit": lambda: atexit.register(lambda: generate(model)),
    "a copy": lambda: generate(copy.deepcopy(model)),
}
children = {}
for name, ending in endings.items():
    children[name] = os.fork()
    if children[name] == 0:
        model = build("llama")
        bigkernels.patch(model)
        generate(model)
        ending()
        sys.exit()
print({name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in children.items()})
"""


def test_the_end_of_the_interpreter():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDS], env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    statuses = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert len(statuses) == 5 and not any(statuses.values()), f"{statuses}\n{done.stderr}"


def test_an_interrupt_in_the_middle():
    """A step that does not end normally leaves the model as it was."""
    models = pair("llama")
    expected = models.same(generate)

    class Stops:
        def put(self, value):
            raise KeyboardInterrupt

        def end(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        generate(models.ours, streamer=Stops())
    assert torch.equal(generate(models.ours), expected)


def test_nothing_keeps_a_model_alive():
    """Neither the program nor a cache that it filled."""
    model = build("llama")
    bigkernels.patch(model)
    with uses_program(model):
        out = generate(model, return_dict_in_generate=True)
    weights, died = [weakref.ref(p) for p in model.parameters()], weakref.ref(model)
    cache = given(out)
    del model, out
    gc.collect()
    assert died() is None and all(ref() is None for ref in weights)
    assert cache.get_seq_length() == 18


def test_a_cache_outlives_its_model():
    """The copy of a model goes on with the cache of one that is gone."""
    models = pair("llama")
    ids = prompt(1, 12)
    with torch.no_grad():
        expected = models.theirs(input_ids=ids).logits[:, 8:]
        cache = given(models.ours(input_ids=ids[:, :8], use_cache=True))
        other = copy.deepcopy(models.ours)
        del models
        gc.collect()
        got = other(input_ids=ids[:, 8:], **{CACHE: cache}).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_memory_does_not_grow():
    """Caches that are thrown away give their memory back."""
    psutil = pytest.importorskip("psutil")
    ours = shared_pair("llama").ours
    sizes = []
    for _ in range(3):
        for seed in range(4):
            ids = prompt(8, 60, seed=seed)
            with torch.no_grad():
                ours(input_ids=ids, use_cache=True)
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] - sizes[0] < 30e6
