"""Replies read right, rule by rule: what no capture shows and test_reasoning's table does not hold."""

import os
import unittest
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from tests.case import Case
from tests.server import Reply, Request, chat, delta, events

QUESTION = "What is 2 x 4?"
THOUGHT = "The user wants 2 x 4. 2 x 4 ="
OPEN = f"{QUESTION}\n<think>\n{THOUGHT}"
COMPLETE = f"{QUESTION}\n<think>\n{THOUGHT} 8.\n"  # so that a model may well close it at once
ANSWER = "Therefore, the final answer is \\boxed{"
FORCED = f"{QUESTION}\n<think>\n{THOUGHT} 8.\n</think>\n\n{ANSWER}"
EMPTY = (None, "")  # either says that there was no thought
PARSER = {"reasoning_tokens": 0}  # vLLM's completion_tokens_details; null without a parser
LLAMACPP = {"Server": "llama.cpp", "Keep-Alive": "timeout=5, max=100"}
LITELLM = {"llm_provider-server": "llama.cpp"}


def trailing(text: str, **fields: Any) -> List[Dict[str, Any]]:
    return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text, **fields}]


class Row(NamedTuple):
    """A reply, and what must be read in it. A tuple of reasonings: each is right."""

    why: str
    prompt: Any
    message: Dict[str, Any]
    reasoning: Any
    content: str
    completed: bool = True
    finish_reason: str = "stop"
    provider: Optional[str] = None
    settings: Dict[str, Any] = {}
    further: Dict[str, Any] = {}  # of the reply, beside its choices
    headers: Dict[str, str] = {}


def vllm(details: Optional[Dict[str, int]]) -> Dict[str, Any]:
    return {"usage": {"prompt_tokens": 42, "completion_tokens": 14, "completion_tokens_details": details}}


def parts(*given: Dict[str, Any]) -> Dict[str, Any]:
    return {"content": list(given)}


