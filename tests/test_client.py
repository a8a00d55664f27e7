"""The main job, end to end: n seeded responses to a prompt, blocking and not, from any server."""

import contextlib
import io
import json
import re
import threading
import unittest
import warnings
from typing import Any, List

from tests import rollouts
from tests.case import Case, Clock, environment
from tests.server import Reply, Request, by_seed, chat

APIError, RolloutsClient, Usage = rollouts.APIError, rollouts.RolloutsClient, rollouts.Usage
HUGE = 10**400  # an integer that no float holds


class Seeded(Case):
    """What most tests of the client check."""

    def setUp(self) -> None:
        super().setUp()
        self.use_clock(Clock(0.5))

    def assert_seeded(self, answers: Any, first: int, number: int, cached: int = 0) -> None:
        """*number* different responses, in the order of their seeds from *first* on, the first of them *cached*."""
        seeds = list(range(first, first + number))
        self.assertEqual([response.seed for response in answers], seeds)
        self.assertEqual(answers.get_contents(), [f"answer {seed}" for seed in seeds])
        self.assertEqual([response.cached for response in answers], [True] * cached + [False] * (number - cached))
        self.assertEqual((len(answers), answers.num_responses, answers.errors), (number, number, []))


class Blocking(Seeded):
    def test_n_seeded_responses_in_order(self) -> None:
        server = self.serve()
        answers = self.client(server, "a/b").generate("What is 6 x 7?", 20)
        self.assert_seeded(answers, 0, 20)
        self.assertEqual(server.seeds(), list(range(20)))
        self.assertEqual(
            (answers.prompt, answers.model, answers.temperature, answers.top_p, answers.max_tokens, answers.cache_dir),
            ("What is 6 x 7?", "a/b", 0.7, 0.95, 4096, self.cache_dir))
        for request in server.requests:
            self.assertEqual(request.body["messages"], [{"role": "user", "content": "What is 6 x 7?"}])

    def test_seeds_of_the_call_and_of_the_client(self) -> None:
        server = self.serve()
        client = self.client(server, seed=100)
        self.assert_seeded(client.generate("hi", 3), 100, 3)
        self.assert_seeded(client.generate("hi", 3, seed=7), 7, 3)
        self.assert_seeded(client.generate("hi"), 100, 1, cached=1)
        self.assertEqual(server.seeds(), [7, 8, 9, 100, 101, 102])

    def test_only_what_is_missing_is_asked_for(self) -> None:
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache=use_cache):
                server = self.serve()
                client = self.client(server, use_cache=use_cache)
                self.assert_seeded(client.generate("hi", 10), 0, 10)
                self.assert_seeded(client.generate("hi", 30), 0, 30, cached=10)
                self.assertEqual(server.seeds(), list(range(30)))
                self.assert_seeded(client.generate("hi", 5), 0, 5, cached=5)
                again = self.client(server, use_cache=use_cache).generate("hi", 30)
                self.assert_seeded(again, 0, 30, cached=30)
                self.assertEqual((again.spent, again.usage), (Usage(), Usage(300, 150, 450)))
                self.assertEqual(len(server.requests), 30)

    def test_responses_come_in_the_order_of_seeds_and_not_of_arrival(self) -> None:
        server = self.serve()
        turns = [threading.Event() for _ in range(6)]
        turns[5].set()

        def script(request: Request) -> Reply:
            turns[request.seed].wait(30)  # the last one first
            if request.seed:
                turns[request.seed - 1].set()
            return by_seed(request)

        server.script = script
        self.assert_seeded(self.client(server).generate("hi", 6), 0, 6)

    def test_messages(self) -> None:
        messages = [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "<think>\nWell"}]
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Well"}], "closed": False}
        for provider, trailing in (
            ("together", "<think>\nWell"), ("mistral", [thinking]), ("vllm", "<think>\nWell"),
        ):
            with self.subTest(provider=provider):
                server = self.serve(chat())
                answers = self.client(provider=provider, base_url=server.url, use_cache=False).generate(messages)
                sent = server.requests[0].body["messages"]
                self.assertEqual(sent[:2], messages[:2])
                self.assertEqual(sent[2]["content"], trailing)
                self.assertEqual(answers.prompt, messages)  # as it was asked, in nobody's dialect

    def test_several_servers(self) -> None:
        """By base_url, by <PROVIDER>_BASE_URL, and by a call's base_url, each with its own cache entries."""
        one, two, three = self.serve(lambda request: chat("one")), self.serve(chat("two")), self.serve(chat("three"))
        with environment(TOGETHER_BASE_URL=two.url, GROQ_BASE_URL=three.url):
            self.assertEqual(self.client(one).generate("hi", 2).get_contents(), ["one"] * 2)
            client = self.client(provider="together")
            self.assertEqual(client.generate("hi", 2).get_contents(), ["two"] * 2)
            self.assertEqual(client.generate("hi", 2, provider="groq").get_contents(), ["three"] * 2)
            self.assertEqual(client.generate("hi", 2, base_url=one.url).get_contents(), ["one"] * 2)
            self.assertEqual(client.generate("hi", 2).get_contents(), ["two"] * 2)
        self.assertEqual((len(two.requests), len(three.requests)), (2, 2))

    def test_headers(self) -> None:
        server = self.serve()
        self.client(server).generate("hi")
        headers = server.requests[0].headers
        self.assertEqual(
            headers["user-agent"], f"rollouts/{rollouts.__version__}"
        )  # some gateways refuse Python-urllib
        self.assertNotEqual(headers.get("connection", "").lower(), "close")

    def test_many_prompts(self) -> None:
        server = self.serve(lambda request: chat(f"{request.body['messages'][0]['content']} {request.seed}"))
        client = self.client(server)
        many = client.generate_many(("a", [{"role": "user", "content": "b"}], "c"), 3, seed=4, temperature=0)
        self.assertEqual(
            [answers.get_contents() for answers in many], [[f"{word} {seed}" for seed in (4, 5, 6)] for word in "abc"]
        )
        self.assertEqual([answers.prompt for answers in many], ["a", [{"role": "user", "content": "b"}], "c"])
        self.assertEqual([answers.temperature for answers in many], [0, 0, 0])
        self.assertTrue(client.generate("b", seed=5, temperature=0)[0].cached)
        self.assertEqual(client.generate_many([], 3), [])
        self.assertEqual(len(client.generate_many(iter("ab"), 1)), 2)


