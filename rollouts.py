"""Draw many samples of one prompt from a language model's API, and never pay for one twice.

    from rollouts import RolloutsClient

    client = RolloutsClient("qwen/qwen3-30b-a3b", temperature=0.7)
    rollouts = client.generate("What is 6 x 7?\\n<think>\\n6 x 7 is", n_samples=10)
    print(rollouts.counts(lambda response: response.content.strip()))

A client's calls: generate, agenerate (for event loops), generate_many (prompts), resample (from
each prefix of a thought), check_injection (does the model continue a thought?). Config lists the
settings.

The rooms of this file, in order. Each uses only the rooms above it:

    Basics      values read from foreign JSON, and warnings
    Providers   a row for each API: its address, and how it continues a thought
    Settings    every field of Config: its type, default, check and help; the presets
    Errors      what can go wrong
    Data        Usage, Response, Rollouts: frozen, to and from plain dicts
    Reasoning   prompt to messages, reply to reasoning and content
    Sentences   text to sentences
    Requests    settings and messages to the body that is sent, and to the key it is cached under
    Retry       how long to wait before the next attempt, or whether to stop
    Replies     the bytes of a reply to a Response, or to the APIError that says why not
    Transport   bytes out, bytes in, over kept connections and within a deadline
    Pacing      the token bucket, and the hold that a rate limit puts on every request
    Progress    one line on stderr for everything that is under way
    Caches      two stores with the same three methods
    Calls       what one call asked for, what came of it, and what may still be sent
    Client      the only room that knows all the others
    Command     python -m rollouts

To vendor it, copy this file: it needs Python 3.9 or newer and nothing else.

Copyright (c) 2026 the rollouts authors. MIT licence: free to use, copy, change and share, provided
that this notice stays; without warranty of any kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import email.utils
import errno
import functools
import hashlib
import http.client
import inspect
import io
import itertools
import json
import logging
import math
import numbers
import os
import queue
import random
import re
import selectors
import socket
import ssl
import sys
import threading
import time
import urllib.parse
import urllib.request
import warnings
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, TypeVar, Union, overload

if TYPE_CHECKING:
    import asyncio
    import sqlite3

__version__ = "1.1.0"
__all__ = [
    "RolloutsClient", "create_client", "Config", "Rollouts", "Response", "Usage",
    "split_sentences", "RolloutsError", "APIError",
]

Prompt = Union[str, Sequence[Mapping[str, Any]]]

_log = logging.getLogger(__name__)


# == Basics ========================================================================================
#
# Replies hold what they like: these functions make a value of the expected type of anything.


def _dict(value: Any) -> dict[str, Any]:
    """*value*, or an empty dict in place of anything else."""
    return value if isinstance(value, dict) else {}


def _seconds(value: Any, unit: float = 1.0) -> Optional[float]:
    """*value* as a finite number that is not negative, times *unit*; None for anything else."""
    try:
        seconds = float(value) * unit
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def _count(value: Any) -> int:
    """*value*, a number or a str of one, as an int that any database holds; 0 for anything else."""
    if value is None:
        return 0
    number = _seconds(value)
    return int(number) if number is not None and number < 2**63 else 0


def _json_copy(value: Any) -> Any:
    """A deep copy of *value* as JSON sees it. ValueError, TypeError: JSON cannot hold it."""
    return json.loads(json.dumps(value, allow_nan=False))


def _warn(text: str) -> None:
    """Warn at the line that called into this module.

    Python shows a text once a line. A shortfall must be told each time, hence a registry of its
    own.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None and frame.f_globals is globals():
        frame = frame.f_back
    assert frame is not None
    module = frame.f_globals.get("__name__") or "<unknown>"
    warnings.warn_explicit(
        text, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, registry={})


# == Providers =====================================================================================
#
# The table is the place to extend: a new API is one row here and nothing anywhere else.
# *Documented* and *observed* say how a row's way is known; where neither is said, it is the
# documented default.


class _Prefill(NamedTuple):
    """A way of asking a server to continue a trailing assistant message."""

    thought: str = ""  # the field that takes an injected thought; "" leaves it in the content
    message: Mapping[str, Any] = {}  # further fields of that message
    body: Mapping[str, Any] = {}  # further fields of the body


# The setting `prefill` takes these names.
_PREFILLS = {
    "trailing": _Prefill(),
    # Always both: vLLM and llama.cpp refuse the first alone, as the second defaults to true.
    "continue_final_message": _Prefill(
        body={"continue_final_message": True, "add_generation_prompt": False}),
    "prefix": _Prefill("reasoning_content", {"prefix": True}),
    "reasoning_content": _Prefill("reasoning_content"),
    "thinking": _Prefill("thinking", {"prefix": True}),  # a content part, not a field
    "partial": _Prefill(message={"partial": True}),
    "reasoning": _Prefill("reasoning"),
}


class _Provider(NamedTuple):
    """An API's address and dialect."""

    base_url: str
    prefill: Optional[str] = "trailing"  # a name in _PREFILLS; None: it cannot continue a chat
    needs_key: bool = True
    stream_above: Optional[int] = None  # more max_tokens than this are refused unstreamed
    stream_options: bool = True  # takes stream_options, which asks for the usage of a stream
    seed: str = "seed"  # the name of that field
    omits: tuple[tuple[str, str], ...] = ()  # (pattern of models, default field that they refuse)
    echoes: bool = False  # its replies begin with the injected text
    raw_completions: bool = True  # /completions takes a prompt as it is
    keeps_connections: bool = True
    headers: Mapping[str, str] = {}


_PROVIDERS = {
    # Its response cache replays one answer to identical requests, which samples must not be.
    "openrouter": _Provider(
        "https://openrouter.ai/api/v1", headers={"X-OpenRouter-Cache": "false"}),
    # 400 "Requests with max_tokens > 4096 must have stream=true" (observed by many projects).
    "fireworks": _Provider("https://api.fireworks.ai/inference/v1", stream_above=4096),
    "together": _Provider("https://api.together.xyz/v1"),
    # Prefix completion is served below /beta only (documented).
    "deepseek": _Provider("https://api.deepseek.com/beta", prefill="prefix"),
    "novita": _Provider("https://api.novita.ai/openai/v1"),
    "deepinfra": _Provider("https://api.deepinfra.com/v1/openai"),
    "groq": _Provider("https://api.groq.com/openai/v1"),
    "cerebras": _Provider("https://api.cerebras.ai/v1"),
    # `random_seed`, the thinking part and the echo are documented. It sends usage in streams
    # unasked.
    "mistral": _Provider(
        "https://api.mistral.ai/v1", prefill="thinking", seed="random_seed", echoes=True,
        stream_options=False),
    "moonshot": _Provider("https://api.moonshot.ai/v1", prefill="partial"),
    # Token Factory serves vLLM and takes its two flags (its cookbook).
    "nebius": _Provider(
        "https://api.tokenfactory.nebius.com/v1", prefill="continue_final_message"),
    "sambanova": _Provider("https://api.sambanova.ai/v1"),
    "hyperbolic": _Provider("https://api.hyperbolic.xyz/v1"),
    "openai": _Provider("https://api.openai.com/v1", prefill=None),
    # From Claude 4.1 on, temperature and top_p together are refused (observed).
    "anthropic": _Provider(
        "https://api.anthropic.com/v1",
        omits=((r"claude-(?:opus|sonnet|haiku)-(?:4[-.][1-9](?!\d)|[5-9])", "top_p"),)),
    "gemini": _Provider(  # refuses `seed` (observed)
        "https://generativelanguage.googleapis.com/v1beta/openai", prefill=None,
        omits=(("", "seed"),)),
    "vllm": _Provider(
        "http://localhost:8000/v1", prefill="continue_final_message", needs_key=False),
    # Without the flag it turns the trailing message into one of the user (serving_chat.py, 0.5.23).
    "sglang": _Provider(
        "http://localhost:30000/v1", prefill="continue_final_message", needs_key=False),
    # Observed with build 11434: a thought in `content` comes after an empty, closed one; replies
    # repeat what was injected; each kept connection binds a thread of its small pool for 5 s.
    "llamacpp": _Provider(
        "http://localhost:8080/v1", prefill="reasoning_content", needs_key=False, echoes=True,
        keeps_connections=False),
    # Its /completions applies the chat template and drops the thought (observed with 0.33).
    "ollama": _Provider("http://localhost:11434/v1", needs_key=False, raw_completions=False),
    # Always begins a new turn, and labels it as reasoning (observed with 0.32).
    "mlx": _Provider("http://localhost:8080/v1", prefill=None, needs_key=False),
    "lmstudio": _Provider("http://localhost:1234/v1", needs_key=False),
}

# Models that start afresh in a chat whatever the API: (pattern of their ids, why).
_CANNOT_CONTINUE = (
    (r"gpt-oss", "gpt-oss thinks in the Harmony format, which chat completions cannot continue"),
    (r"(^|/)~?gemini", "Gemini's thoughts are hidden, and it does not continue an injected one"),
    (r"^~?openai/", "OpenAI's models answer an assistant message, they do not continue it"),
)

# What a server's replies say of it, all observed: (pattern of system_fingerprint, provider).
_FINGERPRINTS = (
    (r"vllm-", "vllm"),
    (r"b\d+-\w+$", "llamacpp"),
    (r"fp_ollama", "ollama"),
    (r"\d+\.\d[\w.]*-\d+\.\d[\w.]*-\w", "mlx"),
)


def _recognised(headers: Mapping[str, str], fingerprint: Any) -> Optional[str]:
    """The provider whose server sent such a reply, or None. LiteLLM passes headers on, renamed."""
    if "llama.cpp" in (headers.get("server"), headers.get("llm_provider-server")):
        return "llamacpp"
    found = (name for pattern, name in _FINGERPRINTS if re.match(pattern, str(fingerprint)))
    return next(found, None)


# == Settings ======================================================================================
#
# One line of Config is one setting: its type and its default, and in its metadata the check, the
# help and whether it goes into the body. Validation, body, command line and help() read that
# table.


class _Key(str):
    """An API key: shown by no repr, and None in every pickle."""

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> _Key:
        return self


class _Refused(ValueError):
    """A keyword that is not taken. The message says all, and shows no value, which may be a key."""


class _Check(NamedTuple):
    """What a setting takes, in words, and the function that converts a value to it, or fails."""

    words: str
    convert: Callable[[Any], Any]
    is_secret: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        try:
            return self.convert(value)
        except _Refused as error:
            raise ValueError(str(error)) from None
        except (ValueError, TypeError, AttributeError) as error:
            is_url = name.lower().endswith("base_url") and re.search(r"[?#@]", str(value))
            is_secret = self.is_secret or is_url  # a key may stand in such an address
            shown = "the value given, which is not shown" if is_secret else f"{value!r:.200}"
            why = f" ({error})" if str(error) and not self.is_secret else ""
            raise ValueError(f"{name} takes {self.words}, not {shown}{why}") from None


def _require(condition: object, why: str = "") -> None:
    if not condition:
        raise ValueError(why)


def _number(low: float, high: float, *, above: bool = False) -> _Check:
    def convert(value: Any) -> float:
        _require(isinstance(value, numbers.Real) and not isinstance(value, bool))  # numpy's too
        _require(low <= value <= high and not (above and value == low))  # NaN fails here
        return float(value)

    start = f"above {low:g} and up" if above else f"from {low:g}"
    return _Check(f"a number {start} to {high:g}", convert)


def _integer(low: int, high: int = 2**63 - 1) -> _Check:
    def convert(value: Any) -> int:
        _require(isinstance(value, numbers.Integral) and not isinstance(value, bool))
        _require(low <= value <= high)
        return int(value)

    end = f"to {high}" if high < 2**62 else "up"
    return _Check(f"an integer from {low} {end}", convert)


def _choice(*options: Any) -> _Check:
    def convert(value: Any) -> Any:
        same = [option for option in options if type(option) is type(value) and option == value]
        _require(same)  # 1 is not True
        return value

    return _Check("one of " + ", ".join(map(repr, options)), convert)


def _optional(check: _Check) -> _Check:
    def convert(value: Any) -> Any:
        return None if value is None else check.convert(value)

    return check._replace(words=f"{check.words}, or None", convert=convert)


def _convert_model(value: str) -> str:
    _require(isinstance(value, str) and value.strip() and value.isprintable())
    return value.strip()


def _convert_key(value: str) -> Optional[_Key]:
    _require(isinstance(value, str))
    key = value.strip()
    _require(all("!" <= character <= "~" for character in key))
    return _Key(key) if key else None


def _convert_provider(value: Any) -> Union[str, dict[str, Any]]:
    if isinstance(value, Mapping):
        return dict(_json_copy(dict(value)))
    _require(
        isinstance(value, str) and value.lower() in _PROVIDERS, "known: " + ", ".join(_PROVIDERS))
    return str(value.lower())


def _convert_base_url(value: str) -> str:
    url = value.strip()
    parts = urllib.parse.urlsplit(url)
    _require(parts.scheme in ("http", "https") and parts.hostname)
    _require(url.isprintable() and " " not in url and value.isascii())
    has_more = parts.query or parts.fragment or "@" in parts.netloc
    _require(not has_more, "no key, query or fragment in it")
    _require(parts.port != 0 and str(parts.hostname).encode("idna"))
    return url.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")


def _convert_path(value: Any) -> str:
    path = os.path.expanduser(os.fspath(value))
    _require(isinstance(path, str) and path and "\0" not in path)
    # A directory that is really named "~" is a trap for whoever clears it.
    _require(not str(path).startswith("~"), "whose home directory is that? HOME is not set")
    return str(path)


def _convert_extra(value: Mapping[str, Any]) -> dict[str, Any]:
    key_names = r"keys?|.*api_?keys?|((api|access|auth)_?)?token|authorization|(.*_)?headers"
    for name, given in value.items():
        _require(isinstance(name, str))
        if re.fullmatch(key_names, name, re.I):
            raise _Refused(f"{name} is not taken: pass a key as api_key; headers cannot be set")
        if name in ("logprobs", "top_logprobs") and given not in (None, False):
            raise NotImplementedError(
                f"{name} is not supported: through OpenRouter, providers answer it inconsistently "
                "or not at all. Ask a provider's own API for log probabilities.")
        if name == "n" and given not in (None, 1):
            raise _Refused("n is not taken: pass n_samples, as a request draws one sample")
        if name in ("messages", "prompt"):
            raise _Refused(f"{name} is not taken: pass it as generate's first argument")
    return dict(_json_copy(dict(value)))


# Fields of the body that APIs document, so that none of them is taken for a misspelling.
_BODY_FIELDS = frozenset(" ".join((
    # OpenAI.
    """audio logit_bias max_completion_tokens metadata modalities parallel_tool_calls prediction
    prompt_cache_key reasoning_effort response_format safety_identifier service_tier stop store
    stream_options tool_choice tools user verbosity web_search_options""",
    # OpenRouter.
    """cache_control debug include_reasoning min_p models plugins reasoning repetition_penalty
    route session_id top_a transforms usage""",
    # Fireworks, Together, Groq, Cerebras, Novita, SambaNova, DeepSeek, Mistral.
    """clear_thinking compound_custom context_length_exceeded_behavior disable_reasoning do_sample
    echo enable_thinking ignore_eos mirostat_lr mirostat_target prompt_truncate_len random_seed
    raw_output reasoning_format reasoning_history reasoning_split return_token_ids safe_prompt
    safety_model separate_reasoning thinking thinking_budget top_n typical_p""",
    # vLLM, SGLang.
    """add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt
    chat_template chat_template_kwargs continue_final_message custom_logit_processor
    custom_params documents ebnf guided_choice guided_grammar guided_json guided_regex
    include_stop_str_in_output length_penalty logits_processors lora_path min_tokens
    mm_processor_kwargs no_stop_trim priority prompt_logprobs regex return_hidden_states
    return_prompt_text skip_special_tokens spaces_between_special_tokens stop_regex
    stop_token_ids structured_outputs structural_tag thinking_token_budget
    truncate_prompt_tokens use_beam_search""",
    # llama-server, Ollama, LM Studio, mlx-lm.
    """cache_prompt dry_allowed_length dry_base dry_multiplier dry_penalty_last_n
    dry_sequence_breakers dynatemp_exponent dynatemp_range grammar grammar_lazy id_slot
    json_schema keep_alive min_keep mirostat mirostat_eta mirostat_tau n_keep n_predict n_probs
    options post_sampling_probs repeat_last_n repeat_penalty repetition_context_size
    return_tokens samplers think timings_per_token top_n_sigma ttl xtc_probability xtc_threshold""",
)).split())
# What people call settings and arguments of ours, and what stands elsewhere.
_OTHER_NAMES = {
    "allow_fallbacks": "provider={'allow_fallbacks': …}", "api_base": "base_url",
    "at": "resample(at=…)",
    "cache": "use_cache", "cache_path": "cache_dir", "chunks": "resample's second argument",
    "concurrency": "max_concurrency", "dry_run": "offline=True", "extra_body": "extra",
    "ignore": "provider={'ignore': …}", "indices": "resample(at=…)", "k": "n_samples",
    "key": "api_key", "max_length": "max_tokens", "max_new_tokens": "max_tokens",
    "max_workers": "max_concurrency", "model_name": "model",
    "n_samples": "generate(prompt, n_samples)",
    "num_responses": "n_samples", "num_return_sequences": "n_samples", "num_retries": "max_retries",
    "num_samples": "n_samples", "num_workers": "max_concurrency", "only": "provider={'only': …}",
    "order": "provider={'order': …}", "parts": "resample's second argument",
    "positions": "resample(at=…)", "prefix": "a <think> in the prompt, or prefill",
    "preset": "create_client(preset=…)", "quantizations": "provider={'quantizations': …}",
    "rate_limit": "requests_per_minute", "request_timeout": "timeout", "retries": "max_retries",
    "rpm": "requests_per_minute", "samples": "n_samples", "sentences": "resample's second argument",
    "show_progress": "progress_bar", "sort": "provider={'sort': …}", "stop_sequences": "stop",
    "suffix": "resample(suffix=…)", "system": "a message of that role",
    "system_prompt": "a message of the role 'system'", "temp": "temperature",
    "tqdm": "progress_bar",
    "url": "base_url", "workers": "max_concurrency",
}


def _warn_of_unknown(name: str, settings: Iterable[str]) -> None:
    """Warn of a keyword that is neither a setting nor a body field that some API documents."""
    if name in _BODY_FIELDS:
        return
    known = [*settings, *_BODY_FIELDS, *_OTHER_NAMES]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    meant = _OTHER_NAMES.get(name) or next((_OTHER_NAMES.get(each, each) for each in close), "")
    question = f": did you mean {meant}?" if meant else "; if that is meant, pass it in extra={…}"
    _warn(
        f"{name} is neither a setting nor a body field that an API documents; it goes into the "
        f"request as it is{question}")


def _setting(default: Any, check: _Check, help: str, *, body: bool = False) -> Any:
    """A field of Config. *help* is shown to users; *body* says that it goes into the request."""
    metadata = {"check": check, "help": help, "body": body}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_FLAG = _choice(True, False)
