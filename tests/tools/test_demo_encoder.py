"""The sentence encoder: every multiply-add on the device, none in the client; batches; tokens; the numpy versions."""

import math
import threading

import numpy as np
import pytest
from maia_tools import minilm_numpy, minilm_reference, weights
from maia_tools.batches import MOST_TOKENS, batches
from maia_tools.encoding_run import compare
from maia_tools.minilm import LOADED_SHAPES, MiniLM
from maia_tools.minilm_numpy import PlainEncoder
from maia_tools.minilm_plan import plan
from maia_tools.similarity import nearest, similarities
from maia_tools.tokens import Sentence, Tokenizer

import maia_rt
from tests.helpers.emulator import environment
from tests.helpers.launching import MANY, SMALL

TEXTS = ["", "a", "Hello, world!", "The quick brown fox jumps over the lazy dog. " * 3, "ab " * 500, "\ud800 alone",
         "\U0001f642", "Ünïcödé ﷽ \u0301\u0301", "nul \0 and \x1b[31m escape"]


@pytest.fixture(scope="module")
def parameters():
    return weights.load(weights.locate())


@pytest.fixture(scope="module")
def sentences():
    return Tokenizer(weights.locate()).tokenize(TEXTS)


@pytest.fixture(scope="module")
def encoder(parameters):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        device = maia_rt.open("emulated")
    with device, MiniLM(device, parameters) as made:
        # Pinned pools grow at the first use, a queue's first sleeper makes an eventfd: before anybody counts them.
        with device.create_semaphore() as semaphore:
            for value, lane in enumerate(made._lanes, 1):
                lane.stream.wait(semaphore, value)
                timer = threading.Timer(0.2, semaphore.set, (value,))
                timer.start()
                lane.stream.synchronize()
                timer.join()
        made.encode(batches([Sentence("", np.full(256, 5, np.int32), False)] * 20))
        device.upload(np.zeros(8 << 20, np.uint8)).close()
        for _ in similarities(device, np.zeros((700, 384), np.float32)):
            pass
        yield made


@pytest.fixture
def no_arithmetic(monkeypatch):
    """numpy's products, reductions and elementwise functions raise while the device encodes."""
    def refuse(*_, **__):
        raise AssertionError("tensor arithmetic in the client")

    for name in ("matmul", "dot", "einsum", "tensordot", "inner", "vdot", "exp", "tanh", "sqrt", "mean", "add",
                 "multiply", "divide"):
        monkeypatch.setattr(np, name, refuse)
    monkeypatch.setattr(np.linalg, "norm", refuse)


def test_device_agrees_with_the_reference_for_any_text(encoder, parameters, sentences):
    got = encoder.encode(batches(sentences))
    difference, cosine = compare(got, minilm_reference.encode(parameters, sentences))
    assert difference < 2e-5
    assert cosine > 0.99999


def test_every_multiply_add_of_the_model_is_counted_by_the_device_and_none_is_left_to_the_client(
        encoder, parameters, sentences, no_arithmetic):
    work = batches(sentences)
    before = encoder.device.counters()["macs"]
    encoder.encode(work)
    counted = encoder.device.counters()["macs"] - before
    shape = parameters.shape
    want = 0
    for batch in work:
        sequences, length = batch.shape
        for columns, depth in ((3 * 384, 384), (384, 384), (1536, 384), (384, 1536)):
            want += 6 * sequences * length * columns * depth
        want += 6 * 2 * sequences * 12 * length * length * 32
    assert counted == want == sum(shape.macs(*b.shape) for b in work)


def test_plan_counts_the_same_multiply_adds_on_every_profile(parameters):
    for capabilities in (SMALL, MANY):
        assert plan(parameters.shape, capabilities, 3, 20).macs == parameters.shape.macs(3, 20)


def test_sentences_come_back_in_the_order_given(encoder, sentences):
    order = [7, 3, 1, 8, 0, 4, 2, 6, 5]
    straight = encoder.encode(batches(sentences))
    shuffled = encoder.encode(batches([sentences[i] for i in order]))
    assert np.array_equal(shuffled, straight[order])


def test_no_sentences_give_no_rows(encoder):
    assert encoder.encode(batches([])).shape == (0, 384)


def test_more_shapes_than_stay_loaded_are_loaded_again(encoder, sentences):
    alone = [batches([s]) for s in sentences] + [batches([sentences[0]] * n) for n in range(2, LOADED_SHAPES + 2)]
    first = [encoder.encode(b)[0] for b in alone]
    assert len({b[0].shape for b in alone}) > LOADED_SHAPES
    assert np.array_equal(encoder.encode(alone[0])[0], first[0])


def test_plain_numpy_agrees_with_the_reference(parameters, sentences):
    got = PlainEncoder(parameters).encode(batches(sentences))
    difference, cosine = compare(got, minilm_reference.encode(parameters, sentences))
    assert difference < 2e-6
    assert cosine > 0.999999


def test_fast_gelu_is_right_to_the_precision_of_fp32():
    x = np.linspace(-12, 12, 200_001, dtype=np.float32)
    wide = x.astype(np.float64)
    want = wide / 2 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in wide]))
    got = x.copy()
    minilm_numpy._gelu(got)
    # The fit is within 7e-8; FP32 adds a few units of the result.
    assert (np.abs(got - want) <= 1e-7 + 4 * np.finfo(np.float32).eps * np.abs(wide)).all()


def test_similarities_are_cosines_from_the_device(encoder):
    rows = np.random.default_rng(0).standard_normal((700, 384)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = np.zeros((700, 700))
    for start, part in similarities(encoder.device, rows):
        table[start : start + len(part)] = part
    assert np.abs(table - rows.astype(np.float64) @ rows.T.astype(np.float64)).max() < 1e-6
    (only,) = nearest(table[5:6], 5, 3)
    assert [i for i, _ in only] == [i for i in np.argsort(-table[5]) if i != 5][:3]


@pytest.mark.parametrize("seed", range(4))
def test_batches_hold_every_sentence_once_with_little_padding(seed):
    random = np.random.default_rng(seed)
    made = [Sentence("", np.full(int(n), 9, np.int32), False) for n in random.integers(2, 257, 150)]
    cut = batches(made)
    assert sorted(p for b in cut for p in b.places) == list(range(150))
    for batch in cut:
        assert batch.ids.size <= MOST_TOKENS
        for row, place in enumerate(batch.places):
            assert batch.mask[row].sum() == len(made[place].ids)
            assert batch.ids[row].sum() == 9 * len(made[place].ids)
    padded = sum(b.ids.size for b in cut)
    assert padded < 1.1 * sum(len(s.ids) for s in made)


def test_tokens_end_at_256_and_say_so(sentences):
    by_text = {s.text: s for s in sentences}
    assert by_text["ab " * 500].truncated
    assert len(by_text["ab " * 500].ids) == 256
    assert by_text["ab " * 500].ids[-1] == by_text["a"].ids[-1], "the closing mark stays"
    assert len(by_text[""].ids) == 2
    assert [s.text for s in sentences] == TEXTS
