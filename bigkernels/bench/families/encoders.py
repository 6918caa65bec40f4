"""Encoders: real texts through all-MiniLM-L6-v2, images and speech through models with random weights.

Texts are paragraphs of Shakespeare; tokens a second are of real tokens, whatever padding a candidate computes. Each
candidate's embeddings are compared with those of the modules in float32 by their cosines before it is timed.
"""

# mypy: ignore-errors

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import _assets
from ..._compare import Comparison
from ..._info import cores
from ..case import COMPILE, EAGER, OURS, Candidate, Case, Contest, Missing, Settings

EAGER32, OURS32, INT8, Q8_0 = f"{EAGER} float32", f"{OURS} float32", f"{OURS} int8", f"{OURS} q8_0"
ONNX8, OPENVINO32, OPENVINO, OPENVINO8 = "onnxruntime int8", "openvino float32", "openvino", "openvino int8 ONNX"
_TORCH = (EAGER32, EAGER, COMPILE, OURS32, OURS, INT8, Q8_0)
_PEERS = (ONNX8, OPENVINO32, OPENVINO, OPENVINO8)
_LEAST = {
    EAGER32: 0.9999,
    OURS32: 0.99999,
    OPENVINO32: 0.9999,
    EAGER: 0.999,
    COMPILE: 0.999,
    OURS: 0.9995,
    OPENVINO: 0.999,
    INT8: 0.998,
    Q8_0: 0.999,
    ONNX8: 0.99,
    OPENVINO8: 0.9,
}
_REAL = 3389  # tokens of the batch that are no padding
_SHORT, _BATCH, _LONGEST = 16, 32, 256  # tokens of one sentence; texts of a batch, and tokens of the longest
_CALIBRATION = 64  # texts of another play


def cases(settings: Settings) -> list[Case]:
    cases = []
    for threads in sorted({1, cores()}):
        quick = settings.quick
        mixed = sum(map(_quick_length, range(_BATCH))) if quick else _REAL
        for name, model, tokens, names in (
            (f"MiniLM, 1 x {_SHORT} tokens", partial(_texts, 1), _SHORT, (*_TORCH, *_PEERS)),
            (f"MiniLM, {_BATCH} x mixed lengths", partial(_texts, _BATCH), mixed, (*_TORCH, *_PEERS)),
            ("ViT-S, 8 images", _images, 2 * 5 if quick else 8 * 197, _TORCH),
            ("Whisper-tiny encoder, 30 s", _speech, 50 if quick else 1500, _TORCH),
        ):
            names = [n for n in names if n != COMPILE or (settings.compile and not settings.quick)]
            if settings.candidates:
                names = [n for n in names if n in settings.candidates]
            if names:
                cases.append(_case(settings, name, model, tokens, names, threads))
    return cases


def _quick_length(i: int) -> int:
    return 3 + i % 13


class _Work:
    """A model, its inputs, and what becomes of hidden states; other inputs like these, to calibrate formats by."""

    def __init__(
        self, model: nn.Module, given: dict[str, Tensor], tokens: int, others: tuple[dict[str, Tensor], ...] = ()
    ) -> None:
        self.model, self.given, self.tokens, self.others = model.eval(), given, tokens, others

    def embed(self, hidden: Tensor) -> Tensor:
        """The mean of each text's tokens, of length 1."""
        mask = self.given.get("attention_mask")
        weight = torch.ones_like(hidden[..., :1], dtype=torch.float32) if mask is None else mask[..., None].float()
        return nn.functional.normalize((hidden.float() * weight).sum(1) / weight.sum(1), dim=-1)

    def cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.given.items()}


@lru_cache(maxsize=2)
def _texts(count: int, quick: bool) -> _Work:
    if importlib.util.find_spec("transformers") is None:
        raise Missing("transformers is not installed")
    import transformers

    if quick:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=500
        )
        numbers = [_SHORT] if count == 1 else list(map(_quick_length, range(count)))
        lengths = torch.tensor(numbers, dtype=torch.int64, device="cpu")[:, None]
        ids = torch.randint(5, 400, (count, int(lengths.max())), dtype=torch.int64, device="cpu")
        mask = (torch.arange(ids.shape[1], dtype=torch.int64, device="cpu") < lengths).long()
        given = dict(input_ids=ids, attention_mask=mask)
        return _Work(transformers.BertModel(config), given, int(mask.sum()), (given | {"input_ids": ids.flip(1)},))
    try:
        folder, plays = _assets.encoder_folder(), _assets.plays()
    except _assets.Unavailable as reason:
        raise Missing(str(reason)) from None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokens(play: str, count: int, longest: int) -> dict[str, Tensor]:
        texts = [" ".join(p.split()) for p in plays[play].split("\n\n")]
        texts = [p for p in texts if 200 < len(p) < 800][:count]
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"))

    given = tokens(_assets.HELD_OUT, count, _SHORT if count == 1 else _LONGEST)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    others = tokens(next(play for play in sorted(plays) if play != _assets.HELD_OUT), _CALIBRATION, _LONGEST)
    return _Work(model, given, int(given["attention_mask"].sum()), (others,))


