"""One run of the demo: sentences through the device, through plain numpy and through the reference, with figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np

from maia_tools import minilm_reference, weights
from maia_tools.batches import batches
from maia_tools.minilm import MiniLM
from maia_tools.minilm_numpy import PlainEncoder
from maia_tools.similarity import nearest, similarities
from maia_tools.tokens import Sentence, Tokenizer

MAX_DIFFERENCE = 2e-5
MIN_COSINE = 0.99999
"""What FP32 must reach beside the float64 reference."""
NEIGHBOURS = 3
TABLE_ROWS = 64
PAUSE_SECONDS = 0.1
"""Between timed runs: threads of BLAS and of the device look for work for a while, which would slow the other side."""

Advance = Callable[[int], object]
Stage = Callable[[str, int], Advance]
"""Starts a stage of so many steps, by name; returns what to call with the steps done."""


@dataclass(frozen=True)
class Figures:
    """What a run measured. Times in seconds, sizes in bytes; counters of the device are for one pass over all."""

    device: str
    emulated: bool
    sentences: int
    truncated: int
    tokens: int
    padded_tokens: int
    batches: list[tuple[int, int]]
    largest_difference: float
    smallest_cosine: float
    setup_s: float
    first_pass_s: float
    device_pass_s: float
    numpy_pass_s: float
    ratio: float
    repeats: int
    macs: int
    counters: dict[str, int]

    @property
    def passed(self) -> bool:
        """Whether the embeddings are as close to the reference as FP32 should be."""
        return self.largest_difference < MAX_DIFFERENCE and self.smallest_cosine > MIN_COSINE

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EncodingRun:
    """Sentences, their embeddings (float32, one row each), who is near whom, and the figures.

    ``table`` is the upper left corner of the table of cosines, `TABLE_ROWS` square at most.
    """

    sentences: list[Sentence]
    embeddings: np.ndarray
    neighbours: list[list[tuple[int, float]]]
    table: np.ndarray
    figures: Figures


def run(texts: Sequence[str], *, selector: str | None, repeats: int, stage: Stage) -> EncodingRun:
    """Embed texts on a device, check and time it.

    Parameters
    ----------
    texts : sequence of str
    selector : str or None
        Of the device, as for `maia_rt.open`.
    repeats : int
        Timed passes, of which the medians count; at least 1.
    stage : callable
        Told what is going on.

    Returns
    -------
    EncodingRun

    Raises
    ------
    maia_rt.errors.MaiaError
        No device, a fault, or no weights.
    """
    import maia_rt

    started = time.perf_counter()
    advance = stage("reading the model", 2)
    folder = weights.locate()
    parameters = weights.load(folder)
    advance(1)
    sentences = Tokenizer(folder).tokenize(texts)
    advance(1)
    work = batches(sentences)
    with ExitStack() as stack:
        advance = stage("starting the device, uploading weights", 1)
        device = stack.enter_context(maia_rt.open(selector))
        encoder = stack.enter_context(MiniLM(device, parameters))
        advance(1)
        setup_s = time.perf_counter() - started

        began = time.perf_counter()
        embeddings = encoder.encode(work, stage("embedding on the device", len(sentences)))
        first_pass_s = time.perf_counter() - began

        plain = PlainEncoder(parameters)
        plain.encode(work)
        advance = stage("timing device and numpy", 2 * repeats)
        device_s, numpy_s = [], []
        counters: dict[str, int] = {}
        for _ in range(repeats):
            time.sleep(PAUSE_SECONDS)
            before = device.counters()
            began = time.perf_counter()
            encoder.encode(work)
            device_s.append(time.perf_counter() - began)
            counters = {name: value - before[name] for name, value in device.counters().items()}
            advance(1)
            time.sleep(PAUSE_SECONDS)
            began = time.perf_counter()
            plain.encode(work)
            numpy_s.append(time.perf_counter() - began)
            advance(1)

        neighbours: list[list[tuple[int, float]]] = []
        table = np.zeros((0, 0), np.float32)
        if sentences:
            for start, rows in similarities(device, embeddings):
                neighbours += nearest(rows, start, NEIGHBOURS)
                if start == 0:
                    table = rows[:TABLE_ROWS, :TABLE_ROWS].copy()
        name, emulated = device.name, device.capabilities.emulated
    reference = minilm_reference.encode(parameters, sentences, stage("checking against float64", len(sentences)))
    difference, cosine = compare(embeddings, reference)
    device_pass_s, numpy_pass_s = statistics.median(device_s), statistics.median(numpy_s)
    figures = Figures(
        device=name, emulated=emulated, sentences=len(sentences), truncated=sum(s.truncated for s in sentences),
        tokens=sum(len(s.ids) for s in sentences), padded_tokens=sum(b.ids.size for b in work),
        batches=[b.shape for b in work], largest_difference=difference, smallest_cosine=cosine, setup_s=setup_s,
        first_pass_s=first_pass_s, device_pass_s=device_pass_s, numpy_pass_s=numpy_pass_s,
        ratio=device_pass_s / numpy_pass_s if sentences else 1.0, repeats=repeats,
        macs=sum(parameters.shape.macs(*b.shape) for b in work), counters=counters)
    return EncodingRun(sentences, embeddings, neighbours, table, figures)


def compare(embeddings: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The largest difference of any element, and the smallest cosine of any row; (0, 1) for no rows."""
    if not len(reference):
        return 0.0, 1.0
    wide = embeddings.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(reference, axis=1)
    cosines = np.einsum("ij,ij->i", wide, reference) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return float(np.abs(wide - reference).max()), float(cosines.min())
