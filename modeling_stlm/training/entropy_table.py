# SPDX-License-Identifier: Apache-2.0
"""The table behind `patching="entropy"`: how hard the next byte is to guess after the bytes before it.

BLT (arXiv:2412.09871, section 2.3) asks a small byte model for the entropy of the next byte. Here a hashed n-gram model
answers: one look-up a byte, no second model to train, run and ship.
"""

import numpy as np
import torch

from modeling_stlm.modeling_stlm import ENTROPY_STEPS
from modeling_stlm.patching_stlm import HASH_PRIME, hash_weights


CHUNK_BYTES = 2**22


def entropy_table(corpus: np.ndarray, order: int = 4, rows: int = 65536) -> torch.Tensor:
    """Entropy of the next byte after each hashed n-gram, in steps of 1 / 32 bit.

    Counts are mixed with the frequencies of single bytes after Witten and Bell (1991): the fewer examples a row has and
    the more they differ, the nearer it is to these. A row without examples has their entropy.

    Args:
        corpus (`np.ndarray` of bytes): text, such as the file of [`write_corpus`] (`np.memmap(path, np.uint8)`).
        order (`int`): n, that is `config.entropy_order`.
        rows (`int`): rows of the table, that is `config.entropy_rows`.

    Returns:
        `torch.ByteTensor` of shape `(rows,)`, to be copied into `model.model.entropy_table`.

    Raises:
        ValueError: if the corpus is not longer than the n-grams.
    """
    if len(corpus) <= order:
        raise ValueError(f"the corpus has {len(corpus)} bytes, expected more than {order}")
    cells = np.zeros(rows * 256, dtype=np.int64)
    for start in range(0, len(corpus) - order, CHUNK_BYTES):
        chunk = corpus[start : start + CHUNK_BYTES + order].astype(np.int64)
        digest = sum((chunk[i : len(chunk) - order + i] + 1) * weight for i, weight in enumerate(hash_weights(order)))
        cells += np.bincount(digest % HASH_PRIME % rows * 256 + chunk[order:], minlength=rows * 256)
    counts = torch.from_numpy(cells.reshape(rows, 256)).float()
    frequencies = counts.sum(0) / counts.sum()
    total, kinds = counts.sum(1, keepdim=True), (counts > 0).sum(1, keepdim=True).clamp(min=1)
    probabilities = (counts + kinds * frequencies) / (total + kinds)
    bits = -torch.special.xlogy(probabilities, probabilities).sum(1) / np.log(2)
    return (bits * ENTROPY_STEPS).round().clamp(0, 255).byte()
