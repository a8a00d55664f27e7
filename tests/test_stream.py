"""Streamed replies: put together from any pieces into the very same Response, or a failure that is retried."""

import json
import random
import tempfile
import threading
import time
import unittest
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from tests import rollouts
from tests.case import Case
from tests.server import Reply, Request, Server, chat, delta, events

APIError, RolloutsClient = rollouts.APIError, rollouts.RolloutsClient
DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
STREAM = {"Content-Type": "text/event-stream"}


def event(finish_reason: Optional[str] = None, **fields: Any) -> bytes:
    """The bytes of one event with a delta."""
    return b"data: " + json.dumps(delta(finish_reason, **fields)).encode() + b"\n\n"


def usage_event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({**delta(), "choices": [], "usage": {**USAGE, **fields}}).encode() + b"\n\n"


GOOD = b"".join((
    event(role="assistant", content=""), event(content="2 x 4 "), event(content="= 8"), event("stop"),
    usage_event(), DONE))


def raw(*pieces: bytes, **options: Any) -> Reply:
    """A streamed reply of just these bytes."""
    return Reply(headers=dict(STREAM), pieces=pieces, **options)


class Streamed(Case):
    settings = {"stream": True, "use_cache": False, "api_key": "k", "max_retries": 3, "timeout": 60}

    def setUp(self) -> None:
        super().setUp()
        self.use_clock()

    def ask(self, script: Any, prompt: Any = "What is 2 x 4?", **settings: Any) -> Tuple[Any, List[Request]]:
        """The response to *prompt*, and the requests that it took."""
        server = self.serve(script)
        with self.client(server, **settings) as client:
            return client.generate(prompt)[0], server.requests

    def failure(self, script: Any, **settings: Any) -> Any:
        """The APIError that a sample ends with."""
        with self.assertRaises(APIError) as caught:
            self.ask(script, **{"max_retries": 0, **settings})
        return caught.exception


