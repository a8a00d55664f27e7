"""Settings: what they take, which request they make, where the key goes."""

import asyncio
import copy
import dataclasses
import inspect
import io
import numbers
import os
import pathlib
import threading
import unittest
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any, Dict
from unittest import mock

from tests import rollouts
from tests.case import Case, Clock, environment
from tests.server import Reply, Request, Server, by_seed, chat, delta, events

APIError, Config, RolloutsClient = rollouts.APIError, rollouts.Config, rollouts.RolloutsClient
NAN, INF = float("nan"), float("inf")


class Array:
    """What compares as numpy's arrays do: to something that is neither true nor false."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array is ambiguous")


NOWHERE = "http://127.0.0.1:9/v1"  # nothing listens there, and no test sends anything to it

SAMPLING = ("temperature", "top_p", "max_tokens", "top_k", "presence_penalty", "frequency_penalty")

# What no setting takes, at the client as at the call.
BAD: Dict[str, Any] = {
    "model": ["", "  ", None, 5, True, b"m", "a\nb", "a\0b", ["m"]],
    "temperature": [-0.01, 2.01, NAN, INF, -INF, "0.7", True, False, [0.7], 1j, 10**400, Decimal("0.7"), Array()],
    "top_p": [-0.1, 1.1, NAN, INF, "1", True, {}],
    "max_tokens": [0, -1, 1.0, 2.5, "100", True, NAN, INF, 2**63],
    "top_k": [-2, 1.0, "40", True, NAN],
    "presence_penalty": [-2.1, 2.1, NAN, INF, "0", False],
    "frequency_penalty": [-2.1, 2.1, NAN, INF, "0", False],
    "seed": [-1, 1.0, "0", True, False, NAN, 2**63, Array()],
    "provider": ["", "nowhere", "open router", 5, True, ["together"], {"order": {1, 2}}, {"sort": NAN}],
    "base_url": [
        "",
        "localhost:8080",
        "localhost:8080/v1",
        "//host/v1",
        "ftp://host/v1",
        "http://",
        "http:///v1",
        "http://ho st/v1",
        "http://host:port/v1",
        "http://host:0/v1",
        "http://host:99999/v1",
        "http://[::1/v1",
        "http://a..b/v1",
        "http://höst/v1",
        "http://host/v1\n/x",
        5,
        True,
        b"http://host/v1",
    ],
    "api_key": [5, True, b"sk-1", "sk 1", "sk-1\nX-Header: 1", "schlüssel", ["sk-1"]],
    "use_cache": ["sqlite", "yes", "", None, 1, 0, 1.0],
    "cache_dir": ["", None, 5, True, "a\0b", b"bytes"],
    "progress_bar": [None, 0, 1, "yes"],
    "verbose": [None, 0, 1, "no"],
    "requests_per_minute": [0, -1, NAN, INF, "60", True, 2e6],
    "max_concurrency": [0, -1, 1.5, "10", True, None, 10_001, NAN],
    "max_retries": [-1, 0.5, "3", True, None, 1001, NAN],
    "timeout": [0, -1, NAN, INF, "60", True, None, 86_401],
    "stream": [0, 1, "true"],
    "prefill": ["", "suffix", True, 5],
    "endpoint": ["", "completion", "Chat", None, True],
    "offline": [None, 0, 1, "yes"],
    "extra": [5, "min_p", [1], ["ab"], [("min_p", 0.1)], {1: 2}, {"min_p": NAN}, {"stop": {"a"}}],
}
BAD_PROMPTS: Any = [
    "", [], (), None, 5, True, 2.5, b"bytes", {"role": "user", "content": "a dict, not a list"}, ["a str in a list"],
    [{"content": "no role"}], [["user", "hi"]], [None], iter([{"role": "user", "content": "hi"}]),
    [{"role": "user", "content": {1, 2}}], [{"role": "user", "content": NAN}]]
BAD_NUMBERS_OF_SAMPLES: Any = [0, -1, True, False, 2.5, 1.0, "3", None, NAN, INF, [1]]

# What the edges of the ranges are, and what else is taken: given, and what is kept.
GOOD: Dict[str, Any] = {
    "model": [
        ("qwen/qwen3-30b-a3b", "qwen/qwen3-30b-a3b"),
        (" m ", "m"),
        ("accounts/x/models/y:free@1", "accounts/x/models/y:free@1"),
    ],
    "temperature": [(0, 0.0), (2, 2.0), (0.5, 0.5), (Fraction(1, 2), 0.5), (None, None)],
    "top_p": [(0, 0.0), (1, 1.0), (None, None)],
    "max_tokens": [(1, 1), (2**63 - 1, 2**63 - 1), (None, None)],
    "top_k": [(-1, -1), (0, 0), (40, 40), (None, None)],
    "presence_penalty": [(-2, -2.0), (2, 2.0), (None, None)],
    "frequency_penalty": [(-2, -2.0), (2, 2.0), (None, None)],
    "seed": [(0, 0), (2**63 - 1, 2**63 - 1), (None, None)],
    "provider": [
        ("together", "together"),
        ("Together", "together"),
        (None, None),
        ({"order": ["a"]}, {"order": ["a"]}),
        ({}, {}),
    ],
    "base_url": [
        ("http://localhost:8080/v1", "http://localhost:8080/v1"),
        (" http://localhost:8080/v1/ ", "http://localhost:8080/v1"),
        ("https://host/v1/chat/completions", "https://host/v1"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
        (None, None),
    ],
    "api_key": [("sk-1", "sk-1"), (" sk-1\n", "sk-1"), ("", None), (None, None)],
    "use_cache": [(True, True), (False, False), ("json", "json"), ("sql", "sql")],
    "cache_dir": [("here", "here"), (pathlib.Path("here"), "here"), ("~/here", os.path.expanduser("~/here"))],
    "requests_per_minute": [(0.5, 0.5), (600, 600.0), (None, None)],
    "max_concurrency": [(1, 1), (10_000, 10_000)],
    "max_retries": [(0, 0), (1000, 1000)],
    "timeout": [(0.001, 0.001), (86_400, 86_400.0)],
    "stream": [(True, True), (False, False), (None, None)],
    "prefill": [("prefix", "prefix"), ("trailing", "trailing"), (None, None)],
    "endpoint": [("chat", "chat"), ("completions", "completions")],
    "offline": [(True, True), (False, False)],
}


# Every setting, each different from its default.
EVERYTHING: Dict[str, Any] = {
    "model": "a/b", "temperature": 0.1, "top_p": 0.2, "max_tokens": 30, "top_k": 40, "presence_penalty": 0.5,
    "frequency_penalty": -0.6, "seed": 7, "provider": "together", "base_url": NOWHERE, "api_key": "sk-secret",
    "use_cache": "sql", "cache_dir": "somewhere", "progress_bar": False, "verbose": True, "requests_per_minute": 60.0,
    "max_concurrency": 8, "max_retries": 9, "timeout": 10.0, "stream": True, "prefill": "prefix",
    "endpoint": "completions", "offline": True, "extra": {"min_p": 0.1},
}


# Wrong keywords by what they mean: from openai, litellm, vLLM, transformers, LangChain, lm-eval, the code of Thought
# Anchors, and from memory. Those that mean nothing here come last.
WRONG = {
    "model": "model_name model_id engine",
    "base_url": "api_base openai_api_base url baseURL",
    "provider": "custom_llm_provider",
    "provider={'only': …}": "only",
    "provider={'allow_fallbacks': …}": "allow_fallbacks",
    "temperature": "temp temprature",
    "top_p": "topp topP",
    "top_k": "topK",
    "max_tokens": "max_new_tokens max_length max_completion_length max_output_tokens max_gen_toks maxTokens max_token",
    "repetition_penalty": "rep_penalty repetition_penality",
    "stop": "stops stop_sequences stop_strings until",
    "reasoning_effort": "think effort reasoning_efort",
    "response_format": "json_mode response_schema",
    "extra={…}": "extra_body model_kwargs sampling_params generation_config",
    "seed": "seeds seed_start random_state",
    "timeout": "request_timeout timeout_s",
    "max_retries": "num_retries retries max_attempts",
    "max_concurrency": "max_workers num_workers workers threads n_jobs batch_size",
    "requests_per_minute": "rpm rate_limit",
    "agenerate(…)": "use_async",
    "use_cache": "cache",
    "use_cache=False": "overwrite force",
    "cache_dir": "cache_path output_dir",
    "offline=True": "dry_run",
    "progress_bar": "tqdm use_tqdm show_progress",
    "verbose": "verbose_level log verbos",
    "stream": "streaming",
    "generate(prompt, n_samples)": "num_rollouts n_rollouts nr_samples num_samples num_return_sequences n_responses k",
    "a message of the role 'system'": "system sys_prompt system_prompt",
    "a <think> in the prompt, or prefill": "prefix prompt_prefix assistant_prefill",
    "resample's second argument": "chunk chunks sentence sentences base_solution",
    "resample(at=…)": "at positions chunk_idx",
    "resample(suffix=…)": "suffix",
    "create_client(preset=…)": "preset",
    "a setting of the Ollama server, as its /v1 takes none": "num_ctx options keep_alive",
    "plugins=[{'id': 'context-compression'}]": "transforms",
    "": "api_version organization drop_params fallbacks callbacks num_beams early_stopping pad_token_id rollout_type "
        "trust_remote_code tensor_parallel_size force_answer",
}
DOCUMENTED = """
    prompt_cache_retention web_search_options stop_server_tools_when image_config reasoning include_reasoning top_a
    reasoning_history perf_metrics_in_response safety_model search_settings disable_reasoning min_completion_tokens
    do_sample guardrails prompt_mode separate_reasoning enable_thinking thinking thinking_budget reasoning_split
    structured_outputs guided_json repetition_detection thinking_token_budget return_prompt_text stop_token_ids
    chat_template_kwargs ebnf custom_params return_hidden_states mirostat dry_multiplier reasoning_control n_probs
    top_n_sigma xtc_probability adapters role_mapping ttl draft_model
