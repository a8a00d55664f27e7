"""Both caches keep one contract; then what is particular to each, and the key."""

import contextlib
import dataclasses
import glob
import json
import os
import random
import shutil
import sqlite3
import tempfile
import threading
import unittest
from unittest import mock

from tests import rollouts
from tests.case import Case, environment
from tests.server import Reply, by_seed, chat

RolloutsClient = rollouts.RolloutsClient


class CacheTest(Case):
    kind = "json"

    def client(self, server, **settings):
        return super().client(server, "maker/model-1", **{"use_cache": self.kind, **settings})

    def sent(self, server, generate, *arguments, **overrides):
        """The seeds that a call sends requests for."""
        before = len(server.requests)
        generate(*arguments, **overrides)
        return sorted(request.seed for request in server.requests[before:])

    def files(self, name):
        return sorted(glob.glob(os.path.join(glob.escape(self.cache_dir), "**", name), recursive=True))


class JsonStore(CacheTest):
    """How the tests look into JSON."""

    def stored(self):
        """The entries of the one prompt: seed -> text."""
        entries = {}
        for path in self.files("seed_*.json"):
            with open(path, "rb") as file:
                entries[int(path[-10:-5])] = file.read()
        return entries

    def spoil(self, seed, text):
        with open(self.files(f"seed_{seed:05d}.json")[0], "wb") as file:
            file.write(text)


class SqlStore(CacheTest):
    """How the tests look into SQLite."""

    kind = "sql"

    def rows(self, statement, *values, directory=None):
        path = os.path.join(directory or self.cache_dir, "rollouts.sqlite3")
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.text_factory = bytes
            return connection.execute(statement, values).fetchall()

    def stored(self):
        return dict(self.rows("SELECT seed, response FROM responses"))

    def spoil(self, seed, text):
        self.rows("UPDATE responses SET response = CAST(? AS TEXT) WHERE seed = ?", text, seed)


