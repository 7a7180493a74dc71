"""A whole model: the demo's sentence encoder, beside plain numpy on the same processors."""

from __future__ import annotations

import time

import click

from maia_rt.errors import Unsupported
from maia_tools.bench.measurement import Bar, Measurement
from maia_tools.bench.subject import Subject

COUNT = 64
PAUSE_SECONDS = 0.1
"""BLAS's threads and the device's look for work for a while, which would slow the other side."""


def model(subject: Subject) -> list[Measurement]:
    """64 sentences embedded; nothing where the weights or the tokenizer are not installed."""
    try:
        from maia_tools import weights
        from maia_tools.batches import batches
        from maia_tools.minilm import MiniLM
        from maia_tools.minilm_numpy import PlainEncoder
        from maia_tools.sentences import SENTENCES
        from maia_tools.tokens import Tokenizer

        folder = weights.locate()
    except (ImportError, Unsupported) as error:
        click.echo(f"the model is left out: {error}", err=True)
        return []
    parameters = weights.load(folder)
    texts = (SENTENCES * 2)[:COUNT]
    work = batches(Tokenizer(folder).tokenize(texts))
    encoder = subject.stack.enter_context(MiniLM(subject.device, parameters))
    plain = PlainEncoder(parameters)

    def prepare() -> None:
        # Both want every core.
        subject.cores.mix()
        time.sleep(PAUSE_SECONDS)

    def in_numpy() -> None:
        plain.encode(work)

    def on_the_device() -> None:
        encoder.encode(work)

    reference = f"numpy: {COUNT} sentences embedded"
    return [
        Measurement(reference, 1, in_numpy, prepare, subject.cores.part),
        Measurement(f"{COUNT} sentences embedded", 1, on_the_device, prepare, subject.cores.part,
                    reference=reference, bar=Bar(1.3)),
    ]