class Fields(Seeded):
    """What a reply's fields become."""

    def one(self, reply: Reply, **settings: Any) -> Any:
        return self.client(self.serve(reply), use_cache=False, max_retries=0, **settings).generate("hi")[
            0
        ]

    def test_all_of_them(self) -> None:
        usage = {
            "prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33, "cost": 0.0125,
            "completion_tokens_details": {"reasoning_tokens": 7}, "prompt_tokens_details": {"cached_tokens": 4}}
        response = self.one(
            chat(
                "four",
                "length",
                {"reasoning": "2 + 2"},
                id="gen-9",
                created=1712345678,
                model="a/b-0728",
                provider="Together",
                usage=usage,
            )
        )
        self.assertEqual(
            response.to_dict(),
            {
                "content": "four",
                "reasoning": "2 + 2",
                "completed_reasoning": True,
                "finish_reason": "length",
                "seed": 0,
                "usage": {
                    "prompt_tokens": 11,
                    "completion_tokens": 22,
                    "total_tokens": 33,
                    "reasoning_tokens": 7,
                    "cached_tokens": 4,
                    "cost": 0.0125,
                },
                "model": "a/b-0728",
                "provider": "Together",
                "response_id": "gen-9",
                "created": 1712345678,
                "cached": False,
                "full": "2 + 2</think>four",
            },
        )
        self.assertEqual(response.full, "2 + 2</think>four")

    def test_who_answered_where_the_reply_does_not_tell(self) -> None:
        reply = chat(id=None, model=None, created=None)
        response = self.one(reply, provider="groq")
        self.assertEqual((response.model, response.provider, response.response_id), ("m", "groq", ""))
        self.assertGreater(response.created, 1_700_000_000)

    def test_usage_of_every_kind(self) -> None:
        for usage, expected in (
            (None, Usage()), ({}, Usage()), ([], Usage()), ("much", Usage()), (5, Usage()),
            ({"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4, 7)),
            ({"prompt_tokens": None, "completion_tokens": "4", "total_tokens": []}, Usage(0, 4, 4)),
            ({"prompt_tokens": 3.0, "cost": "0.5"}, Usage(3, 0, 3, cost=0.5)),
            ({"prompt_tokens": 3, "prompt_cache_hit_tokens": 2}, Usage(3, 0, 3, cached_tokens=2)),  # DeepSeek's
            ({"prompt_tokens": 3, "prompt_tokens_details": None, "completion_tokens_details": []}, Usage(3, 0, 3)),
            ({"prompt_tokens": 3, "cost": None}, Usage(3, 0, 3)), ({"prompt_tokens": 3, "cost": -1}, Usage(3, 0, 3)),
            ({"prompt_tokens": 3, "cost": float("nan")}, Usage(3, 0, 3)), ({"cost": float("inf")}, Usage()),
            ({"prompt_tokens": float("inf"), "completion_tokens": float("nan")}, Usage()),
            ({"prompt_tokens": -3, "completion_tokens": 4}, Usage(0, 4, 4)),
        ):
            with self.subTest(usage=usage):
                self.assertEqual(self.one(chat(usage=usage)).usage, expected)

    def test_numbers_beyond_every_measure(self) -> None:
        for further in (
            {"usage": {"prompt_tokens": HUGE}},
            {"usage": {"cost": HUGE}},
            {"created": HUGE},
            {"created": -HUGE},
        ):
            with self.subTest(further=next(iter(further))):
                self.assertEqual(self.one(chat("fine", **further)).content, "fine")

    def test_fields_of_the_wrong_type(self) -> None:
        for further in ({"id": 5}, {"created": "now"}, {"created": [1]}, {"model": ["m"]}, {"provider": {"name": "x"}}):
            with self.subTest(further=further):
                response = self.one(chat("fine", **further))
                self.assertEqual(response.content, "fine")
                json.dumps(response.to_dict())
                self.assertEqual(rollouts.Response.from_dict(response.to_dict()), response)


class Verbose(Seeded):
    """verbose=True says on stderr what each sample did."""

    def said(self, call: Any, *arguments: Any, **settings: Any) -> List[str]:
        stream = io.StringIO()
        with contextlib.redirect_stderr(stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(*arguments, **settings)
        return sorted(stream.getvalue().splitlines())

    def test_each_sample(self) -> None:
        def script(request: Request) -> Reply:
            first = sum(other.seed == request.seed for other in server.requests) == 1
            if request.seed == 2 and first:
                return Reply(503, {"error": {"message": "busy for now"}})
            return Reply(500, {"error": {"message": "broken"}}) if request.seed == 3 else by_seed(request)

        server = self.serve(script)
        client = self.client(server, max_retries=1)
        client.generate("hi")
        lines = self.said(client.generate, "hi", 4, verbose=True)
        for line, pattern in zip(
            lines,
            (
                "seed 0: from the cache$",
                r"seed 1: 5 tokens in [\d.]+ s, stop$",
                r"seed 2: 5 tokens in [\d.]+ s, stop$",
                "seed 2: attempt 1 failed, .* 503: busy for now",
                "seed 3: attempt 1 failed, .* 500: broken",
                "seed 3: failed: .* 500: broken",
            ),
        ):
            self.assertRegex(line, pattern)
        self.assertEqual(len(lines), 6)
        self.assertEqual(self.said(client.generate, "hi", 3), [])
        self.assertEqual(len(self.said(self.client(server, verbose=True).generate, "hi", 3)), 3)

    def test_a_sample_that_another_one_stands_for(self) -> None:
        client = self.client(self.serve())
        for use_cache in (True, False):
            lines = self.said(client.generate_many, ["hi", "hi"], 1, verbose=True, use_cache=use_cache)
            self.assertEqual(len(lines), 2, lines)

    def test_of_several_prompts_it_says_which(self) -> None:
        client = self.client(self.serve(), verbose=True)
        client.generate("b", 2, verbose=False)
        self.assertEqual(
            sorted(re.sub("[0-9]+ tokens.*", "drawn", line) for line in self.said(client.generate_many, ["a", "b"], 2)),
            [f"rollouts: prompt {index}, seed {seed}: {what}"
             for index, what in enumerate(("drawn", "from the cache")) for seed in (0, 1)])

    def test_the_key_is_not_said(self) -> None:
        server = self.serve(Reply(401, {"error": {"message": "no such key: sk-secret"}}))
        client = self.client(server, api_key="sk-secret", verbose=True)

        def call() -> None:
            with self.assertRaisesRegex(APIError, "no such key") as caught:
                client.generate("hi")
            self.assertNotIn("sk-secret", str(caught.exception))

        lines = self.said(call)
        self.assertTrue(lines)
        self.assertNotIn("sk-secret", "".join(lines))


if __name__ == "__main__":
    unittest.main()
