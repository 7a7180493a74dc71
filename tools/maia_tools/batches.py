"""Sentences of mixed lengths to batches with little padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maia_rt.kernels.blocking import shares
from maia_tools.tokens import Sentence

MOST_TOKENS = 2048
"""Of a batch, padding included: enough to keep every unit busy, and bounded memory."""
BATCH_TOKENS = 96
"""What one more batch costs, in tokens' worth of time: copies, launches, and smaller products."""


@dataclass(frozen=True)
class Batch:
    """Sentences padded to one length.

    Attributes
    ----------
    places : tuple of int
        Where each sentence stood in the order given.
    ids : ndarray of int32
        (sequences, length); 0 after a sentence's end.
    mask : ndarray of float32
        (sequences, length); 1 where there is a token, 0 after it.
    """

    places: tuple[int, ...]
    ids: np.ndarray
    mask: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences, length."""
        sequences, length = self.ids.shape
        return sequences, length


def batches(sentences: Sequence[Sentence]) -> list[Batch]:
    """Cut sentences, sorted by length, into the batches that together cost least.

    Parameters
    ----------
    sentences : sequence of Sentence

    Returns
    -------
    list of Batch
        Each sentence is in one of them; none for no sentences.
    """
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].ids))
    made = []
    for start, end in _cuts([len(sentences[i].ids) for i in order]):
        length = len(sentences[order[end - 1]].ids)
        for first, last in shares(end - start, -(-(end - start) // max(1, MOST_TOKENS // length))):
            made.append(_padded(sentences, order[start + first : start + last]))
    return made


def _cuts(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Spans of sorted lengths, each to be padded to its last, of the least cost in all."""
    ends = [i + 1 for i in range(len(lengths)) if i + 1 == len(lengths) or lengths[i] != lengths[i + 1]]
    starts = [0, *ends]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for i, end in enumerate(ends):
        choices = []
        for j in range(i + 1):
            padded = (end - starts[j]) * lengths[end - 1]
            choices.append((best[j][0] + padded + BATCH_TOKENS * -(-padded // MOST_TOKENS), j))
        best.append(min(choices))
    spans: list[tuple[int, int]] = []
    at = len(ends)
    while at:
        before = best[at][1]
        spans.append((starts[before], starts[at]))
        at = before
    return spans[::-1]


def _padded(sentences: Sequence[Sentence], places: Sequence[int]) -> Batch:
    length = max(len(sentences[i].ids) for i in places)
    ids = np.zeros((len(places), length), np.int32)
    mask = np.zeros((len(places), length), np.float32)
    for row, place in enumerate(places):
        count = len(sentences[place].ids)
        ids[row, :count] = sentences[place].ids
        mask[row, :count] = 1
    return Batch(tuple(places), ids, mask)