SPLIT = f"\n{THOUGHT} 8.\n"
ECHO = (
    # The white space beside the tags is the template's, and an empty thought may stand in front.
    *(Row(f"an echo: {name}", OPEN, {"content": f"{before}{THOUGHT} 8."}, " 8.", "", False,
          provider="llamacpp")
      for name, before in (
          ("as sent", "<think>\n"), ("nothing after the tag", "<think>"), ("two lines", "<think>\n\n"),
          ("a line before it", "\n<think>\n"), ("a space after it", "<think> "),
          ("an empty thought", "<think></think><think>"), ("of a blank", "<think> </think>\n<think>\n"),
          ("of lines", "<think>\n\n\n</think>\n\n\n<think>"), ("no tag at all", ""))),
    *(Row(f"an echo, closed: {name}", OPEN, {"content": f"{before}{THOUGHT} 8.{after}8."}, " 8.", "8.",
          provider="llamacpp")
      for name, before, after in (
          ("as sent", "<think>\n", "\n</think>\n\n"), ("tight", "<think>", "</think>"),
          ("an empty thought", "<think>\n\n</think>\n\n<think>\n", "\n</think>\n"))),
    *(Row(f"an echo of a forced answer: {name}", FORCED, {"content": f"{before}{ANSWER}8}}."}, None, "8}.",
          provider="llamacpp")
      for name, before in (
          ("as sent", f"<think>\n{THOUGHT} 8.\n</think>\n\n"), ("tight", f"<think>{THOUGHT} 8.</think>"),
          ("an empty thought", f"<think></think><think>{THOUGHT} 8.\n</think>\n"),
          ("the answer alone", ""))),
    Row("an echo whose last line break was kept", COMPLETE,
        {"content": f"<think>\n{THOUGHT} 8.\n</think>\n\n8"},
        "", "8", provider="llamacpp"),
    Row("an echo whose last line break was cut", COMPLETE, {"content": f"<think>\n{THOUGHT} 8.</think>8"},
        "", "8", provider="llamacpp"),
    Row("an echo, and a thought that goes on in the next line", COMPLETE,
        {"content": f"<think>\n{THOUGHT} 8.\nSo 8.\n</think>\n\n8"}, "So 8.", "8", provider="llamacpp"),
    Row("an echo alone", OPEN, {"content": f"<think>\n{THOUGHT}"}, "", "", False, "length",
        provider="llamacpp"),
    Row("an echo alone, in its field", OPEN, {"reasoning_content": THOUGHT, "content": ""}, "", "", False,
        "length",
        provider="llamacpp"),
    Row("an echo in the field", OPEN, {"reasoning_content": f"{THOUGHT} 8.\n", "content": "\n8"}, " 8.", "8",
        provider="llamacpp"),
    Row("an echo in the field, after lines", OPEN, {"reasoning_content": f"\n\n{THOUGHT} 8.", "content": "8"},
        " 8.",
        "8", provider="llamacpp"),
    Row("an echo in the field, and the thought closed at once", COMPLETE,
        {"reasoning_content": f"{THOUGHT} 8.\n", "content": "8"}, EMPTY, "8", provider="llamacpp"),
    Row("a short echo whose tag is repeated", f"{QUESTION}\n<think>\nWell,",
        {"content": "<think>Well, 8.\n</think>8"},
        " 8.", "8"),
    Row("a word said again is no echo", f"{QUESTION}\n<think>\nWell,",
        {"content": "Well, well, 8.\n</think>8"},
        "Well, well, 8.", "8"),
    Row("two words before the tag are no echo", trailing("Yes."), {"content": "Yes. 8"}, None, "Yes. 8"),
    Row("an echo of a message without tags", trailing("  2 x 4 ="), {"content": "  2 x 4 = 8"}, None, " 8",
        provider="llamacpp"),
    Row("a long one, of a server that names itself nowhere",
        trailing("The user wants to know what two times four is, which is"),
        {"content": "The user wants to know what two times four is, which is 8."}, None, " 8."),
    Row("text with signs that mean something to a pattern",
        f"{QUESTION}\n<think>\n(2 x 4) [a+b]* = \\frac{{8}}{{1}} ?",
        {"content": "<think>(2 x 4) [a+b]* = \\frac{8}{1} ? Yes.</think>8"}, " Yes.", "8",
        provider="llamacpp"),
    # base_url alone: the reply says who sent it.
    Row("llama.cpp by its header", trailing("Yes."), {"content": "Yes. Yes."}, None, " Yes.",
        headers=LLAMACPP),
    Row("llama.cpp by its fingerprint", trailing("Yes."), {"content": "Yes. Yes."}, None, " Yes.",
        further={"system_fingerprint": "b11434-2f3ab1c09"}),
    Row("llama.cpp behind LiteLLM", trailing("Yes."), {"content": "Yes. Yes."}, None, " Yes.",
        headers=LITELLM),
    # A gateway splits the echo at its tags.
    Row("a gateway split an open thought", OPEN, {"reasoning_content": SPLIT, "content": "\n\n8"}, " 8.", "8",
        headers=LITELLM),
    Row("and trimmed it", OPEN, {"reasoning_content": SPLIT.strip(), "content": "8"}, " 8.", "8",
        headers=LITELLM),
    Row("a gateway split a forced answer", FORCED,
        {"reasoning_content": SPLIT, "content": f"\n\n{ANSWER}8}}."}, None,
        "8}.", headers=LITELLM),
    Row("and trimmed it", FORCED, {"reasoning_content": SPLIT.strip(), "content": f"{ANSWER}8}}."}, None,
        "8}.",
        headers=LITELLM),
    Row("and calls it reasoning", FORCED, {"reasoning": SPLIT, "content": f"\n{ANSWER}8}}."}, None, "8}.",
        headers=LITELLM),
    Row("a gateway split at the empty thought", OPEN,
        {"reasoning_content": "\n\n", "content": f"\n\n<think>\n{THOUGHT} 8."}, " 8.", "", False,
        headers=LITELLM),
    Row("a gateway split at the empty thought, and the thought was closed", OPEN,
        {"reasoning_content": "\n\n", "content": f"\n\n<think>\n{THOUGHT} 8.\n</think>\n\n8"}, " 8.", "8",
        headers=LITELLM),
    Row("a gateway split at the empty thought, before a forced answer", FORCED,
        {"reasoning_content": "\n\n", "content": f"\n\n<think>\n{THOUGHT} 8.\n</think>\n\n{ANSWER}8}}."},
        None, "8}.",
        headers=LITELLM),
    # The user's own fields.
    Row("reasoning_content of the user's, echoed with tags", trailing("", reasoning_content=THOUGHT),
        {"content": f"<think>\n{THOUGHT} 8.\n</think>\n\n8"}, " 8.", "8", provider="llamacpp"),
    Row("reasoning_content and content of the user's", trailing(ANSWER, reasoning_content=f"{THOUGHT} 8."),
        {"reasoning_content": f"{THOUGHT} 8.\n", "content": f"{ANSWER}8}}."}, None, "8}.",
        provider="llamacpp"),
    Row("reasoning of the user's", trailing("", reasoning=THOUGHT), {"reasoning": " 8.", "content": "8"},
        " 8.", "8",
        provider="ollama"),
    Row("reasoning of the user's, no tag came", trailing("", reasoning=THOUGHT), {"content": " 8."}, " 8.",
        "", False,
        "length", provider="ollama"),
)

