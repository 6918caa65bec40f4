"""The recipe of the guide for sentence-transformers, on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bigkernels

transformers = pytest.importorskip("transformers")
st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

TEXTS = [" ".join("abc"[(i * j) % 3] * (1 + (i + j) % 4) for j in range(1 + i % 9)) for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    letters = [chr(97 + i) for i in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    (path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=1,
    )
    tokenizer = transformers.BertTokenizer(vocab_file=str(path / "vocab.txt"))
    for name, model in (
        ("bi", transformers.BertModel(config)),
        ("cross", transformers.BertForSequenceClassification(config)),
    ):
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return path


def test_encode_and_predict(folder, library):
    model = st.SentenceTransformer(str(folder / "bi"), device="cpu")
    reranker = st.CrossEncoder(str(folder / "cross"), device="cpu")
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    embeddings, scores = model.encode(TEXTS, batch_size=4), reranker.predict(pairs)
    assert bigkernels.patch(model).patched and bigkernels.patch(reranker).patched
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=4), embeddings, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reranker.predict(pairs), scores, rtol=1e-4, atol=1e-5)
    bigkernels.unpatch(model)
    assert np.array_equal(model.encode(TEXTS, batch_size=4), embeddings)