class Reading(Streamed):
    """What a stream may look like."""

    def assert_good(self, response: Any) -> None:
        self.assertEqual(
            (response.content, response.reasoning, response.finish_reason, response.usage.total_tokens,
             response.response_id),
            ("2 x 4 = 8", None, "stop", 15, "gen-1"))

    def test_layouts(self) -> None:
        body = json.dumps(delta(content="2 x 4 = 8"), indent=1)
        many_lines = b"".join(b"data: " + line.encode() + b"\n" for line in body.splitlines()) + b"\n"
        for name, stream in (
            ("plain", GOOD),
            ("CRLF", GOOD.replace(b"\n", b"\r\n")),
            ("no space after the colon", GOOD.replace(b"data: ", b"data:")),
            ("comments", b": OPENROUTER PROCESSING\n\n" + GOOD.replace(b"\n\n", b"\n\n: OPENROUTER PROCESSING\n\n")),
            ("a comment within an event", GOOD.replace(b"data: ", b": ping\ndata: ")),
            ("blank lines", GOOD.replace(b"\n\n", b"\n\n\n\n\n")),
            ("other fields", GOOD.replace(b"data: ", b"event: message\nid: 7\nretry: 1000\ndata: ")),
            ("an event of several lines", many_lines + event("stop") + usage_event() + DONE),
            ("no blank line after the end", GOOD[:-2]),
            ("one newline after the end", GOOD[:-1]),
            ("no [DONE], but a finish reason", GOOD[: -len(DONE)]),
            ("a role in each delta", GOOD.replace(b'"delta": {"', b'"delta": {"role": "assistant", "')),
            ("an event without choices", b'data: {"id": "gen-1", "choices": null}\n\n' + GOOD),
            ("an event that says nothing", b"data: null\n\ndata: {}\n\n" + GOOD),
            ("usage with the finish reason", event(content="2 x 4 = 8")
                + b"data: " + json.dumps({**delta("stop"), "usage": USAGE}).encode() + b"\n\n" + DONE),
            ("usage that grows", usage_event(completion_tokens=1, total_tokens=11) + GOOD),
            ("another choice", b'data: {"choices": [{"index": 1, "delta": {"content": "no"}}]}\n\n' + GOOD),
            ("words after [DONE]", GOOD + event(content="no")),
        ):
            with self.subTest(name):
                response, requests = self.ask(raw(stream))
                self.assert_good(response)
                self.assertEqual(len(requests), 1)

    def test_bytes_split_anywhere(self) -> None:
        """However the network cuts a stream, CRLF, comments and letters of several bytes included."""
        text = "Zwölf … 数 🦊 8"
        stream = b": ping\r\n\r\n" + b"".join(
            b"data: " + json.dumps(delta(content=letter), ensure_ascii=False).encode() + b"\r\n\r\n" for letter in text)
        stream += (event("stop") + usage_event() + DONE).replace(b"\n", b"\r\n")
        chance = random.Random(1)

        def cut(_: Request) -> Reply:
            cuts = sorted(chance.sample(range(1, len(stream)), chance.choice((1, 2, 10, 100, len(stream) - 1))))
            return raw(*(stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)])))

        for index in range(25):
            with self.subTest(index):
                response, _ = self.ask(cut, max_retries=0)
                self.assertEqual((response.content, response.usage.total_tokens), (text, 15))

    def test_a_content_length(self) -> None:
        response, _ = self.ask(Reply(headers=dict(STREAM), body=GOOD))
        self.assert_good(response)

    def test_a_charset(self) -> None:
        response, _ = self.ask(Reply(headers={"Content-Type": "text/event-stream; charset=utf-8"}, body=GOOD))
        self.assert_good(response)

    def test_a_server_that_ignores_it(self) -> None:
        response, (request,) = self.ask(chat("2 x 4 = 8"))
        self.assert_good(response)
        self.assertIs(request.body["stream"], True)

    def test_a_server_that_streams_unasked(self) -> None:
        response, (request,) = self.ask(raw(GOOD), stream=False)
        self.assert_good(response)
        self.assertNotIn("stream", request.body)

    def test_usage_that_never_comes_is_zero(self) -> None:
        response, requests = self.ask(events(delta(content="8"), delta("stop")))
        self.assertEqual((response.content, response.usage), ("8", rollouts.Usage()))
        self.assertEqual(len(requests), 1)

    def test_details_of_usage(self) -> None:
        response, _ = self.ask(raw(event(content="8"), event("stop"), usage_event(
            cost=0.25, completion_tokens_details={"reasoning_tokens": 3}, prompt_tokens_details={"cached_tokens": 2}),
            DONE))
        self.assertEqual(response.usage, rollouts.Usage(10, 5, 15, 3, 2, 0.25))

    def test_names_come_from_whichever_event_has_them(self) -> None:
        first = {"id": "gen-7", "model": "m-2025", "provider": "Nebius", "created": 1700000007, "choices": []}
        last = {"choices": [{"index": 0, "delta": {"content": "8"}, "finish_reason": "stop"}], "usage": None}
        response, _ = self.ask(events(first, last))
        self.assertEqual(
            (response.response_id, response.model, response.provider, response.created, response.content),
            ("gen-7", "m-2025", "Nebius", 1700000007, "8"))

    def test_deltas_of_every_shape(self) -> None:
        thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": text}]} for text in ("Twice", " four.")]
        for name, deltas, reasoning, content in (
            ("reasoning", [{"reasoning": "Twice"}, {"reasoning": " four.", "content": ""}, {"content": "8"}],
             "Twice four.", "8"),
            ("reasoning_content",
             [{"reasoning_content": "Twice", "content": None}, {"reasoning_content": " four."}, {"content": "8"}],
             "Twice four.", "8"),
            ("reasoning_details beside it", [
                {"reasoning": text, "reasoning_details": [{"type": "reasoning.text", "text": text}], "content": ""}
                for text in ("Twice", " four.")] + [{"content": "8"}], "Twice four.", "8"),
            ("reasoning_details alone", [
                {"reasoning_details": [{"type": "reasoning.text", "index": 0, "text": text}]}
                for text in ("Twice", " four.")]
             + [{"content": "8"}], "Twice four.", "8"),
            ("a summary",
             [{"reasoning_details": [{"type": "reasoning.summary", "summary": text}]} for text in ("Twice", " four.")]
             + [{"content": "8"}], "Twice four.", "8"),
            ("Mistral's lists", [{"content": [thinking[0]]}, {"content": [thinking[1]]}, {"content": "8"}],
             "Twice four.", "8"),
            ("Mistral's lists to the end", [
                {"content": thinking}, {"content": [{"type": "text", "text": "It is"}]},
                {"content": [{"type": "text", "text": " 8"}]}],
             "Twice four.", "It is 8"),
            ("tags, cut anywhere",
             [{"content": text} for text in ("<thi", "nk>\nTwice", " four.\n</", "think>", "\n\n", "8")],
             "Twice four.", "8"),
            ("a refusal", [{"refusal": "I cannot"}, {"refusal": " say."}], None, "I cannot say."),
        ):
            with self.subTest(name):
                response, _ = self.ask(events(*(delta(**fields) for fields in deltas), delta("stop")))
                self.assertEqual((response.reasoning, response.content), (reasoning, content))
                self.assertTrue(response.completed_reasoning)

    def test_a_thought_that_is_cut_off(self) -> None:
        response, _ = self.ask(events(delta(reasoning="Twice"), delta(reasoning=" fo"), delta("length")), max_tokens=9)
        self.assertEqual(
            (response.reasoning, response.content, response.completed_reasoning, response.finish_reason),
            ("Twice fo", "", False, "length"))

    def test_a_long_stream_of_small_events(self) -> None:
        response, _ = self.ask(Reply(headers=dict(STREAM), body=event(content="word ") * 20_000 + event("stop") + DONE))
        self.assertEqual(len(response.content), 100_000)


