"""The API's own words, what it says about waiting, and which of its limits last."""

import email.utils
import json
import time
import unittest

from tests import rollouts
from tests.case import Case, Clock
from tests.server import Reply, chat, delta, events

APIError = rollouts.APIError
HOUR = 3600


class Words(Case):
    settings = {"use_cache": False}

    def setUp(self):
        super().setUp()
        self.use_clock(Clock())

    def fails(self, reply, **settings):
        with self.assertRaises(APIError) as caught:
            self.client(self.serve(reply), max_retries=0, **settings).generate("q")
        return caught.exception

    # Bodies that say "no such thing" each in its way.
    BODIES = {
        "OpenAI": {"error": {"message": "no such thing", "type": "x", "code": None}},
        "words": {"error": "no such thing"},
        "flat": {"message": "no such thing"},
        "Cloudflare": {"errors": [{"message": "no such thing"}]},
        "Cloudflare, in full": {
            "result": None, "success": False, "errors": [{"code": 7003, "message": "no such thing"}],
                                "messages": []},
        "errors of words": {"errors": ["no such thing"]},
        "errors by field": {"errors": {"top_k": ["no such thing"]}},
        "an object of errors": {"errors": {"message": "no such thing"}},
        "Databricks": {"error_code": "BAD_REQUEST", "message": "no such thing"},
        "MiniMax": {"base_resp": {"status_code": 1008, "status_msg": "no such thing"}},
        "MiniMax, with nulls": {
            "id": "1", "choices": None, "base_resp": {"status_code": 2013, "status_msg": "no such thing"}},
        "z.ai": {"msg": "no such thing"},
        "z.ai, in full": {"code": 1214, "msg": "no such thing", "success": False},
        "success false": {"success": False, "errors": [{"code": 1, "message": "no such thing"}]},
        "success false, a text": {"success": False, "error": "no such thing"},
        "FastAPI": {"detail": "no such thing"},
        "FastAPI, a list": {"detail": [{"loc": ["body", "top_k"], "msg": "no such thing", "type": "x"}]},
        "FastAPI, an object": {"detail": {"error": "no such thing"}},
        "problem+json": {
            "type": "about:blank", "title": "Bad Request", "status": 400, "detail": "no such thing"},
        "OAuth": {"error": "invalid_request", "error_description": "no such thing"},
        "Spring": {"timestamp": "2026", "status": 400, "error": "Bad Request", "message": "no such thing",
            "path": "/v1"},
        "NestJS": {"statusCode": 400, "message": ["no such thing"], "error": "Bad Request"},
        "Apigee": {"fault": {"faultstring": "no such thing", "detail": {"errorcode": "x"}}},
        "AWS": {"Message": "no such thing"},
        "AWS, its type": {"__type": "ValidationException", "message": "no such thing"},
        "DashScope": {"code": "InvalidParameter", "message": "no such thing", "request_id": "r"},
        "Gemini": [{"error": {"code": 400, "message": "no such thing", "status": "INVALID_ARGUMENT"}}],
        "a list of words": ["no such thing"],
        "an error within an error": {"error": {"error": {"message": "no such thing"}}},
        "an error in a text": {"error": {"message": json.dumps({"error": {"message": "no such thing"}})}},
        "a msg within": {"error": {"code": "x", "msg": "no such thing"}},
        "a detail within": {"error": {"type": "x", "detail": "no such thing"}},
        "a reason": {"status": "error", "reason": "no such thing"},
        "a description": {"statusCode": 400, "description": "no such thing"},
        "in a list": {"message": ["no such thing", "and none such"]},
        "the upstream's": {
            "error": {"message": "Provider returned error", "metadata": {"raw": "no such thing"}}},
        "TGI": {"error": "no such thing", "error_type": "validation"},
        "vLLM": {"object": "error", "message": "no such thing", "type": "BadRequestError", "param": None,
            "code": 400},
        "a message that is empty": {"error": {"message": "", "code": "no such thing"}},
        "nothing known": {"kaput": {"why": ["no such thing"]}},
    }

    def test_of_a_refusal(self):
        for name, body in self.BODIES.items():
            with self.subTest(name):
                error = self.fails(Reply(400, body))
                self.assertIn("no such thing", error.message)
                self.assertEqual((error.status, error.retryable), (400, False))
                self.assertNotIn("\\u", error.message)

    def test_inside_a_200(self):
        for name, body in self.BODIES.items():
            with self.subTest(name):
                self.assertIn("no such thing", self.fails(Reply(200, body)).message)
                text = json.dumps(body)
                stream = {"Content-Type": "text/event-stream"}
                self.assertIn("no such thing", self.fails(Reply(200, text.encode(), stream)).message)
                self.assertIn(
                    "no such thing", self.fails(Reply(200, f"data: {text}\n\n".encode(), stream)).message)

    def test_of_other_forms(self):
        for name, (body, words) in {
            "plain": (b"no such thing", "no such thing"),
            "a text as JSON": (b'"no such thing"', "no such thing"),
            "cut off": (b'{"error": {"message": "no such thing"', "no such thing"),
            "XML": (b"<Error><Code>x</Code><Message>no such thing</Message></Error>", "no such thing"),
            "an event": (b'data: {"error": {"message": "no such thing"}}\n\n', "no such thing"),
            "an event of that name": (
                b'event: error\ndata: {"message": "no such thing"}\n\n', "no such thing"),
            "empty": (b"", "Bad Request"),
            "an empty object": (b"{}", ""),
        }.items():
            with self.subTest(name):
                error = self.fails(Reply(400, body))
                self.assertIn(words, error.message)
                self.assertNotIn("<", error.message)
                self.assertTrue(error.message)
                self.assertNotIn("data:", error.message)

    def test_html_says_it_once(self):
        for page in (
            "<html><head><title>502 Bad Gateway</title></head><body><center><h1>502 Bad Gateway</h1></center>"
            "<hr><center>nginx</center></body></html>",
            "<!DOCTYPE html>\n<HTML><HEAD><TITLE>502 Bad Gateway</TITLE></HEAD>\n"
            "<BODY><h1>502 Bad Gateway</h1></BODY>",
            "<html><head>\n<title>\n502 Bad Gateway\n</title>\n</head>"
            "<body>\n<h2>502  Bad Gateway</h2></body></html>",
        ):
            for status in (502, 200):
                with self.subTest(page[:20], status=status):
                    message = self.fails(Reply(status, page.encode(), {"Content-Type": "text/html"})).message
                    self.assertEqual(message.count("Bad Gateway"), 1)
        message = self.fails(
            Reply(502, b"<html><head><title>Oops</title></head><body>Come back later</body>")).message
        self.assertIn("Oops", message)
        self.assertIn("Come back later", message)

    def test_letters_are_letters(self):
        words = "参数错误, é, 😀"
        for name, body in {
            "a list": {"detail": [{"loc": ["body"], "msg": words}]},
            "errors": {"errors": [{"message": words}]},
            "nothing known": {"kaput": words}, "an object": {"error": {"message": {"zh": words}}},
            "a list of words": [words],
            "the upstream's": {"error": {"message": "m", "metadata": {"raw": {"zh": words}}}},
        }.items():
            for ascii_only in (True, False):
                for status in (400, 200):
                    with self.subTest(name, ascii_only=ascii_only, status=status):
                        text = json.dumps(body, ensure_ascii=ascii_only).encode()
                        self.assertIn(words, self.fails(Reply(status, text)).message)

    def test_a_long_body_is_cut(self):
        for body in (
                {"kaput": "word " * 100_000}, {"errors": [{"message": "word " * 100_000}]},
                ["word"] * 100_000):
            for status in (400, 200):
                with self.subTest(status=status):
                    error = self.fails(Reply(status, body))
                    self.assertIn("word", error.message)
                    self.assertLess(len(str(error)), 2000)

    def test_openrouters_metadata(self):
        def of(status=400, **metadata):
            return Reply(
                status, {"error": {"message": "Provider returned error", "code": 400, "metadata": metadata}})

        for name, reply, words in (
            ("upstream", of(raw="m", provider_name="DeepInfra"), ["DeepInfra", "m"]),
            ("no raw", of(provider_name="Nebius"), ["Nebius"]),
            ("inside a 200", of(200, provider_name="Nebius", raw="m"), ["Nebius"]),
            (
                "moderation", of(
                    403, reasons=["violence", "self-harm"], provider_name="OpenAI", flagged_input="kill"),
             ["violence", "self-harm", "OpenAI"]),
            ("in a choice", Reply(200, {"choices": [{"finish_reason": "error", "error": {
                "message": "m", "code": 502, "metadata": {"provider_name": "Groq"}}}]}), ["Groq"]),
            ("in a stream", events(delta(content="fi"), {"error": {
                "message": "m", "code": 502, "metadata": {"provider_name": "Groq"}}}), ["Groq"]),
        ):
            with self.subTest(name):
                error = self.fails(reply)
                for word in words:
                    self.assertIn(word, f"{error} {vars(error)}")
        for odd in (None, 5, [], {"provider_name": None}, {"reasons": None},
                {"provider_name": ["x"], "reasons": "y"}):
            with self.subTest(odd=odd):
                self.assertIn(
                    "m", self.fails(Reply(400, {"error": {"message": "m", "metadata": odd}})).message)


