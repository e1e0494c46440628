# SPDX-License-Identifier: Apache-2.0
"""Noise such as keyboards, scanners and people make, to measure robustness. Every function is deterministic."""

import random


# Latin letters and Cyrillic or Greek ones that look the same.
HOMOGLYPHS = dict(zip("aceiopsxyABEHIKMNOPTXYZ", "асеіорѕхуАВЕНІКМΝОРТΧΥΖ"))  # noqa: RUF001


def _drop(text: str, i: int) -> tuple[str, int]:
    return "", 1


def _swap(text: str, i: int) -> tuple[str, int]:
    return text[i : i + 2][::-1], 2


def _repeat(text: str, i: int) -> tuple[str, int]:
    return text[i] * 2, 1


def _upper(text: str, i: int) -> tuple[str, int]:
    return text[i].upper(), 1


def _homoglyph(text: str, i: int) -> tuple[str, int]:
    return HOMOGLYPHS.get(text[i], text[i]), 1


KINDS = {"drop": _drop, "swap": _swap, "repeat": _repeat, "upper": _upper, "homoglyph": _homoglyph}


def add_noise(text: str, kind: str, rate: float, seed: int | str = 0) -> str:
    """`text` with noise in each letter with probability `rate`: dropped, swapped with the next character, doubled,
    upper-cased or replaced by a look-alike. Letters without upper case or look-alike stay.

    Raises:
        ValueError: if there is no such kind, or if the rate is not between 0 and 1.
    """
    if kind not in KINDS:
        raise ValueError(f"noise of kind {kind!r} is not known: choose one of {sorted(KINDS)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must be between 0 and 1")
    generator, pieces, i = random.Random(seed), [], 0
    while i < len(text):
        piece, used = text[i], 1
        if text[i].isalpha() and generator.random() < rate:
            piece, used = KINDS[kind](text, i)
        pieces.append(piece)
        i += used
    return "".join(pieces)
