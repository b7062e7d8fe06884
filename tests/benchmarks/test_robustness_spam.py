"""The spam setting: what the model sees of a mail, which duplicates go, and disjoint parts."""

import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.robustness import spam
from examples.demo.errors import DemoError

PAGE = """\
From someone@example.com Thu Aug 22 15:25:29 2002
From: someone@example.com
Subject: Re: [ILUG] =?iso-8859-1?q?Caf=E9?= prices
Content-Type: multipart/mixed; boundary="=="

--==
Content-Type: text/html; charset="unknown-8bit"

<html><head><title>No</title><style>p {color: red}</style></head>
<body><p>V<!-- 17 -->ia<b>gra</b> from me@x.org</p><p>at http://x.org/?a=1 &amp; more</p></body>
--==
Content-Type: text/plain
Content-Disposition: attachment

not read
--==--
"""
PLAIN = """\
Subject: news
Content-Type: multipart/alternative; boundary="=="

--==
Content-Type: text/html

<p>the page
--==
Content-Type: text/plain

URL: http://x.org/
Date: 2002-09-30T23:25:23+01:00

the text

--\u0020
a signature
--==--
"""


@pytest.mark.parametrize(
    ("mail", "seen"),
    [
        (PAGE, "Café prices Viagra from address at link & more"),
        (PLAIN, "news the text"),
        ("Subject: one\n\ntwo\n" + "_" * 40 + "\nThe mailing list\nx", "one two"),
        ("Subject: =?x?q?y?= z\n\n-----\nstays", "=?x?q?y?= z ----- stays"),
    ],
)
def test_a_text_is_the_subject_and_the_visible_body(mail, seen):
    assert spam.clean(mail.encode()) == seen


def test_short_and_foreign_texts_are_left_out():
    assert spam.readable("these are just five words")
    assert not spam.readable("only 4 words of 17 here")
    assert not spam.readable("five words are not enough " + "\u97d3" * 10)


ONE = "the quick brown fox jumps over the lazy dog again"
NEAR = "THE QUICK brown fox jumps over the lazy dog, 17 times"  # 7 triples of 9 in common
OTHER = "the quick brown fox sleeps under the lazy dog today"


def test_of_similar_texts_the_first_stays():
    groups = {"a": [ONE, OTHER, ONE], "b": [NEAR, "something else in here", OTHER]}
    assert spam.distinct(groups) == {"a": [ONE, OTHER], "b": ["something else in here"]}
    # Only the words that the model may see count.
    start = " ".join(letter * 3 for letter in "abcdefghijklmnopqrstuvwxyzabcdef")
    assert spam.distinct({"a": [start + " one end", start + " another"]}) == {
        "a": [start + " one end"]
    }

    # B is like A and C, but C is not like A: what is removed removes nothing.
    a, b, c = ("p q r s t u v w", "r s t u v w x y", "t u v w x y z o")
    assert spam.distinct({"a": [a, b, c]}) == {"a": [a, c]}


def test_parts_are_balanced_and_disjoint():
    sizes = dict(zip(spam.GROUPS, (400, 320, 300, 600, 190), strict=True))
    starts = dict(zip(spam.GROUPS, range(0, 5000, 1000), strict=True))
    groups = {name: [str(starts[name] + i) for i in range(n)] for name, n in sizes.items()}
    tokenizer = SimpleNamespace(
        encode_batch=lambda texts: [SimpleNamespace(ids=[int(text)]) for text in texts]
    )
    splits = spam.make_splits(groups, tokenizer)
    parts = [splits.pool, splits.validation, splits.test, *splits.shifted.values()]
    assert [len(part) for part in parts] == [340, 100, 200, 500, 380]
    numbers = np.concatenate([np.ravel(part.tokens) for part in parts])
    assert len(set(numbers)) == len(numbers)
    for part in parts:
        assert part.labels.mean() == 0.5
        assert (
            np.isin(np.ravel(part.tokens) // 1000, (1, 3)).tolist() == (part.labels == 1).tolist()
        )


def test_the_groups_are_read_in_order_and_a_broken_archive_is_named(tmp_path):
    archive = tmp_path / "archive"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("spam-1/2.txt", "spam-1/1.txt", "spam-1/1.json", "elsewhere/3.txt"):
            entry = tarfile.TarInfo(f"package/data/{name}")
            content = f"Subject: {name}\n\nbody".encode()
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    found = spam.read(archive)
    assert list(found) == list(spam.GROUPS)
    assert found["spam-1"] == ["spam-1/1.txt body", "spam-1/2.txt body"]
    archive.write_bytes(b"no archive")
    with pytest.raises(DemoError, match=r"cannot read .*archive"):
        spam.read(archive)