_MODEL = _Check("a model's id such as 'qwen/qwen3-30b-a3b'", _convert_model)
_PROVIDER = _Check("the name of an API, or OpenRouter's routing object (a dict)", _convert_provider)
_BASE_URL = _optional(_Check("an address such as 'http://localhost:8080/v1'", _convert_base_url))
_API_KEY = _optional(_Check("a key of printable ASCII without blanks", _convert_key, True))
_PATH = _Check("a directory's path", _convert_path)
_EXTRA = _Check("a dict of further body fields that JSON can hold", _convert_extra)


@dataclass(frozen=True)
class Config:
    """Every setting of a client, checked: ``RolloutsClient(**config.to_dict())``.

    A field that the API reads is left out of the request where it is None, so that the API's own
    default holds. ValueError names the field, the value it got and what it takes.
    """

    model: str = _setting(dataclasses.MISSING, _MODEL, "the model, as its API names it")
    temperature: Optional[float] = _setting(
        0.7, _optional(_number(0, 2)), "sampling temperature", body=True)
    top_p: Optional[float] = _setting(
        0.95, _optional(_number(0, 1)), "nucleus sampling: the mass kept", body=True)
    max_tokens: Optional[int] = _setting(
        4096, _optional(_integer(1)), "most tokens of one sample; thoughts count", body=True)
    top_k: Optional[int] = _setting(
        None, _optional(_integer(-1)), "sample among the k likeliest (-1: off, on vLLM)", body=True)
    presence_penalty: Optional[float] = _setting(
        None, _optional(_number(-2, 2)), "penalty for a token that occurred", body=True)
    frequency_penalty: Optional[float] = _setting(
        None, _optional(_number(-2, 2)), "penalty by how often a token occurred", body=True)
    seed: Optional[int] = _setting(
        0, _optional(_integer(0)), "seed of the first sample; the next ones count up; None: none")
    provider: Union[str, dict[str, Any], None] = _setting(
        None, _optional(_PROVIDER), "the API to call (default openrouter), or OpenRouter's routing")
    base_url: Optional[str] = _setting(
        None, _BASE_URL, "any compatible server; default <PROVIDER>_BASE_URL, else the provider's")
    endpoint: str = _setting(
        "chat", _choice("chat", "completions"), "'completions' sends a str prompt as it is")
    api_key: Optional[str] = _setting(
        None, _API_KEY, "default <PROVIDER>_API_KEY from the environment")
    use_cache: Union[bool, str] = _setting(
        True, _choice(True, False, "json", "sql"), "True or 'json': a file a sample; 'sql': SQLite")
    cache_dir: str = _setting(".rollouts", _PATH, "where the cache is")
    offline: bool = _setting(
        False, _FLAG, "send nothing: what is not in the cache is an error that says so")
    progress_bar: bool = _setting(
        True, _FLAG, "show progress on stderr for more than one sample")
    verbose: bool = _setting(False, _FLAG, "say on stderr what each sample did")
    requests_per_minute: Optional[float] = _setting(
        None, _optional(_number(0, 1e6, above=True)), "most requests started in any minute")
    max_concurrency: int = _setting(100, _integer(1, 10_000), "most requests under way at once")
    max_retries: int = _setting(10, _integer(0, 1000), "attempts after the first")
    timeout: float = _setting(
        600.0, _number(0, 86_400, above=True), "seconds for one attempt, by the clock")
    stream: Optional[bool] = _setting(
        None, _optional(_FLAG), "ask for a streamed reply; None: as the provider needs it")
    prefill: Optional[str] = _setting(
        None, _optional(_choice(*_PREFILLS)), "how an injection is sent; None: the provider's way")
    extra: dict[str, Any] = _setting(
        dict, _EXTRA, "further fields of the body; further keywords of a client land here")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = setting.metadata["check"](setting.name, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)  # as converted; the class is frozen
        for name in self.extra:
            if hasattr(Config, name) or name in ("model", "extra"):
                raise ValueError(f"extra takes fields of the body; {name} is a setting of its own")

    def to_dict(self) -> dict[str, Any]:
        """The settings by their names, the key among them."""
        return {setting.name: getattr(self, setting.name) for setting in dataclasses.fields(self)}


_SETTINGS = {setting.name: setting for setting in dataclasses.fields(Config)}

if Config.__doc__:  # absent under python -OO
    Config.__doc__ = "\n".join([inspect.cleandoc(Config.__doc__), "", *(
        f"{name}: {setting.metadata['help']}. Takes {setting.metadata['check'].words}"
        + ("." if setting.default is dataclasses.MISSING else f"; default {setting.default!r}.")
        for name, setting in _SETTINGS.items())])


def _with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """*config* with *settings* in place; what is no setting goes into ``extra``."""
    known = {name: value for name, value in settings.items() if name in _SETTINGS}
    further = {name: value for name, value in settings.items() if name not in _SETTINGS}
    own = _EXTRA("extra", known.get("extra", {}))
    changed = dataclasses.replace(config, **{**known, "extra": {**config.extra, **own, **further}})
    for name in further:
        _warn_of_unknown(name, _SETTINGS)
    return changed


_PRESETS = {"deterministic": 0.0, "focused": 0.3, "balanced": 0.7, "creative": 1.2}  # temperatures


# == Errors ========================================================================================
#
# An APIError carries its own policy: `retryable` says whether the same request may yet succeed.


class RolloutsError(Exception):
    """The base of this library's errors. A bad argument is a ValueError instead."""