MENTIONS = (
    # Tags that a text merely mentions are left alone.
    *(Row(f"a mention: {text[:30]!r}", QUESTION, {"content": text}, None, text) for text in (
        "Use `re.sub(r'<think>.*?</think>', '', t)` for that.",
        "The tag </think> ends a thought.",
        "A model thinks between <think> and </think>, then answers.",
        "`<think>` opens a thought and `</think>` closes it.",
        "\"<think>\" opens a thought and \"</think>\" closes it.",
        "It ends with `</think>`\nThat is all.",
        "It ends with \"</think>\"\nThat is all.",
        "It looks so:\n```\n<think>\nTwice four.\n</think>\n\n8\n```\nThat is all.",
        "It looks so:\n```xml\n<think>Twice four.</think>\n```",
        "```\n<think>\nTwice four.\n</think>\n```\nis how it looks.",
        "Its end:\n```\nTwice four.\n</think>\n8\n```\nThat is all.",
        "HTML has no <think> tag, and no </think> either.",
        "Twice four. <think>",
    )),
    Row("a thought, and an answer that mentions the tags", QUESTION,
        {"content": "<think>\nTwice four.\n</think>\n\nThe tag </think> closes <think>.\n</think>"},
        "Twice four.",
        "The tag </think> closes <think>.\n</think>"),
    Row("a thought that mentions the tag", QUESTION,
        {"content": "<think>\nThe tag `</think>` is meant.\n</think>\n\n8"}, "The tag `</think>` is meant.",
        "8"),
    Row("a thought with the tag in a block of code", QUESTION,
        {"content": "<think>\nSo:\n```\n</think>\n```\nor so.\n</think>\n\n8"},
        "So:\n```\n</think>\n```\nor so.", "8"),
    Row("a continued thought that mentions the tag", OPEN,
        {"content": " 8, then `</think>`, \"</think>\".\n</think>\n\n8"},
        " 8, then `</think>`, \"</think>\".", "8"),
    Row("a continued thought with the tag in a block of code", OPEN,
        {"content": " 8:\n```\n</think>\n```\nor so.\n</think>\n\n8"}, " 8:\n```\n</think>\n```\nor so.",
        "8"),
    Row("after a forced answer nothing is cut", FORCED,
        {"content": "8}. </think> is a tag, <think> too.\n</think>"},
        None, "8}. </think> is a tag, <think> too.\n</think>"),
    Row("after a message without tags", trailing("A thought ends with"),
        {"content": " the tag </think> alone."}, None,
        " the tag </think> alone."),
    # Beside a thought in its field only a leading block or tag is cut.
    Row("a leading tag", QUESTION, {"reasoning_content": "Twice two.", "content": "</think>\n\n4"},
        "Twice two.", "4"),
    Row("a leading block", QUESTION,
        {"reasoning": "Twice two.", "content": "<think>\nTwice two.\n</think>\n\n4"},
        "Twice two.", "4"),
    *(Row(f"beside a field: {text[:30]!r}", QUESTION, {field: "Twice two.", "content": text}, "Twice two.",
          text)
      for field, text in (
          ("reasoning", "First.\n<think>\nx\n</think>\ny"), ("reasoning_content", "It ends so:\n</think>\n4"),
          ("reasoning", "```\n</think>\n```"), ("reasoning_content", "4. </think>"),
          ("reasoning", "4</think>\n"))),
    Row("a thought in its field that mentions the tag", QUESTION,
        {"reasoning": "The tag </think> closes.", "content": "4"}, "The tag </think> closes.", "4"),
    Row("and was cut off", QUESTION, {"reasoning": "The tag `</think>` clo", "content": ""},
        "The tag `</think>` clo",
        "", False, "length"),
    # A block after a preamble that ends in a line break is the model's own.
    Row("a preamble", QUESTION, {"content": "Sure.\n<think>\nTwice four.\n</think>\n8"}, "Twice four.",
        "Sure.\n8"),
    Row("white space before it", QUESTION, {"content": " \n\n <think>Twice four.</think> 8"}, "Twice four.",
        "8"),
)

