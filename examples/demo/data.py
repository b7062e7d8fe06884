"""Four human-rated sentiment data sets, with labels, splits and batches.

C. J. Hutto and E. Gilbert. VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text. ICWSM 2014. Each line of a set is an id, the mean of about twenty ratings in [-4, 4] and
a text. The text contains HTML entities; lines end in CRLF.

The model is tuned on movie reviews; product reviews, newspaper editorials and tweets are the
out-of-distribution domains.
"""

from __future__ import annotations

import html
import math
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from examples.demo.errors import DemoError

IN_DISTRIBUTION = "movie"
OUT_OF_DISTRIBUTION = ("amazon", "nyt", "tweets")
_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}

NEUTRAL = 0.5  # ratings at most this far from zero have no clear sign and are dropped
HELD_OUT = 2000  # movie snippets set aside for validation, and as many for the test

MAX_TOKENS = 32
# Texts are padded to one of these lengths; each length is compiled separately.
BUCKETS = (16, 24, MAX_TOKENS)
BATCH = 16
EVALUATION_BATCH = 32

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, mask, labels


@dataclass(frozen=True)
class Texts:
    """Tokenised texts, labelled 1 (positive) or 0 (negative)."""

    tokens: Sequence[Sequence[int]]
    labels: np.ndarray

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.tokens)

    def take(self, indices: np.ndarray) -> Texts:
        """The texts at `indices`, in that order."""
        return Texts([self.tokens[i] for i in indices], self.labels[indices])

    def first(self, count: int) -> Texts:
        """At most the first `count` texts."""
        return Texts(self.tokens[:count], self.labels[:count])


def join(sets: Iterable[Texts]) -> Texts:
    """Concatenates several sets."""
    sets = list(sets)
    tokens = [ids for texts in sets for ids in texts.tokens]
    return Texts(tokens, np.concatenate([texts.labels for texts in sets]))


