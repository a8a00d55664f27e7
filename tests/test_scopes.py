"""What fails, fails alone: the scope of a refusal, what stops it, what goes on; calls that send nothing."""

import json
import pathlib
import random
import threading
import unittest
import warnings
from dataclasses import replace

from tests import rollouts
from tests.case import AsyncCase, Case, Clock
from tests.server import Gate, Reply, by_seed, chat, delta, events

APIError = rollouts.APIError

OF_THE_PROMPT = (400, 403, 413, 422)
OF_THE_CALL = (401, 402, 404)


def refusal(status, message="the provider's own words", headers=None, **error):
    return Reply(status, {"error": {"message": message, **error}}, headers or {})


# What concerns the whole call, in the forms that it takes: (what, reply, status).
CALL_REFUSALS = (
    *((str(status), refusal(status), status) for status in OF_THE_CALL),
    ("401 in a 200", Reply(200, {"error": {"message": "no", "code": 401}}), 401),
    ("402 in a stream", events({"error": {"message": "no", "code": 402}}), 402),
    ("404 as a choice's error",
     Reply(200, {"choices": [{"finish_reason": "error", "error": {"code": 404, "message": "no"}}]}), 404),
    ("a redirect", Reply(303, headers={"Location": "/v1/result/1"}), 303),
    ("another redirect", Reply(307, headers={"Location": "http://127.0.0.1:9/"}), 307),
    ("a wait of an hour", refusal(429, headers={"Retry-After": "3600"}), 429),
    ("a 503 that asks to wait for an hour", refusal(503, headers={"Retry-After": "3600"}), 503),
    ("a daily quota", refusal(429, "Rate limit exceeded: free-models-per-day"), 429),
    ("no quota left", refusal(429, "no", type="insufficient_quota"), 429),
)
# What concerns one prompt.
PROMPT_REFUSALS = (
    *((str(status), refusal(status), status) for status in OF_THE_PROMPT),
    ("400 in a 200", Reply(200, {"error": {"message": "too long", "code": 400}}), 400),
    ("422 as a number in words", Reply(200, {"error": {"message": "too long", "code": "422"}}), 422),
    ("400 at the top", Reply(200, {"object": "error", "message": "too long", "code": 400}), 400),
    ("413 in a stream", events(delta(content="fi"), {"error": {"message": "too long", "code": 413}}), 413),
    ("a moderation", refusal(403, metadata={"reasons": ["violence"]}), 403),
)


def unless(bad, reply):
    """A script that answers by the seed, but the seeds in *bad* get *reply*."""
    return lambda request: reply if request.seed in bad else by_seed(request)


def question(request):
    return request.body["messages"][0]["content"]


class Scopes(Case):
    def setUp(self):
        super().setUp()
        self.use_clock(Clock())

    def adds_up(self, result, first=0):
        """Prove that each sample is either a response or an error, in the order of their seeds."""
        self.assertEqual(len(result.responses) + len(result.errors), result.num_responses)
        for each in (result.responses, result.errors):
            self.assertEqual([one.seed for one in each], sorted(one.seed for one in each))
        seeds = sorted(one.seed for one in (*result.responses, *result.errors))
        self.assertEqual(seeds, list(range(first, first + result.num_responses)))
        for error in result.errors:
            self.assertIsInstance(error, APIError)

    def counted(self, warned, errors, samples):
        """Prove that one warning tells how many of how many failed."""
        self.assertEqual(len(warned), 1, warned)
        self.assertRegex(warned[0], rf"\b{errors}\b")
        self.assertRegex(warned[0], rf"\b{samples}\b")

    def split(self, errors):
        """The errors of samples that were sent, and of those that were not."""
        unsent = [error for error in errors if "never sent" in error.message]
        for error in unsent:
            self.assertIsNone(error.status)
        return [error for error in errors if error not in unsent], unsent

    def seeds_of(self, server, prompt):
        return sorted(request.seed for request in server.requests if question(request) == prompt)


