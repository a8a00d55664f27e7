"""The main job, end to end: n seeded responses to a prompt, blocking and not, from any server."""

import asyncio
import contextlib
import io
import json
import os
import pickle
import re
import tempfile
import threading
import time
import unittest
import warnings
from typing import Any, Dict, Iterator, List
from unittest import mock

from tests import rollouts
from tests.server import Reply, Request, Server, by_seed, chat
from tests.test_pacing import Clock

APIError, RolloutsClient, Usage = rollouts.APIError, rollouts.RolloutsClient, rollouts.Usage
HUGE = 10**400  # an integer that no float holds


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """The environment without anybody's keys, addresses and proxies, but with *variables*."""
    kept = {
        name: value for name, value in os.environ.items()
        if not name.upper().endswith(("_API_KEY", "_BASE_URL", "_PROXY"))}
    with mock.patch.dict(os.environ, {**kept, **variables}, clear=True):
        yield


class Places:
    """A cache directory for each test, an environment without keys, and no waiting."""

    def setUp(self: Any) -> None:
        self.cache_dir = self.enter(tempfile.TemporaryDirectory())
        self.enter(environment())
        self.enter(mock.patch.object(rollouts, "_clock", Clock(0.5)))

    def enter(self: Any, context: Any) -> Any:
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def server(self, script: Any = by_seed) -> Server:
        return self.enter(Server(script))

    def client(self, model: str = "m", **settings: Any) -> RolloutsClient:
        return self.enter(RolloutsClient(model, **{"cache_dir": self.cache_dir, "progress_bar": False, **settings}))

    def assert_seeded(self: Any, answers: Any, first: int, number: int, cached: int = 0) -> None:
        """*number* different responses, in the order of their seeds from *first* on, the first of them *cached*."""
        seeds = list(range(first, first + number))
        self.assertEqual([response.seed for response in answers], seeds)
        self.assertEqual(answers.get_contents(), [f"answer {seed}" for seed in seeds])
        self.assertEqual([response.cached for response in answers], [True] * cached + [False] * (number - cached))
        self.assertEqual((len(answers), answers.num_responses, answers.errors), (number, number, []))