class Contract:
    """What holds for both."""

    def test_growing_asks_only_for_what_is_missing(self):
        server = self.serve()
        client = self.client(server)
        first = client.generate("q", 10)
        self.assertEqual(server.seeds(), list(range(10)))
        second = client.generate("q", 30)
        self.assertEqual(server.seeds(), list(range(30)))
        self.assertEqual([response.seed for response in second], list(range(30)))
        self.assertEqual(second.get_contents(), [f"answer {seed}" for seed in range(30)])
        self.assertEqual([response.cached for response in first], [False] * 10)
        self.assertEqual([response.cached for response in second], [True] * 10 + [False] * 20)
        self.assertEqual(first.responses, second[:10])
        self.assertEqual((second.usage.total_tokens, second.spent.total_tokens), (30 * 15, 20 * 15))

    def test_another_client_gets_the_same(self):
        server = self.serve()
        first = self.client(server).generate("q", 5)
        server.__exit__()
        again = self.client(server).generate("q", 5)
        self.assertEqual(again.responses, first.responses)
        self.assertTrue(all(response.cached for response in again))
        self.assertEqual(again.spent, rollouts.Usage())
        self.assertEqual(again.usage, first.usage)
        self.assertEqual((first.cache_dir, again.cache_dir), (self.cache_dir, self.cache_dir))

    def test_any_range_of_seeds(self):
        server = self.serve()
        client = self.client(server)
        self.assertEqual(self.sent(server, client.generate, "q", 3, seed=5), [5, 6, 7])
        self.assertEqual(self.sent(server, client.generate, "q", 10), [0, 1, 2, 3, 4, 8, 9])
        self.assertEqual(self.sent(server, client.generate, "q", 2, seed=123456), [123456, 123457])
        self.assertEqual(self.sent(server, client.generate, "q", 10), [])

    def test_the_largest_seeds(self):
        server = self.serve()
        client = self.client(server)
        largest = 2**63 - 1
        self.assertEqual(self.sent(server, client.generate, "q", 1, seed=largest), [largest])
        self.assertEqual(self.sent(server, client.generate, "q", 1, seed=largest), [])
        # One more does not fit: as with any other bad argument, nothing is sent.
        with self.assertRaisesRegex(ValueError, "seed|n_samples"):
            client.generate("q", 2, seed=largest)
        self.assertEqual(len(server.requests), 1)

    def test_the_cache_of_one_call(self):
        server = self.serve()
        client = self.client(server)
        other = "sql" if self.kind == "json" else "json"
        self.assertIsNone(client.generate("q", 2, use_cache=False).cache_dir)
        self.assertFalse(os.path.exists(self.cache_dir))
        self.assertEqual(self.sent(server, client.generate, "q", 2), [0, 1])
        self.assertEqual(self.sent(server, client.generate, "q", 2, use_cache=False), [0, 1])
        self.assertEqual(self.sent(server, client.generate, "q", 2, use_cache=other), [0, 1])
        self.assertEqual(self.sent(server, client.generate, "q", 2, use_cache=other), [])
        with tempfile.TemporaryDirectory() as elsewhere:
            self.assertEqual(self.sent(server, client.generate, "q", 2, cache_dir=elsewhere), [0, 1])
            self.assertEqual(self.sent(server, client.generate, "q", 2, cache_dir=elsewhere), [])
            client.close()  # Windows deletes no open file

    def test_a_response_is_on_disk_before_the_next_is_asked_for(self):
        found = []

        def script(request):
            if request.seed:
                found.append(sorted(self.stored()))
            return by_seed(request)

        self.client(self.serve(script), max_concurrency=1).generate("q", 4)
        self.assertEqual(found, [[0], [0, 1], [0, 1, 2]])

    def test_unusable_entries_are_a_miss_and_one_warning_and_are_healed(self):
        server = self.serve()
        client = self.client(server)
        client.generate("q", 4)
        good = self.stored()
        entry = json.loads(good[0])
        for name, text in {
            "empty": b"",
            "truncated": good[0][: len(good[0]) // 2],
            "no JSON": b"<html>",
            "no UTF-8": b'"\xff\xfe"',
            "zeros, as after a power cut": bytes(len(good[0])),
            "nested too deeply": b"[" * 100_000,
            "null": b"null",
            "a list": b"[]",
            "a chat message": b'{"role": "assistant", "content": "hello"}',
            "a chat completion": json.dumps(chat("hello").body).encode(),
            "another type in a field": json.dumps({**entry, "content": 7}).encode(),
            "another type in the usage": json.dumps({**entry, "usage": {"total_tokens": "7"}}).encode(),
            "the entry of another seed": good[3],
            "an error": json.dumps({**entry, "finish_reason": "error"}).encode(),
        }.items():
            with self.subTest(name):
                for seed in (0, 1):
                    self.spoil(seed, text)
                with self.warned() as caught:
                    before = len(server.requests)
                    answer = self.client(server).generate("q", 4)
                self.assertEqual(sorted(request.seed for request in server.requests[before:]), [0, 1])
                self.assertEqual(answer.get_contents(), [f"answer {seed}" for seed in range(4)])
                self.assertEqual([response.cached for response in answer], [False, False, True, True])
                self.assertEqual(len(caught), 1, caught)
                self.assertIn("2 cache entries", caught[0])
                with self.warned() as caught:
                    self.assertEqual(self.sent(server, self.client(server).generate, "q", 4), [])
                self.assertEqual(caught, [])

    def test_an_unwritable_cache_costs_one_warning(self):
        server = self.serve()
        file = os.path.join(self.directory, "file")
        with open(file, "w"):
            pass
        for cache_dir in (file, os.path.join(file, "below")):
            with self.subTest(cache_dir=cache_dir):
                client = self.client(server, cache_dir=cache_dir)
                with self.warned() as caught:
                    answer = client.generate("q", 3)
                self.assertEqual(answer.get_contents(), ["answer 0", "answer 1", "answer 2"])
                self.assertEqual(len(caught), 1)
                self.assertIn("could not be written", caught[0])
                self.assertIn("file", caught[0])
                with self.warned() as caught:  # nor does it speak of entries, where there can be none
                    client.generate("q")
                self.assertNotIn("entries", caught[0])

    def test_the_directory_may_be_deleted_meanwhile(self):
        server = self.serve()
        client = self.client(server)
        client.generate("q", 2)
        shutil.rmtree(self.cache_dir)
        with self.warned() as caught:
            self.assertEqual(self.sent(server, client.generate, "q", 3), [0, 1, 2])
            self.assertEqual(self.sent(server, client.generate, "q", 3), [])
            self.assertEqual(self.sent(server, self.client(server).generate, "q", 3), [])
        self.assertEqual(caught, [])

    def test_everything_comes_back_as_it_was(self):
        texts = [
            "", "a\nb\r\n\tc", "\0\x7f\u2028\ufeff", "Grüße, 世界 🎲", "half a pair \ud83c", "\udfb2 the other",
            "</think>", "x" * 10**6]
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 1.25e-7,
                 "completion_tokens_details": {"reasoning_tokens": 1}, "prompt_tokens_details": {"cached_tokens": 1}}
        server = self.serve(lambda request: chat(
            texts[request.seed], "length", {"reasoning": texts[-1 - request.seed]}, id="gen-ü", provider="Q&A",
            usage=usage))
        for prompt in ("q", "🎲 \ud83c", [{"role": "user", "content": "Grüße \udfb2"}]):
            with self.subTest(prompt=prompt):
                first = self.client(server, max_tokens=9).generate(prompt, len(texts))
                again = self.client(server, max_tokens=9).generate(prompt, len(texts))
                self.assertTrue(all(response.cached for response in again))
                self.assertEqual(again.responses, first.responses)
                self.assertEqual(again.prompt, prompt)
        self.assertEqual(len(server.requests), 3 * len(texts))
        self.assertEqual(first.usage.cached_tokens, len(texts))

    def test_a_full_cache_needs_no_key_and_no_network_and_no_thread(self):
        # A server on this machine needs no key, so this one is reached as a proxy on the way to a distant API.
        server = self.serve()
        settings = {"provider": "together", "base_url": "http://api.invalid/v1", "progress_bar": True,
                    "use_cache": self.kind, "cache_dir": self.cache_dir}
        with environment(http_proxy=server.url[: -len("/v1")]), \
                RolloutsClient("m", api_key="secret", **{**settings, "progress_bar": False}) as client:
            first = client.generate("q", 3)
        server.__exit__()
        with RolloutsClient("m", **settings) as client, \
                mock.patch.object(threading.Thread, "start", side_effect=AssertionError("a thread")):
            self.assertEqual(client.generate("q", 3).responses, first.responses)
            self.assertEqual(client.generate_many(["q", "q"], 2)[1].responses, first[:2])
        with RolloutsClient("m", **settings) as client:
            with self.warned() as caught, mock.patch("sys.stderr"):
                four = client.generate("q", 4)
            self.assertEqual((len(four), len(caught)), (3, 1))
            self.assertIn("TOGETHER_API_KEY", str(four.errors[0]))

    def test_the_key_is_in_no_file(self):
        self.client(self.serve(), api_key="sk-very-secret").generate("q", 2)
        for path in self.files("*"):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    self.assertNotIn(b"very-secret", file.read(), path)
                self.assertNotIn("very-secret", path)

    def test_failures_are_not_kept(self):
        server = self.serve(lambda request: by_seed(request) if request.seed else Reply(500))
        client = self.client(server, max_retries=0)
        with self.warned():
            self.assertEqual(len(client.generate("q", 3).errors), 1)
        server.script = by_seed
        self.assertEqual(self.sent(server, client.generate, "q", 3), [0])

    def test_the_same_prompt_twice_in_one_call(self):
        server = self.serve()
        one, two = self.client(server).generate_many(["q", "q"], 5)
        self.assertEqual(one.responses, two.responses)
        self.assertEqual(server.seeds(), [0, 1, 2, 3, 4])


