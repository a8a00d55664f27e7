"""Many threads, tasks and event loops on one client; what is under way, and what ends it."""

import asyncio
import concurrent.futures
import contextlib
import gc
import glob
import os
import sys
import threading
import unittest
import warnings
import weakref
from unittest import mock

from tests import rollouts
from tests.case import PATIENCE, AsyncCase, Case, Clock, LongSleeps, eventually
from tests.server import Gate, Reply, by_seed, chat

RolloutsClient, APIError, RolloutsError = rollouts.RolloutsClient, rollouts.APIError, rollouts.RolloutsError


def threads(name="rollouts"):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def connected(server):
    """The connections that are open, as the server sees it."""
    return [connection for connection in list(server.open) if connection.fileno() != -1]


def busy():
    """Whether a thread of the pool is in a request or a backoff: one that is not waits in the pool's own lock."""
    frames = sys._current_frames()
    for thread in threads():
        frame = frames.get(thread.ident)
        while frame is not None:
            if frame.f_code.co_name == "_draw":
                return True
            frame = frame.f_back
    return False


class Held(Clock):
    """A clock whose sleeps last until *wake*; *cancelled* says of each whether it was wanted no more by then."""

    def __init__(self):
        super().__init__()
        self.asleep, self.wake, self.cancelled = threading.Event(), threading.Event(), []

    def sleep(self, seconds, is_cancelled):
        self.asleep.set()
        self.wake.wait(PATIENCE)
        self.cancelled.append(is_cancelled())


class Shared(Case):
    """Several callers of one client. A sample has one attempt."""

    settings = {"max_retries": 0}

    def forgettable(self, server, **settings):
        """A client that nothing here refers to."""
        settings = {"cache_dir": self.cache_dir, "max_retries": 0, **settings}
        return RolloutsClient("m", base_url=server.url, progress_bar=False, **settings)

    def callers(self, gate, numbers, function, *arguments, **settings):
        """Futures of calls of so many samples; each has joined what is in flight, and asked for one sample more."""
        futures = []
        for came, number in enumerate(numbers, start=1):
            futures.append(self.start(function, *arguments, number, max_concurrency=number, **settings))
            self.assertTrue(gate.reached(came))
        return futures


