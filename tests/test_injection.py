"""How an injection goes out; raw completions; what a reply tells of its server; check_injection; doubts."""

import gzip
import json
import os
import unittest
import zlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from tests import rollouts
from tests.case import Case
from tests.raw import Raw
from tests.server import Reply, Request, chat, delta, events

QUESTION = "What is 2 x 4?"
THOUGHT = "The user wants 2 x 4. 2 x 4 ="
ANSWER = "Therefore, the final answer is \\boxed{"
OPEN = f"{QUESTION}\n<think>\n{THOUGHT}"
FORCED = f"{QUESTION}\n<think>\n{THOUGHT} 8.\n</think>\n\n{ANSWER}"
FLAGS = {"continue_final_message": True, "add_generation_prompt": False}
PLAIN = ("openrouter", "fireworks", "together", "novita", "deepinfra", "groq", "cerebras", "sambanova",
         "hyperbolic", "anthropic", "ollama", "lmstudio")


def last(**fields: Any) -> Dict[str, Any]:
    return {"role": "assistant", **fields}


def thinking(thought: str, closed: bool) -> Dict[str, Any]:
    return {"type": "thinking", "thinking": [{"type": "text", "text": thought}], "closed": closed}


# How each way sends an open thought and a forced answer: (name, open, forced, fields of the body).
IN_CONTENT = (last(content=f"<think>\n{THOUGHT}"),
              last(content=f"<think>\n{THOUGHT} 8.\n</think>\n\n{ANSWER}"))
WAYS: Tuple[Tuple[str, Dict[str, Any], Dict[str, Any], Dict[str, Any]], ...] = (
    ("trailing", *IN_CONTENT, {}),
    ("continue_final_message", *IN_CONTENT, FLAGS),
    ("partial", *(dict(message, partial=True) for message in IN_CONTENT), {}),
    ("reasoning_content", last(content="", reasoning_content=THOUGHT),
     last(content=ANSWER, reasoning_content=f"{THOUGHT} 8."), {}),
    ("prefix", last(content="", reasoning_content=THOUGHT, prefix=True),
     last(content=ANSWER, reasoning_content=f"{THOUGHT} 8.", prefix=True), {}),
    ("reasoning", last(content="", reasoning=THOUGHT), last(content=ANSWER, reasoning=f"{THOUGHT} 8."), {}),
    ("thinking", last(content=[thinking(THOUGHT, False)], prefix=True),
     last(content=[thinking(f"{THOUGHT} 8.", True), {"type": "text", "text": ANSWER}], prefix=True), {}),
)
ROWS = {
    "trailing": PLAIN, "continue_final_message": ("vllm", "sglang", "nebius"), "partial": ("moonshot",),
    "reasoning_content": ("llamacpp",), "prefix": ("deepseek",), "thinking": ("mistral",),
}


