"""The engine: who waits for whom, what is shared, how much is under way, and what is left at the end.

test_concurrency.py has the plain cases of this; here are the ones that a pool of threads, a table of what is
in flight and two kinds of callers can get wrong together.
"""

import asyncio
import gc
import os
import random
import shutil
import socket
import ssl
import sys
import threading
import time
import tracemalloc
import unittest
import warnings
import weakref
from unittest import mock

from tests import rollouts
from tests.case import AsyncCase, Case, LongSleeps, eventually, slow
from tests.server import CERTIFICATE, Gate, Reply, chat
import contextlib

RolloutsError = rollouts.RolloutsError
SLICE = 0.5  # seconds between two looks of a thread that waits for a reply


def question(request):
    return request.body["messages"][0]["content"]


def echo(request):
    """An answer that names its prompt and its seed."""
    return chat(f"{question(request)} {request.seed}")


def connected(server):
    """The connections that are open, as the server sees it."""
    return [connection for connection in list(server.open) if connection.fileno() != -1]


class Turns:
    """A script that answers nothing until it is told to, and then one request more each time."""

    def __init__(self, holds):
        self.holds, self.asked = holds, []
        self.permits = threading.Semaphore(0)
        self.changed = threading.Condition()

    def __call__(self, request):
        with self.changed:
            self.asked.append(question(request))
            self.changed.notify_all()
        if self.holds(request):
            self.permits.acquire(timeout=60)
        return echo(request)

    def wait(self, n):
        with self.changed:
            return self.changed.wait_for(lambda: len(self.asked) >= n, 20)


class Fairness(Case):
    def test_a_small_call_waits_one_round(self):
        """It waits for what was asked for before it: a window of each large call, not their ends."""
        for large in (1, 3):
            for kind in ("generate", "agenerate"):
                with self.subTest(kind, large=large):
                    turns = Turns(lambda request: question(request) != "small")
                    server = self.serve(turns)
                    client = self.client(server, max_concurrency=4, use_cache=False)
                    futures = [self.start(client.generate, f"large {n}", 50) for n in range(large)]
                    self.assertTrue(turns.wait(4))
                    # Nothing shows from outside that the others are queued.
                    time.sleep(0.2)
                    small = self.start(
                        client.generate if kind == "generate" else
                        lambda prompt, client=client: asyncio.run(client.agenerate(prompt)), "small")
                    time.sleep(0.2)
                    replies = 0
                    while "small" not in turns.asked and replies < 4 * large + 4:
                        turns.permits.release()
                        replies += 1
                        self.assertTrue(turns.wait(4 + replies))
                    self.assertLessEqual(replies, 4 * large)
                    self.assertEqual(small.result(20).get_contents(), ["small 0"])
                    self.assertFalse(any(future.done() for future in futures))
                    turns.permits.release(1000)
                    for future in futures:
                        self.assertEqual(len(future.result(20)), 50)

    def test_a_wider_call_has_its_own_width(self):
        """150 in flight for a client of 100, whose other calls have their 100 all the same, and no more."""
        gates = {prompt: Gate(echo) for prompt in ("wide", "plain")}
        for gate in gates.values():
            self.addCleanup(gate.open)
        server = self.serve(lambda request: gates[question(request)](request))
        client = self.client(server, max_concurrency=100, use_cache=False)
        plain = self.start(client.generate, "plain", 300)
        self.assertTrue(gates["plain"].reached(100))
        wide = self.start(client.generate, "wide", 160, max_concurrency=150)
        self.assertTrue(gates["wide"].reached(150))
        self.assertFalse(gates["wide"].reached(151, 0.2))
        self.assertEqual(gates["plain"].came, 100)
        gates["wide"].open()
        self.assertEqual(len(wide.result(20)), 160)
        self.assertEqual(gates["plain"].came, 100)
        gates["plain"].open()
        self.assertEqual(len(plain.result(20)), 300)
        self.assertEqual([gate.most for gate in gates.values()], [150, 100])

    def test_work_is_created_lazily(self):
        """360,000 samples in one call: what is under way, and what it takes, is that of its width."""
        prompts = [f"prompt {number}" for number in range(3600)]
        for use_cache in (False, "json", "sql"):
            with self.subTest(use_cache=use_cache):
                gate = Gate(lambda request: Reply(503))  # nothing to store once the test is over
                server = self.serve(gate)
                client = self.client(server, max_concurrency=20, use_cache=use_cache)
                threads = threading.active_count()
                tracemalloc.start()
                self.addCleanup(tracemalloc.stop)
                call = self.start(client.generate_many, prompts, 100)
                self.assertTrue(gate.reached(20, 60))
                self.assertFalse(gate.reached(21, 0.2))
                # A list of 360,000 objects has 3 MB, and the smallest 360,000 objects 6 MB or more.
                self.assertLess(tracemalloc.get_traced_memory()[1], 40e6)
                tracemalloc.stop()
                # The call's own, one for each sample and the server's for each connection.
                self.assertLessEqual(threading.active_count() - threads, 1 + 20 + 20)
                client.close()
                with self.assertRaisesRegex(RolloutsError, "closed"):
                    call.result(20)
                gate.open()
                self.assertTrue(eventually(lambda server=server: not connected(server)))
                self.assertEqual(gate.came, 20)