"""


class Integer:
    """An integer that is no int, as numpy's are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __le__(self, other: Any) -> bool:
        return self.value <= int(other)

    def __ge__(self, other: Any) -> bool:
        return self.value >= int(other)


numbers.Integral.register(Integer)


class Settings(Case):
    """With one attempt for each sample."""

    settings = {"max_retries": 0}

    def setUp(self) -> None:
        super().setUp()
        self.use_clock(Clock(0.5))

    def quiet(self) -> Dict[str, Any]:
        return {"cache_dir": self.cache_dir, "progress_bar": False, "max_retries": 0}

    def body_of(self, client: RolloutsClient, server: Server, *arguments: Any, **overrides: Any) -> Dict[str, Any]:
        """The body of the one request that a call sends, without what every body has."""
        before = len(server.requests)
        client.generate(*(arguments or ("hi",)), **{"use_cache": False, **overrides})
        self.assertEqual(len(server.requests), before + 1)
        return {
            name: value for name, value in server.requests[-1].body.items() if name not in ("messages", "seed", "model")
        }


class Arguments(Settings):
    """Each is checked before anything is sent: the parameter, the value it got, what it takes."""

    def refuses(self, name: str, value: Any, call: Any, *arguments: Any, **settings: Any) -> None:
        with self.assertRaises(ValueError) as caught:
            call(*arguments, **settings)
        words = str(caught.exception)
        self.assertTrue(words.startswith(f"{name} takes "), words)
        self.assertGreater(len(words.split(" takes ")[1].split(", not ")[0]), 8, words)
        if name != "api_key":
            self.assertIn(repr(value)[:60], words)

    def test_bad_at_the_client(self) -> None:
        for name, values in BAD.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    self.refuses(name, value, RolloutsClient, **{"model": "m", name: value})

    def test_bad_in_a_config(self) -> None:
        for name, values in BAD.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    self.refuses(name, value, Config, **{"model": "m", name: value})

    def test_bad_at_the_call(self) -> None:
        server = self.serve()
        client = self.client(server)
        for name, values in BAD.items():
            for value in values:
                if name == "api_key" and value is None:
                    continue
                with self.subTest(name=name, value=value):
                    self.refuses(name, value, client.generate, "hi", 2, **{name: value})
                    self.refuses(name, value, client.generate_many, ["hi"], 2, **{name: value})
        self.assertEqual(server.requests, [])
        self.assertFalse(os.path.exists(self.cache_dir))

    def test_bad_prompts_and_numbers_of_samples(self) -> None:
        server = self.serve()
        client = self.client(server)
        for value in BAD_PROMPTS:
            with self.subTest(prompt=value):
                for call, argument in ((client.generate, value), (client.generate_many, ["fine", value])):
                    with self.assertRaisesRegex(ValueError, "^prompt takes "):
                        call(argument, 2)
        for value in BAD_NUMBERS_OF_SAMPLES:
            with self.subTest(n_samples=value):
                self.refuses("n_samples", value, client.generate, "hi", value)
                self.refuses("n_samples", value, client.generate_many, ["hi"], value)
                self.refuses("n_samples", value, client.resample, "hi", "One. Two.", value)
        for value in ("one prompt", {"role": "user", "content": "hi"}, None, 5):
            with self.subTest(prompts=value), self.assertRaisesRegex(ValueError, "^prompts takes "):
                client.generate_many(value)
        for value in (
            None, 5, "x</think>", "<think>\nx", b"One.", {"One.": 1}, rollouts.Response("4"), [""], ["One.", ""],
            ["One.", 5], ["One.", "</think>"], ["a</thi", "nk>b"],
        ):
            with self.subTest(reasoning=value), self.assertRaisesRegex(ValueError, "^reasoning takes "):
                client.resample("hi", value, 2)
        for value in (5, [-1], [3], ["1"], [True], [1.0]):
            with self.subTest(at=value), self.assertRaisesRegex(ValueError, "^at takes "):
                client.resample("hi", "One. Two.", 2, at=value)
        self.assertEqual(server.requests, [])

    def test_a_seed_that_runs_out_of_range(self) -> None:
        server = self.serve()
        for use_cache in (False, "json", "sql"):
            with self.subTest(use_cache=use_cache):
                client = self.client(server, use_cache=use_cache)
                with self.assertRaisesRegex(ValueError, "seed"):
                    client.generate("hi", 2, seed=2**63 - 1)
        self.assertEqual(server.requests, [])

    def test_the_known_ones_are_listed(self) -> None:
        for names, call, settings in (
            (
                (
                    "openrouter",
                    "fireworks",
                    "together",
                    "deepseek",
                    "novita",
                    "deepinfra",
                    "groq",
                    "cerebras",
                    "mistral",
                    "nebius",
                    "sambanova",
                    "hyperbolic",
                    "openai",
                    "vllm",
                    "sglang",
                    "llamacpp",
                    "ollama",
                    "lmstudio",
                ),
                RolloutsClient,
                {"provider": "nowhere"},
            ),
            (("True", "False", "'json'", "'sql'"), RolloutsClient, {"use_cache": "sqlite"}),
            (("trailing", "continue_final_message", "prefix"), RolloutsClient, {"prefill": "suffix"}),
            (("deterministic", "focused", "balanced", "creative"), rollouts.create_client, {"preset": "wild"}),
        ):
            with self.subTest(settings=settings), self.assertRaises(ValueError) as caught:
                call("m", **settings)
            for name in names:
                self.assertIn(name, str(caught.exception))

    def test_good(self) -> None:
        for name, pairs in GOOD.items():
            for given, kept in pairs:
                with self.subTest(name=name, given=given):
                    client = self.client(**{name: given})
                    self.assertEqual(getattr(client, name), kept)
                    self.assertIs(
                        type(getattr(client, name)),
                        type(kept) if name != "api_key" or kept is None else type(client.api_key),
                    )
                    self.assertEqual(getattr(Config(**{"model": "m", name: given}), name), kept)

    def test_integers_of_other_kinds(self) -> None:
        server = self.serve()
        client = self.client(
            base_url=server.url, max_tokens=Integer(7), max_concurrency=Integer(3), max_retries=Integer(2)
        )
        answers = client.generate("hi", Integer(3), seed=Integer(5), top_k=Integer(40))
        self.assertEqual([response.seed for response in answers], [5, 6, 7])
        self.assertEqual(
            {(request.body["max_tokens"], request.body["top_k"]) for request in server.requests}, {(7, 40)}
        )
        for value in (Integer(0), Integer(-1)):
            with self.assertRaisesRegex(ValueError, "^n_samples takes "):
                client.generate("hi", value)

    def test_log_probabilities_are_not_implemented(self) -> None:
        server = self.serve()
        client = self.client(server)
        for settings in ({"logprobs": True}, {"top_logprobs": 5}, {"logprobs": True, "top_logprobs": 5}):
            with self.subTest(settings=settings):
                for call, arguments in (
                    (RolloutsClient, ("m",)), (rollouts.create_client, ("m",)),
                    (client.generate, ("hi",)), (client.generate_many, (["hi"],)),
                ):
                    with self.assertRaisesRegex(NotImplementedError, "logprobs"):
                        call(*arguments, **settings)
                with self.assertRaisesRegex(NotImplementedError, "logprobs"):
                    Config("m", extra=settings)
        self.assertEqual(server.requests, [])

    def test_what_belongs_elsewhere(self) -> None:
        server = self.serve()
        client = self.client(server)
        for settings, words in (
            ({"n": 5}, "n_samples"),
            ({"messages": [{"role": "user", "content": "hi"}]}, "first argument"),
        ):
            with self.subTest(settings=settings):
                with self.assertRaisesRegex(ValueError, words):
                    RolloutsClient("m", **settings)
                with self.assertRaisesRegex(ValueError, words):
                    client.generate("hi", **settings)
        self.assertEqual(server.requests, [])

    def test_what_may_hold_a_key_is_refused_unseen(self) -> None:
        server = self.serve()
        client = self.client(server)
        for name, value in (
            ("apikey", "sk-secret"), ("api_keys", "sk-secret"), ("openrouter_api_key", "sk-secret"),
            ("token", "sk-secret"), ("headers", {"Authorization": "Bearer sk-secret"}),
        ):
            for call in (lambda **given: RolloutsClient("m", **given), lambda **given: client.generate("hi", **given)):
                with self.subTest(name), self.assertRaisesRegex(ValueError, f"{name} is not taken") as caught:
                    call(**{name: value})
                self.assertNotIn("sk-secret", str(caught.exception))
        self.assertEqual(server.requests, [])

    def test_the_extra_fields_cannot_be_settings(self) -> None:
        """Else a body would have a field twice or a key in it, and an override no effect."""
        server = self.serve()
        client = self.client(server)
        for extra in ({"seed": 5}, {"api_key": "sk-secret"}, {"temperature": 1}, {"stream": True}):
            with self.subTest(extra=extra), self.assertRaisesRegex(ValueError, next(iter(extra))):
                client.generate("hi", extra=extra)
        self.assertEqual(server.requests, [])

    def test_misspellings_warn_and_are_sent(self) -> None:
        server = self.serve()
        client = self.client(server)
        for given, meant in (
            ("temprature", "temperature"),
            ("max_token", "max_tokens"),
            ("topp", "top_p"),
            ("presence_penality", "presence_penalty"),
            ("reponse_format", "response_format"),
            ("max_retrys", "max_retries"),
            ("min_pp", "min_p"),
            ("rpm", "requests_per_minute"),
            ("max_workers", "max_concurrency"),
            ("n_sample", r"generate\(prompt, n_samples\)"),
            ("suffix", "resample"),
            ("preset", "create_client"),
            ("extra_body", "extra"),
        ):
            with self.subTest(given=given):
                words = f"{given} is neither a setting.*did you mean {meant}"
                with self.assertWarnsRegex(UserWarning, words) as caught:
                    body = self.body_of(client, server, **{given: 1})
                self.assertEqual(caught.filename, __file__)  # at the line of the caller
                self.assertEqual(body[given], 1)
                with self.assertWarnsRegex(UserWarning, f"did you mean {meant}"):
                    RolloutsClient("m", **{given: 1})

    def test_what_researchers_may_type(self) -> None:
        """Each warns; where the meaning is obvious, it is named."""
        server = self.serve()
        client = self.client(server)
        for meant, names in WRONG.items():
            for name in names.split():
                with self.subTest(name=name), self.warned() as texts:
                    client.generate("hi", **{name: 1})
                    self.assertEqual(len(texts), 1, texts)
                    self.assertIn(f"{name} is neither a setting nor a body field", texts[0])
                    self.assertIn(f"did you mean {meant}?" if meant else "pass it in extra={", texts[0])
                    self.assertEqual(server.requests[-1].body[name], 1)

    def test_what_apis_document(self) -> None:
        """It goes into the body without a word: fields of each API, of its own and of others."""
        server = self.serve()
        fields = dict.fromkeys(DOCUMENTED.split(), 1)
        with self.warned() as texts:
            body = self.body_of(self.client(server), server, **fields)
        self.assertEqual(texts, [])
        self.assertLessEqual(fields.items(), body.items())

    def test_further_fields_are_sent_without_a_word(self) -> None:
        further = {
            "min_p": 0.05,
            "stop": ["\n\n"],
            "response_format": {"type": "json_object"},
            "repetition_penalty": 1.1,
            "top_a": 0.1,
            "logit_bias": {"5": -100},
            "reasoning": {"effort": "low"},
            "user": "me",
            "tools": [],
            "ignore_eos": None,
            "extra": {"some_field_of_tomorrow": True},
        }
        sent = {name: value for name, value in further.items() if value is not None and name != "extra"}
        sent["some_field_of_tomorrow"] = True
        server = self.serve()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            of_a_call = self.body_of(self.client(server), server, **further)
            of_a_client = self.body_of(self.client(server, **further), server)
        for body in (of_a_call, of_a_client):
            self.assertEqual(body, {"temperature": 0.7, "top_p": 0.95, "max_tokens": 4096, **sent})
        self.assertEqual(
            self.body_of(self.client(server, **further), server, min_p=0.1, stop=None)["min_p"], 0.1
        )

    def test_extra_fields_are_sent_without_a_word(self) -> None:
        """Whatever they are called; a call's stand beside the client's, and win over them."""
        server = self.serve()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            client = self.client(server, extra={"of_tomorrow": 1, "temprature": 2}, min_p=0.1)
            body = self.body_of(client, server, extra={"of_tomorrow": 3, "another": {"a": None}}, top_a=0.5)
        self.assertEqual(body, {
            "temperature": 0.7, "top_p": 0.95, "max_tokens": 4096, "temprature": 2, "min_p": 0.1, "of_tomorrow": 3,
            "another": {"a": None}, "top_a": 0.5})
        self.assertEqual(client.extra, {"of_tomorrow": 1, "temprature": 2, "min_p": 0.1})

    def test_an_unknown_keyword_warns_every_time(self) -> None:
        """Python's own memory shows a text once a line; the user's filters rule all the same."""
        server = self.serve()
        client = self.client(server)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(2):
                client.generate("hi", temprature=1)
        self.assertEqual(len(caught), 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(2):
                client.generate("hi", wholly_unlike_them=1)
        self.assertEqual(len(caught), 2)
        self.assertIn("wholly_unlike_them is neither", str(caught[0].message))
        self.assertIn("extra={", str(caught[0].message))
        self.assertNotIn("did you mean", str(caught[0].message))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            client.generate("hi", temprature=1)
        self.assertEqual(caught, [])


class Wire(Settings):
    """What goes into a request, and what does not."""

    def test_fields_are_sent_in_the_order_given(self) -> None:
        """A schema's order is the order in which a model fills it in: it thinks before it answers, or not."""
        server = self.serve()
        properties = {"reasoning": {"type": "string"}, "answer": {"type": "string"}}
        schema = {"type": "json_schema", "json_schema": {"schema": {"properties": properties}}}
        sent = self.body_of(self.client(server), server, response_format=schema)["response_format"]
        self.assertEqual(list(sent["json_schema"]["schema"]["properties"]), ["reasoning", "answer"])

    def test_the_defaults(self) -> None:
        server = self.serve()
        self.client(server).generate("hi")
        request = server.requests[0]
        self.assertEqual(request.path, "/v1/chat/completions")
        self.assertEqual(request.body, {
            "model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.7, "top_p": 0.95,
            "max_tokens": 4096, "seed": 0})
        self.assertNotIn("authorization", request.headers)
        self.assertEqual(request.headers["content-type"], "application/json")

    def test_settings_of_the_client_stay_here(self) -> None:
        server = self.serve()
        settings = {
            "use_cache": "sql",
            "cache_dir": self.cache_dir,
            "progress_bar": False,
            "verbose": False,
            "requests_per_minute": 6000,
            "max_concurrency": 7,
            "max_retries": 3,
            "timeout": 50,
            "stream": False,
            "prefill": "trailing",
            "api_key": "sk-secret",
            "base_url": server.url,
            "provider": "together",
        }
        expected = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 4096}
        self.assertEqual(self.body_of(self.client(**settings), server), expected)
        self.assertEqual(self.body_of(self.client(server), server, **settings), expected)

    def test_sampling_fields(self) -> None:
        values = {
            "temperature": 0.1,
            "top_p": 0.2,
            "max_tokens": 30,
            "top_k": 40,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.6,
        }
        others = {
            "temperature": 0, "top_p": 1, "max_tokens": 1, "top_k": 0, "presence_penalty": 0, "frequency_penalty": 0}
        server = self.serve()
        client = self.client(server, **values)
        self.assertEqual(self.body_of(client, server), values)
        self.assertEqual(self.body_of(client, server, **others), others)
        self.assertEqual(self.body_of(client, server), values)  # a call leaves the client as it was
        for name in SAMPLING:
            with self.subTest(name=name):
                without = {other: value for other, value in values.items() if other != name}
                self.assertEqual(self.body_of(client, server, **{name: None}), without)
                self.assertEqual(self.body_of(client, server, **{name: others[name]}), {**without, name: others[name]})
        self.assertEqual(self.body_of(self.client(server, **dict.fromkeys(SAMPLING)), server), {})

    def test_model_seed_and_prompt_of_a_call(self) -> None:
        server = self.serve()
        client = self.client(server, seed=10)
        answers = client.generate(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], model="other"
        )
        self.assertEqual(server.requests[0].body["model"], "other")
        self.assertEqual(server.requests[0].body["messages"][0], {"role": "system", "content": "Be brief."})
        self.assertEqual((answers.model, answers[0].seed), ("other", 10))
        self.assertEqual(client.generate("hi", seed=3)[0].seed, 3)
        self.assertEqual(client.generate("hi", seed=0)[0].seed, 0)

    def test_routing(self) -> None:
        """A dict is OpenRouter's routing and goes into the body; a str does not."""
        server = self.serve()
        first, second = {"order": ["a", "b"], "allow_fallbacks": False}, {"only": ["c"]}
        with environment(OPENROUTER_API_KEY="sk-1", OPENROUTER_BASE_URL=server.url):
            client = self.client(provider=first)
            self.assertEqual(self.body_of(client, server)["provider"], first)
            self.assertEqual(self.body_of(client, server, provider=second)["provider"], second)
            self.assertNotIn("provider", self.body_of(client, server, provider=None))
            self.assertNotIn("provider", self.body_of(client, server, provider="openrouter"))
        self.assertEqual({request.headers.get("authorization") for request in server.requests}, {"Bearer sk-1"})
        self.assertEqual({request.headers.get("x-openrouter-cache") for request in server.requests}, {"false"})
        first["order"].append("c")
        self.assertEqual(client.provider["order"], ["a", "b"])  # the client's own copy

    def test_base_url_of_a_call(self) -> None:
        here, there = self.serve(), self.serve()
        client = self.client(here)
        client.generate("hi", base_url=there.url)
        self.assertEqual((len(here.requests), len(there.requests)), (0, 1))
        client.generate("hi", base_url=f"{here.url}/chat/completions/".rstrip("/"))
        self.assertEqual(here.requests[0].path, "/v1/chat/completions")

    def test_cache_of_a_call(self) -> None:
        server = self.serve()
        client = self.client(server)
        elsewhere = os.path.join(self.cache_dir, "elsewhere")
        for settings, kept_in in (
            ({"use_cache": False}, None), ({}, self.cache_dir), ({"cache_dir": elsewhere}, elsewhere),
            ({"use_cache": "sql"}, self.cache_dir), ({"use_cache": "sql", "cache_dir": elsewhere}, elsewhere),
        ):
            with self.subTest(settings=settings):
                first, second = client.generate("hi", **settings), client.generate("hi", **settings)
                self.assertEqual((first[0].cached, second[0].cached), (False, kept_in is not None))
                self.assertEqual(first.cache_dir, kept_in)
        self.assertEqual(len(server.requests), 6)
        for directory in (self.cache_dir, elsewhere):
            self.assertIn("rollouts.sqlite3", os.listdir(directory))

    def test_stream_of_a_call(self) -> None:
        server = self.serve(
            lambda request: (
                events(delta(content="fine", finish_reason="stop")) if request.body.get("stream") else chat()
            )
        )
        for of_client, of_call, streamed in (
            (None, None, False),
            (None, True, True),
            (True, None, False),
            (True, False, False),
            (False, True, True),
        ):
            with self.subTest(of_client=of_client, of_call=of_call):
                body = self.body_of(self.client(server, stream=of_client), server, stream=of_call)
                self.assertEqual("stream" in body, streamed)
        self.assertTrue(self.body_of(self.client(server, stream=True), server)["stream"])

    def test_stream_options(self) -> None:
        server = self.serve(events(delta(content="fine", finish_reason="stop")))
        client = self.client(server, stream=True)
        self.assertEqual(self.body_of(client, server)["stream_options"], {"include_usage": True})
        other = {"include_usage": False}
        self.assertEqual(self.body_of(client, server, stream_options=other)["stream_options"], other)
        without = self.client(server, stream=True, stream_options=None)
        for body in (self.body_of(client, server, stream_options=None), self.body_of(without, server)):
            self.assertIs(body["stream"], True)
            self.assertNotIn("stream_options", body)

    def test_no_seed(self) -> None:
        """None sends none; the entries are numbered from 0 all the same."""
        server = self.serve(chat())
        for provider, name in (("together", "seed"), ("mistral", "random_seed")):
            for of_client, of_call in (({"seed": None}, {}), ({}, {"seed": None}), ({"seed": 7}, {"seed": None})):
                with self.subTest(provider=provider, of_client=of_client):
                    before = len(server.requests)
                    where = os.path.join(self.cache_dir, str(before))
                    client = self.client(provider=provider, base_url=server.url, cache_dir=where, **of_client)
                    first, again = client.generate("hi", 3, **of_call), client.generate("hi", 4, **of_call)
                    self.assertEqual([response.seed for response in first], [0, 1, 2])
                    self.assertEqual([response.seed for response in again], [0, 1, 2, 3])
                    self.assertEqual([response.cached for response in again], [True, True, True, False])
                    bodies = [request.body for request in server.requests[before:]]
                    self.assertEqual(len(bodies), 4)
                    for body in bodies:
                        self.assertNotIn(name, body)
                        self.assertNotIn("seed", body)
                    client.generate("ho", seed=5)
                    self.assertEqual(server.requests[-1].body[name], 5)

    def test_prefill_of_a_call(self) -> None:
        server = self.serve()
        client = self.client(server, prefill="prefix")
        body = self.body_of(client, server, "hi\n<think>\nWell", prefill="continue_final_message")
        self.assertEqual((body["continue_final_message"], body["add_generation_prompt"]), (True, False))
        self.body_of(client, server, "hi\n<think>\nWell")
        self.assertIs(server.requests[-1].body["messages"][-1]["prefix"], True)

    def test_max_retries_of_a_call(self) -> None:
        server = self.serve(Reply(503))
        client = self.client(server)
        with mock.patch.object(rollouts, "_clock", Clock()):
            for retries in (0, 3):
                before = len(server.requests)
                with self.assertRaises(APIError):
                    client.generate("hi", max_retries=retries)
                self.assertEqual(len(server.requests) - before, retries + 1)
            before = len(server.requests)
            client = self.enter(RolloutsClient("m", base_url=server.url, cache_dir=self.cache_dir))
            with self.assertRaises(APIError):
                client.generate("hi")
            self.assertEqual(len(server.requests) - before, 11)

    def test_timeout_of_a_call(self) -> None:
        never = threading.Event()
        self.addCleanup(never.set)
        server = self.serve(Reply(wait=never))
        with self.assertRaisesRegex(APIError, r"within 0\.2 s"):
            self.client(server).generate("hi", timeout=0.2, max_retries=0)

    def test_requests_per_minute_of_a_call(self) -> None:
        server, clock = self.serve(), Clock()
        with mock.patch.object(rollouts, "_clock", clock):
            self.client(server).generate("hi", 3, use_cache=False)
            self.assertEqual(clock.slept, [])
            self.client(server).generate("hi", 3, requests_per_minute=6)
            self.assertGreaterEqual(sum(clock.slept), 20)  # the first at once, the next two ten seconds apart
            before = clock.time
            self.client(server, requests_per_minute=6).generate("ho", 3, requests_per_minute=None)
            self.assertEqual(clock.time, before)

    def test_max_concurrency_of_a_call(self) -> None:
        for of_client, of_call in ((100, 2), (1, 3)):
            with self.subTest(of_client=of_client, of_call=of_call):
                crowd = Crowd(of_call)
                client = self.client(self.serve(crowd), max_concurrency=of_client, use_cache=False)
                self.assertEqual(len(client.generate("hi", 6, max_concurrency=of_call)), 6)
                self.assertEqual(crowd.most, of_call)


