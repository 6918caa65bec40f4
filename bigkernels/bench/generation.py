"""The models that the generation family measures: as they come, ours in every format, and those of other packages."""

# mypy: ignore-errors

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._info import cores
from ..program._state import KEY, Steps
from ..quantization import Int4
from .case import EAGER, OURS, Missing, Settings
from .families.model import QUICK_SIZES, random_model
from .process import Busy, Process
from .processes.torch_model import Model

MODULES = f"{OURS} modules"  # patched with decode=False
INT4, INT8, NF4, FP8, GGUF = (f"{OURS} {name}" for name in ("int4", "int8", "nf4", "fp8", "gguf"))
OURS32, EAGER32, INT8_CACHE = f"{OURS} float32", f"{EAGER} float32", f"{OURS} int8 cache"
Q4_1, Q4_0, Q4_0_HEAD = "llama.cpp Q4_1", "llama.cpp Q4_0", "llama.cpp Q4_0, 4-bit head"
ONNX, OPENVINO = "onnxruntime-genai int4", "openvino-genai Q4_1"
LOOKUP, ALONE = ", prompt lookup", ", one thread alone"  # what candidates do, and what is not done to them
BIG = f"{OURS} int4, 1 B"
BEFORE = {OURS: "before", OURS32: "before, float32", INT4: "before, int4", INT8: "before, int8"}
_FORMATS = {INT4: "int4/64", INT8: "int8", NF4: "nf4", FP8: "fp8"}  # embedding and head too
_BILLION = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_WINDOWS, _LENGTH = 4, 512  # of text, for perplexity
SCORED, KNOWN = 64, 40  # tokens of the first window that are compared, those behind the known ones step by step


@dataclass(frozen=True)
class Given:
    """A model's folder, as transformers saves it; a GGUF file of it, or why there is none; and text in its tokens."""

    folder: Path
    file: Path | str
    text: list[int]


@dataclass
class Contestant:
    """A model that is loaded, in this process or another.

    Attributes:
        ask: what `processes/serve.py` tells, by name.
        bytes: that a token reads of the weights.
        cache: bytes that it reads more for each token of context.
        held: bytes of its weights; 0 where another process holds them.
        expected: the losses of a few tokens of text by the same weights in float32, from the second on.
        error: of `score`, once it was compared: the distances from the expected losses.
        other: the process it is in.
        steps: of a patched model, what counts the calls that its program answers.
    """

    ask: Callable[..., dict]
    bytes: int
    cache: int
    held: int = 0
    expected: list[float] = field(default_factory=list)
    error: list[float] | None = None
    other: Process | None = None
    steps: Steps | None = None
    _left: int = 0

    def remark(self) -> str:
        """Whether calls since the last time were answered by the modules of a model that could have a program."""
        if self.steps is None or self.steps.left == self._left:
            return ""
        self._left = self.steps.left
        return f"by its modules: {self.steps.why}"