class OneSample(Scopes):
    """The bad luck of one sample is one error."""

    def rows(self):
        yield from CALL_REFUSALS
        yield from PROMPT_REFUSALS
        yield "a failed generation, ten times over", refusal(424), 424
        yield "no content", Reply(200, {"choices": []}), None

    def test_generate(self):
        for name, reply, status in self.rows():
            for samples, seed, width in ((30, 7, 2), (30, 29, 1), (60, 21, 20), (500, 250, 100)):
                if samples == 500 and name not in ("404", "424", "a wait of an hour", "400"):
                    continue
                with self.subTest(name, samples=samples, seed=seed, width=width):
                    clock = self.use_clock(Clock())
                    server = self.serve(unless({seed}, reply))
                    with self.warned() as warned:
                        result = self.client(server, use_cache=False, max_concurrency=width).generate(
                            "q", samples)
                    self.adds_up(result)
                    self.assertEqual([error.seed for error in result.errors], [seed])
                    if status is not None:
                        self.assertEqual(result.errors[0].status, status)
                    self.counted(warned, 1, samples)
                    self.assertEqual(set(server.seeds()), set(range(samples)))
                    self.assertNotIn("never sent", result.errors[0].message)
                    self.assertLess(sum(clock.slept), 3600)  # the others do not wait for what one was told

    def test_the_first_sample_where_another_is_in_flight(self):
        for name, reply, status in (*CALL_REFUSALS, *PROMPT_REFUSALS):
            with self.subTest(name):
                both = threading.Event()

                def script(request, reply=reply, both=both):
                    if request.seed == 0:
                        return replace(reply, wait=both)
                    if request.seed == 1:
                        both.set()
                        return replace(
                            chat("8"), delay=0.1)  # later than the refusal, as a rule: right either way
                    return chat("8")

                server = self.serve(script)
                with self.warned() as warned:
                    result = self.client(server, use_cache=False, max_concurrency=2).generate("q", 12)
                self.adds_up(result)
                self.assertEqual([(error.seed, error.status) for error in result.errors], [(0, status)])
                self.assertEqual(server.seeds(), list(range(12)))
                self.counted(warned, 1, 12)

    def test_generate_many(self):
        for name, reply, status in (*CALL_REFUSALS, *PROMPT_REFUSALS):
            for width in (1, 2, 7):
                with self.subTest(name, width=width):
                    server = self.serve(unless({7}, reply))
                    client = self.client(server, use_cache=False, max_concurrency=width)
                    with self.warned() as warned:
                        results = client.generate_many(["a", "b"], 30)
                    for result in results:
                        self.adds_up(result)
                        self.assertEqual(
                            [(error.seed, error.status) for error in result.errors], [(7, status)])
                    self.counted(warned, 2, 60)
                    self.assertEqual(len(server.requests), 60)

    def test_several_that_are_scattered(self):
        """Groq: the sampled text failed a check, now and again; the second run asks for those alone."""
        bad = {9, 13, 14, 17, 18, 20, 77, 150, 151, 152, 199}
        server = self.serve(unless(bad, refusal(400, "Failed to generate JSON")))
        client = self.client(server, max_concurrency=4)
        for run, asked in enumerate((list(range(200)), sorted(bad))):
            with self.subTest(run=run):
                server.requests.clear()
                with self.warned() as warned:
                    result = client.generate("q", 200)
                self.adds_up(result)
                self.assertEqual({error.seed for error in result.errors}, bad)
                self.assertEqual({error.status for error in result.errors}, {400})
                self.assertEqual(server.seeds(), asked)
                self.counted(warned, 11, 200)

    def test_a_key_that_is_refused_for_a_while(self):
        """OpenCode: 401 for minutes, with a good key."""
        server = self.serve(unless(range(40, 60), refusal(401)))
        with self.warned():
            result = self.client(server, use_cache=False, max_concurrency=1).generate("q", 100)
        self.assertEqual([error.seed for error in result.errors], list(range(40, 60)))
        self.assertEqual(len(server.requests), 100)

    def test_resample(self):
        server = self.serve(
            lambda request: refusal(404) if request.seed == 3 and "Two" in json.dumps(request.body)
                            else by_seed(request))
        with self.warned() as warned:
            results = self.client(server, use_cache=False, max_concurrency=3).resample(
                "q", ["One. ", "Two. ", "Three."], 8)
        self.assertEqual([len(result.errors) for result in results], [
            int("Two" in (result.prefix or "")) for result in results])
        self.counted(warned, sum(len(result.errors) for result in results), 8 * len(results))

    def test_every_shortfall_warns(self):
        server = self.serve(lambda request: refusal(404) if request.seed == 2 else by_seed(request))
        client = self.client(server, max_concurrency=1)
        with self.warned() as warned:
            for _ in range(5):
                client.generate("q", 4)
        self.assertEqual(len(warned), 5)


