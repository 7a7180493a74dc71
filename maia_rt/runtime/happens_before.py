"""What is certain to be done before what: vector clocks of streams, and the semaphores between them."""

from __future__ import annotations

from typing import Final

from maia_rt.contract.commands import PostOp, WaitOp
from maia_rt.errors import DeadlockError

POSTS: Final = 256
"""Signals of one semaphore that are remembered one by one."""


class Clock:
    """What is certain to be done: the first so many commands of each stream, and all before the open waits' signals."""

    __slots__ = ("counts", "waits")

    def __init__(self, counts: dict[int, int], waits: frozenset[Wait]) -> None:
        self.counts = counts
        self.waits = waits


class Wait:
    """A wait for a semaphore; `clock` is what it brings, None while nobody has signalled it."""

    __slots__ = ("clock", "op", "value", "what", "where")

    def __init__(self, op: int, value: int, what: str, where: str) -> None:
        self.op = op
        self.value = value
        self.what = what
        self.where = where
        self.clock: Clock | None = None


class Post:
    """A signal of a semaphore."""

    __slots__ = ("clock", "op", "value", "what", "where")

    def __init__(self, op: int, value: int, clock: Clock, what: str, where: str) -> None:
        self.op = op
        self.value = value
        self.clock = clock
        self.what = what
        self.where = where


class SemaphoreHistory:
    """The posts to one semaphore and the waits for it that are open."""

    def __init__(self, name: str, value: int = 0) -> None:
        self.name = name
        self.by_host = False
        self._base = value
        self._acquired = 0
        self._posts: list[Post] = []
        self._open: list[tuple[Wait, int]] = []

    def post(self, post: Post, known: dict[int, int]) -> None:
        """Add a post and close the waits that it lets go on."""
        posts = [*self._posts, post]
        self._open = [(wait, needed) for wait, needed in self._open if wait.clock is None]
        for wait, needed in self._open:
            self._try(wait, needed, posts, post)
        self._posts = posts
        while self._posts and (len(self._posts) > POSTS or knows(known, self._posts[0].clock)):
            oldest = self._posts.pop(0)
            self._base = (oldest.value if oldest.op == PostOp.SET else self._base + oldest.value) & 0xFFFFFFFF

    def block(self, wait: Wait) -> None:
        """Add a wait."""
        needed = wait.value
        if wait.op == WaitOp.ACQUIRE:
            needed += self._acquired
        if not self._reaches(wait.op, needed, []):
            self._try(wait, needed, self._posts, None)
        else:
            wait.clock = Clock({}, frozenset())
        if wait.op == WaitOp.ACQUIRE:
            self._acquired += wait.value
        if wait.clock is None:
            self._open.append((wait, needed))

    def _try(self, wait: Wait, needed: int, posts: list[Post], newest: Post | None) -> None:
        """Close a wait if posts that do not wait behind it suffice; raise if only those that do would."""
        free = [post for post in posts if wait not in settle(post.clock).waits]
        if self._reaches(wait.op, needed, free):
            wait.clock = self._sure(wait.op, needed, free)
        elif newest is not None and not self.by_host and self._reaches(wait.op, needed, posts):
            raise DeadlockError(
                f"{wait.what}, submitted at {wait.where}; {newest.what}, submitted at {newest.where}, only when that "
                "wait is over",
                cause="every signal that the wait needs waits behind it",
                hint="signal first, or from a stream that does not wait; a semaphore that the program itself signals "
                     "is set by it once before",
                where=(wait.where, newest.where))

    def brings(self, op: int, value: int) -> Clock | None:
        """What is certain to be done once the semaphore has been seen to hold a value."""
        if self._reaches(op, value, []) or not self._reaches(op, value, self._posts):
            return None
        return self._sure(op, value, self._posts)

    def _sure(self, op: int, needed: int, posts: list[Post]) -> Clock:
        # Without each of these the value would not be reached, so they are certainly done.
        sure = [post for post in posts if not self._reaches(op, needed, [p for p in posts if p is not post])]
        return join(*(post.clock for post in sure)) if sure else Clock({}, frozenset())

    def _reaches(self, op: int, needed: int, posts: list[Post]) -> bool:
        """Whether these posts may make a wait's condition true. Serial: distances from what the semaphore had."""
        wanted = _distance(needed, self._base)
        sets = [_distance(post.value, self._base) for post in posts if post.op == PostOp.SET]
        added = sum(post.value for post in posts if post.op == PostOp.ADD)
        reach = max((0, *sets)) + added
        if op == WaitOp.EQ:
            return min((0, *sets)) <= wanted <= reach if added else wanted in (0, *sets)
        return wanted <= reach


def settle(clock: Clock) -> Clock:
    """The clock with what its waits have brought since."""
    while any(wait.clock is not None for wait in clock.waits):
        closed = [wait.clock for wait in clock.waits if wait.clock is not None]
        clock = join(Clock(clock.counts, frozenset(wait for wait in clock.waits if wait.clock is None)), *closed)
    return clock


def join(*clocks: Clock) -> Clock:
    """The clock of somebody who waits for all of these."""
    first, *others = clocks
    counts, waits = first.counts, first.waits
    for other in others:
        if other.counts is not counts and any(counts.get(n, 0) < count for n, count in other.counts.items()):
            counts = counts | {n: max(count, counts.get(n, 0)) for n, count in other.counts.items()}
        waits |= other.waits
    return settle(Clock(counts, waits)) if any(wait.clock is not None for wait in waits) else Clock(counts, waits)


def knows(known: dict[int, int], clock: Clock) -> bool:
    """Whether everything on a clock is among what is known to be done."""
    return not settle(clock).waits and all(known.get(n, 0) >= count for n, count in clock.counts.items())


def _distance(value: int, base: int) -> int:
    return (value - base + (1 << 31)) % (1 << 32) - (1 << 31)