LONE = (
    # A lone closing tag ends a thought that the template opened, at the beginning or end of a line.
    Row("in a line of its own", QUESTION, {"content": "Twice four.\n</think>\n\n8"}, "Twice four.", "8"),
    Row("at the end of a line", QUESTION, {"content": "Twice four.</think>\n8"}, "Twice four.", "8"),
    Row("at the beginning of a line", QUESTION, {"content": "Twice four.\n</think>8"}, "Twice four.", "8"),
    Row("at the end of all", QUESTION, {"content": "Twice four.</think>"}, "Twice four.", ""),
    Row("at the beginning of all", QUESTION, {"content": "</think>\n\n8"}, EMPTY, "8"),
    Row("after a mention", QUESTION, {"content": "The tag `</think>` it is.\n</think>\n\n8"},
        "The tag `</think>` it is.", "8"),
    Row("after a mention within a line", QUESTION, {"content": "The tag </think> ends it.\n</think>\n\n8"},
        "The tag </think> ends it.", "8"),
    Row("after a block of code", QUESTION, {"content": "So:\n```\n</think>\n```\nor so.\n</think>\n\n8"},
        "So:\n```\n</think>\n```\nor so.", "8"),
    Row("after a message without tags", trailing(THOUGHT), {"content": " 8.\n</think>\n\n8"}, " 8.", "8"),
)

