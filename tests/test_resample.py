"""resample and generate_many: many prompts through one queue, and each prefix of a thought paid for once."""

import collections
import contextlib
import threading
import time
import unittest
import warnings
from typing import Any, Dict, List

from tests import rollouts
from tests.case import Case
from tests.server import Reply, Request, Server, by_seed, chat

APIError, RolloutsClient = rollouts.APIError, rollouts.RolloutsClient

QUESTION = "What is 2 x 4?"
SENTENCES = ["Twice four.", " Hm, e.g. 2 + 2 is 4.", "\n\nSo 8.", " Wait.", "\n- 4 + 4 = 8"]
REASONING = "".join(SENTENCES)
FORCE = "\n</think>\n\nTherefore, the final answer is \\boxed{"


def injected(request: Request) -> str:
    """The trailing assistant message of a request."""
    message = request.body["messages"][-1]
    assert message["role"] == "assistant"
    return str(message["content"])


def question(request: Request) -> str:
    """The last user message of a request."""
    return [str(message["content"]) for message in request.body["messages"] if message["role"] == "user"][-1]


class Queue(Case):
    """One server, and clients for it that do not wait between attempts."""

    def setUp(self) -> None:
        super().setUp()
        self.use_clock()
        self.server = self.serve()

    def client(self, model: str = "m", **settings: Any) -> Any:
        return super().client(self.server, model, **settings)

    def taken(self) -> List[Request]:
        """The requests since the last time."""
        requests, self.server.requests = self.server.requests, []
        return requests