class Stopped(Scopes):
    """Where nothing of a scope succeeded, the first refusal stops it."""

    def test_the_call_at_once(self):
        for name, reply, status in (*CALL_REFUSALS, *PROMPT_REFUSALS):
            for width in (1, 5):
                with self.subTest(name, width=width):
                    server = self.serve(reply)
                    with self.warned() as warned, self.assertRaises(APIError) as caught:
                        self.client(server, use_cache=False, max_concurrency=width).generate("q", 200)
                    self.assertEqual(caught.exception.status, status)
                    self.assertNotIn("never sent", caught.exception.message)
                    self.assertLessEqual(len(server.requests), width)
                    self.assertEqual(warned, [])

    def test_what_concerns_the_call_ends_all_its_prompts(self):
        for name, reply, status in CALL_REFUSALS:
            with self.subTest(name):
                server = self.serve(reply)
                with self.assertRaises(APIError) as caught:
                    self.client(server, use_cache=False, max_concurrency=3).generate_many(
                        list("abcdefghij"), 10)
                self.assertEqual(caught.exception.status, status)
                self.assertLessEqual(len(server.requests), 3)

    def test_what_concerns_a_prompt_ends_that_alone(self):
        for name, reply, status in PROMPT_REFUSALS:
            for width in (1, 4):
                with self.subTest(name, width=width):
                    server = self.serve(
                        lambda request, reply=reply: reply if "long" in question(request)
                        else by_seed(request))
                    client = self.client(server, use_cache=False, max_concurrency=width)
                    with self.warned() as warned:
                        results = client.generate_many(["too long", "a", "long too", "b"], 10)
                    for result in results:
                        self.adds_up(result)
                    self.assertEqual([len(result) for result in results], [0, 10, 0, 10])
                    for result in (results[0], results[2]):
                        sent, _unsent = self.split(result.errors)
                        self.assertEqual({error.status for error in sent}, {status})
                        self.assertLessEqual(len(sent), width)
                        self.assertEqual(
                            [error.seed for error in sent], self.seeds_of(server, result.prompt))
                    self.counted(warned, 20, 40)

    def test_all_prompts_are_refused(self):
        for status in OF_THE_PROMPT:
            with self.subTest(status=status):
                server = self.serve(refusal(status))
                with self.assertRaises(APIError) as caught:
                    self.client(server, use_cache=False, max_concurrency=1).generate_many(["a", "b", "c"], 10)
                self.assertEqual(caught.exception.status, status)
                self.assertEqual(len(server.requests), 3)  # one a prompt

    def test_what_stops_a_prompt_is_not_undone_by_another(self):
        server = self.serve(lambda request: refusal(400) if question(request) == "bad" else by_seed(request))
        with self.warned():
            results = self.client(server, use_cache=False, max_concurrency=1).generate_many(
                ["good", "bad"], 40)
        self.assertEqual(len(self.seeds_of(server, "bad")), 1)
        self.assertEqual([len(result) for result in results], [40, 0])

    def test_a_drawn_sample_of_another_prompt_is_evidence_for_the_call(self):
        for status in OF_THE_CALL:
            with self.subTest(status=status):
                server = self.serve(
                    lambda request, status=status: refusal(status)
                    if question(request) == "b" and request.seed < 10 else by_seed(request))
                with self.warned():
                    results = self.client(server, use_cache=False, max_concurrency=1).generate_many(
                        ["a", "b"], 20)
                self.assertEqual([len(result) for result in results], [20, 10])
                self.assertEqual(len(server.requests), 40)

    def test_what_is_in_flight_finishes(self):
        gate = Gate(lambda request: refusal(401) if request.seed == 0 else refusal(503))
        server = self.serve(gate)
        opener = threading.Thread(target=lambda: gate.reached(4) and gate.open())
        opener.start()
        with self.assertRaises(APIError):
            self.client(server, use_cache=False, max_concurrency=4, max_retries=0).generate("q", 100)
        opener.join()
        self.assertEqual(server.seeds()[:4], [0, 1, 2, 3])
        # 503 is nobody's scope: where it came before the 401, the next samples were sent.
        self.assertLess(len(server.requests), 10)


    def test_the_words_of_the_api_decide_nothing(self):
        for words in ("the tokens were never sent", "not in the cache", "seed 3 was refused"):
            with self.subTest(words):
                with self.assertRaises(APIError) as caught:
                    self.client(self.serve(refusal(400, words)), use_cache=False).generate("q")
                self.assertEqual((caught.exception.status, caught.exception.message), (400, words))