class Crowd:
    """Answers only when *number* requests are under way at once, and notes the most that were."""

    def __init__(self, number: int) -> None:
        self.together = threading.Barrier(number)
        self.lock = threading.Lock()
        self.under_way = self.most = 0

    def __call__(self, request: Request) -> Reply:
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.together.wait(30)
        with self.lock:
            self.under_way -= 1
        return by_seed(request)


class Offline(Settings):
    """offline=True sends nothing, needs no key and raises nothing: what is cached comes back."""

    ADDRESS = "http://gateway.invalid/v1"  # an address that needs a key, and that no request reaches

    def drawn(self, number: int, **settings: Any) -> Server:
        """A server that *number* samples came from, as the proxy that reaches the address."""
        server = self.serve()
        host, port = server.server_address[:2]
        with environment(TOGETHER_API_KEY="sk-1", TOGETHER_BASE_URL=self.ADDRESS, http_proxy=f"http://{host}:{port}"):
            self.client(provider="together", **settings).generate("hi", number)
        self.assertEqual(len(server.requests), number)
        return server

    def assert_halves(self, answers: Any, cached: int, number: int) -> None:
        self.assertEqual([(each.seed, each.cached) for each in answers], [(seed, True) for seed in range(cached)])
        self.assertEqual([error.seed for error in answers.errors], list(range(cached, number)))
        self.assertEqual(answers.num_responses, number)
        for error in answers.errors:
            self.assertIsInstance(error, APIError)
            self.assertIn("not in the cache", str(error))
            self.assertEqual((error.status, error.retryable), (None, False))

    def test_cached_come_back_and_others_are_errors(self) -> None:
        for use_cache in ("json", "sql"):
            server = self.drawn(2, use_cache=use_cache)
            with environment(TOGETHER_BASE_URL=self.ADDRESS), warnings.catch_warnings():
                warnings.simplefilter("error")
                online = self.client(provider="together", use_cache=use_cache)
                offline = self.client(provider="together", use_cache=use_cache, offline=True)
                for client, settings in ((online, {"offline": True}), (offline, {})):
                    with self.subTest(use_cache=use_cache, settings=settings):
                        self.assert_halves(client.generate("hi", 5, **settings), 2, 5)
                        self.assert_halves(client.generate("hi", 2, **settings), 2, 2)
                        self.assert_halves(client.generate("never asked", 3, **settings), 0, 3)
                        self.assert_halves(asyncio.run(client.agenerate("hi", 5, **settings)), 2, 5)
                        many = client.generate_many(["hi", "never asked"], 3, **settings)
                        for answers, cached in zip(many, (2, 0)):
                            self.assert_halves(answers, cached, 3)
                        for answers in client.resample("hi", "One. Two.", 2, **settings):
                            self.assert_halves(answers, 0, 2)
            self.assertEqual(len(server.requests), 2)

    def test_it_waits_for_nothing_and_a_call_may_end_it(self) -> None:
        server = self.serve()
        client = self.client(server, offline=True, requests_per_minute=1, progress_bar=True)
        with mock.patch("sys.stderr", io.StringIO()) as stderr:
            self.assert_halves(client.generate("hi", 50), 0, 50)
        self.assertEqual((stderr.getvalue(), server.requests), ("", []))
        self.assertEqual(self.clock.slept, [])
        self.assertEqual(client.generate("hi", offline=False).get_contents(), ["answer 0"])
        self.assert_halves(client.generate("hi", 2), 1, 2)

    def test_where_it_makes_no_sense(self) -> None:
        server = self.serve()
        client = self.client(server)
        for call in (
            lambda: client.generate("hi", offline=True, use_cache=False),
            lambda: client.generate_many(["hi"], offline=True, use_cache=False),
            lambda: self.client(server, use_cache=False).generate("hi", offline=True),
            lambda: asyncio.run(client.agenerate("hi", offline=True, use_cache=False)),
            lambda: client.check_injection(offline=True),
            lambda: self.client(server, offline=True).check_injection(),
        ):
            with self.assertRaisesRegex(ValueError, "offline"):
                call()
        self.assertEqual(server.requests, [])


