"""From threads to the loop: nothing lost, in order, and one wake-up for many deltas."""

import asyncio
import threading

import pytest

from dovetail_protocols import Delta
from dovetail_serve.bridge import Bridge, Disconnected, Inbox, Streams


def test_order_and_completeness_from_many_threads():
    """Deltas are lost or change their order between the engine's threads and the loop."""
    count, threads = 2000, 6

    async def collect():
        bridge, inboxes = Bridge(asyncio.get_running_loop()), [Inbox() for _ in range(threads)]

        def produce(index):
            deliver = bridge.to(inboxes[index], index)
            for token in range(count):
                deliver(Delta(token_ids=(token,)))

        workers = [threading.Thread(target=produce, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()

        async def drain(inbox):
            tokens = []
            while len(tokens) < count:
                tokens += [arrival.delta.token_ids[0] for arrival in await inbox.take()]
            return tokens

        found = await asyncio.gather(*map(drain, inboxes))
        for worker in workers:
            worker.join()
        return found

    assert asyncio.run(collect()) == [list(range(count))] * threads


def test_one_wake_up_for_many():
    """Every delta wakes the loop, which costs a system call each."""

    async def count():
        loop = asyncio.get_running_loop()
        bridge, inbox, calls = Bridge(loop), Inbox(), []
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: calls.append(wake(*args))
        deliver = bridge.to(inbox, 0)
        for _ in range(100):
            deliver(Delta())
        first = len(await inbox.take())
        deliver(Delta())
        await inbox.take()
        return first, len(calls)

    assert asyncio.run(count()) == (100, 2)


def test_delivering_to_a_loop_that_ended():
    """An engine's thread dies because the server stopped before it."""

    async def make():
        return Bridge(asyncio.get_running_loop()), Inbox()

    bridge, inbox = asyncio.run(make())
    bridge.to(inbox, 0)(Delta())


def test_an_end_comes_before_what_arrived():
    """A client that left still gets its answer formatted."""

    async def end():
        inbox = Inbox()
        inbox.check()
        inbox.end(Disconnected())
        inbox.end(ValueError())
        with pytest.raises(Disconnected):
            await inbox.take()
        with pytest.raises(Disconnected):
            inbox.check()

    asyncio.run(end())


def test_streams_that_are_added_after_the_end_are_closed():
    """A disconnect while many choices are submitted leaves the later ones running."""

    class Stream:
        closed = 0

        def close(self):
            self.closed += 1

    streams, early, late = Streams(), Stream(), Stream()
    streams.add(early)
    streams.close()
    streams.add(late)
    streams.close()
    assert (early.closed, late.closed, streams.closed) == (1, 1, True)
