"""Draw many samples of one prompt from a language model's API, and never pay for one twice.

    from rollouts import RolloutsClient

    client = RolloutsClient("qwen/qwen3-30b-a3b", temperature=0.7)
    rollouts = client.generate("What is 6 x 7?\\n<think>\\n6 x 7 is", n_samples=10)
    print(rollouts.counts(lambda response: response.content.strip()))

A client's calls: generate, agenerate (for event loops), generate_many (prompts), resample (from
each prefix of a thought), check_injection (does the model continue a thought?). Config lists the
settings.

The rooms of this file, in order. Each uses only the rooms above it:

    Basics      values read from foreign JSON, records to write as JSON, and warnings
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
from collections import Counter, defaultdict, deque
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
# A reply may hold any type: the first functions turn any value into one of the expected type.


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
    number = _seconds(value)
    return int(number) if number is not None and number < 2**63 else 0


def _json_copy(value: Any) -> Any:
    """A deep copy of *value* as JSON sees it. ValueError, TypeError: JSON cannot hold it."""
    return json.loads(json.dumps(value, allow_nan=False))


def _plain(value: Any) -> Any:
    """*value* with dicts in place of records, also within a list."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


class _Record:
    """A dataclass that turns into plain values."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names, as plain dicts, lists and values."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: _plain(getattr(self, field.name)) for field in fields}


def _warn(text: str) -> None:
    """Warn at the line that called into this module.

    Python shows the same text once a line. A shortfall must be told each time, so the registry is
    a fresh one.
    """
    frame: Any = inspect.currentframe()
    while frame.f_globals is globals() and frame.f_back is not None:
        frame = frame.f_back
    module = frame.f_globals.get("__name__") or "<unknown>"
    warnings.warn_explicit(
        text, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, registry={})


# == Providers =====================================================================================
#
# The table is the place to extend: a new API is one row here and nothing anywhere else.
# *Documented* and *observed* say how a row's way is known; where neither is said, it is the
# the plain trailing message of most hosted APIs, presumed.


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
    seed: str = "seed"  # the name of that field; "" where it is refused
    no_top_p: Optional[str] = None  # pattern of models that refuse it beside a temperature
    echoes: bool = False  # its replies begin with the injected text
    raw_completions: bool = True  # /completions takes a prompt as it is
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
        no_top_p=r"claude-(?:opus|sonnet|haiku)-(?:4[-.][1-9](?!\d)|[5-9])"),
    "gemini": _Provider(  # refuses `seed` (observed)
        "https://generativelanguage.googleapis.com/v1beta/openai", prefill=None, seed=""),
    "vllm": _Provider(
        "http://localhost:8000/v1", prefill="continue_final_message", needs_key=False),
    # Without the flag it turns the trailing message into one of the user (serving_chat.py, 0.5.23).
    "sglang": _Provider(
        "http://localhost:30000/v1", prefill="continue_final_message", needs_key=False),
    # Observed with build 11434: a thought in `content` comes after an empty, closed one; replies
    # repeat what was injected; each kept connection binds a thread of its small pool for 5 s.
    "llamacpp": _Provider(
        "http://localhost:8080/v1", prefill="reasoning_content", needs_key=False, echoes=True,
        headers={"Connection": "close"}),
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


# What no message shows: a key, and an address in which one may stand.
_SECRET = re.compile(r"(?is)\w*api_key=|\w*base_url=.*[?#@]")


class _Check(NamedTuple):
    """What a setting takes, in words, and the function that converts a value to it, or fails."""

    words: str
    convert: Callable[[Any], Any]

    def __call__(self, name: str, value: Any) -> Any:
        try:
            return self.convert(value)
        except _Refused as error:
            raise ValueError(str(error)) from None
        except (ValueError, TypeError, AttributeError) as error:
            is_secret = _SECRET.match(f"{name}={value}")
            shown = "the value given, which is not shown" if is_secret else f"{value!r:.200}"
            why = f" ({error})" if str(error) else ""
            raise ValueError(f"{name} takes {self.words}, not {shown}{why}") from None


def _takes(words: str) -> Callable[[Callable[[Any], Any]], _Check]:
    """Make a check of a function that converts."""
    return functools.partial(_Check, words)


def _require(condition: object, why: str = "") -> None:
    if not condition:
        raise ValueError(why)


def _require_number(value: Any, kind: type, low: float, high: float) -> None:
    _require(isinstance(value, kind) and not isinstance(value, bool))  # numpy's too
    _require(low <= value <= high)  # NaN fails here


def _number(low: float, high: float, *, above: bool = False) -> _Check:
    def convert(value: Any) -> float:
        _require_number(value, numbers.Real, low, high)
        _require(value > low or not above)
        return float(value)

    start = f"above {low:g} and up" if above else f"from {low:g}"
    return _Check(f"a number {start} to {high:g}", convert)


def _integer(low: int, high: int = 2**63 - 1) -> _Check:
    def convert(value: Any) -> int:
        _require_number(value, numbers.Integral, low, high)
        return int(value)

    end = f"to {high}" if high < 2**62 else "up"
    return _Check(f"an integer from {low} {end}", convert)


def _choice(*options: Any) -> _Check:
    def convert(value: Any) -> Any:
        _require(any(type(each) is type(value) and each == value for each in options))  # True != 1
        return value

    return _Check("one of " + ", ".join(map(repr, options)), convert)


def _optional(check: _Check) -> _Check:
    def convert(value: Any) -> Any:
        return None if value is None else check.convert(value)

    return check._replace(words=f"{check.words}, or None", convert=convert)


_FLAG = _choice(True, False)


@_takes("a model's id such as 'qwen/qwen3-30b-a3b'")
def _model(value: str) -> str:
    _require(isinstance(value, str) and value.strip() and value.isprintable())
    return value.strip()


@_takes("a key of printable ASCII without blanks")
def _api_key(value: str) -> Optional[_Key]:
    _require(isinstance(value, str))
    key = value.strip()
    _require(all("!" <= character <= "~" for character in key))
    return _Key(key) if key else None


@_takes("the name of an API, or OpenRouter's routing object (a dict)")
def _provider(value: Any) -> Union[str, dict[str, Any]]:
    if isinstance(value, Mapping):
        return dict(_json_copy(dict(value)))
    name = str(value).lower()
    _require(name in _PROVIDERS, "known: " + ", ".join(_PROVIDERS))
    return name


@_takes("an address such as 'http://localhost:8080/v1'")
def _base_url(value: str) -> str:
    url = value.strip()
    _require(value.isascii() and url.isprintable() and " " not in url)
    parts = urllib.parse.urlsplit(url)
    _require(parts.scheme in ("http", "https") and parts.hostname)
    has_more = parts.query or parts.fragment or "@" in parts.netloc
    _require(not has_more, "no key, query or fragment in it")
    _require(parts.port != 0 and str(parts.hostname).encode("idna"))
    return url.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")


@_takes("a directory's path")
def _path(value: Any) -> str:
    path: Any = os.path.expanduser(os.fspath(value))
    _require(isinstance(path, str) and path and "\0" not in path)
    # A directory that is really named "~" is a trap for whoever clears it.
    _require(not path.startswith("~"), "whose home directory is that? HOME is not set")
    return str(path)


_NOT_TAKEN = (  # keywords: (pattern, values that do no harm, error, what to do instead)
    (r"(?i:keys?|.*api_?keys?|((api|access|auth)_?)?token|authorization|(.*_)?headers)", (),
     _Refused, "pass a key as api_key; headers cannot be set"),
    (r"n", (None, 1), _Refused, "pass n_samples, as a request draws one sample"),
    (r"messages|prompt", (), _Refused, "pass it as generate's first argument"),
    (r"(top_)?logprobs", (None, False), NotImplementedError,
     "through OpenRouter, providers answer it inconsistently or not at all. Ask a provider's own "
     "API for log probabilities"),
)


@_takes("a dict of further body fields that JSON can hold")
def _extra(value: Mapping[str, Any]) -> dict[str, Any]:
    for name, given in value.items():
        _require(isinstance(name, str))
        for pattern, harmless, error, why in _NOT_TAKEN:
            if re.fullmatch(pattern, name) and given not in harmless:
                raise error(f"{name} is not taken: {why}")
    return dict(_json_copy(dict(value)))


def _setting(default: Any, check: _Check, help: str, *, body: bool = False) -> Any:
    """A field of Config. *help* is shown to users; *body* says that it goes into the request.

    None is taken where it is the default, and for each field of the body, which is then not sent.
    """
    if default is None or body:
        check = _optional(check)
    metadata = {"check": check, "help": help, "body": body}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_sampling = functools.partial(_setting, body=True)


@dataclass(frozen=True)
class Config(_Record):
    """Every setting of a client, checked: ``RolloutsClient(**config.to_dict())``.

    A field that the API reads is left out of the request where it is None, so that the API's own
    default holds. ValueError names the field, the value it got and what it takes.
    """

    model: str = _setting(dataclasses.MISSING, _model, "the model, as its API names it")
    temperature: Optional[float] = _sampling(0.7, _number(0, 2), "sampling temperature")
    top_p: Optional[float] = _sampling(0.95, _number(0, 1), "nucleus sampling: the mass kept")
    max_tokens: Optional[int] = _sampling(4096, _integer(1), "most tokens, thoughts included")
    top_k: Optional[int] = _sampling(None, _integer(-1), "among the k likeliest (-1: off, on vLLM)")
    presence_penalty: Optional[float] = _sampling(
        None, _number(-2, 2), "penalty for a token that occurred")
    frequency_penalty: Optional[float] = _sampling(
        None, _number(-2, 2), "penalty by how often a token occurred")
    seed: Optional[int] = _setting(
        0, _optional(_integer(0)), "seed of the first sample; the next ones count up; None: none")
    provider: Union[str, dict[str, Any], None] = _setting(
        None, _provider, "the API to call (default openrouter), or OpenRouter's routing")
    base_url: Optional[str] = _setting(
        None, _base_url, "any compatible server; default <PROVIDER>_BASE_URL, else the provider's")
    endpoint: str = _setting(
        "chat", _choice("chat", "completions"), "'completions' sends a str prompt as it is")
    api_key: Optional[str] = _setting(None, _api_key, "default <PROVIDER>_API_KEY")
    use_cache: Union[bool, str] = _setting(
        True, _choice(True, False, "json", "sql"), "True or 'json': a file a sample; 'sql': SQLite")
    cache_dir: str = _setting(".rollouts", _path, "where the cache is")
    offline: bool = _setting(
        False, _FLAG, "send nothing: what is not in the cache is an error that says so")
    progress_bar: bool = _setting(True, _FLAG, "show progress on stderr, if of several samples")
    verbose: bool = _setting(False, _FLAG, "say on stderr what each sample did")
    requests_per_minute: Optional[float] = _setting(
        None, _number(0, 1e6, above=True), "most requests started in any minute")
    max_concurrency: int = _setting(100, _integer(1, 10_000), "most requests under way at once")
    max_retries: int = _setting(10, _integer(0, 1000), "attempts after the first")
    timeout: float = _setting(
        600.0, _number(0, 86_400, above=True), "seconds for one attempt, by the clock")
    stream: Optional[bool] = _setting(None, _FLAG, "stream replies; None: if the API needs it")
    prefill: Optional[str] = _setting(
        None, _choice(*_PREFILLS), "how an injection is sent; None: the provider's way")
    extra: dict[str, Any] = _setting(
        dict, _extra, "further fields of the body; further keywords of a client land here")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = setting.metadata["check"](setting.name, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)  # as converted; the class is frozen
        for name in self.extra:
            if name in vars(self):
                raise ValueError(f"extra takes fields of the body; {name} is a setting of its own")


_SETTINGS = {setting.name: setting for setting in dataclasses.fields(Config)}

if Config.__doc__:  # absent under python -OO
    Config.__doc__ = "\n".join([inspect.cleandoc(Config.__doc__), "", *(
        f"{name}: {setting.metadata['help']}. Takes {setting.metadata['check'].words}"
        + ("." if setting.default is dataclasses.MISSING else f"; default {setting.default!r}.")
        for name, setting in _SETTINGS.items())])

# Fields of the body that APIs document, so that none of them is taken for a misspelling. Left out
# are those that are refused (n, logprobs), and those that the nodes of a cluster send each other.
_BODY_FIELDS = frozenset(" ".join((
    # OpenAI: API reference, chat and completions; but for suffix, as resample() has one.
    """audio best_of echo function_call functions logit_bias max_completion_tokens metadata
    modalities moderation parallel_tool_calls prediction prompt_cache_key prompt_cache_options
    prompt_cache_retention reasoning_effort response_format safety_identifier service_tier stop
    store stream_options tool_choice tools user verbosity web_search_options""",
    # OpenRouter: openapi.yaml (ChatRequest); deprecated: include_reasoning, route, usage.
    """cache_control debug deferred_tools image_config include_reasoning min_p models plugins
    reasoning repetition_penalty route session_id stop_server_tools_when top_a trace usage""",
    # The types of the clients of Fireworks, Together, Groq, Cerebras, SambaNova and Mistral.
    """chat_template_kwargs citation_options clear_thinking compliance compound_custom
    context_length_exceeded_behavior disable_reasoning disable_tool_validation do_sample documents
    echo_last exclude_domains grammar_root guardrails ignore_eos images include_domains
    min_completion_tokens min_tokens mirostat_lr mirostat_target model_parameters
    perf_metrics_in_response prompt_cache_isolation_key prompt_logprobs prompt_mode
    prompt_truncate_len random_seed raw_output reasoning_format reasoning_history
    return_raw_tokens return_token_ids safe_prompt safe_tokenization safety_model search_settings
    speculation thinking top_prompt_logprobs typical_p""",
    # API references: Novita, Qwen and SiliconFlow (enable_thinking, thinking_budget), MiniMax.
    "enable_thinking reasoning_split separate_reasoning thinking_budget",
    # vLLM 0.33: protocol.py of chat_completion and completion; guided_*: before 0.12.
    """add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template
    continue_final_message guided_choice guided_grammar guided_json guided_regex
    include_stop_str_in_output length_penalty logprob_token_ids media_io_kwargs mm_processor_kwargs
    priority prompt_embeds repetition_detection request_id return_mm_kwargs return_prompt_text
    return_token_offsets return_tokens_as_token_ids skip_special_tokens
    spaces_between_special_tokens stop_token_ids stream_interval structured_outputs
    thinking_token_budget truncate_prompt_tokens truncation_side use_beam_search vllm_xargs
    watermarking""",
    # SGLang 0.5.23: protocol.py.
    """custom_labels custom_logit_processor custom_params ebnf extra_key images_config input_ids
    json_schema lora_path max_dynamic_patch min_dynamic_patch no_stop_trim regex
    return_cached_tokens_details return_hidden_states return_meta_info return_prompt_token_ids
    return_routed_experts return_sampling_mask return_spec_tokens_details rid
    sampling_logprobs_mode session_params stop_regex stream_reasoning task use_audio_in_video
    video_config watermark""",
    # llama-server: README.md, POST /completion and /v1/chat/completions; top_n_sigma: its source.
    """cache_prompt dry_allowed_length dry_base dry_multiplier dry_penalty_last_n
    dry_sequence_breakers dynatemp_exponent dynatemp_range grammar id_slot lora min_keep mirostat
    mirostat_eta mirostat_tau n_cache_reuse n_cmpl n_indent n_keep n_predict n_probs
    post_sampling_probs reasoning_control repeat_last_n repeat_penalty response_fields
    return_progress return_tokens samplers sse_ping_interval t_max_predict_ms timings_per_token
    top_n_sigma xtc_probability xtc_threshold""",
    # mlx-lm: SERVER.md. LM Studio: ttl, draft_model. Ollama's /v1 has no field of its own.
    """adapters draft_model frequency_context_size num_draft_tokens presence_context_size
    repetition_context_size role_mapping ttl""",
)).split())

# What people call settings, arguments and fields, and what is meant; * stands for the name. A name
# that is close to one of these is found too.
_OTHER_NAMES = """
    api_base api_url azure_endpoint endpoint_url host openai_api_base server_url url: base_url
    deployment_name engine llm model_name model_path pretrained: model
    api backend custom_llm_provider vendor: provider
    allow_fallbacks data_collection ignore max_price only: provider={'*': …}
    order quantizations require_parameters sort zdr: provider={'*': …}
    max_completion_length max_gen_toks max_generation_tokens max_length: max_tokens
    max_new_tokens max_output_tokens max_tokens_to_sample num_predict: max_tokens
    t temp: temperature
    nucleus p: top_p
    freq_penalty: frequency_penalty
    pres_penalty: presence_penalty
    rep_pen rep_penalty: repetition_penalty
    eos stop_sequences stop_strings stop_tokens stop_words until: stop
    effort reasoning_level think thinking_level thinking_mode: reasoning_effort
    json json_mode output_format response_model response_schema schema: response_format
    transforms: plugins=[{'id': 'context-compression'}]
    keep_alive num_ctx options: a setting of the Ollama server, as its /v1 takes none
    additional_kwargs extra_body extra_kwargs extra_params generation_config: extra={…}
    generation_kwargs kwargs model_kwargs params sampling_kwargs sampling_params: extra={…}
    base_seed first_seed random_state rng_seed seed_offset seed_start start_seed: seed
    max_time request_timeout time_limit timeout_seconds: timeout
    max_attempts num_retries retry: max_retries
    batch_size concurrent_requests max_connections max_workers n_jobs: max_concurrency
    num_concurrent num_processes parallelism threads workers: max_concurrency
    qps rate_limit requests_per_second rpm rps: requests_per_minute
    asynchronous is_async use_async: agenerate(…)
    cached caching disk_cache: use_cache
    force force_refresh no_cache overwrite recompute refresh regenerate: use_cache=False
    cache_directory cache_folder cache_path output_dir output_path save_dir: cache_dir
    cache_only dry_run only_cached: offline=True
    disable_tqdm show_progress tqdm use_tqdm: progress_bar
    debug_mode log log_level logging quiet silent verbose_level: verbose
    k n_samples num_completions num_generations num_responses: generate(prompt, n_samples)
    num_return_sequences num_rollouts repeats samples: generate(prompt, n_samples)
    developer_message developer_prompt instructions: a message of the role 'system'
    system system_instruction system_message system_prompt: a message of the role 'system'
    assistant_prefix injection prefix prompt_prefix: a <think> in the prompt, or prefill
    response_prefix thoughts: a <think> in the prompt, or prefill
    chunks cot parts sentences solution steps: resample's second argument
    at chunk_idx index indices positions sentence_idx: resample(at=…)
    suffix: resample(suffix=…)
    preset: create_client(preset=…)
