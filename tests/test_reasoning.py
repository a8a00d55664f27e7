"""Reasoning: what an injection looks like on the wire, and what is made of every server's reply to it."""

import os
import tempfile
import unittest
import warnings
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

from tests import rollouts
from tests.case import Case, environment
from tests.server import Reply, Request, chat, delta, events

RolloutsClient = rollouts.RolloutsClient


# -- What goes out ---------------------------------------------------------------------------------

QUESTION = "What is 2 x 4?"
ANSWER = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The answer is"}]
NASTY = "<think>\n  Hm,\t\"2 x 4\" … \\boxed{é} 🦊\r\n\n is\n\n"


# The message that "<think>\na" becomes where the thought does not stand in the text, by the way of asking.
IN_A_FIELD: Dict[str, Dict[str, Any]] = {
    "prefix": {"role": "assistant", "content": "", "reasoning_content": "a", "prefix": True},
    "reasoning_content": {"role": "assistant", "content": "", "reasoning_content": "a"},
    "reasoning": {"role": "assistant", "content": "", "reasoning": "a"},
    "thinking": {"role": "assistant", "prefix": True, "content": [
        {"type": "thinking", "thinking": [{"type": "text", "text": "a"}], "closed": False}]},
}


class Outgoing(Case):
    """The request that a prompt becomes, as the server sees it."""

    settings = {"use_cache": False, "api_key": "k", "max_retries": 0}

    def setUp(self) -> None:
        super().setUp()
        self.server = self.serve(lambda request: chat("8"))

    def sent(self, prompt: Any, model: str = "qwen/qwen3-30b-a3b", **settings: Any) -> Request:
        """The one request for a sample of *prompt*."""
        before = len(self.server.requests)
        with self.client(self.server, model, **settings) as client:
            client.generate(prompt)
        (request,) = self.server.requests[before:]
        return request

    def refused(self, prompt: Any, model: str, **settings: Any) -> str:
        """The words of the ValueError that *prompt* meets before anything is sent."""
        before = len(self.server.requests)
        with self.assertRaises(ValueError) as caught:
            self.sent(prompt, model, **settings)
        self.assertEqual(len(self.server.requests), before)
        return str(caught.exception)

    def test_string_prompts(self) -> None:
        user, assistant = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))
        for prompt, messages in (
            ("Hello", [user("Hello")]),
            ("  Hello \n", [user("  Hello \n")]),
            ("2 < 3 and 4 > think", [user("2 < 3 and 4 > think")]),
            ("Q\n<think>", [user("Q"), assistant("<think>")]),
            ("Q\n<think>\n", [user("Q"), assistant("<think>\n")]),
            (" Q, line one\n\nline two \n<think>\nFirst",
             [user(" Q, line one\n\nline two"), assistant("<think>\nFirst")]),
            ("Q <think>a</think>", [user("Q"), assistant("<think>a</think>")]),
            ("Q\n<think>\na\n</think>\n\nThe answer is \\boxed{",
             [user("Q"), assistant("<think>\na\n</think>\n\nThe answer is \\boxed{")]),
            ("Q\n" + NASTY, [user("Q"), assistant(NASTY)]),
            ("<think>\nNo question", [assistant("<think>\nNo question")]),
            ("What does </think> mean?", [user("What does </think> mean?")]),
        ):
            with self.subTest(prompt=prompt):
                self.assertEqual(self.sent(prompt).body["messages"], messages)

    def test_several_tags_warn_and_the_injection_begins_at_the_first(self) -> None:
        with self.assertWarnsRegex(UserWarning, "several <think> tags"):
            request = self.sent("Q\n<think>\nthe tag <think> opens a thought")
        self.assertEqual(request.body["messages"], [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "<think>\nthe tag <think> opens a thought"}])

    def test_message_lists_stay_as_they_are(self) -> None:
        parts = [
            {"type": "text", "text": "Look: "},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
        for messages in (
            [{"role": "user", "content": "What is <think> for?"}],
            [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": " Q \n"},
             {"role": "assistant", "content": NASTY}],
            [{"role": "user", "content": parts, "name": "me"},
             {"role": "assistant", "content": "Sure.\n<think>a<think>"}],
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
             {"role": "user", "content": "Again"}],
        ):
            with self.subTest(messages=messages):
                copy = [dict(message) for message in messages]
                self.assertEqual(self.sent(messages).body["messages"], messages)
                self.assertEqual(messages, copy)

    def test_an_injection_in_parts_is_sent_as_one_text(self) -> None:
        """llama.cpp would put two line breaks between them (observed)."""
        parts = [{"type": "text", "text": "<think>a"}, {"type": "text", "text": " and b"}]
        messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": parts}]
        self.assertEqual(self.sent(messages).body["messages"][-1]["content"], "<think>a and b")
        self.assertEqual(messages[-1]["content"], parts)

    def test_each_provider_has_its_dialect(self) -> None:
        flags = {"continue_final_message": True, "add_generation_prompt": False}
        trailing = {"role": "assistant", "content": "<think>\na"}
        told: Dict[Optional[str], Tuple[Dict[str, Any], Dict[str, Any]]] = {
            None: (trailing, {}),
            **dict.fromkeys((
                "openrouter", "fireworks", "together", "novita", "deepinfra", "groq", "cerebras", "sambanova",
                "hyperbolic", "anthropic", "ollama", "lmstudio"), (trailing, {})),
            **dict.fromkeys(("vllm", "sglang", "nebius"), (trailing, flags)),
            "deepseek": (IN_A_FIELD["prefix"], {}),
            "mistral": (IN_A_FIELD["thinking"], {}),
            "llamacpp": (IN_A_FIELD["reasoning_content"], {}),
            "moonshot": ({**trailing, "partial": True}, {}),
        }
        question = {"role": "user", "content": "Q"}
        for provider, (message, in_body) in told.items():
            for prompt in ("Q\n<think>\na", [question, trailing]):
                with self.subTest(provider=provider, prompt=prompt):
                    body = self.sent(prompt, provider=provider).body
                    self.assertEqual(body["messages"], [question, message])
                    self.assertEqual({name: body[name] for name in flags if name in body}, in_body)
            with self.subTest(provider=provider, prompt="no injection"):
                body = self.sent("Q", provider=provider).body
                self.assertEqual(body["messages"], [question])
                self.assertFalse(set(flags) & set(body))

    def test_prefill_overrides_the_dialect(self) -> None:
        trailing = {"role": "assistant", "content": "<think>\na"}
        for prefill, message, in_body in (
            ("trailing", trailing, {}),
            ("partial", {**trailing, "partial": True}, {}),
            ("continue_final_message", trailing, {"continue_final_message": True, "add_generation_prompt": False}),
            *((prefill, message, {}) for prefill, message in IN_A_FIELD.items()),
        ):
            for provider in (None, "vllm", "mistral", "openrouter"):  # a vLLM behind a proxy is still a vLLM
                with self.subTest(prefill=prefill, provider=provider):
                    body = self.sent("Q\n<think>\na", provider=provider, prefill=prefill).body
                    self.assertEqual(body["messages"][-1], message)
                    self.assertEqual(
                        {name: value for name, value in body.items() if name.startswith(("continue_", "add_g"))},
                        in_body)
                    self.assertNotIn("prefill", body)

    def test_llamacpp_closes_a_thought_only_before_a_content(self) -> None:
        """Observed: with an empty text as its content the end of the thought is not rendered."""
        closing = [{"type": "text", "text": ""}]
        for prompt, thought, content in (
            ("Q\n<think>\na\n</think>", "a", closing),
            ("Q\n<think>\na\n</think>\n\n", "a", closing),
            ("Q\n<think>\n\n</think>\n\n", "", closing),
            ("Q\n<think>\n\n</think>\n\n8", "", "8"),
            ("Q\n<think>\n", "\n", ""),
        ):
            with self.subTest(prompt=prompt):
                message = self.sent(prompt, provider="llamacpp").body["messages"][-1]
                self.assertEqual((message["reasoning_content"], message["content"]), (thought, content))

    def test_prefill_per_call(self) -> None:
        with RolloutsClient("m", base_url=self.server.url, use_cache=False) as client:
            client.generate("Q\n<think>\na", prefill="partial")
            client.generate("Q\n<think>\na")
        marks = [request.body["messages"][-1].get("partial") for request in self.server.requests]
        self.assertEqual(marks, [True, None])

    def test_models_that_cannot_continue(self) -> None:
        for model, provider, words in (
            ("openai/gpt-oss-120b", None, "Harmony"),
            ("openai/gpt-oss-20b", "groq", "Harmony"),
            ("accounts/fireworks/models/gpt-oss-120b", "fireworks", "Harmony"),
            ("GPT-OSS:20b", "ollama", "Harmony"),
            ("google/gemini-2.5-pro", None, "Gemini"),
            ("gemini-2.5-flash", "gemini", "gemini"),
            ("some-new-name", "gemini", "gemini"),
            ("openai/gpt-5.2", "openrouter", "OpenAI"),
            ("gpt-4.1", "openai", "openai"),
            ("o4-mini", "openai", "openai"),
        ):
            for prompt in ("Q\n<think>\na", ANSWER):
                with self.subTest(model=model, provider=provider, prompt=prompt):
                    message = self.refused(prompt, model, provider=provider)
                    self.assertIn(model, message)
                    self.assertIn(words, message)
                    self.assertIn("deepseek/deepseek-r1", message)  # what to do instead
                    self.assertIn("prefill='trailing'", message)
            with self.subTest(model=model, provider=provider, prompt="no injection"):
                self.sent("Q", model, provider=provider)
            with self.subTest(model=model, provider=provider, prompt="all the same"):
                body = self.sent("Q\n<think>\na", model, provider=provider, prefill="trailing").body
                self.assertEqual(body["messages"][-1], {"role": "assistant", "content": "<think>\na"})

    def test_models_that_can_continue_are_not_taken_for_others(self) -> None:
        for model in ("qwen/qwen3-30b-a3b", "deepseek/deepseek-r1", "mistralai/magistral-small", "z-ai/glm-5",
                      "anthropic/claude-sonnet-4.5", "nvidia/openai-like"):
            with self.subTest(model=model):
                self.sent("Q\n<think>\na", model)

    def test_the_words_of_an_api_that_refuses_an_injection_are_passed_on(self) -> None:
        words = "This model does not support assistant message prefill. The conversation must end with a user message."
        self.server.script = Reply(400, {"error": {"message": words, "code": 400}})
        with self.assertRaises(rollouts.APIError) as caught:
            self.sent("Q\n<think>\na", "anthropic/claude-opus-4.6")
        self.assertEqual((caught.exception.status, caught.exception.message), (400, words))
        self.assertEqual(len(self.server.requests), 1)

    def test_a_trailing_space_warns_and_is_kept(self) -> None:
        for prompt in ("Q\n<think>\n2 x 4 = ", "Q\n<think>\n2 x 4\t", "Q\n<think>\na</think>\n\nThe answer is ",
                       [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Well, "}]):
            with self.subTest(prompt=prompt):
                with self.assertWarnsRegex(UserWarning, "ends in a space") as caught:
                    content = self.sent(prompt).body["messages"][-1]["content"]
                self.assertTrue(content.endswith((" ", "\t")))
                self.assertEqual(caught.filename, __file__)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for prompt in ("Q ", "Q\n<think>\n", "Q\n<think>\na\n", "Q\n<think>\na"):
                self.sent(prompt)

    def test_settings_of_the_client_stay_here(self) -> None:
        with tempfile.TemporaryDirectory() as cache_dir:
            body = self.sent(
                "Q\n<think>\na", provider="openrouter", use_cache="sql", cache_dir=cache_dir, progress_bar=False,
                verbose=False, requests_per_minute=6000, max_concurrency=3, max_retries=1, timeout=60, stream=False,
                prefill="trailing", seed=7, min_p=0.1, top_k=20).body
        messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\na"}]
        self.assertEqual(body, {
            "model": "qwen/qwen3-30b-a3b", "messages": messages, "temperature": 0.7, "top_p": 0.95, "max_tokens": 4096,
            "top_k": 20, "min_p": 0.1, "seed": 7})

    def test_openrouters_response_cache_is_off(self) -> None:
        self.assertEqual(self.sent("Q", provider="openrouter").headers.get("x-openrouter-cache"), "false")
        routing = {"only": ["nebius"], "allow_fallbacks": False}
        with mock.patch.dict(os.environ, OPENROUTER_BASE_URL=self.server.url):
            request = self.sent("Q", provider=routing, base_url=None)
        self.assertEqual(request.headers.get("x-openrouter-cache"), "false")
        self.assertEqual(request.body["provider"], routing)
        self.assertNotIn("x-openrouter-cache", self.sent("Q").headers)


# -- What comes back -------------------------------------------------------------------------------

THOUGHT = "I have to multiply the two numbers that I was given."
OPEN = f"{QUESTION}\n<think>\n{THOUGHT}"
FORCED = f"{QUESTION}\n<think>\n{THOUGHT}\n</think>\n\nTherefore, the final answer is \\boxed{{"


class Row(NamedTuple):
    """A reply and what must be made of it."""

    server: str  # who sends such a reply
    prompt: Any
    message: Dict[str, Any]
    reasoning: Optional[str]
    content: str
    completed: bool = True
    finish_reason: str = "stop"
    provider: Optional[str] = None


def mistral(thought: str, *texts: str) -> Dict[str, Any]:
    """A message as Mistral's API returns it: a list of parts."""
    return {"content": [
        {"type": "thinking", "thinking": [{"type": "text", "text": thought}]},
        *({"type": "text", "text": text} for text in texts)]}


def details(*texts: str, key: str = "text") -> List[Dict[str, Any]]:
    return [{"type": "reasoning.text", "index": 0, "format": "unknown", key: text} for text in texts]


TABLE = (
    # A question alone, and a model that shows no thought, or hides it.
    Row("no thought", QUESTION, {"content": "8"}, None, "8"),
    Row("no thought: white space is the answer's own", QUESTION, {"content": "\n 8 \n"}, None, "\n 8 \n"),
    Row("Groq, hidden", QUESTION, {"content": "8", "reasoning": None}, None, "8"),
    Row("OpenRouter, nulls", QUESTION, {"content": "8", "reasoning": None, "reasoning_details": [], "refusal": None},
        None, "8"),
    Row("OpenAI, a refusal", QUESTION, {"content": None, "refusal": "I cannot say."}, None, "I cannot say."),
    Row("no thought, cut off before its first word", QUESTION, {"content": ""}, None, "", True, "length"),
    Row("nothing at all, but a reason to stop", QUESTION, {"content": None}, None, "", True, "content_filter"),
    Row("content as a list of texts", QUESTION,
        {"content": [{"type": "text", "text": "2 x 4 "}, {"type": "text", "text": "= 8"}]}, None, "2 x 4 = 8"),
    # A question alone, and a thought beside the answer.
    Row("OpenRouter A", QUESTION,
        {"reasoning": "Twice four.", "content": "8", "reasoning_details": details("Twice four.")},
        "Twice four.", "8"),
    Row("OpenRouter, reasoning_details alone", QUESTION,
        {"content": "8", "reasoning_details": details("Twice", " four.")},
        "Twice four.", "8"),
    Row("OpenRouter, a summary", QUESTION,
        {"content": "8", "reasoning_details": [{"type": "reasoning.summary", "summary": "Multiplied."}]},
        "Multiplied.", "8"),
    Row("OpenRouter, an encrypted thought", QUESTION,
        {"content": "8", "reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAAA"}]}, None, "8"),
    Row("vLLM with a parser", QUESTION, {"reasoning": "Twice four.\n", "content": "\n\n8"}, "Twice four.", "8",
        provider="vllm"),
    Row("vLLM with a parser, its old field", QUESTION, {"reasoning_content": "\nTwice four.\n", "content": "\n\n8"},
        "Twice four.", "8", provider="vllm"),
    Row("vLLM with a parser, both fields", QUESTION,
        {"reasoning": "Twice four.", "reasoning_content": "Twice four.", "content": "8"}, "Twice four.", "8",
        provider="vllm"),
    Row("vLLM with a parser, cut off", QUESTION, {"reasoning": "Twice fo", "content": None},
        "Twice fo", "", False, "length", provider="vllm"),
    Row("vLLM without a parser", QUESTION, {"content": "<think>\nTwice four.\n</think>\n\n8"}, "Twice four.", "8",
        provider="vllm"),
    Row("vLLM without a parser, a template that opens the thought", QUESTION, {"content": "Twice four.\n</think>\n\n8"},
        "Twice four.", "8", provider="vllm"),
    Row("vLLM without a parser, cut off", QUESTION, {"content": "<think>\nTwice fo"}, "Twice fo", "", False, "length",
        provider="vllm"),
    Row("SGLang, separate_reasoning", QUESTION, {"reasoning_content": "Twice four.", "content": "8"},
        "Twice four.", "8", provider="sglang"),
    Row("SGLang, separate_reasoning off", QUESTION,
        {"reasoning_content": None, "content": "<think>Twice four.</think>8"},
        "Twice four.", "8", provider="sglang"),
    Row("llama.cpp, deepseek", QUESTION, {"reasoning_content": "Twice four.", "content": "8"}, "Twice four.", "8",
        provider="llamacpp"),
    Row("llama.cpp, deepseek-legacy: the thought twice", QUESTION,
        {"reasoning_content": "Twice four.", "content": "<think>\nTwice four.\n</think>\n\n8"},
        "Twice four.", "8", provider="llamacpp"),
    Row("llama.cpp, deepseek-legacy, cut off: the thought twice, still open", QUESTION,
        {"reasoning_content": "Twice fo", "content": "<think>\nTwice fo"}, "Twice fo", "", False, "length",
        provider="llamacpp"),
    Row("vLLM, split, and an answer that speaks of the tag", QUESTION,
        {"reasoning": "Twice four.", "content": "8. The tag </think> closes a thought."},
        "Twice four.", "8. The tag </think> closes a thought.", provider="vllm"),
    Row("llama.cpp, none", QUESTION, {"content": "<think>\nTwice four.\n</think>\n\n8"}, "Twice four.", "8",
        provider="llamacpp"),
    Row("Ollama", QUESTION, {"reasoning": "Twice four.", "content": "8"}, "Twice four.", "8", provider="ollama"),
    Row("LM Studio, inline", QUESTION, {"content": "<think>\nTwice four.\n</think>\n8"}, "Twice four.", "8",
        provider="lmstudio"),
    Row("LM Studio, its toggle on", QUESTION, {"reasoning_content": "Twice four.", "content": "8"},
        "Twice four.", "8", provider="lmstudio"),
    Row("DeepSeek", QUESTION, {"reasoning_content": "Twice four.", "content": "8"}, "Twice four.", "8",
        provider="deepseek"),
    # As seen from llama-server: what was injected stands in front, and is no chance repetition however short.
    Row("llama.cpp, a plain beginning, repeated",
        [{"role": "user", "content": "Count to ten."}, {"role": "assistant", "content": "1, 2, 3,"}],
        {"content": "1, 2, 3, 4, 5, 6, 7,"}, None, " 4, 5, 6, 7,", True, "length", provider="llamacpp"),
    Row("Mistral, a list", QUESTION, mistral("Twice four.", "8"), "Twice four.", "8", provider="mistral"),
    Row("Mistral, a list that ends in its thought", QUESTION, mistral("Twice fo"), "Twice fo", "", False, "length",
        provider="mistral"),
    Row("Groq, raw", QUESTION, {"content": "<think>\nTwice four.\n</think>\n\n8"}, "Twice four.", "8", provider="groq"),
    Row("Groq, parsed", QUESTION, {"reasoning": "Twice four.", "content": "8"}, "Twice four.", "8", provider="groq"),
    Row("Cerebras", QUESTION, {"reasoning": "Twice four.", "content": "8"}, "Twice four.", "8", provider="cerebras"),
    Row("Together, R1 inline", QUESTION, {"content": "<think>\nTwice four.\n</think>\n\n8", "tool_calls": []},
        "Twice four.", "8", provider="together"),
    Row("Fireworks", QUESTION, {"reasoning_content": "Twice four.", "content": "8"}, "Twice four.", "8",
        provider="fireworks"),
    Row("Fireworks, inline", QUESTION, {"content": "<think>Twice four.</think>\n\n8"}, "Twice four.", "8",
        provider="fireworks"),
    Row("Novita, separate_reasoning", QUESTION, {"reasoning_content": "Twice four.", "content": "8"}, "Twice four.",
        "8", provider="novita"),
    Row("an empty thought", QUESTION, {"content": "<think>\n\n</think>\n\n8"}, None, "8"),  # Qwen3, not thinking
    Row("words before the thought", QUESTION, {"content": "Well.\n<think>Twice four.</think>8"}, "Twice four.",
        "Well.\n8"),
    Row("a thought that is mentioned", QUESTION, {"content": "Well. <think>Twice four.</think>8"}, None,
        "Well. <think>Twice four.</think>8"),
    Row("words about a tag", QUESTION, {"content": "HTML has no <think> tag."}, None, "HTML has no <think> tag."),
    Row("a parser that missed the tag", QUESTION, {"reasoning": "Twice four.\n</think>\n\n8", "content": None},
        "Twice four.", "8"),
    Row("a call of a tool ends the thought", QUESTION,
        {"content": None, "reasoning": "I need a tool.",
         "tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        "I need a tool.", "", True, "tool_calls"),

    # After an injection that leaves the thought open.
    Row("OpenRouter A", OPEN,
        {"reasoning": " Twice four.", "content": "8", "reasoning_details": details(" Twice four.")},
        " Twice four.", "8"),
    Row("OpenRouter A, cut off", OPEN, {"reasoning": " Twice fo", "content": None}, " Twice fo", "", False, "length"),
    Row("OpenRouter B", OPEN, {"content": " Twice four.\n</think>\n\n8"}, " Twice four.", "8"),
    # The tag is lost, so that where the answer begins is anybody's guess: all of it is thought.
    Row("OpenRouter C", OPEN, {"content": " Twice four.\n\n8"}, " Twice four.\n\n8", "", False),
    # Nothing in the reply tells a fresh thought in its field from a continuation: check_injection() does.
    Row("OpenRouter D, a field", OPEN, {"reasoning": "Okay, twice four.", "content": "8"}, "Okay, twice four.", "8"),
    Row("OpenRouter D, tags", OPEN, {"content": "<think>\nOkay, twice four.\n</think>\n\n8"}, "Okay, twice four.", "8"),
    Row("OpenRouter D, an open tag", OPEN, {"content": "<think>\nOkay, twice fo"}, "Okay, twice fo", "", False,
        "length"),
    Row("vLLM with a parser", OPEN, {"reasoning": " Twice four.\n", "content": "\n\n8"}, " Twice four.", "8",
        provider="vllm"),
    Row("vLLM with a parser, its old field", OPEN, {"reasoning_content": " Twice four.", "content": "8"},
        " Twice four.", "8", provider="vllm"),
    Row("vLLM with a parser, no tag came", OPEN, {"reasoning": " Twice four. 8", "content": None},
        " Twice four. 8", "", False, provider="vllm"),
    Row("vLLM without a parser", OPEN, {"content": " Twice four.\n</think>\n\n8"}, " Twice four.", "8",
        provider="vllm"),
    Row("vLLM without a parser, cut off", OPEN, {"content": " Twice fo"}, " Twice fo", "", False, "length",
        provider="vllm"),
    Row("vLLM, echo asked for", OPEN, {"content": f"<think>\n{THOUGHT} Twice four.\n</think>\n\n8"}, " Twice four.",
        "8", provider="vllm"),
    Row("SGLang, a doubled tag", OPEN, {"content": "<think>\nTwice four.</think>\n8"}, "Twice four.", "8",
        provider="sglang"),
    Row("SGLang, separate_reasoning", OPEN, {"reasoning_content": " Twice four.", "content": "8"},
        " Twice four.", "8", provider="sglang"),
    Row("llama.cpp, deepseek", OPEN, {"reasoning_content": " Twice four.", "content": "8"}, " Twice four.", "8",
        provider="llamacpp"),
    Row("llama.cpp, deepseek, echoed as a reply of its own", OPEN,
        {"reasoning_content": f"{THOUGHT} Twice four.", "content": "8"},
        " Twice four.", "8", provider="llamacpp"),
    Row("llama.cpp, deepseek-legacy", OPEN,
        {"reasoning_content": " Twice four.", "content": "<think> Twice four.</think>8"},
        " Twice four.", "8", provider="llamacpp"),
    Row("llama.cpp, none", OPEN, {"content": " Twice four.</think>8"}, " Twice four.", "8", provider="llamacpp"),
    Row("llama.cpp, none, echoed", OPEN, {"content": f"<think>\n{THOUGHT} Twice four.</think>8"},
        " Twice four.", "8", provider="llamacpp"),
    Row("Ollama, R1's template", OPEN, {"content": " Twice four.</think>\n\n8"}, " Twice four.", "8",
        provider="ollama"),
    Row("TGI", OPEN, {"content": " Twice four.\n</think>\n\n8"}, " Twice four.", "8"),
    Row("DeepSeek, prefix", OPEN, {"content": " Twice four.\n</think>\n\n8"}, " Twice four.", "8", provider="deepseek"),
    Row("Mistral, echo", OPEN, {"content": f"<think>\n{THOUGHT} Twice four.</think>8"}, " Twice four.", "8",
        provider="mistral"),
    Row("Mistral, a list and an echo", OPEN, mistral(f"{THOUGHT} Twice four.", "8"), " Twice four.", "8",
        provider="mistral"),
    Row("Mistral, nothing but the echo", OPEN, {"content": f"<think>\n{THOUGHT}"}, "", "", False, "length",
        provider="mistral"),
    Row("Groq, raw, afresh", OPEN, {"content": "<think>\nOkay, twice four.\n</think>\n8"}, "Okay, twice four.", "8",
        provider="groq"),
    Row("Together", OPEN, {"content": " Twice four.\n</think>\n\n8"}, " Twice four.", "8", provider="together"),
    Row("Together, a tag of its own", OPEN, {"content": "<think>\n Twice four.</think>8"}, "Twice four.", "8",
        provider="together"),
    Row("Fireworks", OPEN, {"content": " Twice four.\n</think>\n\n8"}, " Twice four.", "8", provider="fireworks"),
    Row("Novita", OPEN, {"reasoning_content": " Twice four.", "content": "8"}, " Twice four.", "8", provider="novita"),
    Row("the thought ends at once", OPEN, {"content": "\n</think>\n\n8"}, "", "8"),
    Row("a second tag belongs to the answer", OPEN, {"content": " Twice four.</think>8</think>"}, " Twice four.",
        "8</think>"),
    Row("several injected tags, the last one open", [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "<think>a</think>b<think>c"}],
        {"content": " d</think>8"}, " d", "8"),
    # Words that a model may well repeat by chance are no echo.
    Row("the injected word again", f"{QUESTION}\n<think>\nWait.", {"content": "Wait. It is 8.</think>8"},
        "Wait. It is 8.", "8"),
    Row("the injected word again, where an echo is certain", f"{QUESTION}\n<think>\nWait.",
        {"content": "<think>\nWait. It is 8.</think>8"}, " It is 8.", "8", provider="mistral"),

    Row("llama.cpp, deepseek, a thought that was empty", f"{QUESTION}\n<think>\n",
        {"reasoning_content": "\nTwice four.", "content": "8"}, "Twice four.", "8", provider="llamacpp"),

    # After a forced answer: all of it is content, wherever the server put it.
    Row("OpenRouter A: the parser took it for a thought", FORCED, {"reasoning": "8}.", "content": None}, None, "8}."),
    Row("OpenRouter, reasoning_details", FORCED, {"content": "", "reasoning_details": details("8}.")}, None, "8}."),
    Row("OpenRouter B", FORCED, {"content": "8}."}, None, "8}."),
    Row("OpenRouter, in both fields", FORCED, {"reasoning": "8}", "content": "."}, None, "8}."),
    Row("forced, cut off", FORCED, {"content": " 8"}, None, " 8", True, "length"),
    Row("vLLM with a parser", FORCED, {"reasoning": "8}.", "content": None}, None, "8}.", provider="vllm"),
    Row("vLLM with a parser, its old field", FORCED, {"reasoning_content": "8}.", "content": None}, None, "8}.",
        provider="vllm"),
    Row("vLLM without a parser", FORCED, {"content": "8}."}, None, "8}.", provider="vllm"),
    Row("SGLang, separate_reasoning", FORCED, {"reasoning_content": "8}.", "content": ""}, None, "8}.",
        provider="sglang"),
    Row("llama.cpp, deepseek", FORCED, {"content": "8}."}, None, "8}.", provider="llamacpp"),
    Row("llama.cpp, none, echoed", FORCED,
        {"content": f"<think>\n{THOUGHT}\n</think>\n\nTherefore, the final answer is \\boxed{{8}}."},
        None, "8}.", provider="llamacpp"),
    Row("llama.cpp, deepseek, echoed and split as a reply of its own", FORCED,
        {"reasoning_content": THOUGHT, "content": "Therefore, the final answer is \\boxed{8}."},
        None, "8}.", provider="llamacpp"),
    Row("Ollama", FORCED, {"content": "8}."}, None, "8}.", provider="ollama"),
    Row("Mistral, echo", FORCED,
        {"content": f"<think>\n{THOUGHT}\n</think>\n\nTherefore, the final answer is \\boxed{{8}}."},
        None, "8}.", provider="mistral"),
    Row("Mistral, a list and an echo", FORCED, mistral(f"{THOUGHT}\n", "Therefore, the final answer is \\boxed{8}."),
        None, "8}.", provider="mistral"),
    # The words after the tag are the answer's: it is no thought, even where the model thinks aloud.
    Row("forced, with white space of its own", f"{QUESTION}\n<think>\n{THOUGHT}\n</think>", {"content": "\n\n8"}, None,
        "\n\n8"),

    # After an answer without any tag, the answer goes on.
    Row("an answer goes on", ANSWER, {"content": " 8."}, None, " 8."),
    Row("Mistral, an answer goes on after its echo", ANSWER, {"content": "The answer is 8."}, None, " 8.",
        provider="mistral"),
    Row("an answer goes on, with a thought beside it", ANSWER, {"reasoning": "Twice four.", "content": " 8."},
        "Twice four.", "8."),
)


def deltas(message: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """The fields of *message* in the small pieces that a stream brings: thoughts first."""

    def cut(text: str) -> Iterator[str]:
        return (text[start:start + 3] for start in range(0, len(text), 3))

    for name, value in sorted(message.items(), key=lambda item: item[0] == "content"):
        if isinstance(value, str):
            yield from ({name: piece} for piece in cut(value))
        elif name == "content" and value:
            for part in value:
                if part["type"] == "thinking":
                    yield from (
                        {name: [{**part, "thinking": [{"type": "text", "text": piece}]}]}
                        for piece in cut(part["thinking"][0]["text"]))
                else:
                    yield from ({name: piece} for piece in cut(part["text"]))
        elif name == "reasoning_details" and value:
            for part in value:
                key = next((key for key in ("text", "summary") if key in part), "data")
                yield from ({name: [{**part, key: piece}]} for piece in cut(part[key]))
        else:
            yield {name: value}


def streamed(message: Dict[str, Any], finish_reason: Optional[str] = "stop") -> Reply:
    """The same reply as chat(message=message), streamed."""
    last = {**delta(), "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}
    return events(
        delta(role="assistant", content=""), *(delta(**fields) for fields in deltas(message)),
        delta(finish_reason), last)


def files_below(directory: str) -> Dict[str, bytes]:
    """The files below *directory* by their relative names."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, directory)] = file.read()
    return found


class Incoming(Case):
    """Every shape of reply reads into the same Response, streamed or not, fresh or from the cache."""

    def test_the_table_is_long_enough_and_names_every_server(self) -> None:
        self.assertGreaterEqual(len(TABLE), 30)
        servers = " ".join(row.server for row in TABLE)
        for server in (
                "OpenRouter A", "OpenRouter B", "OpenRouter C", "OpenRouter D", "vLLM", "SGLang", "llama.cpp", "Ollama",
                "LM Studio", "TGI", "DeepSeek", "Mistral", "Groq", "Cerebras", "Together", "Fireworks", "Novita"):
            self.assertIn(server, servers)

    def test_the_table(self) -> None:
        def play(request: Request) -> Reply:
            if request.body.get("stream"):
                return streamed(row.message, row.finish_reason)
            return chat(finish_reason=row.finish_reason, message=row.message)

        server = self.serve(play)
        for number, row in enumerate(TABLE):
            with self.subTest(server=row.server, prompt=row.prompt, message=row.message):
                caches = [os.path.join(self.directory, f"{number}-{way}") for way in ("unstreamed", "streamed")]
                with self.client(server, provider=row.provider, api_key="k", max_tokens=9, max_retries=0) as client:
                    whole, pieces, again = (
                        client.generate(row.prompt, stream=stream, cache_dir=cache_dir)[0]
                        for stream, cache_dir in zip((False, True, True), (*caches, caches[0])))
                self.assertEqual(
                    (whole.reasoning, whole.content, whole.completed_reasoning, whole.finish_reason),
                    (row.reasoning, row.content, row.completed, row.finish_reason))
                self.assertEqual(whole.full, self.full_of(row))
                self.assertEqual(pieces, whole)
                self.assertEqual((again, again.cached, whole.cached), (whole, True, False))
                entries, streamed_entries = map(files_below, caches)
                self.assertEqual(streamed_entries, entries)
                self.assertEqual(len(entries), 2)  # the request, and the response
        self.assertEqual(len(server.requests), 2 * len(TABLE))

    @staticmethod
    def full_of(row: Row) -> str:
        if row.reasoning is None:
            return row.content
        return row.reasoning + "</think>" + row.content if row.completed else row.reasoning

    def test_full(self) -> None:
        for response, full in (
            (rollouts.Response("8", "Twice four."), "Twice four.</think>8"),
            (rollouts.Response("", "Twice fo", False), "Twice fo"),
            (rollouts.Response("", ""), "</think>"),
            (rollouts.Response("8"), "8"),
            (rollouts.Response(""), ""),
        ):
            with self.subTest(response=response):
                self.assertEqual(response.full, full)
                self.assertEqual(response.to_dict()["full"], full)

    def test_a_thought_that_was_cut_off_comes_back_from_both_caches(self) -> None:
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache=use_cache):
                server = self.serve(chat(" Twice fo", "length"))
                client = self.client(server, use_cache=use_cache, max_tokens=9)
                first, second = client.generate(OPEN)[0], client.generate(OPEN)[0]
                self.assertEqual(len(server.requests), 1)
                self.assertEqual(
                    (first.reasoning, first.content, first.completed_reasoning, first.finish_reason),
                    (" Twice fo", "", False, "length"))
                self.assertEqual(first, second)
                self.assertTrue(second.cached)


# -- check_injection -------------------------------------------------------------------------------

# How the two probes end; what comes before is the library's own affair.
SUM, ROW = "2 x 4 =", "6, 7,"


def is_open(request: Request) -> bool:
    """Whether the probe's thought is left open; else it is closed, and an answer is forced."""
    return SUM in str(request.body["messages"][-1])


class CheckInjection(Case):
    """A yes or no for this model at this provider, with cheap requests: an open thought, then a forced answer."""

    settings = {"api_key": "k", "max_retries": 0}

    def check(self, script: Any, model: str = "m", forced: Any = " 8, 9", **settings: Any) -> Tuple[bool, Any]:
        """What it finds where *script* answers the open thought, and *forced* is the answer that is forced."""
        def answer(request: Request) -> Reply:
            if not is_open(request):
                return forced if isinstance(forced, Reply) else chat(forced)
            return script(request) if callable(script) else script

        server = self.serve(answer)
        return self.client(server, model, **settings).check_injection(), server.requests

    def test_yes(self) -> None:
        for name, message in (
            ("in the content", {"content": " 8. Now, the capital of France is Paris."}),
            ("cut off", {"content": " 8"}),
            ("without a space", {"content": "8.\n\nNow"}),
            ("in bold", {"content": " **8**. Now"}),
            ("in the field", {"reasoning": " 8.\n\nNow, France", "content": None}),
            ("in the old field", {"reasoning_content": " 8. Now", "content": ""}),
            ("split", {"reasoning": " 8.", "content": "Paris"}),
            ("closed", {"content": " 8.\n</think>\n\nParis"}),
            ("in details", {"content": None, "reasoning_details": details(" 8.", " Now")}),
        ):
            with self.subTest(name):
                injects, requests = self.check(chat(message=message, finish_reason="length"))
                self.assertIs(injects, True)
                self.assertEqual(len(requests), 2)

    def test_no(self) -> None:
        for name, message in (
            ("afresh in the content", {"content": "The capital of France is Paris."}),
            ("afresh in the field", {"reasoning": "Okay, the user asks for the capital", "content": None}),
            ("afresh, and it also says 8", {"reasoning": "We had 2 x 4 = 8. Now, the capital", "content": None}),
            ("afresh between tags, and it also says 8", {"content": "<think>\nOkay, 2 x 4 = 8. Now"}),
            ("afresh, and 8 in the other field", {"reasoning": "Okay, the user has begun a sum.", "content": "8"}),
            ("afresh, and 8 after the tag", {"content": "Okay, the user has begun a sum.\n</think>\n\n8"}),
            ("another number", {"content": " 8.5"}),
            ("a longer number", {"content": " 80. Now"}),
            ("a wrong sum", {"content": " 6. Now"}),
            ("nothing", {"content": ""}),
        ):
            with self.subTest(name):
                injects, requests = self.check(chat(message=message, finish_reason="length"), forced="Paris.")
                self.assertIs(injects, False)
                self.assertEqual(len(requests), 2)

    def test_where_one_of_the_two_goes_on_a_warning_says_which(self) -> None:
        for thought, forced, words in (
            (" 8. Now", "Paris.", "continues an open thought, but not a forced answer"),
            ("The capital is Paris.", " 8, 9", "continues a forced answer, but not an open thought"),
        ):
            with self.subTest(words), self.assertWarnsRegex(UserWarning, words):
                self.assertIs(self.check(chat(thought), forced=forced)[0], False)

    def test_a_forced_answer_goes_on(self) -> None:
        for name, message, expected in (
            ("at once", {"content": "8, 9"}, True),
            ("after a space", {"content": " 8, 9, 10"}, True),
            ("with a thought of its own", {"reasoning": "Okay, I count.", "content": "8, 9"}, False),
            ("afresh", {"content": "Paris."}, False),
            ("in the field of thoughts", {"content": None, "reasoning": " 8, 9"}, True),  # as vLLM's parsers do
            ("from the beginning", {"content": "1, 2, 3"}, False),
        ):
            with self.subTest(name), self.warned() as warned:
                self.assertIs(self.check(chat(" 8"), forced=chat(message=message))[0], expected)
            self.assertEqual(len(warned), 0 if expected else 1)

    def test_echoes(self) -> None:
        """An echo is neither a yes nor a no: what follows it is."""

        def reply(request: Request) -> Reply:
            content = request.body["messages"][-1]["content"]
            if isinstance(content, list):  # Mistral's part
                content = "<think>\n" + content[0]["thinking"][0]["text"]
            bare = content.replace("<think>", "").lstrip() + after
            message = {"whole": {"content": content + after}, "bare": {"content": bare}, "split": {"reasoning": bare}}
            return chat(None, "length", message=message[place])

        for after, expected in (
                ("", False), ("\n<think>\nOkay, the user", False), ("\nOkay, the user asks", False), (" 8. Now", True)):
            for place in ("whole", "bare", "split"):
                for provider in (None, "mistral", "openrouter"):
                    with self.subTest(after=after, place=place, provider=provider):
                        forced = " 8, 9" if expected else "Paris."
                        self.assertIs(self.check(reply, forced=forced, provider=provider)[0], expected)

    def test_the_requests_are_cheap_and_in_the_providers_dialect(self) -> None:
        _, requests = self.check(chat(" 8"), provider="vllm", max_tokens=32_000, use_cache=True)
        for request, end in zip(requests, (SUM, ROW)):
            self.assertLessEqual(request.body["max_tokens"], 32)
            self.assertEqual(request.body["messages"][-1]["role"], "assistant")
            self.assertTrue(request.body["messages"][-1]["content"].startswith("<think>"))
            self.assertTrue(request.body["messages"][-1]["content"].endswith(end))
            self.assertIs(request.body["continue_final_message"], True)
        self.assertEqual([is_open(request) for request in requests], [True, False])

    def test_it_asks_again_each_time(self) -> None:
        client = self.client(self.serve([chat(" 8"), chat(" 8"), chat("Paris"), chat("Paris")]))
        self.assertEqual([client.check_injection(), client.check_injection()], [True, False])
        self.assertFalse(os.path.exists(self.cache_dir))

    def test_overrides_reach_the_request(self) -> None:
        server = self.serve(chat(" 8"))
        self.client(server, provider="openrouter").check_injection(model="n", max_tokens=64)
        with environment(OPENROUTER_BASE_URL=server.url):
            self.client().check_injection(provider={"only": ["nebius"]})
        first, _, second, _ = server.requests
        self.assertEqual((first.body["model"], first.body["max_tokens"]), ("n", 64))
        self.assertEqual(second.body["provider"], {"only": ["nebius"]})

    def test_a_refusal_is_a_no_where_the_question_alone_is_answered(self) -> None:
        for words in (
            "This model does not support assistant message prefill. The conversation must end with a user message.",
            "Assistant response prefill is incompatible with enable_thinking.",
            "Expected last role User or Tool (or Assistant with prefix True) for serving but got assistant",
        ):
            for status in (400, 422):
                def script(request: Request, status: int = status, words: str = words) -> Reply:
                    if request.body["messages"][-1]["role"] == "user":
                        return chat("Paris.")
                    return Reply(status, {"error": {"message": words}})

                with self.subTest(words=words, status=status):
                    server = self.serve(script)
                    self.assertIs(self.client(server).check_injection(), False)

    def test_a_model_that_cannot_continue_is_not_even_asked(self) -> None:
        for model, provider in (("openai/gpt-oss-20b", None), ("gemini-2.5-pro", None), ("gpt-4.1", "openai")):
            with self.subTest(model=model):
                injects, requests = self.check(chat(" 8"), model=model, provider=provider)
                self.assertIs(injects, False)
                self.assertEqual(len(requests), 0)

    def test_other_errors_are_raised(self) -> None:
        for status, words in ((401, "No auth credentials"), (402, "Insufficient credits"), (404, "No endpoints found"),
                              (400, "m is not a valid model ID"), (503, "overloaded")):
            with self.subTest(status=status), self.assertRaises(rollouts.APIError) as caught:
                refusal = Reply(status, {"error": {"message": words, "code": status}})
                self.check(refusal, forced=refusal)
            self.assertEqual(caught.exception.status, status)


if __name__ == "__main__":
    unittest.main()