class JsonContract(Contract, JsonStore):
    """JSON keeps the contract."""


class SqlContract(Contract, SqlStore):
    """SQLite keeps the contract."""


class Json(JsonStore):
    def test_true_is_json(self):
        server = self.serve()
        self.client(server, use_cache=True).generate("q", 2)
        self.assertEqual(self.sent(server, self.client(server, use_cache="json").generate, "q", 2), [])
        self.assertEqual(self.files("*.sqlite3"), [])

    def test_layout(self):
        client = self.client(self.serve(), api_key="secret", temperature=0.5, max_tokens=100)
        client.generate("one", 2, stop=["."])
        client.generate("two", seed=12345)
        client.generate("two", seed=12345, temperature=1)
        found = [
            os.path.relpath(path, self.cache_dir).split(os.sep) for path in self.files("*") if os.path.isfile(path)]
        self.assertEqual(len(found), 2 + 1 + 2 + 2)  # and no draft is left over
        for path in found:
            model, parameters, short, messages, name = path
            self.assertIn("model-1", model)
            self.assertRegex(parameters, r"^[\w.-]*-[0-9a-f]{8,}$")
            self.assertRegex(messages, r"^[0-9a-f]{32,}$")
            self.assertEqual(short, messages[:3])
            self.assertRegex(name, r"^(request|seed_00000|seed_00001|seed_12345)\.json$")
        self.assertEqual(len({path[0] for path in found}), 1)
        self.assertEqual(len({path[1] for path in found}), 3)  # with stop, without, at another temperature
        self.assertEqual(len({path[3] for path in found}), 2)  # the prompts

    def test_a_request_is_stored_once_and_a_seed_file_holds_its_response_alone(self):
        answer = self.client(self.serve(), api_key="secret", temperature=0.5).generate("q", 2, min_p=0.1)
        for path, response in zip(self.files("seed_*.json"), answer):
            with open(path, encoding="utf-8") as file:
                entry = json.load(file)
            self.assertEqual({*entry, "cached", "full"}, set(response.to_dict()))
            self.assertEqual(rollouts.Response.from_dict(entry), response)
        (path,) = self.files("request.json")
        with open(path, encoding="utf-8") as file:
            request = json.load(file)
        self.assertEqual(request["messages"], [{"role": "user", "content": "q"}])
        self.assertEqual((request["model"], request["temperature"], request["min_p"]), ("maker/model-1", 0.5, 0.1))
        self.assertFalse({"seed", "stream", "api_key", "timeout"} & set(request))

    def test_caches_merge_by_copying(self):
        server = self.serve()
        one, two = os.path.join(self.directory, "one"), os.path.join(self.directory, "two")
        self.client(server, cache_dir=one).generate_many(["p", "q"], 5)
        self.client(server, cache_dir=two).generate_many(["q", "r"], 5, seed=3)
        shutil.copytree(one, two, dirs_exist_ok=True)
        merged = self.client(server, cache_dir=two)
        self.assertEqual(self.sent(server, merged.generate, "q", 8), [])
        self.assertEqual(self.sent(server, merged.generate, "p", 5), [])
        self.assertEqual(self.sent(server, merged.generate, "r", 5, seed=3), [])

    def test_an_entry_that_can_be_neither_read_nor_replaced(self):
        server = self.serve()
        self.client(server).generate("q", 2)
        path = self.files("seed_00001.json")[0]
        os.remove(path)
        os.mkdir(path)
        with self.warned() as caught:
            self.assertEqual(self.client(server).generate("q", 2).get_contents(), ["answer 0", "answer 1"])
        self.assertEqual(len(caught), 1)
        self.assertEqual(server.seeds(), [0, 1, 1])
        self.assertEqual(self.files(".*.tmp"), [])

    def test_a_damaged_request_file_harms_nothing(self):
        server = self.serve()
        self.client(server).generate("q", 2)
        with open(self.files("request.json")[0], "w") as file:
            file.write("{")
        with self.warned() as caught:
            self.assertEqual(self.sent(server, self.client(server).generate, "q", 3), [2])
        self.assertEqual(caught, [])


