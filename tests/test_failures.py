"""What fails: what is retried, what ends the call, what the errors say; and the key, which nothing shows."""

import contextlib
import io
import itertools
import json
import logging
import os
import pickle
import socket
import threading
import traceback
import unittest
import warnings
from dataclasses import replace
from unittest import mock

from tests import rollouts
from tests.case import environment, until_cancelled
from tests.server import Reply, by_seed, chat, delta, events
from tests.test_transport import HEAD, Wired, read_request, says

APIError, RolloutsClient, RolloutsError = rollouts.APIError, rollouts.RolloutsClient, rollouts.RolloutsError

PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 524, 529)
LASTING = (400, 401, 402, 403, 404, 405, 410, 413, 415, 422, 451)
REDIRECTS = (301, 302, 303, 307, 308)


def refusal(status, message="the provider's own words", **error):
    return Reply(status, {"error": {"message": message, **error}})


def within(**error):
    """An error in a reply of status 200."""
    return Reply(200, {"error": {"message": "the provider's own words", **error}})


def choices(*given, **further):
    return Reply(200, {"choices": list(given), **further})


class Failing(Wired):
    def setUp(self):
        super().setUp()
        self.enter(warnings.catch_warnings())
        warnings.simplefilter("error")  # a warning that no test expects is a failure

    def is_retried(self, reply, status=None, words="", **settings):
        """Prove that *reply* is asked for again, and with what it fails in the end."""
        server = self.serve([reply, chat()])
        self.assertEqual(self.client(server, **settings).generate("q")[0].content, "fine")
        self.assertEqual(len(server.requests), 2)
        server = self.serve(reply)
        error = self.fails(server, max_retries=2, **settings)
        self.assertEqual(len(server.requests), 3)
        self.assertTrue(error.retryable)
        self.check(error, status, words)
        return error

    def is_raised(self, reply, status=None, words="", **settings):
        """Prove that *reply* ends the call at once."""
        self.clock.slept.clear()
        server = self.serve(reply)
        error = self.fails(server, max_retries=2, **settings)
        self.assertEqual((len(server.requests), self.clock.slept), (1, []))
        self.assertFalse(error.retryable)
        self.check(error, status, words)
        server = self.serve(reply)
        self.fails(server, 50, max_concurrency=4, **settings)
        self.assertLessEqual(len(server.requests), 4)
        return error

    def check(self, error, status, words):
        self.assertIsInstance(error, RolloutsError)
        self.assertEqual(error.status, status)
        self.assertIn(words, error.message)
        self.assertIn(error.message, str(error))
        self.assertEqual(error.seed, 0)
        if status is not None:
            self.assertIn(f"HTTP {status}", str(error))
        self.assertEqual(str(pickle.loads(pickle.dumps(error))), str(error))  # as process pools need it