class Resample(Queue):
    def test_each_prefix_exactly(self) -> None:
        """(sentences + 1) x n requests, and of the prefix not a space is changed."""
        results = self.client().resample(QUESTION, REASONING, 3)
        asked = collections.Counter((injected(request), request.seed) for request in self.taken())
        prefixes = ["<think>\n" + "".join(SENTENCES[:index]) for index in range(len(SENTENCES) + 1)]
        self.assertEqual(asked, {(prefix, seed): 1 for prefix in prefixes for seed in range(3)})
        self.assertEqual(len(results), len(SENTENCES) + 1)
        for prefix, rollout in zip(prefixes, results):
            self.assertEqual(rollout.prompt, [
                {"role": "user", "content": QUESTION}, {"role": "assistant", "content": prefix}])
            self.assertEqual([response.seed for response in rollout], [0, 1, 2])
            self.assertEqual(rollout.num_responses, 3)

    def test_results_are_those_of_their_prefix(self) -> None:
        self.server.script = lambda request: chat(f"{injected(request)!r} {request.seed}</think>8")
        for rollout in self.client().resample(QUESTION, REASONING, 4):
            text = rollout.prompt[-1]["content"]
            self.assertEqual(rollout.get_reasonings(), [f"{text!r} {seed}" for seed in range(4)])

    def test_each_prefix_is_paid_for_once(self) -> None:
        client = self.client()
        first = client.resample(QUESTION, REASONING, 3, at=[1])
        self.assertEqual(len(self.taken()), 3)
        both = client.resample(QUESTION, REASONING, 3, at=[1, 2])  # without and with the second sentence
        self.assertEqual({injected(request) for request in self.taken()}, {"<think>\n" + "".join(SENTENCES[:2])})
        self.assertEqual(both[0].responses, first[0].responses)
        client.resample(QUESTION, REASONING, 3)
        self.assertEqual(len(self.taken()), 3 * (len(SENTENCES) + 1 - 2))
        again = self.client().resample(QUESTION, REASONING, 3)
        self.assertEqual(self.taken(), [])
        self.assertTrue(all(response.cached for rollout in again for response in rollout))
        # The same words in a string prompt are the same request.
        client.generate(f"{QUESTION}\n<think>\n{SENTENCES[0]}", 3)
        self.assertEqual(self.taken(), [])

    def test_a_larger_n_tops_up(self) -> None:
        client = self.client()
        client.resample(QUESTION, REASONING, 2)
        self.taken()
        results = client.resample(QUESTION, REASONING, 5)
        requests = self.taken()
        self.assertEqual(len(requests), 3 * (len(SENTENCES) + 1))
        self.assertEqual({request.seed for request in requests}, {2, 3, 4})
        for rollout in results:
            self.assertEqual([response.cached for response in rollout], [True, True, False, False, False])

    def test_at(self) -> None:
        client = self.client()
        for at, prefixes in (
            ([0], [""]), ([2, 0], [REASONING[:len("".join(SENTENCES[:2]))], ""]), (range(2), ["", SENTENCES[0]]),
            ((len(SENTENCES),), [REASONING]), (iter([1]), [SENTENCES[0]]), ([], []),
        ):
            with self.subTest(at=at):
                results = client.resample(QUESTION, REASONING, 1, at=at)
                self.assertEqual(
                    [rollout.prompt[-1]["content"] for rollout in results], ["<think>\n" + text for text in prefixes])

    def test_a_suffix_forces_the_answer(self) -> None:
        self.server.script = chat("8}.")
        client = self.client()
        results = client.resample(QUESTION, REASONING, 2, suffix=FORCE)
        self.assertEqual({injected(request) for request in self.taken()}, {
            "<think>\n" + "".join(SENTENCES[:index]) + FORCE for index in range(len(SENTENCES) + 1)})
        for rollout in results:
            self.assertEqual(rollout.get_contents(), ["8}."] * 2)
            self.assertEqual(rollout.get_reasonings(), [None] * 2)
        self.server.script = chat(" on")
        client.resample(QUESTION, REASONING, 2)
        self.assertEqual(len(self.taken()), 2 * (len(SENTENCES) + 1))  # free and forced are different questions

    def test_a_response_as_reasoning(self) -> None:
        response = rollouts.Response("8", REASONING + "\n")
        results = self.client().resample(QUESTION, response, 1, at=[0, len(SENTENCES)])
        self.assertEqual([rollout.prompt[-1]["content"] for rollout in results], ["<think>\n", "<think>\n" + REASONING])

    def test_the_thought_of_a_response_that_continued_another(self) -> None:
        """A prompt that ends in an open thought goes on from there."""
        self.server.script = chat(" Twice four. So 8.</think>8")
        client = self.client()
        prompt = f"{QUESTION}\n<think>\nI multiply."
        response = client.generate(prompt)[0]
        self.taken()
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "<think>\nI multiply."}]
        for its in (prompt, messages):
            with self.subTest(prompt=its):
                results = client.resample(its, response, 1)
                self.assertEqual([rollout.prompt[-1]["content"] for rollout in results], [
                    "<think>\nI multiply.", "<think>\nI multiply. Twice four.",
                    "<think>\nI multiply. Twice four. So 8."])
        self.assertEqual(len(self.taken()), 2)  # the first prefix is the prompt that was paid for

    def test_message_lists(self) -> None:
        messages = [
            {"role": "system", "content": "Be brief. "}, {"role": "user", "content": f" {QUESTION}\n", "name": "me"}]
        copy = [dict(message) for message in messages]
        results = self.client().resample(messages, REASONING, 1, at=[1])
        (request,) = self.taken()
        expected = [*copy, {"role": "assistant", "content": "<think>\n" + SENTENCES[0]}]
        self.assertEqual(request.body["messages"], expected)
        self.assertEqual(results[0].prompt, expected)
        self.assertEqual(messages, copy)

    def test_the_providers_dialect_and_overrides(self) -> None:
        client = self.client(provider="vllm")
        client.resample(QUESTION, REASONING, 2, at=[0, 1], temperature=0.1, min_p=0.05, seed=7)
        requests = self.taken()
        self.assertEqual(sorted(request.seed for request in requests), [7, 7, 8, 8])
        for request in requests:
            self.assertEqual((request.body["temperature"], request.body["min_p"]), (0.1, 0.05))
            self.assertIs(request.body["continue_final_message"], True)

    def test_as_wide_as_max_concurrency(self) -> None:
        """All prefixes go into one queue, so that nobody waits for the slowest of each."""
        width = 2 * len(SENTENCES) + 2
        together = threading.Barrier(width)

        def reply(request: Request) -> Reply:
            together.wait(60)  # broken, and the reply a failure, unless so many requests are under way at once
            return chat("fine")

        self.server.script = reply
        results = self.client(max_concurrency=width, max_retries=0).resample(QUESTION, REASONING, 2)
        self.assertEqual([len(rollout) for rollout in results], [2] * (len(SENTENCES) + 1))

    def test_an_empty_thought_has_one_prefix(self) -> None:
        results = self.client().resample(QUESTION, "", 2)
        self.assertEqual([rollout.prompt[-1]["content"] for rollout in results], ["<think>\n"])

    def test_no_prefix_warns_of_a_trailing_space(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.client().resample(QUESTION, REASONING + "  ", 1)
            self.client().resample(QUESTION, REASONING, 1, suffix=FORCE)

    def test_wrong_arguments(self) -> None:
        closed = f"{QUESTION}\n<think>\na</think>\n\n8"
        for name, arguments, settings, words in (
            ("no thought", (QUESTION, rollouts.Response("8"), 1), {}, "reasoning"),
            ("no text", (QUESTION, None, 1), {}, "reasoning"),
            ("a number", (QUESTION, 8, 1), {}, "reasoning"),
            ("an opening tag", (QUESTION, "<think>\nTwice four.", 1), {}, "reasoning"),
            ("a closing tag", (QUESTION, "Twice four.</think>8", 1), {}, "reasoning"),
            ("beyond the end", (QUESTION, REASONING, 1), {"at": [len(SENTENCES) + 1]}, "at takes"),
            ("before the beginning", (QUESTION, REASONING, 1), {"at": [0, -1]}, "at takes"),
            ("no index", (QUESTION, REASONING, 1), {"at": ["1"]}, "at takes"),
            ("a flag", (QUESTION, REASONING, 1), {"at": [True]}, "at takes"),
            ("no list of indices", (QUESTION, REASONING, 1), {"at": 3}, "at takes"),
            ("a suffix of bytes", (QUESTION, REASONING, 1), {"suffix": b"x"}, "suffix takes"),
            ("no suffix", (QUESTION, REASONING, 1), {"suffix": None}, "suffix takes"),
            ("no samples", (QUESTION, REASONING, 0), {}, "n_samples"),
            ("an empty prompt", ("", REASONING, 1), {}, "prompt"),
            ("a closed thought", (closed, REASONING, 1), {}, "prompt"),
            ("an answer", ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], REASONING, 1),
             {}, "prompt"),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, words):
                self.client().resample(*arguments, **settings)
        with self.assertRaisesRegex(ValueError, "gpt-oss"):
            self.client("openai/gpt-oss-20b").resample(QUESTION, REASONING, 1)
        self.assertEqual(self.taken(), [])

    def test_broken_off_and_run_again(self) -> None:
        """What arrived is kept, so that only the rest goes out."""
        total = 3 * (len(SENTENCES) + 1)
        self.server.script = [*[chat("fine")] * 7, Reply(401, {"error": {"message": "the key was revoked"}})]
        with self.assertWarnsRegex(UserWarning, "the key was revoked"):
            self.client(max_concurrency=1).resample(QUESTION, REASONING, 3)
        self.assertGreater(len(self.taken()), 8)
        self.server.script = by_seed
        self.client().resample(QUESTION, REASONING, 3)
        self.assertEqual(len(self.taken()), total - 7)


