# SPDX-License-Identifier: Apache-2.0
"""What `pretrain.py` does to a share of the documents that it trains on. What a text holds decides, so that every tokenizer
gets the same."""

import random
import re
from collections.abc import Iterable, Iterator

from noise import KINDS, add_noise


ALTERATIONS = ("noise", "repeat", "sentences")  # the keywords of `altered`
PASSAGE = 300, 3000  # characters that are repeated
SENTENCE = 15, 200  # characters of a sentence that may stand alone
# Not after a number, a letter, or a capitalised word of two or three letters, which may be a title: Mr., St., Oct.
BOUNDARY = re.compile(r"(?<=[.!?])(?<!\d\.)(?<!\b\w\.)(?<!\b[A-Z][a-z]\.)(?<!\b[A-Z][a-z]{2}\.)\s+")


def sentences_of(text: str) -> list[str]:
    """The sentences of each line that begin with a capital letter, end with a full stop, question or exclamation mark and are
    15 to 200 characters long. For texts whose lines are paragraphs: a line of verse or of wrapped text may be a fragment."""
    found = (sentence for line in text.splitlines() for sentence in BOUNDARY.split(line.strip()))
    shortest, longest = SENTENCE
    return [s for s in found if shortest <= len(s) <= longest and s[0].isupper() and s[-1] in ".!?"]


def altered(
    texts: Iterable[str | bytes], noise: float = 0.0, repeat: float = 0.0, sentences: float = 0.0
) -> Iterator[str | bytes]:
    """The documents, shares of which are altered.

    Args:
        noise: share of the documents with errors in 1 to 10% of their letters; drawn after the cut into sentences.
        repeat: share of the documents that a document with one of their passages, written twice, precedes.
        sentences: share of the documents that are replaced by their sentences (`sentences_of`), each a document of its own,
            in random order; the rest of their text is left out. A document without such a sentence stays.

    Raises:
        ValueError: after the last document, if a share of them is less than ten documents.
    """
    count = 0
    for text in texts:
        count += 1
        data = text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else bytes(text)
        text = data.decode("utf-8", errors="surrogateescape")
        choose = random.Random(b"repeat " + data)
        if len(text) >= PASSAGE[0] and choose.random() < repeat:
            start, length = choose.randint(0, len(text) - PASSAGE[0]), choose.randint(*PASSAGE)
            yield (2 * text[start : start + length]).encode("utf-8", errors="surrogateescape")
        choose, pieces = random.Random(b"sentences " + data), [text]
        if choose.random() < sentences and (alone := sentences_of(text)):
            pieces = choose.sample(alone, len(alone))
        for piece in pieces:
            data = piece.encode("utf-8", errors="surrogateescape")
            choose = random.Random(b"noise " + data)
            if choose.random() < noise:
                kind, rate = choose.choice(sorted(KINDS)), choose.uniform(0.01, 0.1)
                data = add_noise(piece, kind, rate, seed=choose.random()).encode("utf-8", errors="surrogateescape")
            yield data
    for name, share in zip(ALTERATIONS, (noise, repeat, sentences)):
        if 0 < share < 1 and share * count < 10:
            raise ValueError(
                f"--{name} {share:g} of {count:,} documents is less than ten of them: a plain text file is one document, "
                "a file of JSON lines has one a line"
            )
