"""When requests start: backoff, what an API asks to wait, requests_per_minute; by a clock that only sleeping moves."""

import asyncio
import contextlib
import email.utils
import itertools
import random
import threading
import time
import unittest

from tests import rollouts
from tests.case import PATIENCE, Case, Clock, until_cancelled
from tests.server import Reply, by_seed, chat

APIError, RolloutsClient = rollouts.APIError, rollouts.RolloutsClient


class Paced(Case):
    settings = {"use_cache": False}

    def setUp(self):
        super().setUp()
        self.use_clock()

    def timed(self, script=by_seed):
        """A server, and the list of the times at which requests reach it."""
        times = []

        def answer(request):
            times.append(self.clock.now())
            return script(request)

        return self.serve(answer), times


class Backoff(Paced):
    def test_full_jitter_doubles_from_one_second_to_sixty(self):
        steps = [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
        server = self.serve(Reply(503))
        for luck in (0.0, 0.5, 0.999):
            with self.subTest(luck=luck):
                clock = self.use_clock(Clock(luck))
                with self.assertRaises(APIError):
                    self.client(server).generate("q")
                self.assertEqual(len(clock.slept), len(steps))
                for slept, step in zip(clock.slept, steps):
                    self.assertAlmostEqual(slept, luck * step)

    def test_each_sample_takes_its_own_chance(self):
        clock = self.use_clock(Clock())
        draws = iter([0.25, 0.75, 0.5])
        clock.random = lambda: next(draws)
        server = self.serve(Reply(500))
        with self.assertRaises(APIError):
            self.client(server, max_retries=3).generate("q")
        self.assertEqual(clock.slept, [0.25, 1.5, 2.0])

    def test_many_attempts_do_not_overflow(self):
        self.clock.luck = 0.999
        with self.assertRaises(APIError):
            self.client(self.serve(Reply(503)), max_retries=1000).generate("q")
        self.assertEqual(len(self.clock.slept), 1000)
        self.assertLessEqual(max(self.clock.slept), 60)


def told(status=429, headers=None, **error):
    """A failure with *headers* and the fields of *error* in its body."""
    return Reply(status, {"error": {"message": "slow down", **error}}, headers or {})


def in_turn(*replies):
    """A script that gives each of *replies* once."""
    left = iter(replies)
    return lambda request: next(left)


def in_future(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


def in_milliseconds(seconds):
    return str(round((time.time() + seconds) * 1000))


class Told(Paced):
    """What an API asks to wait."""

    def rows(self):
        yield "seconds", told(headers={"Retry-After": "30"}), 30
        yield "a fraction of a second", told(headers={"Retry-After": "0.5"}), 0.5
        yield "a date", told(headers={"Retry-After": in_future(30)}), 30
        yield "milliseconds", told(headers={"retry-after-ms": "2500"}), 2.5
        yield "the end of the limit", told(headers={"X-RateLimit-Reset": in_milliseconds(30)}), 30
        yield "metadata", told(metadata={"retry_after_seconds": 7}), 7
        yield "metadata in words", told(metadata={"retry_after_seconds": "7.5"}), 7.5
        yield "availability", told(503, availability={"retryable": True, "retry_after": 12}), 12
        yield "headers in metadata", told(metadata={"headers": {"Retry-After": "9"}}), 9
        yield "headers in metadata, in small letters", told(metadata={"headers": {"retry-after": 9}}), 9
        yield "the limit's end in metadata", told(metadata={"headers": {"X-RateLimit-Reset": in_milliseconds(30)}}), 30
        yield "inside a 200", Reply(200, told(code=429, metadata={"retry_after_seconds": 4}).body), 4
        yield "a header beside an error inside a 200", Reply(200, told(code=503).body, {"Retry-After": "5"}), 5
        yield "the longest of several", told(headers={"Retry-After": "3"}, metadata={"retry_after_seconds": 8}), 8
        yield "with a 503", told(503, {"Retry-After": "11"}), 11
        yield "ten minutes", told(headers={"Retry-After": "600"}), 600

    def test_the_wait_is_obeyed(self):
        for name, reply, seconds in self.rows():
            with self.subTest(name):
                clock = self.use_clock(Clock())
                server, times = self.timed(in_turn(reply, chat()))
                self.client(server).generate("q")
                self.assertAlmostEqual(times[1] - times[0], seconds, delta=1.5 if seconds == 30 else 0.01)
                self.assertEqual(len(clock.slept), 1)

    def test_the_error_says_it(self):
        for name, reply, seconds in self.rows():
            with self.subTest(name):
                with self.assertRaises(APIError) as caught:
                    self.client(self.serve(reply), max_retries=0).generate("q")
                self.assertAlmostEqual(caught.exception.retry_after, seconds, delta=1.5 if seconds == 30 else 0.01)

    def test_jitter_goes_on_top_where_it_is_longer(self):
        clock = self.use_clock(Clock(0.5))
        server = self.serve([Reply(503)] * 4 + [told(headers={"Retry-After": "1"}), chat()])
        self.client(server).generate("q")
        self.assertEqual(clock.slept, [0.5, 1, 2, 4, 8])

    def test_what_is_no_wait_is_passed_over(self):
        for value in ("soon", "", "-5", "nan", "inf", "1e999", "Mon, 99 Foo 2020", "Jan , , , Feb , +9999", "0",
                      "9" * 400):
            with self.subTest(value):
                clock = self.use_clock(Clock())
                self.client(self.serve([told(headers={"Retry-After": value}), chat()])).generate("q")
                self.assertEqual(clock.slept, [0])
        for value in ("soon", None, [], {}, -1, "", 10**400):
            with self.subTest(metadata=value):
                clock = self.use_clock(Clock())
                reply = told(metadata={"retry_after_seconds": value, "headers": value}, availability=value)
                self.client(self.serve([reply, chat()])).generate("q")
                self.assertEqual(clock.slept, [0])

    def test_a_date_gone_by_is_no_wait(self):
        self.client(self.serve([told(headers={"Retry-After": in_future(-30)}), chat()])).generate("q")
        self.assertEqual(self.clock.slept, [0])


class Halted(Clock):
    """The first to sleep, who was told to wait, stays asleep until *go*: the others show what the hold does."""

    def __init__(self):
        super().__init__()
        self.asleep, self.go = threading.Event(), threading.Event()

    def sleep(self, seconds, is_cancelled):
        if not self.asleep.is_set():
            self.asleep.set()
            self.go.wait(PATIENCE)
        super().sleep(seconds, is_cancelled)


class Hold(Paced):
    """One request that is told to wait holds back all of the client's to that API, and no others."""

    def setUp(self):
        super().setUp()
        self.use_clock(Halted())
        self.addCleanup(self.clock.go.set)
        self.server, self.times = self.timed(self.answer)
        self.refusals = iter([told(headers={"Retry-After": "30"})])

    def answer(self, request):
        return next(self.refusals, None) or by_seed(request)

    def halted(self, **settings):
        """A client one of whose requests has just been told to wait for half a minute."""
        client = self.client(self.server, **settings)
        self.start(client.generate, "first")
        self.addCleanup(self.clock.go.set)
        self.assertTrue(self.clock.asleep.wait(10))
        return client

    def test_another_call_waits(self):
        client = self.halted()
        client.generate("second", 5, max_concurrency=1)
        self.assertEqual([round(at - self.times[0]) for at in self.times[1:]], [30] * 5)

    def test_another_key_or_model_waits_too(self):
        client = self.halted()
        client.generate("second", model="other", requests_per_minute=600)
        self.assertEqual(round(self.times[1] - self.times[0]), 30)

    def test_another_api_does_not_wait(self):
        other = self.serve(by_seed)
        self.halted().generate("second", 5, base_url=other.url)
        self.assertEqual((len(other.requests), self.clock.slept), (5, []))

    def test_another_client_does_not_wait(self):
        self.halted()
        self.client(self.server).generate("second")
        self.assertEqual(self.clock.slept, [])

    def test_what_is_cancelled_meanwhile_gives_its_thread_back(self):
        asleep = threading.Semaphore(0)

        def sleep(seconds, is_cancelled):
            asleep.release()
            until_cancelled(seconds, is_cancelled)

        def generate(prompt):
            with contextlib.suppress(rollouts.RolloutsError):  # closed, when the test is over
                client.generate(prompt)

        async def cancel():
            task = asyncio.ensure_future(client.agenerate("third"))
            self.assertTrue(await asyncio.get_running_loop().run_in_executor(None, asleep.acquire, True, 10))
            task.cancel()

        self.clock.sleep = sleep
        other = self.serve(by_seed)
        client = self.client(self.server, max_concurrency=3)
        for prompt in ("first", "second"):
            threading.Thread(target=generate, args=(prompt,)).start()
            self.assertTrue(asleep.acquire(timeout=10))
        asyncio.run(cancel())
        client.generate("fourth", base_url=other.url)
        self.assertEqual((len(self.server.requests), len(other.requests)), (1, 1))

    def test_what_is_not_told_holds_nobody(self):
        self.refusals = iter([Reply(503)])
        self.halted().generate("second")
        self.assertEqual(self.clock.slept, [])

    def test_a_longer_hold_wins_and_a_shorter_one_does_not(self):
        client = self.halted()
        self.refusals = iter([told(headers={"Retry-After": "5"}), told(headers={"Retry-After": "50"})])
        client.generate("second")
        self.assertEqual([round(at - self.times[0]) for at in self.times[1:]], [30, 35, 85])


def per_second(rate):
    return max(1, int(rate / 60))


class RequestsPerMinute(Paced):
    def check(self, times, rate):
        """In no minute more than *rate* starts, and at most one second's worth at once."""
        times = sorted(times)
        first = 0
        for index, at in enumerate(times):
            while times[first] <= at - 60:
                first += 1
            self.assertLessEqual(index - first + 1, max(1, rate), f"within a minute before {at}")
        for at, together in itertools.groupby(times):
            self.assertLessEqual(len(list(together)), per_second(rate), f"at once at {at}")

    def test_no_minute_has_more(self):
        chance = random.Random(1)
        rates = [1, 2, 59, 60, 61, 119, 120, 240, 1.5, 0.25] + [chance.uniform(1, 300) for _ in range(5)]
        for rate in rates:
            with self.subTest(rate=rate):
                self.use_clock(Clock())
                server, times = self.timed()
                n = int(min(3 + 1.2 * rate, 200))
                client = self.client(server, requests_per_minute=rate, max_concurrency=1)
                self.assertEqual(len(client.generate("q", n)), n)
                self.check(times, rate)
                # and the limit is used: what is whole of it, but for the hundredth that is kept back
                least = (n - per_second(rate)) * 60 / (int(rate) or rate)
                self.assertLessEqual(times[-1] - times[0], least * 1.05 + 1)

    def test_idle_time_saves_up_no_more_than_a_second(self):
        chance = random.Random(2)
        for rate in (30, 150, 600):
            with self.subTest(rate=rate):
                self.use_clock(Clock())
                server, times = self.timed()
                client = self.client(server, requests_per_minute=rate, max_concurrency=1)
                for call in range(20):
                    client.generate(f"q{call}", chance.randint(1, 20))
                    self.clock.time += chance.choice([0, 0.5, 5, 59, 1000])
                self.check(times, rate)

    def test_the_first_second_counts(self):
        server, times = self.timed()
        self.client(server, requests_per_minute=120, max_concurrency=1).generate("q", 4)
        self.assertEqual([round(at - times[0], 1) for at in times], [0, 0, 0.5, 1.0])

    def test_retries_count(self):
        replies = itertools.cycle([Reply(503), Reply(429), chat()])
        server, times = self.timed(lambda request: next(replies))
        self.client(server, requests_per_minute=30, max_concurrency=1).generate("q", 15)
        self.assertEqual(len(times), 45)
        self.check(times, 30)

    def test_calls_and_threads_share_the_limit(self):
        server, times = self.timed()
        client = self.client(server, requests_per_minute=60, max_concurrency=8)
        threads = [threading.Thread(target=client.generate, args=(f"q{index}", 20)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(len(times), 80)
        # A request may reach the server late, while the hands move on, but never before it started.
        for at in times:
            minutes = int((at - 1000) / 60) + 1
            self.assertLessEqual(sum(other < 1000 + 60 * minutes for other in times), 60 * minutes)

    def test_a_call_may_have_its_own(self):
        server, times = self.timed()
        client = self.client(server, requests_per_minute=6000, max_concurrency=1)
        client.generate("q", 5, requests_per_minute=2)
        self.check(times, 2)
        times.clear()
        client.generate("q", 5, requests_per_minute=None)
        self.assertEqual(len(set(times)), 1)

    def test_none_is_no_limit(self):
        server, times = self.timed()
        self.client(server).generate("q", 50)
        self.assertEqual((len(times), self.clock.slept), (50, []))

    def test_cached_samples_use_none_of_it(self):
        server, _ = self.timed()
        client = self.client(server, requests_per_minute=1, use_cache=True)
        client.generate("q", 2)
        slept = len(self.clock.slept)
        client.generate("q", 2)
        self.assertEqual((len(server.requests), len(self.clock.slept)), (2, slept))

    def test_a_call_that_is_over_does_not_wait_for_its_turn(self):
        self.clock.sleep = until_cancelled
        server = self.serve(Reply(401))
        begun = time.monotonic()
        with self.assertRaises(APIError):
            self.client(server, requests_per_minute=1, max_concurrency=4).generate("q", 10)
        self.assertEqual(len(server.requests), 1)
        self.assertLess(time.monotonic() - begun, 30)


if __name__ == "__main__":
    unittest.main()
