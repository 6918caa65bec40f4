"""A GGUF file by OpenVINO GenAI, which makes a 4-bit model of its own of it; OpenVINO runs that.

GenAI's pipeline gives no logits, so the model that it saves is run here as the pipeline runs it: only the last token's
logits are computed, and keys and values are states of the model.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy
import openvino
import openvino_genai
from openvino import opset13 as operators


class Model:
    """Compiled anew for each number of threads."""

    def load(self, model: str, into: str) -> dict:
        folder = Path(into) / "openvino"
        folder.mkdir(exist_ok=True)
        file = folder / "model.gguf"
        shutil.copyfile(model, file)
        openvino_genai.LLMPipeline(str(file), "CPU", enable_save_ov_model=True)  # writes it beside the file
        file.unlink()
        self.graph = openvino.Core().read_model(folder / "openvino_model.xml")
        self.requests: dict = {}
        _last_token(self.graph)
        request = self._with(1)
        request.infer(self._inputs(numpy.array([[1]]), 0))
        size = request.get_compiled_model().get_property("KV_CACHE_PRECISION").get_size()  # states are shown as float32
        states = [state.state for state in request.query_state()]
        cache = size * sum(t.size // t.shape[-2] for t in states if len(t.shape) == 4)  # of one token
        return {"bytes": (folder / "openvino_model.bin").stat().st_size, "cache": cache}

    def _with(self, threads: int) -> openvino.InferRequest:
        if threads not in self.requests:
            options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            self.requests[threads] = openvino.Core().compile_model(self.graph, "CPU", options).create_infer_request()
        return self.requests[threads]

    def _inputs(self, ids: numpy.ndarray, past: int) -> dict:
        batch, length = ids.shape
        positions = numpy.arange(past, past + length, dtype=numpy.int64)[None].repeat(batch, 0)
        every = {
            "input_ids": ids.astype(numpy.int64),
            "position_ids": positions,
            "attention_mask": numpy.ones((batch, past + length), numpy.int64),
            "beam_idx": numpy.arange(batch, dtype=numpy.int32),
        }
        known = {name for node in self.graph.inputs for name in node.get_names()}
        return {name: value for name, value in every.items() if name in known}

    def prefill(self, ids: list[list[int]], threads: int) -> dict:
        request, rows = self._with(threads), numpy.array(ids)
        request.reset_state()
        begin = time.perf_counter()
        request.infer(self._inputs(rows, 0))
        seconds = time.perf_counter() - begin
        self.ids, self.threads = rows, threads
        self.states = [(state, openvino.Tensor(state.state.data.copy())) for state in request.query_state()]
        return {"seconds": seconds}

    def decode(self, steps: int, threads: int) -> dict:
        if threads != self.threads:
            self.prefill(self.ids.tolist(), threads)
        request, (_, length) = self._with(threads), self.ids.shape
        seconds, cpu = [], time.process_time()
        for step in range(steps):
            token = self.ids[:, step % length, None]
            begin = time.perf_counter()
            request.infer(self._inputs(token, length + step))
            seconds.append(time.perf_counter() - begin)
        cpu = time.process_time() - cpu
        for state, before in self.states:
            state.state = before
        return {"seconds": seconds, "cpu": cpu}

    def score(self, ids: list[int], known: int, threads: int) -> dict:
        self.prefill([ids[:known]], threads)
        request, losses = self._with(threads), []
        for place, token in enumerate(ids[known:], known):
            logits = request.get_tensor("logits").data.astype(numpy.float64).reshape(-1)
            most = logits.max()
            losses.append(most + numpy.log(numpy.exp(logits - most).sum()) - logits[token])
            request.infer(self._inputs(numpy.array([[token]]), place))
        return {"losses": losses}


def _last_token(graph: openvino.Model) -> None:
    """The product that gives the logits takes the last token of each sequence alone."""
    product = graph.outputs[0].get_node().input_value(0).get_node()
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    where, axis = operators.constant(numpy.array([-1], numpy.int64)), operators.constant(numpy.int64(1))
    last = operators.gather(product.input_value(0), where, axis)
    product.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()


if __name__ == "__main__":
    from serve import serve

    model = Model()
    serve({name: getattr(model, name) for name in ("load", "prefill", "decode", "score")})