class Identical(Shared):
    """Identical requests in flight are sent once.

    A caller asks for its samples in their order. One that is seen to ask for its last waits for the others:
    so the tests know, without a sleep, that a caller has joined the requests that are in flight.
    """

    def test_from_threads(self):
        for use_cache in (True, "sql"):
            with self.subTest(use_cache=use_cache):
                gate = Gate()
                server = self.serve(gate)
                client = self.client(server, use_cache=use_cache)
                futures = self.callers(gate, range(1, 13), client.generate, "q")
                gate.open()
                results = [future.result(20) for future in futures]
                for n, result in enumerate(results, start=1):
                    self.assertEqual(result.get_contents(), [f"answer {seed}" for seed in range(n)])
                self.assertEqual(server.seeds(), list(range(12)))
                # Each sample was spent once, by the one that asked for it.
                self.assertEqual(sum(result.spent.total_tokens for result in results), 12 * 15)

    def test_from_two_prompts_of_one_call(self):
        gate = Gate()
        server = self.serve(gate)
        future = self.start(self.client(server).generate_many, ["q", "q", "r"], 1, max_concurrency=3)
        self.assertTrue(gate.reached(2))  # q and r: the second q waits for the first
        gate.open()
        self.assertEqual([result.get_contents() for result in future.result(20)], [["answer 0"]] * 3)
        self.assertEqual(len(server.requests), 2)

    def test_a_failure_is_shared(self):
        gate = Gate(lambda request: Reply(401, {"error": {"message": "no"}}))
        server = self.serve(gate)
        client = self.client(server)
        futures = self.callers(gate, (1, 2, 3), client.generate, "q")
        gate.open()
        for future in futures:
            with self.assertRaises(APIError) as caught:
                future.result(20)
            self.assertEqual(caught.exception.status, 401)
        self.assertEqual(len(server.requests), 3)

    def test_a_failure_that_may_pass_does_not_use_up_the_attempts_of_others(self):
        """The first to ask has no retries; who waits for the same sample has some."""
        self.use_clock(Clock())
        gate = Gate(lambda request: by_seed(request) if request.seed or request in server.requests[2:] else Reply(500))
        server = self.serve(gate)
        client = self.client(server)
        impatient = self.start(client.generate, "q", 1)
        self.assertTrue(gate.reached(1))
        patient = self.start(client.generate, "q", 2, max_concurrency=1, max_retries=5)
        self.assertTrue(gate.reached(2))
        gate.open()
        with self.assertRaises(APIError):
            impatient.result(20)
        self.assertEqual(patient.result(20).get_contents(), ["answer 0", "answer 1"])

    def test_who_waits_keeps_a_sample_going_when_the_first_is_cancelled_between_attempts(self):
        clock = self.use_clock(Held())
        gate = Gate(
            lambda request: by_seed(request) if request.seed or len(server.requests) > 1 else Reply(500),
            lambda request: request.seed > 0)
        server = self.serve(gate)
        client = self.client(server, max_retries=5)

        async def scenario():
            thread = asyncio.get_running_loop().run_in_executor
            first = asyncio.ensure_future(client.agenerate("q", 1))
            self.assertTrue(await thread(self.executor, clock.asleep.wait, PATIENCE))
            others = []
            for n in (2, 3):
                others.append(asyncio.ensure_future(client.agenerate("q", n, max_concurrency=n)))
                self.assertTrue(await thread(self.executor, gate.reached, n))
            first.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await first
            clock.wake.set()
            gate.open()
            return await asyncio.wait_for(asyncio.gather(*others), PATIENCE)

        two, three = asyncio.run(scenario())
        self.assertEqual(two.get_contents(), ["answer 0", "answer 1"])
        self.assertEqual(three.get_contents(), ["answer 0", "answer 1", "answer 2"])
        self.assertEqual(server.seeds(), [0, 0, 1, 2])
        self.assertEqual(clock.cancelled, [False])

    def test_who_waits_gets_the_reply_that_a_cancelled_task_asked_for(self):
        gate = Gate()
        server = self.serve(gate)
        client = self.client(server)

        async def scenario():
            first = asyncio.ensure_future(client.agenerate("q", 1))
            await asyncio.get_running_loop().run_in_executor(self.executor, gate.reached, 1)
            second = asyncio.ensure_future(client.agenerate("q", 2, max_concurrency=2))
            await asyncio.get_running_loop().run_in_executor(self.executor, gate.reached, 2)
            first.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await first
            gate.open()
            return await asyncio.wait_for(second, 20)

        self.assertEqual(asyncio.run(scenario()).get_contents(), ["answer 0", "answer 1"])
        self.assertEqual(server.seeds(), [0, 1])

    def test_one_key_does_not_ride_on_another(self):
        gate = Gate(lambda request: by_seed(request) if "good" in request.headers["authorization"] else Reply(401))
        server = self.serve(gate)
        client = self.client(server)
        futures = [self.start(client.generate, "q", 1, api_key=key) for key in ("good", "bad")]
        self.assertTrue(gate.reached(2))
        gate.open()
        self.assertEqual(futures[0].result(20).get_contents(), ["answer 0"])
        with self.assertRaises(APIError):
            futures[1].result(20)


