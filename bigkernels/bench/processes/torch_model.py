"""A causal language model of transformers in PyTorch: as it comes, or patched and quantized by the bigkernels at hand.

The bench has several of these in its own process; run as a script it is the model of another checkout of bigkernels.
"""

# mypy: ignore-errors

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LONG = 1024  # tokens: a longer prompt is not read again by `generate`, which then starts from the cache


class Model:
    """One model, and the cache that its last `prefill` filled."""

    def load(
        self,
        model: str | Callable[[], nn.Module],
        *,
        dtype: str = "bfloat16",
        quantize: Any = None,
        head: bool = True,
        patch: dict | None = None,
        cache: Callable[[nn.Module], Any] | None = None,
        text: list[int] | None = None,
    ) -> dict:
        """Read a folder (or call what makes the model, in float32 or quantized already).

        Args:
            dtype: of the weights that are not quantized, and of the activations.
            quantize: a format's name; "int4/64" is int4 in groups of 64.
            head: the embedding and the head are quantized as well.
            patch: options of `bigkernels.patch`; None leaves the model as it comes.
            cache: makes the 8-bit cache that it is called with; None leaves the cache to the model.
            text: tokens; gives `expected`, the losses of all but the first by the modules in float32.
        """
        self.model = (_read(model) if isinstance(model, str) else model()).eval()
        if quantize:
            self._quantize(quantize, head)
        expected = _losses(self.model, text) if text else []
        self.model.to(getattr(torch, dtype))
        if patch is not None:
            import bigkernels

            bigkernels.patch(self.model, **patch)
        self.make_cache, self.layers = cache, {}
        takes = inspect.signature(type(self.model).forward).parameters
        self.cache_word = "cache" if "cache" in takes else "past_key_values"  # newer and older transformers
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head = size + 4 if cache else size * self.model.dtype.itemsize  # 8-bit codes and a scale, or numbers
        token = 2 * config.num_hidden_layers * heads * head
        return {"bytes": bytes_of_a_step(self.model), "cache": token, "held": held(self.model), "expected": expected}

    def _quantize(self, name: str, head: bool) -> None:
        import bigkernels
        from bigkernels.quantization import Int4

        kind, _, group = name.partition("/")
        options = {"skip": (), "embeddings": True} if head else {}
        bigkernels.quantize(self.model, Int4(int(group)) if group else kind, **options)

    def _new_cache(self) -> dict:
        return {} if self.make_cache is None else {self.cache_word: self.make_cache(self.model)}

    @torch.inference_mode()
    def prefill(self, ids: list[list[int]] | Tensor, threads: int) -> dict:
        torch.set_num_threads(threads)
        self.ids = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        begin = time.perf_counter()
        out = self.model(input_ids=self.ids, logits_to_keep=1, use_cache=True, **self._new_cache())
        seconds = time.perf_counter() - begin
        self.cache, self.next = out[self.cache_word], out.logits[:, -1].argmax(-1, keepdim=True)
        self.logits = out.logits[:, -1]
        return {"seconds": seconds}

    @torch.inference_mode()
    def decode(self, steps: int, threads: int) -> dict:
        """Calls of the model alone, without what `generate` does around them."""
        torch.set_num_threads(threads)
        token, known, seconds, cpu = self.next, {self.cache_word: self.cache}, [], time.process_time()
        for _ in range(steps):
            begin = time.perf_counter()
            out = self.model(input_ids=token, logits_to_keep=1, use_cache=True, **known)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - begin)
        cpu = time.process_time() - cpu
        self._forget()
        return {"seconds": seconds, "cpu": cpu}

    @torch.inference_mode()
    def generate(self, steps: int, threads: int, **options: Any) -> dict:
        """The model's own `generate`, unmodified, behind what `prefill` read."""
        from transformers import StoppingCriteriaList

        torch.set_num_threads(threads)
        times: list[float] = []
        spent: list[float] = []
        lengths: list[int] = []

        def note(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
            times.append(time.perf_counter())
            lengths.append(ids.shape[1])
            spent.append(time.process_time())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        if long := self.ids.numel() > LONG:
            options |= {self.cache_word: self.cache}
            ids = torch.cat((self.ids, self.next), 1)
        else:
            options |= self._new_cache()
            ids = self.ids
        # Nothing ends a text early. min_new_tokens does the same, for a millisecond a token of its own Python.
        self.model.generation_config.eos_token_id = None
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=steps + 1,
            stopping_criteria=StoppingCriteriaList([note]),
            **options,
        )
        if long:
            self._forget()
        seconds = [after - before for before, after in zip(times, times[1:], strict=False)]
        return {
            "seconds": seconds,
            "cpu": spent[-1] - spent[0],
            "tokens": out[0, ids.shape[1] :].tolist(),
            "whole": (times[-1] - times[0]) / (lengths[-1] - lengths[0]),  # a token, where several may come at a time
        }

    def _forget(self) -> None:
        """What came after the prompt."""
        self.cache.crop(self.ids.shape[1] - self.cache.get_seq_length())

    @torch.inference_mode()
    def score(self, ids: list[int], known: int, threads: int) -> dict:
        """The loss of each token behind the first `known` ones, which are read one by one."""
        self.prefill([ids[:known]], threads)
        losses, cache = [], {self.cache_word: self.cache}
        for token in ids[known:]:
            losses.append(_loss(self.logits, token))
            read = torch.tensor([[token]], dtype=torch.int64, device="cpu")
            out = self.model(input_ids=read, logits_to_keep=1, use_cache=True, **cache)
            self.logits = out.logits[:, -1]
        return {"losses": losses}

    @torch.inference_mode()
    def operator(self, kind: str, tokens: int, size: int, threads: int) -> dict:
        """One linear layer of so many features in and out: a quantized one, or dense in bfloat16 where kind is ""."""
        torch.set_num_threads(threads)
        key = kind, tokens, size
        if key not in self.layers:
            self.layers[key] = _layer(*key)
        step = self.layers[key]
        step()
        begin = time.perf_counter()
        for _ in range(10):
            step()
        return {"seconds": (time.perf_counter() - begin) / 10}

    @torch.inference_mode()
    def losses(self, ids: list[int], threads: int) -> dict:
        """The loss of each token but the first, which are all read in one call."""
        torch.set_num_threads(threads)
        return {"losses": _losses(self.model, ids)}