"""


def _bare(name: str) -> str:
    return name.lower().replace("_", "")


# What each of those names means, settings and fields of the body themselves.
_MEANINGS = {_bare(name): name for name in (*_SETTINGS, *_BODY_FIELDS)} | {
    _bare(name): meant.replace("*", name)
    for names, meant in re.findall(r"(.+?): (.+)", _OTHER_NAMES)
    for name in names.split()}


def _warn_of_unknown(name: str) -> None:
    """Warn of a keyword that is neither a setting nor a body field that some API documents."""
    if name in _BODY_FIELDS:
        return
    close = difflib.get_close_matches(_bare(name), _MEANINGS, n=1, cutoff=0.8)
    question = "; if that is meant, pass it in extra={…}"
    if close:
        question = f": did you mean {_MEANINGS[close[0]]}?"
    _warn(
        f"{name} is neither a setting nor a body field that an API documents; it goes into the "
        f"request as it is{question}")


def _with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """*config* with *settings* in place; what is no setting goes into ``extra``."""
    known = dict(settings)
    further = {name: known.pop(name) for name in settings if name not in _SETTINGS}
    own = _extra("extra", known.pop("extra", {}))
    changed = dataclasses.replace(config, **known, extra={**config.extra, **own, **further})
    for name in further:
        _warn_of_unknown(name)
    return changed


_PRESETS = {"deterministic": 0.0, "focused": 0.3, "balanced": 0.7, "creative": 1.2}  # temperatures


# == Errors ========================================================================================
#
# An APIError carries its own policy: `retryable` says whether the same request may yet succeed.


class RolloutsError(Exception):
    """The base of this library's errors. A bad argument is a ValueError instead."""


@dataclass(eq=False)
class APIError(_Record, RolloutsError):
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

    message: str
    status: Optional[int] = None
    provider: str = ""
    seed: Optional[int] = None
    retryable: bool = False
    retry_after: Optional[float] = None
    advice: str = ""

    def __post_init__(self) -> None:
        super().__init__(self.message)  # of which pickle makes it again

    def __str__(self) -> str:
        status = f"HTTP {self.status}" if self.status is not None else ""
        head = " ".join(filter(None, (self.provider, status)))
        advice = f" -> {self.advice}" if self.advice else ""
        return ": ".join(filter(None, (head, self.message))) + advice

    def __repr__(self) -> str:
        plain = APIError(self.message).to_dict()
        details = "".join(
            f", {name}={value!r}" for name, value in self.to_dict().items() if value != plain[name])
        return f"{type(self).__name__}({self.message!r}{details})"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> APIError:
        """The error that to_dict() described."""
        return cls(**data)

    def _with_seed(self, seed: int) -> APIError:
        error = dataclasses.replace(self, seed=seed)
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
# What a call returns. No I/O here.

_Data = TypeVar("_Data")

# What a field takes, by the type of its default; any other takes that type alone.
_TYPES: dict[Any, tuple[type, ...]] = {
    type(dataclasses.MISSING): (str,), type(None): (str, type(None)), float: (int, float)}


@functools.cache
def _types_of(cls: Any) -> dict[str, tuple[type, ...]]:
    types = {field.name: type(field.default) for field in dataclasses.fields(cls)}
    return {name: _TYPES.get(each, (each,)) for name, each in types.items()}