class Calls(AsyncCase):
    def begin(self, function, *arguments):
        """A task of a blocking call in another thread, which begins at once."""
        return asyncio.ensure_future(self.thread(function, *arguments))


@slow
class Sharing(Calls):
    async def joined(self, first, second, gate, came):
        """Tasks of two calls, the second of which has come to wait for what the first has in flight."""
        one = asyncio.ensure_future(first)
        self.assertTrue(await self.thread(gate.reached, came))
        two = asyncio.ensure_future(second)
        await asyncio.sleep(0.2)  # nothing shows from outside that a call waits for another's sample
        return one, two

    async def cancel(self, task):
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task

    async def test_the_first_call_is_cancelled(self):
        """What is in flight, and what still waits for its turn, is drawn for the second call: once."""
        for use_cache in ("json", "sql"):
            for blocking in (False, True):
                with self.subTest(use_cache, blocking=blocking):
                    gate = Gate(echo)
                    server = self.serve(gate)
                    client = self.client(server, max_concurrency=4, use_cache=use_cache)
                    other = asyncio.ensure_future(client.agenerate("other", 2))
                    self.assertTrue(await self.thread(gate.reached, 2))
                    second = self.thread(client.generate, "q", 6) if blocking else client.agenerate("q", 6)
                    # Two are in flight, two in the queue, and two more nobody has asked for yet.
                    one, two = await self.joined(client.agenerate("q", 6), second, gate, 4)
                    await self.cancel(one)
                    await asyncio.sleep(2 * SLICE)
                    gate.open()
                    result = await asyncio.wait_for(two, 20)
                    self.assertEqual(result.get_contents(), [f"q {seed}" for seed in range(6)])
                    self.assertEqual(result.errors, [])
                    self.assertEqual(len(await other), 2)
                    asked = [request.seed for request in server.requests if question(request) == "q"]
                    self.assertEqual(sorted(asked), list(range(6)))
                    client.close()

    async def test_the_loop_of_the_first_call_is_closed(self):
        """Its replies would be given up if nobody else waited for them."""
        gate = Gate()
        server = self.serve(gate)
        client = self.client(server)

        async def impatient():
            return await asyncio.wait_for(client.agenerate("q", 3), 1.0)

        first = self.begin(lambda: asyncio.run(impatient()))
        one, two = await self.joined(first, client.agenerate("q", 3), gate, 3)
        with self.assertRaises(asyncio.TimeoutError):
            await one
        await asyncio.sleep(2 * SLICE + 0.2)
        gate.open()
        result = await asyncio.wait_for(two, 20)
        self.assertEqual(result.get_contents(), [f"answer {seed}" for seed in range(3)])
        self.assertEqual(server.seeds(), [0, 1, 2])

    async def test_the_first_call_is_cancelled_in_a_backoff(self):
        """Whoever asks next is served, whether or not the sleeping thread has noticed by then."""
        woken = threading.Event()

        class Sleeps(LongSleeps):
            def sleep(self, seconds, is_cancelled):
                self.asleep.set()
                assert eventually(lambda: woken.is_set() or is_cancelled())

        clock = self.use_clock(Sleeps())
        server = self.serve([Reply(503), chat("answer 0")])
        client = self.client(server, max_retries=3)
        for pause in (0, 0.1):
            with self.subTest(pause=pause):
                server.requests.clear()
                prompt = f"after {pause}"
                first = asyncio.ensure_future(client.agenerate(prompt))
                self.assertTrue(await self.thread(clock.asleep.wait, 10))
                await self.cancel(first)
                await asyncio.sleep(pause)
                second = asyncio.ensure_future(client.agenerate(prompt))
                await asyncio.sleep(0.1)
                woken.set()
                self.assertEqual((await asyncio.wait_for(second, 20)).get_contents(), ["answer 0"])
                self.assertEqual(len(server.requests), 2)
                woken.clear()
                clock.asleep.clear()

    async def test_with_the_cache_off_nothing_is_shared(self):
        for kind in ("agenerate", "generate", "generate_many"):
            with self.subTest(kind):
                gate = Gate()
                server = self.serve(gate)
                client = self.client(server, max_concurrency=10, use_cache=False)
                if kind == "agenerate":
                    calls = [client.agenerate("q") for _ in range(10)]
                elif kind == "generate":
                    calls = [self.begin(client.generate, "q") for _ in range(10)]
                else:
                    calls = [self.begin(client.generate_many, ["q"] * 10)]
                results = asyncio.gather(*calls)
                self.assertTrue(await self.thread(gate.reached, 10))
                gate.open()
                results = await results
                if kind == "generate_many":
                    (results,) = results
                self.assertEqual([result.get_contents() for result in results], [["answer 0"]] * 10)
                self.assertFalse(any(result[0].cached for result in results))
                self.assertEqual(len(server.requests), 10)

    async def test_the_loop_goes_on_while_the_cache_blocks(self):
        if not hasattr(os, "mkfifo"):
            self.skipTest("needs a file whose opening blocks")
        server = self.serve()
        await self.client(server).agenerate("q")
        (path,) = [os.path.join(where, name) for where, _, names in os.walk(self.cache_dir)
                   for name in names if name == "seed_00000.json"]
        os.rename(path, path + ".kept")
        os.mkfifo(path)
        task = asyncio.ensure_future(self.client(server).agenerate("q"))
        for _ in range(20):
            await asyncio.sleep(0.01)
        self.assertFalse(task.done())

        def feed():
            with open(path + ".kept", "rb") as kept, open(path, "wb") as file:
                file.write(kept.read())

        await self.thread(feed)
        self.assertEqual((await asyncio.wait_for(task, 20)).get_contents(), ["answer 0"])
        self.assertEqual(len(server.requests), 1)