class Statuses(Failing):
    def test_what_may_pass_is_retried(self):
        for status in PASSING:
            with self.subTest(status=status):
                self.is_retried(refusal(status), status, "the provider's own words")

    def test_what_lasts_is_raised_at_once(self):
        for status in LASTING:
            with self.subTest(status=status):
                self.is_raised(refusal(status), status, "the provider's own words")

    def test_a_redirect_is_refused(self):
        for status in REDIRECTS:
            with self.subTest(status=status):
                other = self.serve()
                error = self.is_raised(Reply(status, headers={"Location": f"{other.url}/chat/completions"}), status)
                self.assertIn("base_url", error.advice)
                self.assertEqual(other.requests, [])

    def test_each_says_what_to_do(self):
        rows = {400: "parameters", 401: "TOGETHER_API_KEY", 402: "credit", 404: "model", 413: "shorten",
                422: "field", 429: "requests_per_minute"}
        for status, words in rows.items():
            with self.subTest(status=status):
                error = self.fails(self.serve(refusal(status)), provider="together", api_key="k")
                self.assertIn(words, error.advice)
                self.assertTrue(str(error).endswith(error.advice))
                self.assertEqual(error.provider, "together")

    def test_a_server_without_a_name_gets_advice_that_makes_sense(self):
        error = self.fails(self.serve(refusal(401)))
        self.assertNotIn("set the client's api_key", error.advice)

    def test_the_words_of_any_body(self):
        rows = {
            "OpenAI's": ({"error": {"message": "no such thing", "type": "x", "code": None}}, "no such thing"),
            "a text": ({"error": "no such thing"}, "no such thing"),
            "flat": ({"message": "no such thing"}, "no such thing"),
            "FastAPI's": ({"detail": "no such thing"}, "no such thing"),
            "FastAPI's list": ({"detail": [{"loc": ["body", "top_k"], "msg": "no such thing"}]}, "no such thing"),
            "the upstream's": ({"error": {"message": "Provider returned error", "metadata": {"raw": "no such thing"}}},
                               "no such thing"),
            "Gemini's list": ([{"error": {"message": "no such thing"}}], "no such thing"),
            "plain": (b"no such thing", "no such thing"),
            "HTML": (b"<html><head><style>p {}</style></head><body><h1>no such\n thing</h1></body></html>",
                     "no such thing"),
            "empty": (b"", "Bad Request"),
            "broken": (b'{"error": {"message": "no such thing"', "no such thing"),
            "not UTF-8": (b"\xff\xfe no such thing", "no such thing"),
            "null": (b"null", "Bad Request"),
        }
        for name, (body, words) in rows.items():
            with self.subTest(name):
                error = self.is_raised(Reply(400, body), 400, words)
                self.assertNotIn("<", error.message)
                self.assertNotIn("\n", str(error))

    def test_endless_words_are_cut(self):
        self.assertLess(len(str(self.fails(self.serve(refusal(400, "word " * 10_000))))), 2000)


class InsideA200(Failing):
    def test_the_status_that_the_error_names(self):
        for code in (429, "429", 429.0, 503, "503", 408):
            with self.subTest(code=code):
                self.is_retried(within(code=code), int(code), "the provider's own words")
        for code in (400, "401", 402, 403, "404"):
            with self.subTest(code=code):
                self.is_raised(within(code=code), int(code), "the provider's own words")

    def test_502_where_it_names_none(self):
        for error in ({}, {"code": None}, {"code": "server_error"}, {"code": 200}, {"code": 0}, {"code": -1},
                      {"code": True}, {"code": [429]}, {"code": 99999}, {"code": 10**400}):
            with self.subTest(str(error)[:40]):
                self.is_retried(within(**error), 502, "the provider's own words")
        self.is_retried(Reply(200, {"error": "the provider's own words"}), 502, "the provider's own words")

    def test_an_error_in_the_choice(self):
        good = chat().body["choices"][0]
        self.is_retried(choices({**good, "error": {"message": "cut off", "code": 504}}), 504, "cut off")
        self.is_retried(choices({**good, "error": {"message": "cut off"}}), 502, "cut off")
        self.is_retried(choices({**good, "finish_reason": "error"}), 502)
        self.is_raised(choices({**good, "finish_reason": "error", "error": {"code": 403, "message": "no"}}), 403, "no")

    def test_an_error_beside_a_good_choice(self):
        self.is_retried(replace(chat(), body={**chat().body, "error": {"message": "late", "code": 500}}), 500, "late")

    def test_vllm_names_it_at_the_top(self):
        self.is_raised(Reply(200, {"object": "error", "message": "too long", "code": 400}), 400, "too long")

    def test_no_usable_answer(self):
        rows = {
            "no choices": Reply(200, {"id": "gen-1"}),
            "choices null": Reply(200, {"choices": None}),
            "choices empty": choices(),
            "a choice null": choices(None),
            "a choice empty": choices({}),
            "a message null": choices({"message": None, "finish_reason": "stop"}),
            "a message of text": choices({"message": "fine", "finish_reason": "stop"}),
            "nothing said, no reason": choices({"message": {"content": ""}, "finish_reason": None}),
            "null": Reply(200, b"null"),
            "a list": Reply(200, b"[]"),
            "a text": Reply(200, b'"fine"'),
            "a number": Reply(200, b"42"),
        }
        for name, reply in rows.items():
            with self.subTest(name):
                self.is_retried(reply, 200)

    def test_broken_json(self):
        rows = {
            "empty": b"",
            "white space": b" \n\n   \n",
            "cut off": b'{"choices": [{"message": {"content": "fi',
            "HTML": b"<!DOCTYPE html><html><body>Just a moment...</body></html>",
            "not UTF-8": b'{"choices": "\xff\xfe"}',
            "too deep": b"[" * 200_000,
            "two": json.dumps(chat().body).encode() * 2,
        }
        for name, body in rows.items():
            with self.subTest(name):
                self.is_retried(Reply(200, body), 200, "JSON")

    def test_absurd_numbers_are_no_defect(self):
        for usage in ({"prompt_tokens": 10**400}, {"prompt_tokens": 1e308 * 10}, {"cost": 10**400},
                      {"prompt_tokens": "many"}, {"prompt_tokens": None}, [], "none", None):
            with self.subTest(str(usage)[:40]):
                self.assertEqual(self.client(self.serve(chat(usage=usage))).generate("q")[0].content, "fine")
        self.client(self.serve(chat(created=10**400))).generate("q")

    def test_streams_that_fail(self):
        half = delta(content="fi")
        rows = {
            "breaks off": (events(half, done=False), None),
            "hangs up": (events(half, done=False, hang_up="early"), None),
            "is empty": (events(), 200),
            "says nothing": (events(done=False), None),
            "an error in the middle": (events(half, {"error": {"message": "lost", "code": 503}}), 503),
            "a broken event": (events(half, "data: {\n\n"), 200),
        }
        for name, (reply, status) in rows.items():
            with self.subTest(name):
                self.is_retried(reply, status, stream=True)