def _images(quick: bool) -> _Work:
    if importlib.util.find_spec("transformers") is None:
        raise Missing("transformers is not installed")
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=12)
    if quick:
        sizes = dict(hidden_size=64, num_attention_heads=4, intermediate_size=96, num_hidden_layers=2, image_size=32)
    config = transformers.ViTConfig(**sizes)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    size = config.image_size
    pixels = torch.randn(2 if quick else 8, 3, size, size, dtype=torch.float32, device="cpu")
    return _Work(model, dict(pixel_values=pixels), len(pixels) * ((size // config.patch_size) ** 2 + 1))


def _speech(quick: bool) -> _Work:
    if importlib.util.find_spec("transformers") is None:
        raise Missing("transformers is not installed")
    import transformers

    torch.manual_seed(0)
    layers, positions = (1, 50) if quick else (4, 1500)
    config = transformers.WhisperConfig(
        d_model=384,
        encoder_layers=layers,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_layers=1,
        decoder_attention_heads=6,
        decoder_ffn_dim=64,
        max_source_positions=positions,
    )
    model = transformers.WhisperModel(config).encoder
    features = torch.randn(1, config.num_mel_bins, 2 * positions, dtype=torch.float32, device="cpu")
    return _Work(model, dict(input_features=features), positions)


# ---- candidates ------------------------------------------------------------------------------------------------------


def _by_torch(work: _Work, name: str) -> Callable[[], Tensor]:
    from ... import patch, quantize
    from ...quantization import Int8Dynamic

    dtype = torch.float32 if name in (EAGER32, OURS32) else torch.bfloat16
    model: Any = copy.deepcopy(work.model)
    given = work.cast(dtype)
    if name == INT8:
        with torch.no_grad():
            quantize(model, Int8Dynamic("gptq" if work.others else "rtn"), calibration=work.others)
    elif name == Q8_0:
        quantize(model, "q8_0")
    model = model.to(dtype)
    if name.startswith(OURS):
        patch(model)
    if name == COMPILE:
        model = torch.compile(model)

    def run() -> Tensor:
        with torch.no_grad():
            return work.embed(model(**given)[0])

    return run


def _by_onnxruntime(work: _Work, threads: int) -> Callable[[], Tensor]:
    if importlib.util.find_spec("onnxruntime") is None:
        raise Missing("onnxruntime is not installed")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(_onnx()), options)
    names = [i.name for i in session.get_inputs()]
    given = {n: work.given[n].numpy() for n in names}
    return lambda: work.embed(torch.from_numpy(session.run(None, given)[0]))


def _by_openvino(work: _Work, name: str, threads: int) -> Callable[[], Tensor]:
    if importlib.util.find_spec("openvino") is None:
        raise Missing("openvino is not installed")
    import openvino

    core = openvino.Core()
    model = (
        core.read_model(_onnx())
        if name == OPENVINO8
        else openvino.convert_model(copy.deepcopy(work.model), example_input=dict(work.given))
    )
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if name == OPENVINO32 else "bf16",
        },
    )
    given = {i.get_any_name(): work.given[i.get_any_name()].numpy() for i in compiled.inputs}
    return lambda: work.embed(torch.from_numpy(compiled(given)[0]))


def _onnx() -> Any:
    try:
        return _assets.encoder_onnx()
    except _assets.Unavailable as reason:
        raise Missing(str(reason)) from None


def _candidate(work: _Work, name: str, threads: int, exact: Tensor, quick: bool) -> Candidate:
    if quick and name in (ONNX8, OPENVINO8):
        raise Missing("only of the real model")
    if name == ONNX8:
        run = _by_onnxruntime(work, threads)
    elif name in _PEERS:
        run = _by_openvino(work, name, threads)
    else:
        run = _by_torch(work, name)
    taken: list[float] = []
    cosines: list[float] = []

    def step() -> None:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)

    def results() -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        cosine = (run() * exact).sum(-1).double()
        cosines.append(cosine.min().item())
        return {name: cosine}

    def figures() -> dict[str, float]:
        cut = statistics.quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else [taken[0]] * 99
        return {"cosine": cosines[0], "p50": cut[49], "p99": cut[98]}

    return Candidate(name, results, step, figures=figures)


def _compare(results: dict[str, Tensor], *_: object, **__: object) -> dict[str, Comparison]:
    return {name: Comparison(1 - cosines.min().item(), 1 - _LEAST[name]) for name, cosines in results.items()}


def _case(
    settings: Settings, name: str, make: Callable[[bool], _Work], tokens: int, names: list[str], threads: int
) -> Case:
    def prepare() -> Contest:
        work = make(settings.quick)
        with torch.no_grad():
            exact = work.embed(work.model(**work.given)[0])
        candidates, missing = [], {}
        for each in names:
            try:
                candidates.append(_candidate(work, each, threads, exact, settings.quick))
            except Missing as reason:
                missing[each] = str(reason)
            except Exception as error:  # noqa: BLE001 - told in the row of this candidate
                missing[each] = f"{type(error).__name__}: {error}"[:200]
        if work.tokens != tokens:
            raise Missing(f"the texts have {work.tokens} tokens, not {tokens}")
        ones = {"cosines": torch.ones(len(exact), dtype=torch.float64, device="cpu")}
        return Contest(candidates, lambda: ones, lambda: ones, missing, compare=_compare)

    plural = "s" if threads > 1 else ""
    return Case(
        "encoders",
        f"{name}, {threads} thread{plural}",
        "cpu",
        "bfloat16",
        False,
        tuple(names),
        prepare,
        metric="tokens/s",
        tokens=tokens,
        cold=False,
        only_read=True,
        threads=threads,
    )