class Width(Shared):
    def most_at_once(self, gate, expected):
        """Check that *expected* requests come, and while they are held no more."""
        self.assertTrue(gate.reached(expected), gate.came)
        self.assertFalse(gate.reached(expected + 1, 0.2), gate.came)  # that something does not come takes a while
        gate.open()

    def test_max_concurrency(self):
        for ours, of_the_call, expected in ((3, None, 3), (8, 2, 2), (2, 7, 7), (1, None, 1), (50, None, 20)):
            with self.subTest(client=ours, call=of_the_call):
                gate = Gate()
                client = self.client(self.serve(gate), max_concurrency=ours)
                overrides = {"max_concurrency": of_the_call} if of_the_call else {}
                future = self.start(client.generate, "q", 20, **overrides)
                self.most_at_once(gate, expected)
                self.assertEqual(len(future.result(20)), 20)
                self.assertEqual(gate.most, expected)

    def test_all_calls_of_a_client_share_it(self):
        gate = Gate()
        client = self.client(self.serve(gate), max_concurrency=4)
        futures = [self.start(client.generate, f"q{number}", 10) for number in range(3)]
        futures.append(self.start(client.generate_many, ["p", "r"], 5))
        self.most_at_once(gate, 4)
        concurrent.futures.wait(futures, 20)
        self.assertEqual(gate.most, 4)

    def test_a_wider_call_widens_no_other(self):
        everything = Gate()
        server = self.serve(everything)
        client = self.client(server, max_concurrency=2)
        wide = self.start(client.generate, "wide", 8, max_concurrency=8)
        self.assertTrue(everything.reached(8))
        everything.open()
        wide.result(20)
        gate = server.script = Gate()
        self.addCleanup(gate.open)
        futures = [self.start(client.generate, f"q{number}", 5) for number in range(4)]
        self.most_at_once(gate, 2)
        concurrent.futures.wait(futures, 20)

    def test_200_agenerate_are_in_flight_together(self):
        for use_cache in (True, False):
            with self.subTest(use_cache=use_cache):
                gate = Gate()
                server = self.serve(gate)
                client = self.client(server, max_concurrency=200, use_cache=use_cache)

                async def scenario(client, gate):
                    calls = (client.agenerate("q", seed=seed) for seed in range(200))
                    tasks = list(map(asyncio.ensure_future, calls))
                    together = await asyncio.get_running_loop().run_in_executor(self.executor, gate.reached, 200, 20)
                    gate.open()
                    return together, await asyncio.gather(*tasks)

                together, results = asyncio.run(scenario(client, gate))
                self.assertTrue(together)
                self.assertEqual(gate.most, 200)
                self.assertEqual([result[0].content for result in results], [f"answer {seed}" for seed in range(200)])

    def test_a_small_call_does_not_wait_for_a_big_one(self):
        permits = threading.Semaphore(0)

        def script(request):
            if request.body["messages"][0]["content"] == "big":
                permits.acquire(timeout=30)
            return by_seed(request)

        server = self.serve(script)
        client = self.client(server, max_concurrency=4)
        big = self.start(client.generate, "big", 200)
        self.assertTrue(eventually(lambda: len(server.requests) == 4))
        small = self.start(client.generate, "small")
        released = 0
        while not small.done() and released < 200:  # one of the big call's after the other ends
            permits.release()
            released += 1
            concurrent.futures.wait([small], 0.05)
        self.assertLess(released, 100)
        self.assertFalse(big.done())
        permits.release(200)
        self.assertEqual(len(big.result(20)), 200)


class Many(Shared):
    def test_threads_on_one_client(self):
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache=use_cache):
                server = self.serve(lambda request: chat(f"{request.body['messages'][0]['content']} {request.seed}"))
                client = self.client(server, use_cache=use_cache, max_concurrency=16)
                prompts = [f"q{number % 6}" for number in range(24)]
                results = list(self.executor.map(client.generate, prompts, [10] * len(prompts)))
                for prompt, result in zip(prompts, results):
                    self.assertEqual(result.get_contents(), [f"{prompt} {seed}" for seed in range(10)])
                self.assertEqual(len(server.requests), 60)
                self.assertLessEqual(server.connections, 16)

    def test_event_loops_on_one_client(self):
        server = self.serve(lambda request: chat(f"{request.body['messages'][0]['content']} {request.seed}"))
        client = self.client(server, max_concurrency=16)

        def loop(number):
            async def scenario():
                return await asyncio.gather(*(client.agenerate(f"q{(number + k) % 5}", 4) for k in range(5)))
            return [asyncio.run(scenario()) for _ in range(2)]

        for number, rounds in enumerate(self.executor.map(loop, range(6))):
            for results in rounds:
                for k, result in enumerate(results):
                    self.assertEqual(result.get_contents(), [f"q{(number + k) % 5} {seed}" for seed in range(4)])
        self.assertEqual(len(server.requests), 20)