class Waits(Case):
    settings = {"use_cache": False}

    def waited(self, reply):
        """Seconds from a failure to the next attempt, without jitter."""
        clock, times = self.use_clock(Clock()), []

        def script(request):
            times.append(clock.time)
            return reply if len(times) == 1 else chat()

        self.client(self.serve(script)).generate("q")
        return times[1] - times[0]

    def rows(self):
        def date(seconds):
            return email.utils.formatdate(now + seconds, usegmt=True)

        now = int(time.time())
        for name, off in (("", 0), (", a clock an hour ahead", HOUR), (", an hour late", -HOUR),
                (", a day ahead", 24 * HOUR)):
            told = {"Date": date(off)}
            yield "seconds" + name, {"Retry-After": "30", **told}, 30
            yield "Unix seconds" + name, {"Retry-After": str(now + off + 30), **told}, 30
            yield "Unix seconds with a point" + name, {"Retry-After": f"{now + off + 30}.5", **told}, 30.5
            yield "Unix milliseconds" + name, {"Retry-After": str((now + off + 30) * 1000), **told}, 30
            yield "a date" + name, {"Retry-After": date(off + 30), **told}, 30
            yield "a date that is over" + name, {"Retry-After": date(off - 30), **told}, 0
            yield "Unix seconds that are over" + name, {"Retry-After": str(now + off - 30), **told}, 0
            yield "X-RateLimit-Reset" + name, {"X-RateLimit-Reset": str((now + off + 30) * 1000), **told}, 30
            yield "X-RateLimit-Reset in seconds" + name, {
                "x-ratelimit-reset": str(now + off + 30), **told}, 30
            yield "LiteLLM, Unix" + name, {"llm_provider-retry-after": str(now + off + 30), **told}, 30
            yield "LiteLLM, a date" + name, {"llm_provider-retry-after": date(off + 30), **told}, 30
            yield "retry-after-ms" + name, {"retry-after-ms": "2500", **told}, 2.5
        yield "LiteLLM", {"llm_provider-retry-after": "30"}, 30
        yield "LiteLLM, other letters", {"LLM_Provider-Retry-After": "30"}, 30
        yield "the longer", {"llm_provider-retry-after": "30", "Retry-After": "3"}, 30
        yield "no Date: Unix seconds", {"Retry-After": str(now + 30)}, 30
        yield "no Date: Unix milliseconds", {"Retry-After": str((now + 30) * 1000)}, 30
        yield "a Date that is none", {"Retry-After": str(now + 30), "Date": "soon"}, 30
        yield "a Date that is none, seconds", {"Retry-After": "30", "Date": ""}, 30
        yield "a fraction", {"Retry-After": "0.5"}, 0.5
        yield "blanks", {"Retry-After": " 30 "}, 30
        yield "ten minutes", {"Retry-After": "600"}, 600
        for odd in ("soon", "-5", "nan", "inf", "1e400", "9" * 400, "", "0", "{}", "-1764066120"):
            yield "odd: " + odd[:20], {"Retry-After": odd}, 0

    def test_they_are_obeyed(self):
        for name, headers, seconds in self.rows():
            with self.subTest(name):
                reply = Reply(429, {"error": {"message": "slow down"}}, headers)
                self.assertAlmostEqual(self.waited(reply), seconds, delta=2 if seconds >= 30 else 0.01)

    def test_in_the_body(self):
        now = int(time.time())
        date = {"Date": email.utils.formatdate(now + HOUR, usegmt=True)}
        for metadata in (
            {"headers": {"Retry-After": str(now + HOUR + 30)}},
            {"headers": {"retry-after": (now + HOUR + 30) * 1000}},
            {"headers": {"X-RateLimit-Reset": str((now + HOUR + 30) * 1000)}}, {"retry_after_seconds": 30},
            {"headers": {"llm_provider-retry-after": 30}},
        ):
            for status in (429, 200):
                with self.subTest(metadata, status=status):
                    body = {"error": {"message": "slow down", "code": 429, "metadata": metadata}}
                    self.assertAlmostEqual(self.waited(Reply(status, body, date)), 30, delta=2)

    def test_what_is_said_of_them(self):
        now = int(time.time())
        for value in (str(now + 7200), str((now + 7200) * 1000), "7200",
                email.utils.formatdate(now + 7200, usegmt=True)):
            with self.subTest(value):
                self.use_clock(Clock())
                with self.assertRaises(APIError) as caught:
                    self.client(self.serve(Reply(429, b"", {"Retry-After": value}))).generate("q")
                error = caught.exception
                self.assertAlmostEqual(error.retry_after, 7200, delta=5)
                self.assertRegex(str(error), r"\b(119|120|121) minutes|\b2 hours")
                self.assertEqual(self.clock.slept, [])