class Storm(Case):
    """12 threads and 24 coroutines on one client, and every third coroutine is cancelled at some moment."""

    PROMPTS, THREADS, TASKS, ROUNDS = 6, 12, 24, 4

    def test_nothing_hangs_and_nothing_is_lost_or_doubled(self):
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-4)  # threads meet each other more often
        for use_cache in ("json", "sql", False):
            with self.subTest(use_cache=use_cache):
                self.storm(use_cache)

    def storm(self, use_cache):
        chance = random.Random(2506)
        delays = [chance.random() / 100 for _ in range(97)]
        server = self.serve(
            lambda request: Reply(**{**vars(echo(request)), "delay": delays[request.seed % 97]}))
        client = self.client(server, max_concurrency=8, use_cache=use_cache)

        def check(prompt, n, result):
            self.assertEqual(result.get_contents(), [f"{prompt} {seed}" for seed in range(n)])
            self.assertEqual(result.errors, [])

        def jobs(chance):
            return [
                (f"q{chance.randrange(self.PROMPTS)}", chance.randrange(1, 15)) for _ in range(self.ROUNDS)]

        def draw(seed):
            for prompt, n in jobs(random.Random(seed)):
                check(prompt, n, client.generate(prompt, n))

        async def adraw(seed):
            chance = random.Random(1000 + seed)
            for prompt, n in jobs(chance):
                task = asyncio.ensure_future(client.agenerate(prompt, n))
                if chance.random() < 1 / 3:
                    await asyncio.sleep(chance.random() / 20)
                    task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    check(prompt, n, await task)

        async def main():
            await asyncio.wait_for(asyncio.gather(*map(adraw, range(self.TASKS))), 60)

        threads = [self.start(draw, seed) for seed in range(self.THREADS)]
        asyncio.run(main())
        for thread in threads:
            thread.result(60)
        if use_cache:
            asked = [(question(request), request.seed) for request in server.requests]
            self.assertEqual(sorted(set(asked)), sorted(asked), "sent twice")
            came = len(server.requests)
            for number in range(self.PROMPTS):
                check(f"q{number}", 14, client.generate(f"q{number}", 14))
            self.assertLessEqual(len(server.requests), self.PROMPTS * 14)
            self.assertGreater(came, self.PROMPTS * 14 / 2, "too little was drawn to show anything")
        client.close()
        self.assertTrue(eventually(lambda: not connected(server)))


