"""Memory that `from_pretrained` takes while it quantizes: "format peak held layer" in bytes, for some formats."""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path

import torch
import transformers

from bigkernels.integrations.transformers import Config


def resident() -> int:
    """Bytes of memory that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def read(folder: str, name: str):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=Config(name))


def main(small: str, large: str, *names: str) -> None:
    torch.set_num_threads(1)
    for name in names:
        measure(small, large, name)


def measure(small: str, large: str, name: str) -> None:
    read(small, name)  # what is imported and allocated once
    gc.collect()
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = read(large, name)
    done.set()
    watcher.join()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    layer = sum(p.numel() for p in transformers.LlamaForCausalLM(model.config).model.layers[0].parameters()) * 4
    print(name, peak - before, held, layer)


if __name__ == "__main__":
    main(*sys.argv[1:])
