"""The order of copies from and to a GPU, without one: streams are queues that run late, in any order that events allow.

Memory is handed out again as soon as a tensor dies, as torch's allocator does for the stream that it belongs to.
"""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch

from bigkernels.checkpointing import _places

NBYTES = _places._LEAVING // 2


class Event:
    happened = False


class Stream:
    def __init__(self, machine: Machine):
        self.queue: list = []
        machine.streams.append(self)

    def record_event(self) -> Event:
        self.queue.append(event := Event())
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append((event,))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Machine:
    """A device whose tensors are single values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.streams: list[Stream] = []
        self.current = self.compute = Stream(self)
        self.free: list[list] = []
        self.blocks = 0
        machine = self

        @contextmanager
        def stream(s):
            before, machine.current = machine.current, s
            try:
                yield
            finally:
                machine.current = before

        class Buffer:
            def __init__(self):
                self.block = [None]

            def copy_(self, other, non_blocking):
                to, of = self.block, other.block
                machine.current.queue.append(lambda: to.__setitem__(0, of[0]))

        class OnDevice(Buffer):
            dtype, device, nbytes, kept = torch.uint8, "gpu", NBYTES, False

            def __init__(self, *args, **options):
                if not machine.free:
                    machine.blocks += 1
                self.block = machine.free.pop() if machine.free else [None]

            def numel(self):
                return self.nbytes

            def record_stream(self, stream):
                self.kept = True

            def __del__(self):
                if not self.kept:
                    machine.free.append(self.block)

        self.tensor = OnDevice
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(machine))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machine.current)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch, "empty", OnDevice)
        monkeypatch.setattr(_places.Pinned, "make", lambda pool, size: Buffer())
        monkeypatch.setattr(_places._PinnedSlot, "_host", lambda slot: slot.buffer)

    def compute_value(self, tensor, value) -> None:
        block = tensor.block
        self.compute.queue.append(lambda: block.__setitem__(0, value))

    def check_value(self, tensor, value, found: list) -> None:
        block = tensor.block
        self.compute.queue.append(lambda: found.append(block[0] == value))

    def run(self, steps: int | None = None) -> None:
        while steps is None or steps > 0:
            ready = [s for s in self.streams if s.queue and not self._waits(s.queue[0])]
            if not ready:
                break
            item = random.choice(ready).queue.pop(0)
            if isinstance(item, Event):
                item.happened = True
            elif callable(item):
                item()
            steps = None if steps is None else steps - 1

    def _waits(self, item) -> bool:
        return isinstance(item, tuple) and not item[0].happened


@pytest.mark.parametrize("host", ["far ahead", "near"])
def test_values_are_right_and_memory_is_bounded_in_any_order(host, monkeypatch) -> None:
    for seed in range(100):
        random.seed(seed)
        with monkeypatch.context() as patch:
            machine = Machine(patch)
            pool = _places.Pinned("gpu")
            found: list[bool] = []
            for _ in range(3):
                _one_step(machine, pool, found, 0 if host == "far ahead" else 4)
            machine.run()
            assert not any(s.queue for s in machine.streams)
        assert len(found) == 3 * 16 and all(found)
        assert machine.blocks <= 6


def _one_step(machine: Machine, pool, found: list, pace: int) -> None:
    slots = []
    for i in range(16):
        made = machine.tensor()
        machine.compute_value(made, i)
        slots.append(pool.put(made))
        del made
        machine.run(random.randint(0, pace))
    while slots:
        if len(slots) > 1:
            slots[-2].fetch()
        back = slots[-1].get()
        machine.check_value(back, len(slots) - 1, found)
        del back, slots[-1]
        machine.run(random.randint(0, pace))


def test_memory_of_what_nobody_waited_for_stays_until_its_copies_are_done(monkeypatch) -> None:
    for fetched in (False, True):
        with monkeypatch.context() as patch:
            machine = Machine(patch)
            slot = _places.Pinned("gpu").put(machine.tensor())
            if fetched:
                slot.fetch()
            held = slot.back if fetched else slot.leaving
            del slot
            assert held.kept