class InARow(Scopes):
    """After a success, more than twenty refusals in a row stop the scope."""

    def test_twenty_do_not(self):
        for status in (*OF_THE_CALL, *OF_THE_PROMPT):
            with self.subTest(status=status):
                server = self.serve(unless(range(5, 25), refusal(status)))
                with self.warned():
                    result = self.client(server, use_cache=False, max_concurrency=1).generate("q", 60)
                self.assertEqual([error.seed for error in result.errors], list(range(5, 25)))
                self.assertEqual(len(server.requests), 60)

    def test_twenty_one_do(self):
        for name, reply, status in (*CALL_REFUSALS, *PROMPT_REFUSALS):
            with self.subTest(name):
                server = self.serve(
                    lambda request, reply=reply: by_seed(request) if request.seed < 20 else reply)
                with self.warned() as warned:
                    result = self.client(server, use_cache=False, max_concurrency=1).generate("q", 200)
                self.adds_up(result)
                self.assertEqual(len(result), 20)
                sent, unsent = self.split(result.errors)
                self.assertEqual(
                    [(error.seed, error.status) for error in sent], [(20 + i, status) for i in range(21)])
                self.assertEqual([error.seed for error in unsent], list(range(41, 200)))
                self.assertEqual(server.seeds(), list(range(41)))
                self.counted(warned, 180, 200)

    def test_with_many_in_flight(self):
        server = self.serve(lambda request: by_seed(request) if request.seed < 20 else refusal(402))
        with self.warned():
            result = self.client(server, use_cache=False, max_concurrency=4).generate("q", 200)
        self.adds_up(result)
        self.assertEqual(len(result), 20)
        self.assertGreaterEqual(len(server.requests), 41)
        # Up to 20 refusals may come before a success that was slow, and with each 21 three more.
        self.assertLessEqual(len(server.requests), 20 + 20 + 21 + 3)

    def test_a_success_between_begins_anew(self):
        server = self.serve(lambda request: by_seed(request) if request.seed % 21 == 0 else refusal(402))
        with self.warned():
            result = self.client(server, use_cache=False, max_concurrency=1).generate("q", 211)
        self.assertEqual(len(server.requests), 211)
        self.assertEqual([response.seed for response in result], list(range(0, 211, 21)))

    def test_each_prompt_has_its_own(self):
        server = self.serve(
            lambda request: refusal(400) if question(request) == "b" and request.seed > 2
            else by_seed(request))
        with self.warned():
            results = self.client(server, use_cache=False, max_concurrency=1).generate_many(
                ["a", "b", "c"], 50)
        self.assertEqual([len(result) for result in results], [50, 3, 50])
        self.assertEqual(self.seeds_of(server, "b"), list(range(24)))

    def test_what_concerns_the_call_is_counted_over_its_prompts(self):
        server = self.serve(lambda request: by_seed(request) if question(request) == "a" else refusal(402))
        with self.warned():
            results = self.client(server, use_cache=False, max_concurrency=1).generate_many(
                list("abcdefgh"), 4)
        self.assertEqual([len(result) for result in results], [4] + 7 * [0])
        self.assertEqual(len(server.requests), 4 + 21)

    def test_the_next_call_begins_anew(self):
        server = self.serve(lambda request: by_seed(request) if request.seed < 2 else refusal(402))
        client = self.client(server, use_cache=False, max_concurrency=1)
        for _ in range(2):
            server.requests.clear()
            with self.warned():
                client.generate("q", 100)
            self.assertEqual(len(server.requests), 23)
        server.script = by_seed
        self.assertEqual(len(client.generate("q", 100)), 100)