class Limits(Failing):
    """Those that minutes do not mend fail at once, and say so."""

    def test_waits_above_ten_minutes(self):
        rows = (
            Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "601"}),
            Reply(503, {"error": {"message": "slow down"}}, {"Retry-After": "86400"}),
            refusal(429, metadata={"retry_after_seconds": 3600}),
            refusal(429, metadata={"headers": {"X-RateLimit-Reset": "99999999999999"}}),
            within(code=429, availability={"retryable": True, "retry_after": 3600}),
        )
        for reply in rows:
            with self.subTest(reply):
                error = self.is_raised(reply, reply.status if reply.status != 200 else 429)
                self.assertGreater(error.retry_after, 600)
                self.assertIn("minutes", error.advice)

    def test_daily_quotas(self):
        for reply in (
            refusal(429, "Rate limit exceeded: free-models-per-day. Add 10 credits"),
            refusal(429, "Daily limit reached"),
            refusal(429, "Rate limit reached on tokens per day (TPD)"),
            refusal(429, "Requests Per Day exceeded"),
            refusal(429, metadata={"limit_source": "account_daily"}),
            within(code=429, message="free-models-per-day"),
        ):
            with self.subTest(reply.body["error"]):
                self.assertIn("come back", self.is_raised(reply, 429).advice)

    def test_no_quota_left(self):
        for field in ("code", "type"):
            with self.subTest(field):
                self.assertIn("credit", self.is_raised(refusal(429, **{field: "insufficient_quota"}), 429).advice)

    def test_the_api_says_itself_whether_it_is_available(self):
        self.is_raised(refusal(503, availability={"retryable": False}), 503)
        self.is_raised(refusal(429, availability={"retryable": False, "retry_after": 5}), 429)
        self.is_retried(refusal(404, availability={"retryable": True}), 404)
        self.is_retried(refusal(503, availability={"retryable": "no"}), 503)


