"""What a call returns: Usage, Response, Rollouts and APIError, which need neither a server nor a file."""

import copy
import dataclasses
import inspect
import json
import pickle
import pprint
import random
import string
import sys
import typing
import unittest
from collections import Counter
from typing import Any, Dict, List, Optional
from unittest import mock

from tests import rollouts
from tests.case import Case

APIError, Response, Rollouts, Usage = rollouts.APIError, rollouts.Response, rollouts.Rollouts, rollouts.Usage

USAGE_FIELDS = ["prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens", "cached_tokens", "cost"]
RESPONSE_FIELDS = [
    "content", "reasoning", "completed_reasoning", "finish_reason", "seed", "usage", "model", "provider", "response_id",
    "created", "cached"]
ROLLOUTS_FIELDS = [
    "prompt", "responses", "errors", "num_responses", "model", "temperature", "top_p", "max_tokens", "cache_dir",
    "at", "prefix"]
ERROR_FIELDS = ["message", "status", "provider", "seed", "retryable", "retry_after", "advice"]
LETTERS = string.printable + "é中…\u2028\0😀\ud800</think>"


def some_text(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(12)))


def some_usage(rng: random.Random) -> Usage:
    return Usage(*(rng.randrange(10**6) for _ in range(5)), cost=rng.choice([0, 0.0, rng.random()]))


def some_response(rng: random.Random) -> Response:
    return Response(
        some_text(rng), rng.choice([None, some_text(rng)]), rng.random() < 0.5, rng.choice([None, "stop", "length"]),
        rng.randrange(2**63), some_usage(rng), some_text(rng), some_text(rng), some_text(rng), rng.randrange(2**33),
        rng.random() < 0.5)


def some_error(rng: random.Random) -> APIError:
    return APIError(
        some_text(rng), status=rng.choice([None, 404, 503]), provider=some_text(rng), seed=rng.choice([None, 0, 2**60]),
        retryable=rng.random() < 0.5, retry_after=rng.choice([None, 0.0, 2.5]), advice=some_text(rng))


def some_rollouts(rng: random.Random) -> Rollouts:
    responses = [some_response(rng) for _ in range(rng.randrange(4))]
    errors = [some_error(rng) for _ in range(rng.randrange(3))]
    prompt = rng.choice([some_text(rng), [{"role": "user", "content": some_text(rng)}]])
    return Rollouts(
        prompt, responses, errors, len(responses) + len(errors), some_text(rng), rng.choice([None, rng.random()]),
        rng.choice([None, 0.95]), rng.choice([None, 100]), rng.choice([None, ".rollouts"]), rng.choice([None, 0, 3]),
        rng.choice([None, "", some_text(rng)]))


def of(*responses: Response, errors: Optional[List[APIError]] = None) -> Rollouts:
    errors = errors or []
    return Rollouts("hi", list(responses), errors, len(responses) + len(errors), "m")


