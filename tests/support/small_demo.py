"""The demo with a small model: real runs of it test the programs, not the results."""

from typing import Any

import pytest

from examples.demo import data, experiment, methods, minilm, pictures, report

WORDS = 2000


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Keeps one block and 2,000 words of the real encoder, and one length of the real texts."""
    load_encoder, take = minilm.load_encoder, data.Texts.take

    def few_words(path: Any) -> Any:
        params = load_encoder(path)
        return params | {"word": {"embedding": params["word"]["embedding"][:WORDS]}}

    def of_few_words(texts: data.Texts, indices: Any) -> data.Texts:
        tokens, labels = take(texts, indices).tokens, texts.labels[indices]
        return data.Texts([[word % WORDS for word in ids] for ids in tokens], labels)

    for module in (methods, minilm, pictures, report):
        patch.setattr(module, "BLOCKS", 1)
    for module in (experiment, minilm):
        patch.setattr(module, "load_encoder", few_words)
    patch.setattr(minilm, "VOCABULARY", WORDS)
    patch.setattr(data.Texts, "take", of_few_words)
    patch.setattr(data, "BUCKETS", (data.MAX_TOKENS,))
    patch.setattr(experiment, "VALIDATION", 50)