class Sql(SqlStore):
    def test_layout(self):
        answer = self.client(self.serve(), api_key="secret").generate_many(["p", "q"], 3)
        self.assertEqual(self.rows("PRAGMA journal_mode"), [(b"wal",)])
        tables = self.rows("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        self.assertEqual(tables, [(b"requests",), (b"responses",)])
        requests = [json.loads(text) for _, text in self.rows("SELECT * FROM requests")]
        self.assertEqual(sorted(request["messages"][0]["content"] for request in requests), ["p", "q"])
        rows = self.rows("SELECT seed, response FROM responses ORDER BY seed")
        self.assertEqual([seed for seed, _ in rows], [0, 0, 1, 1, 2, 2])
        self.assertEqual(rollouts.Response.from_dict(json.loads(rows[0][1])), answer[0][0])

    def test_a_file_that_is_no_database_costs_one_warning(self):
        server = self.serve()
        os.mkdir(self.cache_dir)
        path = os.path.join(self.cache_dir, "rollouts.sqlite3")
        for name, content in {"text": b"no database " * 1000, "a directory": None}.items():
            with self.subTest(name):
                if content is None:
                    os.remove(path)
                    os.mkdir(path)
                else:
                    with open(path, "wb") as file:
                        file.write(content)
                with self.warned() as caught:
                    answer = self.client(server).generate("q", 3)
                self.assertEqual(answer.get_contents(), ["answer 0", "answer 1", "answer 2"])
                self.assertEqual(len(caught), 1)
                self.assertIn("rollouts.sqlite3", caught[0])

    def test_a_truncated_database_costs_one_warning(self):
        server = self.serve()
        with self.client(server) as client:
            client.generate("q", 50)
        path = os.path.join(self.cache_dir, "rollouts.sqlite3")
        os.truncate(path, os.path.getsize(path) // 2)
        with self.warned() as caught:
            self.assertEqual(len(self.client(server).generate("q", 50)), 50)
        self.assertEqual(len(caught), 1)


# What a request may differ in. Every setting stands in one of the two tables, so that a new one has to be put there.
DISTINCT = {
    "model": ["other/model", "maker/model_1"],
    "temperature": [None, 0, 1.2],
    "top_p": [None, 0.5],
    "max_tokens": [None, 1, 4097],
    "top_k": [1, 2],
    "presence_penalty": [0, 0.5],
    "frequency_penalty": [0, 0.5],
    "provider": [
        {"order": ["a"]}, {"order": ["a", "b"]}, {"order": ["b", "a"]}, {"only": ["a"]}, {"sort": {"by": "price"}}],
    "base_url": ["/x", "/y"],  # put behind the server's
    "prefill": ["continue_final_message", "prefix", "partial", "reasoning_content", "thinking", "reasoning"],
    "endpoint": ["completions"],
    "extra": [{"min_p": 0.1}, {"min_p": 0.2}, {"stop": ["a"]}, {"stop": "a"}, {"reasoning": {"effort": "low"}},
              {"reasoning": {"effort": "high"}}, {"logit_bias": {"1": 1}}, {"logit_bias": {"1": True}}],
}
NEUTRAL = {
    "api_key": "another", "seed": 0, "use_cache": "json", "cache_dir": None, "progress_bar": False, "verbose": False,
    "requests_per_minute": 1e5, "max_concurrency": 3, "max_retries": 2, "timeout": 9, "stream": False,
    "offline": True,
}


class Key(JsonStore):
    INJECTED = "q\n<think>\nso"  # the dialect shows in an injection only

    def test_every_setting_is_in_a_table(self):
        names = {field.name for field in dataclasses.fields(rollouts.Config)}
        self.assertEqual(names, {*DISTINCT, *NEUTRAL})

    def variations(self, server):
        for name, values in DISTINCT.items():
            for value in values:
                yield name, {name: server.url + value if name == "base_url" else value}

    def test_what_differs_anywhere_never_shares_an_entry(self):
        server = self.serve()
        client = self.client(server)
        self.assertEqual(self.sent(server, client.generate, self.INJECTED), [0])
        asked = set()
        for name, override in self.variations(server):
            with self.subTest(override):
                self.assertEqual(self.sent(server, client.generate, self.INJECTED, **override), [0])
                self.assertEqual(self.sent(server, client.generate, self.INJECTED, **override), [])
                asked.add(name)
        self.assertEqual(asked, set(DISTINCT))

    def test_white_space_round_a_model_is_no_difference(self):
        server = self.serve()
        client = self.client(server)
        self.assertEqual(self.sent(server, client.generate, "q"), [0])
        self.assertEqual(self.sent(server, client.generate, "q", model=" maker/model-1 "), [])

    def test_what_changes_nothing_in_the_answer_is_no_difference(self):
        server = self.serve()
        client = self.client(server)
        self.assertEqual(self.sent(server, client.generate, "q", 3), [0, 1, 2])
        for name, value in NEUTRAL.items():
            with self.subTest(name):
                if value is not None:
                    self.assertEqual(self.sent(server, client.generate, "q", 3, **{name: value}), [])
        self.assertEqual(self.sent(server, client.generate, "q", 3, stream=True), [])
        self.assertEqual(self.sent(server, client.generate, "q", 1, seed=2), [])
        self.assertEqual(self.sent(server, client.generate, "q", 1, temperature=0.7, top_p=0.95), [])
        self.assertEqual(self.sent(server, client.generate, "q", 1, min_p=None), [])
        self.assertEqual(self.sent(server, client.generate, "q", 1, base_url=server.url + "/"), [])
        self.assertEqual(self.sent(server, client.generate, [{"role": "user", "content": "q"}]), [])
        self.assertEqual(self.sent(server, client.generate, [{"content": "q", "role": "user"}]), [])

    def test_messages(self):
        server = self.serve()
        client = self.client(server)
        prompts = [
            "q", "q ", " q", "Q", "q\n<think>\n", "q\n<think>\nso", "q\n<think>\nso\n</think>\n\n",
            [{"role": "system", "content": "q"}], [{"role": "user", "content": "q", "name": "x"}],
            [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}],
            [{"role": "user", "content": [{"type": "text", "text": "q"}]}], [{"role": "user", "content": "é"}],
            [{"role": "user", "content": "e\u0301"}], [{"role": "user", "content": "\ud83c"}],
        ]
        for prompt in prompts * 2:
            client.generate(prompt)
        self.assertEqual(len(server.requests), len(prompts))

    def test_random_fields(self):
        """A seeded loop: as many entries as there are different bodies, in whatever order their names come."""
        server = self.serve()
        client = self.client(server)
        chance = random.Random(2506)

        def value(depth):
            kind = chance.randrange(7 if depth else 5)
            if kind < 5:
                return [chance.randrange(3), chance.random(), chance.choice("abc"), True, "ü"][kind]
            if kind == 5:
                return [value(depth - 1) for _ in range(chance.randrange(3))]
            return {chance.choice("stuvw"): value(depth - 1) for _ in range(chance.randrange(4))}

        def shuffled(given):
            if isinstance(given, dict):
                return {name: shuffled(given[name]) for name in chance.sample(list(given), len(given))}
            return [shuffled(item) for item in given] if isinstance(given, list) else given

        bodies = [{f"field_{chance.randrange(4)}": value(2) for _ in range(3)} for _ in range(150)]
        different = len({json.dumps(body, sort_keys=True) for body in bodies})
        for body in chance.sample(bodies, len(bodies)):
            client.generate("q", extra=body)
        self.assertEqual(len(server.requests), different)
        for body in bodies:
            client.generate("q", extra=shuffled(body))
            with self.warned():  # of fields that no API documents
                client.generate("q", **shuffled(body))
        self.assertEqual(len(server.requests), different)


del CacheTest, JsonStore, SqlStore  # they have no tests of their own

if __name__ == "__main__":
    unittest.main()