class LineUp:
    """Every model by its name, loaded when it is asked for."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.folder = tempfile.TemporaryDirectory(prefix="bigkernels-bench-")
        self.given = _tiny(Path(self.folder.name)) if settings.quick else _given(settings.model)
        count, length = (2, SCORED) if settings.quick else (_WINDOWS, _LENGTH)
        self.windows = [self.given.text[i * length : (i + 1) * length] for i in range(count)]
        self.found: dict[str, Contestant | Exception] = {}
        self.processes: list[Process | Busy] = []
        atexit.register(self.close)

    def get(self, name: str) -> Contestant:
        """A model.

        Raises:
            Missing: it cannot be measured here.
        """
        if name not in self.found:
            try:
                self.found[name] = self._load(name)
            except Exception as error:  # noqa: BLE001 - told for every case that it is missing from
                self.found[name] = error
        if isinstance(self.found[name], Exception):
            raise self.found[name]
        return self.found[name]

    def _load(self, name: str) -> Contestant:
        if name in (Q4_1, Q4_0, Q4_0_HEAD):
            return self._llama(name.removeprefix("llama.cpp ").replace(", 4-bit", ""))
        if name == ONNX:
            return self._process("onnxruntime_model", model=str(self.given.folder), into=self.folder.name)
        if name == OPENVINO:
            return self._process("openvino_model", model=self._file(), into=self.folder.name)
        if name in BEFORE.values():
            if not self.settings.baseline:
                raise Missing("no --baseline was given")
            options = dict(_options({then: now for now, then in BEFORE.items()}[name]), patch={})
            return self._process("torch_model", self.settings.baseline, model=str(self.given.folder), **options)
        return self._ours(name)

    def _ours(self, name: str) -> Contestant:
        model = Model()
        info = model.load(self._source(name), text=self.windows[0][:SCORED], **_options(name))
        return Contestant(lambda do, **what: getattr(model, do)(**what), **info, steps=model.model.__dict__.get(KEY))

    def _source(self, name: str) -> str | Callable[[], nn.Module]:
        if name == GGUF:
            return partial(_load_gguf, self._file())
        return partial(_billion, self.settings.quick) if name == BIG else str(self.given.folder)

    def losses_of_modules(self, name: str) -> list[list[float]]:
        """Those of each window's tokens by the weights of one of ours in float32, for formats; else []."""
        if name not in (*_FORMATS, GGUF):
            return []
        model = Model()
        model.load(self._source(name), **_options(name) | {"dtype": "float32", "patch": None})
        return [model.losses(window, cores())["losses"] for window in self.windows]

    def _file(self) -> str:
        if isinstance(self.given.file, str):
            raise Missing(self.given.file)
        return str(self.given.file)

    def _llama(self, kind: str) -> Contestant:
        options = {} if kind == "Q4_1" else {"quantize": kind, "into": f"{self.folder.name}/{kind}.gguf"}
        return self._process("llama_cpp_model", model=self._file(), **options)

    def _process(self, script: str, path: str | None = None, **options: Any) -> Contestant:
        process = Process(script, path)
        self.processes.append(process)
        info = process.ask("load", **options)
        known = {name: info[name] for name in ("bytes", "cache")}
        return Contestant(process.ask, **known, other=process)

    def busy(self) -> Busy:
        """A process that takes a core; it waits."""
        self.processes.append(Busy())
        return self.processes[-1]

    def close(self) -> None:
        """End the processes and forget the models."""
        atexit.unregister(self.close)
        while self.processes:
            self.processes.pop().close()
        self.found.clear()
        self.folder.cleanup()


@lru_cache(maxsize=1)
def line_up(settings: Settings) -> LineUp:
    """The same for all cases of a run."""
    return LineUp(settings)


def _options(name: str) -> dict:
    """How a model of ours, or one that comes as it is, is loaded."""
    found: dict[str, Any] = {"dtype": "float32" if name in (OURS32, EAGER32) else "bfloat16"}
    if name not in (EAGER, EAGER32):
        found["patch"] = {"decode": False} if name == MODULES else {}
    if name in _FORMATS:
        found["quantize"] = _FORMATS[name]
    if name == INT8_CACHE:
        found["cache"] = _int8_cache
    return found


def _int8_cache(model: nn.Module) -> Any:
    from .. import Cache

    return Cache(model, bits=8)


def _load_gguf(path: str) -> nn.Module:
    from .. import load_gguf

    return load_gguf(path)


def _billion(quick: bool) -> nn.Module:
    """A Llama at the size of 3.2-1B of int4 codes at random, without ever holding its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from .. import quantize

    sizes = QUICK_SIZES if quick else _BILLION
    config = LlamaConfig(**sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    quantize(model, Int4(64), skip=(), embeddings=True)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    draw = torch.Generator().manual_seed(0)
    constants = {"scale": 1.0, "zero": 8.0, "row_scale": 0.004}  # codes are 4.6 steps from their middle
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.random_(0, 256, generator=draw)
        else:
            tensor.fill_(constants.get(name.rsplit(".", 1)[-1], 1.0))
    return model


def _given(folder: str) -> Given:
    from .. import _assets as assets

    try:
        if folder:
            files = sorted(Path(folder).glob("*.gguf"))
            file = files[0] if files else f"there is no GGUF file in {folder}"
            return Given(Path(folder), file, list(_tokens(Path(folder))))
        assets.require_extras()
        return Given(assets.model_folder(), assets.model_file(), list(_tokens(assets.model_folder())))
    except assets.Unavailable as error:
        raise Missing(str(error)) from error


def _tokens(folder: Path) -> Iterator[int]:
    """Of plays that were not in anybody's calibration, in the model's tokens."""
    from transformers import AutoTokenizer

    from .. import _assets as assets

    texts = assets.plays()
    text = "\n\n".join([texts[assets.HELD_OUT], *(texts[name] for name in sorted(texts)[-2:])])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    yield from tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _tiny(folder: Path) -> Given:
    """Weights at random, for showing that everything runs."""
    model = random_model({**QUICK_SIZES, "initializer_range": 0.2}, torch.float32, "cpu")
    model.save_pretrained(folder / "tiny")
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, QUICK_SIZES["vocab_size"], (4096,), generator=draw, dtype=torch.int64, device="cpu")
    return Given(folder / "tiny", "random weights have no GGUF file", text.tolist())