def _from_dict(cls: type[_Data], data: Any) -> _Data:
    """*cls* from a dict whose values are of the fields' types; unknown names are passed over."""
    try:
        if not isinstance(data, Mapping):
            raise TypeError(f"it is of type {type(data).__name__}")
        types = _types_of(cls)  # type: ignore[arg-type]  # a class is hashable
        values = {name: data[name] for name in types if name in data}
        for name, value in values.items():
            if type(value) not in types[name]:
                raise TypeError(f"{name} is of type {type(value).__name__}")
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"not a {cls.__name__}: {error}") from None


@dataclass(frozen=True)
class Usage(_Record):
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
        return Usage(*map(sum, zip(self.to_dict().values(), other.to_dict().values())))

    def __radd__(self, other: int) -> Usage:
        return self if other == 0 else NotImplemented  # where sum() begins

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Usage:
        """The Usage that to_dict() described; ValueError for anything else."""
        return _from_dict(cls, data)


@dataclass(frozen=True)
class Response(_Record):
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
        """The fields by their names, as plain dicts, lists and values, and ``full``."""
        return {**super().to_dict(), "full": self.full}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Response:
        """The Response that to_dict() described; ValueError for anything else."""
        return _from_dict(
            cls, {**_dict(data), "usage": Usage.from_dict(_dict(data).get("usage", {}))})


@dataclass(frozen=True)
class Rollouts(_Record):
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
        notes += f", {len(self.errors)} failed" if self.errors else ""
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
_CLOSING = re.compile(r"</think>(?<!`</think>)(?![`'\"])")  # a literal in front is fast to find
# One without a <think> before it closes a thought that the template opened; it has the beginning or
# the end of a line to itself ("The tag </think> closes a thought." has not).
_LONE_CLOSING = re.compile(r"(?:\A|\n)[ \t]*</think>|</think>[ \t]*(?=\n|\Z)")
_LEADING_BLOCK = re.compile(r"(?s)\s*(?:<think>(.*?)(?:</think>|\Z)|</think>)\s*")

_Split = tuple[str, str, bool]  # (thought, answer, whether the thought is closed)


class _Injection(NamedTuple):
    """The text that the model is to continue, as the user wrote it; '' where there is none."""

    text: str = ""
    thought: Optional[str] = None  # what stands within its tags; None where it has none
    answer: str = ""  # what follows </think>, or all of it where it has no tags
    is_open: bool = False  # it ends within the thought

    @classmethod
    def parse(cls, text: str) -> _Injection:
        if text.rfind("<think>") > text.rfind("</think>"):
            return cls(text, text.rpartition("<think>")[2], is_open=True)
        head, tag, answer = text.rpartition("</think>")
        inside = head.split("<think>", 1)[-1]
        return cls(text, inside if tag else None, answer)


def _is_thought(part: Any) -> bool:
    return _dict(part).get("type") in ("thinking", "reasoning")


def _text_of(content: Any) -> str:
    """The text of *content*: a str, nothing, or a list of parts, of which thoughts are left out."""
    if isinstance(content, list):
        return "".join(
            _text_of(part.get("text") if isinstance(part, dict) else part)
            for part in content if not _is_thought(part))
    return content if isinstance(content, str) else ""


def _thought_in(parts: Any) -> Optional[str]:
    """The text of a list of thoughts, which the parts have under one of three names; else None."""
    if not isinstance(parts, list) or not parts:
        return None
    texts = (
        part.get("thinking") or part.get("text") or part.get("summary")
        for part in map(_dict, parts))
    return "".join(map(_text_of, texts))


def _fields_of(message: Mapping[str, Any]) -> tuple[Optional[str], str]:
    """A message's (thought, content). None: no field that holds a thought, not even an empty one.

    A thought comes under one of two names, as parts of the content, or as OpenRouter's details. A
    blank one hides no other.
    """
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    candidates = (
        message.get("reasoning_content"),
        message.get("reasoning"),
        _thought_in(list(filter(_is_thought, parts))),
        _thought_in(message.get("reasoning_details")))
    texts = [text for text in candidates if isinstance(text, str)]
    first = texts[0] if texts else None
    thought = next((text for text in texts if text.strip()), first)
    return thought, _text_of(content) or _text_of(message.get("refusal"))


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
    if thought:
        content = f"<think>{thought}</think>{content}" if content else f"<think>{thought}"
    return _Injection.parse(content)


def _with_prefill(message: dict[str, Any], injection: _Injection, way: _Prefill) -> dict[str, Any]:
    """The trailing *message* in the form in which a server continues it.

    In a field of its own a thought stands without the white space beside its tags, which the chat
    template puts there. A message that already has such a field, several thoughts, or words before
    the first, stays as it is. What llama.cpp does was observed.
    """
    message = {**way.message, **message}
    content = message.get("content")
    if isinstance(content, list) and all(_dict(part).get("type") == "text" for part in content):
        message["content"] = _text_of(content)  # llama.cpp joins parts with two line breaks
    before, tag, _ = injection.text.rpartition("<think>")
    is_one_thought = tag and not before.strip()
    if not (way.thought and is_one_thought) or message.get("content") != injection.text:
        return message
    thought = (injection.thought or "").removeprefix("\n")
    answer: Any = injection.answer.lstrip("\n")
    if not injection.is_open:
        thought = thought.removesuffix("\n")
    text = {"type": "text", "text": answer}
    if way.thought == "thinking":
        inside = [{"type": "text", "text": thought}]
        part = {"type": "thinking", "thinking": inside, "closed": not injection.is_open}
        return {**message, "content": [part, text] if answer else [part]}
    if injection.is_open:
        thought = thought or "\n"  # llama.cpp renders no turn where both fields are empty
    elif not answer and not way.message:
        answer = [text]  # llama.cpp closes the thought only before a content, which this is
    return {**message, "content": answer, way.thought: thought}


@functools.lru_cache  # all samples of a prompt have the same text
def _echo_pattern(text: str) -> re.Pattern[str]:
    """What matches *text* at the beginning of a reply.

    The white space beside tags is free, as templates and gateways put their own there. An empty
    thought may stand in front: some templates close one before what was injected.
    """
    pieces = re.split(r"\s*(</?think>)\s*", text.strip())
    body = r"\s*".join(map(re.escape, pieces))
    end = re.escape(text[len(text.rstrip()):])
    return re.compile(rf"\s*(?:<think>\s*</think>\s*)?{body}(?:{end})?")


def _after_echo(text: str, echo: str, echoes: bool) -> str:
    """*text* without *echo* at its beginning, if it surely repeats it."""
    is_sure = echoes or "<think>" in echo or len(echo) >= _SURE_ECHO
    match = _echo_pattern(echo).match(text) if is_sure and echo.strip() else None
    return text[match.end():] if match else text


def _without_echo(
    field: Optional[str], content: str, injection: _Injection, echoes: bool
) -> tuple[Optional[str], str]:
    """A message's (thought, content) without the injected text."""
    thought, rest = injection.thought, _after_echo(content, injection.text, echoes)
    if rest != content or thought is None:
        return field, rest
    if field:
        is_empty = echoes and not thought.strip()  # a line break opens it
        begun = field.removeprefix("\n") if is_empty else _after_echo(field, thought, echoes)
        if begun != field and injection.is_open:
            return begun, content
        if begun != field and not begun.strip():  # the echo was split at its tag
            field, echoes = None, True
    following = thought if injection.is_open else injection.answer
    return field, _after_echo(content, following, echoes)


def _is_in_code(before: str) -> bool:
    """Whether a block of code is open at the end of *before*."""
    return before.count("```") % 2 == 1


def _split_at_closing(text: str, is_open: bool) -> _Split:
    """*text* split at the tag that closes a thought; all of it is a thought where there is none.

    A tag in a block of code counts only where nothing else closes a thought that *is_open*: it may
    have left that block open.
    """
    pattern = _CLOSING if is_open else _LONE_CLOSING
    matches = list(pattern.finditer(text))
    within = matches[0] if matches and is_open else None
    outside = (match for match in matches if not _is_in_code(text[:match.start()]))
    match = next(outside, within)
    if match is None:
        return text, "", False
    return text[:match.start()], text[match.end():].lstrip(), True


def _split_at_tags(text: str, is_open: bool) -> Optional[_Split]:
    """*text* split at its tags; None where none counts. *is_open*: the thought was open before.

    A block counts at the beginning, or after a preamble that ends in a line break.
    """
    if "think>" not in text:
        return None
    preamble, tag, inside = text.partition("<think>")
    ends_in_line = preamble.rstrip(" \t").endswith("\n")
    is_apart = ends_in_line and not is_open and not _is_in_code(preamble)
    if tag and (is_apart or not preamble.strip()):
        thought, answer, is_closed = _split_at_closing(inside, True)
        begun = preamble.lstrip() if is_closed else preamble.strip()
        return thought.lstrip(), begun + answer, is_closed
    thought, answer, is_closed = _split_at_closing(text, is_open)
    if not is_closed or (not is_open and len(thought) > len(preamble)):
        return None
    return thought, answer, True


def _read_field(thought: str, content: str) -> _Split:
    """*thought*, which came in a field of its own, and the answer in *content*.

    Of the content nothing but a leading block or tag is cut: llama.cpp's "deepseek-legacy" gives
    the thought twice, in its field and in the content.
    """
    is_closed = bool(content)
    if not content.strip():  # a parser may have missed the tag
        thought, content, has_tag = _split_at_closing(thought, True)
        is_closed = is_closed or has_tag
    block = _LEADING_BLOCK.match(content)
    if block is not None:
        content = content[block.end():]
        is_closed = block[0].rstrip().endswith("</think>")
        if block[1] and block[1].strip() not in thought:
            thought += block[1]
    return re.sub(r"\A\s*<think>\s*", "", thought), content, is_closed  # that tag: it began afresh


def _read_message(
    message: Mapping[str, Any], injection: _Injection, echoes: bool,
    is_answer: Callable[[str, bool], bool],
) -> tuple[Optional[str], str, bool]:
    """A reply's (reasoning, content, completed_reasoning), whatever the server made of it.

    *echoes*: the server repeats what was injected. *is_answer* judges a content without tags after
    an open thought, which may go on with it, by the content and whether the message has a field for
    thoughts.
    """
    field, given = _fields_of(message)
    field, content = _without_echo(field, given, injection, echoes)
    if injection.thought is not None and not injection.is_open:
        # All that came goes on with the forced answer, also where a parser took it for a thought.
        return None, "".join(filter(str.strip, (field or "", content))) or content, True
    if field and field.strip():
        thought, content, is_closed = _read_field(field, content)
        is_closed = is_closed or bool(message.get("tool_calls"))
    elif (split := _split_at_tags(content, injection.is_open)) is not None:
        thought, content, is_closed = split
    elif not injection.is_open:
        return None, content.lstrip() if field else content, True
    elif content == given and is_answer(content, field is not None):
        return "", content.lstrip(), True
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
  | (?P<unspaced> [।॥۔؟｡。！？]+ [”’」』）]* )          # needs no space behind it
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
# Whatever changes a body (a default, an address, a way of prefilling) changes its key, and the
# samples that were paid for under the old one are not found any more.

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
    is_named = isinstance(config.provider, str)
    name = str(config.provider) if is_named else "openrouter"
    provider, base_url = _PROVIDERS[name], config.base_url
    if base_url is not None and not is_named:
        if config.provider is None:  # else OpenRouter's routing at another address
            name = urllib.parse.urlsplit(base_url).netloc
            provider = _Provider(base_url, needs_key=False)
        return _Api(name, base_url, provider, "", config.api_key)
    key_name, url_name = f"{name.upper()}_API_KEY", f"{name.upper()}_BASE_URL"
    base_url = base_url or _base_url(url_name, os.environ.get(url_name) or provider.base_url)
    key = config.api_key or _api_key(key_name, os.environ.get(key_name, ""))
    return _Api(name, base_url, provider, key_name, key)