def _layer(kind: str, tokens: int, size: int) -> Callable[[], Tensor]:
    from bigkernels import functional
    from bigkernels.nn.linear import linear_by_packed
    from bigkernels.quantization import Int4, quantize_weight

    weight = torch.randn(size, size, dtype=torch.float32, device="cpu") * 0.02
    x = torch.randn(tokens, size, dtype=torch.bfloat16, device="cpu")
    if not kind:
        dense = weight.bfloat16()
        return lambda: linear_by_packed(x, dense, None)
    codes = quantize_weight(weight.bfloat16(), Int4(64) if kind == "int4" else kind)
    return lambda: functional.quantized_linear(x, codes)


def held(model: nn.Module) -> int:
    """The bytes of its parameters and buffers, each counted once."""
    return sum(_storages(model).values())


def bytes_of_a_step(model: nn.Module) -> int:
    """Those that one token reads: all but an embedding table of its own, of which it reads a row."""
    storages = _storages(model)
    head = _storages(model.get_output_embeddings())
    for address in _storages(model.get_input_embeddings()):
        if address not in head:
            storages.pop(address, None)
    return sum(storages.values())


def _storages(module: nn.Module) -> dict[int, int]:
    return {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}


def _read(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


@torch.inference_mode()
def _losses(model: nn.Module, ids: list[int]) -> list[float]:
    read = torch.tensor([ids], dtype=torch.int64, device="cpu")
    logits = model(input_ids=read, use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, read[0, 1:], reduction="none").tolist()


def _loss(logits: Tensor, token: int) -> float:
    return -logits[0].float().log_softmax(-1)[token].item()


if __name__ == "__main__":
    from serve import serve

    asked = Model()
    serve(
        {
            name: getattr(asked, name)
            for name in ("load", "prefill", "decode", "generate", "score", "losses", "operator")
        }
    )