@slow
class Patience(Case):
    """A thread looks up every half second; what takes longer than that is no failure."""

    def slow_server(self, connect):
        """The address of a server that lets *connect* do something slow with its one connection."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        answer = b'{"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}'
        self.accepted = 0

        def serve():
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                self.accepted += 1
                with connect(plain) as connection:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        request += connection.recv(65536)
                    head, _, body = request.partition(b"\r\n\r\n")
                    size = int(head.lower().split(b"content-length:")[1].split()[0])
                    while size > len(body):
                        body += connection.recv(1 << 20)
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
                        % (len(answer), answer))

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}/v1"

    def assert_drawn(self, url, prompt="q", **settings):
        result = self.client(url, max_retries=0, **settings).generate(prompt)
        self.assertEqual(result.get_contents(), ["fine"])
        self.assertEqual(self.accepted, 1)

    def test_a_slow_reader(self):
        """The request is larger than all buffers, and the server begins to read it after two looks."""
        def connect(plain):
            time.sleep(2 * SLICE + 0.2)
            return plain

        self.assert_drawn("http://" + self.slow_server(connect), "long " * 4_000_000)

    def test_a_slow_handshake(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)

        def connect(plain):
            time.sleep(2 * SLICE + 0.2)
            return context.wrap_socket(plain, server_side=True)

        url = "https://" + self.slow_server(connect).replace("127.0.0.1", "localhost")
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": CERTIFICATE}):
            self.assert_drawn(url)

    def test_timeout_is_that_of_the_whole_attempt(self):
        """The server never reads: the attempt ends, and not with the first look."""
        def connect(plain):
            time.sleep(60)
            return plain

        begun = time.monotonic()
        with self.assertRaisesRegex(rollouts.APIError, "1.5|time"):
            self.client("http://" + self.slow_server(connect), max_retries=0, timeout=1.5).generate("q")
        self.assertGreaterEqual(time.monotonic() - begun, 1.4)


@slow
class Leaving(Calls):
    async def test_closing_ends_every_kind_of_call_and_keeps_what_is_in_flight(self):
        for use_cache in ("json", "sql"):
            for kind in ("generate", "generate_many", "agenerate"):
                with self.subTest(kind, use_cache=use_cache):
                    gate = Gate(echo)
                    server = self.serve(gate)
                    client = self.client(server, use_cache=use_cache, max_concurrency=3)
                    shutil.rmtree(self.cache_dir, ignore_errors=True)
                    if kind == "agenerate":
                        call = asyncio.ensure_future(client.agenerate("q", 20))
                    else:
                        call = self.begin(getattr(client, kind), "q" if kind == "generate" else ["q"], 20)
                    self.assertTrue(await self.thread(gate.reached, 3))
                    client.close()
                    with self.assertRaisesRegex(RolloutsError, "closed"):
                        await asyncio.wait_for(call, 20)
                    gate.open()
                    again = self.client(server, use_cache=use_cache)
                    self.assertTrue(await self.thread(
                        eventually, lambda again=again: len(again.generate("q", 3, offline=True)) == 3))
                    again = await again.agenerate("q", 4)
                    self.assertEqual([response.cached for response in again], [True] * 3 + [False])
                    self.assertEqual(server.seeds(), [0, 1, 2, 3])

    async def test_closing_in_a_backoff(self):
        clock = self.use_clock(LongSleeps())
        server = self.serve(Reply(503))
        client = self.client(server, max_concurrency=3)
        call = self.begin(client.generate, "q", 20)
        self.assertTrue(await self.thread(clock.asleep.wait, 10))
        client.close()
        with self.assertRaisesRegex(RolloutsError, "closed"):
            await asyncio.wait_for(call, 20)
        self.assertLessEqual(len(server.requests), 3)

    def test_a_forgotten_client_leaves_no_thread_and_no_connection(self):
        for use_cache in ("json", "sql", False):
            with self.subTest(use_cache=use_cache), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                server = self.serve()
                before = set(threading.enumerate())
                client = rollouts.RolloutsClient(
                    "m", base_url=server.url, cache_dir=self.cache_dir, use_cache=use_cache,
                    progress_bar=False)
                client.generate("q", 10)
                client.generate("wide", 40, max_concurrency=120)
                asyncio.run(client.agenerate("r", 10))
                forgotten = weakref.ref(client)
                del client
                gc.collect()
                self.assertIsNone(forgotten())

                def left(before=before, server=server):
                    gc.collect()
                    threads = set(threading.enumerate()) - before
                    # The server's own end with their connections.
                    own = [each for each in threads if "process_request" not in each.name]
                    return own + connected(server)

                self.assertTrue(eventually(lambda: not left()), left())
                gc.collect()
                self.assertEqual([str(one.message) for one in caught if one.category is ResourceWarning], [])


if __name__ == "__main__":
    unittest.main()