FIELDS = (
    # A blank field hides nothing.
    Row("a blank reasoning_content", QUESTION,
        {"reasoning_content": "\n", "reasoning": "Twice.", "content": "8"},
        "Twice.", "8"),
    Row("a blank reasoning", QUESTION, {"reasoning": "", "reasoning_content": "Twice.", "content": "8"},
        "Twice.", "8"),
    Row("both, beside details", QUESTION,
        {"reasoning": " ", "reasoning_content": "", "content": "8",
         "reasoning_details": [{"type": "reasoning.text", "text": "Twice."}]}, "Twice.", "8"),
    Row("a blank field, and tags", QUESTION,
        {"reasoning_content": "\n", "content": "<think>\nTwice.\n</think>\n\n8"},
        "Twice.", "8"),
    Row("a blank field, and a lone tag", QUESTION,
        {"reasoning_content": "", "content": "Twice.\n</think>\n\n8"},
        "Twice.", "8"),
    Row("a blank field, and a forced answer", FORCED, {"reasoning": "\n", "content": "8}."}, None, "8}."),
    Row("blank, after an open thought, and tags", OPEN,
        {"reasoning_content": "", "content": " 8.\n</think>\n\n8"},
        " 8.", "8"),
    # Parts by their type.
    Row("reasoning with a text", QUESTION,
        parts({"type": "reasoning", "text": "Twice."}, {"type": "text", "text": "8"}),
        "Twice.", "8"),
    Row("reasoning with a summary", QUESTION,
        parts({"type": "reasoning", "summary": "Twice."}, {"type": "text", "text": "8"}), "Twice.", "8"),
    Row("reasoning with a summary of parts", QUESTION,
        parts({"type": "reasoning", "summary": [{"type": "summary_text", "text": "Twi"},
                                                {"type": "summary_text", "text": "ce."}]},
              {"type": "text", "text": "8"}), "Twice.", "8"),
    Row("reasoning with an empty summary", QUESTION,
        parts({"type": "reasoning", "summary": [], "text": "Twice."}, {"type": "text", "text": "8"}),
        "Twice.", "8"),
    Row("reasoning of both kinds", QUESTION,
        parts({"type": "reasoning", "summary": [{"type": "summary_text", "text": "Twi"}]},
              {"type": "reasoning", "text": "ce."}, {"type": "text", "text": "8"}), "Twice.", "8"),
    Row("thinking as a str", QUESTION, parts({"type": "thinking", "thinking": "Twice.", "signature": "x"},
                                             {"type": "text", "text": "8"}), "Twice.", "8"),
    Row("thinking in several parts", QUESTION,
        parts({"type": "thinking",
               "thinking": [{"type": "text", "text": "Twi"}, {"type": "text", "text": "ce."}]},
              {"type": "text", "text": "8"}, {"type": "text", "text": "."}), "Twice.", "8."),
    Row("a thought whose parts came token by token, one of them a paragraph's end", QUESTION,
        parts({"type": "thinking", "thinking": [{"type": "text", "text": "Twice."}]},
              {"type": "thinking", "thinking": [{"type": "text", "text": "\n\n"}]},
              {"type": "reasoning", "text": "So 8."}, {"type": "text", "text": "8"}), "Twice.\n\nSo 8.", "8"),
    Row("parts that are no text", QUESTION,
        parts({"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "8"}), None, "8"),
    Row("parts, cut off in the thought", QUESTION, parts({"type": "reasoning", "text": "Twi"}), "Twi", "",
        False,
        "length"),
    Row("parts, after an open thought", OPEN,
        parts({"type": "thinking", "thinking": [{"type": "text", "text": " 8."}]},
              {"type": "text", "text": "8"}), " 8.",
        "8", provider="mistral"),
    Row("parts, after a forced answer", FORCED,
        parts({"type": "reasoning", "text": "8}"}, {"type": "text", "text": "."}),
        None, "8}."),
    # The first space is the continuation's; beside a tag it is layout.
    Row("a question alone", QUESTION, {"content": " 8\n"}, None, " 8\n"),
    Row("a message without tags", trailing("2 x 4 ="), {"content": " 8"}, None, " 8"),
    Row("a line break", trailing("2 x 4 ="), {"content": "\n\n8"}, None, "\n\n8"),
    Row("an open thought", OPEN, {"content": " 8"}, " 8", "", False, "length"),
    Row("an open thought in its field", OPEN, {"reasoning": "\n\n 8", "content": None}, "\n\n 8", "", False,
        "length"),
    Row("a forced answer", FORCED, {"content": " 8}"}, None, " 8}"),
    Row("a forced answer in the wrong field", FORCED, {"reasoning_content": " 8}", "content": ""}, None,
        " 8}"),
    Row("a forced answer in both fields", FORCED, {"reasoning_content": " 8}", "content": ". Yes"}, None,
        " 8}. Yes"),
)

HIDDEN = tuple(
    Row(f"hidden by {settings}: {why}", OPEN, message, EMPTY, content, completed, finish_reason,
        settings=settings)
    for settings in ({"include_reasoning": False}, {"reasoning": {"exclude": True}},
                     {"reasoning": {"effort": "low", "exclude": True}})
    for why, message, content, completed, finish_reason in (
        ("an answer", {"content": "The answer is 8."}, "The answer is 8.", True, "stop"),
        ("with a null field", {"content": "\n\nThe answer is 8.", "reasoning": None}, "The answer is 8.",
         True, "stop"),
        ("an answer, cut off", {"content": "The answer is"}, "The answer is", True, "length"),
        ("with a stop=", {"content": "The answer is 8."}, "The answer is 8.", True, "stop"),
    )
) + (
    Row("asked for, but not done", OPEN, {"content": " 8.\n</think>\n\n8"}, " 8.", "8",
        settings={"reasoning": {"exclude": True}}),
    Row("asked for, but not done, in its field", OPEN, {"reasoning": " 8.", "content": "8"}, " 8.", "8",
        settings={"include_reasoning": False}),
    Row("not asked for", OPEN, {"content": "The answer is"}, "The answer is", "", False, "length",
        settings={"include_reasoning": True}),
    Row("nothing excluded", OPEN, {"content": "The answer is"}, "The answer is", "", False, "length",
        settings={"reasoning": {"exclude": False}}),
    Row("a question alone", QUESTION, {"content": "The answer is 8."}, None, "The answer is 8.",
        settings={"include_reasoning": False}),
    Row("vLLM without a parser can hide nothing", OPEN, {"content": " 8."}, " 8.", "", False, provider="vllm",
        settings={"include_reasoning": False}, further=vllm(None)),
)

VLLM_FINGERPRINT = {"system_fingerprint": "vllm-0.32.0-609fcefb"}
AT_ONCE = (
    # vLLM: its usage tells of a parser.
    Row("vLLM with a parser", COMPLETE, {"content": "\n\nIt is 8.", "reasoning": None}, EMPTY, "It is 8.",
        provider="vllm", further=vllm(PARSER)),
    Row("vLLM with a parser, an empty object", COMPLETE, {"content": "It is 8."}, EMPTY, "It is 8.",
        provider="vllm", further=vllm({})),
    Row("vLLM with a parser, and the answer cut off", COMPLETE, {"content": "It is"}, EMPTY, "It is", True,
        "length",
        provider="vllm", further=vllm(PARSER)),
    Row("vLLM with a parser, with stop=", COMPLETE, {"content": "It is"}, EMPTY, "It is",
        settings={"stop": ["8"]},
        provider="vllm", further=vllm(PARSER)),
    Row("vLLM without one", COMPLETE, {"content": "So it is 8."}, "So it is 8.", "", False, provider="vllm",
        further=vllm(None)),
    Row("vLLM without one, cut off", COMPLETE, {"content": "So it"}, "So it", "", False, "length",
        provider="vllm",
        further=vllm(None)),
    Row("vLLM without one, closed", COMPLETE, {"content": "So it is 8.\n</think>\n\n8"}, "So it is 8.", "8",
        provider="vllm", further=vllm(None)),
    Row("vLLM by its fingerprint, with a parser", COMPLETE, {"content": "It is"}, EMPTY, "It is", True,
        "length",
        further={**vllm(PARSER), **VLLM_FINGERPRINT}),
    Row("vLLM by its fingerprint, without one", COMPLETE, {"content": "So it is 8."}, "So it is 8.", "",
        False,
        further={**vllm(None), **VLLM_FINGERPRINT}),
    # Elsewhere a field that is a str, even an empty one.
    *(Row(f"{field}, empty, {finish_reason}", COMPLETE, {field: "", "content": "It is"}, EMPTY, "It is", True,
          finish_reason)
      for field in ("reasoning", "reasoning_content") for finish_reason in ("stop", "length")),
    Row("an empty field, with stop=", COMPLETE, {"reasoning": "", "content": "It is"}, EMPTY, "It is",
        settings={"stop": "8"}),
    # Else the reason to stop.
    Row("stop", COMPLETE, {"content": "The answer is 8."}, EMPTY, "The answer is 8."),
    Row("stop, and a null field", COMPLETE, {"content": "The answer is 8.", "reasoning": None}, EMPTY,
        "The answer is 8."),
    Row("stop, after a thought that ends in a word", OPEN, {"content": "The answer is 8."}, EMPTY,
        "The answer is 8."),
    Row("length", COMPLETE, {"content": "So the answer"}, "So the answer", "", False, "length"),
    Row("stop, with stop=", COMPLETE, {"content": "So it is"}, "So it is", "", False,
        settings={"stop": ["8"]}),
    Row("stop, with stop= as a str", COMPLETE, {"content": "So it is"}, "So it is", "", False,
        settings={"stop": "8"}),
    Row("stop, and directly on with the words", OPEN, {"content": " 8."}, " 8.", "", False),
    Row("stop, and a tag", COMPLETE, {"content": "So it is 8.\n</think>\n\n8"}, "So it is 8.", "8"),
    Row("stop, after an echo", COMPLETE, {"content": f"<think>\n{THOUGHT} 8.\nSo it is."}, "So it is.", "",
        False,
        provider="llamacpp"),
    Row("Ollama", COMPLETE, {"content": "The answer is 8."}, EMPTY, "The answer is 8.", provider="ollama",
        further={"system_fingerprint": "fp_ollama"}),
    Row("the details that OpenAI's format has are no sign elsewhere", COMPLETE, {"content": "So the answer"},
        "So the answer", "", False, "length", further=vllm(PARSER)),
)


def streamed(row: Row) -> Reply:
    """The reply of *row* as a stream of small pieces, thoughts first."""
    chunks = [delta(role="assistant", content="")]
    for name, value in sorted(row.message.items(), key=lambda item: item[0] == "content"):
        pieces = [value] if not isinstance(value, str) else [value[at:at + 3] for at in range(0, len(value),
                                                                                              3)] or [""]
        chunks += [delta(**{name: piece}) for piece in pieces]
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    last = {**delta(), "choices": [], "usage": usage, **row.further}
    return events(*chunks, delta(row.finish_reason), last)


class Replies(Case):
    """Each row reads into the same Response: whole, streamed, and from the cache."""

    settings = {"api_key": "k", "max_retries": 0}

    def test_echoes(self) -> None:
        self.read(ECHO)

    def test_mentions_of_tags(self) -> None:
        self.read(MENTIONS)

    def test_lone_closing_tags(self) -> None:
        self.read(LONE)

    def test_fields_and_parts(self) -> None:
        self.read(FIELDS)

    def test_hidden_thoughts(self) -> None:
        self.read(HIDDEN)

    def test_thoughts_that_are_closed_at_once(self) -> None:
        self.read(AT_ONCE)

    def read(self, rows: Tuple[Row, ...]) -> None:
        def reply(request: Request) -> Reply:
            if request.body.get("stream"):
                reply = streamed(row)
            else:
                reply = chat(finish_reason=row.finish_reason, message=row.message, **row.further)
            reply.headers = {**reply.headers, **row.headers}
            return reply

        server = self.serve(reply)
        for number, row in enumerate(rows):
            with self.subTest(row.why, prompt=row.prompt, message=row.message), self.warned():
                found = []
                for cache, stream in ((f"{number}-whole", False), (f"{number}-streamed", True),
                                      (f"{number}-whole", True)):
                    client = self.client(
                        server, provider=row.provider, cache_dir=os.path.join(self.directory, cache),
                        stream=stream)
                    found.append(client.generate(row.prompt, **row.settings)[0])
                    client.close()
                whole, pieces, again = found
                expected = (row.reasoning, row.content, row.completed, row.finish_reason)
                for name, each in (("whole", whole), ("streamed", pieces), ("again", again)):
                    read = (each.reasoning, each.content, each.completed_reasoning, each.finish_reason)
                    if isinstance(row.reasoning, tuple) and each.reasoning in row.reasoning:
                        read = (row.reasoning, *read[1:])
                    self.assertEqual(read, expected, name)
                self.assertEqual((whole.cached, pieces.cached, again.cached), (False, False, True))


if __name__ == "__main__":
    unittest.main()