class Breaking(Streamed):
    """What is no whole reply is a failure, and tried again."""

    def assert_retried(self, *bad: Reply) -> None:
        response, requests = self.ask([*bad, raw(GOOD)])
        self.assertEqual(response.content, "2 x 4 = 8")
        self.assertEqual(len(requests), len(bad) + 1)
        self.assertEqual({request.seed for request in requests}, {0})

    def test_what_is_retried(self) -> None:
        begun = event(role="assistant", content="2 x ")
        error = {"code": 502, "message": "Provider disconnected"}
        for name, reply in (
            ("the connection breaks", raw(begun, hang_up="early")),
            ("the connection breaks within an event", raw(begun, event(content="4")[:20], hang_up="early")),
            ("the body ends", raw(begun)),
            ("the body ends within an event", raw(begun, event(content="4")[:20])),
            ("the body ends at once", raw()),
            ("a content length is not reached", Reply(headers=dict(STREAM), body=GOOD, hang_up="early")),
            ("OpenRouter's error", events(
                delta(content="2 x "),
                {"error": error, "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]})),
            ("an error alone", events(delta(content="2 x "), {"error": error})),
            ("an error without a code", events(delta(content="2 x "), {"error": {"message": "internal error"}})),
            ("an error of words", events(delta(content="2 x "), {"error": "internal error"})),
            ("an error of an event by that name",
             raw(begun, b'event: error\ndata: {"error": {"message": "internal error"}}\n\n', DONE)),
            ("SGLang's error",
             events(delta(content="2 x "), {"object": "error", "message": "out of memory", "code": 500})),
            ("an error in the choice", events(
                delta(content="2 x "),
                {"choices": [{"index": 0, "delta": {}, "finish_reason": "error", "error": error}]})),
            ("a finish reason of error", events(delta(content="2 x "), delta("error"))),
            ("an error after the finish reason", events(delta(content="2 x "), delta("stop"), {"error": error})),
            ("no event but the end", raw(DONE)),
            ("an event that is no JSON", raw(begun, b"data: {oops\n\n", event("stop"), DONE)),
            ("an event without end", raw(begun, b"data: " + b'{"a":' * 100_000 + b"\n\n", event("stop"), DONE)),
            ("an event like no other, and the end of it", raw(begun, b'data: {"choices": 5}\n\n')),
        ):
            with self.subTest(name):
                self.assert_retried(reply)
                self.assert_retried(reply, reply)

    def test_the_words_of_an_error_in_the_middle(self) -> None:
        error = self.failure(
            events(delta(content="2 x "), {"error": {"code": 503, "message": "No instances available"}}))
        self.assertEqual((error.status, error.message, error.retryable), (503, "No instances available", True))

    def test_an_error_that_every_sample_would_meet(self) -> None:
        replies = [events({"error": {"code": 402, "message": "Insufficient credits"}}), raw(GOOD)]
        error = self.failure(replies, max_retries=3)
        self.assertEqual((error.status, error.message), (402, "Insufficient credits"))

    def test_a_refused_stream(self) -> None:
        error = self.failure(Reply(400, {"error": {"message": "stream is not supported"}}), max_retries=3)
        self.assertEqual((error.status, error.message), (400, "stream is not supported"))

    def test_what_breaks_after_the_finish_reason_is_whole(self) -> None:
        for name, reply in (
            ("the connection", raw(event(content="8"), event("stop"), hang_up="early")),
            ("within the event of the usage",
             raw(event(content="8"), event("stop"), usage_event()[:30], hang_up="early")),
            ("the body, within the event of the usage", raw(event(content="8"), event("stop"), usage_event()[:30])),
        ):
            with self.subTest(name):
                response, requests = self.ask(reply)
                self.assertEqual((response.content, response.finish_reason, len(requests)), ("8", "stop", 1))

    def test_nothing_of_a_broken_stream_is_kept(self) -> None:
        replies = [raw(event(content="2 x "), hang_up="early"), raw(GOOD)]
        settings = {"stream": True, "max_retries": 0}
        with tempfile.TemporaryDirectory() as cache_dir, Server(replies) as server, RolloutsClient(
                "m", base_url=server.url, cache_dir=cache_dir, **settings) as client:
            with self.assertRaises(APIError):
                client.generate("Hello")
            self.assertEqual(client.generate("Hello")[0].content, "2 x 4 = 8")


class Deadlines(Streamed):
    """The time limit of an attempt holds within a stream too."""

    def setUp(self) -> None:
        super().setUp()
        self.over = threading.Event()
        self.addCleanup(self.over.set)

    def pieces(self, *pieces: bytes, trickle: bytes = b"") -> Callable[[Request], Reply]:
        """A stream that stays open after *pieces*, silent or with *trickle* now and then."""
        def stream() -> Iterator[bytes]:
            yield from pieces
            while not self.over.wait(0.05 if trickle else 60):
                yield trickle

        return lambda request: Reply(headers=dict(STREAM), pieces=stream())  # type: ignore[arg-type]

    def test_it_is_over_however_slowly_a_stream_trickles(self) -> None:
        for name, trickle in (("silence", b""), ("comments", b": ping\n\n"), ("words", event(content="word "))):
            with self.subTest(name):
                begun = time.monotonic()
                error = self.failure(self.pieces(event(content="2 x "), trickle=trickle), timeout=0.4)
                self.assertLess(time.monotonic() - begun, 20)
                self.assertIsNone(error.status)
                self.assertIn("0.4 s", error.message)
                self.assertTrue(error.retryable)

    def test_a_stream_that_stays_open_after_its_end(self) -> None:
        for name, trickle in (("silence", b""), ("comments", b": ping\n\n")):
            with self.subTest(name):
                begun = time.monotonic()
                response, _ = self.ask(self.pieces(GOOD, trickle=trickle), timeout=600)
                self.assertEqual(response.content, "2 x 4 = 8")
                self.assertLess(time.monotonic() - begun, 20)

    def test_a_stream_that_stays_open_after_its_finish_reason(self) -> None:
        response, requests = self.ask(self.pieces(event(content="8"), event("stop")), timeout=1)
        self.assertEqual((response.content, response.finish_reason, len(requests)), ("8", "stop", 1))

    def test_the_connection_of_a_whole_stream_is_kept(self) -> None:
        with Server(lambda request: raw(GOOD)) as server:
            with RolloutsClient("m", base_url=server.url, stream=True, use_cache=False) as client:
                for seed in range(5):
                    client.generate("Hello", seed=seed)
            self.assertEqual((len(server.requests), server.connections), (5, 1))

    def test_the_connection_of_an_unfinished_stream_is_not_used_again(self) -> None:
        replies = [self.pieces(GOOD)(None), chat("fine")]  # type: ignore[arg-type]
        settings = {"stream": True, "use_cache": False}
        with Server(replies) as server, RolloutsClient("m", base_url=server.url, **settings) as client:
            self.assertEqual([client.generate("Hello", seed=seed)[0].content for seed in (0, 1)], ["2 x 4 = 8", "fine"])
            self.assertEqual(server.connections, 2)


class Asking(Streamed):
    """When a stream is asked for, and how."""

    def body(self, **settings: Any) -> Dict[str, Any]:
        _, (request,) = self.ask(chat("8"), **{"stream": None, **settings})
        return request.body

    def test_by_default_none_is(self) -> None:
        for provider in (None, "openrouter", "together", "vllm", "deepseek"):
            with self.subTest(provider=provider):
                body = self.body(provider=provider, max_tokens=100_000)
                self.assertNotIn("stream", body)
                self.assertNotIn("stream_options", body)

    def test_a_stream_brings_its_usage(self) -> None:
        body = self.body(stream=True)
        self.assertIs(body["stream"], True)
        self.assertEqual(body["stream_options"], {"include_usage": True})

    def test_mistral_is_not_asked_for_what_it_sends_unasked(self) -> None:
        body = self.body(provider="mistral", stream=True)
        self.assertIs(body["stream"], True)
        self.assertNotIn("stream_options", body)

    def test_fireworks_by_itself_above_its_limit(self) -> None:
        for settings, streamed in (
            ({}, False),
            ({"max_tokens": 4096}, False),
            ({"max_tokens": 4097}, True),
            ({"max_tokens": None, "max_completion_tokens": 8000}, True),
            ({"max_completion_tokens": 8000}, True),
            ({"max_tokens": None}, False),
            ({"max_tokens": 32_000, "stream": False}, False),
            ({"max_tokens": 100, "stream": True}, True),
        ):
            with self.subTest(settings):
                self.assertIs(self.body(provider="fireworks", **settings).get("stream", False), streamed)

    def test_per_call(self) -> None:
        with Server(chat("8")) as server:
            with RolloutsClient("m", base_url=server.url, provider="fireworks", api_key="k", use_cache=False) as client:
                for settings in ({}, {"max_tokens": 5000}, {"max_tokens": 5000, "stream": False}, {"stream": True}):
                    client.generate("Hello", **settings)
            streamed = [request.body.get("stream", False) for request in server.requests]
        self.assertEqual(streamed, [False, True, False, True])

    def test_streamed_or_not_is_one_cache_entry(self) -> None:

        def reply(request: Request) -> Reply:
            return raw(GOOD) if request.body.get("stream") else chat("2 x 4 = 8")

        for use_cache in ("json", "sql"):
            for first in (True, False):
                with self.subTest(use_cache=use_cache, first=first), tempfile.TemporaryDirectory() as cache_dir:
                    settings = {"use_cache": use_cache, "cache_dir": cache_dir}
                    with Server(reply) as server, RolloutsClient("m", base_url=server.url, **settings) as client:
                        one, other = (client.generate("Hello", stream=stream)[0] for stream in (first, not first))
                    self.assertEqual(len(server.requests), 1)
                    self.assertEqual(one, other)
                    self.assertEqual((one.cached, other.cached), (False, True))


if __name__ == "__main__":
    unittest.main()