class Keys(Settings):
    """Call, client, environment; never to an address that it is not meant for."""

    def keys(self, server: Server) -> Any:
        return [request.headers.get("authorization") for request in server.requests]

    def test_the_order(self) -> None:
        server = self.serve()
        with environment(TOGETHER_API_KEY=" sk-environment\n", TOGETHER_BASE_URL=server.url):
            client = self.client(provider="together", use_cache=False)
            client.generate("hi")
            client.generate("hi", api_key="\tsk-call ")
            client.generate("hi", api_key=None)
            client = self.client(provider="together", use_cache=False, api_key=" sk-client ")
            client.generate("hi")
            client.generate("hi", api_key="sk-call")
            client.generate("hi", api_key=None)
            client.generate("hi", provider="together")  # the client's API by its name
        self.assertEqual([key and key[len("Bearer "):] for key in self.keys(server)], [
            "sk-environment", "sk-call", "sk-environment", "sk-client", "sk-call", "sk-client", "sk-client"])

    def test_a_key_of_blanks_is_none(self) -> None:
        server = self.serve()
        with environment(TOGETHER_API_KEY="sk-environment", TOGETHER_BASE_URL=server.url):
            self.client(provider="together", api_key=" \n").generate("hi")
        self.assertEqual(self.keys(server), ["Bearer sk-environment"])

    def test_each_provider_has_its_own(self) -> None:
        """<PROVIDER>_API_KEY and <PROVIDER>_BASE_URL, for every row of the table."""
        server = self.serve(chat())
        for name in rollouts._PROVIDERS:  # private, but the only list of them that is no message
            with self.subTest(name=name):
                address = server.url.replace("/v1", f"/{name}/v1")
                variables = {f"{name.upper()}_API_KEY": f"sk-{name}", f"{name.upper()}_BASE_URL": f"{address}/"}
                with (
                    environment(OPENROUTER_API_KEY="sk-wrong", **variables)
                    if name != "openrouter"
                    else environment(**variables)
                ):
                    answers = self.client(provider=name, use_cache=False).generate("hi")
                request = server.requests[-1]
                self.assertEqual(
                    (request.path, request.headers["authorization"]),
                    (f"/{name}/v1/chat/completions", f"Bearer sk-{name}"),
                )
                self.assertEqual(answers[0].provider, name)

    def test_openrouter_is_the_default(self) -> None:
        server = self.serve()
        with environment(OPENROUTER_API_KEY="sk-1", OPENROUTER_BASE_URL=server.url):
            self.client().generate("hi")
        self.assertEqual(self.keys(server), ["Bearer sk-1"])

    def test_missing_only_when_a_request_must_go_out(self) -> None:
        server = self.serve()
        with environment(TOGETHER_API_KEY="sk-1", TOGETHER_BASE_URL=server.url):
            full = self.client(provider="together").generate("hi", 3)
        for name, advice in (
            ("together", "TOGETHER_API_KEY"),
            (None, "OPENROUTER_API_KEY"),
            ({"only": ["a"]}, "OPENROUTER_API_KEY"),
        ):
            with self.subTest(provider=name):
                # No address on this machine: it is refused before anything could be sent.
                with self.assertRaisesRegex(APIError, f"no API key.*api_key=.*{advice}") as caught:
                    self.client(provider=name).generate("hi", 3)
                self.assertEqual((caught.exception.status, caught.exception.retryable), (None, False))
        # The same request as above, whose address has moved off this machine, without any key.
        with environment(TOGETHER_BASE_URL=server.url):
            client = self.client(provider="together")
            again = client.generate("hi", 3)
            self.assertEqual(
                (again.get_texts(), [response.cached for response in again]), (full.get_texts(), [True] * 3)
            )
        self.assertEqual(len(server.requests), 3)

    def test_a_full_cache_needs_none(self) -> None:
        """Also that of an address which does need one."""
        address = "http://gateway.invalid/v1"  # only ever read from the cache
        server = self.serve()
        host, port = server.server_address[:2]
        with environment(TOGETHER_API_KEY="sk-1", TOGETHER_BASE_URL=address, http_proxy=f"http://{host}:{port}"):
            self.client(provider="together").generate("hi", 2)  # the server is the proxy that reaches it
        self.assertEqual(len(server.requests), 2)
        with environment(TOGETHER_BASE_URL=address):
            client = self.client(provider="together")
            self.assertTrue(all(response.cached for response in client.generate("hi", 2)))
            with self.assertWarnsRegex(UserWarning, "1 of 3 samples failed.*no API key"):
                some = client.generate("hi", 3)  # what is there comes back all the same
            self.assertEqual([(each.seed, each.cached) for each in some], [(0, True), (1, True)])
            self.assertEqual([error.seed for error in some.errors], [2])
            self.assertRegex(str(some.errors[0]), "no API key.*TOGETHER_API_KEY")
            with self.assertRaisesRegex(APIError, "no API key"):
                client.generate("another")
        self.assertEqual(len(server.requests), 2)

    def test_a_server_on_this_machine_needs_none(self) -> None:
        server = self.serve()
        for settings in (
            {"base_url": server.url},
            {"provider": "vllm", "base_url": server.url},
            {"provider": "together", "base_url": server.url},
            {"base_url": server.url.replace("127.0.0.1", "localhost")},
            {"provider": {"only": ["a"]}, "base_url": server.url},
        ):
            with self.subTest(settings=settings):
                self.assertEqual(len(self.client(**settings, use_cache=False).generate("hi")), 1)
        self.assertEqual(self.keys(server), [None] * 5)

    def test_a_key_of_the_environment_stays_with_its_provider(self) -> None:
        server = self.serve()
        keys = {f"{name}_API_KEY": "sk-environment" for name in ("OPENROUTER", "TOGETHER", "OPENAI", "VLLM", "127")}
        with environment(**keys):
            self.client(server, use_cache=False).generate("hi")  # an address alone names no provider
            self.client(use_cache=False).generate("hi", base_url=server.url)
            self.client(provider={"only": ["a"]}, base_url=server.url, use_cache=False).generate("hi")
        self.assertEqual(self.keys(server), [None] * 3)
        with environment(**keys):
            self.client(server, api_key="sk-mine", use_cache=False).generate("hi")
            self.client(server, provider="together", use_cache=False).generate(
                "hi"
            )  # that API at another address
        self.assertEqual(self.keys(server)[3:], ["Bearer sk-mine", "Bearer sk-environment"])

    def test_a_provider_of_the_call_is_called_at_its_own_address(self) -> None:
        """Not at the client's, which would get the environment's key for that provider."""
        here, there = self.serve(), self.serve()
        for settings in (
            {"base_url": here.url},
            {"provider": "vllm", "base_url": here.url},
            {"base_url": here.url, "api_key": "sk-client"},
        ):
            with (
                self.subTest(settings=settings),
                environment(TOGETHER_API_KEY="sk-together", TOGETHER_BASE_URL=there.url),
            ):
                self.client(**settings, use_cache=False).generate("hi", provider="together")
                self.assertNotIn("Bearer sk-together", self.keys(here))
                self.assertEqual(self.keys(there)[-1:], ["Bearer sk-together"])

    def test_the_clients_key_stays_with_the_clients_api(self) -> None:
        here, there = self.serve(), self.serve()
        with environment(TOGETHER_BASE_URL=here.url, FIREWORKS_BASE_URL=there.url, OPENROUTER_BASE_URL=there.url):
            client = self.client(provider="together", api_key="sk-together", use_cache=False)
            client.generate("hi", provider="fireworks")
            client.generate("hi", provider=None)
            client.generate("hi", provider={"only": ["a"]})
            self.assertEqual(self.keys(there), [None] * 3)
            with environment(FIREWORKS_API_KEY="sk-fireworks", FIREWORKS_BASE_URL=there.url):
                client.generate("hi", provider="fireworks")
            client.generate("hi")
            client.generate("hi", provider="fireworks", api_key="sk-call")
        self.assertEqual(self.keys(there)[3:], ["Bearer sk-fireworks", "Bearer sk-call"])
        self.assertEqual(self.keys(here), ["Bearer sk-together"])

    def test_bad_values_in_the_environment(self) -> None:
        server = self.serve()
        with (
            environment(TOGETHER_BASE_URL="together.example/v1"),
            self.assertRaisesRegex(ValueError, "^TOGETHER_BASE_URL takes an address"),
        ):
            self.client(provider="together").generate("hi")
        with environment(TOGETHER_BASE_URL=server.url, TOGETHER_API_KEY="sk sécret"), self.assertRaisesRegex(
            ValueError, "^TOGETHER_API_KEY takes a key"
        ) as caught:
            self.client(provider="together").generate("hi")
        self.assertNotIn("cret", str(caught.exception))
        with environment(TOGETHER_BASE_URL="", TOGETHER_API_KEY=" "), self.assertRaisesRegex(APIError, "no API key"):
            self.client(provider="together").generate("hi")
        self.assertEqual(server.requests, [])

    def test_no_message_repeats_what_may_be_secret(self) -> None:
        for settings in (
            {"api_key": "sk-sécret"}, {"api_key": "sk sk-secret"}, {"api_key": ["sk-secret"]},
            {"base_url": "http://me:sk-secret@host/v1"}, {"base_url": "http://host/v1?key=sk-secret"},
            {"base_url": "http://host/v1#sk-secret"}, {"base_url": "http://me:sk-secret\u2100@host/v1"},
        ):
            name = next(iter(settings))
            with self.subTest(settings=settings), self.assertRaisesRegex(ValueError, f"^{name} takes ") as caught:
                RolloutsClient("m", **settings)
            self.assertNotIn("cret", str(caught.exception))