class Cached(Scopes):
    """What lies in the cache is evidence for the prompt, not for the call."""

    def test_for_the_prompt(self):
        for kind in ("json", "sql"):
            for status in OF_THE_PROMPT:
                with self.subTest(kind, status=status):
                    cache = f"{self.directory}/{kind}{status}"
                    server = self.serve(unless({5, 6}, refusal(status)))
                    client = self.client(server, use_cache=kind, cache_dir=cache, max_concurrency=1)
                    client.generate("q", 5)
                    with self.warned() as warned:
                        result = client.generate("q", 9)
                    self.assertEqual([error.seed for error in result.errors], [5, 6])
                    self.counted(warned, 2, 9)
                    self.assertEqual(server.seeds(), list(range(9)))

    def test_not_for_the_call(self):
        for kind in ("json", "sql"):
            for name, reply, status in CALL_REFUSALS:
                with self.subTest(kind, name=name):
                    server = self.serve(by_seed)
                    cache = f"{self.directory}/{kind}{name}"
                    client = self.client(server, use_cache=kind, cache_dir=cache, max_concurrency=1)
                    client.generate("q", 5)
                    server.script = reply
                    server.requests.clear()
                    with self.warned() as warned:
                        result = client.generate("q", 50)
                    self.adds_up(result)
                    self.assertEqual((len(result), len(server.requests)), (5, 1))
                    sent, unsent = self.split(result.errors)
                    self.assertEqual([(error.seed, error.status) for error in sent], [(5, status)])
                    self.assertEqual(len(unsent), 44)
                    self.counted(warned, 45, 50)

    def test_the_same_call_again_where_some_prompts_are_too_long(self):
        prompts = [f"{'long' if index % 4 == 3 else 'short'} {index}" for index in range(100)]
        server = self.serve(lambda request: refusal(400) if "long" in question(request) else by_seed(request))
        for run in range(3):
            with self.subTest(run=run), self.warned() as warned:
                results = self.client(server, max_concurrency=4).generate_many(prompts, 3)
                self.assertEqual(
                    [len(result) for result in results], [0 if "long" in prompt else 3 for prompt in prompts])
            self.counted(warned, 75, 300)

    def test_the_same_call_again_where_the_last_prefixes_are_too_long(self):
        parts = [f"Step {index}. " for index in range(8)]
        server = self.serve(
            lambda request: refusal(413) if "Step 5" in json.dumps(request.body) else by_seed(request))
        for run in range(3):
            with self.subTest(run=run), self.warned() as warned:
                results = self.client(server, max_concurrency=2).resample("q", parts, 4)
                self.assertEqual(
                    [len(result) for result in results],
                    [0 if "Step 5" in result.prefix else 4 for result in results])
                self.assertTrue(any(len(result) == 0 for result in results))
            self.assertEqual(len(warned), 1)

    def test_one_cached_prompt_and_a_refused_key(self):
        server = self.serve(by_seed)
        client = self.client(server, max_concurrency=1)
        client.generate("a", 3)
        server.script = refusal(401)
        server.requests.clear()
        with self.warned() as warned:
            results = client.generate_many(["a", "b", "c"], 3)
        self.assertEqual([len(result) for result in results], [3, 0, 0])
        self.assertEqual(len(server.requests), 1)
        self.counted(warned, 6, 9)

    def test_whatever_happens_the_same_call_again_does_not_raise(self):
        """Any mixture of verdicts: what a run returned, the next returns too, and no sample is paid twice."""
        chance = random.Random(14)
        bad = [refusal(status) for status in (*OF_THE_CALL, *OF_THE_PROMPT)] + [
            refusal(429, headers={"Retry-After": "3600"}), refusal(503), Reply(200, {"choices": []})]
        for index in range(40):
            share = chance.choice((0.02, 0.2, 0.7, 0.95))
            prompts = [f"{index} {letter}" for letter in "abcd"[:chance.randint(1, 4)]]
            verdicts = {
                (prompt, seed): chance.choice(bad) if chance.random() < share else chat(f"{seed}")
                for prompt in prompts for seed in range(30)}
            server = self.serve(lambda request, verdicts=verdicts: verdicts[question(request), request.seed])
            client = self.client(
                server, cache_dir=f"{self.directory}/{index}", max_retries=0,
                max_concurrency=chance.choice((1, 3, 10)))
            kept, samples = set(), chance.randint(1, 30)
            for run in range(3):
                with self.subTest(index=index, run=run):
                    server.requests.clear()
                    with self.warned() as warned:
                        try:
                            results = client.generate_many(prompts, samples)
                        except APIError as error:
                            self.assertFalse(kept)
                            self.assertNotIn("never sent", error.message)
                            continue
                    for result in results:
                        self.adds_up(result)
                    here = {(result.prompt, response.seed) for result in results for response in result}
                    self.assertTrue(here)
                    self.assertLessEqual(kept, here)
                    sent = [(question(request), request.seed) for request in server.requests]
                    self.assertEqual(len(set(sent)), len(sent))
                    self.assertFalse(kept & set(sent))
                    self.assertEqual({key for key in sent if verdicts[key].status == 200
                                      and verdicts[key].body["choices"]} | kept, here)
                    unsent = {(result.prompt, error.seed) for result in results
                              for error in self.split(result.errors)[1]}
                    self.assertFalse(unsent & set(sent))
                    failed = sum(len(result.errors) for result in results)
                    self.assertEqual(len(warned), 1 if failed else 0)
                    kept = here


