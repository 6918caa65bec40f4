"""A GGUF file by llama.cpp, whose library is called as it is: nothing but its own decoding is between two tokens.

The library is that of an installed llama-cpp-python, or of the prebuilt CPU variants of the npm package
@node-llama-cpp/linux-x64, which is looked for in $BIGKERNELS_LLAMA_CPP and in `node_modules` here and above. The best
variant for the processor is llama.cpp's own choice.
"""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import time
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_float, c_int8, c_int32, c_void_p
from pathlib import Path

_NPM = "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
_QUANTIZE = {"Q4_0": (2, 2), "Q4_0 head": (2, 2), "Q8_0": (7, 8)}  # the kinds of file (LLAMA_FTYPE) and of tensor


class _Params(ctypes.Structure):
    """Parameters of any kind: larger than any version's. By value they lie on the stack, where nothing follows."""

    _fields_ = (("words", c_int32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


def folders() -> Iterator[Path]:
    """Where the library may be."""
    if given := os.environ.get("BIGKERNELS_LLAMA_CPP"):
        yield from (Path(given), Path(given) / _NPM)
    if spec := importlib.util.find_spec("llama_cpp"):
        yield Path(spec.submodule_search_locations[0]) / "lib"
    here = Path.cwd()
    yield from (folder / _NPM for folder in (here, *here.parents))


def library() -> Path | None:
    """The library, or None if there is none here."""
    return next(
        (found for folder in folders() for found in sorted(folder.glob("libllama*.so*")) if "common" not in found.name),
        None,
    )


class Model:
    """One file and one context, made for the first question and again for one that does not fit into it."""

    def __init__(self) -> None:
        path = library()
        if path is None:
            raise FileNotFoundError("neither llama-cpp-python nor @node-llama-cpp/linux-x64 is installed")
        self.llama = ctypes.CDLL(str(path))
        for name, result in {
            "llama_model_default_params": _Params,
            "llama_context_default_params": _Params,
            "llama_model_quantize_default_params": _Params,
            "llama_model_load_from_file": c_void_p,
            "llama_init_from_model": c_void_p,
            "llama_model_get_vocab": c_void_p,
            "llama_get_memory": c_void_p,
            "llama_batch_init": _Batch,
            "llama_get_logits_ith": POINTER(c_float),
        }.items():
            getattr(self.llama, name).restype = result
        self._quiet = ctypes.CFUNCTYPE(None, c_int32, c_void_p, c_void_p)(lambda level, text, data: None)
        self.llama.llama_log_set(self._quiet, None)
        if variants := sorted(path.parent.glob("libggml.*so*")):  # else the processor's part is linked in
            ctypes.CDLL(str(variants[0])).ggml_backend_load_all_from_path(str(path.parent).encode())
        self.llama.llama_backend_init()
        self.context = None

    def load(self, model: str, quantize: str = "", into: str = "") -> dict:
        """Read a file, or write it first to the file `into` with its weights quantized again."""
        if quantize:
            self._quantize(model, quantize, into)
            model = into
        options = self.llama.llama_model_default_params()
        self.model = c_void_p(self.llama.llama_model_load_from_file(model.encode(), options))
        if not self.model:
            raise ValueError(f"llama.cpp does not read {model}")
        self.vocabulary = self.llama.llama_vocab_n_tokens(c_void_p(self.llama.llama_model_get_vocab(self.model)))
        layers, heads = self.llama.llama_model_n_layer(self.model), self.llama.llama_model_n_head(self.model)
        size, groups = self.llama.llama_model_n_embd(self.model), self.llama.llama_model_n_head_kv(self.model)
        size_of = self.llama.llama_model_size
        size_of.restype = ctypes.c_uint64
        return {"bytes": size_of(self.model), "cache": 2 * 2 * layers * groups * size // heads}

    def _quantize(self, model: str, kind: str, into: str) -> None:
        options = self.llama.llama_model_quantize_default_params()
        ftype, tensor = _QUANTIZE[kind]
        options.words[1] = ftype
        if kind.endswith("head"):
            options.words[2] = options.words[3] = tensor  # the head's, and the embedding's
        ctypes.cast(ctypes.byref(options.words, 16), POINTER(c_bool))[0] = True  # from what is quantized already
        if self.llama.llama_model_quantize(model.encode(), into.encode(), ctypes.byref(options)):
            raise ValueError(f"llama.cpp cannot quantize {model}")

    def _room(self, sequences: int, length: int, threads: int) -> None:
        if self.context is None or self.room[0] != sequences or self.room[1] < length:
            if self.context is not None:
                self.llama.llama_free(self.context)
            options = self.llama.llama_context_default_params()
            if options.words[0] != 512 or options.words[1] != 2048:
                raise RuntimeError("this version's parameters are not those that this script knows")
            options.words[0] = sequences * ((length + 255) // 256 * 256)
            options.words[3] = sequences
            self.context = c_void_p(self.llama.llama_init_from_model(self.model, options))
            self.room = sequences, length
            self.batch = self.llama.llama_batch_init(2048, 0, 1)
        self.llama.llama_set_n_threads(self.context, threads, threads)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Tokens, each with its position, its sequence and whether its logits are wanted."""
        self.batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = sequence, wanted
        if self.llama.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")

    def prefill(self, ids: list[list[int]], threads: int) -> dict:
        self._room(len(ids), len(ids[0]) + 512, threads)
        self.llama.llama_memory_clear(c_void_p(self.llama.llama_get_memory(self.context)), c_bool(True))
        entries = [
            (token, at, row, at + 1 == len(tokens)) for row, tokens in enumerate(ids) for at, token in enumerate(tokens)
        ]
        begin = time.perf_counter()
        for first in range(0, len(entries), 2048):
            self._decode(entries[first : first + 2048])
        seconds = time.perf_counter() - begin
        self.ids = ids
        return {"seconds": seconds}

    def decode(self, steps: int, threads: int) -> dict:
        self.llama.llama_set_n_threads(self.context, threads, threads)
        start, rows = len(self.ids[0]), range(len(self.ids))
        seconds, cpu = [], time.process_time()
        for step in range(steps):
            entries = [(self.ids[row][step % start], start + step, row, True) for row in rows]
            begin = time.perf_counter()
            self._decode(entries)
            seconds.append(time.perf_counter() - begin)
        cpu = time.process_time() - cpu
        memory = c_void_p(self.llama.llama_get_memory(self.context))
        for row in rows:
            self.llama.llama_memory_seq_rm(memory, row, start, -1)
        return {"seconds": seconds, "cpu": cpu}

    def score(self, ids: list[int], known: int, threads: int) -> dict:
        self.prefill([ids[:known]], threads)
        losses = []
        for at, token in enumerate(ids[known:], known):
            logits = self.llama.llama_get_logits_ith(self.context, -1)[: self.vocabulary]
            most = max(logits)
            losses.append(most + math.log(math.fsum(math.exp(x - most) for x in logits)) - logits[token])
            self._decode([(token, at, 0, True)])
        return {"losses": losses}


if __name__ == "__main__":
    from serve import serve

    model = Model()
    serve({name: getattr(model, name) for name in ("load", "prefill", "decode", "score")})