def _for_call(client: Config, overrides: Mapping[str, Any]) -> tuple[Config, _Api]:
    """The settings of a call and its API: the call's, then the client's.

    A call that names another provider does not inherit the client's base_url; one that goes to
    another address does not inherit its key.
    """
    config = _with_settings(client, overrides)
    is_other = isinstance(config.provider, str) and config.provider != client.provider
    if is_other and "base_url" not in overrides:
        config = dataclasses.replace(config, base_url=None)
    if overrides.get("api_key") is None:
        is_same = _api_of(config).base_url == _api_of(client).base_url
        config = dataclasses.replace(config, api_key=client.api_key if is_same else None)
    return config, _api_of(config)


class _Request(NamedTuple):
    """What is sent for each sample of one prompt."""

    prompt: Prompt  # as it was given
    injection: _Injection
    base_url: str
    body: dict[str, Any]  # all but the seed and the streaming
    seed_name: str  # the field of the seed; "" where none is sent
    streaming: dict[str, Any]  # the fields of the body that ask for a stream
    key: tuple[str, str, str]  # file names: the model, the parameters and their hash, the prompt's

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def url(self) -> str:
        path = "chat/completions" if "messages" in self.body else "completions"
        return f"{self.base_url}/{path}"

    @property
    def stored(self) -> dict[str, Any]:
        """What the key stands for."""
        return {"base_url": self.base_url, **self.body}

    @property
    def length(self) -> int:
        """The characters of the prompt."""
        messages = self.body.get("messages") or [{"content": self.body.get("prompt")}]
        return sum(len(text or "") for message in messages for text in _fields_of(message))

    @property
    def hides_thoughts(self) -> bool:
        exclude = _dict(self.body.get("reasoning")).get("exclude")
        return self.body.get("include_reasoning") is False or exclude is True or (
            self.body.get("reasoning_format") == "hidden")

    def payload(self, seed: int, stream: bool) -> bytes:
        """The body of the request for sample *seed*."""
        further = dict(self.streaming) if stream else {}
        if self.seed_name:
            further[self.seed_name] = seed
        return json.dumps({**self.body, **further}).encode()


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


def _body_of(config: Config, api: _Api) -> dict[str, Any]:
    """The fields of the body that settings make, without what the API refuses."""
    body: dict[str, Any] = {"model": config.model}
    for name, setting in _SETTINGS.items():
        if setting.metadata["body"]:
            body[name] = getattr(config, name)
    pattern = api.provider.no_top_p
    is_refused = pattern and config.temperature is not None and re.search(pattern, config.model)
    if is_refused and config.top_p == Config.top_p:  # the default, which nobody asked for
        del body["top_p"]
    body.update(config.extra)
    if isinstance(config.provider, dict):
        body["provider"] = config.provider
    return body


def _sent(fields: Mapping[str, Any]) -> dict[str, Any]:
    """*fields* without those that are None, which are not sent."""
    return {name: value for name, value in fields.items() if value is not None}


def _key_of(body: Mapping[str, Any], base_url: str, said: str) -> tuple[str, str, str]:
    """The names in the cache of what goes into *body*, and of *said*, the JSON of the prompt."""
    numbers = (("t", "temperature"), ("p", "top_p"), ("n", "max_tokens"))
    label = "".join(f"{short}{body[name]:g}-" for short, name in numbers if name in body)
    hashed = _sha256(json.dumps(base_url) + json.dumps(body, sort_keys=True))
    return (
        _file_name(body["model"]), label + hashed[:_PARAMETER_DIGITS],
        _sha256(said)[:_PROMPT_DIGITS])