class Configuration(Settings):
    """Config, create_client, and settings as attributes."""

    def test_a_dataclass_of_every_setting(self) -> None:
        names = [field.name for field in dataclasses.fields(Config)]
        self.assertEqual(sorted(names), sorted(EVERYTHING))
        config = Config(**EVERYTHING)
        self.assertEqual(config.to_dict(), EVERYTHING)
        self.assertEqual(list(config.to_dict()), names)
        default = Config("m")
        for name, value in EVERYTHING.items():
            self.assertNotEqual(getattr(default, name), value, name)
        self.assertEqual(
            (
                default.temperature,
                default.top_p,
                default.max_tokens,
                default.use_cache,
                default.cache_dir,
                default.timeout,
                default.max_concurrency,
                default.max_retries,
                default.seed,
                default.endpoint,
                default.offline,
            ),
            (0.7, 0.95, 4096, True, ".rollouts", 600, 100, 10, 0, "chat", False),
        )
        for name in (
            "top_k",
            "presence_penalty",
            "frequency_penalty",
            "requests_per_minute",
            "stream",
            "prefill",
            "provider",
        ):
            self.assertIsNone(getattr(default, name), name)

    def test_there_and_back(self) -> None:
        config = Config(**EVERYTHING)
        self.assertEqual(Config(**config.to_dict()), config)
        client = self.client(**config.to_dict())
        for name, value in EVERYTHING.items():
            self.assertEqual(getattr(client, name), value, name)
        server = self.serve(chat())
        config = dataclasses.replace(
            config, base_url=server.url, cache_dir=self.cache_dir, verbose=False, stream=False, endpoint="chat",
            offline=False)
        with RolloutsClient(**config.to_dict()) as client:
            client.generate("hi")
        self.assertEqual(server.requests[0].headers["authorization"], "Bearer sk-secret")
        self.assertEqual(
            server.requests[0].body,
            {
                "model": "a/b",
                "messages": [{"role": "user", "content": "hi"}],
                "temperature": 0.1,
                "top_p": 0.2,
                "max_tokens": 30,
                "top_k": 40,
                "presence_penalty": 0.5,
                "frequency_penalty": -0.6,
                "min_p": 0.1,
                "seed": 7,
            },
        )

    def test_a_change_is_a_new_one_and_is_checked_too(self) -> None:
        config = Config("m", temperature=1)
        self.assertEqual(config, Config("m", temperature=1.0))
        self.assertEqual(dataclasses.replace(config, temperature=0.7), Config("m"))
        with self.assertRaisesRegex(ValueError, "^temperature takes "):
            dataclasses.replace(config, temperature=NAN)
        for name in ("temperature", "temprature"):
            with self.assertRaises(dataclasses.FrozenInstanceError):
                setattr(config, name, 0.2)
        self.assertEqual(Config.temperature, 0.7)

    def test_no_repr_shows_the_key(self) -> None:
        config = Config(**EVERYTHING)
        client = self.client(**EVERYTHING)
        for thing in (
            config,
            config.to_dict(),
            client,
            copy.copy(config),
            copy.deepcopy(config),
            dataclasses.asdict(config),
        ):
            self.assertNotIn("sk-secret", repr(thing))
        self.assertEqual(client.api_key, "sk-secret")
        self.assertIn("a/b", repr(client))
        self.assertIn("max_retries=9", repr(client))

    def test_presets(self) -> None:
        server = self.serve()
        presets = {"deterministic": 0, "focused": 0.3, "balanced": 0.7, "creative": 1.2}
        for preset, temperature in presets.items():
            with self.subTest(preset=preset):
                client = self.enter(rollouts.create_client("m", preset, base_url=server.url, cache_dir=self.cache_dir))
                self.assertEqual((client.temperature, client.top_p, client.max_tokens), (temperature, 0.95, 4096))
                self.assertEqual(self.body_of(client, server)["temperature"], temperature)
        self.assertEqual(rollouts.create_client("m").temperature, 0.7)
        self.assertEqual(
            rollouts.create_client(model="m", preset="creative", temperature=0.5, max_tokens=5).temperature, 0.5
        )
        for preset in ("", "Balanced", None, 1, ["balanced"]):
            with self.subTest(preset=preset), self.assertRaisesRegex(ValueError, "^preset takes .*'balanced'"):
                rollouts.create_client("m", preset)

    def test_attributes_are_read_and_not_written(self) -> None:
        client = self.client(temperature=0.2, min_p=0.1)
        self.assertEqual((client.model, client.temperature, client.extra), ("m", 0.2, {"min_p": 0.1}))
        for name in EVERYTHING:
            with self.subTest(name=name):
                with self.assertRaisesRegex(AttributeError, name):
                    setattr(client, name, 1)
                with self.assertRaises(AttributeError):
                    delattr(client, name)
        with self.assertRaisesRegex(AttributeError, "temprature"):
            client.temprature  # noqa: B018
        self.assertEqual(client.temperature, 0.2)

    def test_the_signature_lists_the_settings(self) -> None:
        parameters = inspect.signature(RolloutsClient).parameters
        self.assertEqual(set(parameters), set(EVERYTHING))
        self.assertEqual(parameters["temperature"].default, 0.7)
        self.assertIs(parameters["extra"].kind, inspect.Parameter.VAR_KEYWORD)
        for name in EVERYTHING:
            self.assertIn(f"\n{name}: ", inspect.getdoc(Config) or "")
        self.assertLessEqual(set(EVERYTHING), set(dir(self.client())))


if __name__ == "__main__":
    unittest.main()