@dataclass(frozen=True)
class Splits:
    """Movie snippets for training, validation and test, and the other domains."""

    pool: Texts
    validation: Texts
    test: Texts
    shifted: dict[str, Texts]

    def training(self, count: int, seed: int) -> Texts:
        """Draws `count` snippets from the pool, half of them positive."""
        rng = np.random.default_rng(seed)
        positive = np.flatnonzero(self.pool.labels == 1)
        negative = np.flatnonzero(self.pool.labels == 0)
        chosen = [
            rng.choice(positive, count // 2, replace=False),
            rng.choice(negative, count - count // 2, replace=False),
        ]
        return self.pool.take(rng.permutation(np.concatenate(chosen)))


def parse(content: bytes, name: str) -> dict[str, int]:
    """Texts and their labels, in file order.

    The label is the sign of the rating. Ratings within `NEUTRAL` of zero are dropped; of equal
    texts the first is kept.
    """
    labels: dict[str, int] = {}
    # Not splitlines(), which would also split at Unicode separators inside a text.
    for number, line in enumerate(re.split("\r?\n", content.decode("utf-8")), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        try:
            _, written, text = fields
            rating = float(written)
        except ValueError:
            rating = math.nan
        if not -4 <= rating <= 4:  # also catches NaN
            raise DemoError(f"{name}, line {number}: expected id, rating in [-4, 4] and text")
        # Unescape first: "&nbsp;" becomes white space, which the split then removes.
        text = " ".join(html.unescape(text).split())
        if text and abs(rating) > NEUTRAL:
            labels.setdefault(text, int(rating > 0))
    return labels


def read_domains(archive: Path) -> dict[str, dict[str, int]]:
    """Reads the four sets out of the authors' archive."""
    domains = {}
    try:
        with tarfile.open(archive) as tar:
            for domain, name in _FILES.items():
                file = tar.extractfile(f"hutto_ICWSM_2014/{name}")
                if file is None:
                    raise KeyError(name)
                domains[domain] = parse(file.read(), name)
    except KeyError as error:
        raise DemoError(f"{archive.name} lacks a data set: {error.args[0]}") from error
    except (OSError, UnicodeDecodeError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DemoError(f"cannot read {archive.name}: {error}") from error
    return domains


def load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for anything it cannot read
        raise DemoError(f"cannot read the tokenizer in {path}: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def make_splits(domains: dict[str, dict[str, int]], tokenizer: Tokenizer) -> Splits:
    """Tokenises, shuffles and splits every domain, independently of the run's seeds."""
    shuffled = {}
    for domain, labels in domains.items():
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(labels))]
        texts = Texts(tokens, np.fromiter(labels.values(), np.int32))
        shuffled[domain] = texts.take(np.random.default_rng(0).permutation(len(texts)))
    movie = shuffled.pop(IN_DISTRIBUTION)
    validation, test, pool = np.split(np.arange(len(movie)), [HELD_OUT, 2 * HELD_OUT])
    return Splits(movie.take(pool), movie.take(validation), movie.take(test), shuffled)


def bucket(length: int) -> int:
    """The length to pad to."""
    return next(size for size in BUCKETS if length <= size)


def pad(texts: Texts, length: int | None = None) -> Batch:
    """One batch as arrays, padded for its longest text; the mask is True on real tokens."""
    length = length or bucket(max(len(ids) for ids in texts.tokens))
    tokens = np.zeros((len(texts), length), np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, ids in enumerate(texts.tokens):
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return tokens, mask, texts.labels


def training_batches(texts: Texts, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches; every epoch is reshuffled.

    A batch has texts of similar length, to save padding: eight batches of random texts are sorted
    by length before they are split. Texts that do not fill a batch are left out of the epoch.
    """
    rng = np.random.default_rng(seed)
    lengths = np.array([len(ids) for ids in texts.tokens])
    made = 0
    while made < steps:
        order = rng.permutation(len(texts))[: len(texts) // BATCH * BATCH]
        batches = []
        for chunk in np.split(order, range(8 * BATCH, len(order), 8 * BATCH)):
            batches += np.split(chunk[np.argsort(lengths[chunk])], len(chunk) // BATCH)
        for index in rng.permutation(len(batches))[: steps - made]:
            yield pad(texts.take(batches[index]))
            made += 1


def validation_batches(texts: Texts, count: int, seed: int) -> Batch:
    """`count` random batches for learning radii, stacked on a leading axis.

    They cover the texts epoch by epoch, and are padded to one length, so that one compiled program
    serves all.
    """
    rng = np.random.default_rng(seed)
    epochs = math.ceil(count * BATCH / len(texts))
    order = np.concatenate([rng.permutation(len(texts)) for _ in range(epochs)])
    tokens, mask, labels = pad(texts.take(order[: count * BATCH]), MAX_TOKENS)
    shape = (count, BATCH, MAX_TOKENS)
    return tokens.reshape(shape), mask.reshape(shape), labels.reshape(count, BATCH)


def evaluation_indices(texts: Texts) -> Iterator[np.ndarray]:
    """The indices of the texts in each evaluation batch, all from one bucket."""
    buckets = np.array([bucket(len(ids)) for ids in texts.tokens])
    for size in BUCKETS:
        members = np.flatnonzero(buckets == size)
        for first in range(0, len(members), EVALUATION_BATCH):
            yield members[first : first + EVALUATION_BATCH]


def evaluation_batches(texts: Texts) -> Iterator[tuple[np.ndarray, Batch]]:
    """All texts once, as (indices, batch).

    The last batch of a bucket repeats its last text, to have the compiled shape. It then has fewer
    indices than rows.
    """
    for indices in evaluation_indices(texts):
        fill = np.full(EVALUATION_BATCH - len(indices), indices[-1])
        yield indices, pad(texts.take(np.concatenate([indices, fill])))