class NoReply(Failing):
    def test_hanging_up_at_each_stage(self):
        body = json.dumps(chat().body).encode()
        length, chunked = b"Content-Length: %d\r\n\r\n" % len(body), b"Transfer-Encoding: chunked\r\n\r\n"
        rows = {
            "before a byte": (),
            "within the status": (b"HTTP/1.1 2",),
            "after the status": (b"HTTP/1.1 200 OK\r\n",),
            "within the headers": (HEAD, b"X-Half"),
            "before the body": (HEAD, length),
            "within the body": (HEAD, length, body[:20]),
            "within a chunk": (HEAD, chunked, b"ff\r\n{"),
            "between chunks": (HEAD, chunked, b"1\r\n{\r\n"),
            "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n",),
            "no number": (b"HTTP/1.1 abc OK\r\n\r\n",),
            "a broken chunk": (HEAD, chunked, b"zz\r\n{\r\n"),
            "an absurd length": (HEAD, b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", body[:20]),
            "too long a header": (HEAD, b"X: " + b"y" * 100_000 + b"\r\n", length, body),
        }
        for name, pieces in rows.items():
            with self.subTest(name):
                server = self.raw(says(*pieces))
                error = self.fails(server, max_retries=2)
                self.assertEqual(server.connections, 3)
                self.assertIsInstance(error.status, (int, type(None)))
                self.assertTrue(error.retryable)
                self.assertTrue(error.message)
                self.assertTrue(error.advice or error.status)

    def test_statuses_that_have_no_body(self):
        for status in (204, 304):
            with self.subTest(status=status):  # and so no length either: the connection stays open behind them
                server = self.raw(says(b"HTTP/1.1 %d Nothing\r\nX: y\r\n\r\n" % status, then="keep"))
                self.assertEqual(self.fails(server, timeout=2).status, status)

    def test_a_break_within_the_body_tells_no_tale(self):
        error = self.fails(self.serve(replace(chat(), hang_up="early")))
        self.assertIsNone(error.status)  # it is the connection that failed, not the JSON
        self.assertNotIn("(0 bytes read", error.message)

    def test_a_reset(self):
        def reset(server, connection):
            read_request(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        server = self.raw(reset)
        self.assertTrue(self.fails(server, max_retries=1).retryable)
        self.assertEqual(server.connections, 2)

    def test_it_passes(self):
        for breaks in (Reply(hang_up="at once"), replace(chat(), hang_up="early"),
                       Reply(pieces=[b"{"], hang_up="early")):
            server = self.serve([breaks, chat()])
            self.assertEqual(len(self.client(server).generate("q")), 1)
            self.assertEqual(len(server.requests), 2)

    def test_a_refused_connection(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            error = self.fails(f"http://127.0.0.1:{unused.getsockname()[1]}/v1", max_retries=2)
        self.assertIn("refused", error.message)
        self.assertIn("running", error.advice)
        self.assertIsInstance(error.__cause__, ConnectionRefusedError)
        self.assertEqual(len(self.clock.slept), 2)

    def test_a_name_that_is_not_resolved(self):
        failure = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch.object(socket, "getaddrinfo", side_effect=failure):
            error = self.fails("http://api.invalid/v1", max_retries=2)
        self.assertIn("api.invalid", error.message)
        self.assertIn("base_url", error.advice)
        self.assertEqual(len(self.clock.slept), 2)

    def test_an_untrusted_certificate_is_raised_at_once(self):
        server = self.serve(tls=True)
        with environment(SSL_CERT_FILE=os.devnull):
            error = self.fails(server, max_retries=2)
            self.assertIn("SSL_CERT_FILE", error.advice)
            self.assertFalse(error.retryable)
            self.assertEqual(self.clock.slept, [])
            self.fails(server, 50, max_concurrency=4)
        self.assertLessEqual(server.connections, 5)
        self.assertEqual(server.requests, [])

    def test_no_key(self):
        with environment(OPENROUTER_API_KEY=""), self.assertRaises(APIError) as caught:
            self.client(None).generate("q")
        self.assertFalse(caught.exception.retryable)
        self.assertIn("OPENROUTER_API_KEY", str(caught.exception))


class Counted(Failing):
    """A sample that still fails after all its attempts stands in the errors."""

    @staticmethod
    def some(request):
        """Seeds 0, 3, 6 … never succeed; of each three of them the last fails in another way."""
        if request.seed % 3:
            return by_seed(request)
        return refusal(500, "out of order") if request.seed % 9 == 6 else refusal(503, "no room left")

    def test_exhaustion(self):
        server = self.serve(self.some)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = self.client(server, max_retries=2).generate("q", 9)
        self.assertEqual((len(result.responses), len(result.errors), result.num_responses), (6, 3, 9))
        self.assertEqual([(error.seed, error.status) for error in result.errors], [(0, 503), (3, 503), (6, 500)])
        self.assertTrue(all(error.retryable for error in result.errors))
        self.assertEqual([response.seed for response in result], [1, 2, 4, 5, 7, 8])
        self.assertIn("no room left", result.errors[0].message)
        self.assertEqual(server.seeds(), sorted([*range(9), *[0, 3, 6] * 2]))
        self.assertEqual(len(caught), 1)
        self.assertIn("3 of 9", str(caught[0].message))
        self.assertIn("no room left", str(caught[0].message))
        self.assertNotIn("out of order", str(caught[0].message))
        self.assertEqual(caught[0].filename, __file__)

    def test_eleven_attempts(self):
        server = self.serve(lambda request: by_seed(request) if request.seed else Reply(503))
        with self.assertWarns(UserWarning):
            self.assertEqual(len(self.client(server).generate("q", 2).errors), 1)
        self.assertEqual(server.seeds(), [0] * 11 + [1])

    def test_none_at_all(self):
        server = self.serve(lambda request: refusal(503, f"no room for {request.seed}"))
        with self.assertRaises(APIError) as caught:
            self.client(server, max_retries=1).generate("q", 5)
        self.assertEqual((caught.exception.seed, caught.exception.status), (0, 503))
        self.assertIn("no room for 0", str(caught.exception))
        self.assertEqual(len(server.requests), 10)

    def test_a_failure_is_asked_for_again_by_the_next_call(self):
        broken = [True]
        server = self.serve(lambda request: self.some(request) if broken else by_seed(request))
        client = self.client(server, max_retries=0, use_cache=True)
        with self.assertWarns(UserWarning):
            client.generate("q", 9)
        broken.clear()
        server.requests.clear()
        self.assertEqual(len(client.generate("q", 9)), 9)
        self.assertEqual(server.seeds(), [0, 3, 6])

    def test_any_mixture_adds_up(self):
        kinds = [chat(), refusal(503), Reply(429), within(code=502), choices(), Reply(200, b"<p>"),
                 Reply(hang_up="at once"), replace(chat(), hang_up="early"), Reply(408)]
        turn = itertools.count()
        server = self.serve(lambda request: kinds[next(turn) * 7 % 11 % len(kinds)])
        client = self.client(server, max_retries=1, max_concurrency=8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for result in (client.generate("q", 60), *client.generate_many(["a", "b", "c"], 20)):
                self.assertEqual(len(result.responses) + len(result.errors), result.num_responses)
                seeds = [each.seed for each in (*result.responses, *result.errors)]
                self.assertEqual(sorted(seeds), list(range(result.num_responses)))
                self.assertEqual([error.seed for error in result.errors], sorted(error.seed for error in result.errors))


class Queue(Failing):
    """What every sample would meet alike ends the queue; what is wrong with one prompt does not."""

    def test_after_no_more_than_were_in_flight(self):
        for status in (400, 401, 402, 403, 404, 413, 422, 307):
            with self.subTest(status=status):
                server = self.serve(lambda request, status=status: refusal(status, "no, and again no"))
                error = self.fails(server, 200, max_concurrency=5, max_retries=3)
                self.assertEqual(error.status, status)
                self.assertLessEqual(len(server.requests), 5)

    def test_after_some_succeeded(self):
        """Then it is bad luck, until it happens more than twenty times in a row."""
        server = self.serve(lambda request: by_seed(request) if request.seed < 20 else refusal(402))
        with self.assertWarnsRegex(UserWarning, "180 of 200 samples failed"):
            result = self.client(server, max_concurrency=1).generate("q", 200)
        self.assertEqual((len(result), len(result.errors)), (20, 180))
        self.assertEqual(len(server.requests), 20 + 21)
        self.assertEqual(result.errors[0].status, 402)
        self.assertIn("never sent", result.errors[-1].message)
        self.assertIsNone(result.errors[-1].status)

    def test_those_that_wait_for_a_retry_are_dropped(self):
        retrying = threading.Event()
        self.clock.sleep = lambda *how: (retrying.set(), until_cancelled(*how))
        server = self.serve(
            lambda request: refusal(503) if request.seed == 0 else replace(refusal(401), wait=retrying))
        self.assertEqual(self.fails(server, 2, max_retries=5).status, 401)
        self.assertEqual(len(server.requests), 2)

    def test_one_prompt_is_refused_and_the_others_go_on(self):
        def answer(request):
            return refusal(status, "not that one") if "bad" in str(request.body["messages"]) else by_seed(request)

        for status in (400, 403, 413, 422):
            with self.subTest(status=status):
                server = self.serve(answer)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    results = self.client(server, max_concurrency=2).generate_many(["good", "bad", "fine"], 10)
                self.assertEqual([len(result) for result in results], [10, 0, 10])
                self.assertEqual([len(result.errors) for result in results], [0, 10, 0])
                self.assertEqual([error.seed for error in results[1].errors], list(range(10)))
                self.assertEqual({error.status for error in results[1].errors}, {status, None})
                self.assertIn("never sent", str(results[1].errors[9]))
                self.assertIn("not that one", str(results[1].errors[9]))
                self.assertLessEqual(len(server.requests), 22)
                self.assertEqual(len(caught), 1)
                self.assertIn("10 of 30", str(caught[0].message))

    def test_all_prompts_are_refused(self):
        with self.assertRaises(APIError) as caught:
            self.client(self.serve(refusal(400))).generate_many(["a", "b"], 3)
        self.assertEqual(caught.exception.status, 400)

    def test_what_meets_every_prompt_ends_them_all(self):
        for status in (401, 402, 404, 307):
            with self.subTest(status=status):
                server = self.serve(refusal(status))
                with self.assertRaises(APIError) as caught:
                    self.client(server, max_concurrency=3).generate_many([f"q{index}" for index in range(20)], 10)
                self.assertEqual(caught.exception.status, status)
                self.assertLessEqual(len(server.requests), 3)

    def test_the_client_goes_on_after_it(self):
        server = self.serve([refusal(401), chat()])
        client = self.client(server)
        with self.assertRaises(APIError):
            client.generate("q")
        self.assertEqual(len(client.generate("q", 3)), 3)


KEY = "sk-or-v1-3f9c2ab77e61d04588"


def told_by(error):
    """All that an exception says, and those behind it."""
    seen, texts, left = set(), [], [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        texts += [str(one), repr(one), *traceback.format_exception(type(one), one, None)]
        texts += [repr(getattr(one, name, None)) for name in dir(one) if not name.startswith("__")]
        left += [one.__cause__, one.__context__]
    return "\n".join(texts)


class TheKey(Failing):
    def setUp(self):
        super().setUp()
        self.log, self.stderr = io.StringIO(), io.StringIO()
        handler = logging.StreamHandler(self.log)
        logger = logging.getLogger()
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        self.addCleanup(logger.setLevel, level)
        self.addCleanup(logger.removeHandler, handler)
        self.enter(contextlib.redirect_stderr(self.stderr))

    def is_hidden(self, *texts):
        """Prove that the key, or as much of it as could be used, is in none of *texts*, nor in what was logged."""
        logged = self.log.getvalue(), self.stderr.getvalue()
        for stream in (self.log, self.stderr):
            stream.seek(0)
            stream.truncate()
        for text in (*texts, *logged):
            self.assertNotIn(KEY[:15], text)
        return logged

    def test_a_server_that_echoes_it(self):
        body = json.dumps(chat().body).encode()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        key = KEY.encode()
        rows = {
            "in a message": refusal(401, f"Incorrect API key provided: {KEY}."),
            "in a message that is retried": refusal(503, f"Bearer {KEY}"),
            "in the upstream's words": refusal(400, metadata={"raw": json.dumps({"authorization": f"Bearer {KEY}"})}),
            "in another field": refusal(400, message={"headers": {"Authorization": f"Bearer {KEY}"}}),
            "in plain text": Reply(403, f"who is {KEY}?".encode()),
            "in HTML": Reply(502, f"<html><p>Authorization: Bearer {KEY}</p></html>".encode()),
            "inside a 200": within(message=KEY, code=401),
            "in a text that is no JSON": Reply(200, b"Authorization: Bearer " + key),
            "in a text that is cut within it": Reply(200, b"x" * 180 + key),
            "in a message that is cut within it": refusal(400, "x" * 980 + KEY),
            "in a text whose reading is cut within it": Reply(400, b"x" * 19_980 + key),
            "in JSON that is broken": Reply(200, b'{"authorization": "' + key),
            "in a stream that is broken": events('data: {"' + KEY + "\n\n"),
            "in a header": Reply(307, headers={"Location": f"http://127.0.0.1:9/?key={KEY}"}),
            "as the status": (key + b"\r\n\r\n",),
            "as the status, cut within it": (b"x" * 180 + key + b"\r\n\r\n",),
            "as the version": (b"HTTP/" + key + b" 200 OK\r\n\r\n",),
            "as the reason": (b"HTTP/1.1 500 " + key + b"\r\nContent-Length: 0\r\n\r\n",),
            "as the status's number": (b"HTTP/1.1 " + key + b" OK\r\n\r\n",),
            "as a chunk's length": (HEAD, b"Transfer-Encoding: chunked\r\n\r\n", key + b"\r\n"),
            "as the content's length": (HEAD, b"Content-Length: " + key + b"\r\n\r\n"),
            "within a body that breaks off": (HEAD, length, key),
        }
        for name, reply in rows.items():
            with self.subTest(name):
                server = self.raw(says(*reply)) if isinstance(reply, tuple) else self.serve(reply)
                error = self.fails(
                    server, 2, api_key=KEY, verbose=True, max_concurrency=1, max_retries=1, provider="together")
                log, stderr = self.is_hidden(told_by(error), repr(error.to_dict()), repr(pickle.dumps(error)))
                self.assertIn("seed 0", log)
                self.assertIn("seed 0", stderr)

    def test_a_warning_and_the_errors_do_not_show_it(self):
        server = self.serve(lambda request: by_seed(request) if request.seed else refusal(503, f"bad key {KEY}"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = self.client(server, api_key=KEY, max_retries=1).generate("q", 3)
        self.is_hidden(str(caught[0].message), repr(result.to_dict()), repr(result), *map(told_by, result.errors))

    def test_connections_that_fail_do_not_show_it(self):
        for url in ("http://127.0.0.1:9/v1", "https://127.0.0.1:9/v1"):
            self.is_hidden(told_by(self.fails(url, api_key=KEY, verbose=True)))
        server = self.serve(tls=True)
        with environment(SSL_CERT_FILE=os.devnull):
            self.is_hidden(told_by(self.fails(server, api_key=KEY)))

    def test_reprs_and_pickles(self):
        server = self.serve()
        client = self.client(server, api_key=KEY)
        client.generate("q")
        config = rollouts.Config(model="m", api_key=KEY)
        self.is_hidden(repr(client), str(client), repr(config), str(config), repr(config.to_dict()), repr(vars(client)),
                       repr(client.api_key), f"{client!r:s}")
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            for thing in (client, config, config.to_dict()):
                self.is_hidden(pickle.dumps(thing, protocol).decode("latin-1"))
        self.assertIsNone(pickle.loads(pickle.dumps(client)).api_key)
        self.assertEqual(server.requests[0].headers["authorization"], f"Bearer {KEY}")

    def test_caches(self):
        for kind in ("json", "sql"):
            with self.subTest(kind):
                cache_dir = os.path.join(self.directory, kind)
                client = self.client(self.serve(), api_key=KEY, use_cache=kind, cache_dir=cache_dir)
                client.generate("q", 3)
                client.generate_many(["a", "b"], 2)
                files = [os.path.join(folder, name) for folder, _, names in os.walk(cache_dir) for name in names]
                self.assertTrue(files)
                for path in files:
                    with open(path, "rb") as file:
                        self.is_hidden(path, file.read().decode("latin-1"))
                client.close()

    def test_a_redirect_does_not_take_it_along(self):
        for status in REDIRECTS:
            other = self.serve()
            self.fails(self.serve(Reply(status, headers={"Location": other.url + "/chat/completions"})), api_key=KEY)
            self.assertEqual((other.requests, other.connections), ([], 0))

    def test_one_that_ends_in_a_newline_works(self):
        for settings, variables in (
            ({"api_key": KEY + "\n"}, {}), ({"api_key": f" {KEY}\r\n"}, {}),
            ({"provider": "together"}, {"TOGETHER_API_KEY": KEY + "\n"}),
        ):
            server = self.serve()
            with mock.patch.dict(os.environ, variables):
                self.client(server, **settings).generate("q")
            self.assertEqual(server.requests[0].headers["authorization"], f"Bearer {KEY}")

    def test_one_for_a_call(self):
        server = self.serve([refusal(401, f"no {KEY}")])
        with self.assertRaises(APIError) as caught:
            self.client(server, api_key="another").generate("q", api_key=KEY)
        self.assertEqual(server.requests[0].headers["authorization"], f"Bearer {KEY}")
        self.is_hidden(told_by(caught.exception))

    def test_one_that_no_header_takes_is_refused_unseen(self):
        server = self.serve()
        client = self.client(server, provider="together", api_key="another")
        plain = self.client(server, provider="together")
        for key in (KEY + "\0", KEY + "\nHost: x", f"{KEY}\r\nX: y", KEY + "é", f"{KEY} {KEY}", KEY.encode(), [KEY],
                    KEY + "\x7f"):
            calls = [lambda key=key: self.client(server, api_key=key),
                     lambda key=key: client.generate("q", api_key=key),
                     lambda key=key: rollouts.Config(model="m", api_key=key)]
            if isinstance(key, str) and "\0" not in key:
                calls.append(lambda: plain.generate("q"))
            for call in calls:
                with self.subTest(key), mock.patch.dict(
                        os.environ, {"TOGETHER_API_KEY": key} if len(calls) == 4 else {}):
                    with self.assertRaisesRegex(ValueError, "(api_key|API_KEY) takes") as caught:
                        call()
                    self.is_hidden(told_by(caught.exception))
        self.assertEqual(server.requests, [])

    def test_a_model_that_no_terminal_should_see_is_refused(self):
        server = self.serve()
        client = self.client(server, api_key=KEY)
        for model in ("m\r\nX: y", "m\x1b[31m", "m\0", "", "  ", None, 7):
            for call in (lambda model=model: RolloutsClient(model, api_key=KEY),
                         lambda model=model: client.generate("q", model=model)):
                with self.subTest(model=model):
                    with self.assertRaisesRegex(ValueError, "model takes") as caught:
                        call()
                    self.assertFalse(set("\n\r\x1b\0") & set(str(caught.exception)))
                    self.is_hidden(told_by(caught.exception))
        self.assertEqual(server.requests, [])

    def test_a_client_that_another_api_is_asked_through_keeps_it(self):
        other = self.serve()
        client = self.client(self.serve(), provider="together", api_key=KEY)
        with mock.patch.dict(os.environ, {"FIREWORKS_API_KEY": "theirs"}):
            client.generate("q", provider="fireworks", base_url=other.url)
        self.assertEqual(other.requests[0].headers["authorization"], "Bearer theirs")


if __name__ == "__main__":
    unittest.main()