class GenerateMany(Queue):
    PROMPTS = tuple(f"Question {index}" for index in range(6))

    def answer(self, request: Request) -> Reply:
        return chat(f"{question(request)}, {request.seed}")

    def test_order(self) -> None:
        """Results come in the order of the prompts and of the seeds, whatever order the replies came in."""
        last = threading.Event()

        def reply(request: Request) -> Reply:
            if (question(request), request.seed) == (self.PROMPTS[-1], 2):
                last.set()
            first = (question(request), request.seed) == (self.PROMPTS[0], 0)
            return Reply(body=self.answer(request).body, wait=last if first else None)

        self.server.script = reply
        results = self.client().generate_many(iter(self.PROMPTS), 3)
        self.assertEqual(tuple(rollout.prompt for rollout in results), self.PROMPTS)
        self.assertEqual(
            [rollout.get_contents() for rollout in results],
            [[f"{prompt}, {seed}" for seed in range(3)] for prompt in self.PROMPTS])
        self.assertEqual(len(self.taken()), 18)

    def test_defaults_seeds_and_overrides(self) -> None:
        results = self.client(temperature=0.2, seed=3).generate_many(["a", [{"role": "user", "content": "b"}]])
        self.assertEqual([rollout.get_contents() for rollout in results], [["answer 3"], ["answer 3"]])
        self.taken()
        self.client().generate_many(["a"], 2, seed=40, temperature=0.9, stop=["\n"])
        requests = self.taken()
        self.assertEqual(sorted(request.seed for request in requests), [40, 41])
        self.assertEqual({(request.body["temperature"], *request.body["stop"]) for request in requests}, {(0.9, "\n")})

    def test_no_prompts(self) -> None:
        self.assertEqual(self.client().generate_many([], 3), [])

    def test_the_same_prompt_twice(self) -> None:
        """Is paid for once, and stands in both places."""
        for width in (1, 50):
            with self.subTest(width=width):
                prompts = [f"a{width}", "b", f"a{width}"]
                first, other, second = self.client(max_concurrency=width).generate_many(prompts, 4)
                requests = [request for request in self.taken() if question(request) == prompts[0]]
                self.assertEqual(sorted(request.seed for request in requests), [0, 1, 2, 3])
                self.assertEqual(first.responses, second.responses)
                self.assertEqual(first.spent.total_tokens + second.spent.total_tokens, 4 * 15)
                self.assertEqual(len(other), 4)

    def test_what_is_cached_is_not_sent(self) -> None:
        client = self.client()
        client.generate("b", 2)
        self.taken()
        results = client.generate_many(["a", "b"], 3)
        self.assertEqual(sorted((question(request), request.seed) for request in self.taken()),
                         [("a", 0), ("a", 1), ("a", 2), ("b", 2)])
        self.assertEqual([response.cached for response in results[1]], [True, True, False])

    def test_one_queue(self) -> None:
        """As wide as max_concurrency, never wider, and fed as it drains."""
        width, lock, full, release = 8, threading.Lock(), threading.Event(), threading.Event()
        under_way: Dict[str, int] = {"now": 0, "most": 0}

        def reply(request: Request) -> Reply:
            with lock:
                under_way["now"] += 1
                under_way["most"] = max(under_way["most"], under_way["now"])
                if under_way["now"] == width:
                    full.set()
            release.wait(60)
            with lock:
                under_way["now"] -= 1
            return chat("fine")

        self.server.script = reply
        done: List[Any] = []
        client = self.client(max_concurrency=width)
        worker = threading.Thread(target=lambda: done.extend(client.generate_many(self.PROMPTS, 5)))
        worker.start()
        self.assertTrue(full.wait(60), f"no more than {under_way['most']} requests at once")
        release.set()
        worker.join(60)
        self.assertEqual([len(rollout) for rollout in done], [5] * len(self.PROMPTS))
        self.assertEqual(under_way["most"], width)
        self.assertEqual(len(self.taken()), 5 * len(self.PROMPTS))

    def test_max_concurrency_of_a_call(self) -> None:
        """Holds over all the prompts of the call."""
        lock, under_way = threading.Lock(), {"now": 0, "most": 0}

        def reply(request: Request) -> Reply:
            with lock:
                under_way["now"] += 1
                under_way["most"] = max(under_way["most"], under_way["now"])
            time.sleep(0.005)  # so that more at once would show
            with lock:
                under_way["now"] -= 1
            return chat("fine")

        self.server.script = reply
        self.client().generate_many(self.PROMPTS, 4, max_concurrency=2)
        self.assertLessEqual(under_way["most"], 2)

    def test_samples_are_kept_as_they_arrive(self) -> None:
        """Not at the end: another client finds them while the rest is under way."""
        under_way, held = threading.Barrier(2), threading.Event()
        self.addCleanup(held.set)

        def reply(request: Request) -> Reply:
            under_way.wait(60)
            return Reply(body=self.answer(request).body, wait=held if question(request) == "slow" else None)

        self.server.script = reply
        client = self.client(max_concurrency=2)
        worker = threading.Thread(target=lambda: client.generate_many(["fast", "slow"], 1))
        worker.start()
        other, found, begun = self.client(max_retries=0), False, time.monotonic()
        while len(self.server.requests) < 2 or not found:
            self.assertLess(time.monotonic() - begun, 60, "nothing was kept")
            if len(self.server.requests) >= 2:  # the script is no longer asked for these two
                self.server.script = Reply(503, {"error": {"message": "busy"}})
                with contextlib.suppress(APIError):
                    found = other.generate("fast")[0].cached
        self.assertTrue(worker.is_alive())
        held.set()
        worker.join(60)

    def test_a_prompt_that_is_refused_fails_alone(self) -> None:

        def reply(request: Request) -> Reply:
            refusal = Reply(status, {"error": {"message": "too long"}})
            return refusal if question(request) == "long" else self.answer(request)

        self.server.script = reply
        client = self.client(max_concurrency=1, use_cache=False)
        for status in (400, 403, 413, 422):
            with self.subTest(status=status):
                with self.assertWarnsRegex(UserWarning, "3 of 9 samples failed.*too long"):
                    good, bad, fine = client.generate_many(["a", "long", "b"], 3)
                self.assertEqual((good.get_contents(), fine.get_contents()),
                                 ([f"a, {seed}" for seed in range(3)], [f"b, {seed}" for seed in range(3)]))
                self.assertEqual((len(bad), bad.num_responses), (0, 3))
                self.assertEqual(
                    [(error.status, error.seed) for error in bad.errors], [(status, 0), (None, 1), (None, 2)])
                self.assertEqual(bad.errors[0].message, "too long")
                self.assertIn(f"never sent, as seed 0 was refused: HTTP {status}: too long", bad.errors[2].message)
                self.assertEqual(len([request for request in self.taken() if question(request) == "long"]), 1)

    def test_what_every_prompt_would_meet_ends_the_call(self) -> None:
        for status in (401, 402, 404):
            with self.subTest(status=status), Server(Reply(status, {"error": {"message": "no"}})) as server:
                with self.assertRaises(APIError) as caught:
                    self.client(max_concurrency=2, base_url=server.url).generate_many(self.PROMPTS, 50)
                self.assertEqual(caught.exception.status, status)
                self.assertLessEqual(len(server.requests), 2)

    def test_every_prompt_refused_is_raised(self) -> None:
        self.server.script = Reply(400, {"error": {"message": "m is not a valid model ID"}})
        with self.assertRaises(APIError) as caught:
            self.client(max_concurrency=2).generate_many(self.PROMPTS, 50)
        self.assertEqual((caught.exception.status, caught.exception.message), (400, "m is not a valid model ID"))
        self.assertLessEqual(len(self.taken()), 2 * len(self.PROMPTS))

    def test_each_of_many_prompts_is_refused_once(self) -> None:
        """What is refused for one prompt says nothing of the next, however many there were."""
        self.server.script = Reply(400, {"error": {"message": "too long"}})
        with self.assertRaises(APIError):
            self.client(max_concurrency=1, use_cache=False).generate_many([f"q{number}" for number in range(30)], 3)
        self.assertEqual(len(self.taken()), 30)

    def test_many_refused_prompts_beside_one_that_is_not(self) -> None:
        self.server.script = lambda request: (
            self.answer(request) if question(request) == "q0" else Reply(400, {"error": {"message": "too long"}}))
        with self.assertWarnsRegex(UserWarning, "30 of 31 samples failed"):
            results = self.client(max_concurrency=1).generate_many([f"q{number}" for number in range(31)])
        self.assertEqual([len(result) for result in results], [1] + 30 * [0])

    def test_samples_that_fail_after_all_retries(self) -> None:
        """Are counted with their prompt, and do not stop the others."""
        self.server.script = lambda request: (
            Reply(503, {"error": {"message": "busy"}}) if (question(request), request.seed) == ("b", 1)
            else self.answer(request))
        with self.assertWarnsRegex(UserWarning, "1 of 9 samples failed") as caught:
            results = self.client(max_retries=2).generate_many(["a", "b", "c"], 3)
        self.assertEqual(caught.filename, __file__)
        for rollout in results:
            self.assertEqual(len(rollout.responses) + len(rollout.errors), rollout.num_responses)
        self.assertEqual([len(rollout.errors) for rollout in results], [0, 1, 0])
        self.assertEqual((results[1].errors[0].seed, results[1].errors[0].status), (1, 503))
        self.assertEqual(len([request for request in self.taken() if (question(request), request.seed) == ("b", 1)]), 3)

    def test_wrong_arguments(self) -> None:
        for name, prompts, words in (
            ("a string", "Hello", "list of prompts"),
            ("a message", {"role": "user", "content": "Hello"}, "list of prompts"),
            ("an empty prompt", ["Hello", ""], "prompt takes"),
            ("a number", ["Hello", 3], "prompt takes"),
            ("a list of strings", [["Hello"]], "prompt takes"),
            ("a list of an empty string", [[""]], "prompt takes"),
            ("a message without a role", [[{"content": "Hello"}]], "prompt takes"),
            ("a single message", [{"role": "user", "content": "Hello"}], "prompt takes"),
            ("a number of prompts", 3, "list of prompts"),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, words):
                self.client().generate_many(prompts, 1)
        self.assertEqual(self.taken(), [])


class Counts(Queue):
    def test_counts(self) -> None:
        self.server.script = lambda request: chat(("8", "9", "8", "eight")[request.seed])
        rollout = self.client().generate(QUESTION, 4)
        counts = rollout.counts(lambda response: int(response.content) if response.content.isdigit() else None)
        self.assertIsInstance(counts, collections.Counter)
        self.assertEqual(counts, {8: 2, 9: 1, None: 1})
        self.assertEqual(rollout.counts(lambda response: response.finish_reason), {"stop": 4})

    def test_errors_are_not_counted(self) -> None:
        self.server.script = lambda request: chat("8") if request.seed else Reply(503, {"error": {"message": "busy"}})
        with self.assertWarns(UserWarning):
            rollout = self.client(max_retries=0).generate(QUESTION, 3)
        self.assertEqual(rollout.counts(lambda response: response.content), {"8": 2})

    def test_what_extract_raises_is_raised(self) -> None:
        with self.assertRaises(ZeroDivisionError):
            self.client().generate(QUESTION, 2).counts(lambda response: 1 // response.seed)


if __name__ == "__main__":
    unittest.main()