def without_layout(value: Any) -> Any:
    """*value* without white space at the ends of its texts: beside a tag it is the template's."""
    if isinstance(value, dict):
        return {name: without_layout(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_layout(each) for each in value]
    return value.strip() if isinstance(value, str) else value


class Asking(Case):
    """What a test sees of the requests."""

    settings = {"api_key": "k", "max_retries": 0, "use_cache": False}

    def setUp(self) -> None:
        super().setUp()
        self.server = self.serve(lambda request: self.reply(request))

    def reply(self, request: Request) -> Reply:
        return completion("8") if "prompt" in request.body else chat("8")

    def sent(self, prompt: Any, model: str = "qwen/qwen3-30b-a3b", **settings: Any) -> Request:
        before = len(self.server.requests)
        self.client(self.server, model, **settings).generate(prompt)
        (request,) = self.server.requests[before:]
        return request


def completion(text: str, finish_reason: Optional[str] = "stop", **further: Any) -> Reply:
    """A good reply to a raw prompt."""
    return Reply(body={
        "id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": "stand-in",
        "choices": [{"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, **further})


class Ways(Asking):
    """Each server's own way of continuing a thought."""

    def test_each_row_and_each_prefill(self) -> None:
        for way, is_open, is_forced, fields in WAYS:
            users = [{"provider": name} for name in ROWS.get(way, ())]
            others = (None, "openrouter", "vllm", "mistral", "llamacpp")
            users += [{"provider": name, "prefill": way} for name in others]
            for prompt, expected in ((OPEN, is_open), (FORCED, is_forced)):
                as_list = [{"role": "user", "content": QUESTION},
                           {"role": "assistant", "content": prompt[len(QUESTION) + 1:]}]
                for settings in users:
                    for said in (prompt, as_list):
                        with self.subTest(way=way, settings=settings, prompt=said):
                            body = self.sent(said, **settings).body
                            question, injected = body["messages"]
                            self.assertEqual(question, {"role": "user", "content": QUESTION})
                            self.assertEqual(without_layout(injected), without_layout(expected))
                            self.assertEqual({name: body[name] for name in FLAGS if name in body}, fields)
                            self.assertNotIn("prefill", body)

    def test_a_question_alone_is_sent_alike_everywhere(self) -> None:
        for providers in ROWS.values():
            for provider in providers:
                with self.subTest(provider=provider):
                    body = self.sent(QUESTION, provider=provider).body
                    self.assertEqual(body["messages"], [{"role": "user", "content": QUESTION}])
                    self.assertFalse(set(FLAGS) & set(body))

    def test_an_answer_without_a_thought_stays_in_the_content(self) -> None:
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The answer is"}]
        marks = {"prefix": {"prefix": True}, "thinking": {"prefix": True}, "partial": {"partial": True}}
        for way, *_ in WAYS:
            with self.subTest(way=way):
                injected = self.sent(messages, prefill=way).body["messages"][-1]
                if isinstance(injected["content"], list):
                    injected = {**injected, "content": "".join(part["text"] for part in injected["content"])}
                self.assertEqual(injected, {**messages[-1], **marks.get(way, {})})

    def test_an_empty_open_thought_is_a_line_break_for_llama_cpp(self) -> None:
        """With two empty fields its templates render no turn at all."""
        for tag in ("<think>", "<think>\n"):
            with self.subTest(tag=tag):
                injected = self.sent(f"{QUESTION}\n{tag}", provider="llamacpp").body["messages"][-1]
                self.assertEqual(injected, last(content="", reasoning_content="\n"))

    def test_the_white_space_that_a_thought_ends_in_goes_out(self) -> None:
        """A paragraph's end belongs to the prefix; what stands beside a tag is the template's."""
        injected = self.sent(f"{QUESTION}\n<think>\nFirst.\n\n", provider="llamacpp").body["messages"][-1]
        self.assertEqual(injected, last(content="", reasoning_content="First.\n\n"))

    def test_fields_of_the_users_own_stay(self) -> None:
        for fields in ({"content": "", "reasoning_content": THOUGHT},
                       {"content": ANSWER, "reasoning_content": f"{THOUGHT} 8."},
                       {"content": "", "reasoning": THOUGHT}):
            for provider in ("llamacpp", "vllm", "ollama", None):
                with self.subTest(fields=fields, provider=provider):
                    messages = [{"role": "user", "content": QUESTION}, last(**fields)]
                    self.assertEqual(self.sent(messages, provider=provider).body["messages"], messages)

    def test_text_parts_of_a_trailing_message_are_one_str(self) -> None:
        """llama.cpp would join them with two line breaks."""
        texts = [{"type": "text", "text": text} for text in ("Well,", " 2 x 4 =")]
        question = {"role": "user",
                    "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " it?"}]}
        for provider in ("llamacpp", "vllm", "ollama", "openrouter", None):
            with self.subTest(provider=provider):
                body = self.sent([question, {"role": "assistant", "content": texts}], provider=provider).body
                self.assertEqual(body["messages"], [question, last(content="Well, 2 x 4 =")])
        texts = [{"type": "text", "text": "<think>\nThe user"}, {"type": "text", "text": " wants"}]
        body = self.sent([question, {"role": "assistant", "content": texts}], provider="llamacpp").body
        self.assertEqual(body["messages"][-1], last(content="", reasoning_content="The user wants"))

    def test_mlx_cannot_continue_a_chat_and_raw_completions_do(self) -> None:
        for prompt in (OPEN, FORCED):
            with self.assertRaises(ValueError) as caught:
                self.sent(prompt, provider="mlx")
            self.assertIn("endpoint='completions'", str(caught.exception).replace('"', "'"))
        self.assertEqual(self.server.requests, [])
        self.assertEqual(self.sent(QUESTION, provider="mlx").path, "/v1/chat/completions")
        self.assertEqual(self.sent(OPEN, provider="mlx", endpoint="completions").body["prompt"], OPEN)

    def test_gpt_oss_continues_where_prefill_says_how(self) -> None:
        with self.assertRaises(ValueError):
            self.sent(OPEN, "gpt-oss:20b", provider="ollama")
        body = self.sent(OPEN, "gpt-oss:20b", provider="ollama", prefill="reasoning").body
        self.assertEqual(without_layout(body["messages"][-1]), last(content="", reasoning=THOUGHT))

    def test_an_unknown_prefill_is_refused(self) -> None:
        for prefill in ("reasoning content", "none", "", 1):
            with self.subTest(prefill=prefill), self.assertRaisesRegex(ValueError, "prefill"):
                self.client(self.server, prefill=prefill)


class Refused(Asking):
    """Fields that an API refuses are left out where they are defaults."""

    def test_claude_takes_temperature_or_top_p(self) -> None:
        for model in ("claude-opus-4-1", "claude-opus-4-1-20250805", "claude-sonnet-4-5",
                      "claude-haiku-4-5-20251001",
                      "claude-opus-4-6", "claude-sonnet-5", "claude-opus-4.5"):
            with self.subTest(model=model):
                body = self.sent("Q", model, provider="anthropic").body
                self.assertEqual((body.get("temperature"), "top_p" in body), (0.7, False))
                self.assertEqual(self.sent("Q", model, provider="anthropic", top_p=0.5).body["top_p"], 0.5)
        for model in ("claude-3-5-haiku-20241022", "claude-sonnet-4-20250514", "claude-opus-4-0",
                      "claude-3-7-sonnet-20250219"):
            with self.subTest(model=model):
                self.assertEqual(self.sent("Q", model, provider="anthropic").body["top_p"], 0.95)

    def test_gemini_gets_no_seed(self) -> None:
        for model in ("gemini-2.5-flash", "anything"):
            self.assertNotIn("seed", self.sent("Q", model, provider="gemini").body)
        client = self.client(self.server, provider="gemini")
        self.assertEqual([each.seed for each in client.generate("Q", 3)], [0, 1, 2])
        self.assertFalse(any("seed" in request.body for request in self.server.requests))

    def test_mistrals_seed_has_another_name(self) -> None:
        body = self.sent("Q", provider="mistral", seed=5).body
        self.assertEqual((body.get("random_seed"), "seed" in body), (5, False))


class Completions(Asking):
    """endpoint="completions": the prompt as it is, and the model continues its last character."""

    RAW = f"<|user|>{QUESTION}<|assistant|><think>\n{THOUGHT}"

    def test_the_request(self) -> None:
        for client_says, call_says in (({"endpoint": "completions"}, {}), ({}, {"endpoint": "completions"})):
            for prompt in (QUESTION, OPEN, FORCED, self.RAW, f"  {QUESTION}\n\n"):
                with self.subTest(client=client_says, prompt=prompt):
                    before = len(self.server.requests)
                    self.client(self.server, **client_says).generate(prompt, max_tokens=9, seed=3,
                                                                     **call_says)
                    (request,) = self.server.requests[before:]
                    self.assertEqual(request.path, "/v1/completions")
                    self.assertEqual(request.body, {
                        "model": "m", "prompt": prompt, "temperature": 0.7, "top_p": 0.95, "max_tokens": 9,
                        "seed": 3})

    def test_the_same_at_every_provider_that_serves_them(self) -> None:
        for provider in ("openrouter", "together", "fireworks", "deepinfra", "novita", "nebius", "vllm",
                         "sglang",
                         "llamacpp", "mlx"):
            with self.subTest(provider=provider):
                request = self.sent(self.RAW, provider=provider, endpoint="completions")
                self.assertEqual((request.path, request.body["prompt"]), ("/v1/completions", self.RAW))
                self.assertFalse(set(FLAGS) & set(request.body))
        # Whatever cannot continue a chat may well continue a text.
        self.assertEqual(self.sent(self.RAW, "gpt-oss-20b", endpoint="completions").body["prompt"], self.RAW)

    def test_the_replies(self) -> None:
        forced = f"<|user|>{QUESTION}<|assistant|><think>\n{THOUGHT} 8.\n</think>\n\n{ANSWER}"
        for name, prompt, text, reason, expected in (
            ("an open thought, closed", self.RAW, " 8.\n</think>\n\n8", "stop", (" 8.", "8", True)),
            ("cut off", self.RAW, " 8. So", "length", (" 8. So", "", False)),
            ("ended within its thought", self.RAW, " 8.", "stop", (" 8.", "", False)),
            ("closed at once", f"{self.RAW} 8.\n", "</think>\n\n8", "stop", ("", "8", True)),
            ("a forced answer", forced, "8}.", "stop", (None, "8}.", True)),
            ("a forced answer's space", forced, " 8}.", "length", (None, " 8}.", True)),
            ("no tag", "Once upon a", " time", "length", (None, " time", True)),
            ("a thought of its own", "<|user|>Q<|assistant|>", "<think>\nHm.\n</think>\n\n8", "stop",
             ("Hm.", "8", True)),
            ("the last tag counts", f"Tags: <think>a</think>.\n{self.RAW}", " 8.\n</think>\n\n8", "stop",
             (" 8.", "8", True)),
            ("a tag that was closed", "<think>a</think> b <think>c", " d</think>8", "stop",
             (" d", "8", True)),
        ):
            pieces = [{"text": text[at:at + 2]} for at in range(0, len(text), 2)]
            chunks = [{"id": "c", "model": "m",
                       "choices": [{"index": 0, "finish_reason": None, **each}]} for each in pieces]
            chunks[-1]["choices"][0]["finish_reason"] = reason
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    server = self.serve(events(*chunks) if stream else completion(text, reason))
                    client = self.client(server, endpoint="completions", stream=stream, max_tokens=99)
                    response = client.generate(prompt)[0]
                    self.assertEqual((response.reasoning, response.content, response.completed_reasoning),
                                     expected)
                    self.assertEqual(response.finish_reason, reason)

    def test_raw_prompts_and_chats_are_cached_apart(self) -> None:
        client = self.client(self.server, use_cache=True)
        for _ in range(2):
            client.generate(QUESTION)
            client.generate(QUESTION, endpoint="completions")
        self.assertEqual(sorted(request.path for request in self.server.requests),
                         ["/v1/chat/completions", "/v1/completions"])
        self.assertTrue(client.generate(QUESTION, endpoint="completions")[0].cached)

    def test_a_list_of_messages_says_how_to_render_one(self) -> None:
        client = self.client(self.server)
        messages = [{"role": "user", "content": "Q"}]
        for ask in (client.generate, lambda prompt, **given: client.resample(prompt, "A. B.", 1, **given)):
            with self.assertRaises(ValueError) as caught:
                ask(messages, endpoint="completions")
            self.assertIn("apply_chat_template", str(caught.exception))
        self.assertEqual(self.server.requests, [])

    def test_resample_appends_the_parts(self) -> None:
        parts = ["First. ", "Second.\n\n", "Third."]
        for tag in ("<think>\n", "<think>", "<think>\nHm. "):
            self.check_prefixes(f"Q{tag}", f"Q{tag}", parts)
        for prompt in ("<|user|>Q<|assistant|>", "<think>old</think>\nQ"):
            self.check_prefixes(prompt, prompt + "<think>\n", parts)

    def check_prefixes(self, prompt: str, start: str, parts: Sequence[str]) -> None:
        with self.subTest(prompt=prompt), self.warned():
            before = len(self.server.requests)
            results = self.client(self.server, endpoint="completions").resample(prompt, list(parts), 1)
            sent = sorted((request.body["prompt"] for request in self.server.requests[before:]), key=len)
            texts = ["".join(parts[:count]).rstrip() for count in range(len(results))]
            self.assertEqual(sent, [start + text for text in texts])
            self.assertTrue(all(
                request.path == "/v1/completions" for request in self.server.requests[before:]))

    def test_resample_with_a_suffix(self) -> None:
        client = self.client(self.server, endpoint="completions")
        client.resample("Q<think>\n", ["One. ", "Two."], 1, at=[1], suffix="\n</think>\n\nSo")
        (request,) = self.server.requests
        self.assertEqual(request.body["prompt"], "Q<think>\nOne.\n</think>\n\nSo")

    def test_ollama_puts_raw_prompts_through_a_template(self) -> None:
        for settings, fingerprint in (({"provider": "ollama"}, None), ({}, "fp_ollama")):
            further = {"system_fingerprint": fingerprint} if fingerprint else {}
            server = self.serve(completion(" 8.", **further))
            with self.subTest(settings=settings), self.warned() as texts:
                self.client(server, endpoint="completions", **settings).generate(self.RAW, 3)
            told = [text for text in texts if "TEMPLATE {{ .Prompt }}" in text]
            self.assertEqual(len(told), 1, texts)

    def test_an_unknown_endpoint_is_refused(self) -> None:
        for endpoint in ("completion", "/completions", "responses", None, ""):
            with self.subTest(endpoint=endpoint), self.assertRaisesRegex(ValueError, "endpoint"):
                self.client(self.server, endpoint=endpoint)


LLAMACPP = {"Server": "llama.cpp", "Keep-Alive": "timeout=5, max=100"}


class Recognised(Case):
    """A base_url alone is known by its first reply."""

    settings = {"api_key": "k", "max_retries": 0, "use_cache": False}

    def ask(self, prompt: Any, reply: Reply, n_samples: int = 3, **settings: Any) -> Tuple[List[str], Any]:
        """(the warnings, the results)."""
        client = self.client(self.serve(reply), max_concurrency=1, **settings)
        with self.warned() as texts:
            results = client.generate(prompt, n_samples)
        return texts, results

    def test_one_warning_names_the_way(self) -> None:
        for headers, fingerprint, words in (
            (LLAMACPP, None, ("llamacpp", "reasoning_content")),
            ({}, "b11434-0f1e2d3c", ("llamacpp", "reasoning_content")),
            ({}, "b0-unknown", ("llamacpp", "reasoning_content")),
            ({"llm_provider-server": "llama.cpp"}, None, ("llamacpp", "reasoning_content")),
            ({}, "vllm-0.32.0-609fcefb", ("vllm", "continue_final_message")),
            ({}, "0.32.2-0.31.1-macOS-26.1-arm64-arm-64bit-applegpu_g15s", ("mlx", "endpoint='completions'")),
        ):
            further = {"system_fingerprint": fingerprint} if fingerprint else {}
            for prompt in (OPEN, FORCED):
                reply = chat(" 8.\n</think>\n\n8", **further)
                reply.headers = headers
                with self.subTest(headers=headers, fingerprint=fingerprint, prompt=prompt):
                    texts, _ = self.ask(prompt, reply)
                    self.assertEqual(len(texts), 1, texts)
                    for word in words:
                        self.assertIn(word, texts[0])

    def test_no_warning_where_there_is_nothing_to_say(self) -> None:
        reply = chat(" 8.\n</think>\n\n8", system_fingerprint="vllm-0.32.0-609fcefb")
        llamacpp = chat(" 8.\n</think>\n\n8", system_fingerprint="b11434-0f1e2d3c")
        ollama = chat(" 8.\n</think>\n\n8", system_fingerprint="fp_ollama")
        other = chat(" 8.\n</think>\n\n8", system_fingerprint="fp_44709d6fcb")
        for prompt, answer, settings in (
            (QUESTION, reply, {}), (QUESTION, llamacpp, {}), (OPEN, ollama, {}), (OPEN, other, {}),
            (OPEN, reply, {"provider": "vllm"}), (OPEN, llamacpp, {"provider": "llamacpp"}),
            (OPEN, reply, {"prefill": "continue_final_message"}),
            (OPEN, llamacpp, {"prefill": "reasoning_content"}),
        ):
            with self.subTest(prompt=prompt, settings=settings):
                self.assertEqual(self.ask(prompt, answer, **settings)[0], [])

    def test_what_a_recognised_server_echoes_is_cut(self) -> None:
        prompt = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2,"}]
        for headers, fingerprint in ((LLAMACPP, None), ({}, "b11434-0f1e2d3c"),
                                     ({"llm_provider-server": "llama.cpp"}, None)):
            reply = chat("1, 2, 3", **({"system_fingerprint": fingerprint} if fingerprint else {}))
            reply.headers = headers
            with self.subTest(headers=headers, fingerprint=fingerprint):
                self.assertEqual({each.content for each in self.ask(prompt, reply)[1]}, {" 3"})
        self.assertEqual({each.content for each in self.ask(prompt, chat("1, 2, 3"))[1]}, {"1, 2, 3"})


class Check(Case):
    """check_injection() asks an open thought and a forced answer."""

    settings = {"api_key": "k", "max_retries": 0}

    def check(
        self, script: Callable[[Request, bool, str], Reply], model: str = "m", **settings: Any
    ) -> Tuple[Any, List[str], List[Request]]:
        """(verdict or error, warnings, requests). *script* gets (request, is it forced, its text)."""

        def reply(request: Request) -> Reply:
            said = request.body.get("prompt") or json.dumps(request.body["messages"][-1])
            return script(request, "1, 2, 3" in said, said)

        server = self.serve(reply)
        client = self.client(server, model, **settings)
        with self.warned() as texts:
            try:
                found: Any = client.check_injection()
            except Exception as error:  # what it raises is what is looked at
                found = error
        return found, texts, server.requests

    @staticmethod
    def goes_on(request: Request, is_forced: bool, said: str) -> Reply:
        text = " 8, 9, 10, 11" if is_forced else " 8. Now, France"
        return completion(text, "length") if "prompt" in request.body else chat(text, "length")

    @staticmethod
    def afresh(request: Request, is_forced: bool, said: str) -> Reply:
        text = "The capital of France is Paris."
        return completion(text) if "prompt" in request.body else chat(text)

    def test_both_go_on(self) -> None:
        for settings in ({}, {"provider": "openrouter"}, {"provider": "vllm"}, {"endpoint": "completions"}):
            with self.subTest(settings=settings):
                found, texts, requests = self.check(self.goes_on, **settings)
                self.assertIs(found, True)
                self.assertEqual(texts, [])
                self.assertEqual(len(requests), 2)
                self.assertTrue(all(request.body["max_tokens"] <= 64 for request in requests))

    def test_neither(self) -> None:
        for settings in ({}, {"endpoint": "completions"}):
            found, _texts, _ = self.check(self.afresh, **settings)
            self.assertIs(found, False)

    def test_one_of_them_is_a_no_and_a_warning_says_which(self) -> None:
        for thought_goes_on, words in ((True, "open thought"), (False, "forced answer")):
            for settings in ({}, {"endpoint": "completions"}):
                def script(request: Request, is_forced: bool, said: str) -> Reply:
                    answer = self.afresh if is_forced == thought_goes_on else self.goes_on
                    return answer(request, is_forced, said)

                with self.subTest(words, settings=settings):
                    found, texts, _ = self.check(script, **settings)
                    self.assertIs(found, False)
                    self.assertEqual(len(texts), 1, texts)
                    self.assertIn(words, texts[0])

    def test_the_probes_do_not_end_in_a_box(self) -> None:
        _, _, requests = self.check(self.goes_on, provider="vllm")
        for request in requests:
            self.assertFalse(request.body["messages"][-1]["content"].rstrip().endswith("{"))

    def test_a_refusal_of_the_injection_is_a_no(self) -> None:
        for status in (400, 422):
            for words in ("a final `assistant` message must start with a thinking block",
                          "roles should be alternating",
                          "Conversation ends with an assistant turn", "Bad Request",
                          "extra fields not permitted"):
                def script(request: Request, is_forced: bool, said: str) -> Reply:
                    if request.body["messages"][-1]["role"] == "assistant":
                        return Reply(status, {"error": {"message": words}})
                    return chat("Paris.")

                with self.subTest(status=status, words=words):
                    self.assertIs(self.check(script)[0], False)

    def test_a_refusal_of_one_of_them(self) -> None:
        def script(request: Request, is_forced: bool, said: str) -> Reply:
            if is_forced:
                return Reply(400, {"error": {"message": "the final message does not appear in the chat"}})
            return self.goes_on(request, is_forced, said) if "assistant" in said else chat("Paris.")

        found, texts, _ = self.check(script, provider="vllm")
        self.assertIs(found, False)
        self.assertTrue(any("open thought" in text for text in texts), texts)

    def test_whatever_the_question_alone_meets_too_is_raised(self) -> None:
        for status, words in ((400, "m is not a valid model ID"), (422, "unknown field"),
                              (401, "No auth credentials"),
                              (402, "Insufficient credits"), (403, "Forbidden"), (404, "No endpoints found"),
                              (500, "out of order"), (503, "overloaded")):
            with self.subTest(status=status):
                found, _, _ = self.check(lambda *_: Reply(status, {"error": {"message": words}}))
                self.assertIsInstance(found, rollouts.APIError)
                self.assertEqual(found.status, status)
                self.assertIn(words, str(found))

    def test_another_error_of_the_probe_is_raised(self) -> None:
        for status in (401, 404, 500):
            def script(request: Request, is_forced: bool, said: str) -> Reply:
                if request.body["messages"][-1]["role"] == "assistant":
                    return Reply(status, {"error": {"message": "no"}})
                return chat("Paris.")

            with self.subTest(status=status):
                self.assertEqual(getattr(self.check(script)[0], "status", None), status)

    def test_raw_prompts_are_what_is_asked(self) -> None:
        _, _, requests = self.check(self.goes_on, endpoint="completions")
        for request in requests:
            self.assertEqual(request.path, "/v1/completions")
            self.assertIn("<think>", request.body["prompt"])
            self.assertNotIn("messages", request.body)

    def test_a_server_that_echoes(self) -> None:
        """As llama-server replies: its field, its content, with the injected text in front."""
        def script(request: Request, is_forced: bool, said: str) -> Reply:
            injected = request.body["messages"][-1]
            text = " 8, 9" if is_forced else " 8. Now"
            message = {"reasoning_content": injected["reasoning_content"] + ("" if is_forced else text),
                       "content": injected["content"] + (text if is_forced else "")}
            return chat(None, "length", message=message)

        self.assertIs(self.check(script, provider="llamacpp")[0], True)

    def test_offline_it_cannot_ask(self) -> None:
        with self.assertRaisesRegex(ValueError, "offline"):
            self.client(self.serve()).check_injection(offline=True)

    def test_what_cannot_continue_is_not_asked(self) -> None:
        found, _, requests = self.check(self.goes_on, provider="mlx")
        self.assertIs(found, False)
        self.assertEqual(requests, [])


class Connections(Case):
    """llama-server binds a thread of a small pool to each kept connection."""

    settings = {"api_key": "k", "max_retries": 0, "use_cache": False, "max_concurrency": 1}

    def count(self, headers: Dict[str, str], **settings: Any) -> int:
        """On how many connections six samples came, one after the other."""
        def reply(request: Request) -> Reply:
            reply = chat(f"answer {request.seed}")
            reply.headers = headers
            return reply

        server = self.serve(reply)
        self.client(server, **settings).generate("Q", 6)
        self.assertEqual(len(server.requests), 6)
        return server.connections

    def test_connections_are_kept_elsewhere(self) -> None:
        for headers, settings in (({}, {}), ({"Keep-Alive": "timeout=65, max=100"}, {}),
                                  ({"Server": "uvicorn"}, {}),
                                  ({}, {"provider": "vllm"})):
            with self.subTest(headers=headers, settings=settings):
                self.assertEqual(self.count(headers, **settings), 1)

    def test_none_is_kept_to_llama_cpp(self) -> None:
        for headers, settings in (({}, {"provider": "llamacpp"}), ({"Server": "llama.cpp"}, {}),
                                  ({"Keep-Alive": "timeout=5, max=100"}, {}),
                                  ({"Keep-Alive": "max=9, timeout=2"}, {}),
                                  (LLAMACPP, {})):
            with self.subTest(headers=headers, settings=settings):
                self.assertEqual(self.count(headers, **settings), 6)


class Unpacked(Case):
    """gzip and deflate are read although they were not asked for."""

    settings = {"api_key": "k", "max_retries": 0, "use_cache": False}

    def test_packed_replies(self) -> None:
        def bare(data: bytes) -> bytes:  # deflate without zlib's header, as some servers send it
            squeezer = zlib.compressobj(wbits=-15)
            return squeezer.compress(data) + squeezer.flush()

        whole = json.dumps(chat("8").body).encode()
        stream = b"".join(events(delta(content="8"), delta("stop")).pieces or ())
        error = b'{"error": {"message": "no such model"}}'
        for name, pack in (
            ("gzip", gzip.compress), ("x-gzip", gzip.compress), ("GZip", gzip.compress),
            ("deflate", zlib.compress),
            ("deflate", bare),
        ):
            for body, form in ((whole, "whole"), (stream, "stream")):
                with self.subTest(name, form=form):
                    kind = "text/event-stream" if form == "stream" else "application/json"
                    headers = {"Content-Encoding": name, "Content-Type": kind}
                    server = self.serve(Reply(body=pack(body), headers=headers))
                    client = self.client(server, stream=form == "stream")
                    self.assertEqual(client.generate("Q")[0].content, "8")
                    self.assertEqual(len(server.requests), 1)
            with self.subTest(name, form="error"):
                server = self.serve(Reply(404, pack(error), headers={"Content-Encoding": name}))
                with self.assertRaisesRegex(rollouts.APIError, "no such model"):
                    self.client(server).generate("Q")


class Resets(Case):
    """An error reply whose connection ends in a reset keeps its status, its words and its waits."""

    settings = {"api_key": "k", "max_retries": 0, "use_cache": False}

    def test_error_replies(self) -> None:
        for status, headers, words, wait in (
            (401, [], "who are you?", None), (407, [], "this proxy wants a password", None),
            (413, [], "the body is beyond the limit", None), (429, ["Retry-After: 7"], "slow down", 7.0),
            (503, ["Retry-After: 3"], "busy", 3.0),
        ):
            page = f"<html><head><title>{words}</title></head><body>{words}</body></html>".encode()
            # A page that was announced longer than what came: its end was lost to the reset.
            for end, body in (("Connection: close", page), (f"Content-Length: {len(page) + 500}", page),
                              (f"Content-Length: {len(page)}", page),
                              ("Transfer-Encoding: chunked", b"%x\r\n%s\r\n" % (len(page), page))):
                lines = [f"HTTP/1.1 {status} X", "Content-Type: text/html", *headers, end]
                pieces = ["\r\n".join([*lines, "", ""]).encode() + body]
                with self.subTest(status=status, end=end), Raw(lambda *_: pieces, reset=True) as server:
                    with self.assertRaises(rollouts.APIError) as caught:
                        self.client(server).generate("Q" * 100)
                    error = caught.exception
                    self.assertEqual((error.status, error.retry_after), (status, wait))
                    self.assertIn(words, str(error))

    def test_a_refusal_is_not_asked_again(self) -> None:
        head = b"HTTP/1.1 413 X\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\ntoo large"
        with Raw(lambda *_: [head], reset=True) as server:
            with self.assertRaisesRegex(rollouts.APIError, "too large"):
                self.client(server, max_retries=5).generate("Q")
            self.assertEqual(server.came, 1)


class Advice(Case):
    """What to do about a 400."""

    settings = {"api_key": "k", "max_retries": 0, "use_cache": False}

    def advice(self, words: str) -> str:
        server = self.serve(Reply(400, {"error": {"message": words}}))
        with self.assertRaises(rollouts.APIError) as caught:
            self.client(server, provider="vllm").generate(FORCED)
        self.assertIn(words, str(caught.exception))
        self.assertIn(str(caught.exception.advice), str(caught.exception))
        return str(caught.exception.advice)

    def test_a_template_that_drops_the_injection(self) -> None:
        advice = self.advice(
            "continue_final_message is set but the final message does not appear in the chat after applying "
            "the chat template!")
        self.assertIn("template", advice)
        self.assertIn("endpoint='completions'", advice.replace('"', "'"))
        self.assertNotIn("check the parameters", advice)

    def test_a_refusal_that_names_max_tokens(self) -> None:
        for words in ("max_tokens must be at most 8192",
                      "This model's maximum is 32768 tokens; 'max_tokens' is too large",
                      "max_completion_tokens or max_tokens is too large: 99999"):
            with self.subTest(words=words):
                self.assertIn("max_tokens", self.advice(words))
        self.assertNotIn("max_tokens", self.advice("no such field: foo"))


LONG = "The same words again and again. " * 20


class Doubts(Case):
    """What looks wrong although every sample came."""

    settings = {"api_key": "k", "max_retries": 0}

    def ask(
        self, text: Callable[[int], str], n_samples: int, *, tokens: int = 100, prompt: str = "Q",
        prompt_tokens: int = 10, finish_reason: str = "stop", **settings: Any
    ) -> Tuple[List[str], Any]:
        def reply(request: Request) -> Reply:
            reply = chat(text(request.body.get("seed", 0)), finish_reason)
            reply.body["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens,
                                   "total_tokens": 0}
            return reply

        directory = os.path.join(self.directory, str(len(os.listdir(self.directory))))
        os.mkdir(directory)
        client = self.client(self.serve(reply), cache_dir=directory, **settings)
        with self.warned() as texts:
            results = client.generate(prompt, n_samples)
        with self.warned() as again:
            client.generate(prompt, n_samples)
        self.assertEqual([text for text in again if "cache" not in text], [],
                         "cached samples raise no doubts")
        return texts, results

    def test_samples_that_are_all_the_same_long_text(self) -> None:
        for n_samples in (5, 8, 20):
            with self.subTest(n_samples=n_samples):
                texts, _ = self.ask(lambda seed: LONG, n_samples)
                self.assertEqual(len(texts), 1, texts)
                self.assertIn("same", texts[0])
                self.assertIn("cache", texts[0])

    def test_samples_that_may_well_be_the_same(self) -> None:
        for name, text, options in (
            ("too few", lambda seed: LONG, {"n_samples": 4}),
            ("short", lambda seed: "8", {"n_samples": 9, "tokens": 3}),
            ("of 50 tokens", lambda seed: LONG, {"n_samples": 9, "tokens": 50}),
            ("greedy on purpose", lambda seed: LONG, {"n_samples": 9, "temperature": 0}),
            ("one differs", lambda seed: LONG + ("!" if seed == 6 else ""), {"n_samples": 9}),
        ):
            with self.subTest(name):
                self.assertEqual(self.ask(text, **options)[0], [])

    def test_a_prompt_of_which_a_part_was_dropped(self) -> None:
        prompt = "word " * 1600  # 8000 characters
        for counted, is_told in ((11, True), (999, True), (1001, False), (2000, False), (0, False)):
            with self.subTest(counted=counted):
                texts, _ = self.ask(lambda seed: f"8 {seed}", 3, prompt=prompt, prompt_tokens=counted)
                self.assertEqual(len(texts), int(is_told), texts)
                if is_told:
                    self.assertIn("dropped", texts[0])
        self.assertEqual(self.ask(lambda seed: "8", 3, prompt="word " * 800, prompt_tokens=11)[0], [])  # 4000

    def test_an_injection_counts_as_part_of_the_prompt(self) -> None:
        for provider in ("ollama", "llamacpp", "mistral"):
            with self.subTest(provider=provider):
                prompt = "Q\n<think>\n" + "word " * 1600 + "and"
                texts, _ = self.ask(lambda seed: f" 8 {seed}</think>8", 1, prompt=prompt, provider=provider)
                self.assertTrue(any("dropped" in text for text in texts), texts)

    def test_thoughts_that_the_default_cut_off(self) -> None:
        text = "<think>\nTwice four is "

        def cut(seed: int) -> str:
            return text + str(seed) if seed < 3 else f"{text}8.\n</think>\n\n8"

        texts, _results = self.ask(cut, 5, finish_reason="length")
        self.assertEqual(len(texts), 1, texts)
        self.assertIn("3", texts[0])
        self.assertIn("max_tokens", texts[0])
        for settings in ({"max_tokens": 4095}, {"max_tokens": 32_000}):
            texts, _ = self.ask(cut, 5, finish_reason="length", **settings)
            self.assertEqual(texts, [])

    def test_the_repr_counts_what_was_cut_off(self) -> None:
        with self.warned():
            _, results = self.ask(lambda seed: f"<think>\nTwice {seed}", 4, finish_reason="length",
                                  max_tokens=77)
            _, whole = self.ask(lambda seed: "8", 4)
        self.assertRegex(repr(results), r"4\b.*(cut off|max_tokens)|(cut off|max_tokens).*\b4\b")
        self.assertIn("max_tokens", repr(results))
        self.assertNotIn("cut off", repr(whole))


if __name__ == "__main__":
    unittest.main()