def _request_of(prompt: Prompt, config: Config, api: _Api) -> _Request:
    """The request for a sample of *prompt*. ValueError where it cannot be made."""
    body, field, given = _body_of(config, api), "prompt", prompt
    if config.endpoint == "completions":
        injection = _raw_injection(prompt)
    else:
        field, given = "messages", _messages_of(prompt)
        injection, further = _chat_injection(given, config, api)
        body = {**further, **body}
    options = {"include_usage": True} if api.provider.stream_options else None
    streaming = _sent({"stream": True, "stream_options": body.pop("stream_options", options)})
    body = _sent(body)
    try:
        said = json.dumps(given, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompt takes messages that JSON can hold: {error}") from None
    if not isinstance(prompt, str):
        prompt = _json_copy([dict(message) for message in prompt])
    # The user's order of fields is kept: a schema's order is that of the answer's fields.
    return _Request(
        prompt, injection, api.base_url, {**body, field: json.loads(said)},
        "" if config.seed is None else api.provider.seed, streaming,
        _key_of(body, api.base_url, said))


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
# Where a wait is told; the second is LiteLLM's, the others stand in OpenRouter's bodies.
_WAIT_FIELDS = ("retry-after", "llm_provider-retry-after", "retry_after", "retry_after_seconds")

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
        number = _date(value)
    elif number < _UNIX_TIME:
        return number
    elif number >= _UNIX_MILLISECONDS:
        number /= 1000
    return None if number is None else max(0.0, number - now)


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
    fields = itertools.chain(
        headers.items(),
        metadata.items(),
        _dict(metadata.get("headers")).items(),
        _dict(error.get("availability")).items())
    waits = []
    for name, value in fields:
        name = str(name).lower()
        is_time = (_seconds(value) or 0) >= _UNIX_TIME
        if name == "retry-after-ms":
            waits.append(_seconds(value, 0.001))
        elif name in _WAIT_FIELDS or (name == "x-ratelimit-reset" and status == 429 and is_time):
            waits.append(_wait_of(value, now))
    return max((wait for wait in waits if wait is not None), default=None)


def _says(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.I | re.S) is not None


def _is_daily(kinds: str, words: str, is_told: bool) -> bool:
    """Whether a limit lasts for a day or more: by its codes, else by the API's words.

    *is_told*: the API said how long to wait, which counts for more than its words.
    """
    if _says(_DAILY, kinds):
        return True
    if is_told or _says(_SHORT, kinds):
        return False
    return _says(_DAILY_LIMIT, words) or (_says(_DAILY, words) and not _says(_SHORT, words))


def _why_it_lasts(status: int, error: Mapping[str, Any], words: str, wait: Optional[float]) -> str:
    """Advice where a failure that looks like a passing one does not pass within minutes, or ''.

    A stated wait is obeyed even where the message speaks of a daily limit: Groq's waits are short.
    """
    names = ("code", "type", "error_code", "status", "status_code", "details")
    source = _dict(error.get("metadata")).get("limit_source")
    kinds = " ".join(map(str, (*map(error.get, names), source)))
    if _says(_NO_CREDIT, f"{kinds} {words}") or _says(r"\b1113\b|billing", kinds):  # 1113: z.ai
        return "the account has no quota left: add credit"
    if wait is not None and wait > _LONGEST_WAIT:
        why = f"the API asks to wait {wait / 60:.0f} minutes"
    elif status == 429 and _is_daily(kinds, words, wait is not None):
        why = "this limit does not lift within minutes"
    else:
        return ""
    return f"{why}: come back then; what arrived is in the cache"


def _backoff(error: APIError, attempt: int, jitter: float) -> float:
    """Seconds to wait after the failed *attempt* (from 0): full jitter in [0, 1), or as asked."""
    longest = min(_LONGEST_BACKOFF, _BACKOFF * 2.0**min(attempt, 30))
    return max(jitter * longest, error.retry_after or 0.0)


# == Replies =======================================================================================
#
# What came back, read into a Response, or into the APIError that says why it cannot be. Every
# APIError of a request is made here, and none holds the key, not even where a server repeats it.
# The form of a body decides what it is, not its Content-Type.

_MOST_WORDS = 1000  # characters of an API's own words in an error
_LONGEST_REPLY = 64 * 2**20  # bytes, unpacked
_FAILURES = ("error", "network_error", "insufficient_system_resource", "abort")  # finish reasons
_WORD_FIELDS = (  # where APIs put their words
    "error", "errors", "title", "message", "msg", "status_msg", "detail", "error_description",
    "error_message", "error_msg", "html-message", "reason", "description")
_PROXY_ADVICE = "give the proxy its user and password: HTTPS_PROXY=http://user:password@host:port"
_ADVICE = (  # (pattern of the status, what the API's words hold, advice): the first that fits
    ("3..", "", "redirects are not followed: set base_url to the address that answers"),
    ("400", "not appear in the chat",
     "the server's chat template drops or rewrites a part of the injected text: start the server "
     "with another template, or pass endpoint='completions'"),
    ("400", "max_tokens",
     "check max_tokens, which the API names, the parameters, the model's id and the length of the "
     "prompt"),
    ("400", "", "check the parameters, the model's id and the length of the prompt"),
    ("401", "", "pass the right key as api_key=…{or_set}"),
    ("402", "", "add credit to the account, or ask for fewer max_tokens"),
    ("403", "", "the key, the account's limits or the content was refused: see the API's words"),
    ("404", "", "check the model's id, base_url, and what the provider routing leaves over"),
    ("407", "", _PROXY_ADVICE),
    ("413", "", "shorten the prompt"),
    ("422", "", "a field of the request is not known here or out of range: see the API's words"),
    ("429", "", "lower requests_per_minute or max_concurrency, or try again later"),
)


def _advice_of(api: _Api, status: Optional[int], words: str = "") -> str:
    or_set = f" or set {api.key_name}" if api.key_name else ""
    for pattern, sign, advice in _ADVICE:
        if re.fullmatch(pattern, str(status)) and sign in words:
            return advice.format(or_set=or_set)
    return ""


def _without_key(api: _Api, text: str) -> str:
    if not api.key:
        return text
    # Whole words of a short one, such as "x" for a server of one's own.
    edge = r"\b" if len(api.key) < 8 else ""
    return re.sub(edge + re.escape(api.key) + edge, "***", text)


def _failure(
    api: _Api, message: str, status: Optional[int] = None, retryable: bool = True,
    retry_after: Optional[float] = None, advice: Optional[str] = None,
) -> APIError:
    """The APIError with *message*, in one line, cut, and without the key."""
    message = _without_key(api, message)
    message = re.sub(r"\s+", " ", message).strip()
    if advice is None:
        advice = _advice_of(api, status, message)
    if len(message) > _MOST_WORDS:
        message = message[:_MOST_WORDS] + "…"
    return APIError(
        message, status=status, provider=api.name, retryable=retryable, retry_after=retry_after,
        advice=advice)


def _first(value: Any) -> Any:
    """The first of a list, as which some APIs send a body or an error; else *value* itself."""
    return value[0] if isinstance(value, list) and value else value


def _error_in(data: Any) -> dict[str, Any]:
    """The part of a reply that describes an error; empty where it is no JSON object."""
    data = _dict(_first(data))
    inner = (_dict(_first(data.get(name))) for name in ("error", "errors", "base_resp"))
    return next(filter(None, inner), data)


def _fails(data: Mapping[str, Any]) -> bool:
    """Whether a reply of status 200 says that it failed, in one of the many ways of saying so."""
    if data.get("error") or data.get("errors"):
        return True
    if data.get("object") == "error" or data.get("success") is False:
        return True
    if _dict(data.get("base_resp")).get("status_code"):  # MiniMax's; 0 is good
        return True
    is_empty = not data.get("choices") and "usage" not in data
    return is_empty and any(map(data.get, _WORD_FIELDS))


def _said(value: Any) -> str:
    """*value* as words: a str as it is, anything else as JSON with its letters."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _words_of(error: Mapping[str, Any], whole: Any) -> str:
    """The API's own words; where no known field holds them, the *whole* body."""
    metadata = _dict(error.get("metadata"))
    words = [*map(error.get, _WORD_FIELDS), metadata.get("raw"), metadata.get("reasons")]
    text = ": ".join(dict.fromkeys(_said(word) for word in words if word)) or _said(whole)
    upstream = metadata.get("provider_name")
    return f"{text} (from {upstream})" if upstream else text


def _plain_text(page: str) -> str:
    """The words of an HTML page, those that its title and its body share but once."""
    tags = r"(?is)<(?:style|script)\b.*?</(?:style|script)>|<[^>]*>"
    texts = re.split(tags, page[:20_000])
    words = dict.fromkeys(" ".join(text.split()) for text in texts)
    return "an HTML page: " + " ".join(filter(None, words))


class _Body(NamedTuple):
    """A reply as it came: what was received of it, and what cut it short, if anything did."""

    status: int
    headers: Mapping[str, str]  # names in small letters
    content: bytes
    broken: Optional[Exception] = None


def _refusal(api: _Api, body: _Body, data: Any) -> APIError:
    """The APIError for a reply that says that it failed; *data* is its JSON, or its text.

    An error within a 200 counts as the status that it names, or as 502.
    """
    error, status = _error_in(data), body.status
    if 200 <= status < 300:
        named = map(error.get, ("code", "http_status", "status_code", "status"))
        status = next((each for each in map(_count, named) if 400 <= each < 600), 502)
    words = _words_of(error, data or "")
    if 300 <= status < 400:
        words = f"it redirects to {body.headers.get('location')}"
    elif words.lstrip().startswith("<"):
        words = _plain_text(words)
    wait = _retry_after(status, body.headers, error)
    stated = _dict(error.get("availability")).get("retryable")
    is_retryable = stated if isinstance(stated, bool) else _is_retryable(status)
    advice = _why_it_lasts(status, error, words, wait) if is_retryable else ""
    words = words or http.client.responses.get(status, "")
    return _failure(api, words, status, is_retryable and not advice, wait, advice or None)


class _Cause(NamedTuple):
    """What an exception of a *kind* means whose words match *sign*."""

    kind: Any
    sign: str = ""
    advice: str = "check the network, base_url and HTTPS_PROXY"
    is_retryable: bool = True
    words: str = "{error.__class__.__name__}: {error}"


_CAUSES = (  # the first that fits
    _Cause(
        ssl.SSLError, "WRONG_VERSION_NUMBER|HTTP_REQUEST",
        "nothing speaks TLS at this port: does base_url begin with http://?", False),
    # What VERIFY_X509_STRICT, on from Python 3.13, asks of certificates that are trusted.
    _Cause(
        ssl.SSLCertVerificationError, "(?i)Key Identifier|Basic Constraints|key usage|critical",
        "a certificate of the chain lacks what Python 3.13 asks for (RFC 5280, "
        "VERIFY_X509_STRICT): have it reissued, or run an earlier Python", False),
    _Cause(
        ssl.SSLCertVerificationError, "",
        "the certificate is not trusted: point SSL_CERT_FILE to your organisation's certificates; "
        "with python.org's build on macOS run 'Install Certificates.command' once", False),
    # The deadline. Where keepalive gave up, an errno stands in front of the words.
    _Cause(
        (TimeoutError, socket.timeout), r"\A(?!\[)",
        "raise timeout=…, or ask for fewer max_tokens",
        words="no complete reply within {timeout:g} s"),
    _Cause(
        socket.gaierror,
        words="the name in {api.base_url}, or of a proxy, was not resolved: {error}"),
    _Cause(http.client.IncompleteRead, words="the reply broke off"),
    _Cause(
        ConnectionRefusedError, "",
        "is the server running there, and the proxy, if HTTP(S)_PROXY names one?",
        words="{api.base_url} refused the connection"),
    _Cause(OSError, "Tunnel connection failed: 407", _PROXY_ADVICE, False),
    _Cause(OSError, "Tunnel connection failed: [1-4]", "check HTTPS_PROXY and NO_PROXY", False),
    _Cause(_TooLong, "", "ask for fewer max_tokens", words="{error}"),
    _Cause(_SocksProxy, "", "name an HTTP proxy, or set NO_PROXY", False, "{error}"),
    _Cause(Exception),
)


def _connection_error(api: _Api, error: Exception, timeout: float) -> APIError:
    """The APIError for an exception on the way to a reply."""
    said = str(error)
    fitting = (
        each for each in _CAUSES if isinstance(error, each.kind) and re.search(each.sign, said))
    _, _, advice, is_retryable, words = next(fitting)
    if _is_scarcity(error):
        advice = "too many open files: raise 'ulimit -n', or lower max_concurrency"
    words = words.format(error=error, api=api, timeout=timeout)
    failure = _failure(api, words, retryable=is_retryable, advice=advice)
    error.__context__ = None
    if not api.key or api.key not in repr((error, error.args, vars(error))):
        failure.__cause__ = error.with_traceback(None)
    return failure


def _unpacked(body: bytes, encoding: str) -> bytes:
    """*body* without gzip or deflate, which some proxies use unasked.

    Its first bytes decide; only deflate without a header has none that tell.
    """
    has_header = body.startswith((b"\x1f\x8b", b"\x78"))
    if not has_header and "deflate" not in encoding:
        return body
    unpacked, rest = b"", body
    with contextlib.suppress(zlib.error):
        while rest:  # gzip may come in several members
            unpacker = zlib.decompressobj(47 if has_header else -15)  # zlib's code for either form
            unpacked += unpacker.decompress(rest, _LONGEST_REPLY)
            if unpacker.unconsumed_tail or len(unpacked) > _LONGEST_REPLY:
                raise _TooLong(f"a reply above {_LONGEST_REPLY >> 20} MiB")
            rest = unpacker.unused_data
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
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value.strip()
        elif field == "error":
            name, data = field, [value]
        elif not line:
            joined = "\n".join(data).strip()
            if joined == "[DONE]":
                yield joined
                return
            if name == "error" and joined:
                yield {"error": json.loads(joined) if joined.startswith("{") else joined}
            elif joined:
                yield json.loads(joined)
            name, data = "", []


def _message_in(choice: Mapping[str, Any]) -> Optional[dict[str, Any]]:
    """The message of a choice, or the piece of one; raw completions have a text in its place."""
    if isinstance(choice.get("text"), str):
        return {"content": choice["text"]}
    message = choice.get("delta") or choice.get("message")
    return message if isinstance(message, dict) else None


def _message_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The message that the choices of a stream amount to: its texts, and its lists, joined."""
    pieces: dict[str, list[Any]] = {}
    for message in filter(None, map(_message_in, parts)):
        for name, value in message.items():
            if isinstance(value, str):
                pieces.setdefault(name, []).append(value)
            elif isinstance(value, list):
                pieces.setdefault(name, []).extend(value)
    joined: dict[str, Any] = {}
    for name, values in pieces.items():
        is_text = all(isinstance(value, str) for value in values)
        # As JSON sees it, an emoji is one that came in two halves.
        joined[name] = _json_copy("".join(values)) if is_text else values
    return joined


def _assembled(text: str) -> tuple[Any, bool]:
    """(the unstreamed reply that a stream amounts to, whether it came to its end).

    Without any finish_reason a stream is whole where [DONE] came and no chunk carried a null one:
    llama-cpp-python ends an older stream so when another request arrives (observed).
    """
    values: list[Any] = []
    problem = None
    try:
        for value in _events(text):
            values.append(value)
    except ValueError as error:
        problem = error
    is_done = "[DONE]" in values
    events = [_dict(_first(value)) for value in values]
    failed = next(filter(_fails, events), None)
    if failed is not None:
        return failed, True
    lists = (event.get("choices") for event in events)
    parts = [_dict(part) for each in lists if isinstance(each, list) for part in each]
    parts = [part for part in parts if not part.get("index")]
    choice = {
        name: part[name]
        for part in parts for name in ("finish_reason", "error", "usage") if part.get(name)}
    if problem is not None and "finish_reason" not in choice:
        raise problem  # behind the reason nothing of the text is lost
    if values and not any("choices" in event for event in events):
        return values[0], True  # no stream at all, but a body in the form of one
    choice["message"] = _message_of(parts)
    has_null = any(part.get("finish_reason", "") is None for part in parts)
    is_whole = "finish_reason" in choice or "error" in choice or (is_done and not has_null)
    reply = {name: value for event in events for name, value in event.items() if value}
    return {**reply, "choices": [choice]}, is_whole


def _parsed(content: bytes) -> tuple[Any, bool]:
    """(the JSON of a body, put together where it is a stream; whether it is whole). ValueError."""
    text = content.decode().lstrip("\ufeff \t\r\n")
    if re.match(r"(?:data|event|error|id|retry)(?:[:\r\n]|\Z)|:", text):
        return _assembled(text)
    return json.loads(text), True


def _usage_of(data: Mapping[str, Any]) -> Usage:
    """Counts under the names of OpenAI, or of Anthropic; a str of digits counts too.

    With a key of one's own (BYOK) OpenRouter's `cost` is its fee alone; what the upstream charged
    stands in cost_details (documented).
    """
    of_prompt = _dict(data.get("prompt_tokens_details"))
    of_completion = _dict(data.get("completion_tokens_details"))
    cached = of_prompt.get("cached_tokens")
    for name in ("prompt_cache_hit_tokens", "cache_read_input_tokens", "cached_tokens"):
        cached = cached or data.get(name)
    prompt = _count(data.get("prompt_tokens") or data.get("input_tokens"))
    completion = _count(data.get("completion_tokens") or data.get("output_tokens"))
    total = _count(data.get("total_tokens")) or prompt + completion
    cost = _seconds(data.get("cost")) or 0.0
    if data.get("is_byok"):
        details = _dict(data.get("cost_details"))
        cost += _seconds(details.get("upstream_inference_cost")) or 0.0
    thoughts = _count(of_completion.get("reasoning_tokens"))
    return Usage(prompt, completion, total, thoughts, _count(cached), cost)


def _why_not_whole(response: Response) -> str:
    """Why *response*, live or an entry of the cache, is not to be kept; '' where it is."""
    reason = response.finish_reason
    if reason in _FAILURES:
        return f"finish_reason is {reason!r}"
    if response.content or response.reasoning or response.usage.completion_tokens:
        return ""
    return f"an empty reply of no tokens (finish_reason {reason!r})"


def _is_answer(
    request: _Request, finish_reason: Any, vllm_usage: Mapping[str, Any], content: str,
    has_field: bool,
) -> bool:
    """Whether *content* without tags, after an open thought, is the answer.

    A server with a parser takes the tag of a thought away that the model closes at once. Observed:
    a reasoning field that is a str, even an empty one, or vLLM's usage tell of a parser. Elsewhere
    a model that stopped by itself has rather lost its tag than ended within its thought. A text
    that begins with a space goes on with the injected words.
    """
    has_stopped = finish_reason == "stop" and not request.body.get("stop")
    if not (content.strip() or has_stopped):
        return False  # it ended before anything came
    if has_field:
        return True
    if "completion_tokens_details" in vllm_usage:  # an object where there is a parser, else null
        return vllm_usage["completion_tokens_details"] is not None
    if request.hides_thoughts:
        return True
    return has_stopped and not content.startswith((" ", "\t"))


def _read_choice(
    api: _Api, request: _Request, seed: int, body: _Body, whole: Any, streamed: bool
) -> tuple[Response, Optional[str]]:
    """What _read_reply returns, from the *whole* JSON of a reply that came to its end."""
    data = _dict(_first(whole))
    choice = _dict(_first(data.get("choices")))
    error = choice.get("error")
    if error or _fails(data):  # even where a choice that looks good stands beside it
        raise _refusal(api, body, {"error": error} if error else data)
    message = _message_in(choice)
    if message is None:
        words = _words_of(_error_in(whole), whole)
        raise _failure(api, f"a reply without choices: {words}", body.status)
    recognised = None
    if api.name not in _PROVIDERS:
        recognised = _recognised(body.headers, data.get("system_fingerprint"))
    server = recognised or api.name
    # With this flag llama.cpp's streams do not repeat what was injected (observed).
    is_flagged = streamed and "continue_final_message" in request.body
    echoes = _PROVIDERS.get(server, api.provider).echoes and not is_flagged
    usage = _dict(data.get("usage") or choice.get("usage"))  # the latter: Moonshot's streams
    finish_reason = choice.get("finish_reason")
    is_answer = functools.partial(
        _is_answer, request, finish_reason, usage if server == "vllm" else {})
    reasoning, content, is_closed = _read_message(message, request.injection, echoes, is_answer)
    if reasoning == "" and is_closed and request.hides_thoughts:
        reasoning = None
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
    data, is_whole, problem = None, False, None
    is_good = 200 <= body.status < 300
    is_late = isinstance(body.broken, (TimeoutError, socket.timeout, _TooLong))
    is_cut = is_late and "content-length" in body.headers  # more of it was to come
    content = _unpacked(body.content, body.headers.get("content-encoding") or "")
    try:
        data, is_whole = _parsed(content)
        if is_good and is_whole and not is_cut:
            return _read_choice(api, request, seed, body, data, streamed)
    except (ValueError, RecursionError) as error:
        problem = error
    if body.broken is not None and (is_good or is_late):
        raise body.broken
    text = _without_key(api, content.decode(errors="replace").strip())  # before it is cut
    if not is_good:
        raise _refusal(api, body, data if is_whole else text)
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
# How a kept connection fails that the server has closed, and within how many seconds. After more
# the request may have been worked on, and paid for.
_SOON = 2.0
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
        length = self.fields.get("content-length", "")
        self.chunked = self.fields.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.length = None
        if self.status in (204, 304):
            self.length = 0
        elif length.isdecimal() and len(length) < 20 and not self.chunked:
            self.length = int(length)
        connection = self.fields.get("connection", "").lower()
        is_kept = "keep-alive" in connection if version == "HTTP/1.0" else "close" not in connection
        self.will_close = not is_kept or (self.length is None and not self.chunked)

    def _line(self) -> str:
        """A line of the head, without its end. RemoteDisconnected where there is none."""
        line = self.fp.readline(65537)
        if not line:
            raise http.client.RemoteDisconnected("the server closed the connection without a reply")
        if len(line) > 65536:
            raise http.client.LineTooLong("header line")
        return line.decode("iso-8859-1").rstrip("\r\n")

    def receive(self) -> _Body:
        """The body as far as it comes. A stream is over with its [DONE]."""
        pieces: list[bytes] = []
        is_done = False
        left = self.length  # read1 counts it down from Python 3.12 on only
        try:
            if (left or 0) > _LONGEST_REPLY:
                raise _TooLong(f"a reply above {_LONGEST_REPLY >> 20} MiB")
            while left != 0 and (piece := self.read1(min(left or 65536, 65536))):
                pieces.append(piece)
                if left is not None:
                    left -= len(piece)
                elif not is_done and _DONE.search(b"".join(pieces[-2:])):
                    is_done = True
                    self.connection.shorten(_LAST_CHUNK)
            if left:
                raise http.client.IncompleteRead(b"", left)
            self.close()
        except (OSError, http.client.HTTPException) as error:
            if not is_done:
                return _Body(self.status, self.fields, b"".join(pieces), error)
        return _Body(self.status, self.fields, b"".join(pieces))

    def may_be_kept(self) -> bool:
        """Whether the connection can be used again, and the server does not mind its being kept."""
        seconds = re.search(r"timeout=(\d+)", self.fields.get("keep-alive", ""))
        is_short = seconds is not None and int(seconds[1]) < _SHORT_KEEP_ALIVE
        is_short = is_short or self.fields.get("server") == "llama.cpp"
        return self.isclosed() and not self.will_close and not is_short


class _Connection:
    """A socket on which no wait is long, and none outlasts the deadline of the request under way.

    No timeout of a socket can be that deadline: it starts anew with each byte, and OpenRouter pads
    a waiting reply with spaces.
    """

    def __init__(self, key: tuple[str, str, str]) -> None:
        self.key = key
        self.sock: Any = None
        self.idle_since = 0.0

    def begin(self, request: _Post) -> None:
        self._deadline, self._is_cancelled = request.deadline, request.is_cancelled
        self._slice_end = 0.0  # when to look again whether to go on
        self.received = 0  # bytes since the request

    def shorten(self, seconds: float) -> None:
        """End the request under way in *seconds*, if not before."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        self._slice_end = 0.0

    def _next_slice(self) -> float:
        """Seconds of the next wait. TimeoutError: the deadline is over. _GivenUp: nobody waits."""
        if self._is_cancelled():
            raise _GivenUp
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline is over")
        return min(remaining, _SLICE)

    def _wait(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Do what may block, in short waits. TLS too goes on where a wait ended (documented)."""
        while True:
            if time.monotonic() >= self._slice_end:
                seconds = self._next_slice()
                self._slice_end = time.monotonic() + seconds
                if self.sock.gettimeout() != seconds:  # to set it is a system call
                    self.sock.settimeout(seconds)
            try:
                return operation(*arguments)
            except (TimeoutError, socket.timeout) as error:
                if error.errno:  # keepalive gave up
                    raise
                self._slice_end = 0.0

    def receive(self, buffer: Any) -> int:
        count = int(self._wait(self.sock.recv_into, buffer))
        self.received += count
        if self.received > _LONGEST_REPLY:
            raise _TooLong(f"a reply above {_LONGEST_REPLY >> 20} MiB")
        return count

    def _send(self, start: str, headers: Mapping[str, str], body: bytes = b"") -> None:
        """Send a request. A server may reply and close before it has read all: the reply tells."""
        lines = [start, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        rest = memoryview("\r\n".join(lines).encode("latin-1") + body)
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
            address = urllib.parse.urlsplit("//" + tunnel)
            where = tunnel if address.port else f"{tunnel}:443"
            self._send(f"CONNECT {where} HTTP/1.1", {"Host": where, **proxy_headers})
            reply = _Reply(self)
            if reply.status != 200:
                raise OSError(f"Tunnel connection failed: {reply.status} {reply.reason}")
        if context is not None:
            self.sock = context.wrap_socket(
                self.sock, server_hostname=address.hostname, do_handshake_on_connect=False)
            self._wait(self.sock.do_handshake)

    def _connect_to(self, host: str, port: int) -> None:
        failure = OSError(f"{host} has no address")
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            try:
                self.sock = socket.socket(family, kind, protocol)
                self.sock.setblocking(False)
                self._await_connection(self.sock.connect_ex(address))
            except OSError as error:
                self.close()
                failure = error
                self._next_slice()  # raises where it is the deadline that is over
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
        while code in _IN_PROGRESS:
            if time.monotonic() > limit:
                raise ConnectionError(f"no connection within {_CONNECT_TIMEOUT:g} s")
            if self._is_ready(selectors.EVENT_WRITE, self._next_slice()):
                code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))

    def _is_ready(self, event: int, seconds: float) -> bool:
        """Whether the socket can be read from, or written to, within *seconds*."""
        with _Selector() as selector:
            selector.register(self.sock, event)
            return bool(selector.select(seconds))

    def post(self, selector: str, headers: Mapping[str, str], body: bytes) -> _Reply:
        """Send a request in one piece, and read the head of its reply."""
        self._send(f"POST {selector} HTTP/1.1", headers, body)
        return _Reply(self)

    def is_alive(self) -> bool:
        """Whether the server has neither closed this idle connection nor sent anything on it."""
        is_young = time.monotonic() - self.idle_since < _IDLE_CONNECTION
        return is_young and not self._is_ready(selectors.EVENT_READ, 0)

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

    def post(
        self, url: str, headers: dict[str, str], body: bytes, timeout: float,
        is_cancelled: Callable[[], bool],
    ) -> _Body:
        """Send a request, and receive its reply, within *timeout* seconds in all."""
        self._refuse_socks(url)
        request = _Post(url, body, headers)
        request.deadline, request.is_cancelled = time.monotonic() + timeout, is_cancelled
        reply = self._opener.open(request)
        assert isinstance(reply, _Reply)
        connection, is_kept = reply.connection, False
        try:
            received = reply.receive()
            connection.idle_since = time.monotonic()
            with self._lock:
                # A header of ours of that name asks the server to close.
                is_kept = reply.may_be_kept() and not self._is_closed
                is_kept = is_kept and "Connection" not in headers
                if is_kept:
                    self._idle.setdefault(connection.key, []).append(connection)
            return received
        finally:
            if not is_kept:
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
        tunnel, context, proxy_headers = "", None, {}
        if request.type == "https":
            context = self._tls_context()
            tunnel = target if request.host != target else ""
        if tunnel and "Proxy-Authorization" in headers:
            proxy_headers["Proxy-Authorization"] = headers.pop("Proxy-Authorization")
        key = (request.type, request.host, tunnel)
        kept = self._kept(key)
        while True:
            connection = kept or _Connection(key)
            connection.begin(request)
            begun = time.monotonic()
            try:
                if kept is None:
                    connection.connect(request.host, tunnel, proxy_headers, context)
                return connection.post(request.selector, headers, request.data)
            except BaseException as error:
                connection.close()
                # Only a kept connection may have been closed before it saw the request, which
                # shows at once. All else is a failed attempt, and a matter of the retry policy.
                was_closed = isinstance(error, _CLOSED) and not connection.received
                if kept is None or not was_closed or time.monotonic() - begun > _SOON:
                    raise
                kept = None

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
# When a request may start. Its time comes in through _clock, which a test replaces.


class _Clock:
    """Where pacing and backoff read the time, spend it, and draw their jitter.

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
    nothing has been drawn yet, or something under way waits.
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
        # It may be closed, or None (under pythonw).
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

    def _do(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """What *work* returns, given a connection to the file that is there now. OSError: why not.

        What SQLite lacked it does not say, and it may be there again by now: so it is tried twice.
        """
        with self._lock:
            try:
                for is_last in (False, True):
                    try:
                        if self._file != self._identity():
                            self._connect()
                        return work(self._connection)
                    except self._sqlite3.Error as error:
                        self._disconnect()
                        self._raise_if_scarce(str(error))
                        if is_last:
                            raise OSError(errno.EIO, str(error), self._path) from error
            finally:
                if self._is_closed:  # a response that was in flight then
                    self._disconnect()

    def _raise_if_scarce(self, words: str) -> None:
        """OSError where another process locks the database, or descriptors have run out."""
        if "locked" in words:
            raise OSError(errno.EBUSY, words, self._path)
        with contextlib.ExitStack() as probes:
            for _ in range(4):  # as many as SQLite opens for itself
                probes.enter_context(open(os.devnull, "rb", buffering=0))

    def get(
        self, request: _Request, seeds: Sequence[int], unusable: list[str]
    ) -> dict[int, Response]:
        """The stored responses of *seeds*, which follow each other."""
        def rows(connection: sqlite3.Connection) -> list[Any]:
            return connection.execute(
                "SELECT seed, response FROM responses WHERE request = ? AND seed BETWEEN ? AND ?",
                ("/".join(request.key), seeds[0], seeds[-1])).fetchall()

        found: dict[int, Response] = {}
        if not os.path.exists(self._path):
            return found
        try:
            stored = self._do(rows)
        except OSError as error:
            if _is_scarcity(error):
                raise
            unusable.append(str(error))
            return found
        for seed, text in stored:
            try:
                found[seed] = _loaded(text, seed)
            except (ValueError, TypeError, RecursionError) as error:
                unusable.append(f"{self._path}: seed {seed}: {error}")
        return found

    def put(self, request: _Request, response: Response) -> None:
        """Store *response* in one transaction."""
        key, text = "/".join(request.key), _dumped(response)

        def store(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                is_known = "SELECT 1 FROM requests WHERE id = ?"
                if connection.execute(is_known, (key,)).fetchone() is None:
                    stored = json.dumps(request.stored, sort_keys=True)
                    connection.execute("INSERT INTO requests VALUES (?, ?)", (key, stored))
                connection.execute(
                    "INSERT OR REPLACE INTO responses VALUES (?, ?, ?)", (key, response.seed, text))

        self._do(store)

    def close(self) -> None:
        """Close the connection. A later put opens and closes one of its own."""
        with self._lock:
            self._is_closed = True
            self._disconnect()


# == Calls =========================================================================================
#
# A call is owned by whoever made it: its thread, or its event loop, submits samples, takes what is
# done from a queue, records it, and submits the next. So its state needs no lock. What the threads
# that draw share with it is a _Sample.

_PATIENCE = 20  # more refusals in a row than this stop their scope, also after a success
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
    one sample's bad luck, and only more than 20 in a row stop the scope. A cached sample counts as
    a success of its prompt, not of the call.
    """

    def __init__(self) -> None:
        # Scopes are prompts by their numbers, and None for the call.
        self._succeeded: set[Optional[int]] = set()
        self._refusals: dict[Optional[int], list[APIError]] = {}  # since the latest success

    def record(self, prompt: int, outcome: _Outcome) -> None:
        """Note what came of a sample of *prompt*."""
        if isinstance(outcome, Response):
            for scope in (prompt,) if outcome.cached else (prompt, None):
                self._succeeded.add(scope)
                self._refusals.pop(scope, None)
        elif not outcome.retryable:
            scope = prompt if outcome.status in _PROMPT_STATUSES else None
            self._refusals.setdefault(scope, []).append(outcome)

    def why_stopped(self, prompt: Optional[int] = None) -> Optional[APIError]:
        """The refusal that stops *prompt*, or the whole call; None where samples may be sent."""
        for scope in (None, prompt) if self._refusals else ():
            refusals = self._refusals.get(scope, [])
            if len(refusals) > (_PATIENCE if scope in self._succeeded else 0):
                return refusals[-1]
        return None


def _is_interactive() -> bool:
    return hasattr(sys, "ps1")


def _exits_by_interrupt() -> bool:
    """Whether an uncaught KeyboardInterrupt ends the process."""
    return getattr(sys, "last_type", None) is KeyboardInterrupt and not _is_interactive()


class _Sample(Future[Optional[_Outcome]]):
    """A sample under way, for which every call waits that asks for the very same.

    Its result is None where nobody wanted it any more.
    """

    def __init__(self, key: Hashable, call: Any, index: int, seed: int) -> None:
        super().__init__()
        self.key = key
        self.call, self.index, self.seed = call, index, seed  # the _Call that draws it
        self.request: _Request = call.requests[index]
        self.waiting = [(call, index)]  # all that wait for it
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
        self, config: Config, api: _Api, cache: Optional[_Cache], executor: ThreadPoolExecutor,
        pacer: _Pacer, requests: list[_Request], n: int,
    ) -> None:
        self.config, self.api, self.cache, self.requests = config, api, cache, requests
        self.executor, self.pacer = executor, pacer
        first = config.seed or 0
        self.seeds = range(first, first + n)
        self.total = len(requests) * n
        self.outcomes: list[dict[int, _Outcome]] = [{} for _ in requests]
        self.verdicts = _Verdicts()
        self.in_flight = 0
        self.is_over = self.was_interrupted = False
        self.loop: Optional[asyncio.AbstractEventLoop] = None  # of agenerate()
        self.wakeup: Callable[[], Any] = bool  # called in that loop when a sample is done
        # What to warn of, by kind: unusable and unwritten entries of the cache, and servers.
        self.notes: defaultdict[str, list[str]] = defaultdict(list)
        self.tally: Optional[_Tally] = None
        self._done: queue.SimpleQueue[tuple[int, int, _Sample]] = queue.SimpleQueue()
        self._waiting = deque((index, iter(self.seeds)) for index in range(len(requests)))
        self._stopped: dict[int, Iterator[int]] = {}  # prompts that are refused, and their seeds

    @property
    def done(self) -> int:
        return sum(map(len, self.outcomes))

    def is_given_up(self) -> bool:
        """Whether replies that are still on their way serve nobody: see _Sample."""
        is_left = self.loop is not None and self.loop.is_closed() and not _is_interactive()
        return self.is_over and (self.cache is None or self.was_interrupted or is_left)

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
        sample.add_done_callback(arrive)

    def take(self, seconds: float = 0.0) -> None:
        """Record all that is done, after a wait of up to *seconds* for the first."""
        with contextlib.suppress(queue.Empty):
            self._take(*self._done.get(seconds > 0, seconds or None))
            while True:
                self._take(*self._done.get_nowait())

    def _take(self, index: int, seed: int, sample: _Sample) -> None:
        self.in_flight -= 1
        # Raises a defect of the worker's: it must not vanish with its thread.
        outcome = sample.result()
        if outcome is None:  # not sent; next() says whether it is still to be
            if _exits_by_interrupt():
                raise RolloutsError("the interpreter exits")
            self._waiting.append((index, iter((seed,))))
            return
        if (sample.call, sample.index) == (self, index):
            for kind, text in sample.notes:
                self.notes[kind].append(text)
        else:
            self.say(index, seed, "from the same sample of another call")
            if isinstance(outcome, Response):
                outcome = dataclasses.replace(outcome, cached=True)
        self.record(index, seed, outcome)
        if isinstance(outcome, APIError):
            self.count(done=1, failed=1)
        else:
            cost = 0.0 if outcome.cached else outcome.usage.cost
            self.count(done=1, cached=int(outcome.cached), cost=cost)

    def record(self, index: int, seed: int, outcome: _Outcome) -> None:
        """Keep what came of a sample, from the cache or from the API."""
        self.outcomes[index][seed] = outcome
        self.verdicts.record(index, outcome)
        if isinstance(outcome, Response) and index in self._stopped:
            self._waiting.appendleft((index, self._stopped.pop(index)))

    def fail_the_rest(self, problem: str = "") -> None:
        """An error for each sample never sent: *problem*, or the refusal that stopped its scope."""
        for index, seeds in (*self._stopped.items(), *self._waiting):
            error = APIError(problem, provider=self.api.name)
            refusal = self.verdicts.why_stopped(index)
            if refusal is not None and not problem:
                status = f"HTTP {refusal.status}: " if refusal.status else ""
                why = f"never sent, as seed {refusal.seed} was refused: {status}{refusal.message}"
                error = APIError(why, provider=self.api.name, advice=refusal.advice)
            for seed in seeds:
                self.outcomes[index].setdefault(seed, error._with_seed(seed))

    def count(self, **more: float) -> None:
        if self.tally is not None:
            _progress.count(self.tally, **more)

    @contextlib.contextmanager
    def shown(self, state: str, reason: str) -> Iterator[None]:
        """Count a sample as "waiting" or "retrying" within the block."""
        _progress.reason = reason
        self.count(**{state: 1})
        try:
            yield
        finally:
            self.count(**{state: -1})

    def say(self, index: int, seed: int, text: str) -> None:
        sample = f"prompt {index}, seed {seed}" if len(self.requests) > 1 else f"seed {seed}"
        _log.debug("%s: %s", sample, text)
        if self.config.verbose:
            _progress.say(f"rollouts: {sample}: {text}")

    def results(self) -> list[Rollouts]:
        """What the call returns, raises and warns of."""
        results = [self._rollouts(*each) for each in zip(self.requests, self.outcomes)]
        if self.config.offline:
            return results
        errors = [error for rollouts in results for error in rollouts.errors]
        failure = None
        if errors and len(errors) == self.total:
            was_sent = [
                error for error in errors
                if error.status is not None or not error.message.startswith("never sent")]
            failure = min(was_sent, key=lambda error: error.seed or 0)
            errors = []
        # Where warnings are errors, this one must not hide what failed.
        with contextlib.suppress(UserWarning) if failure else contextlib.nullcontext():
            troubles = "; ".join(self._troubles([str(error) for error in errors]))
            server_notes = dict.fromkeys(self.notes["server"])
            for text in filter(None, (troubles, *server_notes, *self._doubts(results))):
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
# Keeps alive in a forked child what is the parent's, and must not be closed.
_clients_of_the_parent: list[Any] = []


def _release(
    pid: int, transport: _Transport, caches: dict[Any, _Cache],
    executors: dict[int, ThreadPoolExecutor],
) -> None:
    """Close what is idle. What is in flight finishes."""
    if pid != os.getpid():
        return
    for executor in list(executors.values()):
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
        self, prompt: Prompt, n_samples: int = 1, **overrides: Any
    ) -> Rollouts:
        """Return *n_samples* samples of *prompt*, from the cache or from the API.

        *prompt* is a str or a list of chat messages. Where a str contains "<think>", what comes
        before it is the question, and the model continues what begins there; so it does with a
        list that ends in an assistant message. The samples have the seeds *seed*, *seed* + 1, …
        and come in that order; None sends no seed. *overrides* are settings for this call.

        With endpoint="completions" *prompt* is a str that the model sees as it is, and continues.

        What fails after all retries stands in ``rollouts.errors``, and a warning counts it.
        APIError is raised only where there is nothing to return, not one sample. With offline=True
        nothing is sent, raised or warned about: what is not in the cache stands in ``errors``.
        ValueError: an argument is wrong, or the model cannot continue an assistant message.
        """
        return self._run([prompt], n_samples, overrides)[0]

    async def agenerate(
        self, prompt: Prompt, n_samples: int = 1, **overrides: Any
    ) -> Rollouts:
        """Do as generate() does, in an event loop; any number of them may be under way at once.

        Cancelled, it drops what was not sent; what is in flight finishes and is kept in the cache.
        """
        import asyncio

        call = self._prepare([prompt], n_samples, overrides)
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
        self, prompts: Iterable[Prompt], n_samples: int = 1, **overrides: Any
    ) -> list[Rollouts]:
        """Return *n_samples* samples of each of *prompts*, all through one queue.

        A prompt that the API refuses (400, 403, 413, 422) fails alone: its samples stand in its
        ``errors``. APIError is raised only where not one sample of any prompt is to be had.
        """
        if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
            raise ValueError("prompts takes a list of prompts; for one prompt there is generate()")
        return self._run(list(prompts), n_samples, overrides)

    def resample(
        self, prompt: Prompt, reasoning: Union[str, Response, Sequence[str]], n_samples: int, *,
        at: Optional[Iterable[int]] = None, suffix: str = "", **overrides: Any,
    ) -> list[Rollouts]:
        """Return, for each i, *n_samples* continuations of the first i parts of *reasoning*.

        *reasoning* is a thought without its tags, which split_sentences() cuts; the Response that
        has it; or a list of parts of your own whose concatenation is the thought. i runs from 0 to
        the number of parts, both included, or over *at*, whose order the results keep. Each says
        which it is: ``rollouts.at`` is i, ``rollouts.prefix`` the text of the parts that were
        kept, without white space at its end. Continuations of prefix i are "without" part i, those
        of prefix i + 1 "with" it. *suffix* is added to each prefix: ``"\\n</think>\\n\\nTherefore,
        the final answer is \\\\boxed{"`` forces the answer. Where *prompt* ends in an open thought
        already, *reasoning* goes on from there. Errors: as from generate_many().
        """
        parts = _parts_of(reasoning)
        if not isinstance(suffix, str):
            raise ValueError(f"suffix takes a str, not {suffix!r:.200}")
        if at is not None and (isinstance(at, str) or not isinstance(at, Iterable)):
            raise ValueError(f"at takes a list of integers, not {at!r:.200}")
        in_range = _integer(0, len(parts))
        if at is None:
            at = range(len(parts) + 1)
        indices = [in_range("at", index) for index in at]
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
            _warn(f"{config.model} continues {works}, but not {fails}")
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
        self, prompts: list[Prompt], n_samples: int, overrides: dict[str, Any]
    ) -> list[Rollouts]:
        """The blocking twin of agenerate()."""
        call = self._prepare(prompts, n_samples, overrides)
        self._look_up(call)
        with self._under_way(call):
            while self._fill(call):
                call.take(_SLICE)
        return call.results()

    def _prepare(
        self, prompts: list[Prompt], n_samples: int, overrides: dict[str, Any]
    ) -> _Call:
        """Check the arguments and make the requests: no I/O."""
        if self._pid != os.getpid():  # forked
            _clients_of_the_parent.append((self._transport, self._caches, self._executors))
            self._release.detach()
            self._start(self._transport.proxies)
        if self._is_closed:
            raise RolloutsError("the client is closed")
        n_samples = _integer(1, 10**9)("n_samples", n_samples)
        config, api = _for_call(self._config, overrides)
        _integer(0)("seed + n_samples - 1", (config.seed or 0) + n_samples - 1)
        if config.offline and not config.use_cache:
            raise ValueError("offline=True takes what is in the cache: not with use_cache=False")
        cache = None
        if config.use_cache:
            store: type[_Cache] = _SqlCache if config.use_cache == "sql" else _JsonCache
            where = os.path.abspath(config.cache_dir)
            cache = self._caches.setdefault((store, where), store(where))
        width = config.max_concurrency
        executor = self._executors.setdefault(width, ThreadPoolExecutor(width, "rollouts"))
        pacer = self._pacers.setdefault(api.base_url, _Pacer())
        requests = [_request_of(prompt, config, api) for prompt in prompts]
        if any(request.injection.text.endswith((" ", "\t")) for request in requests):
            _warn(
                "the injected text ends in a space, which most models continue badly: their words "
                "begin with one. End it with a word or a newline.")
        return _Call(config, api, cache, executor, pacer, requests, n_samples)

    def _look_up(self, call: _Call) -> None:
        """Take from the cache what is there."""
        if call.cache is None:
            return
        unusable = call.notes["unusable"]
        for index, request in enumerate(call.requests):
            get = functools.partial(call.cache.get, request, call.seeds, unusable)
            found = self._look(get, bool)
            for seed, response in found.items():
                call.record(index, seed, response)
                if call.config.verbose:
                    call.say(index, seed, "from the cache")
        if call.config.offline:
            call.fail_the_rest("not in the cache, and offline=True sends nothing")

    def _look(
        self, get: Callable[[], dict[int, Response]], is_cancelled: Callable[[], bool]
    ) -> dict[int, Response]:
        """What *get* finds in a cache. To pay again for what is there is worse than to fail."""
        try:
            found: dict[int, Response] = self._patiently(get, is_cancelled)
        except OSError as error:
            raise RolloutsError(f"the cache cannot be read just now: {error}") from error
        return found

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
        if call.done < call.total and call.config.progress_bar:
            call.tally = _progress.begin(call.total, call.done)
        try:
            yield
        except KeyboardInterrupt:
            call.was_interrupted = not _is_interactive()
            raise
        finally:
            call.is_over = True
            if call.tally is not None:
                _progress.end(call.total - call.done)

    def _fill(self, call: _Call) -> bool:
        """Submit samples of *call* up to its width; False where it has come to its end."""
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
        key: Hashable = object()  # with the cache off no sample is shared
        if call.cache is not None:
            request, retries = call.requests[index], call.config.max_retries
            key = (id(call.cache), call.api.key, request.url, request.key, seed, retries)
        sample = _Sample(key, call, index, seed)
        try:
            with self._lock:
                shared = self._in_flight.setdefault(key, sample)
                if shared is not sample:
                    shared.waiting.append((call, index))
            # Known before it is submitted: Ctrl-C may arrive within submit.
            call.expect(index, seed, shared)
            if shared is sample:
                call.executor.submit(self._draw, sample)
        except BaseException as error:
            if "start new thread" in str(error) and call.in_flight > 1:
                return  # it is in the queue of the threads that there are
            self._finish(sample, None)
            if isinstance(error, RuntimeError):
                raise RolloutsError(f"the client can send nothing more: {error}") from error
            raise

    def _finish(self, sample: _Sample, outcome: Union[_Outcome, BaseException, None]) -> None:
        with self._lock:
            if self._in_flight.get(sample.key) is sample:
                del self._in_flight[sample.key]
        if sample.done():
            return
        if isinstance(outcome, BaseException) and not isinstance(outcome, APIError):
            sample.set_exception(outcome)
        else:
            sample.set_result(outcome)

    def _draw(self, sample: _Sample) -> None:
        """Draw a sample, in a thread of its own."""
        outcome: Union[_Outcome, BaseException, None] = None
        try:
            # Another call may have finished this very sample since ours looked it up.
            outcome = self._stored(sample) or self._attempts(sample)
        except _GivenUp:
            pass  # a call that joined in just now asks for it again
        except BaseException as error:
            outcome = error
        self._finish(sample, outcome)

    def _stored(self, sample: _Sample) -> Optional[Response]:
        cache = sample.call.cache
        if cache is None:
            return None
        get = functools.partial(cache.get, sample.request, (sample.seed,), [])
        found = self._look(get, sample.is_unwanted)
        if found:
            sample.call.say(sample.index, sample.seed, "from the cache")
        return found.get(sample.seed)

    def _attempts(self, sample: _Sample) -> _Outcome:
        """One sample, drawn and kept, in as many attempts as it takes. _GivenUp: unwanted."""
        call, api, pacer = sample.call, sample.call.api, sample.call.pacer
        say = functools.partial(call.say, sample.index, sample.seed)
        if api.provider.needs_key and not api.key and not api.is_local:
            advice = _advice_of(api, 401).replace("the right key", "one")
            return _failure(api, "no API key", None, False, advice=advice)._with_seed(sample.seed)
        for attempt in itertools.count():
            is_held = pacer.is_held
            with call.shown("waiting", pacer.reason) if is_held else contextlib.nullcontext():
                pacer.wait(call.config.requests_per_minute, sample.is_unwanted)
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
            with call.shown("retrying", reason):
                _clock.sleep(wait, sample.is_unwanted)
        raise AssertionError("itertools.count() ended")

    def _attempt(self, sample: _Sample) -> _Outcome:
        """What came of one request; a Response is in the cache by then."""
        call, config, api = sample.call, sample.call.config, sample.call.api
        request, begun = sample.request, time.monotonic()
        headers = {"Content-Type": "application/json", **api.provider.headers}
        if api.key:
            headers["Authorization"] = f"Bearer {api.key}"
        streamed = _is_streamed(config, api.provider)
        payload = request.payload(sample.seed, streamed)
        exchange = functools.partial(
            self._transport.post, request.url, headers, payload, config.timeout,
            sample.is_given_up)
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
        self._keep(sample, response)
        tokens, took = response.usage.completion_tokens, time.monotonic() - begun
        ended = f"{tokens} tokens in {took:.1f} s, {response.finish_reason}"
        call.say(sample.index, sample.seed, ended)
        return response

    def _keep(self, sample: _Sample, response: Response) -> None:
        """Put *response* into the cache. Where that fails the call returns it, and warns."""
        if sample.call.cache is None:
            return
        put = functools.partial(sample.call.cache.put, sample.request, response)
        try:
            self._patiently(put, bool)
        except OSError as error:
            sample.notes.append(("unwritten", str(error)))


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