class APIError(RolloutsError):
    """A request that got no usable reply.

    Attributes:
        message: the API's own words, or what happened on the way to it.
        status: the HTTP status (int), or None where no reply came. An error inside a reply of
            status 200 counts as the status that it names, 502 where it names none.
        provider: the API that was called.
        seed: the sample's seed, or None.
        retryable: whether the same request may succeed later.
        retry_after: seconds that the API asked to wait, or None.
        advice: what to do about it.
    """

    def __init__(
        self, message: str, *, status: Optional[int] = None, provider: str = "",
        seed: Optional[int] = None, retryable: bool = False, retry_after: Optional[float] = None,
        advice: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.provider = provider
        self.seed = seed
        self.retryable = retryable
        self.retry_after = retry_after
        self.advice = advice

    def __str__(self) -> str:
        status = f"HTTP {self.status}" if self.status is not None else ""
        head = " ".join(filter(None, (self.provider, status)))
        advice = f" -> {self.advice}" if self.advice else ""
        return ": ".join(filter(None, (head, self.message))) + advice

    def __repr__(self) -> str:
        details = "".join(
            f", {name}={value!r}" for name, value in self.to_dict().items()
            if name != "message" and value not in (None, "") and value is not False)
        return f"{type(self).__name__}({self.message!r}{details})"

    def to_dict(self) -> dict[str, Any]:
        """The attributes by their names."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> APIError:
        """The error that to_dict() described."""
        return cls(**data)

    def _with_seed(self, seed: int) -> APIError:
        error = APIError.from_dict({**self.to_dict(), "seed": seed})
        error.__cause__ = self.__cause__
        return error


class _TooLong(http.client.HTTPException):
    """A reply above _LONGEST_REPLY."""


class _GivenUp(Exception):
    """Nobody waits any more for the reply that is under way."""


class _SocksProxy(OSError):
    """The environment names a proxy that speaks another protocol than HTTP."""


_SCARCE = (errno.EMFILE, errno.ENFILE, errno.EBUSY)  # EBUSY: a database that another process locks


def _is_scarcity(error: BaseException) -> bool:
    """Whether *error* tells of a passing lack of file descriptors, or of a database's lock."""
    return isinstance(error, OSError) and error.errno in _SCARCE


# == Data ==========================================================================================
#
# What a call returns. No I/O here, and nothing that is stored twice.

_Data = TypeVar("_Data")


@functools.cache
def _types_of(cls: Any) -> dict[str, tuple[type, ...]]:
    """What each field of *cls* holds: its default's type; for a None, a str or None."""
    types: dict[str, tuple[type, ...]] = {}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            types[field.name] = (str,)
        elif field.default is None:
            types[field.name] = (str, type(None))
        else:
            types[field.name] = (int, float) if field.name == "cost" else (type(field.default),)
    return types


def _from_dict(cls: type[_Data], data: Any) -> _Data:
    """*cls* from a dict whose values are of the fields' types; unknown names are passed over."""
    values = {}
    try:
        if not isinstance(data, Mapping):
            raise TypeError(f"it is of type {type(data).__name__}")
        for name, types in _types_of(cls).items():  # type: ignore[arg-type]  # a class is hashable
            if name in data:
                if type(data[name]) not in types:
                    raise TypeError(f"{name} is of type {type(data[name]).__name__}")
                values[name] = data[name]
        return cls(**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a {cls.__name__}: {error}") from None


def _to_dict(data: Any) -> dict[str, Any]:
    """The fields of a dataclass by their names; values stay as they are."""
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}


@dataclass(frozen=True)
class Usage:
    """What one response, or several, consumed. Zero where the API does not tell.

    prompt_tokens, completion_tokens, total_tokens: as the API counts; thoughts are completion.
    reasoning_tokens: the part of completion_tokens that was thought.
    cached_tokens: the part of prompt_tokens that the API read from its own prompt cache.
    cost: US dollars (OpenRouter tells; most other APIs do not).
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        if not isinstance(other, Usage):
            return NotImplemented
        return Usage(*map(sum, zip(_to_dict(self).values(), _to_dict(other).values())))

    def __radd__(self, other: int) -> Usage:
        return self if other == 0 else NotImplemented  # where sum() begins

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Usage:
        """The Usage that to_dict() described; ValueError for anything else."""
        return _from_dict(cls, data)


@dataclass(frozen=True)
class Response:
    """One sample: after an injected thought, the continuation alone.

    content: the answer; '' where there is none yet. Always a str.
    reasoning: the thought, or None where the model showed none.
    completed_reasoning: False while a thought is still open (it was cut off, or never closed).
    finish_reason: 'stop', 'length', 'content_filter', … as the API says it, or None.
    seed: the number of this sample, and the seed of its request.  usage: what it consumed.
    model, provider: who really answered, as far as the API tells.
    response_id, created (Unix seconds): the API's.
    cached: True where this call sent no request for it: it was in the cache, or another call under
        way was asking for the very same. Two responses that differ only in this are equal.
    """

    content: str
    reasoning: Optional[str] = None
    completed_reasoning: bool = True
    finish_reason: Optional[str] = None
    seed: int = 0
    usage: Usage = Usage()
    model: str = ""
    provider: str = ""
    response_id: str = ""
    created: int = 0
    cached: bool = dataclasses.field(default=False, compare=False)

    @property
    def full(self) -> str:
        """``reasoning</think>content``; an open thought alone; the content if there is none."""
        if self.reasoning is None:
            return self.content
        answer = f"</think>{self.content}" if self.completed_reasoning else ""
        return self.reasoning + answer

    @property
    def _is_cut_off(self) -> bool:
        return self.finish_reason == "length" and not self.completed_reasoning

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names, `usage` as a dict, and ``full``."""
        return {**_to_dict(self), "usage": self.usage.to_dict(), "full": self.full}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Response:
        """The Response that to_dict() described; ValueError for anything else."""
        return _from_dict(
            cls, {**_dict(data), "usage": Usage.from_dict(_dict(data).get("usage", {}))})


@dataclass(frozen=True)
class Rollouts:
    """The samples of one prompt, in the order of their seeds: iterate, index, slice.

    prompt, model, temperature, top_p, max_tokens: what was asked.
    num_responses: how many were asked for: always len(responses) + len(errors).
    responses: those that arrived.  errors: an APIError for each that did not, with its seed.
    cache_dir: where they are kept, or None.
    at, prefix: from resample(), how many parts of the reasoning the prompt keeps, and their text.
    """

    prompt: Any
    responses: list[Response]
    errors: list[APIError]
    num_responses: int
    model: str
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    max_tokens: Optional[int] = None
    cache_dir: Optional[str] = None
    at: Optional[int] = None
    prefix: Optional[str] = None

    def __len__(self) -> int:
        return len(self.responses)

    def __iter__(self) -> Iterator[Response]:
        return iter(self.responses)

    @overload
    def __getitem__(self, index: int) -> Response: ...
    @overload
    def __getitem__(self, index: slice) -> list[Response]: ...
    def __getitem__(self, index: Union[int, slice]) -> Union[Response, list[Response]]:
        return self.responses[index]

    def __repr__(self) -> str:
        at = "" if self.at is None else f"at {self.at}: "
        cut_off = sum(response.finish_reason == "length" for response in self.responses)
        notes = f", {cut_off} cut off at max_tokens" if cut_off else ""
        notes += f", {len(self.errors)} errors" if self.errors else ""
        count = f"{len(self)} of {self.num_responses} responses"
        return f"<Rollouts: {at}{count} from {self.model}{notes}>"

    def get_texts(self) -> list[str]:
        """Each response's ``full``."""
        return [response.full for response in self.responses]

    def get_reasonings(self) -> list[Optional[str]]:
        """Each response's ``reasoning``."""
        return [response.reasoning for response in self.responses]

    def get_contents(self) -> list[str]:
        """Each response's ``content``."""
        return [response.content for response in self.responses]

    def get_total_tokens(self) -> int:
        """Tokens of all the responses, prompts included."""
        return self.usage.total_tokens

    def get_finish_reasons(self) -> dict[Optional[str], int]:
        """How many responses ended for which reason."""
        return dict(Counter(response.finish_reason for response in self.responses))

    def counts(self, extract: Callable[[Response], Hashable]) -> Counter[Any]:
        """How often each answer came: *extract* makes one of a response; None counts too."""
        return Counter(map(extract, self.responses))

    @property
    def usage(self) -> Usage:
        """What all the responses consumed, when they were drawn."""
        return sum((response.usage for response in self.responses), Usage())

    @property
    def spent(self) -> Usage:
        """What this call consumed: the responses that were not replayed from the cache."""
        return sum((each.usage for each in self.responses if not each.cached), Usage())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and values, for JSON."""
        return {
            **_to_dict(self),
            "responses": [response.to_dict() for response in self.responses],
            "errors": [error.to_dict() for error in self.errors],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rollouts:
        """The Rollouts that to_dict() described; ValueError for anything else."""
        try:
            return cls(**{
                **data,
                "responses": [Response.from_dict(response) for response in data["responses"]],
                "errors": [APIError.from_dict(error) for error in data["errors"]],
            })
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a {cls.__name__}: {error}") from None


# == Reasoning =====================================================================================
#
# Pure functions on text. Of what the user wrote nothing is changed, not a space. Of what came
# back, white space beside a tag that the model wrote is the tag's layout and is dropped, whether
# the server split the reply or not. Elsewhere it is kept: a continuation may well begin with a
# space.

# Shorter texts than this (characters) a model may repeat by chance ("Wait."). They count as an echo
# only where the server is known to repeat what was injected, or where the tag is repeated too.
_SURE_ECHO = 40

# A </think> within quotes or backticks is mentioned, not meant.
_CLOSING = re.compile(r"(?<!`)</think>(?![`'\"])")
# One without a <think> before it closes a thought that the template opened; it has the beginning or
# the end of a line to itself ("The tag </think> closes a thought." has not).
_LONE_CLOSING = re.compile(r"(?:\A|\n)[ \t]*</think>|</think>[ \t]*(?=\n|\Z)")
_LEADING_BLOCK = re.compile(r"\s*(?:<think>(.*?)(?:</think>|\Z)|</think>)\s*", re.DOTALL)


class _Injection(NamedTuple):
    """The text that the model is to continue, as the user wrote it; '' where there is none."""

    text: str = ""
    thought: Optional[str] = None  # what stands within its tags; None where it has none
    answer: str = ""  # what follows </think>, or all of it where it has no tags
    is_open: bool = False  # it ends within the thought

    @classmethod
    def parse(cls, text: str) -> _Injection:
        if text.rfind("<think>") > text.rfind("</think>"):
            return cls(text, text.rpartition("<think>")[2], "", True)
        head, tag, answer = text.rpartition("</think>")
        inside = head.partition("<think>")[2] if "<think>" in head else head
        return cls(text, inside if tag else None, answer)

    @property
    def is_one_thought(self) -> bool:
        """Whether thought and answer say all: one <think>, at the beginning."""
        return self.text.lstrip().startswith("<think>") and self.text.count("<think>") == 1


class _Expected(NamedTuple):
    """What is known of a reply besides its message."""

    injection: _Injection
    echoes: bool = False  # the server repeats what was injected
    is_hidden: bool = False  # the request asked not to be shown the thought
    has_parser: Optional[bool] = None  # whether the server splits replies itself, where it tells
    may_be_answer: bool = False  # the model stopped by itself


def _text_of(content: Any, name: str = "text") -> str:
    """The text of *content*: a str, nothing, or a list of parts with their text under *name*."""
    if isinstance(content, list):
        return "".join(
            _text_of(part.get(name)) if isinstance(part, dict) else part
            for part in content
            if isinstance(part, dict) or (isinstance(part, str) and name == "text"))
    return content if isinstance(content, str) else ""


def _text_of_thought(part: Mapping[str, Any]) -> str:
    texts = (_text_of(part.get(name)) for name in ("thinking", "text", "summary"))
    return next((text for text in texts if text.strip()), "")


def _fields_of(message: Mapping[str, Any]) -> tuple[Optional[str], str]:
    """A message's (thought, content). None: no field that holds a thought, not even an empty one.

    The names of that field differ, and thoughts also come as parts of the content.
    """
    parts, details = message.get("content"), message.get("reasoning_details")
    candidates = [message.get("reasoning_content"), message.get("reasoning")]
    if isinstance(parts, list):
        kinds = [part.get("type") if isinstance(part, dict) else "text" for part in parts]
        thoughts = [part for part, kind in zip(parts, kinds) if kind in ("thinking", "reasoning")]
        parts = [part for part, kind in zip(parts, kinds) if kind not in ("thinking", "reasoning")]
        if thoughts:
            candidates.append("".join(map(_text_of_thought, thoughts)))
    candidates += [_text_of(details, name) for name in ("text", "summary") if details]
    texts = [each for each in candidates if isinstance(each, str)]
    thought = next((text for text in texts if text.strip()), texts[0] if texts else None)
    return thought, _text_of(parts) or _text_of(message.get("refusal"))


def _messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages of *prompt*: a str is a question, and from its first <think> on an injection."""
    is_list = isinstance(prompt, Sequence) and all(
        isinstance(each, Mapping) and "role" in each for each in prompt)
    if not prompt or not (is_list or isinstance(prompt, str)):
        raise ValueError(
            "prompt takes a str that is not empty, or a list of messages such as "
            "[{'role': 'user', 'content': 'Hello'}] (several prompts go to generate_many), "
            f"not {prompt!r:.200}")
    if not isinstance(prompt, str):
        return [dict(message) for message in prompt]
    question, tag, thought = prompt.partition("<think>")
    if not tag:
        return [{"role": "user", "content": prompt}]
    if "<think>" in thought:
        _warn(
            "the prompt has several <think> tags: the injection begins at the first. Pass a list "
            "of messages to say where it begins.")
    asked = [{"role": "user", "content": question.rstrip()}] if question.strip() else []
    return [*asked, {"role": "assistant", "content": tag + thought}]


def _injection_of(messages: Sequence[Mapping[str, Any]]) -> Optional[_Injection]:
    """What a trailing assistant message asks the model to continue; None where the user is last."""
    if messages[-1]["role"] != "assistant":
        return None
    thought, content = _fields_of(messages[-1])
    if not thought:
        return _Injection.parse(content)
    return _Injection.parse(f"<think>{thought}" + (f"</think>{content}" if content else ""))


def _with_prefill(message: dict[str, Any], injection: _Injection, way: _Prefill) -> dict[str, Any]:
    """The trailing *message* in the form in which a server continues it.

    In a field of its own a thought stands without the white space beside its tags, which the chat
    template puts there. Observed with llama.cpp: where field and content are both empty no turn is
    rendered at all, so that an empty open thought needs its line break.
    """
    message = {**way.message, **message}
    parts = message.get("content")
    if isinstance(parts, list) and all(_dict(part).get("type") == "text" for part in parts):
        message["content"] = _text_of(parts)  # llama.cpp joins them with two line breaks (observed)
    is_in_content = message.get("content") == injection.text  # not in a field of the user's own
    is_split = injection.thought is not None and injection.is_one_thought
    if not (way.thought and is_in_content and is_split):
        return message
    assert injection.thought is not None
    thought, answer = injection.thought.removeprefix("\n"), injection.answer.lstrip("\n")
    if not injection.is_open:
        thought = thought.removesuffix("\n")
    if way.thought != "thinking":
        if not answer and not injection.is_open and not way.message:
            # llama.cpp closes the thought only before a content, which this is (observed).
            return {**message, "content": [{"type": "text", "text": ""}], way.thought: thought}
        thought = thought or ("\n" if injection.is_open else "")
        return {**message, "content": answer, way.thought: thought}
    part = {
        "type": "thinking", "thinking": [{"type": "text", "text": thought}],
        "closed": not injection.is_open}
    answers = [{"type": "text", "text": answer}] if answer else []
    return {**message, "content": [part, *answers]}


def _after_echo(text: str, echo: str, is_sure: bool) -> Optional[str]:
    """What follows *echo* at the beginning of *text*; None where *text* does not repeat it.

    The white space beside tags is free, as templates and gateways put their own there. An empty
    thought may stand in front: some templates close one before what was injected.
    """
    if not echo.strip() or not (is_sure or len(echo) >= _SURE_ECHO):
        return None
    body = echo.strip()
    pieces = re.split(r"\s*(</?think>)\s*", body)
    pattern = "".join(
        rf"\s*{piece}\s*" if number % 2 else re.escape(piece)
        for number, piece in enumerate(pieces))
    end = re.escape(echo[len(echo.rstrip()):])
    match = re.match(rf"\s*(?:<think>\s*</think>\s*)?{pattern}(?:{end})?", text)
    return text[match.end():] if match else None


def _without_echo(
    thought: Optional[str], content: str, injection: _Injection, echoes: bool
) -> tuple[Optional[str], str, bool]:
    """(thought, content, whether content had the echo), without the injected text."""
    rest = _after_echo(content, injection.text, echoes or "<think>" in injection.text)
    if rest is not None:
        return thought, rest, True
    inside = injection.thought or ""
    if injection.is_open:
        rest = _after_echo(thought or "", inside, echoes)
        if echoes and thought and not inside.strip():
            rest = thought.removeprefix("\n")  # the line break that opened an empty thought
        if rest is not None:
            return rest, content, False
        rest = _after_echo(content, inside, echoes)
    elif injection.thought is not None:
        is_sure = echoes or len(inside) >= _SURE_ECHO
        is_split = is_sure and (thought or "").strip() == inside.strip()
        rest = _after_echo(content, injection.answer, echoes or is_split)
        if is_split:
            return None, content if rest is None else rest, True
    return thought, content if rest is None else rest, rest is not None


def _end_of_thought(text: str, pattern: re.Pattern[str], in_code: bool) -> Optional[re.Match[str]]:
    """The first match of *pattern* outside blocks of code; else, with *in_code*, the first of all.

    A thought may leave its block of code open.
    """
    matches = list(pattern.finditer(text))
    outside = (match for match in matches if text.count("```", 0, match.start()) % 2 == 0)
    return next(outside, matches[0] if matches and in_code else None)


def _split_at_tags(text: str, is_open: bool) -> Optional[tuple[str, str, bool]]:
    """*text* as (thought, answer, whether the thought is closed); None where no tag counts.

    A block counts at the beginning, or after a preamble that ends in a line break. *is_open*: the
    thought was open before.
    """
    preamble, tag, inside = text.partition("<think>")
    is_apart = bool(re.search(r"\n[ \t]*\Z", preamble)) and preamble.count("```") % 2 == 0
    if tag and (not preamble.strip() or (is_apart and not is_open)):
        match = _end_of_thought(inside, _CLOSING, True)
        if match is None:
            return inside.lstrip(), preamble.strip(), False
        answer = inside[match.end():]
        return inside[:match.start()].lstrip(), preamble.lstrip() + answer.lstrip(), True
    match = _end_of_thought(text, _CLOSING if is_open else _LONE_CLOSING, is_open)
    if match is None or (not is_open and match.start() > len(preamble)):
        return None
    return text[:match.start()], text[match.end():].lstrip(), True


def _is_answer(content: str, has_field: bool, has_echo: bool, expected: _Expected) -> bool:
    """Whether *content* without tags, after an open thought, is the answer.

    A server with a parser takes the tag of a thought away that the model closes at once. Observed:
    a reasoning field that is a str, even an empty one, or vLLM's usage tell of a parser. Elsewhere
    a model that stopped by itself has rather lost its tag than ended within its thought. A text
    that begins with a space goes on with the injected words.
    """
    if has_echo or not (content.strip() or expected.may_be_answer):
        return False  # it goes on with the text that it repeats, or ended before anything came
    if expected.has_parser is not None:
        return has_field or expected.has_parser
    if has_field or expected.is_hidden:
        return True
    return expected.may_be_answer and not content.startswith((" ", "\t"))


def _read_field(thought: str, content: str) -> tuple[str, str, bool]:
    """(thought, content, whether a tag closed the thought), for a thought in its own field.

    Of the content nothing but a leading block or tag is cut: llama.cpp's "deepseek-legacy" gives
    the thought twice, in its field and in the content.
    """
    is_closed = False
    if not content.strip():
        match = _CLOSING.search(thought)
        if match is not None:  # a parser that missed the tag
            thought, content, is_closed = thought[:match.start()], thought[match.end():], True
    match = _LEADING_BLOCK.match(content)
    if match is not None:
        block, content = match[1] or "", content[match.end():]
        is_closed = match[0].rstrip().endswith("</think>")
        if block.strip() not in thought:
            thought += block
    if thought.lstrip().startswith("<think>"):  # it began afresh
        thought = thought.lstrip()[len("<think>"):].lstrip()
    return thought, content, is_closed


def _read_message(
    message: Mapping[str, Any], expected: _Expected
) -> tuple[Optional[str], str, bool]:
    """A reply's (reasoning, content, completed_reasoning), whatever the server made of it."""
    injection = expected.injection
    field, content = _fields_of(message)
    field, content, has_echo = _without_echo(field, content, injection, expected.echoes)
    if injection.thought is not None and not injection.is_open:
        answer = [text for text in (field or "", content) if text.strip()] or [content]
        return None, "".join(answer), True  # also where a parser took it for a thought
    if field and field.strip():
        thought, content, is_closed = _read_field(field, content)
        is_closed = is_closed or bool(content) or bool(message.get("tool_calls"))
    else:
        split = _split_at_tags(content, injection.is_open)
        if split is not None:
            thought, content, is_closed = split
        elif not injection.is_open:
            return None, content.lstrip() if field else content, True
        elif _is_answer(content, field is not None, has_echo, expected):
            return None if expected.is_hidden else "", content.lstrip(), True
        else:
            return content, "", False
    if not injection.text:
        thought = thought.lstrip()
    if is_closed:
        thought, content = thought.rstrip(), content.lstrip()
    return thought if thought or injection.is_open else None, content, is_closed


# == Sentences =====================================================================================
#
# A pure function. A boundary depends on what follows only up to the next place where a sentence
# could end, so a text that is cut at a boundary is cut alike again. Every pattern is linear: a run
# of one character is matched once, and only a bounded window before a stop is looked at.

# Where a sentence may end, by kind. Code and formulas come first, so they are never looked into.
_BOUNDARY = r"""(?xs)
    (?P<fence> ```[\w+#-]*[^\S\n]*\n .*? (?:```|\Z) )
  | (?P<code>                           # a stray backtick stands beside a space or within a word
        (?<![\w\\`]) (?P<ticks>`+) (?![\s`]) [^`\n]+ (?<!\s) (?P=ticks) (?![\w`]) )
  | (?P<display> \$\$ .*? \$\$ | (?<!\\)\\\[ (?: (?!(?<!\\)\\\[) . )*? \\\] | \\end\{\w+\*?\} )
  | (?P<formula>                        # "$5. Then he has 3$" is money
        \$(?!\s) (?: (?![.?!]\s[A-Z][a-z]) [^$\n] )*? (?<!\s) \$(?!\d)
      | \\\( (?: (?!\\\(|\n[^\S\n]*\n) . )*? \\\) )
  | (?P<break> (?<=\S) (?= [^\S\n]*\n (?:
        [^\S\n]*\n\s* (?!\s|[≈≡≤≥]|=[^=>])          # a paragraph, but not "= 3"
      | [^\S\n]* (?: [-*•+] | \(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]+)[.)] ) [^\S\n]+ [^\s=] ) ) )
  | (?P<unspaced> [।॥۔؟｡。！？]+ [”’」』）]* )           # needs no space behind it
  | (?P<weak>                           # "0.33… So", "5! So", "a ? b": ends before a capital only
        (?: (?<=\d)(?:\.{2,}|…) | (?:(?<=[\d)])|(?<=\b[a-z]))!(?![.!?]) | (?<=\s)[.!?](?![.!?]) )
        ["'”’»)\]}*_]* )
  | (?P<ellipsis> \.{2,} | … )
  | (?P<stop> [.!?]+ ) ["'”’»)\]}*_]*
"""
_FOLLOWING = r"""(?P<space>\s*)(?=(?P<first>\S))["'“‘(\[*_]*(?P<letter>\S)"""

# Words that begin a sentence; after an abbreviation that may end one, they show that it did.
_NO_STARTER = r"""(?x) [^\S\n]+ (?! \s | (?:
    A|Actually|Additionally|After|Again|All|Also|Alternatively|Although|And|Another|Any|Are|As
    |At|Because|Both|But|By|Can|Case|Check|Clearly|Consider|Correct|Could|Did|Do|Does|Each
    |Either|Even|Every|Finally|First|For|From|Given|Good|Great|Hence|Here|Hmm|How|However|I|If
    |In|Instead|Is|It|Its|Let|Maybe|My|Next|No|Not|Note|Now|Of|Oh|Okay|OK|On|Once|One|Option|Or
    |Perhaps|Point|Right|Second|Similarly|Since|So|Some|Suppose|That|The|Their|Then|There
    |Therefore|These|They|This|Those|Thus|To|Triangle|Wait|We|Well|What|When|Where|Which|While
    |Who|Why|With|Would|Yes|Yet|You|Your|\w+ing )\b )"""

# What keeps a sentence going over a stop: what stands before it, up to the stop, and what follows.
_GOES_ON = (
    # "5. = 120"; "<", ">", "/" and "|" may begin a line (a tag, a quotation, a path, a table).
    (r"", r"\s*(?:=(?!>)|[+),;:^&}\]])|[^\S\n]*[/<>|]"),
    # "1.", "**Step 2.**", "cases: a." are the beginning of a sentence.
    (r"(?:^|[:;]\s*(?=[1aAi][.)]))\s*[-*•+#>\s]*\(?"
     r"(?:(?:Step|Case|Part|No|Problem|Question|Theorem|Lemma|Claim|Example|Statement|Rule|Section"
     r"|Clue|Q)\s*)?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]+)[.)]$", r""),
    (r"(?:^|[\s(\[\"'])(?:vs|cf|Dr|Mrs?|Ms|Prof|St|Mt|Gen|Sen|Gov|Capt|Lt|Rev|Figs?|Eqs?|Eqn|Secs?"
     r"|Ch|Thm|Prop|Lem|Cor|Def|Ex|approx|resp|ca|viz|incl|esp"
     r"|(?!a\.m|p\.m)[a-z](?:\.[a-z])+)\.$", r""),
    (r"\b(?:[Nn]os?|pp?|[Vv]ols?|ch|secs?|figs?|eqs?|arts?|paras?|vers?)\.$", r"\s*\d"),
    (r"\b(?:al|Jr|Sr|Inc|Ltd|Corp|Co|[A-Z](?:\.[A-Z])+)\.$", _NO_STARTER),
    # Initials. "the answer is B. Good" has none: they follow a name, an initial, or "by"; only J is
    # hardly ever a variable, a vertex or an option.
    (r"(?:(?:\b[A-Z]\.\s?|\bby\s|\b(?!Option|Case|Person|Team|Point|Answer|Choice|Player|Angle"
     r"|Statement|Triangle|Line|Set|Box|Door)[A-Z][a-z]+,?\s(?:and\s)?)[A-Z]|\bJ)\.$",
     _NO_STARTER + "[A-Z][a-z.]"),
)
# A small letter goes on with the sentence, unless it begins an equation or a call: "y is 3",
# "dp[1] = 2", "cos x".
_EQUATION = (
    r"\w(?![^\W\d_])|\w*(?:\.\w+)*(?:[\d_(\[^]|[ ]?(?:[=<>≤≥≡≠≈∈→*^+]|[-:]=|->))"
    r"|(?:sin|cos|tan|log|ln|lim|exp)\b")
_WORD = r"(?<![\\A-Za-z])(?!sin|cos|tan|log|exp|max|min|gcd|mod)[A-Za-z]{3}|:"


def _continues_equation(text: str, start: int, end: int) -> bool:
    """Whether the line after *end* is no item of a list but goes on with an equation."""
    line = re.compile(r"\s*[-+] (?:[^\n.!?…।॥۔؟｡。！？`]|\.(?=\d))*").match(text, end)
    # "x = 8", then "- 3". How far to look back is bounded, so that many such lines stay linear.
    equals = text.rfind("=", max(start, end - 200), end)
    if line is None or equals < 0 or re.compile(r"\s*[-*+•] ").match(text, start):
        return False
    return not re.search(_WORD, text[equals:end] + line[0])


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether *match* ends the sentence that began at *start*."""
    kind = match.lastgroup
    end = match.end()
    if kind == "break":
        return not _continues_equation(text, start, end)
    if kind in ("fence", "unspaced"):
        return True
    following = re.compile(_FOLLOWING).match(text, end)
    if following is None or kind in ("code", "ellipsis"):
        return following is None
    space, letter = following["space"], following["letter"]
    if not space:
        return False
    if kind != "stop":
        # A formula ends a sentence with a stop of its own, a displayed one also with its line.
        is_end = kind == "weak" or match[0].rstrip("$\\)] \n").endswith((".", "?"))
        if kind == "display" and "\n" in space:
            is_end = True
        return is_end and letter.isalpha() and not letter.islower()
    # Of a long sentence the last words are enough; the dots in front keep ^ from matching them.
    stop = match.end("stop")
    before = text[start:stop] if stop - start < 60 else "…" + text[stop - 60:stop]
    for pattern, after in _GOES_ON:
        if re.search(pattern, before) and re.compile(after).match(text, end):
            return False
    if not following["first"].islower() or "\n" in space:
        return True
    return re.compile(_EQUATION).match(text, following.start("first")) is not None


def split_sentences(text: str) -> list[str]:
    """Cut *text* into sentences, losing nothing: ``"".join(split_sentences(text)) == text``.

    A sentence ends at ``.``, ``!`` or ``?`` (with the quotes and brackets that close behind it)
    that white space follows, at a full stop of a script that needs no space, at a paragraph break,
    before an item of a list, and after a displayed formula whose next line begins with a capital
    letter. It does not end at an abbreviation, a decimal, an ellipsis or an enumeration ("1."), nor
    within code, a formula or the lines of one equation; at the end of a fenced block of code it
    does. "Wait." is a sentence; what has neither letter nor digit belongs to the sentence before
    it. White space leads the sentence that follows it, so that no prefix of sentences ends in a
    space: models continue badly from one. A prefix of sentences is cut into the same sentences
    again.
    """
    ends = [0]
    for match in itertools.chain(re.finditer(_BOUNDARY, text), (None,)):
        if match and not _ends_sentence(text, ends[-1], match):
            continue
        end = match.end() if match else len(text)
        if len(ends) > 1 and not re.search(r"\w", text[ends[-1]:end]):
            ends[-1] = end
        elif end > ends[-1]:
            ends.append(end)
    return [text[start:end] for start, end in zip(ends, ends[1:])]


# == Requests ======================================================================================
#
# What is sent is built here, once, and the cache's key is a hash of it: there is no list of
# "parameters that matter". Left out of the key are the seed, which names the entry below it, and
# the fields that ask for streaming, which change how a reply arrives and not what it says.

# Hexadecimal digits of SHA-256 in the key. Of a client's parameters there are few, so that 64 bits
# tell them apart; of prompts there may be millions, for which 160 bits leave no chance of a mix-up.
_PARAMETER_DIGITS = 16
_PROMPT_DIGITS = 40


class _Api(NamedTuple):
    """The API of one call, and the key for it."""

    name: str  # a provider's, or the host's where none was named
    base_url: str
    provider: _Provider
    key_name: str  # the environment variable of its key, or ""
    key: Optional[str]

    @property
    def is_local(self) -> bool:
        host = urllib.parse.urlsplit(self.base_url).hostname or ""
        return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def _api_of(config: Config) -> _Api:
    """The API that *config* calls, with the key for it.

    With a provider's name base_url is that API at another address, and the key from the environment
    goes there. A base_url alone names no provider and gets only a key that was passed explicitly.
    """
    if config.provider is None and config.base_url is not None:
        host = urllib.parse.urlsplit(config.base_url).netloc
        provider = _Provider(config.base_url, needs_key=False)
        return _Api(host, config.base_url, provider, "", config.api_key)
    is_named = isinstance(config.provider, str)
    name = str(config.provider) if is_named else "openrouter"
    key_name, url_name = f"{name.upper()}_API_KEY", f"{name.upper()}_BASE_URL"
    base_url = config.base_url or _BASE_URL(url_name, os.environ.get(url_name) or None)
    base_url = base_url or _PROVIDERS[name].base_url
    if config.base_url is not None and not is_named:  # OpenRouter's routing at another address
        return _Api(name, base_url, _PROVIDERS[name], "", config.api_key)
    key = config.api_key or _API_KEY(key_name, os.environ.get(key_name))
    return _Api(name, base_url, _PROVIDERS[name], key_name, key)


def _for_call(client: Config, overrides: Mapping[str, Any]) -> tuple[Config, _Api]:
    """The settings of a call and its API: the call's, then the client's.

    The client's address is not that of another provider, and its key is for its address alone.
    """
    overrides = dict(overrides)
    if overrides.get("api_key", "") is None:
        del overrides["api_key"]
    config = _with_settings(client, overrides)
    is_other = isinstance(config.provider, str) and config.provider != client.provider
    if is_other and "base_url" not in overrides:
        config = dataclasses.replace(config, base_url=None)
    if "api_key" not in overrides and _api_of(config).base_url != _api_of(client).base_url:
        config = dataclasses.replace(config, api_key=None)
    return config, _api_of(config)


class _Request(NamedTuple):
    """What is sent for each sample of one prompt."""

    model: str
    prompt: Prompt
    injection: _Injection
    length: int  # characters of the prompt
    url: str
    body: dict[str, Any]  # all but the seed and the streaming
    seed_name: Optional[str]
    stream_options: Any
    key: tuple[str, str, str]  # (model, parameters, prompt): file names, the last two with hashes
    stored: dict[str, Any]  # what the key stands for

    def payload(self, seed: int, stream: bool) -> bytes:
        """The body of the request for sample *seed*."""
        body = dict(self.body)
        if stream:
            body["stream"] = True
            if self.stream_options is not None:
                body["stream_options"] = self.stream_options
        if self.seed_name is not None:
            body[self.seed_name] = seed
        return json.dumps(body).encode()

    @property
    def hides_thoughts(self) -> bool:
        exclude = _dict(self.body.get("reasoning")).get("exclude")
        return self.body.get("include_reasoning") is False or exclude is True or (
            self.body.get("reasoning_format") == "hidden")


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("._")[:60] or "_"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _raw_injection(prompt: Any) -> _Injection:
    """The thought that a raw *prompt* leaves open; else nothing, and the reply is read afresh."""
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(
            "with endpoint='completions' prompt takes a str, as the model is to see it. Render a "
            "list of messages with the model's own template: "
            "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True); "
            f"not {prompt!r:.200}")
    injection = _Injection.parse(prompt[max(prompt.rfind("<think>"), 0):])
    return injection if injection.is_open else _Injection()


def _why_no_continuation(config: Config, api: _Api) -> str:
    """Why the model is known to start afresh after an assistant message, or ''."""
    if config.prefill is not None:
        return ""
    if api.provider.prefill is None:
        return f"{api.name} answers an assistant message, it does not continue it"
    found = (why for pattern, why in _CANNOT_CONTINUE if re.search(pattern, config.model, re.I))
    return next(found, "")


def _chat_injection(
    messages: list[dict[str, Any]], config: Config, api: _Api
) -> tuple[_Injection, Mapping[str, Any]]:
    """What *messages* ask to continue, and the body's fields for it. Changes the last message."""
    injection = _injection_of(messages)
    if injection is None:
        return _Injection(), {}
    why = _why_no_continuation(config, api)
    if why:
        raise ValueError(
            f"{config.model} cannot continue an injected message in a chat: {why}. End the prompt "
            "with the user's message, pass endpoint='completions' where the server takes raw "
            "completions, or take a model that shows its thoughts, such as deepseek/deepseek-r1 or "
            "qwen/qwen3-30b-a3b; prefill='trailing' sends it all the same.")
    way = _PREFILLS[config.prefill or api.provider.prefill or "trailing"]
    messages[-1] = _with_prefill(messages[-1], injection, way)
    return injection, way.body


def _omitted(config: Config, api: _Api) -> set[str]:
    """The default fields that the API refuses for this model."""
    return {name for pattern, name in api.provider.omits if re.search(pattern, config.model)}


def _body_of(config: Config, api: _Api) -> dict[str, Any]:
    """The fields of the body that settings make, without those that the API refuses."""
    body: dict[str, Any] = {"model": config.model}
    for name, setting in _SETTINGS.items():
        if setting.metadata["body"]:
            body[name] = getattr(config, name)
    for name in body.keys() & _omitted(config, api):
        if body[name] == _SETTINGS[name].default and body["temperature"] is not None:
            del body[name]
    body.update(config.extra)
    if isinstance(config.provider, dict):
        body["provider"] = config.provider
    return body


def _request_of(prompt: Prompt, config: Config, api: _Api) -> _Request:
    """The request for a sample of *prompt*. ValueError where it cannot be made."""
    body, said = _body_of(config, api), prompt
    if config.endpoint == "completions":
        injection, field, path = _raw_injection(prompt), "prompt", "completions"
        length = len(prompt)
    else:
        said = _messages_of(prompt)
        injection, further = _chat_injection(said, config, api)
        body, field, path = {**further, **body}, "messages", "chat/completions"
        length = sum(len(text or "") for message in said for text in _fields_of(message))
    if injection.text.endswith((" ", "\t")):
        _warn(
            "the injected text ends in a space, which most models continue badly: their words "
            "begin with one. End it with a word or a newline.")
    options = {"include_usage": True} if api.provider.stream_options else None
    options = body.pop("stream_options", options)
    body = {name: value for name, value in body.items() if value is not None}
    try:
        spoken = json.dumps(said, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompt takes messages that JSON can hold: {error}") from None
    label = "".join(
        f"{short}{body[name]:g}-"
        for short, name in (("t", "temperature"), ("p", "top_p"), ("n", "max_tokens"))
        if isinstance(body.get(name), (int, float)))
    hashed = _sha256(json.dumps(api.base_url) + json.dumps(body, sort_keys=True))
    key = (
        _file_name(config.model), label + hashed[:_PARAMETER_DIGITS],
        _sha256(spoken)[:_PROMPT_DIGITS])
    has_seed = config.seed is not None and "seed" not in _omitted(config, api)
    # The rest of the body in the order given: a schema's order is the order of the answer's fields.
    said = json.loads(spoken)
    return _Request(
        config.model,
        prompt if isinstance(prompt, str) else _json_copy([dict(each) for each in prompt]),
        injection, length, f"{api.base_url}/{path}", {**body, field: said},
        api.provider.seed if has_seed else None, options, key,
        {"base_url": api.base_url, **body, field: said})


def _is_streamed(config: Config, provider: _Provider) -> bool:
    """Whether to ask for a stream: as the settings say, else where the provider needs it."""
    if config.stream is not None or provider.stream_above is None:
        return bool(config.stream)
    most = max(config.max_tokens or 0, _count(config.extra.get("max_completion_tokens")))
    return most > provider.stream_above


# == Retry =========================================================================================
#
# The whole policy, as pure functions: what is retried, how long the API asked to wait, whether a
# limit lasts, and how long to wait before the next attempt.

_BACKOFF = 1.0  # seconds before the first retry, at most; doubles with each
_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_WAIT = 600.0  # seconds; an API that asks for more has met a limit that lasts
_UNIX_TIME = 1e9  # a wait that is not shorter is a time: seconds since 1970, from 2001 on
_UNIX_MILLISECONDS = 1e11  # from here on in milliseconds: as seconds it is the year 5138

# What an account that has nothing left is told, in codes, types and words.
_NO_CREDIT = (
    r"insufficient[ _](?:account[ _])?(?:quota|balance|credit|fund)|exceeded_current_quota"
    r"|(?:balance|credit)s? (?:is |are )?(?:insufficient|exhausted|too low)"
    r"|out of credits?\b|\barrears?\b")
# What lasts longer than minutes, as a word of a code, or next to "exceeded" in a message: after "20
# per minute" the "200 per day" of the same sentence says only what the plan is.
_DAILY = r"(?:per|by|/)[-_ ]?(?:day|week|month)|daily|monthly|weekly|86,?400 ?s|24 ?h"
_EXCEEDED = r"exceed|reach|exhaust|used up|ran out"
_SHORT = r"minute|second|(?<!24 )hour"
_NEAR = rf"(?:(?!{_SHORT}|[.;,]\s|[()]).){{0,160}}?"
_DAY = rf"(?:{_DAILY}|today|tomorrow)"
_DAILY_LIMIT = rf"(?:{_EXCEEDED}){_NEAR}{_DAY}|{_DAY}{_NEAR}(?:{_EXCEEDED})"


def _is_retryable(status: int) -> bool:
    """Whether a request that met *status* may succeed later.

    424: a generation that failed (TGI). 498: Groq's flex tier has no room just now. 499: the
    connection to the upstream was closed.
    """
    return status >= 500 or status in (408, 409, 424, 425, 429, 498, 499)


def _date(value: Any) -> Optional[float]:
    """An HTTP date as Unix seconds; None for anything else."""
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):
        return email.utils.parsedate_to_datetime(str(value)).timestamp()
    return None


def _wait_of(value: Any, now: float) -> Optional[float]:
    """Seconds to wait by a Retry-After: seconds, a date or a Unix time. *now*: Unix seconds."""
    number = _seconds(value)
    if number is None:
        date = _date(value)
        return None if date is None else max(0.0, date - now)
    if number < _UNIX_TIME:
        return number
    return max(0.0, (number / 1000 if number >= _UNIX_MILLISECONDS else number) - now)


def _retry_after(
    status: int, headers: Mapping[str, str], error: Mapping[str, Any]
) -> Optional[float]:
    """The longest wait in seconds that a failed reply asks for, or None.

    Times are measured by the reply's own Date, as clocks differ. OpenRouter's error bodies repeat
    headers in ``metadata.headers``. X-RateLimit-Reset, which with another status than 429 tells of
    something else, was observed in Unix milliseconds; others count seconds there, or say "1s".
    """
    metadata = _dict(error.get("metadata"))
    now = _date(headers.get("date")) or time.time()
    waits = [
        _wait_of(_dict(error.get("availability")).get("retry_after"), now),
        _wait_of(metadata.get("retry_after_seconds"), now)]
    for source in (headers, _dict(metadata.get("headers"))):
        fields = {str(name).lower(): value for name, value in source.items()}
        waits.append(_seconds(fields.get("retry-after-ms"), 0.001))
        for name in ("retry-after", "llm_provider-retry-after"):  # the latter is LiteLLM's
            waits.append(_wait_of(fields.get(name), now))
        reset = _seconds(fields.get("x-ratelimit-reset"))
        if status == 429 and reset is not None and reset >= _UNIX_TIME:
            waits.append(_wait_of(reset, now))
    return max((wait for wait in waits if wait is not None), default=None)


def _why_it_lasts(status: int, error: Mapping[str, Any], words: str, wait: Optional[float]) -> str:
    """Advice where a failure that looks like a passing one does not pass within minutes, or ''.

    A stated wait is obeyed even where the message speaks of a daily limit: Groq's waits are short.
    """
    source = _dict(error.get("metadata")).get("limit_source")
    fields = [error.get(name) for name in ("code", "type", "error_code", "status", "status_code")]
    kinds = " ".join(str(kind) for kind in (*fields, source, error.get("details")))
    if re.search(_NO_CREDIT, f"{kinds} {words}", re.I) or re.search(r"\b1113\b|billing", kinds):
        return "the account has no quota left: add credit"
    is_told = wait is not None or re.search(_SHORT, kinds, re.I)
    is_daily = re.search(_DAILY, kinds, re.I) or (not is_told and (
        re.search(_DAILY_LIMIT, words, re.I | re.S)
        or (re.search(_DAILY, words, re.I) and not re.search(_SHORT, words, re.I))))
    if (wait or 0) <= _LONGEST_WAIT and not (status == 429 and is_daily):
        return ""
    when = f"the API asks to wait {wait / 60:.0f} minutes" if wait else (
        "this limit does not lift within minutes")
    return f"{when}: come back then; what arrived is in the cache"


def _backoff(error: APIError, attempt: int, jitter: float) -> float:
    """Seconds to wait after the failed *attempt* (from 0): full jitter in [0, 1), or as asked."""
    longest = min(_LONGEST_BACKOFF, _BACKOFF * 2.0**min(attempt, 30))
    return max(jitter * longest, error.retry_after or 0.0)


# == Replies =======================================================================================
#
# What came back, read into a Response, or into the APIError that says why it cannot be. Every
# APIError of a request is made here, and none holds the key, not even where a server repeats it.
# The form of a body decides what it is, not its label.

_MOST_WORDS = 1000  # characters of an API's own words in an error
_LONGEST_REPLY = 64 * 2**20  # bytes, unpacked
_FAILURES = ("error", "network_error", "insufficient_system_resource", "abort")  # finish reasons
_WORD_FIELDS = (  # where APIs put their words
    "error", "errors", "title", "message", "msg", "status_msg", "detail", "error_description",
    "error_message", "error_msg", "html-message", "reason", "description")
_PIECES = (  # of a streamed message, what comes in pieces
    "content", "reasoning", "reasoning_content", "reasoning_details", "refusal", "tool_calls")

_ADVICE = {
    400: "check the parameters, the model's id and the length of the prompt",
    401: "pass the right key as api_key=…{or_set}",
    402: "add credit to the account, or ask for fewer max_tokens",
    403: "the key, the account's limits or the content was refused: see the API's words",
    404: "check the model's id, base_url, and what the provider routing leaves over",
    407: "give the proxy its user and password: HTTPS_PROXY=http://user:password@host:port",
    413: "shorten the prompt",
    422: "a field of the request is not known here or out of range: see the API's words",
    429: "lower requests_per_minute or max_concurrency, or try again later",
}
_TEMPLATE_ADVICE = (
    "the server's chat template drops or rewrites a part of the injected text: start the server "
    "with another template, or pass endpoint='completions'")


def _advice_of(api: _Api, status: Optional[int], words: str = "") -> str:
    if status is not None and 300 <= status < 400:
        return "redirects are not followed: set base_url to the address that answers"
    if status == 400 and "not appear in the chat" in words:
        return _TEMPLATE_ADVICE
    advice = _ADVICE.get(status or 0, "")
    if status == 400 and "max_tokens" in words:
        advice = "check max_tokens, which the API names, " + advice.partition(" ")[2]
    return advice.format(or_set=f" or set {api.key_name}" if api.key_name else "")


def _failure(
    api: _Api, message: str, status: Optional[int] = None, retryable: bool = True,
    retry_after: Optional[float] = None, advice: Optional[str] = None,
) -> APIError:
    """The APIError with *message*, in one line, cut, and without the key."""
    if api.key:  # whole words of a short one, such as "x" for a server of one's own
        edge = r"\b" if len(api.key) < 8 else ""
        message = re.sub(edge + re.escape(api.key) + edge, "***", message)
    message = re.sub(r"\s+", " ", message).strip()
    if advice is None:
        advice = _advice_of(api, status, message)
    cut = message if len(message) <= _MOST_WORDS else message[:_MOST_WORDS] + "…"
    return APIError(
        cut, status=status, provider=api.name, retryable=retryable, retry_after=retry_after,
        advice=advice)


def _said(value: Any) -> str:
    """*value* as words: a str as it is, anything else as JSON with its letters."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain_text(page: str) -> str:
    """The words of an HTML page: its title, unless that stands in its body too, and its body."""
    page = page[:20_000]
    title = re.search(r"<title\b[^>]*>(.*?)</title>", page, re.S | re.I)
    body = re.sub(r"<(style|script|title)\b.*?</\1>|<[^>]*>", " ", page, flags=re.S | re.I)
    texts = [" ".join(text.split()) for text in (title[1] if title else "", body)]
    return "an HTML page: " + (texts[1] if texts[0] in texts[1] else ": ".join(filter(None, texts)))


def _error_in(data: Any) -> dict[str, Any]:
    """The part of a reply that describes an error: a dict, empty where it holds nothing."""
    if isinstance(data, list) and data:
        data = data[0]  # Gemini's form
    for name in ("error", "errors", "base_resp"):
        inner = _dict(data).get(name)
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            inner = inner[0]
        if isinstance(inner, dict) and inner:
            return inner
    return data if isinstance(data, dict) else {"message": data} if data else {}


def _words_of(error: Mapping[str, Any], whole: Any) -> str:
    """The API's own words; where no known field holds them, the *whole* body."""
    metadata = _dict(error.get("metadata"))
    words = [*map(error.get, _WORD_FIELDS), metadata.get("raw"), metadata.get("reasons")]
    text = ": ".join(dict.fromkeys(_said(word) for word in words if word))
    if not text and whole:
        text = _said(whole)
    upstream = metadata.get("provider_name")
    return f"{text} (from {upstream})" if upstream else text


def _refusal(
    api: _Api, status: int, headers: Mapping[str, str], data: Any, text: str = ""
) -> APIError:
    """The APIError for a reply of *status*; its body is *data*, or *text* if that is no JSON."""
    error = _error_in(data)
    words = _words_of(error, data or text)
    if 300 <= status < 400:
        words = f"it redirects to {headers.get('location')}"
    elif words.lstrip().startswith("<"):
        words = _plain_text(words)
    wait = _retry_after(status, headers, error)
    stated = _dict(error.get("availability")).get("retryable")
    is_retryable = stated if isinstance(stated, bool) else _is_retryable(status)
    advice = _why_it_lasts(status, error, words, wait) if is_retryable else ""
    reason = http.client.responses.get(status, "")
    return _failure(
        api, words or reason, status, is_retryable and not advice, wait, advice or None)


def _tls_error(error: ssl.SSLError, words: str, advice: str) -> tuple[str, bool, str]:
    """(words, whether it is retryable, advice) for a connection that TLS refused."""
    if "WRONG_VERSION_NUMBER" in words or "HTTP_REQUEST" in words:
        return words, False, "nothing speaks TLS at this port: does base_url begin with http://?"
    if not isinstance(error, ssl.SSLCertVerificationError):
        return words, True, advice
    # What VERIFY_X509_STRICT, on from Python 3.13, asks of certificates that are trusted.
    if re.search(r"Key Identifier|Basic Constraints|key usage|critical", words, re.I):
        return words, False, (
            "a certificate of the chain lacks what Python 3.13 asks for (RFC 5280, "
            "VERIFY_X509_STRICT): have it reissued, or run an earlier Python")
    return words, False, (
        "the certificate is not trusted: point SSL_CERT_FILE to your organisation's certificates; "
        "with python.org's build on macOS run 'Install Certificates.command' once")


def _connection_error(api: _Api, error: Exception, timeout: float) -> APIError:
    """The APIError for an exception on the way to a reply."""
    words, is_retryable = f"{type(error).__name__}: {error}", True
    advice = "check the connection, or base_url"
    proxy = re.search(r"Tunnel connection failed: (\d+)", str(error))
    if isinstance(error, ssl.SSLError):
        words, is_retryable, advice = _tls_error(error, words, advice)
    elif isinstance(error, (TimeoutError, socket.timeout)) and not error.errno:
        words = f"no complete reply within {timeout:g} s"
        advice = "raise timeout=…, or ask for fewer max_tokens"
    elif isinstance(error, socket.gaierror):
        host = urllib.parse.urlsplit(api.base_url).hostname
        words = f"the name of {host} (or of a proxy) was not resolved: {error}"
        advice = "check the network, base_url and HTTPS_PROXY"
    elif isinstance(error, http.client.IncompleteRead):
        words = "the reply broke off"
    elif isinstance(error, ConnectionRefusedError):
        words = f"{api.base_url} refused the connection"
        advice = "is the server running there, and the proxy, if HTTP(S)_PROXY names one?"
    elif proxy:
        is_retryable = int(proxy[1]) >= 500
        advice = _ADVICE[407] if proxy[1] == "407" else "check HTTPS_PROXY and NO_PROXY"
    elif isinstance(error, _TooLong):
        words, advice = str(error), "ask for fewer max_tokens"
    elif isinstance(error, _SocksProxy):
        words, is_retryable, advice = str(error), False, "name an HTTP proxy, or set NO_PROXY"
    elif _is_scarcity(error):
        advice = "too many open files: raise 'ulimit -n', or lower max_concurrency"
    failure = _failure(api, words, None, is_retryable, None, advice)
    error.__context__ = None
    if not api.key or api.key not in repr((error, error.args, vars(error))):
        failure.__cause__ = error.with_traceback(None)
    return failure


def _unpacked(body: bytes, encoding: str) -> bytes:
    """*body* without gzip or deflate, which some proxies use unasked.

    Its first bytes decide; only deflate without a header has none that tell.
    """
    forms = [(b"\x1f\x8b", 31), (b"\x78", 15), *([(b"", -15)] if "deflate" in encoding else [])]
    for start, bits in forms:
        if body.startswith(start):
            with contextlib.suppress(zlib.error):
                unpacked = b""
                while body:  # gzip may come in several members
                    unpacker = zlib.decompressobj(bits)
                    unpacked += unpacker.decompress(body, _LONGEST_REPLY)
                    if unpacker.unconsumed_tail or len(unpacked) > _LONGEST_REPLY:
                        raise _TooLong(f"a reply above {_LONGEST_REPLY >> 20} MiB")
                    body = unpacker.unused_data
                return unpacked
    return body


def _events(text: str) -> Iterator[Any]:
    """The JSON values of a stream of server-sent events, up to its [DONE], which comes as a str.

    An event of the name "error", and a line of the field "error", yield {"error": …}. A line that
    is bare JSON counts as an event. Comments and empty events are passed over.
    """
    data: list[str] = []
    name = ""
    for line in itertools.chain(re.split(r"\r\n|\n|\r", text), ("",)):
        field, _, value = line.partition(":")
        if line.startswith("{"):
            yield json.loads(line)
        elif field == "error":
            yield {"error": json.loads(value) if value.lstrip().startswith("{") else value}
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value.strip()
        elif not line:
            joined = "\n".join(data).strip()
            if joined == "[DONE]":
                yield joined
                return
            if joined and name == "error":
                yield {"error": json.loads(joined) if joined.startswith("{") else joined}
            elif joined:
                yield json.loads(joined)
            data, name = [], ""


def _joined(pieces: Sequence[Any]) -> Any:
    """The pieces of a streamed field in one: texts joined, unless one of them is a list."""
    if all(isinstance(piece, str) for piece in pieces):
        text = "".join(pieces)
        return re.sub(  # an emoji may be split over two events
            "[\ud800-\udbff][\udc00-\udfff]",
            lambda pair: chr(0x10000 + (ord(pair[0][0]) - 0xd800 << 10) + ord(pair[0][1]) - 0xdc00),
            text)
    lists = [piece if isinstance(piece, list) else [piece] for piece in pieces]
    return list(itertools.chain.from_iterable(lists))


def _fails(data: Mapping[str, Any]) -> bool:
    """Whether a reply of status 200 says that it failed, in one of the many ways of saying so."""
    base = _dict(data.get("base_resp")).get("status_code")  # MiniMax's; 0 is good
    is_bare = not data.get("choices") and "usage" not in data and any(map(data.get, _WORD_FIELDS))
    return bool(
        data.get("error") or data.get("errors") or base or data.get("object") == "error"
        or data.get("success") is False or is_bare)


def _message_in(choice: Mapping[str, Any]) -> Optional[dict[str, Any]]:
    """The message of a choice, or the piece of one; raw completions have a text in its place."""
    if isinstance(choice.get("text"), str):
        return {"content": choice["text"]}
    found = [each for each in map(choice.get, ("delta", "message")) if isinstance(each, dict)]
    return next(filter(None, found), found[0] if found else None)


def _assembled(events: Iterator[Any]) -> tuple[Any, bool]:
    """(the unstreamed reply that a stream amounts to, whether it came to its end).

    Without any finish_reason a stream is whole where [DONE] came and no chunk carried a null one:
    llama-cpp-python ends an older stream so when another request arrives (observed).
    """
    reply: dict[str, Any] = {}
    has_choices = False
    latest: Any = None
    pieces: dict[str, list[Any]] = {}
    choice: dict[str, Any] = {}
    is_done = has_null = False
    while True:
        try:
            value = next(events, events)  # itself at its end, as JSON may hold anything else
        except ValueError:
            if "finish_reason" not in choice:
                raise
            break  # only what follows the text is lost
        if value is events or value == "[DONE]":
            is_done = value is not events
            break
        event = _dict(value[0] if isinstance(value, list) and value else value)
        choices = event.get("choices")
        if _fails(event):
            return event, True
        has_choices = has_choices or "choices" in event
        latest = value
        reply.update((name, value) for name, value in event.items() if value and name != "choices")
        for part in map(_dict, choices if isinstance(choices, list) else ()):
            if part.get("index"):
                continue
            has_null = has_null or ("finish_reason" in part and part["finish_reason"] is None)
            for name in ("finish_reason", "error"):
                if part.get(name):
                    choice[name] = part[name]
            if part.get("usage"):
                reply["usage"] = part["usage"]  # Moonshot's place for it
            for name, value in (_message_in(part) or {}).items():
                if name in _PIECES and isinstance(value, (str, list)):
                    pieces.setdefault(name, []).append(value)
    if latest and not has_choices:
        return latest, True  # no stream at all, but a body in the form of one
    choice["message"] = {name: _joined(values) for name, values in pieces.items()}
    is_whole = "finish_reason" in choice or (is_done and not has_null) or "error" in choice
    return {**reply, "choices": [choice]}, is_whole


def _parsed(content: bytes) -> tuple[Any, bool]:
    """(the JSON of a body, put together where it is a stream; whether it is whole). ValueError."""
    text = content.decode().lstrip("\ufeff \t\r\n")
    if re.match(r"(?:data|event|error|id|retry)(?:[:\r\n]|\Z)|:", text):
        return _assembled(_events(text))
    return json.loads(text), True


def _usage_of(data: Mapping[str, Any]) -> Usage:
    """Counts under the names of OpenAI, or of Anthropic; a str of digits counts too.

    With a key of one's own (BYOK) OpenRouter's `cost` is its fee alone; what the upstream charged
    stands in cost_details (documented).
    """
    def count(*names: str) -> int:
        return next((_count(data[name]) for name in names if data.get(name)), 0)

    details = {
        **_dict(data.get("completion_tokens_details")), **_dict(data.get("prompt_tokens_details"))}
    prompt = count("prompt_tokens", "input_tokens")
    completion = count("completion_tokens", "output_tokens")
    cached = _count(details.get("cached_tokens")) or count(
        "prompt_cache_hit_tokens", "cache_read_input_tokens", "cached_tokens")
    cost = _seconds(data.get("cost")) or 0.0
    if data.get("is_byok"):
        cost += _seconds(_dict(data.get("cost_details")).get("upstream_inference_cost")) or 0.0
    return Usage(
        prompt, completion, count("total_tokens") or prompt + completion,
        _count(details.get("reasoning_tokens")), cached, cost)


def _why_not_whole(response: Response) -> str:
    """Why *response*, live or an entry of the cache, is not to be kept; '' where it is."""
    if response.finish_reason in _FAILURES:
        return f"finish_reason is {response.finish_reason!r}"
    if not (response.content or response.reasoning or response.usage.completion_tokens):
        if response.finish_reason is None:
            return "an empty reply without a finish reason"
        return f"an empty reply of no tokens (finish_reason {response.finish_reason!r})"
    return ""


class _Body(NamedTuple):
    """A reply as it came: what was received of it, and what cut it short, if anything did."""

    status: int
    headers: Mapping[str, str]  # names in small letters
    content: bytes
    broken: Optional[Exception] = None


def _expected(
    request: _Request, provider: _Provider, finish_reason: Any, streamed: bool
) -> _Expected:
    """What is known of a reply to *request* before its message is read."""
    # With this flag llama.cpp's streams do not repeat what was injected (observed).
    is_flagged = streamed and "continue_final_message" in request.body
    return _Expected(
        request.injection, provider.echoes and not is_flagged, request.hides_thoughts,
        may_be_answer=finish_reason == "stop" and not request.body.get("stop"))


def _error_within(api: _Api, headers: Mapping[str, str], data: Mapping[str, Any]) -> APIError:
    """The APIError for an error within a 200: of the status that it names, or 502."""
    error = _error_in(data)
    named = [error.get(name) for name in ("code", "http_status", "status_code", "status")]
    status = next((each for each in map(_count, named) if 400 <= each < 600), 502)
    return _refusal(api, status, headers, data)


def _read_choice(
    api: _Api, request: _Request, seed: int, body: _Body, whole: Any, streamed: bool
) -> tuple[Response, Optional[str]]:
    """What _read_reply returns, from the *whole* JSON of a reply that came to its end."""
    data = _dict(whole[0] if isinstance(whole, list) and whole else whole)
    choices = data.get("choices")
    choice = _dict(choices[0]) if isinstance(choices, list) and choices else {}
    finish_reason = choice.get("finish_reason")
    if _fails(data) or choice.get("error"):
        # An error counts even where a choice that looks good stands beside it.
        told = data if _fails(data) else {"error": choice["error"]}
        raise _error_within(api, body.headers, told)
    message = _message_in(choice)
    if message is None:
        words = _words_of(_error_in(whole), whole) if isinstance(whole, (dict, list)) else ""
        words = f"a reply without choices: {words}" if words else "a reply without choices"
        raise _failure(api, words, body.status)
    recognised = None
    if api.name not in _PROVIDERS:
        recognised = _recognised(body.headers, data.get("system_fingerprint"))
    usage = _dict(data.get("usage"))
    server = recognised or api.name
    expected = _expected(request, _PROVIDERS.get(server, api.provider), finish_reason, streamed)
    # vLLM's usage has an object here where a parser is at work, else null (observed).
    if server == "vllm" and "completion_tokens_details" in usage:
        has_parser = isinstance(usage["completion_tokens_details"], dict)
        expected = expected._replace(has_parser=has_parser)
    reasoning, content, is_closed = _read_message(message, expected)
    response = Response(
        content, reasoning, is_closed, str(finish_reason) if finish_reason else None, seed,
        _usage_of(usage), str(data.get("model") or request.model),
        str(data.get("provider") or api.name),
        str(data.get("id") or body.headers.get("x-generation-id") or ""),
        _count(data.get("created")) or int(time.time()))
    problem = _why_not_whole(response)
    if problem:
        status = 502 if response.finish_reason in _FAILURES else body.status
        raise _failure(api, problem, status)
    return response, recognised


def _read_reply(
    api: _Api, request: _Request, seed: int, body: _Body, streamed: bool
) -> tuple[Response, Optional[str]]:
    """(the Response in a reply, the provider that the reply tells of where none was named).

    APIError, or what broke the reply off, where there is no whole answer in it.
    """
    problem: Optional[Exception] = None
    data, is_whole = None, False
    content = _unpacked(body.content, body.headers.get("content-encoding") or "")
    try:
        data, is_whole = _parsed(content)
    except (ValueError, RecursionError) as error:
        problem = error
    is_good = 200 <= body.status < 300
    is_late = isinstance(body.broken, (TimeoutError, socket.timeout, _TooLong))
    if body.broken is not None and is_late and (not is_good or "content-length" in body.headers):
        raise body.broken
    if is_good and is_whole:
        try:
            return _read_choice(api, request, seed, body, data, streamed)
        except RecursionError:
            raise _failure(api, "a reply whose parts are nested too deep", body.status) from None
    text = content.decode(errors="replace").strip()
    if api.key:
        text = text.replace(api.key, "***")  # before it is cut
    if not is_good:
        data, text = (data, "") if is_whole else (None, text)
        raise _refusal(api, body.status, body.headers, data, text)
    if body.broken is not None:
        raise body.broken
    if problem is None or (streamed and not text):
        raise ConnectionError("the stream ended early")
    text = _plain_text(text) if text.startswith("<") else text
    raise _failure(api, f"a reply that is no JSON ({problem}): {text[:200]!r}", body.status)


# == Transport =====================================================================================
#
# Bytes out, bytes in. urllib.request stays in charge, so that proxies, NO_PROXY and certificates
# work as people expect. Our handler for it keeps connections, which its own does not. It knows of
# no JSON and no retry, but for one: a kept connection that turns out to be closed is replaced.
#
# Threads that draw are joined when the process exits, so none may be stuck in a long wait that
# nobody wants: each wait is a short one, and before the next the thread looks whether it is to go
# on.

_SLICE = 0.5  # seconds of one wait: Ctrl-C is to end a call within a second
# Seconds for each address of a name: a dead one must not use up the timeout.
_CONNECT_TIMEOUT = 30.0
_IDLE_CONNECTION = 60.0  # seconds a connection is kept unused: less than gateways keep it
_SHORT_KEEP_ALIVE = 10  # seconds; a server that announces less binds a worker to each connection
# Seconds to wait after [DONE] for the final chunk, which has usually arrived by then.
_LAST_CHUNK = 0.5
# select() takes no file descriptor above 1023.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
_KEEPALIVE = (  # seconds, seconds, seconds, probes; the second is macOS's name for the first
    ("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4))
_IN_PROGRESS = (errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", -1))
# How a kept connection fails that the server has closed.
_CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_DONE = re.compile(rb"(?:\A|[\r\n])data: ?\[DONE\]")  # a model's own "[DONE]" never begins a line


class _Post(urllib.request.Request):
    """A request with its deadline (time.monotonic()), and whether it was cancelled."""

    deadline = 0.0
    is_cancelled: Callable[[], bool] = bool


class _Reader(io.RawIOBase):
    """The bytes that a connection receives, as http.client reads them."""

    def __init__(self, receive: Callable[[Any], int]) -> None:
        self._receive = receive

    def makefile(self, mode: str) -> io.BufferedReader:  # all that HTTPResponse asks of a socket
        return io.BufferedReader(self, 16384)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._receive(buffer)


class _Reply(http.client.HTTPResponse):
    """A reply that knows its connection, a _Connection (see below)."""

    def __init__(self, connection: Any) -> None:
        super().__init__(_Reader(connection.receive))  # type: ignore[arg-type]
        self.connection = connection
        self.fields: dict[str, str] = {}  # the headers, by their names in small letters
        self.begin()

    def begin(self) -> None:
        """Read the status line and the headers, as the base class does, but into a dict.

        Its parser, made for mail, is a fifth of what a sample costs. Kept are its limits (64 KiB a
        line, 100 headers), 1xx replies that are passed over, and RFC 9112's rules on when a body
        ends: chunked before Content-Length, and neither where the status has no body.
        """
        self.status = 100
        while self.status < 200:
            version, _, rest = self._line().partition(" ")
            code, _, reason = rest.strip().partition(" ")
            if not version.startswith("HTTP/") or not re.fullmatch("[1-9][0-9][0-9]", code):
                raise http.client.BadStatusLine(f"{version} {rest}"[:100])
            self.status, self.reason, self.fields = int(code), reason.strip(), {}
            while line := self._line():
                name, _, value = line.partition(":")
                self.fields[name.strip().lower()] = value.strip()
                if len(self.fields) > 100:
                    raise http.client.HTTPException("more than 100 headers")
        connection = self.fields.get("connection", "").lower()
        length = self.fields.get("content-length", "")
        self.code = self.status
        self.chunked = self.fields.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        is_counted = length.isdecimal() and len(length) < 20 and not self.chunked
        self.length = int(length) if is_counted else None
        if self.status in (204, 304):
            self.length = 0
        has_end = self.chunked or self.length is not None
        is_kept = "keep-alive" in connection if version == "HTTP/1.0" else "close" not in connection
        self.will_close = not (has_end and is_kept)

    def _line(self) -> str:
        """A line of the head, without its end. RemoteDisconnected where there is none."""
        line = self.fp.readline(65537)
        if not line:
            raise http.client.RemoteDisconnected("the server closed the connection without a reply")
        if len(line) > 65536:
            raise http.client.LineTooLong("header line")
        return line.decode("iso-8859-1").rstrip("\r\n")

    def read_all(self) -> _Body:
        """The body as far as it comes. A stream is over with its [DONE]."""
        pieces: list[bytes] = []
        broken: Optional[Exception] = None
        is_done = False
        try:
            if (self.length or 0) > _LONGEST_REPLY:
                raise _TooLong(f"a reply above {_LONGEST_REPLY >> 20} MiB")
            left = self.length  # read1 counts it down from Python 3.12 on only
            while not self.isclosed() and left != 0:
                piece = self.read1(65536 if left is None else min(left, 65536))
                if not piece:
                    break
                pieces.append(piece)
                left = None if left is None else left - len(piece)
                if not is_done and _DONE.search(b"".join(pieces[-2:])):
                    is_done = True
                    limit = time.monotonic() + _LAST_CHUNK
                    self.connection.deadline = min(self.connection.deadline, limit)
            if left:
                raise http.client.IncompleteRead(b"", left)
            if left == 0:
                self.close()
        except (OSError, http.client.HTTPException) as error:
            if not is_done:
                broken = error
        return _Body(self.status, self.fields, b"".join(pieces), broken)

    @property
    def may_be_kept(self) -> bool:
        """Whether the connection can be used again, and the server does not mind its being kept."""
        seconds = re.search(r"timeout=(\d+)", self.fields.get("keep-alive", ""))
        is_short = seconds is not None and int(seconds[1]) < _SHORT_KEEP_ALIVE
        return self.isclosed() and not self.will_close and not is_short and (
            self.fields.get("server") != "llama.cpp")


class _Connection:
    """A socket on which no wait is long, and none outlasts the deadline of the request under way.

    No timeout of a socket can be that deadline: it starts anew with each byte, and OpenRouter pads
    a waiting reply with spaces.
    """

    def __init__(self, key: tuple[str, str, str]) -> None:
        self.key = key
        self.sock: Any = None
        self.idle_since = 0.0
        self.deadline = 0.0  # by time.monotonic()
        self.received = 0  # bytes since the request
        self.is_cancelled: Callable[[], bool] = bool

    def begin(self, request: _Post) -> None:
        self.deadline, self.is_cancelled = request.deadline, request.is_cancelled
        self.received = 0

    def _remaining(self) -> float:
        """Seconds of the next wait. TimeoutError: the deadline is over. _GivenUp: nobody waits."""
        if self.is_cancelled():
            raise _GivenUp
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline is over")
        return min(remaining, _SLICE)

    def _wait(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Do what may block, in short waits. TLS too goes on where a wait ended (documented)."""
        while True:
            seconds = self._remaining()
            if self.sock.gettimeout() != seconds:  # to set it is a system call
                self.sock.settimeout(seconds)
            try:
                return operation(*arguments)
            except (TimeoutError, socket.timeout) as error:
                if error.errno:  # keepalive gave up
                    raise

    def receive(self, buffer: Any) -> int:
        count = int(self._wait(self.sock.recv_into, buffer))
        self.received += count
        if self.received > _LONGEST_REPLY:
            raise _TooLong(f"a reply above {_LONGEST_REPLY >> 20} MiB")
        return count

    def _send(self, data: bytes) -> None:
        """Send *data*. An end that closes may have sent its reply before it had read all."""
        rest = memoryview(data)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            while rest:
                rest = rest[self._wait(self.sock.send, rest):]

    def connect(
        self, host: str, tunnel: str, proxy_headers: Mapping[str, str], context: Any
    ) -> None:
        """Connect to *host*, through it to *tunnel* if that names one; with a *context* by TLS."""
        address = urllib.parse.urlsplit("//" + host)
        try:
            port = address.port or (443 if context else 80)
        except ValueError as error:
            raise http.client.InvalidURL(str(error)) from error
        self._connect_to(str(address.hostname), port)
        if tunnel:
            target = urllib.parse.urlsplit("//" + tunnel)
            where = f"{target.hostname}:{target.port or 443}"
            lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}"]
            lines += [f"{name}: {value}" for name, value in proxy_headers.items()]
            self._send("\r\n".join((*lines, "", "")).encode("latin-1"))
            reply = _Reply(self)
            if reply.status != 200:
                raise OSError(f"Tunnel connection failed: {reply.status} {reply.reason}")
            address = target
        if context is not None:
            self.sock = context.wrap_socket(
                self.sock, server_hostname=address.hostname, do_handshake_on_connect=False)
            self._wait(self.sock.do_handshake)

    def _connect_to(self, host: str, port: int) -> None:
        failure = OSError(f"{host} has no address")
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            self.sock = socket.socket(family, kind, protocol)
            try:
                self.sock.setblocking(False)
                self._await_connection(self.sock.connect_ex(address))
            except OSError as error:
                self.close()
                failure = error
                self._remaining()  # raises where it is the deadline that is over
                continue
            with contextlib.suppress(OSError):  # a sandbox may not let us
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _KEEPALIVE:
                    if hasattr(socket, name):
                        self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            return
        raise failure

    def _await_connection(self, code: int) -> None:
        """Wait until the socket is connected. *code*: connect_ex's. OSError: it is refused."""
        limit = time.monotonic() + _CONNECT_TIMEOUT
        with _Selector() as selector:
            selector.register(self.sock, selectors.EVENT_WRITE)
            while code in _IN_PROGRESS:
                if time.monotonic() > limit:
                    raise ConnectionError(f"no connection within {_CONNECT_TIMEOUT:g} s")
                if selector.select(self._remaining()):
                    code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))

    def post(self, selector: str, headers: Mapping[str, str], body: bytes) -> _Reply:
        """Send a request in one piece, and read the head of its reply."""
        lines = [f"POST {selector} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._send("\r\n".join((*lines, "", "")).encode("latin-1") + body)
        return _Reply(self)

    def is_alive(self) -> bool:
        """Whether the server has neither closed this idle connection nor sent anything on it."""
        if time.monotonic() - self.idle_since > _IDLE_CONNECTION:
            return False
        with _Selector() as selector:
            selector.register(self.sock, selectors.EVENT_READ)
            return not selector.select(0)

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()


class _Transport(urllib.request.AbstractHTTPHandler):
    """POST through urllib.request, on the connections that earlier requests left, where it can."""

    def __init__(self, proxies: dict[str, str]) -> None:
        super().__init__()
        self.proxies = proxies
        self._opener = urllib.request.OpenerDirector()  # no redirects, no cookies, no passwords
        self._opener.addheaders = [
            ("User-Agent", f"rollouts/{__version__}"), ("Accept-Encoding", "identity")]
        self._opener.add_handler(urllib.request.ProxyHandler(proxies))
        self._opener.add_handler(self)
        self._lock = threading.Lock()  # protects _idle, _context and _is_closed
        self._idle: dict[tuple[str, str, str], list[_Connection]] = {}
        self._context: Optional[ssl.SSLContext] = None
        self._is_closed = False

    @contextlib.contextmanager
    def post(
        self, url: str, headers: dict[str, str], body: bytes, timeout: float, keep: bool,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[_Reply]:
        """The reply, within *timeout* seconds in all. *keep*: the connection may be used again."""
        self._refuse_socks(url)
        request = _Post(url, body, headers)
        request.deadline, request.is_cancelled = time.monotonic() + timeout, is_cancelled
        reply = self._opener.open(request, timeout=timeout)
        assert isinstance(reply, _Reply)
        connection = reply.connection
        try:
            yield reply
        finally:
            connection.idle_since = time.monotonic()
            with self._lock:
                keep = keep and reply.may_be_kept and not self._is_closed
                if keep:
                    self._idle.setdefault(connection.key, []).append(connection)
            if not keep:
                reply.close()
                connection.close()

    def _refuse_socks(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        proxy = self.proxies.get(parts.scheme, "")
        if proxy.lower().startswith("socks") and not urllib.request.proxy_bypass(parts.netloc):
            name = f"{parts.scheme.upper()}_PROXY"
            raise _SocksProxy(f"{name} names a SOCKS proxy, to which urllib does not speak")

    def close_idle(self, for_good: bool = False) -> None:
        """Close the connections that are idle; *for_good*: and keep none from now on."""
        with self._lock:
            self._is_closed = self._is_closed or for_good
            idle, self._idle = self._idle, {}
        for connection in itertools.chain.from_iterable(idle.values()):
            connection.close()

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        assert isinstance(request, _Post) and isinstance(request.data, bytes)
        headers = {name.title(): value for name, value in request.header_items()}
        target = urllib.parse.urlsplit(request.full_url).netloc
        # ProxyHandler makes the proxy the host; to an https address a tunnel leads through it.
        tunnel = target if request.type == "https" and request.host != target else ""
        proxy_headers = {}
        if tunnel and "Proxy-Authorization" in headers:
            proxy_headers["Proxy-Authorization"] = headers.pop("Proxy-Authorization")
        context = self._tls_context() if request.type == "https" else None
        while True:
            key = (request.type, request.host, tunnel)
            kept = self._kept(key)
            connection = kept or _Connection(key)
            connection.begin(request)
            try:
                if kept is None:
                    connection.connect(request.host, tunnel, proxy_headers, context)
                return connection.post(request.selector, headers, request.data)
            except BaseException as error:
                connection.close()
                # Only a kept connection may have been closed before it saw the request. All else
                # is a failed attempt: the retry policy has the say.
                if kept is None or connection.received or not isinstance(error, _CLOSED):
                    raise

    https_open = http_open

    def _tls_context(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:  # costs 20 ms, so one for all
                self._context = ssl.create_default_context()
                self._context.set_alpn_protocols(["http/1.1"])
            return self._context

    def _kept(self, key: tuple[str, str, str]) -> Optional[_Connection]:
        """A kept connection that still works, or None."""
        while True:
            with self._lock:
                idle = self._idle.get(key)
                connection = idle.pop() if idle else None
            if connection is None or connection.is_alive():
                return connection
            connection.close()


# == Pacing ========================================================================================
#
# When a request may start. Time comes in through _clock, which a test replaces.


class _Clock:
    """Where the waits of this module read the time, spend it, and draw their jitter.

    The random numbers are our own, so that a hiccup of the API does not change a seeded experiment.
    """

    now = staticmethod(time.monotonic)
    random = staticmethod(random.SystemRandom().random)

    @staticmethod
    def sleep(seconds: float, is_cancelled: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while (remaining := end - time.monotonic()) > 0 and not is_cancelled():
            time.sleep(min(remaining, _SLICE))


_clock = _Clock()


class _Bucket:
    """The token bucket of one limit: no minute, the first included, sees more starts.

    It holds one second's worth of tokens, and refills so slowly that a minute that begins with all
    of them still keeps the promise; a hundredth slower still, since threads wake late.
    """

    def __init__(self, per_minute: float) -> None:
        whole = math.floor(per_minute) if per_minute > 1 else per_minute
        burst = max(1, int(whole / 60))
        self.gap = 60.6 / (whole - burst + 1)  # seconds for one token
        self.saved = (burst - 1) * self.gap  # seconds that a start may come before its token
        self.next = -math.inf  # when the next token is due
        # Held by the thread that waits for that token; the others queue for it.
        self.turn = threading.Lock()


class _Pacer:
    """When a request to one API may start: after a hold, and as the bucket allows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _hold and reason
        self._hold = -math.inf
        self.reason = ""  # why there is a hold
        self._buckets: dict[float, _Bucket] = {}  # only setdefault is used, which needs no lock

    @property
    def is_held(self) -> bool:
        return self._hold > _clock.now()

    def wait(self, per_minute: Optional[float], is_cancelled: Callable[[], bool]) -> None:
        """Wait until a request may start. _GivenUp where nobody wants it any more."""
        bucket = _Bucket(per_minute or 1)  # a new one has a token: without a limit it is enough
        if per_minute is not None:
            bucket = self._buckets.setdefault(per_minute, bucket)
        with bucket.turn:
            while not is_cancelled():
                now = _clock.now()
                start = max(self._hold, bucket.next - bucket.saved)
                if start <= now:
                    bucket.next = max(bucket.next, now) + bucket.gap
                    return
                _clock.sleep(start - now, is_cancelled)
        raise _GivenUp

    def hold(self, seconds: float, reason: str) -> None:
        """Let nothing start for *seconds*."""
        with self._lock:
            self._hold = max(self._hold, _clock.now() + seconds)
            self.reason = reason


# == Progress ======================================================================================
#
# One line for all that a process generates at once. Workers only count; a thread of its own draws,
# for as long as there is something to show.

# What one line shows: total, done, cached, retrying, waiting, failed, and cost, in US dollars. Also
# calls, those under way, and drawn, 1 where a thread draws it.
_Tally = Counter[str]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _format_progress(tally: _Tally, elapsed: float, width: int, reason: str = "") -> str:
    """The line for *tally* after *elapsed* seconds, in less than *width* columns.

    What matters most comes first. *reason*, why something is retried or waits, is said where
    nothing has been drawn yet, or all that is under way waits.
    """
    done, total, cost = tally["done"], tally["total"], tally["cost"]
    drawn = done - tally["cached"]
    counts = []
    if drawn and elapsed > 0:
        rate = drawn / elapsed
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min"
        counts = [speed, f"{_duration((total - done) / rate)} left"]
    states = ("failed", "retrying", "waiting", "cached")
    counts += [f"{tally[state]} {state}" for state in states if tally[state]]
    if cost:
        counts.append(f"${cost:.4f}" if cost < 1 else f"${cost:.2f}")
    line = f"{done}/{total}"
    for count in counts:
        if len(line) + len(count) + 2 < width:
            line += ", " + count
    if reason and (tally["waiting"] or (tally["retrying"] and not drawn)):
        # Only characters that take one column each, and none that moves the cursor.
        line += ": " + re.sub("[^ -~]", "?", reason)
    room = min(width - len(line) - 4, 30)
    if room >= 5 and total:
        filled = room * done // total
        line = f"[{'#' * filled}{'.' * (room - filled)}] {line}"
    return line[: width - 1]


class _Log:
    """A file, or anything else that is only read later: a line now and then."""

    interval = 30.0  # seconds
    shown = ""  # the latest line

    def width(self) -> int:
        return 200

    def show(self, line: str) -> None:
        """Show *line* in place of the latest; '' takes that away."""
        if line:
            self.say(line)
        self.shown = line

    def say(self, text: str) -> None:
        """Write a line of another kind."""
        self._write(text + "\n")

    @staticmethod
    def _write(text: str) -> None:
        # Closed, or None under pythonw
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
            sys.stderr.flush()


class _Terminal(_Log):
    """A line that is written over. The cursor stays at its beginning, where ^C is echoed too."""

    interval = 0.2  # seconds

    def width(self) -> int:
        """The columns of stderr, and not of stdout, which may be elsewhere."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return os.get_terminal_size(sys.stderr.fileno()).columns or 80
        return 80

    def show(self, line: str) -> None:
        self._write("\r" + line.ljust(len(self.shown)) + "\r")
        self.shown = line

    def say(self, text: str) -> None:
        if self.shown:
            self.show("")
        super().say(text)


class _Notebook(_Log):
    """One output of a cell, changed in place: a saved notebook holds it once."""

    interval = 1.0  # seconds; each time it is a message to the browser
    _handle: Any = None

    def width(self) -> int:
        return 80

    def show(self, line: str) -> None:
        data = {"text/plain": line}
        with contextlib.suppress(Exception):  # IPython's own business
            if self._handle is None:
                display = sys.modules["IPython.display"].display
                self._handle = display(data, raw=True, display_id=True)
            else:
                self._handle.update(data, raw=True)
        self.shown = line


def _view_of(stream: Any) -> _Log:
    """How progress is shown on *stream*."""
    if type(stream).__module__.startswith("ipykernel") and "IPython.display" in sys.modules:
        return _Notebook()
    with contextlib.suppress(AttributeError, ValueError):
        if stream.isatty():
            return _Terminal()
    return _Log()


class _Progress:
    """The line on stderr, and the lines of `verbose` above it."""

    def __init__(self) -> None:
        # Its lock protects all but the counts, and the order of what is written.
        self._ended = threading.Condition()
        # Protects the counts alone: a stopped terminal must not stop workers.
        self._counting = threading.Lock()
        self._pid = os.getpid()
        self._tally = _Tally()
        self._since = 0.0
        self._view = _Log()
        self.reason = ""  # why the latest attempt failed, or why there is a hold

    def _start_afresh_if_forked(self) -> None:
        if self._pid != os.getpid():  # threads that only the parent has may hold the locks
            self.__init__()  # type: ignore[misc]

    def begin(self, total: int, cached: int) -> _Tally:
        """Count *total* samples, *cached* of them done; the tally returned takes what follows."""
        self._start_afresh_if_forked()
        with self._ended:
            if not self._tally["calls"]:
                self._tally, self._since = _Tally(), time.monotonic()
                self._view = _view_of(sys.stderr)
            self.count(self._tally, calls=1, total=total, done=cached, cached=cached)
            return self._tally

    def count(self, tally: _Tally, **more: Any) -> None:
        """Add to the counts of *tally*."""
        with self._counting:
            tally.update(more)
            # A single sample gets no line, unless it waits; a second, of any call, brings it up.
            is_worth_it = tally["total"] > 1 or tally["retrying"] or tally["waiting"]
            if is_worth_it and not tally["drawn"]:
                tally["drawn"] = 1
                drawing = threading.Thread(
                    target=self._draw, args=(tally,), name="rollouts-progress", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread is to be had: no line
                    drawing.start()

    def end(self, unfinished: int) -> None:
        """Take back the *unfinished* samples of a call; with the last call the line goes."""
        with self._ended:
            self.count(self._tally, calls=-1)
            if self._tally["calls"]:
                self.count(self._tally, total=-unfinished)
                return
            if self._view.shown:
                self._show()  # a log keeps it
                self._view.show("")
            self._view = _Log()
            self._ended.notify_all()

    def say(self, text: str) -> None:
        """Write a line of its own."""
        self._start_afresh_if_forked()
        with self._ended:
            self._view.say(text)

    def _show(self) -> None:
        elapsed = time.monotonic() - self._since
        line = _format_progress(self._tally, elapsed, self._view.width(), self.reason)
        self._view.show(line)

    def _draw(self, tally: _Tally) -> None:
        """Draw until the calls that *tally* counts have ended."""
        with self._ended:
            while not self._ended.wait_for(lambda: not tally["calls"], self._view.interval):
                self._show()


_progress = _Progress()


# == Caches ========================================================================================
#
# Two stores, the same three methods: get, which adds a line to a list of the caller's for each
# entry that it cannot use; put, which raises OSError; and close. A lack of file descriptors is an
# OSError of both. A store knows nothing of what is under way.


def _dumped(response: Response) -> str:
    """*response* as a cache holds it."""
    data = response.to_dict()
    del data["cached"], data["full"]
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a token that was cut
        text = json.dumps(data)
    return text


def _loaded(text: bytes, seed: int) -> Response:
    """The response that a cache holds for *seed*. ValueError for anything else."""
    data = _dict(json.loads(text))
    if data.get("seed") != seed:
        raise ValueError(f"no response of seed {seed}")
    response = Response.from_dict({**data, "cached": True})
    problem = _why_not_whole(response)
    if problem:
        raise ValueError(problem)
    return response


class _JsonCache:
    """A file a response: …/model/parameters/abc/abc…/seed_00000.json, beside request.json."""

    def __init__(self, cache_dir: str) -> None:
        self._directory = cache_dir

    def _place(self, key: tuple[str, str, str]) -> str:
        model, parameters, prompt = key
        return f"{self._directory}/{model}/{parameters}/{prompt[:3]}/{prompt}"

    def get(
        self, request: _Request, seeds: Sequence[int], unusable: list[str]
    ) -> dict[int, Response]:
        """The stored responses of *seeds*."""
        found: dict[int, Response] = {}
        place = self._place(request.key)
        if not os.path.isdir(place):
            return found  # one look for a prompt that is new, not one a seed
        for seed in seeds:
            path = f"{place}/seed_{seed:05d}.json"
            try:
                with open(path, "rb", buffering=0) as file:
                    found[seed] = _loaded(file.read(), seed)
            except FileNotFoundError:
                pass
            except (OSError, ValueError, RecursionError) as error:
                if _is_scarcity(error):
                    raise
                unusable.append(f"{path}: {error}")
        return found

    def put(self, request: _Request, response: Response) -> None:
        """Store *response* so that it is there whole, or not at all."""
        place = self._place(request.key)
        if not os.path.exists(f"{place}/request.json"):
            os.makedirs(place, exist_ok=True)
            text = json.dumps(request.stored, indent=1, sort_keys=True)
            self._write(place, "request.json", text)
        self._write(place, f"seed_{response.seed:05d}.json", _dumped(response))

    @staticmethod
    def _write(place: str, name: str, text: str) -> None:
        # The draft's name is new on every machine that shares the directory. No fsync: this is
        # proof against a killed process, not against a power cut, after which a damaged entry is a
        # miss.
        draft = f"{place}/.{os.urandom(8).hex()}.tmp"
        try:
            with open(draft, "xb") as file:
                file.write(text.encode())
            os.replace(draft, f"{place}/{name}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(draft)
            raise

    def close(self) -> None:
        """Nothing is held open."""


class _SqlCache:
    """cache_dir/rollouts.sqlite3: the same, in two tables."""

    _SETUP = """
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = NORMAL;
        CREATE TABLE IF NOT EXISTS requests (
            id TEXT PRIMARY KEY, request TEXT NOT NULL
        ) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS responses (
            request TEXT NOT NULL, seed INTEGER NOT NULL, response TEXT NOT NULL,
            PRIMARY KEY (request, seed)
        ) WITHOUT ROWID;"""

    def __init__(self, cache_dir: str) -> None:
        import sqlite3  # which few scripts need

        self._sqlite3 = sqlite3
        self._path = os.path.join(cache_dir, "rollouts.sqlite3")
        # Protects what follows: a connection serves one thread at a time.
        self._lock = threading.Lock()
        self._connection: Any = None
        self._file: Any = ""  # which one the connection is to; "" where it is of no use
        self._is_closed = False

    def _identity(self) -> Any:
        """What tells the file from one that took its place: whoever clears the cache deletes it.

        Without it another process that makes the file anew would leave this one writing into the
        old.
        """
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self._path)[1:3]  # inode and device
        return None

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """The kept connection, to the file that is there now. OSError where there can be none."""
        with self._lock:
            try:
                if self._file != self._identity():
                    self._connect()
                yield self._connection
            except self._sqlite3.Error as error:
                with contextlib.ExitStack() as probes:  # says so where descriptors have run out
                    for _ in range(4):  # as many as SQLite opens for itself
                        probes.enter_context(open(os.devnull, "rb", buffering=0))
                code = errno.EBUSY if "locked" in str(error) else errno.EIO
                raise OSError(code, str(error), self._path) from error
            finally:
                if self._is_closed:  # a response that was in flight then
                    self._disconnect()

    def _connect(self) -> None:
        self._disconnect()
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        self._connection = self._sqlite3.connect(
            self._path, timeout=60, isolation_level=None, check_same_thread=False)
        self._connection.executescript(self._SETUP)
        # So that one damaged text does not fail a whole query.
        self._connection.text_factory = bytes
        self._file = self._identity()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._file = ""

    def get(
        self, request: _Request, seeds: Sequence[int], unusable: list[str]
    ) -> dict[int, Response]:
        """The stored responses of *seeds*, which follow each other."""
        found: dict[int, Response] = {}
        if not os.path.exists(self._path):
            return found
        try:
            with self._connected() as connection:
                rows = connection.execute(
                    "SELECT seed, response FROM responses"
                    " WHERE request = ? AND seed BETWEEN ? AND ?",
                    ("/".join(request.key), seeds[0], seeds[-1])).fetchall()
        except OSError as error:
            if _is_scarcity(error):
                raise
            unusable.append(str(error))
            return found
        for seed, text in rows:
            try:
                found[seed] = _loaded(text, seed)
            except (ValueError, TypeError, RecursionError) as error:
                unusable.append(f"{self._path}: seed {seed}: {error}")
        return found

    def put(self, request: _Request, response: Response) -> None:
        """Store *response* in one transaction."""
        key, text = "/".join(request.key), _dumped(response)
        with self._connected() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            known = connection.execute("SELECT 1 FROM requests WHERE id = ?", (key,)).fetchone()
            if known is None:
                stored = json.dumps(request.stored, sort_keys=True)
                connection.execute("INSERT INTO requests VALUES (?, ?)", (key, stored))
            connection.execute(
                "INSERT OR REPLACE INTO responses VALUES (?, ?, ?)", (key, response.seed, text))

    def close(self) -> None:
        """Close the connection. What still comes is stored over one of its own."""
        with self._lock:
            self._is_closed = True
            self._disconnect()


# == Calls =========================================================================================
#
# A call is owned by whoever made it: its thread, or its event loop, submits samples, takes what is
# done from a queue, records it, and submits the next. So its state needs no lock. What the threads
# that draw share with it is a _Sample.

_PATIENCE = 20  # refusals in a row; with this many more samples lost, it is not bad luck any more
# Too long, or refused for what it says: that does not hold for other prompts.
_PROMPT_STATUSES = (400, 403, 413, 422)
_SAME_TEXTS = 5  # samples; as many that are one text are no independent draws,
_SAME_TOKENS = 50  # tokens; if it is longer than that
_LONG_PROMPT = 4000  # characters; below it servers' counts say little
_SPARSE = 8  # characters a token; no tokenizer packs more of a text into one

_Outcome = Union[Response, APIError]
_Cache = Union[_JsonCache, _SqlCache]


class _Verdicts:
    """What has succeeded and what was refused, and so what may still be sent.

    A refusal (an error that no retry mends) has a scope: of the statuses 400, 403, 413 and 422 the
    prompt, else the call. It stops its scope while nothing there has succeeded; after that it is
    one sample's bad luck, and only more than 20 in a row stop the scope. For a prompt a cached
    sample is a success, for the call only one that was drawn.
    """

    def __init__(self) -> None:
        self._succeeded: set[Optional[int]] = set()  # prompts by number, None for the call
        self._in_a_row: Counter[Optional[int]] = Counter()  # refusals since the last success
        self._latest: dict[Optional[int], APIError] = {}

    def record(self, prompt: int, outcome: _Outcome) -> None:
        """Note what came of a sample of *prompt*."""
        if isinstance(outcome, Response):
            for scope in (prompt,) if outcome.cached else (prompt, None):
                self._succeeded.add(scope)
                self._in_a_row[scope] = 0
        elif not outcome.retryable:
            scope = prompt if outcome.status in _PROMPT_STATUSES else None
            self._in_a_row[scope] += 1
            self._latest[scope] = outcome

    def why_stopped(self, prompt: Optional[int] = None) -> Optional[APIError]:
        """The refusal that stops *prompt*, or the whole call; None where samples may be sent."""
        for scope in {prompt, None}:
            if self._in_a_row[scope] > (_PATIENCE if scope in self._succeeded else 0):
                return self._latest[scope]
        return None


def _is_interactive() -> bool:
    return hasattr(sys, "ps1")


def _exits_by_interrupt() -> bool:
    """Whether an uncaught KeyboardInterrupt ends the process."""
    return getattr(sys, "last_type", None) is KeyboardInterrupt and not _is_interactive()


class _Sample:
    """A sample under way, shared by every call that asks for the very same."""

    def __init__(self, key: Hashable, call: Any, index: int, seed: int) -> None:
        self.key = key
        self.call, self.index, self.seed = call, index, seed  # the _Call that draws it
        self.waiting = [(call, index)]  # all that wait for it
        self.future: Future[Optional[_Outcome]] = Future()  # None: nobody wanted it any more
        self.notes: list[tuple[str, str]] = []  # (kind, text) of what the call is to warn

    def is_unwanted(self) -> bool:
        """Whether no call waits for it: it is not sent, nor again."""
        return _exits_by_interrupt() or all(
            call.is_over or call.verdicts.why_stopped(index) for call, index in self.waiting)

    def is_given_up(self) -> bool:
        """Whether its reply, if on its way, is not even wanted for the cache."""
        return _exits_by_interrupt() or all(call.is_given_up() for call, _ in self.waiting)


def _are_one_text(rollouts: Rollouts, fresh: Sequence[Response]) -> bool:
    """Whether many samples that should differ are the same long text."""
    if len(fresh) < _SAME_TEXTS or rollouts.temperature == 0:
        return False
    if len({each.full for each in fresh}) > 1:
        return False
    return min(each.usage.completion_tokens for each in fresh) > _SAME_TOKENS


class _Call:
    """One call: what it asked for, what came of it, and what may still be sent."""

    def __init__(
        self, config: Config, api: _Api, cache: Optional[_Cache], requests: list[_Request], n: int
    ) -> None:
        self.config, self.api, self.cache, self.requests = config, api, cache, requests
        first = config.seed or 0
        self.seeds = range(first, first + n)
        self.outcomes: list[dict[int, _Outcome]] = [{} for _ in requests]
        self.verdicts = _Verdicts()
        self.in_flight = 0
        self.is_over = self.was_interrupted = False
        self.loop: Optional[asyncio.AbstractEventLoop] = None  # of agenerate()
        self.wakeup: Callable[[], Any] = bool  # called in that loop when a sample is done
        self.notes: dict[str, list[str]] = {"unusable": [], "unwritten": [], "server": []}
        self.tally: Optional[_Tally] = None
        self._done: queue.SimpleQueue[tuple[int, int, _Sample]] = queue.SimpleQueue()
        self._waiting = deque((index, iter(self.seeds)) for index in range(len(requests)))
        self._stopped: dict[int, Iterator[int]] = {}  # prompts that are refused, and their seeds

    @property
    def total(self) -> int:
        return len(self.requests) * len(self.seeds)

    def is_given_up(self) -> bool:
        """Whether replies that are still on their way serve nobody: see _Sample."""
        is_left = self.loop is not None and self.loop.is_closed() and not _is_interactive()
        return self.is_over and (self.cache is None or self.was_interrupted or is_left)

    def store_found(self, index: int, found: Mapping[int, Response]) -> None:
        """Take what the cache holds of a prompt."""
        self.outcomes[index].update(found)
        for response in found.values():
            self.verdicts.record(index, response)

    def next(self) -> Optional[tuple[int, int]]:
        """(index of its request, seed) of the next sample; None: none may be sent now."""
        while self._waiting and self.verdicts.why_stopped() is None:
            index, seeds = self._waiting[0]
            if self.verdicts.why_stopped(index) is not None:
                # A success of what is in flight may lift that.
                self._stopped[index] = itertools.chain(self._stopped.get(index, ()), seeds)
            else:
                seed = next((seed for seed in seeds if seed not in self.outcomes[index]), None)
                if seed is not None:
                    return index, seed
            self._waiting.popleft()
        return None

    def expect(self, index: int, seed: int, sample: _Sample) -> None:
        """Wait for *sample* too. It arrives in a worker's thread."""
        def arrive(_: Any) -> None:
            self._done.put((index, seed, sample))
            if self.loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    self.loop.call_soon_threadsafe(self.wakeup)

        self.in_flight += 1
        sample.future.add_done_callback(arrive)

    def take(self, seconds: float = 0.0) -> None:
        """Record all that is done, after a wait of up to *seconds* for the first."""
        with contextlib.suppress(queue.Empty):
            self._record(*self._done.get(seconds > 0, seconds or None))
            while True:
                self._record(*self._done.get_nowait())

    def _record(self, index: int, seed: int, sample: _Sample) -> None:
        self.in_flight -= 1
        # Raises a defect of the worker's: it must not vanish with its thread.
        outcome = sample.future.result()
        if outcome is None:  # its scope was stopped meanwhile
            if _exits_by_interrupt():
                raise RolloutsError("the interpreter exits")
            self._waiting.append((index, iter((seed,))))
            return
        is_own = (sample.call, sample.index) == (self, index)
        if not is_own:
            self.say(index, seed, "from the same sample of another call")
        elif sample.notes:
            for kind, text in sample.notes:
                if kind != "server" or text not in self.notes[kind]:  # of a server one says it
                    self.notes[kind].append(text)
        if isinstance(outcome, Response) and not is_own:
            outcome = dataclasses.replace(outcome, cached=True)
        self.outcomes[index][seed] = outcome
        self.verdicts.record(index, outcome)
        if isinstance(outcome, Response):
            if index in self._stopped:
                self._waiting.appendleft((index, self._stopped.pop(index)))
            cost = 0.0 if outcome.cached else outcome.usage.cost
            self.count(done=1, cached=int(outcome.cached), cost=cost)
        else:
            self.count(done=1, failed=1)

    def fail_the_rest(self, problem: str = "") -> None:
        """An error for each sample never sent: *problem*, or the refusal that stopped its scope."""
        for index, seeds in (*self._stopped.items(), *self._waiting):
            refusal = None if problem else self.verdicts.why_stopped(index)
            error = APIError(problem, provider=self.api.name)
            if refusal is not None:
                status = f"HTTP {refusal.status}: " if refusal.status else ""
                why = f"never sent, as seed {refusal.seed} was refused: {status}{refusal.message}"
                error = APIError(why, provider=self.api.name, advice=refusal.advice)
            for seed in seeds:
                if seed not in self.outcomes[index]:
                    self.outcomes[index][seed] = error._with_seed(seed)

    def count(self, **more: float) -> None:
        if self.tally is not None and any(more.values()):
            _progress.count(self.tally, **more)

    def say(self, index: int, seed: int, text: str) -> None:
        sample = f"prompt {index}, seed {seed}" if len(self.requests) > 1 else f"seed {seed}"
        _log.debug("%s: %s", sample, text)
        if self.config.verbose:
            _progress.say(f"rollouts: {sample}: {text}")

    def results(self) -> list[Rollouts]:
        """What the call returns, raises and warns of."""
        outcomes = [each for found in self.outcomes for each in found.values()]
        errors = [each for each in outcomes if isinstance(each, APIError)]
        failure = None
        if errors and len(errors) == len(outcomes) and not self.config.offline:
            was_sent = [
                error for error in errors
                if error.status is not None or not error.message.startswith("never sent")]
            failure = min(was_sent, key=lambda error: error.seed or 0)
        results = [self._rollouts(*each) for each in zip(self.requests, self.outcomes)]
        shortfall = [] if failure or self.config.offline else [str(error) for error in errors]
        # Where warnings are errors, this one must not hide what failed.
        with contextlib.suppress(UserWarning) if failure else contextlib.nullcontext():
            troubles = "; ".join(self._troubles(shortfall))
            for text in filter(None, (troubles, *self.notes["server"], *self._doubts(results))):
                _warn(text)
        if failure is not None:
            raise failure
        return results

    def _rollouts(self, request: _Request, outcomes: Mapping[int, _Outcome]) -> Rollouts:
        ordered = [outcomes[seed] for seed in self.seeds]
        sent = request.body
        return Rollouts(
            request.prompt, [each for each in ordered if isinstance(each, Response)],
            [each for each in ordered if isinstance(each, APIError)], len(self.seeds),
            self.config.model, sent.get("temperature"), sent.get("top_p"), sent.get("max_tokens"),
            self.config.cache_dir if self.cache else None)

    def _troubles(self, shortfall: Sequence[str]) -> Iterator[str]:
        """What went wrong on the way, a sentence for each kind."""
        for texts, what in (
            (shortfall, f"of {self.total} samples failed, mostly with"),
            (self.notes["unusable"],
             "cache entries could not be used and were asked for again, such as"),
            (self.notes["unwritten"], "responses could not be written to the cache"),
        ):
            if texts:
                yield f"{len(texts)} {what}: {Counter(texts).most_common(1)[0][0]}"

    def _doubts(self, results: Sequence[Rollouts]) -> Iterator[str]:
        """What looks wrong with fresh responses that came well, a sentence for each kind."""
        fresh = [[each for each in rollouts if not each.cached] for rollouts in results]
        cut_off = sum(response._is_cut_off for each in fresh for response in each)
        most = self.config.max_tokens
        if cut_off and most == _SETTINGS["max_tokens"].default:
            yield (
                f"{cut_off} thoughts were cut off at the default max_tokens={most}: early prefixes "
                "are cut most, which looks like an effect. Set max_tokens to what the "
                "model needs, such as 16384")
        if any(map(_are_one_text, results, fresh)):
            yield (
                "the samples of a prompt are all the same long text, at a temperature above 0: "
                "does the server decode greedily (do_sample, its seed), or does a response "
                "cache answer?")
        for request, responses in zip(self.requests, fresh):
            counts = [each.usage.prompt_tokens or math.inf for each in responses]
            counted = min(counts, default=math.inf)
            if request.length > _LONG_PROMPT and counted * _SPARSE < request.length:
                yield (
                    f"of a prompt of {request.length} characters the server counted {counted} "
                    "tokens: it dropped a part of it. Raise its context length (num_ctx on Ollama)")
                return


# == Client ========================================================================================
#
# The only room that knows all the others. A call is prepared (pure), looked up in the cache, and
# run; each sample is drawn in _draw and nowhere else.

_SCARCITY = 60.0  # seconds to wait for a file descriptor, before it counts as a failure
_QUESTION = "What is the capital of France?"
# Only a model that goes on writes 8 next. The second must not end in \boxed{ after a sum: a small
# model then writes anything, so that a true continuation reads as none (observed).
_PROBES = {
    "an open thought": "<think>\nBefore I come to that, a quick sum to warm up: 2 x 4 =",
    "a forced answer": "<think>\nI shall count before I answer.\n</think>\n\n1, 2, 3, 4, 5, 6, 7,",
}
_CLIENTS_SEED: Any = ...  # the default of a call's seed, as None means that none is sent
# What a forked child must not close, as it is the parent's: referred to here for ever.
_clients_of_the_parent: list[Any] = []


def _release(
    pid: int, transport: _Transport, caches: dict[Any, _Cache],
    executors: dict[int, ThreadPoolExecutor],
) -> None:
    """Close what is idle. What is in flight finishes."""
    if pid != os.getpid():
        return
    for executor in executors.values():
        executor.shutdown(wait=False)
    transport.close_idle(for_good=True)
    for cache in list(caches.values()):
        cache.close()


def _server_note(request: _Request, config: Config, api: _Api, recognised: Optional[str]) -> str:
    """The warning that a server does not continue an injection in the way it was asked, or ''."""
    name = recognised or api.name
    server = _PROVIDERS.get(name, api.provider)
    if config.endpoint == "completions":
        return "" if server.raw_completions else (
            f"{name} applies its chat template to raw prompts too, and drops the thought: make the "
            "model with TEMPLATE {{ .Prompt }}, or use endpoint='chat'")
    is_way_chosen = recognised is None or config.prefill is not None or not request.injection.text
    if is_way_chosen or server.prefill == "trailing":
        return ""
    if server.prefill is None:
        return (
            f"the server at {api.name} is {name}, which cannot continue a chat: pass "
            "endpoint='completions'")
    if server.prefill == "reasoning_content" and request.injection.thought is None:
        return ""  # that way is one for thoughts
    return (
        f"the server at {api.name} is {name}, which continues an injected text in a way of its "
        f"own: pass provider={name!r}, or prefill={server.prefill!r}")


def _continued(prompt: Prompt, text: str, endpoint: str) -> Prompt:
    """*prompt* with *text* in its open thought, or in a new one."""
    if endpoint == "completions":
        opened = "" if _raw_injection(prompt).is_open else "<think>\n"
        return f"{prompt}{opened}{text}"
    messages = _messages_of(prompt)
    injection = _injection_of(messages)
    begun = "<think>\n"
    if injection is not None:
        if not injection.is_open:
            raise ValueError(
                "prompt takes a question, or one that ends in a thought that is still open")
        begun, messages = injection.text, messages[:-1]
    return [*messages, {"role": "assistant", "content": begun + text}]


def _parts_of(reasoning: Any) -> list[str]:
    """The parts of a thought: its sentences, or those that the user cut."""
    given: Any = reasoning.reasoning if isinstance(reasoning, Response) else reasoning
    parts: Any = [given.rstrip()] if isinstance(given, str) else given
    is_list = isinstance(parts, Sequence) and all(isinstance(part, str) for part in parts)
    is_cut = is_list and (isinstance(given, str) or all(parts))
    if not is_cut or re.search(r"</?think>", "".join(parts)):
        raise ValueError(
            "reasoning takes a thought's text without its tags, a Response that has one, or a list "
            f"of its parts, which are texts that are not empty; not {reasoning!r:.200}")
    return split_sentences(parts[0]) if isinstance(given, str) else list(parts)


class RolloutsClient:
    """Draws samples of prompts from one model.

    Keywords are the settings of `Config`, and any further field of the API's request body
    (`min_p`, `stop`, `response_format`, …), which is sent as it is. All of them are defaults that
    a call may override; None takes a field out of the request. A client serves any number of
    threads and event loops at once, and pickles without its key. ValueError names a bad argument,
    the value it got and what it takes.
    """

    def __init__(
        self, model: str, *, temperature: Optional[float] = Config.temperature,
        top_p: Optional[float] = Config.top_p, max_tokens: Optional[int] = Config.max_tokens,
        top_k: Optional[int] = None, presence_penalty: Optional[float] = None,
        frequency_penalty: Optional[float] = None, seed: Optional[int] = Config.seed,
        provider: Union[str, dict[str, Any], None] = None, base_url: Optional[str] = None,
        endpoint: str = Config.endpoint, api_key: Optional[str] = None,
        use_cache: Union[bool, str] = Config.use_cache, cache_dir: str = Config.cache_dir,
        offline: bool = Config.offline, progress_bar: bool = Config.progress_bar,
        verbose: bool = Config.verbose, requests_per_minute: Optional[float] = None,
        max_concurrency: int = Config.max_concurrency, max_retries: int = Config.max_retries,
        timeout: float = Config.timeout, stream: Optional[bool] = None,
        prefill: Optional[str] = None, **extra: Any,
    ) -> None:
        named = {name: value for name, value in locals().items() if name in _SETTINGS}
        del named["extra"]  # of the same name: keywords that are no settings, or extra={…}
        self._config = _with_settings(Config(model), {**named, **extra})
        if self.use_cache == "sql":
            import sqlite3  # noqa: F401  # before file descriptors may be scarce

        self._start(urllib.request.getproxies())

    def _start(self, proxies: dict[str, str]) -> None:
        """Begin with nothing under way: when new, when unpickled, and in a forked child."""
        self._pid = os.getpid()
        self._lock = threading.Lock()  # protects _in_flight, and the calls of a sample
        self._in_flight: dict[Hashable, _Sample] = {}
        # Of these dicts only setdefault is used, which needs no lock.
        self._executors: dict[int, ThreadPoolExecutor] = {}  # by width
        self._caches: dict[Any, _Cache] = {}
        self._pacers: dict[str, _Pacer] = {}
        self._transport = _Transport(proxies)
        self._is_closed = False
        self._release = weakref.finalize(
            self, _release, self._pid, self._transport, self._caches, self._executors)

    def __getattr__(self, name: str) -> Any:
        if name in _SETTINGS:
            return getattr(self._config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_SETTINGS]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            raise AttributeError(
                f"{name} is fixed: pass {name}=… to a call, or make another client")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        shown = {
            name: value for name, value in self._config.to_dict().items()
            if name != "model" and value != _SETTINGS[name].default and value != {}}
        settings = "".join(f", {name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({self.model!r}{settings})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_config": self._config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start(urllib.request.getproxies())

    def __enter__(self) -> RolloutsClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Send nothing more, close what is idle. What is in flight finishes and is kept."""
        self._is_closed = True
        self._release()

    def generate(
        self, prompt: Prompt, n_samples: int = 1, *, seed: Optional[int] = _CLIENTS_SEED,
        **overrides: Any,
    ) -> Rollouts:
        """Return *n_samples* samples of *prompt*, from the cache or from the API.

        *prompt* is a str or a list of chat messages. Where a str contains "<think>", what comes
        before it is the question, and the model continues what begins there; so it does with a
        list that ends in an assistant message. The samples have the seeds *seed*, *seed* + 1, …
        and come in that order; None sends no seed. *overrides* are settings for this call.

        With endpoint="completions" *prompt* is a str that the model sees as it is, and continues.

        What fails after all retries stands in ``rollouts.errors``, and a warning counts it.
        APIError is raised only where there is nothing to return, not one sample. With offline=True
        nothing is
        sent, raised or warned about: what is not in the cache stands in ``errors``.
        ValueError: an argument is wrong, or the model cannot continue an assistant message.
        """
        return self._run([prompt], n_samples, seed, overrides)[0]

    async def agenerate(
        self, prompt: Prompt, n_samples: int = 1, *, seed: Optional[int] = _CLIENTS_SEED,
        **overrides: Any,
    ) -> Rollouts:
        """Do as generate() does, in an event loop; any number of them may be under way at once.

        Cancelled, it drops what was not sent; what is in flight finishes and is kept in the cache.
        """
        import asyncio

        call = self._prepare([prompt], n_samples, seed, overrides)
        await asyncio.to_thread(self._look_up, call)
        arrived = asyncio.Event()
        call.loop, call.wakeup = asyncio.get_running_loop(), arrived.set
        with self._under_way(call):
            while self._fill(call):
                # A signal does not wake a sleeping loop; a timer does, so that Ctrl-C is seen.
                timer = call.loop.call_later(_SLICE, arrived.set)
                await arrived.wait()
                timer.cancel()
                arrived.clear()
                call.take()
        return call.results()[0]

    def generate_many(
        self, prompts: Iterable[Prompt], n_samples: int = 1, *,
        seed: Optional[int] = _CLIENTS_SEED, **overrides: Any,
    ) -> list[Rollouts]:
        """Return *n_samples* samples of each of *prompts*, all through one queue.

        A prompt that the API refuses (400, 403, 413, 422) fails alone: its samples stand in its
        ``errors``. APIError is raised only where not one sample of any prompt is to be had.
        """
        if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
            raise ValueError("prompts takes a list of prompts; for one prompt there is generate()")
        return self._run(list(prompts), n_samples, seed, overrides)

    def resample(
        self, prompt: Prompt, reasoning: Union[str, Response, Sequence[str]], n_samples: int, *,
        at: Optional[Iterable[int]] = None, suffix: str = "", **overrides: Any,
    ) -> list[Rollouts]:
        """Return, for each i, *n_samples* continuations of the first i parts of *reasoning*.

        *reasoning* is a thought without its tags, which split_sentences() cuts; the Response that
        has it; or a list of parts of your own whose concatenation is the thought. i runs from 0 to
        the number of parts, both included, or over *at*, whose order the results keep. Each says
        which
        it is: ``rollouts.at`` is i, ``rollouts.prefix`` the text of the parts that were kept,
        without white space at its end. Continuations of prefix i are "without" part i, those of
        prefix i + 1 "with" it. *suffix* is added to each prefix: ``"\\n</think>\\n\\nTherefore,
        the final answer is \\\\boxed{"`` forces the answer. Where *prompt* ends in an open thought
        already, *reasoning* goes on from there. Errors: as from generate_many().
        """
        parts = _parts_of(reasoning)
        if not isinstance(suffix, str):
            raise ValueError(f"suffix takes a str, not {suffix!r:.200}")
        if at is not None and (isinstance(at, str) or not isinstance(at, Iterable)):
            raise ValueError(f"at takes a list of integers, not {at!r:.200}")
        in_range = _integer(0, len(parts))
        indices = [in_range("at", index) for index in (range(len(parts) + 1) if at is None else at)]
        # White space is left to what follows, so that the same prefix is the same request.
        prefixes = ["".join(parts[:index]).rstrip() for index in indices]
        endpoint = overrides.get("endpoint", self.endpoint)
        prompts = [_continued(prompt, prefix + suffix, endpoint) for prefix in prefixes]
        results = self.generate_many(prompts, n_samples, **overrides)
        return [
            dataclasses.replace(rollouts, at=index, prefix=prefix)
            for rollouts, index, prefix in zip(results, indices, prefixes)]

    def check_injection(self, **overrides: Any) -> bool:
        """Find out with a few cheap questions whether the model continues what is injected.

        It is asked for a capital, and given the beginning of something else: a thought that stays
        open, and an answer after a closed one. Servers differ in the two. True where both go on;
        where one of them does it is False, and a warning says which. Any 400 or 422 means no where
        the same question without the injection is answered. Many hosts start afresh without saying
        so, and that changes: check a model at a provider before paying for thousands of samples.

        It cannot see an empty thought that the chat template puts before the injected text (Qwen3
        hybrids on vLLM); endpoint="completions" avoids it. APIError: as from generate().
        """
        settings = {"max_tokens": 16, "temperature": 0, **overrides, "use_cache": False}
        settings.setdefault("progress_bar", False)
        config, api = _for_call(self._config, settings)
        if config.endpoint == "chat" and _why_no_continuation(config, api):
            return False
        results = {
            name: self._goes_on(injected, settings) for name, injected in _PROBES.items()}
        if len(set(results.values())) > 1:
            works, fails = sorted(results, key=lambda name: not results[name])
            _warn(f"{self.model} continues {works}, but not {fails}")
        return all(results.values())

    def _goes_on(self, injected: str, settings: dict[str, Any]) -> bool:
        """Whether the model goes on with *injected*."""
        try:
            response = self.generate(f"{_QUESTION}\n\n{injected}", 1, **settings)[0]
        except APIError as error:
            if error.status not in (400, 422):
                raise
            try:
                self.generate(_QUESTION, 1, **settings)
            except APIError:
                raise error from None
            return False
        text = response.content if "</think>" in injected else response.reasoning
        return bool(re.match(r"\W*8\b(?![.,]\d)", text or ""))

    def _run(
        self, prompts: list[Prompt], n_samples: int, seed: Any, overrides: dict[str, Any]
    ) -> list[Rollouts]:
        """The blocking twin of agenerate()."""
        call = self._prepare(prompts, n_samples, seed, overrides)
        self._look_up(call)
        with self._under_way(call):
            while self._fill(call):
                call.take(_SLICE)
        return call.results()

    def _prepare(
        self, prompts: list[Prompt], n_samples: int, seed: Any, overrides: dict[str, Any]
    ) -> _Call:
        """Check the arguments and make the requests: no I/O."""
        if self._pid != os.getpid():  # forked
            _clients_of_the_parent.append((self._transport, self._caches, self._executors))
            self._release.detach()
            self._start(self._transport.proxies)
        if self._is_closed:
            raise RolloutsError("the client is closed")
        n_samples = _integer(1, 10**9)("n_samples", n_samples)
        if seed is not _CLIENTS_SEED:
            overrides["seed"] = seed
        config, api = _for_call(self._config, overrides)
        _integer(0)("seed + n_samples - 1", (config.seed or 0) + n_samples - 1)
        if config.offline and not config.use_cache:
            raise ValueError("offline=True takes what is in the cache: not with use_cache=False")
        cache = None
        if config.use_cache:
            store: type[_Cache] = _SqlCache if config.use_cache == "sql" else _JsonCache
            where = os.path.abspath(config.cache_dir)
            key = (store, where)
            cache = self._caches.get(key) or self._caches.setdefault(key, store(where))
        requests = [_request_of(prompt, config, api) for prompt in prompts]
        return _Call(config, api, cache, requests, n_samples)

    def _look_up(self, call: _Call) -> None:
        """Take from the cache what is there."""
        if call.cache is None:
            return
        unusable = call.notes["unusable"]
        for index, request in enumerate(call.requests):
            get = functools.partial(call.cache.get, request, call.seeds, unusable)
            try:
                found = self._patiently(get, bool)
            except OSError as error:  # to pay again for what is there would be worse
                raise RolloutsError(f"the cache cannot be read just now: {error}") from error
            call.store_found(index, found)
            for seed in found if call.config.verbose else ():
                call.say(index, seed, "from the cache")

    def _patiently(self, operation: Callable[[], Any], is_cancelled: Callable[[], bool]) -> Any:
        """Do *operation*; under a passing lack, close idle connections, wait and try again."""
        limit = time.monotonic() + _SCARCITY
        while True:
            try:
                return operation()
            except OSError as error:
                if not _is_scarcity(error) or time.monotonic() > limit:
                    raise
            if is_cancelled():
                raise _GivenUp
            self._transport.close_idle()
            time.sleep(0.01 + 0.04 * _clock.random())  # not all threads at once

    @contextlib.contextmanager
    def _under_way(self, call: _Call) -> Iterator[None]:
        """Show *call* as under way; it is over with the block, however that ends."""
        done = sum(map(len, call.outcomes))
        if call.config.offline:
            call.fail_the_rest("not in the cache, and offline=True sends nothing")
        elif done < call.total and call.config.progress_bar:
            call.tally = _progress.begin(call.total, done)
        try:
            yield
        except KeyboardInterrupt:
            call.was_interrupted = not _is_interactive()
            raise
        finally:
            call.is_over = True
            if call.tally is not None:
                _progress.end(call.total - sum(map(len, call.outcomes)))

    def _fill(self, call: _Call) -> bool:
        """Submit samples of *call* up to its width; False where it has come to its end."""
        if call.config.offline:
            return False
        while call.in_flight < call.config.max_concurrency and not self._is_closed:
            job = call.next()
            if job is None:
                break
            self._submit(call, *job)
        if self._is_closed:
            raise RolloutsError("the client was closed")
        if not call.in_flight:
            call.fail_the_rest()
        return call.in_flight > 0

    def _submit(self, call: _Call, index: int, seed: int) -> None:
        """Let a thread draw a sample, or wait for the one that draws the same already."""
        request, api, config = call.requests[index], call.api, call.config
        key = (id(call.cache), api.key, request.url, request.key, seed, config.max_retries)
        with self._lock:
            sample = self._in_flight.get(key) if call.cache else None
            if sample is not None:
                sample.waiting.append((call, index))
                call.expect(index, seed, sample)
                return
            sample = _Sample(key if call.cache else object(), call, index, seed)
            self._in_flight[sample.key] = sample
        width = config.max_concurrency
        executor = self._executors.get(width) or self._executors.setdefault(
            width, ThreadPoolExecutor(width, "rollouts"))
        try:
            # Known before it is submitted: Ctrl-C may arrive within submit.
            call.expect(index, seed, sample)
            executor.submit(self._draw, sample)
        except BaseException as error:
            # Where the system has no more threads, those that there are draw it: it is in their
            # queue.
            why = str(error) if isinstance(error, RuntimeError) else ""
            if "start new thread" in why and call.in_flight > 1:
                return
            self._finish(sample, RolloutsError(f"the sample was not sent: {error}"))
            if "shutdown" in why:
                raise RolloutsError("the client was closed, or the interpreter exits") from error
            raise

    def _finish(self, sample: _Sample, outcome: Union[_Outcome, BaseException, None]) -> None:
        with self._lock:
            self._in_flight.pop(sample.key, None)
        if sample.future.done():
            return
        if outcome is None or isinstance(outcome, (Response, APIError)):
            sample.future.set_result(outcome)
        else:
            sample.future.set_exception(outcome)

    def _draw(self, sample: _Sample) -> None:
        """Draw a sample, in a thread of its own."""
        outcome: Union[_Outcome, BaseException, None] = None
        try:
            # Another call may have finished this very sample since ours looked it up.
            outcome = self._stored(sample) or self._attempts(sample)
        except _GivenUp:
            with self._lock:  # a call that joins in just now would wait in vain
                is_unwanted = sample.is_unwanted()
                if is_unwanted:
                    self._in_flight.pop(sample.key, None)
            if not is_unwanted:
                self._draw(sample)
                return
        except BaseException as error:
            outcome = error
        self._finish(sample, outcome)

    def _stored(self, sample: _Sample) -> Optional[Response]:
        call, request = sample.call, sample.call.requests[sample.index]
        if call.cache is None:
            return None
        get = functools.partial(call.cache.get, request, (sample.seed,), [])
        found: dict[int, Response] = self._patiently(get, sample.is_unwanted)
        if found:
            call.say(sample.index, sample.seed, "from the cache")
        return found.get(sample.seed)

    def _attempts(self, sample: _Sample) -> _Outcome:
        """One sample, drawn and kept, in as many attempts as it takes. _GivenUp: unwanted."""
        call, api = sample.call, sample.call.api
        say = functools.partial(call.say, sample.index, sample.seed)
        if api.provider.needs_key and not api.key and not api.is_local:
            advice = _advice_of(api, 401).replace("the right key", "one")
            return _failure(api, "no API key", None, False, advice=advice)._with_seed(sample.seed)
        pacer = self._pacers.get(api.base_url) or self._pacers.setdefault(api.base_url, _Pacer())
        for attempt in itertools.count():
            held = int(pacer.is_held)
            if held:
                _progress.reason = pacer.reason
            call.count(waiting=held)
            try:
                pacer.wait(call.config.requests_per_minute, sample.is_unwanted)
            finally:
                call.count(waiting=-held)
            outcome = self._attempt(sample)
            if isinstance(outcome, Response):
                return outcome
            status = f"HTTP {outcome.status}: " if outcome.status else ""
            reason = status + outcome.message
            if outcome.retryable and outcome.retry_after:
                pacer.hold(outcome.retry_after, reason)
            if not outcome.retryable or attempt >= call.config.max_retries:
                say(f"failed: {outcome}")
                return outcome._with_seed(sample.seed)
            wait = _backoff(outcome, attempt, _clock.random())
            say(f"attempt {attempt + 1} failed, the next one in {wait:.1f} s: {outcome}")
            _progress.reason = reason
            call.count(retrying=1)
            _clock.sleep(wait, sample.is_unwanted)
            call.count(retrying=-1)
        raise AssertionError("itertools.count() ended")

    def _attempt(self, sample: _Sample) -> _Outcome:
        """What came of one request; a Response is in the cache by then."""
        call, config, api = sample.call, sample.call.config, sample.call.api
        request, begun = call.requests[sample.index], time.monotonic()
        headers = {"Content-Type": "application/json", **api.provider.headers}
        if api.key:
            headers["Authorization"] = f"Bearer {api.key}"
        streamed = _is_streamed(config, api.provider)
        payload = request.payload(sample.seed, streamed)

        def exchange() -> _Body:
            with self._transport.post(
                    request.url, headers, payload, config.timeout, api.provider.keeps_connections,
                    sample.is_given_up) as reply:
                return reply.read_all()

        try:
            body = self._patiently(exchange, sample.is_unwanted)
            response, recognised = _read_reply(api, request, sample.seed, body, streamed)
        except APIError as error:
            return error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            return _connection_error(api, error, config.timeout)
        note = _server_note(request, config, api, recognised)
        if note:
            sample.notes.append(("server", note))
        if call.cache is not None:
            try:
                self._patiently(functools.partial(call.cache.put, request, response), bool)
            except OSError as error:
                sample.notes.append(("unwritten", str(error)))
        tokens, took = response.usage.completion_tokens, time.monotonic() - begun
        ended = f"{tokens} tokens in {took:.1f} s, {response.finish_reason}"
        call.say(sample.index, sample.seed, ended)
        return response


def create_client(model: str, preset: str = "balanced", **settings: Any) -> RolloutsClient:
    """Return a client with the temperature of *preset*, and *settings*, which win over it.

    Presets: deterministic (temperature 0), focused (0.3), balanced (0.7), creative (1.2).
    """
    temperature = _PRESETS[_choice(*_PRESETS)("preset", preset)]
    return RolloutsClient(model, **{"temperature": temperature, **settings})


# == Command =======================================================================================
#
# For shell scripts: a JSON line a response.


def _assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE: the value is JSON, or else text; text where the setting takes nothing else."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(text)
    is_text = name in _SETTINGS and _SETTINGS[name].type in ("str", "Optional[str]")
    with contextlib.suppress(ValueError):
        return name, value if is_text else json.loads(value)
    return name, value


def _main() -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m rollouts", description="Print samples of a prompt, a JSON line each.",
        epilog="The key comes from the environment: <PROVIDER>_API_KEY.")
    parser.add_argument("prompt", help="the prompt, or - for standard input")
    parser.add_argument("-n", "--n-samples", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--model", required=True, help=_SETTINGS["model"].metadata["help"])
    parser.add_argument(
        "-s", metavar="NAME=VALUE", dest="settings", type=_assignment, action="append", default=[],
        help="a setting or a field of the body: " + ", ".join(_SETTINGS))
    arguments = parser.parse_args()
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    try:
        with RolloutsClient(**{"model": arguments.model, **dict(arguments.settings)}) as client:
            rollouts = client.generate(prompt, arguments.n_samples)
        for response in rollouts:
            print(json.dumps(response.to_dict()))
        sys.stdout.flush()
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))  # status 2
    except RolloutsError as error:
        sys.exit(f"rollouts: {error}")  # status 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if rollouts.errors else 0


if __name__ == "__main__":
    sys.exit(_main())
