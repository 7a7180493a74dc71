"""The validator against a plain model: every command kept, and what is ordered found by looking through all of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maia_rt.contract.commands import PostOp, WaitOp
from maia_rt.errors import RaceError
from maia_rt.runtime.validation import Validator

STREAMS = st.integers(0, 3)
NAMES = st.integers(0, 3)
STEPS = st.one_of(
    st.tuples(st.just("touch"), STREAMS, st.booleans(), st.integers(0, 8), st.integers(1, 4)),
    st.tuples(st.just("record"), STREAMS, NAMES),
    st.tuples(st.just("wait"), STREAMS, NAMES),
    st.tuples(st.just("signal"), STREAMS, NAMES),
    st.tuples(st.just("block"), STREAMS, NAMES),
    st.tuples(st.just("synchronize"), STREAMS),
    st.tuples(st.just("reach"), NAMES),
)


class Key:
    """Something that is a stream or an event to the validator."""

    name = "it"


class Model:
    """Each command: its stream, what it touches, and the set of all commands that are done before it."""

    def __init__(self):
        self.touched = []
        self.before = [set() for _ in range(4)]
        self.host = set()
        self.events = {}
        self.signals = {}

    def now(self, stream):
        return self.before[stream] | self.host

    def races(self, stream, writes, start, size):
        return any(other != stream and (writes or wrote) and at < start + size and start < at + length
                   and number not in self.now(stream)
                   for number, (other, wrote, at, length) in enumerate(self.touched))

    def touch(self, stream, writes, start, size):
        self.touched.append((stream, writes, start, size))
        self.before[stream].add(len(self.touched) - 1)


@given(st.lists(STEPS, min_size=10, max_size=60))
@settings(max_examples=500, deadline=None)
def test_exactly_the_races_of_the_model_are_found(steps):
    validator, model = Validator(), Model()
    streams, events = [Key() for _ in range(4)], [Key() for _ in range(4)]
    for step, *args in steps:
        if step == "touch":
            stream, writes, start, size = args
            ranges = [(start, size, None)]
            call = {"writes": ranges} if writes else {"reads": ranges}
            if model.races(*args):
                with pytest.raises(RaceError):
                    validator.command(streams[stream], "touch", **call)
            else:
                validator.command(streams[stream], "touch", **call)
                model.touch(*args)
        elif step == "record":
            stream, event = args
            validator.record(streams[stream], events[event])
            model.events[event] = model.now(stream)
        elif step == "wait":
            stream, event = args
            validator.wait(streams[stream], events[event])
            model.before[stream] |= model.events.get(event, set())
        elif step == "signal":
            # Once each, so that it is certain who let a wait go on.
            stream, semaphore = args
            if semaphore not in model.signals:
                validator.signal(streams[stream], semaphore, "it", PostOp.SET, 1)
                model.signals[semaphore] = model.now(stream)
        elif step == "block":
            stream, semaphore = args
            if semaphore in model.signals:
                validator.block(streams[stream], semaphore, "it", WaitOp.GE, 1)
                model.before[stream] |= model.signals[semaphore]
        elif step == "synchronize":
            (stream,) = args
            validator.synchronized(streams[stream])
            model.host |= model.now(stream)
        else:
            (event,) = args
            validator.reached(events[event])
            model.host |= model.events.get(event, set())