class Verdicts(unittest.TestCase):
    """The same as a table: what came in turn, then which of the prompts 0 and 1 may still be sent."""

    def test_it(self):
        drawn, cached = rollouts.Response("8"), rollouts.Response("8", cached=True)
        passing = APIError("m", status=503, retryable=True)

        def refused(status):
            return APIError("m", status=status)

        rows = (
            ("nothing yet", [], (True, True)),
            ("one of a prompt", [(0, refused(400))], (False, True)),
            ("one of each prompt", [(0, refused(413)), (1, refused(422))], (False, False)),
            ("one of the call", [(0, refused(401))], (False, False)),
            ("no scope: a sample that failed ten times", [(0, passing)] * 50, (True, True)),
            ("a status that is None", [(1, refused(None))], (False, False)),
            ("a drawn sample, then a refusal of its prompt", [(0, drawn), (0, refused(403))], (True, True)),
            ("of the other prompt", [(0, drawn), (1, refused(403))], (True, False)),
            ("a drawn sample, then one of the call", [(0, drawn), (1, refused(404))], (True, True)),
            ("a cached sample, then one of its prompt", [(0, cached), (0, refused(400))], (True, True)),
            ("a cached sample, then one of the call", [(0, cached), (0, refused(401))], (False, False)),
            ("twenty of a prompt", [(0, drawn)] + [(0, refused(400))] * 20, (True, True)),
            ("twenty-one", [(0, drawn)] + [(0, refused(400))] * 21, (False, True)),
            ("twenty-one after a cached one", [(0, cached)] + [(0, refused(400))] * 21, (False, True)),
            ("twenty-one of two kinds", [(0, drawn)] + [(0, refused(400))] * 11 + [(0, refused(402))] * 10,
             (True, True)),
            ("twenty of the call", [(0, drawn)] + [(0, refused(402)), (1, refused(402))] * 10, (True, True)),
            ("twenty-one of the call", [(0, drawn)] + [(0, refused(402)), (1, refused(402))] * 11,
                (False, False)),
            (
                "a success between", [(0, drawn)] + [(0, refused(400))] * 20 + [(0, drawn)] + [
                    (0, refused(400))] * 20,
             (True, True)),
            ("a success of another prompt between",
             [(0, drawn)] + [(0, refused(400))] * 20 + [(1, drawn), (0, refused(400))], (False, True)),
            ("what passes does not end a row", [(0, drawn)] + [(0, refused(400)), (0, passing)] * 21,
                (False, True)),
            ("a success after the stop", [(0, refused(400)), (0, drawn)], (True, True)),
            ("a success after the stop of the call", [(0, refused(401)), (1, drawn)], (True, True)),
            ("a cached one does not lift that", [(0, refused(401)), (1, cached)], (False, False)),
        )
        for name, outcomes, expected in rows:
            with self.subTest(name):
                verdicts = rollouts._Verdicts()
                for prompt, outcome in outcomes:
                    verdicts.record(prompt, outcome)
                self.assertEqual(tuple(verdicts.why_stopped(prompt) is None for prompt in (0, 1)), expected)
                self.assertEqual(verdicts.why_stopped() is None, expected != (False, False) or name in (
                    "one of each prompt",))