class Asynchronous(Shared, AsyncCase):
    async def test_agenerate_is_generate(self):
        server = self.serve()
        client = self.client(server)
        one = await client.agenerate("q", 3, temperature=0.1)
        self.assertEqual(one.get_contents(), ["answer 0", "answer 1", "answer 2"])
        two = await self.thread(lambda: client.generate("q", 3, temperature=0.1))
        self.assertEqual(one.responses, two.responses)
        self.assertEqual((one.prompt, one.temperature), ("q", 0.1))
        self.assertEqual([response.cached for response in two], [True] * 3)
        four = await client.agenerate("q", 4, seed=2, temperature=0.1)
        self.assertEqual([(response.seed, response.cached) for response in four],
                         [(2, True), (3, False), (4, False), (5, False)])
        self.assertEqual(server.seeds(), [0, 1, 2, 3, 4, 5])

    async def test_blocking_within_a_running_loop(self):
        """As in a notebook."""
        client = self.client(self.serve())
        self.assertEqual(len(client.generate("q", 3)), 3)
        self.assertTrue(all(response.cached for response in await client.agenerate("q", 3)))

    async def test_the_loop_goes_on_meanwhile(self):
        gate = Gate()
        client = self.client(self.serve(gate))
        task = asyncio.ensure_future(client.agenerate("q"))
        self.assertTrue(await self.thread(gate.reached, 1))
        for _ in range(100):
            await asyncio.sleep(0)
        self.assertFalse(task.done())
        gate.open()
        self.assertEqual(len(await task), 1)

    async def test_cancelling_drops_what_was_not_sent_and_keeps_what_is_in_flight(self):
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache=use_cache):
                gate = Gate()
                server = self.serve(gate)
                client = self.client(server, use_cache=use_cache, max_concurrency=5)
                task = asyncio.ensure_future(client.agenerate("q", 50))
                self.assertTrue(await self.thread(gate.reached, 5))
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
                gate.open()
                again = await client.agenerate("q", 5)  # waits for them, or finds them
                self.assertTrue(all(response.cached for response in again))
                self.assertEqual(server.seeds(), [0, 1, 2, 3, 4])
                self.assertTrue(all(response.cached for response in await client.agenerate("q", 5)))
                client.close()

    async def test_cancelling_one_of_a_thousand_samples_in_backoff(self):
        clock = self.use_clock(LongSleeps())
        server = self.serve(Reply(503))
        task = asyncio.ensure_future(self.client(server, max_retries=9, max_concurrency=10).agenerate("q", 1000))
        self.assertTrue(await self.thread(clock.asleep.wait, 10))
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertTrue(await self.thread(eventually, lambda: not busy()))
        self.assertLessEqual(len(server.requests), 10)

    async def test_wait_for(self):
        gate = Gate()
        client = self.client(self.serve(gate))
        with self.assertRaises(asyncio.TimeoutError):
            await asyncio.wait_for(client.agenerate("q", 3), 0.05)
        gate.open()
        self.assertEqual(len(await client.agenerate("q", 3)), 3)

    async def test_errors(self):
        client = self.client(self.serve(Reply(402, {"error": {"message": "no credit"}})))
        with self.assertRaisesRegex(APIError, "no credit"):
            await client.agenerate("q", 3)
        with self.assertRaisesRegex(ValueError, "^n_samples takes "):
            await client.agenerate("q", 0)
        with self.assertRaisesRegex(NotImplementedError, "logprobs"):
            await client.agenerate("q", logprobs=True)