class Quotas(Case):
    settings = {"use_cache": False}

    def setUp(self):
        super().setUp()
        self.use_clock(Clock())

    @staticmethod
    def refusal(status=429, message="no", **fields):
        return Reply(status, {"error": {"message": message, **fields}})

    def lasting(self):
        refusal = self.refusal
        yield "insufficient_quota", refusal(type="insufficient_quota")
        yield "the code of it", refusal(
            code="insufficient_quota", message="You exceeded your current quota, please check")
        yield "insufficient_balance_error", refusal(type="insufficient_balance_error")
        yield "insufficient balance in a 500", refusal(500, "insufficient balance")
        yield "in other letters", refusal(500, "Insufficient Balance")
        yield "and more of it", refusal(429, "Insufficient balance or no resource package. Please recharge.")
        yield "Moonshot", refusal(type="exceeded_current_quota_error", message="Your account is suspended")
        yield "z.ai", refusal(code="1113")
        yield "z.ai, a number", refusal(code=1113)
        yield "z.ai, flat", Reply(429, {"code": 1113, "msg": "no"})
        yield "MiniMax", Reply(
            200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}})
        yield "ModelScope", refusal(429, "You have exceeded today's quota for model X")
        yield "today's quota, the other way", refusal(429, "today's quota is exceeded")
        yield "GitHub", refusal(429, "Rate limit of 50 per 86400s exceeded for UserByModelByDay.")
        yield "GitHub, its seconds", refusal(429, "Rate limit of 150 per 86400s exceeded")
        yield "GitHub, its name", refusal(429, "Rate limit exceeded for UserByModelByDay")
        yield "ByDay as the code", refusal(429, code="RateLimitReachedByDay")
        yield "OpenRouter", refusal(429, "Rate limit exceeded: free-models-per-day. Add 10 credits")
        yield "OpenRouter, its source", refusal(429, metadata={"limit_source": "openrouter_free_tier_daily"})
        yield "per day", refusal(429, "Requests Per Day exceeded")
        yield "a daily limit", refusal(429, "Daily limit exceeded")
        yield "TPD", refusal(429, "Rate limit exceeded: tokens per day (TPD)")
        yield "inside a 200", Reply(
            200, {"error": {"message": "no", "code": 429, "type": "insufficient_quota"}})
        yield "inside a stream", events(
            {"error": {"message": "no", "code": 429, "type": "insufficient_balance_error"}})
        yield "RPD", refusal(429, "Rate limit reached: requests per day (RPD): Limit 1000, Used 1000")
        yield "a stroke", refusal(429, "Limit of 500 requests/day exceeded")
        yield "24 hours", refusal(429, "Quota exceeded: 1000 requests per 24 hours")
        yield "by the month", refusal(429, "Monthly quota exceeded")
        yield "billing", refusal(429, code="billing_hard_limit_reached")
        yield "a plan's other limit", refusal(
            429, "Rate limit exceeded: 200 per day (this plan: 20 per minute, 200 per day)")

    def passing(self):
        refusal = self.refusal
        plan = "(this plan: 20 per minute, 200 per day)"
        yield "a plan's limits", refusal(429, f"Rate limit exceeded: 20 per minute {plan}")
        yield "the same with words between", refusal(429, f"You have exceeded 20 requests per minute {plan}")
        yield "the other way", refusal(429, f"20 per minute exceeded {plan}")
        yield "told of the day beside", refusal(
            429, "Requests per minute exceeded. Your daily quota is not affected.")
        yield "a minute's source", refusal(
            429, "free-models-per-min, not free-models-per-day",
            metadata={"limit_source": "openrouter_free_tier_per_minute"})
        yield "per 60s", refusal(
            429, "Rate limit of 10 per 60s exceeded for UserByModelByMinute. See the limits per day.")
        yield "ByMinute", refusal(429, "Rate limit of 10 per 60s exceeded for UserByModelByMinute.")
        yield "Gemini", refusal(
            429, "Quota exceeded for metric: free_tier_requests, GenerateRequestsPerMinutePerProject")
        yield "Moonshot", refusal(
            429, "max RPM: 3, please try again after 1 seconds", type="rate_limit_reached_error")
        yield "today", refusal(429, "Many requests today, please slow down")
        yield "a service that is down", refusal(503, "The daily maintenance is under way")
        yield "a load balancer", refusal(503, "insufficient healthy targets behind the load balancer")
        yield "overloaded", refusal(429, "overloaded", type="engine_overloaded_error")
        yield "rate_limit_exceeded", refusal(429, code="rate_limit_exceeded", type="requests")
        yield "1302: z.ai's concurrency", refusal(429, "Too many requests", code="1302")
        yield "1113 of something", refusal(
            429, "Rate limit reached: Limit 2000, Requested 1113 tokens per minute")
        yield "a number that holds 1113", refusal(429, "request 11130 of 21113 was too fast")
        yield "capacity", refusal(429, "Insufficient capacity, try again", code="insufficient_capacity")

    def test_what_lasts_is_not_retried(self):
        for name, reply in self.lasting():
            with self.subTest(name):
                self.clock.slept.clear()
                server = self.serve(reply)
                with self.assertRaises(APIError) as caught:
                    self.client(server).generate("q", 20, max_concurrency=2)
                self.assertFalse(caught.exception.retryable)
                self.assertTrue(caught.exception.advice)
                self.assertLessEqual(len(server.requests), 2)
                self.assertEqual(self.clock.slept, [])

    def test_what_passes_is_retried(self):
        for name, reply in self.passing():
            with self.subTest(name):
                server = self.serve([reply, reply, chat()])
                self.assertEqual(len(self.client(server).generate("q")), 1)
                self.assertEqual(len(server.requests), 3)


if __name__ == "__main__":
    unittest.main()