class InALoop(AsyncCase):
    """The same, awaited."""

    async def test_one_sample(self):
        self.use_clock(Clock())
        for status in (*OF_THE_CALL, *OF_THE_PROMPT):
            with self.subTest(status=status):
                server = self.serve(unless({7}, refusal(status)))
                with self.warned() as warned:
                    result = await self.client(server, use_cache=False, max_concurrency=2).agenerate("q", 30)
                self.assertEqual([(error.seed, error.status) for error in result.errors], [(7, status)])
                self.assertEqual((len(result), len(warned)), (29, 1))

    async def test_stopped(self):
        self.use_clock(Clock())
        server = self.serve(lambda request: by_seed(request) if request.seed < 5 else refusal(401))
        client = self.client(server, max_concurrency=1)
        for sent in (26, 1):  # what is cached is no evidence that the key is good
            server.requests.clear()
            with self.warned() as warned:
                result = await client.agenerate("q", 100)
            self.assertEqual((len(result), len(result.errors), len(server.requests)), (5, 95, sent))
            self.assertEqual(len(warned), 1)
            self.assertIn("never sent", result.errors[-1].message)
        server.script = refusal(401)
        with self.assertRaises(APIError):
            await client.agenerate("another", 100)


class Offline(Case):
    """Nothing is sent, nothing is raised, nothing is said."""

    def setUp(self):
        super().setUp()
        self.use_clock(Clock())
        self.server = self.serve(by_seed)

    def missed(self, errors, seeds):
        self.assertEqual([error.seed for error in errors], list(seeds))
        for error in errors:
            self.assertIsInstance(error, APIError)
            self.assertIsNone(error.status)
            self.assertIn("not in the cache", error.message)

    def test_what_is_cached_and_what_is_not(self):
        for kind in ("json", "sql"):
            with self.subTest(kind):
                client = self.client(self.server, use_cache=kind, cache_dir=f"{self.directory}/{kind}")
                drawn = client.generate("q", 3)
                self.server.requests.clear()
                with self.warned() as warned:
                    result = client.generate("q", 100, offline=True)
                self.assertEqual(list(result), list(drawn))
                self.assertEqual({response.cached for response in result}, {True})
                self.missed(result.errors, range(3, 100))
                self.assertEqual((result.num_responses, warned, self.server.requests), (100, [], []))
                self.assertEqual(len(client.generate("q", 100)), 100)  # what the misses cost is what was said
                self.assertEqual(len(self.server.requests), 97)

    def test_nothing_at_all_is_cached(self):
        with self.warned() as warned:
            client = self.client(self.server, offline=True)
            self.missed(client.generate("q", 4, seed=10).errors, range(10, 14))
            self.missed(client.generate("q").errors, [0])
            for result in client.generate_many(["a", "b"], 2):
                self.missed(result.errors, range(2))
            for result in client.resample("q", ["One. ", "Two."], 2):
                self.missed(result.errors, range(2))
        self.assertEqual((warned, self.server.requests, self.clock.slept), ([], [], []))

    def test_prompts_and_prefixes(self):
        client = self.client(self.server)
        client.generate_many(["a", "b"], 2)
        parts = ["One. ", "Two. ", "Three."]
        drawn = client.resample("q", parts, 3)
        self.server.requests.clear()
        with self.warned() as warned:
            results = client.generate_many(["a", "b", "c"], 4, offline=True)
            again = client.resample("q", parts, 3, offline=True)
        self.assertEqual([len(result) for result in results], [2, 2, 0])
        self.assertEqual([[len(result.errors) for result in results]], [[2, 2, 4]])
        self.assertEqual([list(result) for result in again], [list(result) for result in drawn])
        self.assertEqual([result.prefix for result in again], [result.prefix for result in drawn])
        self.assertEqual((warned, self.server.requests), ([], []))

    def test_no_key_is_needed(self):
        for provider in ("openrouter", "fireworks", "deepseek"):
            with self.subTest(provider):
                client = self.client(None, base_url=None, provider=provider, offline=True)
                self.missed(client.generate("q", 3).errors, range(3))

    def test_the_same_entries_as_with_a_key(self):
        client = self.client(self.server, provider="together", api_key="k")
        client.generate("q", 3)
        again = self.client(self.server, provider="together", offline=True)
        self.assertEqual(len(again.generate("q", 3)), 3)

    def test_a_call_says_otherwise(self):
        client = self.client(self.server, offline=True)
        self.assertEqual(len(client.generate("q", 3, offline=False)), 3)
        self.assertEqual(len(client.generate("q", 3)), 3)
        self.assertEqual(len(self.server.requests), 3)

    def test_it_waits_for_nothing(self):
        """Neither for its turn, nor for the API's hold, nor for a sample that is under way."""
        self.server.script = [refusal(429, headers={"Retry-After": "500"})]
        client = self.client(self.server, requests_per_minute=1, max_retries=0)
        with self.assertRaises(APIError):
            client.generate("q")
        self.clock.slept.clear()
        for _ in range(50):
            client.generate("q", 3, offline=True)
        self.assertEqual(self.clock.slept, [])
        gate = Gate()
        server = self.serve(gate)
        client = self.client(server)
        thread = threading.Thread(target=client.generate, args=("q", 2))
        thread.start()
        self.assertTrue(gate.reached(2))
        result = client.generate("q", 3, offline=True)
        gate.open()
        thread.join(60)
        self.missed(result.errors, range(3))
        self.assertEqual(len(client.generate("q", 3, offline=True)), 2)

    def test_a_damaged_entry_is_a_miss_without_a_warning(self):
        """Which would be an error here. It is warned of where the sample is asked for again."""
        client = self.client(self.server)
        client.generate("q", 2)
        damaged = next(pathlib.Path(self.directory).rglob("seed_00000.json"))
        damaged.write_text("{")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = client.generate("q", 2, offline=True)
        self.assertEqual([response.seed for response in result], [1])
        self.missed(result.errors, [0])
        with self.assertWarnsRegex(UserWarning, "1 cache entries could not be used"):
            client.generate("q", 2)

    def test_where_it_makes_no_sense(self):
        for settings in ({"use_cache": False}, {"use_cache": False, "seed": 3}):
            with self.subTest(settings), self.assertRaisesRegex(ValueError, "offline|use_cache"):
                self.client(self.server, **settings).generate("q", offline=True)
            with self.subTest(settings), self.assertRaisesRegex(ValueError, "offline|use_cache"):
                self.client(self.server, offline=True, **settings).generate("q")
        with self.assertRaisesRegex(ValueError, "offline|use_cache"):
            self.client(self.server, offline=True).generate("q", use_cache=False)
        with self.assertRaisesRegex(ValueError, "offline"):
            self.client(self.server, offline=True).check_injection()
        with self.assertRaisesRegex(ValueError, "offline"):
            self.client(self.server).check_injection(offline=True)
        for value in ("yes", 1, None):
            with self.subTest(value=value), self.assertRaisesRegex(ValueError, "offline takes"):
                self.client(self.server, offline=value)
        self.assertEqual(self.server.requests, [])

    def test_it_is_no_part_of_the_request(self):
        client = self.client(self.server, offline=False)
        client.generate("q")
        self.assertNotIn("offline", self.server.requests[0].body)
        self.assertEqual(len(client.generate("q", offline=True)), 1)


class OfflineInALoop(AsyncCase):
    async def test_it(self):
        server = self.serve(by_seed)
        client = self.client(server)
        await client.agenerate("q", 3)
        with self.warned() as warned:
            result = await client.agenerate("q", 5, offline=True)
            nothing = await client.agenerate("another", 2, offline=True)
        self.assertEqual([len(result), len(nothing)], [3, 0])
        for error in (*result.errors, *nothing.errors):
            self.assertIn("not in the cache", error.message)
        self.assertEqual((warned, len(server.requests)), ([], 3))


if __name__ == "__main__":
    unittest.main()