class Ending(Shared):
    def test_use_after_close(self):
        server = self.serve()
        with self.client(server) as client:
            client.generate("q")
        client.close()  # twice is no harm
        for name, call in {
            "generate": lambda: client.generate("q"),
            "generate_many": lambda: client.generate_many(["q"]),
            "resample": lambda: client.resample("q", "So.", 1),
            "agenerate": lambda: asyncio.run(client.agenerate("q")),
        }.items():
            with self.subTest(name), self.assertRaisesRegex(RolloutsError, "closed"):
                call()
        self.assertEqual((client.model, len(server.requests)), ("m", 1))
        self.assertTrue(eventually(lambda: not connected(server)), "the idle connection is closed")

    def test_closing_ends_what_is_under_way_and_keeps_what_is_in_flight(self):
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache=use_cache), self.no_leaks():
                gate = Gate()
                server = self.serve(gate)
                client = self.forgettable(server, use_cache=use_cache, max_concurrency=3)
                future = self.start(client.generate, "q", 20)
                self.assertTrue(gate.reached(3))
                client.close()
                with self.assertRaisesRegex(RolloutsError, "closed"):
                    future.result(20)
                gate.open()
                self.assertTrue(eventually(lambda server=server: not connected(server)), "it closes its connections")
                self.assertTrue(eventually(lambda: not busy()))
                again = self.forgettable(server, use_cache=use_cache)
                self.assertEqual([response.cached for response in again.generate("q", 4)], [True] * 3 + [False])
                again.close()
                del client, future, again
                gc.collect()

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs a file whose opening blocks")
    def test_closing_while_a_call_looks_into_the_cache(self):
        server = self.serve()
        self.client(server).generate("q")
        (path,) = glob.glob(os.path.join(self.directory, "**", "seed_00000.json"), recursive=True)
        os.remove(path)
        os.mkfifo(path)
        client = self.client(server)
        future = self.start(client.generate, "q", 3)
        with open(path, "w"):  # opens when the call has
            client.close()
            os.remove(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self.assertRaisesRegex(RolloutsError, "closed"):
                future.result(20)
        self.assertEqual(len(server.requests), 1)

    def test_an_interrupt_while_threads_are_started_ends_the_call(self):
        gate = Gate()
        server = self.serve(gate)
        client = self.client(server, max_concurrency=10)
        started = []
        start = threading.Thread.start

        def interrupted(thread):
            if thread.name.startswith("rollouts"):
                started.append(thread)
                if len(started) == 3:
                    raise KeyboardInterrupt
            start(thread)

        with mock.patch.object(threading.Thread, "start", interrupted), self.assertRaises(KeyboardInterrupt):
            client.generate("q", 50)
        gate.open()
        self.assertFalse(gate.reached(3, 0.2), "the rest was sent all the same")

    @contextlib.contextmanager
    def no_leaks(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
            gc.collect()
        self.assertEqual([str(warning.message) for warning in caught if warning.category is ResourceWarning], [])

    def test_a_forgotten_client_leaves_nothing(self):
        server = self.serve()
        others = set(threads())
        with self.no_leaks():
            for use_cache in ("json", "sql"):
                client = self.forgettable(server, use_cache=use_cache)
                client.generate("q", 10)
                asyncio.run(client.agenerate(use_cache, 10))
                forgotten = weakref.ref(client)
                del client
                gc.collect()
                self.assertIsNone(forgotten())
            self.assertTrue(eventually(lambda: not connected(server)), "its connections are closed")
            self.assertTrue(eventually(lambda: not set(threads()) - others), threads())


if __name__ == "__main__":
    unittest.main()
