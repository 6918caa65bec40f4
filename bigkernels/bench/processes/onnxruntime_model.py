"""A model by ONNX Runtime GenAI, whose own tool quantizes it to 4 bits in blocks of 32, the head too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import onnxruntime_genai as genai


class Model:
    """A folder of its own for each number of threads, as that is part of a model's configuration."""

    def load(self, model: str, into: str) -> dict:
        self.folder = Path(into) / "onnx"
        self.models: dict = {}
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", str(self.folder), "-p",
                   "int4", "-e", "cpu", "-c", into, "--extra_options", "int4_accuracy_level=4"]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"its builder: {done.stderr.strip().splitlines()[-1]}")
        config = json.loads((self.folder / "genai_config.json").read_text())["model"]["decoder"]
        size = sum(path.stat().st_size for path in self.folder.glob("model.onnx*"))
        cache = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_size"]
        return {"bytes": size, "cache": cache}

    def _with(self, threads: int) -> genai.Model:
        if threads not in self.models:
            folder = self.folder.with_name(f"onnx-{threads}")
            shutil.copytree(self.folder, folder)
            path = folder / "genai_config.json"
            config = json.loads(path.read_text())
            config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
            path.write_text(json.dumps(config))
            self.models[threads] = genai.Model(str(folder))
        return self.models[threads]

    def prefill(self, ids: list[list[int]], threads: int) -> dict:
        model = self._with(threads)
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(ids[0]) + 256, batch_size=len(ids), do_sample=False)
        self.generator, self.ids, self.threads = genai.Generator(model, options), ids, threads
        begin = time.perf_counter()
        self.generator.append_tokens(numpy.array(ids, numpy.int32))
        self.generator.get_logits()
        return {"seconds": time.perf_counter() - begin}

    def decode(self, steps: int, threads: int) -> dict:
        if threads != self.threads:
            self.prefill(self.ids, threads)
        seconds, cpu = [], time.process_time()
        for step in range(steps):
            token = [row[step % len(row)] for row in self.ids]
            begin = time.perf_counter()
            self.generator.append_tokens(numpy.array(token, numpy.int32).reshape(-1, 1))
            self.generator.get_logits()
            seconds.append(time.perf_counter() - begin)
        cpu = time.process_time() - cpu
        self.generator.rewind_to(len(self.ids[0]))
        return {"seconds": seconds, "cpu": cpu}

    def score(self, ids: list[int], known: int, threads: int) -> dict:
        self.prefill([ids[:known]], threads)
        losses = []
        for token in ids[known:]:
            logits = numpy.asarray(self.generator.get_logits(), numpy.float64).reshape(-1)
            most = logits.max()
            losses.append(most + numpy.log(numpy.exp(logits - most).sum()) - logits[token])
            self.generator.append_tokens(numpy.array([[token]], numpy.int32))
        return {"losses": losses}


if __name__ == "__main__":
    from serve import serve

    model = Model()
    serve({name: getattr(model, name) for name in ("load", "prefill", "decode", "score")})