class Blocking(Places, unittest.TestCase):
    def test_n_seeded_responses_in_order(self) -> None:
        server = self.server()
        answers = self.client("a/b", base_url=server.url).generate("What is 6 x 7?", 20)
        self.assert_seeded(answers, 0, 20)
        self.assertEqual(server.seeds(), list(range(20)))
        self.assertEqual(
            (answers.prompt, answers.model, answers.temperature, answers.top_p, answers.max_tokens, answers.cache_dir),
            ("What is 6 x 7?", "a/b", 0.7, 0.95, 4096, self.cache_dir))
        for request in server.requests:
            self.assertEqual(request.body["messages"], [{"role": "user", "content": "What is 6 x 7?"}])

    def test_seeds_of_the_call_and_of_the_client(self) -> None:
        server = self.server()
        client = self.client(base_url=server.url, seed=100)
        self.assert_seeded(client.generate("hi", 3), 100, 3)
        self.assert_seeded(client.generate("hi", 3, seed=7), 7, 3)
        self.assert_seeded(client.generate("hi"), 100, 1, cached=1)
        self.assertEqual(server.seeds(), [7, 8, 9, 100, 101, 102])

    def test_only_what_is_missing_is_asked_for(self) -> None:
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache=use_cache):
                server = self.server()
                client = self.client(base_url=server.url, use_cache=use_cache)
                self.assert_seeded(client.generate("hi", 10), 0, 10)
                self.assert_seeded(client.generate("hi", 30), 0, 30, cached=10)
                self.assertEqual(server.seeds(), list(range(30)))
                self.assert_seeded(client.generate("hi", 5), 0, 5, cached=5)
                again = self.client(base_url=server.url, use_cache=use_cache).generate("hi", 30)
                self.assert_seeded(again, 0, 30, cached=30)
                self.assertEqual((again.spent, again.usage), (Usage(), Usage(300, 150, 450)))
                self.assertEqual(len(server.requests), 30)

    def test_responses_come_in_the_order_of_seeds_and_not_of_arrival(self) -> None:
        server = self.server()
        turns = [threading.Event() for _ in range(6)]
        turns[5].set()

        def script(request: Request) -> Reply:
            turns[request.seed].wait(30)  # the last one first
            if request.seed:
                turns[request.seed - 1].set()
            return by_seed(request)

        server.script = script
        self.assert_seeded(self.client(base_url=server.url).generate("hi", 6), 0, 6)

    def test_messages(self) -> None:
        messages = [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "<think>\nWell"}]
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Well"}], "closed": False}
        for provider, content in (("together", "<think>\nWell"), ("mistral", [thinking]), ("vllm", "<think>\nWell")):
            with self.subTest(provider=provider):
                server = self.server(chat())
                answers = self.client(provider=provider, base_url=server.url, use_cache=False).generate(messages)
                sent = server.requests[0].body["messages"]
                self.assertEqual(sent[:2], messages[:2])
                self.assertEqual((sent[2]["role"], sent[2]["content"]), ("assistant", content))
                self.assertEqual(answers.prompt, messages)  # as it was asked, in nobody's dialect

    def test_several_servers(self) -> None:
        """By base_url, by <PROVIDER>_BASE_URL, and by a call's base_url, each with its own cache entries."""
        one, two, three = self.server(lambda request: chat("one")), self.server(chat("two")), self.server(chat("three"))
        with environment(TOGETHER_BASE_URL=two.url, GROQ_BASE_URL=three.url):
            self.assertEqual(self.client(base_url=one.url).generate("hi", 2).get_contents(), ["one"] * 2)
            client = self.client(provider="together")
            self.assertEqual(client.generate("hi", 2).get_contents(), ["two"] * 2)
            self.assertEqual(client.generate("hi", 2, provider="groq").get_contents(), ["three"] * 2)
            self.assertEqual(client.generate("hi", 2, base_url=one.url).get_contents(), ["one"] * 2)
            self.assertEqual(client.generate("hi", 2).get_contents(), ["two"] * 2)
        self.assertEqual((len(two.requests), len(three.requests)), (2, 2))

    def test_headers(self) -> None:
        server = self.server()
        self.client(base_url=server.url).generate("hi")
        headers = server.requests[0].headers
        self.assertEqual(
            headers["user-agent"], f"rollouts/{rollouts.__version__}"
        )  # some gateways refuse Python-urllib
        self.assertNotEqual(headers.get("connection", "").lower(), "close")

    def test_many_prompts(self) -> None:
        server = self.server(lambda request: chat(f"{request.body['messages'][0]['content']} {request.seed}"))
        client = self.client(base_url=server.url)
        many = client.generate_many(("a", [{"role": "user", "content": "b"}], "c"), 3, seed=4, temperature=0)
        self.assertEqual(
            [answers.get_contents() for answers in many], [[f"{word} {seed}" for seed in (4, 5, 6)] for word in "abc"]
        )
        self.assertEqual([answers.prompt for answers in many], ["a", [{"role": "user", "content": "b"}], "c"])
        self.assertEqual([answers.temperature for answers in many], [0, 0, 0])
        self.assertTrue(client.generate("b", seed=5, temperature=0)[0].cached)
        self.assertEqual(client.generate_many([], 3), [])
        self.assertEqual(len(client.generate_many(iter("ab"), 1)), 2)

    def test_a_refused_prompt_fails_alone(self) -> None:
        server = self.server(
            lambda request: (
                Reply(400, {"error": {"message": "too long"}})
                if request.body["messages"][0]["content"] == "b"
                else chat()
            )
        )
        with self.assertWarnsRegex(UserWarning, "3 of 9 samples failed.*too long"):
            many = self.client(base_url=server.url, use_cache=False).generate_many(["a", "b", "c"], 3)
        self.assertEqual([(len(answers), len(answers.errors)) for answers in many], [(3, 0), (0, 3), (3, 0)])
        self.assertEqual([(error.seed, error.status) for error in many[1].errors], [(0, 400), (1, 400), (2, 400)])

    def test_failures_are_counted(self) -> None:
        server = self.server(
            lambda request: Reply(503, {"error": {"message": "busy"}}) if request.seed % 4 == 1 else by_seed(request)
        )
        with self.assertWarnsRegex(UserWarning, "2 of 8 samples failed.*busy") as caught:
            answers = self.client(base_url=server.url, max_retries=2).generate("hi", 8)
        self.assertEqual(caught.filename, __file__)
        self.assertEqual((len(answers), len(answers.errors), answers.num_responses), (6, 2, 8))
        self.assertEqual(
            [(error.seed, error.status, error.retryable) for error in answers.errors], [(1, 503, True), (5, 503, True)]
        )
        self.assertEqual([response.seed for response in answers], [0, 2, 3, 4, 6, 7])
        self.assertEqual(server.seeds(), [0, 1, 1, 1, 2, 3, 4, 5, 5, 5, 6, 7])

    def test_a_closed_client_says_so(self) -> None:
        server = self.server()
        with RolloutsClient("m", base_url=server.url, cache_dir=self.cache_dir) as client:
            client.generate("hi")
        for call in (
            lambda: client.generate("hi"),
            lambda: client.generate_many(["hi"]),
            lambda: client.resample("hi", "A.", 1),
        ):
            with self.assertRaisesRegex(rollouts.RolloutsError, "closed"):
                call()
        client.close()  # a second time
        self.assertEqual((client.model, len(server.requests)), ("m", 1))

    def test_closing_leaves_no_connection(self) -> None:
        """Not even that of a request in flight, which finishes and is kept."""
        come, go = threading.Event(), threading.Event()

        def script(request: Request) -> Reply:
            come.set()
            reply = by_seed(request)
            reply.wait = go
            return reply

        server = self.server(script)
        client = self.client(base_url=server.url)
        raised: List[BaseException] = []

        def call() -> None:
            try:
                client.generate("hi")
            except rollouts.RolloutsError as error:
                raised.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        come.wait(30)
        client.close()
        thread.join(30)
        self.assertRegex(str(raised), "closed")
        go.set()
        deadline = time.monotonic() + 5
        while any(connection.fileno() != -1 for connection in list(server.open)) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual([connection.fileno() for connection in server.open if connection.fileno() != -1], [])
        self.assert_seeded(self.client(base_url=server.url).generate("hi"), 0, 1, cached=1)

    def test_many_threads_share_a_client(self) -> None:
        server = self.server()
        client = self.client(base_url=server.url)
        results: Dict[int, Any] = {}
        threads = [
            threading.Thread(
                target=lambda number=number: results.update({number: client.generate(f"q{number % 4}", 5)})
            )
            for number in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for number in range(12):
            self.assertEqual(results[number].get_contents(), [f"answer {seed}" for seed in range(5)])
        self.assertEqual(len(server.requests), 4 * 5)  # what is asked for twice at once is sent once


class Fields(Places, unittest.TestCase):
    """What a reply's fields become."""

    def one(self, reply: Reply, **settings: Any) -> Any:
        return self.client(base_url=self.server(reply).url, use_cache=False, max_retries=0, **settings).generate("hi")[
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
            ({"prompt_tokens": "three", "completion_tokens": "-4", "total_tokens": {}}, Usage()),
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


class Verbose(Places, unittest.TestCase):
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

        server = self.server(script)
        client = self.client(base_url=server.url, max_retries=1)
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
        self.assertEqual(len(self.said(self.client(base_url=server.url, verbose=True).generate, "hi", 3)), 3)

    def test_a_sample_that_another_one_stands_for(self) -> None:
        client = self.client(base_url=self.server().url)
        for use_cache in (True, False):
            lines = self.said(client.generate_many, ["hi", "hi"], 1, verbose=True, use_cache=use_cache)
            self.assertEqual(len(lines), 2, lines)

    def test_of_several_prompts_it_says_which(self) -> None:
        client = self.client(base_url=self.server().url, verbose=True)
        client.generate("b", 2, verbose=False)
        self.assertEqual(
            sorted(re.sub("[0-9]+ tokens.*", "drawn", line) for line in self.said(client.generate_many, ["a", "b"], 2)),
            [f"rollouts: prompt {index}, seed {seed}: {what}"
             for index, what in enumerate(("drawn", "from the cache")) for seed in (0, 1)])

    def test_the_key_is_not_said(self) -> None:
        server = self.server(Reply(401, {"error": {"message": "no such key: sk-secret"}}))
        client = self.client(base_url=server.url, api_key="sk-secret", verbose=True)

        def call() -> None:
            with self.assertRaisesRegex(APIError, "no such key") as caught:
                client.generate("hi")
            self.assertNotIn("sk-secret", str(caught.exception))

        lines = self.said(call)
        self.assertTrue(lines)
        self.assertNotIn("sk-secret", "".join(lines))


class Pickled(Places, unittest.TestCase):
    def test_without_its_key_and_ready_to_work(self) -> None:
        server = self.server()
        client = self.client("a/b", base_url=server.url, api_key="sk-secret", temperature=0.3, min_p=0.1)
        client.generate("hi", 3)
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(client, protocol)
            self.assertNotIn(b"sk-secret", data)
            again = self.enter(pickle.loads(data))
            self.assertEqual(
                (again.model, again.temperature, again.api_key, again.extra), ("a/b", 0.3, None, {"min_p": 0.1})
            )
            self.assert_seeded(again.generate("hi", 3), 0, 3, cached=3)
        again.generate("hi", 4)
        self.assertNotIn("authorization", server.requests[-1].headers)
        self.assertEqual(client.api_key, "sk-secret")

    def test_its_key_comes_from_the_environment_there(self) -> None:
        server = self.server()
        with environment(TOGETHER_BASE_URL=server.url, TOGETHER_API_KEY="sk-there"):
            again = self.enter(pickle.loads(pickle.dumps(self.client(provider="together", api_key="sk-here"))))
            again.generate("hi")
        self.assertEqual(server.requests[0].headers["authorization"], "Bearer sk-there")

    def test_a_configuration_too(self) -> None:
        config = rollouts.Config("m", api_key="sk-secret")
        self.assertNotIn(b"sk-secret", pickle.dumps(config))
        self.assertIsNone(pickle.loads(pickle.dumps(config)).api_key)
        self.assertNotIn(b"sk-secret", pickle.dumps(config.to_dict()))


class Async(Places, unittest.IsolatedAsyncioTestCase):
    async def test_the_same_as_blocking(self) -> None:
        server = self.server()
        client = self.client(base_url=server.url)
        answers = await client.agenerate("hi", 5, seed=3, temperature=0)
        self.assert_seeded(answers, 3, 5)
        self.assertEqual((answers.prompt, answers.temperature), ("hi", 0))
        self.assert_seeded(await client.agenerate("hi", 7, seed=3, temperature=0), 3, 7, cached=5)
        self.assertEqual(server.seeds(), list(range(3, 10)))

    async def test_blocking_within_a_running_loop(self) -> None:
        """As in a notebook."""
        client = self.client(base_url=self.server().url)
        self.assert_seeded(client.generate("hi", 3), 0, 3)
        self.assert_seeded(await client.agenerate("hi", 3), 0, 3, cached=3)

    async def test_many_at_once(self) -> None:
        server = self.server()
        client = self.client(base_url=server.url)
        results = await asyncio.gather(*(client.agenerate(f"q{number % 10}", 4) for number in range(40)))
        for answers in results:
            self.assertEqual(answers.get_contents(), [f"answer {seed}" for seed in range(4)])
        self.assertEqual(len(server.requests), 10 * 4)

    async def test_the_loop_goes_on_meanwhile(self) -> None:
        go = threading.Event()
        client = self.client(base_url=self.server(lambda request: Reply(200, chat().body, wait=go)).url)
        task = asyncio.ensure_future(client.agenerate("hi", 3))
        for _ in range(10):
            await asyncio.sleep(0)
        self.assertFalse(task.done())
        go.set()
        self.assertEqual(len(await task), 3)

    async def test_bad_arguments_and_errors(self) -> None:
        client = self.client(base_url=self.server(Reply(404, {"error": {"message": "no such model"}})).url)
        with self.assertRaisesRegex(ValueError, "^n_samples takes "):
            await client.agenerate("hi", 0)
        with self.assertRaisesRegex(NotImplementedError, "logprobs"):
            await client.agenerate("hi", logprobs=True)
        with self.assertRaisesRegex(APIError, "no such model") as caught:
            await client.agenerate("hi", 3)
        self.assertEqual(caught.exception.status, 404)
        client.close()
        with self.assertRaisesRegex(rollouts.RolloutsError, "closed"):
            await client.agenerate("hi")

    async def test_several_loops_share_a_client(self) -> None:
        client = self.client(base_url=self.server().url)
        for cached in (0, 3):
            answers = await asyncio.to_thread(lambda: asyncio.run(client.agenerate("hi", 3)))
            self.assert_seeded(answers, 0, 3, cached=cached)


class Public(unittest.TestCase):
    def test_the_whole_list(self) -> None:
        self.assertEqual(
            sorted(rollouts.__all__),
            sorted(
                [
                    "RolloutsClient",
                    "create_client",
                    "Config",
                    "Rollouts",
                    "Response",
                    "Usage",
                    "split_sentences",
                    "RolloutsError",
                    "APIError",
                ]
            ),
        )
        for name in rollouts.__all__:
            self.assertTrue(getattr(rollouts, name).__doc__, name)


if __name__ == "__main__":
    unittest.main()