class Dicts(Case):
    """Plain dicts, there and back, through JSON."""

    def test_there_and_back(self) -> None:
        rng = random.Random(0)
        for turn in range(300):
            for make in (some_usage, some_response, some_rollouts, some_error):
                value = make(rng)
                with self.subTest(turn=turn, value=value):
                    data = json.loads(json.dumps(value.to_dict()))
                    again = type(value).from_dict(data)
                    self.assertEqual(again.to_dict(), value.to_dict())
                    self.assertEqual(data, value.to_dict())
                    if make in (some_usage, some_response):
                        self.assertEqual(again, value)
                        self.assertEqual(hash(again), hash(value))
                    if make is some_response:
                        self.assertEqual((again.full, again.cached), (value.full, value.cached))
                    if make is some_rollouts:
                        self.assertEqual((again.responses, repr(again)), (value.responses, repr(value)))
                        self.assertEqual([str(error) for error in again.errors], [str(error) for error in value.errors])

    def test_the_names(self) -> None:
        rng = random.Random(1)
        for make, names in (
            (some_usage, USAGE_FIELDS), (some_response, RESPONSE_FIELDS), (some_rollouts, ROLLOUTS_FIELDS),
            (some_error, ERROR_FIELDS),
        ):
            value = make(rng)
            self.assertEqual(list(value.to_dict()), [*names, "full"] if make is some_response else names)
            for name in names:
                self.assertTrue(hasattr(value, name), name)

    def test_a_dict_of_its_own(self) -> None:
        rollouts_ = of(Response("a"), errors=[APIError("no")])
        for value in (rollouts_, rollouts_[0], rollouts_[0].usage):
            before = copy.deepcopy(value.to_dict())
            data = value.to_dict()
            for name, part in data.items():
                if isinstance(part, list):
                    part.clear()
                elif isinstance(part, dict):
                    part["cost"] = 5
                data[name] = "changed"
            self.assertEqual(value.to_dict(), before)

    def test_what_is_missing_has_its_default(self) -> None:
        self.assertEqual(Response.from_dict({"content": "a"}), Response("a"))
        self.assertEqual(Response.from_dict({"content": "a", "usage": {}}), Response("a"))
        self.assertEqual(Usage.from_dict({"cost": 1}), Usage(cost=1))
        self.assertEqual(Response.from_dict({"content": "a", "of_a_later_version": 1}), Response("a"))

    def test_what_is_no_such_dict(self) -> None:
        for cls, data in (
            (Usage, None),
            (Usage, []),
            (Usage, "{}"),
            (Usage, {"cost": "1"}),
            (Usage, {"cost": None}),
            (Usage, {"prompt_tokens": 1.5}),
            (Usage, {"prompt_tokens": True}),
            (Usage, {"cost": True}),
            (Response, None),
            (Response, []),
            (Response, {}),
            (Response, {"reasoning": "a"}),
            (Response, {"content": None}),
            (Response, {"content": 5}),
            (Response, {"content": "a", "seed": "1"}),
            (Response, {"content": "a", "seed": True}),
            (Response, {"content": "a", "usage": 5}),
            (Response, {"content": "a", "usage": None}),
            (Response, {"content": "a", "completed_reasoning": 1}),
            (Response, {"content": "a", "cached": None}),
        ):
            with self.subTest(cls=cls, data=data), self.assertRaisesRegex(ValueError, cls.__name__ + "|Usage"):
                cls.from_dict(data)

    def test_pickles_and_copies(self) -> None:
        rng = random.Random(2)
        for make in (some_usage, some_response, some_rollouts, some_error):
            value = make(rng)
            copies = [pickle.loads(pickle.dumps(value, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
            for again in (*copies, copy.copy(value), copy.deepcopy(value)):
                self.assertIs(type(again), type(value))
                self.assertEqual(again.to_dict(), value.to_dict())


class OneResponse(Case):
    def test_full(self) -> None:
        for response, full in (
            (Response("4", "2 + 2"), "2 + 2</think>4"),  # the thought is closed
            (Response("", "2 +", completed_reasoning=False, finish_reason="length"), "2 +"),  # it is not
            (Response("", "2 + 2"), "2 + 2</think>"),  # closed, and nothing said yet
            (Response("4", ""), "</think>4"),  # closed at once
            (Response("4"), "4"),  # none
            (Response(""), ""),
        ):
            with self.subTest(response=response):
                self.assertEqual(response.full, full)
                with self.assertRaises(AttributeError):
                    response.full = "other"

    def test_equality_passes_over_cached(self) -> None:
        rng = random.Random(3)
        response = some_response(rng)
        replayed = dataclasses.replace(response, cached=not response.cached)
        self.assertEqual(replayed, response)
        self.assertEqual(hash(replayed), hash(response))
        for name, other in (
            ("content", "other"), ("reasoning", "other"), ("completed_reasoning", not response.completed_reasoning),
            ("finish_reason", "other"), ("seed", 1), ("usage", Usage(1)), ("model", "other"), ("provider", "other"),
            ("response_id", "other"), ("created", 1),
        ):
            self.assertNotEqual(dataclasses.replace(response, **{name: other}), response, name)

    def test_the_defaults(self) -> None:
        self.assertEqual(Response("a").to_dict(), {
            "content": "a", "reasoning": None, "completed_reasoning": True, "finish_reason": None, "seed": 0,
            "usage": dict.fromkeys(USAGE_FIELDS, 0), "model": "", "provider": "", "response_id": "", "created": 0,
            "cached": False, "full": "a"})

    def test_frozen(self) -> None:
        for value in (Usage(), Response("a"), of(Response("a")), rollouts.Config("m")):
            for field in dataclasses.fields(value):
                with self.subTest(field=field.name), self.assertRaises(dataclasses.FrozenInstanceError):
                    setattr(value, field.name, None)

    def test_they_are_dataclasses_to_whoever_asks(self) -> None:
        class Marked(Response):
            pass

        @dataclasses.dataclass(frozen=True)
        class Judged(Response):
            verdict: str = "none"
            scale: typing.ClassVar[int] = 10

        @dataclasses.dataclass(frozen=True)
        class Timed(Response):
            seconds: float = 0.0

        for cls in (Usage, Response, Rollouts, rollouts.Config, Marked, Judged, Timed):
            with self.subTest(cls=cls.__name__):
                self.assertTrue(dataclasses.is_dataclass(cls))
                names = [field.name for field in dataclasses.fields(cls)]
                self.assertEqual(names, list(inspect.signature(cls).parameters))
                self.assertLessEqual(set(names), set(typing.get_type_hints(cls)))
        response = Response("4", "2 + 2", usage=Usage(1, cost=0.5))
        self.assertEqual({**dataclasses.asdict(response), "full": "2 + 2</think>4"}, response.to_dict())
        self.assertEqual(dataclasses.replace(response, seed=7).seed, 7)
        self.assertIn("content='4'", pprint.pformat(response))
        self.assertEqual(eval(repr(response)), response)
        self.assertEqual(copy.copy(response), response)
        self.assertEqual(response, mock.ANY)
        if sys.version_info >= (3, 10):
            self.assertEqual(Response.__match_args__, tuple(RESPONSE_FIELDS))
        if sys.version_info >= (3, 13):
            self.assertEqual(copy.replace(response, seed=7).seed, 7)
        self.assertEqual(Judged("4", verdict="right"), Judged(verdict="right", content="4"))
        self.assertEqual(Judged.from_dict(Judged("4", verdict="right").to_dict()), Judged("4", verdict="right"))
        self.assertEqual(Marked("4").full, "4")
        self.assertNotEqual(Marked("4"), Response("4"))

    def test_an_error_says_which_it_is(self) -> None:
        error = APIError("busy", status=503, seed=0, retryable=True)
        self.assertEqual(repr(error), "APIError('busy', status=503, seed=0, retryable=True)")
        self.assertEqual(eval(repr(error)).to_dict(), error.to_dict())

    def test_what_is_no_rollouts(self) -> None:
        for data in ({}, "x", None, {**of(Response("4")).to_dict(), "note": 1}, {"responses": [1], "errors": []}):
            with self.subTest(data=data), self.assertRaisesRegex(ValueError, "not a (Rollouts|Response|Usage)"):
                Rollouts.from_dict(data)

    def test_wrong_fields(self) -> None:
        for make, words in (
            (lambda: Response(), "missing .*'content'"),
            (lambda: Response("4", contents="5"), "unexpected .*'contents'"),
            (lambda: Response("4", content="5"), "multiple values .*'content'"),
            (lambda: Usage(*range(7)), "positional arguments"),
        ):
            with self.subTest(words=words), self.assertRaisesRegex(TypeError, words):
                make()

    def test_usage_adds_up(self) -> None:
        self.assertEqual(Usage(1, 2, 3, 4, 5, 0.5) + Usage(10, 20, 30, 40, 50, 0.25), Usage(11, 22, 33, 44, 55, 0.75))
        self.assertEqual(Usage() + Usage(), Usage())
        self.assertEqual(sum([Usage(1), Usage(2)]), Usage(3))
        with self.assertRaises(TypeError):
            Usage() + 1  # type: ignore[operator]


class AllOfThem(Case):
    """Rollouts as a sequence, and its sums."""

    def setUp(self) -> None:
        super().setUp()
        self.responses = [
            Response("four", "2 + 2", finish_reason="stop", seed=0, usage=Usage(10, 5, 15, 3, 2, 0.25)),
            Response("4", finish_reason="stop", seed=1, usage=Usage(10, 1, 11, 0, 0, 0.5), cached=True),
            Response("", "2 +", False, "length", seed=3, usage=Usage(10, 8, 18, 8, 0, 1.0)),
            Response("4", finish_reason=None, seed=4),
        ]
        self.rollouts = of(*self.responses, errors=[APIError("busy", status=503, seed=2)])

    def test_a_sequence_of_the_responses(self) -> None:
        self.assertEqual((len(self.rollouts), self.rollouts.num_responses, len(self.rollouts.errors)), (4, 5, 1))
        self.assertEqual(list(self.rollouts), self.responses)
        self.assertEqual([response.seed for response in self.rollouts], [0, 1, 3, 4])
        for index in (0, 3, -1, -4):
            self.assertIs(self.rollouts[index], self.responses[index])
        for part in (slice(1, 3), slice(None), slice(None, None, -1), slice(9, 12), slice(-2, None)):
            self.assertEqual(list(self.rollouts[part]), self.responses[part])
        for index in (4, -5):
            with self.assertRaises(IndexError):
                self.rollouts[index]
        self.assertIn(self.responses[1], self.rollouts)
        self.assertEqual(list(reversed(self.rollouts)), self.responses[::-1])
        self.assertTrue(self.rollouts)

    def test_each_ones_texts(self) -> None:
        self.assertEqual(self.rollouts.get_texts(), ["2 + 2</think>four", "4", "2 +", "4"])
        self.assertEqual(self.rollouts.get_reasonings(), ["2 + 2", None, "2 +", None])
        self.assertEqual(self.rollouts.get_contents(), ["four", "4", "", "4"])

    def test_sums(self) -> None:
        self.assertEqual(self.rollouts.usage, Usage(30, 14, 44, 11, 2, 1.75))
        self.assertEqual(self.rollouts.spent, Usage(20, 13, 33, 11, 2, 1.25))  # without the one from the cache
        self.assertEqual(self.rollouts.get_total_tokens(), 44)
        self.assertEqual(self.rollouts.get_finish_reasons(), {"stop": 2, "length": 1, None: 1})

    def test_counts(self) -> None:
        counts = self.rollouts.counts(lambda response: response.content or None)
        self.assertIs(type(counts), Counter)
        self.assertEqual(counts, {"4": 2, "four": 1, None: 1})
        self.assertEqual(counts.most_common(1), [("4", 2)])
        self.assertEqual(sum(counts.values()), len(self.rollouts))

    def test_none_at_all(self) -> None:
        empty = of()
        self.assertEqual((len(empty), list(empty), empty[:], bool(empty)), (0, [], [], False))
        self.assertEqual((empty.get_texts(), empty.get_finish_reasons(), empty.get_total_tokens()), ([], {}, 0))
        self.assertEqual((empty.usage, empty.spent, empty.counts(str)), (Usage(), Usage(), Counter()))

    def test_repr(self) -> None:
        """It says how many of how many, and is short."""
        self.assertIn("4 of 5", repr(self.rollouts))
        self.assertLess(len(repr(of(*[Response("x" * 1000)] * 50))), 200)

    def test_equality(self) -> None:
        value = of(*self.responses)
        self.assertEqual(Rollouts.from_dict(value.to_dict()), value)
        again = Rollouts.from_dict(self.rollouts.to_dict())  # an error is equal to itself alone
        self.assertEqual(dataclasses.replace(again, errors=self.rollouts.errors), self.rollouts)
        self.assertEqual([error.to_dict() for error in again.errors], [e.to_dict() for e in self.rollouts.errors])
        self.assertNotEqual(of(*self.responses[1:]), of(*self.responses))


class Errors(Case):
    def test_attributes(self) -> None:
        given: Dict[str, Any] = {
            "status": 429,
            "provider": "together",
            "seed": 7,
            "retryable": True,
            "retry_after": 2.5,
            "advice": "come back",
        }
        error = APIError("slow down", **given)
        self.assertEqual({name: getattr(error, name) for name in given}, given)
        self.assertEqual(error.message, "slow down")
        for word in ("slow down", "429", "together", "come back"):
            self.assertIn(word, str(error))
        self.assertIsInstance(error, rollouts.RolloutsError)
        self.assertNotIsInstance(error, ValueError)
        self.assertTrue(issubclass(rollouts.RolloutsError, Exception))

    def test_the_defaults(self) -> None:
        error = APIError("no reply")
        self.assertEqual(str(error), "no reply")
        self.assertEqual(
            (error.status, error.seed, error.retryable, error.retry_after, error.provider, error.advice),
            (None, None, False, None, "", ""))

    def test_pickled_it_says_the_same(self) -> None:
        rng = random.Random(4)
        for _ in range(20):
            error = some_error(rng)
            again = pickle.loads(pickle.dumps(error))
            self.assertEqual((str(again), repr(again), again.to_dict()), (str(error), repr(error), error.to_dict()))

    def test_what_is_noted_on_it_is_no_field(self) -> None:
        error = APIError("busy", status=503)
        error.__notes__ = ["the third one today"]  # as add_note() of Python 3.11 does
        self.assertEqual(list(error.to_dict()), ERROR_FIELDS)
        self.assertEqual(APIError.from_dict(error.to_dict()).to_dict(), error.to_dict())
        self.assertEqual(error, error)
        self.assertNotEqual(error, APIError("busy", status=503))
        self.assertEqual(len({error, APIError("busy")}), 2)

    def test_it_carries_what_caused_it(self) -> None:
        with self.assertRaises(rollouts.RolloutsError) as caught:
            try:
                raise OSError("the network is down")
            except OSError as error:
                raise APIError("no reply") from error
        self.assertIsInstance(caught.exception.__cause__, OSError)


if __name__ == "__main__":
    unittest.main()
