"""Draw many samples of one prompt from a language model's API, and never pay for the same one twice.

    from rollouts import RolloutsClient

    client = RolloutsClient("qwen/qwen3-30b-a3b", temperature=0.7)
    rollouts = client.generate("What is 6 x 7?\\n<think>\\n6 x 7 is", n_samples=10)
    print(rollouts.counts(lambda response: response.content.strip()))

A client's calls: generate, agenerate (for event loops), generate_many (prompts), resample (from each
prefix of a thought), check_injection (does the model continue a thought?). Config lists the settings.

The rooms of this file, in order; each uses only the rooms above it:

    Records     what the data of the other rooms are made of
    Providers   a row for each API: its address and its dialect
    Settings    every field, its range and its default, in one table; the presets
    Errors      what can go wrong, and what each kind of failure means for the other samples
    Data        Usage, Response, Rollouts: frozen, to and from plain dicts
    Reasoning   prompt to messages, reply to reasoning and content, text to sentences
    Requests    settings and messages to what is sent, and to the key it is cached under
    Retry       how long to wait before the next attempt, or whether to stop
    Replies     bytes to a Response, or to the APIError that says why not
    Transport   bytes out, bytes in, over kept connections and within a deadline
    Pacing      the token bucket, and the hold that a rate limit puts on every request
    Progress    one line on stderr for everything that is under way
    Caches      two stores with the same three methods
    Pool        the threads that wait for replies
    Client      the only room that knows all the others
    Command     python -m rollouts

To vendor it, copy this file: it needs Python 3.9 or newer and nothing else.

Copyright (c) 2026 the rollouts authors. MIT licence: free to use, copy, change and share, provided
that this notice stays; without warranty of any kind.
"""

from __future__ import annotations

import atexit
import contextlib
import email.utils
import errno
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import numbers
import os
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
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Optional, TypeVar, Union, overload

if TYPE_CHECKING:
    import sqlite3  # which few scripts need

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:
    def dataclass_transform() -> Any:
        return lambda cls: cls

__version__ = "1.0.0"
__all__ = [
    "RolloutsClient", "create_client", "Config", "Rollouts", "Response", "Usage",
    "split_sentences", "RolloutsError", "APIError",
]

Prompt = Union[str, Sequence[Mapping[str, Any]]]


def _dict(value: Any) -> dict[str, Any]:
    """*value*, or an empty dict in place of anything else: replies hold what they like."""
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and 0 <= value < 2**63 else 0  # NaN is not


def _warn(text: str) -> None:
    """Warn at the line that called into this module, however deep."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals is globals():
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


# == Records =======================================================================================
#
# Frozen dataclasses, without the module `dataclasses`: with inspect, ast and dis, and the code that it
# compiles for each class, it would take more than a third of the time that urllib.request takes to import.


class _Asked:
    """An attribute of a class that is made when somebody asks for it."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __get__(self, instance: object, cls: type) -> Any:
        return self._make(cls)


@functools.cache
def _dataclass_of(cls: Any) -> Any:
    """The dataclass with the fields of *cls*, for whoever asks what only a dataclass has."""
    import dataclasses
    import inspect

    def field(name: str, default: Any) -> Any:
        options = {} if default is ... else {"default": default}
        if isinstance(default, dict):
            options = {"default_factory": default.copy}
        return dataclasses.field(compare=name not in cls._uncompared, **options)

    made = dataclasses.make_dataclass(
        cls.__name__, [(name, cls._kinds[name], field(name, default)) for name, default in cls._defaults.items()],
        frozen=cls.__hash__ is not None)  # what may change has none
    made.__signature__ = inspect.signature(made)  # type: ignore[attr-defined]
    return made


_Same = TypeVar("_Same", bound="_Record")


@dataclass_transform()
class _Record:
    """Values by their names, compared and shown by them, and not to be changed."""

    _kinds: ClassVar[dict[str, Any]] = {}  # the fields' annotations, in order
    _defaults: ClassVar[dict[str, Any]] = {}  # and their defaults: Ellipsis where there is none
    _required: ClassVar[set[str]] = set()  # those without one
    _uncompared: ClassVar[tuple[str, ...]] = ()  # those that make no difference to ==
    __signature__: ClassVar[Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__annotations__ if sys.version_info >= (3, 10) else vars(cls).get("__annotations__", {})
        cls._kinds = {**cls._kinds, **{name: kind for name, kind in own.items() if "ClassVar" not in str(kind)}}
        cls._defaults = {name: getattr(cls, name, ...) for name in cls._kinds}
        cls._required = {name for name, default in cls._defaults.items() if default is ...}
        for name in "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__replace__", "__signature__":
            setattr(cls, name, _Asked(lambda cls, name=name: getattr(_dataclass_of(cls), name)))  # type: ignore[misc]

    def __init__(self, *values: Any, **named: Any) -> None:
        given, fields = {**dict(zip(self._defaults, values)), **named}, vars(self)
        fields.update(self._defaults)
        fields.update(given)
        wrong = len(given) < len(values) + len(named) or len(fields) > len(self._defaults)
        if wrong or not given.keys() >= self._required:
            self.__signature__.bind(*values, **named)  # raises the TypeError that says what is wrong
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the values: a class's own business."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash(tuple(self._compared().values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    def __setattr__(self, name: str, value: object = None) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"{type(self).__name__}.{name} is not to be changed")

    __delattr__ = __setattr__

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._defaults}

    def _compared(self) -> dict[str, Any]:
        return {name: value for name, value in self._values().items() if name not in self._uncompared}

    def _replace(self: _Same, **changes: Any) -> _Same:
        return type(self)(**{**self._values(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names."""
        return self._values()


# == Providers =====================================================================================
#
# The table is the place to extend: a new API is one row here and nothing anywhere else. Where a row's
# dialect is more than the documented default, the comment says how it is known.

# How a trailing assistant message asks to be continued: (fields of that message, fields of the body).
_DIALECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trailing": ({}, {}),
    # Always both: vLLM and llama.cpp refuse the first alone, as the second defaults to true.
    "continue_final_message": ({}, {"continue_final_message": True, "add_generation_prompt": False}),
    "prefix": ({"prefix": True}, {}),
    "partial": ({"partial": True}, {}),
}


class _Provider(_Record):
    """An API's address and dialect."""

    base_url: str
    prefill: Optional[str] = "trailing"  # a key of _DIALECTS; None: it cannot continue
    needs_key: bool = True
    stream_above: Optional[int] = None  # more max_tokens than this are refused unstreamed
    stream_options: bool = True  # takes stream_options, which asks for the usage of a stream
    seed: str = "seed"  # the name of that field
    echoes: bool = False  # the reply begins with the injected text
    headers: tuple[tuple[str, str], ...] = ()


_PROVIDERS = {
    # Its response cache replays one answer for identical requests, which samples must not be.
    "openrouter": _Provider("https://openrouter.ai/api/v1", headers=(("X-OpenRouter-Cache", "false"),)),
    # 400 "Requests with max_tokens > 4096 must have stream=true" (reported by many projects).
    "fireworks": _Provider("https://api.fireworks.ai/inference/v1", stream_above=4096),
    "together": _Provider("https://api.together.xyz/v1"),
    # Prefix completion is served below /beta only (its documentation).
    "deepseek": _Provider("https://api.deepseek.com/beta", prefill="prefix"),
    "novita": _Provider("https://api.novita.ai/openai/v1"),
    "deepinfra": _Provider("https://api.deepinfra.com/v1/openai"),
    "groq": _Provider("https://api.groq.com/openai/v1"),
    "cerebras": _Provider("https://api.cerebras.ai/v1"),
    # `prefix`, `random_seed` and the echo: its documentation. It sends usage in streams unasked.
    "mistral": _Provider(
        "https://api.mistral.ai/v1", prefill="prefix", seed="random_seed", echoes=True, stream_options=False),
    # Token Factory serves vLLM and takes its two flags (its cookbook).
    "nebius": _Provider("https://api.tokenfactory.nebius.com/v1", prefill="continue_final_message"),
    "sambanova": _Provider("https://api.sambanova.ai/v1"),
    "hyperbolic": _Provider("https://api.hyperbolic.xyz/v1"),
    "openai": _Provider("https://api.openai.com/v1", prefill=None),
    "anthropic": _Provider("https://api.anthropic.com/v1"),
    "gemini": _Provider("https://generativelanguage.googleapis.com/v1beta/openai", prefill=None),
    "vllm": _Provider("http://localhost:8000/v1", prefill="continue_final_message", needs_key=False),
    # Without the flag it turns the trailing message into one of the user (serving_chat.py, 0.5.23).
    "sglang": _Provider("http://localhost:30000/v1", prefill="continue_final_message", needs_key=False),
    # --prefill-assistant is on by default. The echo was seen in llama-server as of llama-cpp-python 0.3.36.
    "llamacpp": _Provider("http://localhost:8080/v1", needs_key=False, echoes=True),
    "ollama": _Provider("http://localhost:11434/v1", needs_key=False),
    "lmstudio": _Provider("http://localhost:1234/v1", needs_key=False),
}

# Models that start afresh whatever the API: (pattern of their ids, why).
_CANNOT_CONTINUE = (
    (r"gpt-oss", "gpt-oss thinks in the Harmony format, which chat completions cannot continue"),
    (r"(^|/)~?gemini", "Gemini's thoughts are hidden, and it does not continue an injected one"),
    (r"^~?openai/", "OpenAI's models answer an assistant message, they do not continue it"),
)


# == Settings ======================================================================================
#
# One table: the fields of Config. What a field takes, whether it goes into the request's body, its
# default and its help stand in its one row; validation, the client's signature, its attributes and
# its documentation are read from there.

_SETTINGS: dict[str, _Setting] = {}  # in the order of Config, whose fields enter themselves


class _Key(str):
    """An API key: shown by no repr, and None in every pickle."""

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> _Key:
        return self


class _Refused(ValueError):
    """A keyword that is not taken: it says all there is to say, and shows no value, which may be a key."""


class _Takes(_Record):
    """What a setting takes, in words, and the function that returns the value to keep, or fails."""

    words: str
    keep: Callable[[Any], Any]
    secret: bool = False

    def check(self, name: str, value: Any) -> Any:
        try:
            return self.keep(value)
        except _Refused:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            secret = self.secret or (name.lower().endswith("base_url") and re.search(r"[?#@]", str(value)))
            shown = "the value given, which is not shown" if secret else f"{value!r:.200}"
            why = f" ({error})" if str(error) and not self.secret else ""
            raise ValueError(f"{name} takes {self.words}, not {shown}{why}") from None


def _require(condition: object, why: str = "") -> None:
    if not condition:
        raise ValueError(why)


def _number(low: float, high: float, *, above: bool = False) -> _Takes:
    def keep(value: Any) -> float:
        _require(isinstance(value, numbers.Real) and not isinstance(value, bool))  # numpy's are, too
        _require(low <= value <= high and not (above and value == low))  # NaN fails here
        return float(value)

    return _Takes(f"a number {f'above {low:g} and up' if above else f'from {low:g}'} to {high:g}", keep)


def _integer(low: int, high: int = 2**63 - 1) -> _Takes:
    def keep(value: Any) -> int:
        _require(isinstance(value, numbers.Integral) and not isinstance(value, bool))
        _require(low <= value <= high)
        return int(value)

    return _Takes(f"an integer from {low} to {high}" if high < 2**62 else f"an integer from {low} up", keep)


def _choice(*options: Any) -> _Takes:
    def keep(value: Any) -> Any:
        _require((type(value), value) in [(type(option), option) for option in options])  # 1 is not True
        return value

    return _Takes("one of " + ", ".join(map(repr, options)), keep)


def _optional(takes: _Takes) -> _Takes:
    return takes._replace(
        words=f"{takes.words}, or None", keep=lambda value: None if value is None else takes.keep(value))


def _plain(value: Any) -> Any:
    """A deep copy of *value* as JSON sees it; what JSON cannot say is refused."""
    return json.loads(json.dumps(value, allow_nan=False))


def _keep_model(value: str) -> str:
    _require(isinstance(value, str) and value.strip() and value.isprintable())
    return value.strip()


def _keep_key(value: str) -> Optional[_Key]:
    _require(isinstance(value, str))
    key = value.strip()
    _require(all("!" <= character <= "~" for character in key))
    return _Key(key) if key else None


def _keep_provider(value: Any) -> Union[str, dict[str, Any]]:
    if isinstance(value, Mapping):
        return dict(_plain(dict(value)))
    _require(isinstance(value, str) and value.lower() in _PROVIDERS, "known: " + ", ".join(_PROVIDERS))
    return str(value.lower())


def _keep_base_url(value: str) -> str:
    url = value.strip()
    parts = urllib.parse.urlsplit(url)
    _require(parts.scheme in ("http", "https") and parts.hostname)
    _require(url.isprintable() and " " not in url and value.isascii())
    _require(not (parts.query or parts.fragment or "@" in parts.netloc), "no key, query or fragment in it")
    _require(parts.port != 0 and str(parts.hostname).encode("idna"))
    return url.rstrip("/").removesuffix("/chat/completions")


def _keep_path(value: Any) -> str:
    path = os.fspath(value)
    _require(isinstance(path, str) and path and "\0" not in path)
    return os.path.expanduser(str(path))  # a directory named "~" is a trap for whoever clears it


def _keep_extra(value: Mapping[str, Any]) -> dict[str, Any]:
    for name, given in value.items():
        _require(isinstance(name, str) and name not in _SETTINGS, f"{name} is a setting of its own")
        if re.fullmatch(r"keys?|.*api_?keys?|((api|access|auth)_?)?token|authorization|(.*_)?headers", name, re.I):
            raise _Refused(f"{name} is not taken: a key is passed as api_key, and headers cannot be set")
        if name in ("logprobs", "top_logprobs") and given not in (None, False):
            raise NotImplementedError(
                f"{name} is not supported: through OpenRouter, providers answer it inconsistently or not "
                "at all. Ask a provider's own API for log probabilities.")
        if name == "n" and given not in (None, 1):
            raise _Refused("n is not taken: pass n_samples, as a request draws one sample")
        if name in ("messages", "prompt"):
            raise _Refused(f"{name} is not taken: pass it as generate's first argument")
    return dict(_plain(dict(value)))


_FLAG = _choice(True, False)


class _Setting:
    """A field of Config, which checks each value that it is given."""

    def __init__(self, takes: _Takes, words: str, default: Any = ..., *, body: bool = False) -> None:
        self.takes, self.help, self.default, self.body = takes, words, default, body

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        _SETTINGS[name] = self

    def __get__(self, config: Optional[Config], owner: type) -> Any:
        if config is not None:
            return vars(config)[self.name]
        if self.default is ...:
            raise AttributeError(self.name)
        return self.default

    def __set__(self, config: Config, value: Any) -> None:
        vars(config)[self.name] = self.takes.check(self.name, value)


_setting: Any = _Setting  # a field is annotated with the type of its value

# Body fields that are no settings of ours, so that none of them is taken for a misspelling.
_FURTHER_FIELDS = (
    "chat_template_kwargs", "enable_thinking", "include_reasoning", "logit_bias", "max_completion_tokens", "metadata",
    "min_p", "min_tokens", "models", "plugins", "reasoning", "reasoning_effort", "reasoning_format",
    "repeat_penalty", "repetition_penalty", "response_format", "route", "separate_reasoning", "service_tier",
    "session_id", "stop", "thinking", "tool_choice", "tools", "top_a", "transforms", "typical_p", "user", "verbosity",
)

# What other libraries call our settings, and what belongs elsewhere.
_OTHER_NAMES = {
    "at": "resample(at=…)", "cache": "use_cache", "extra_body": "its fields, as keywords of their own",
    "max_workers": "max_concurrency", "n_samples": "generate(prompt, n_samples)", "preset": "create_client(preset=…)",
    "retries": "max_retries", "rpm": "requests_per_minute", "suffix": "resample(suffix=…)",
    "system": "a message of that role", "temp": "temperature", "url": "base_url", "workers": "max_concurrency",
}


def _warn_of_misspelling(name: str) -> None:
    import difflib

    if name in _FURTHER_FIELDS:
        return
    known = [*_SETTINGS, *_FURTHER_FIELDS, "n_samples", "suffix"]
    for meant in [name] if name in _OTHER_NAMES else difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        meant = _OTHER_NAMES.get(meant, meant)
        _warn(f"{name} is no setting, so it goes into the request as it is: did you mean {meant}?")


class Config(_Record):
    """Every setting of a client, checked: ``RolloutsClient(**config.to_dict())``.

    A field that the API reads is left out of the request where it is None, so that the API's own
    default holds. ValueError names the field, the value it got and what it takes.
    """

    model: str = _setting(
        _Takes("a model's id such as 'qwen/qwen3-30b-a3b'", _keep_model), "the model, as its API names it")
    temperature: Optional[float] = _setting(_optional(_number(0, 2)), "sampling temperature", 0.7, body=True)
    top_p: Optional[float] = _setting(_optional(_number(0, 1)), "nucleus sampling: the mass kept", 0.95, body=True)
    max_tokens: Optional[int] = _setting(
        _optional(_integer(1)), "most tokens of one sample; thoughts count", 4096, body=True)
    top_k: Optional[int] = _setting(_optional(_integer(0)), "sample among the k likeliest tokens", None, body=True)
    presence_penalty: Optional[float] = _setting(
        _optional(_number(-2, 2)), "penalty for a token that occurred", None, body=True)
    frequency_penalty: Optional[float] = _setting(
        _optional(_number(-2, 2)), "penalty by how often a token occurred", None, body=True)
    seed: int = _setting(_integer(0), "seed of the first sample; the next ones count up", 0)
    provider: Union[str, dict[str, Any], None] = _setting(
        _optional(_Takes("the name of an API, or OpenRouter's routing object (a dict)", _keep_provider)),
        "the API to call (default openrouter), or OpenRouter's routing as a dict", None)
    base_url: Optional[str] = _setting(
        _optional(_Takes("an address such as 'http://localhost:8080/v1'", _keep_base_url)),
        "any OpenAI-compatible server; default <PROVIDER>_BASE_URL, else the provider's own", None)
    api_key: Optional[str] = _setting(
        _optional(_Takes("a key of printable ASCII characters without blanks", _keep_key, secret=True)),
        "default <PROVIDER>_API_KEY from the environment", None)
    use_cache: Union[bool, str] = _setting(
        _choice(True, False, "json", "sql"), "True or 'json': one file per sample; 'sql': SQLite; False: none", True)
    cache_dir: str = _setting(_Takes("a directory's path", _keep_path), "where the cache is", ".rollouts")
    progress_bar: bool = _setting(_FLAG, "show progress on stderr for more than one sample", True)
    verbose: bool = _setting(_FLAG, "say on stderr what each sample did", False)
    requests_per_minute: Optional[float] = _setting(
        _optional(_number(0, 1e6, above=True)), "most requests started in any minute, retries included", None)
    max_concurrency: int = _setting(_integer(1, 10_000), "most requests under way at once", 100)
    max_retries: int = _setting(_integer(0, 1000), "attempts after the first", 10)
    timeout: float = _setting(_number(0, 86_400, above=True), "seconds for one attempt, by the clock", 600.0)
    stream: Optional[bool] = _setting(
        _optional(_FLAG), "ask for a streamed reply; None: as the provider needs it", None)
    prefill: Optional[str] = _setting(
        _optional(_choice(*_DIALECTS)), "how a trailing assistant message is sent; None: the provider's way", None)
    extra: dict[str, Any] = _setting(
        _Takes("a dict of further body fields that JSON can hold", _keep_extra),
        "further fields of the body, sent as they are; further keywords of a client land here", {})

    __hash__ = None  # type: ignore[assignment]

    def __setattr__(self, name: str, value: object = None) -> None:
        """Change a setting, which no other record lets you, and check it."""
        if name not in self._defaults:
            raise AttributeError(f"{name} is no setting")
        object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        for name, value in self._values().items():
            setattr(self, name, value)

    def _override(self, settings: Mapping[str, Any]) -> Config:
        """This configuration with *settings* in place; what is no setting goes into ``extra``."""
        known = {name: value for name, value in settings.items() if name in _SETTINGS}
        further = {name: value for name, value in settings.items() if name not in _SETTINGS}
        extra = _SETTINGS["extra"].takes.check("extra", known.get("extra", {}))
        known["extra"] = {**self.extra, **extra, **further}
        config = self._replace(**known)
        for name in further:
            _warn_of_misspelling(name)
        return config


if Config.__doc__:  # absent under python -OO; from Python 3.13 on not indented
    _indent = "\n    " if "\n    " in Config.__doc__ else "\n"
    Config.__doc__ += _indent + _indent.join(
        f"{name}: {setting.help}. Takes {setting.takes.words}"
        + ("." if setting.default is ... else f"; default {setting.default!r}.")
        for name, setting in _SETTINGS.items())

_PRESETS = {"deterministic": 0.0, "focused": 0.3, "balanced": 0.7, "creative": 1.2}  # temperatures


# == Errors ========================================================================================
#
# An APIError carries its own policy: `retryable` says whether the same request may yet succeed. What
# is not retryable every sample would meet alike, and it ends the whole call.


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
        self, message: str, *, status: Optional[int] = None, provider: str = "", seed: Optional[int] = None,
        retryable: bool = False, retry_after: Optional[float] = None, advice: str = "",
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
        return ": ".join(filter(None, (head, self.message))) + (f" -> {self.advice}" if self.advice else "")

    def __repr__(self) -> str:
        told = (
            f", {name}={value!r}" for name, value in self.to_dict().items()
            if name != "message" and value not in (None, "") and value is not False)
        return f"{type(self).__name__}({self.message!r}{''.join(told)})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    __hash__ = RolloutsError.__hash__

    def to_dict(self) -> dict[str, Any]:
        """The attributes by their names."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> APIError:
        """The error that to_dict() described."""
        return cls(**data)

    def _of(self, seed: int) -> APIError:
        """The same failure, met by another sample."""
        error = APIError.from_dict({**self.to_dict(), "seed": seed})
        error.__cause__ = self.__cause__
        return error


class _TooLong(http.client.HTTPException):
    """A reply above _LONGEST_REPLY."""


class _CannotContinue(ValueError):
    """The model is known to start afresh after an assistant message."""


# == Data ==========================================================================================
#
# What a call returns. No I/O here, and nothing that is stored twice.


@functools.cache
def _types_of(cls: Any) -> dict[str, tuple[type, ...]]:
    """What each field of *cls* holds: the type of its default; where that is None, a str or None."""
    return {
        name: (str,) if default is ... else (str, type(None)) if default is None
        else (int, float) if name == "cost" else (type(default),)
        for name, default in cls._defaults.items()}


def _from_dict(cls: type[_Same], data: Any) -> _Same:
    """*cls* from the dict *data*, whose values are of the fields' types; unknown names are passed over."""
    types, values = _types_of(cls), {}  # type: ignore[arg-type]  # mypy thinks that no class is Hashable
    try:
        for name, value in data.items():
            if name in types:
                if type(value) not in types[name]:
                    raise TypeError(f"{name} is of type {type(value).__name__}")
                values[name] = value
        return cls(**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a {cls.__name__}: {error}") from None


class Usage(_Record):
    """What one response, or several, consumed. Zero where the API does not tell.

    prompt_tokens, completion_tokens, total_tokens: as the API counts them; thoughts are completion.
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
        return Usage(*(mine + others for mine, others in zip(self._values().values(), other._values().values())))

    def __radd__(self, other: int) -> Usage:
        return self if other == 0 else NotImplemented  # where sum() begins

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Usage:
        """The Usage that to_dict() described; ValueError for anything else."""
        return _from_dict(cls, data)


class Response(_Record):
    """One sample: after an injected thought, the continuation alone.

    content: the answer; '' where there is none yet. Always a str.
    reasoning: the thought, or None where the model showed none.
    completed_reasoning: False while a thought is still open (it was cut off, or never closed).
    finish_reason: 'stop', 'length', 'content_filter', … as the API says it, or None.
    seed: that of its request.  usage: what it consumed.
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
    cached: bool = False

    _uncompared = ("cached",)

    @property
    def full(self) -> str:
        """``reasoning</think>content``; the reasoning while it is open; the content where none is."""
        if self.reasoning is None:
            return self.content
        return f"{self.reasoning}</think>{self.content}" if self.completed_reasoning else self.reasoning

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names, `usage` as a dict; ``full`` is derived, so it is not among them."""
        return {**self._values(), "usage": self.usage.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Response:
        """The Response that to_dict() described; ValueError for anything else."""
        return _from_dict(cls, {**_dict(data), "usage": Usage.from_dict(_dict(data).get("usage", {}))})


class Rollouts(_Record):
    """The samples of one prompt, in the order of their seeds: iterate, index, slice.

    prompt, model, temperature, top_p, max_tokens: what was asked.
    num_responses: how many were asked for: always len(responses) + len(errors).
    responses: those that arrived.  errors: an APIError for each that did not, with its seed.
    cache_dir: where they are kept, or None.
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
        return f"<Rollouts: {len(self)} of {self.num_responses} responses from {self.model}>"

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
        """How often each answer came: *extract* makes one of a response; None, for no answer, counts too."""
        return Counter(map(extract, self.responses))

    @property
    def usage(self) -> Usage:
        """What all the responses consumed, when they were drawn."""
        return sum((response.usage for response in self.responses), Usage())

    @property
    def spent(self) -> Usage:
        """What this call consumed: the responses that were not replayed from the cache."""
        return sum((response.usage for response in self.responses if not response.cached), Usage())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and values, for JSON."""
        return {
            **self._values(),
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
# Pure functions on text. Two rules hold everywhere here. Of what the user wrote nothing is changed,
# not a space. Of what came back, white space beside a tag that the model wrote is the tag's layout
# and is dropped, whether the server split the reply or not; elsewhere it is kept, since a
# continuation may well begin with a space.


def _messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """The chat messages of *prompt*: a str is a question, and from its first <think> on an injection."""
    is_list = isinstance(prompt, Sequence) and all(isinstance(each, Mapping) and "role" in each for each in prompt)
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
            "the prompt has several <think> tags: the injection begins at the first. Pass a list of "
            "messages to say where it begins.")
    asked = [{"role": "user", "content": question.rstrip()}] if question.strip() else []
    return [*asked, {"role": "assistant", "content": tag + thought}]


def _text_of(content: Any, name: str = "text") -> str:
    """The text of *content*: a str, nothing, or a list of parts with their text under *name*."""
    if isinstance(content, list):
        return "".join(
            _text_of(part.get(name)) if isinstance(part, dict) else part
            for part in content if isinstance(part, dict) or (isinstance(part, str) and name == "text"))
    return content if isinstance(content, str) else ""


def _injection_of(messages: Sequence[Mapping[str, Any]]) -> Optional[str]:
    """The text that the model is to continue: that of a trailing assistant message, or None."""
    last = messages[-1]
    return _text_of(last.get("content")) if last["role"] == "assistant" else None


def _leaves_open(injected: str) -> bool:
    """Whether *injected* ends within a thought."""
    return injected.rfind("<think>") > injected.rfind("</think>")


def _cut_echo(text: str, echo: str, certain: bool) -> str:
    """*text* without a leading *echo*.

    A model may begin with the words that it was given by chance ("Wait."), so that short ones count
    as an echo only where that is *certain*.
    """
    echo = echo.lstrip()
    if echo and (certain or len(echo) >= 40) and text.lstrip().startswith(echo):
        return text.lstrip()[len(echo):]
    return text


def _without_echo(thought: str, content: str, injected: str, echoes: bool) -> tuple[str, str]:
    """A reply's thought and content without *injected*, whole, or split as the model's own words would be."""
    before, _, after = injected.rpartition("</think>")
    opened = (before or after).replace("<think>", "", 1)
    if before and thought.strip() == opened.strip() and (echoes or len(opened) >= 40):
        thought, echoes = "", True  # so what follows in the content is an echo too
    else:
        thought = _cut_echo(thought, opened, echoes)
    rest = _cut_echo(content, injected, echoes or "<think>" in injected)
    return thought, rest if rest != content else _cut_echo(content, after if before else opened, echoes)


def _read_message(message: Mapping[str, Any], injected: str, echoes: bool) -> tuple[Optional[str], str, bool]:
    """A reply's (reasoning, content, completed_reasoning), whatever the server made of it.

    Servers put a thought into a field (the names differ), into a list, into the text between tags, or,
    when the tag was injected, into the text up to a lone </think>; some repeat what was injected.
    """
    parts, details = message.get("content"), message.get("reasoning_details")
    thought = (
        _text_of(message.get("reasoning_content")) or _text_of(message.get("reasoning"))
        or (_text_of(parts, "thinking") if isinstance(parts, list) else "")
        or _text_of(details) or _text_of(details, "summary"))
    content = written = _text_of(parts) or _text_of(message.get("refusal"))
    if injected:
        thought, content = _without_echo(thought, content, injected, echoes)
    continues = _leaves_open(injected)
    if "</think>" in injected and not continues:
        return None, thought + content, True  # a forced answer, also where a parser took it for a thought

    thought, tag, rest = thought.partition("</think>")
    closed, content = bool(tag), rest + content
    if "</think>" in content and (continues or not thought or content.lstrip().startswith("<think>")):
        head, _, content = content.partition("</think>")
        before, tag, inside = head.partition("<think>")
        if tag and before.strip() and not continues:
            head, content = inside, before + content
        # llama.cpp's "deepseek-legacy" gives the thought twice: in its field and in the content.
        thought += "" if head.replace("<think>", "").strip() in thought else head
        closed = True
    elif not thought and (continues or content.lstrip().startswith("<think>")):
        thought, content = content, ""
    elif content.lstrip().startswith("<think>") and content.replace("<think>", "").strip() in thought:
        content = ""  # deepseek-legacy again, cut off
    else:
        closed = closed or bool(content) or bool(message.get("tool_calls"))

    if thought.lstrip().startswith("<think>"):  # it began afresh
        thought = thought.lstrip()[len("<think>"):].lstrip()
    elif not continues:
        thought = thought.lstrip()
    if not thought and not continues:
        return None, content.lstrip() if "</think>" in written else content, True
    return (thought.rstrip(), content.lstrip(), True) if closed else (thought, content, False)


# Where a sentence may end: punctuation with what closes behind it, a paragraph break, or the line
# before an item of a list. What is code or a formula is matched first, and so never looked into.
_BOUNDARY = (
    r"(?P<whole>```.*?(?:```|\Z)|`[^`\n]+`|\$\$.*?\$\$|\$(?!\s)[^$\n]*?(?<!\s)\$(?!\d)"
    r"|\\\[(?:(?!\\\[).)*?\\\]|\\\((?:(?!\\\().)*?\\\))"
    r"|(?P<break>(?<=\S)(?=[ \t]*\n[ \t]*(?:\n|(?:[-*•+]|\d{1,3}[.)])[ \t])))"
    r"|(?P<ellipsis>\.{2,}|…)"
    r"|(?P<cjk>[。！？]+[”’」』）]*)"
    r"|(?P<stop>[.!?]+)[\"'”’)\]*_]*(?=\s)")
_ABBREVIATION = (
    r"(?:^|[\s(\[\"'])(?:vs|cf|Dr|Mrs?|Ms|Prof|St|Jr|Sr|Figs?|Eqs?|Eqn|Secs?|Ch|Thm|Prop|Lem|Cor|Def|Ex|approx|resp|ca|al"
    r"|viz|(?!a\.m|p\.m)[a-z](?:\.[a-z])+|[A-Z](?:\.[A-Z])+)\.$")
_FACTORIAL = r"(?:\d|\)|\b[a-z])!$"  # "5! × 3!": ends a sentence only before a capital letter
_FOLLOWING = r"\s*(\S)(\S?)"
_MARKER = (
    r"(?:^|[:;]\s*(?=[1aAi][.)]))\s*(?:[-*•+#>]*\s*)(?:\*\*)?(?:(?:Step|Case|Part|No)\s+)?"
    r"(?:\d{1,3}|[a-zA-Z]|[ivx]+)[.)]\s*$")


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the stop of *match* ends the sentence that began at *start*."""
    # Of a long sentence the last words are enough; the dots in front keep ^ from matching them.
    end = match.end("stop")
    upto = text[start:end] if end - start < 60 else "…" + text[end - 60:end]
    following = re.compile(_FOLLOWING).match(text, match.end())
    if following is None:
        return True
    first, second = following[1], following[2]
    if first in "=+/<>),;:^|&" or re.search(_MARKER, upto):
        return False  # "5! = 120"; "1." and "Step 2." begin a sentence
    if match["stop"] == "!" and re.search(_FACTORIAL, upto) and not first.isupper():
        return False
    if not match["stop"].endswith("."):
        return not first.islower() or "\n" in following[0]
    if re.search(_ABBREVIATION, upto) or (upto.endswith(("No.", "no.")) and first.isdigit()):
        return False
    # A small letter goes on with the sentence, unless it stands alone: "x = 2. y is 3."
    return not first.islower() or not second.isalpha() or "\n" in following[0]


def split_sentences(text: str) -> list[str]:
    """Cut *text* into sentences, losing nothing: ``"".join(split_sentences(text)) == text``.

    A sentence ends at ``.``, ``!`` or ``?`` (with the quotes and brackets that close behind it) that
    white space follows, at a full-width stop, at a paragraph break, and before an item of a list. It
    does not end at an abbreviation, a decimal, an ellipsis or an enumeration ("1."), nor within code
    or a formula; at the end of a fenced block of code it does. "Wait." is a sentence; what has neither
    letter nor digit belongs to the sentence before it. White space leads the sentence that follows it,
    so that no prefix of sentences ends in a space: models continue badly from one.
    """
    parts: list[str] = []
    start = 0
    for match in itertools.chain(re.finditer(_BOUNDARY, text, re.DOTALL), (None,)):
        if match and (match["ellipsis"] or (match["whole"] and not match["whole"].startswith("```"))
                      or (match["stop"] and not _ends_sentence(text, start, match))):
            continue
        end = match.end() if match else len(text)
        part, start = text[start:end], end
        if parts and not re.search(r"\w", part):
            parts[-1] += part
        elif part:
            parts.append(part)
    return parts


# == Requests ======================================================================================
#
# What is sent is built here, once, and the cache's key is a hash of it: there is no list of
# "parameters that matter". Left out of the key are the seed, which names the entry below it, and the
# fields that ask for streaming, which change how a reply arrives and not what it says.


class _Api(_Record):
    """The API of one call, and the key for it."""

    name: str  # a provider's, or the host's where none was named
    base_url: str
    row: _Provider
    key_name: str  # the environment variable of its key, or ""
    key: Optional[str]

    @property
    def is_local(self) -> bool:
        host = urllib.parse.urlsplit(self.base_url).hostname or ""
        return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def _api_of(config: Config) -> _Api:
    """The API that *config* calls, with the key for it.

    A key from the environment goes to the address that is the provider's own, to the one that the
    environment names beside it, or to the one that was given together with the provider's name.
    """
    if config.provider is None and config.base_url is not None:
        host = urllib.parse.urlsplit(config.base_url).netloc
        return _Api(host, config.base_url, _Provider(config.base_url, needs_key=False), "", config.api_key)
    name = config.provider if isinstance(config.provider, str) else "openrouter"
    row = _PROVIDERS[name]
    named = config.base_url is None or isinstance(config.provider, str)
    key_name, url_name = f"{name.upper()}_API_KEY", f"{name.upper()}_BASE_URL"
    base_url = config.base_url or _SETTINGS["base_url"].takes.check(url_name, os.environ.get(url_name) or None)
    key = config.api_key
    if not key and named:
        key = _SETTINGS["api_key"].takes.check(key_name, os.environ.get(key_name))
    return _Api(name, base_url or row.base_url, row, key_name if named else "", key)


class _Request(_Record):
    """What is sent for each sample of one prompt."""

    model: str
    prompt: Prompt
    injected: str  # "" where nothing was
    body: str  # JSON, all but the seed, the streaming and the closing brace
    key: tuple[str, str, str]  # (model, parameters, messages): file names, the last two with hashes
    stored: str  # JSON of what the key stands for

    def payload(self, row: _Provider, seed: int, stream: bool) -> bytes:
        asked = ', "stream": true' if stream else ""
        if stream and row.stream_options:
            asked += ', "stream_options": {"include_usage": true}'
        return f'{self.body}{asked}, "{row.seed}": {seed}}}'.encode()


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("._")[:60] or "_"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _request_of(prompt: Prompt, config: Config, api: _Api) -> _Request:
    """The request for a sample of *prompt*. ValueError where it cannot be made."""
    messages = _messages_of(prompt)
    injected = _injection_of(messages)
    body: dict[str, Any] = {"model": config.model}
    if injected is not None:
        dialect = config.prefill or api.row.prefill
        why = "" if dialect else f"{api.name} answers an assistant message, it does not continue it"
        why = why or next((why for pattern, why in _CANNOT_CONTINUE if re.search(pattern, config.model, re.I)), "")
        if why and config.prefill is None:
            raise _CannotContinue(
                f"{config.model} cannot continue an injected message: {why}. End the prompt with the "
                "user's message, or take a model that shows its thoughts, such as deepseek/deepseek-r1 or "
                "qwen/qwen3-30b-a3b; prefill='trailing' sends it all the same.")
        if injected.endswith((" ", "\t")):
            _warn(
                "the injected text ends in a space, which most models continue badly: their words begin "
                "with one. End it with a word or a newline.")
        in_message, in_body = _DIALECTS[dialect or "trailing"]
        messages[-1] = {**in_message, **messages[-1]}
        body.update(in_body)
    body.update((name, value) for name, value in config.to_dict().items() if _SETTINGS[name].body)
    body.update(config.extra)
    if isinstance(config.provider, dict):
        body["provider"] = config.provider
    body = {name: value for name, value in body.items() if value is not None}
    try:
        spoken = json.dumps(messages, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompt takes messages that JSON can hold: {error}") from None
    fields = json.dumps(body, sort_keys=True)
    base_url = json.dumps(api.base_url)
    label = "".join(
        f"{short}{body[name]:g}-" for short, name in (("t", "temperature"), ("p", "top_p"), ("n", "max_tokens"))
        if name in body)
    parameters = f"{label}{_sha256(base_url + fields)[:16]}"
    # Sent in the order given, as a schema's order is the order of the answer's fields.
    sent = f'{json.dumps(body)[:-1]}, "messages": {spoken}'
    stored = f'{{"base_url": {base_url}, "messages": {spoken}, {fields[1:]}'
    asked = prompt if isinstance(prompt, str) else _plain([dict(message) for message in prompt])
    key = (_file_name(config.model), parameters, _sha256(spoken)[:40])
    return _Request(config.model, asked, injected or "", sent, key, stored)


def _is_streamed(config: Config, row: _Provider) -> bool:
    """Whether to ask for a stream: as the settings say, else where the provider's row needs it."""
    if config.stream is not None or row.stream_above is None:
        return bool(config.stream)
    return max(config.max_tokens or 0, _whole(config.extra.get("max_completion_tokens"))) > row.stream_above


# == Retry =========================================================================================
#
# The whole policy, as pure functions: what may pass, how long the API asked to wait, and how long to
# wait before the next attempt.

_BACKOFF = 1.0  # seconds before the first retry, at most; doubles with each
_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_WAIT = 600.0  # seconds; an API that asks for more has met a daily limit


def _may_pass(status: int) -> bool:
    """Whether a request that met *status* may succeed later. 498: Groq's flex tier has no room just now."""
    return status >= 500 or status in (408, 409, 425, 429, 498)


def _seconds(value: Any, unit: float = 1.0) -> Optional[float]:
    try:
        seconds = float(value) * unit
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def _asked_wait(status: int, headers: Mapping[str, str], error: Mapping[str, Any], now: float) -> Optional[float]:
    """The longest wait in seconds that a failed reply asks for, or None. *now*: Unix seconds.

    OpenRouter's error bodies repeat headers in ``metadata.headers``; X-RateLimit-Reset, which with
    another status than 429 tells of something else, was observed in Unix milliseconds, in either place.
    """
    metadata = _dict(error.get("metadata"))
    waits = [
        _seconds(_dict(error.get("availability")).get("retry_after")), _seconds(metadata.get("retry_after_seconds"))]
    for source in (headers, _dict(metadata.get("headers"))):
        fields = {name.lower(): value for name, value in source.items()}
        told = fields.get("retry-after")
        waits += [_seconds(fields.get("retry-after-ms"), 0.001), _seconds(told)]
        with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):  # a number, or not there: no date
            waits.append(max(0.0, email.utils.parsedate_to_datetime(str(told)).timestamp() - now))
        reset = _seconds(fields.get("x-ratelimit-reset"), 0.001)
        if status == 429 and reset is not None and reset > 1e9:  # as milliseconds; others count seconds, or say "1s"
            waits.append(max(0.0, reset - now))
    return max((wait for wait in waits if wait is not None), default=None)


def _next_wait(error: APIError, attempt: int, chance: float) -> float:
    """Seconds to wait after the failed *attempt* (from 0): full jitter by *chance* in [0, 1), or as told."""
    return max(chance * min(_LONGEST_BACKOFF, _BACKOFF * 2.0**min(attempt, 30)), error.retry_after or 0.0)


# == Replies =======================================================================================
#
# What came back, read into a Response, or into the APIError that says why it cannot be. Every
# APIError of the library is made here, and none holds the key, not even where a server repeats it.

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


def _advice_of(api: _Api, status: Optional[int]) -> str:
    if status is not None and 300 <= status < 400:
        return "redirects are not followed: set base_url to the address that answers"
    return _ADVICE.get(status or 0, "").format(or_set=f" or set {api.key_name}" if api.key_name else "")


def _failure(
    api: _Api, message: str, status: Optional[int] = None, retryable: bool = True,
    retry_after: Optional[float] = None, advice: Optional[str] = None,
) -> APIError:
    if api.key:  # whole words of a short one, such as "x" for a server of one's own
        edge = r"\b" if len(api.key) < 8 else ""
        message = re.sub(edge + re.escape(api.key) + edge, "***", message)
    message = re.sub(r"\s+", " ", message).strip()
    return APIError(
        message if len(message) <= 1000 else message[:1000] + "…", status=status, provider=api.name,
        retryable=retryable, retry_after=retry_after, advice=_advice_of(api, status) if advice is None else advice)


def _refusal(api: _Api, status: int, headers: Mapping[str, str], data: Any, text: str = "") -> APIError:
    """The APIError for a reply of *status* whose body is *data*, or *text* where that is no JSON."""
    error = _dict(data).get("error") or data
    if not isinstance(error, dict):
        error = {"message": error}
    metadata = _dict(error.get("metadata"))
    if 300 <= status < 400:
        text = f"it redirects to {headers.get('location')}"
    words = [error.get("message") or error.get("detail") or text, metadata.get("raw")]
    message = ": ".join(word if isinstance(word, str) else json.dumps(word) for word in words if word)
    if message.lstrip().startswith("<"):
        tags = r"<style.*?</style>|<script.*?</script>|<[^>]*>"
        message = "an HTML page: " + re.sub(tags, " ", message[:20_000], flags=re.DOTALL)
    wait = _asked_wait(status, headers, error, time.time())
    told = _dict(error.get("availability")).get("retryable")
    retryable = told if isinstance(told, bool) else _may_pass(status)
    advice = None
    kinds = f"{error.get('code')} {error.get('type')} {metadata.get('limit_source')}"
    # A stated wait is obeyed even where the message speaks of a daily limit: Groq's waits are short.
    daily = re.search(r"per[-_ ]?day|daily", kinds if wait is not None else f"{kinds} {message}", re.IGNORECASE)
    if "insufficient_quota" in kinds:
        retryable, advice = False, "the account has no quota left: add credit"
    elif retryable and ((wait or 0) > _LONGEST_WAIT or (daily and status == 429)):
        when = f"the API asks to wait {wait / 60:.0f} minutes" if wait else "this limit does not lift within minutes"
        retryable, advice = False, f"{when}: come back then; what arrived is in the cache"
    return _failure(api, message or http.client.responses.get(status, ""), status, retryable, wait, advice)


def _no_reply(api: _Api, error: Exception, timeout: float) -> APIError:
    """The APIError for an exception on the way to a reply."""
    words, retryable, advice = f"{type(error).__name__}: {error}", True, "check the connection, or base_url"
    proxy = re.search(r"Tunnel connection failed: (\d+)", str(error))
    if isinstance(error, ssl.SSLCertVerificationError):
        retryable = False
        advice = ("the certificate is not trusted: point SSL_CERT_FILE to your organisation's certificates; with "
                  "python.org's build on macOS run 'Install Certificates.command' once")
    elif isinstance(error, (TimeoutError, socket.timeout)) and not error.errno:  # with one, keepalive gave up
        words, advice = f"no complete reply within {timeout:g} s", "raise timeout=…, or ask for fewer max_tokens"
    elif isinstance(error, socket.gaierror):
        words = f"the name of {urllib.parse.urlsplit(api.base_url).hostname} (or of a proxy) was not resolved: {error}"
        advice = "check the network, base_url and HTTPS_PROXY"
    elif isinstance(error, http.client.IncompleteRead):
        words = "the reply broke off"
    elif isinstance(error, ConnectionRefusedError):
        words = f"{api.base_url} refused the connection"
        advice = "is the server running there, and the proxy, if HTTP_PROXY or HTTPS_PROXY names one?"
    elif proxy:
        retryable = int(proxy[1]) >= 500
        advice = _ADVICE[407] if proxy[1] == "407" else "check HTTPS_PROXY and NO_PROXY"
    elif isinstance(error, _TooLong):
        words, advice = str(error), "ask for fewer max_tokens"
    elif isinstance(error, OSError) and error.errno == errno.EMFILE:
        advice = "too many open files: raise 'ulimit -n', or lower max_concurrency"
    failure = _failure(api, words, None, retryable, None, advice)
    error.__context__ = None
    if not api.key or api.key not in repr((error, error.args, vars(error))):
        failure.__cause__ = error.with_traceback(None)
    return failure


def _events(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events. ConnectionError where it ends without [DONE]."""
    begun: list[bytes] = []  # the line under way, in pieces: joined once, however small they are
    data: list[bytes] = []  # the data lines of the event under way; other lines are comments and names
    for piece in itertools.chain(pieces, (b"\n\n",)):
        *lines, rest = piece.split(b"\n")
        for line in lines:
            line = b"".join((*begun, line)).rstrip(b"\r")
            begun.clear()
            if line.startswith(b"data:"):
                data.append(line[5:])
            elif not line and data:
                event = b"\n".join(data).strip()
                data.clear()
                if event == b"[DONE]":
                    return
                yield _dict(json.loads(event))
        begun.append(rest)
    raise ConnectionError("the stream ended without [DONE]")


def _assemble(pieces: Iterable[bytes]) -> dict[str, Any]:
    """The unstreamed reply that a stream amounts to. ConnectionError where it breaks off."""
    reply: dict[str, Any] = {}
    names = ("content", "reasoning", "reasoning_content", "reasoning_details", "refusal", "tool_calls")
    message: dict[str, list[Any]] = {name: [] for name in names}
    choice: dict[str, Any] = {"message": message, "finish_reason": None}
    try:
        for event in _events(pieces):
            if event.get("error") or event.get("object") == "error":
                return event
            reply.update((name, value) for name, value in event.items() if value and name != "choices")
            for part in map(_dict, event["choices"] if isinstance(event.get("choices"), list) else ()):
                if part.get("index"):
                    continue
                choice.update((name, part[name]) for name in ("finish_reason", "error") if part.get(name))
                for name, value in _dict(part.get("delta")).items():
                    if value and name in message:
                        message[name] += value if isinstance(value, list) else [value]
    except (OSError, http.client.HTTPException, ValueError):
        if not choice["finish_reason"]:
            raise
    return {**reply, "choices": [choice]}


def _usage_of(usage: Mapping[str, Any]) -> Usage:
    prompt, completion = _whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens"))
    return Usage(
        prompt, completion, _whole(usage.get("total_tokens")) or prompt + completion,
        _whole(_dict(usage.get("completion_tokens_details")).get("reasoning_tokens")),
        _whole(_dict(usage.get("prompt_tokens_details")).get("cached_tokens") or usage.get("prompt_cache_hit_tokens")),
        _seconds(usage.get("cost")) or 0.0)


def _read_json(api: _Api, status: int, headers: Mapping[str, str], pieces: Iterable[bytes]) -> Any:
    """The JSON of a reply, put together where it is streamed. APIError where it is none."""
    if status == 200 and headers.get("content-type", "").startswith("text/event-stream"):
        try:
            return _assemble(pieces)
        except (ValueError, RecursionError) as error:
            raise _failure(api, f"a broken event in the stream: {error}", status) from None
    raw = b"".join(pieces)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raw = raw.replace(api.key.encode(), b"***") if api.key else raw  # before it is cut
        text = raw[:20_000].decode(errors="replace").strip()
        if status != 200:
            raise _refusal(api, status, headers, None, text) from None
        raise _failure(api, f"a reply that is no JSON ({error}): {text[:200]!r}", status) from None


def _read_reply(
    api: _Api, request: _Request, seed: int, status: int, headers: Mapping[str, str], pieces: Iterable[bytes]
) -> Response:
    """The Response in a reply. APIError where there is none in it."""
    data = _read_json(api, status, headers, pieces)
    if status != 200:
        raise _refusal(api, status, headers, data)
    data = _dict(data)
    choices = data.get("choices")
    choice = _dict(choices[0]) if isinstance(choices, list) and choices else {}
    finish_reason = choice.get("finish_reason")
    error = data.get("error") or choice.get("error") or (data if data.get("object") == "error" else None)
    if error or finish_reason == "error":
        code = _whole(_seconds(_dict(error).get("code") or _dict(error).get("http_status")))
        raise _refusal(api, code if 400 <= code < 600 else 502, headers, {"error": error or "finish_reason is 'error'"})
    message = choice.get("message")
    if not isinstance(message, dict):
        raise _failure(api, "a reply without choices", status)
    reasoning, content, completed = _read_message(message, request.injected, api.row.echoes)
    if not (finish_reason or content or reasoning):
        raise _failure(api, "an empty reply without a finish reason", status)
    return Response(
        content, reasoning, completed, str(finish_reason) if finish_reason else None, seed,
        _usage_of(_dict(data.get("usage"))), str(data.get("model") or request.model),
        str(data.get("provider") or api.name), str(data.get("id") or headers.get("x-generation-id") or ""),
        _whole(data.get("created")) or int(time.time()))


# == Transport =====================================================================================
#
# Bytes out, bytes in. urllib.request stays in charge, so that proxies, NO_PROXY and certificates work
# as people expect; our handler for it keeps the connections, which its own does not. It knows of no
# JSON and no retry, but for one: a kept connection that turns out to be closed is replaced.

_LONGEST_REPLY = 64 * 2**20  # bytes
_CONNECT_TIMEOUT = 30.0  # seconds, for each address of a name: one that is dead must not cost the whole timeout
_IDLE_CONNECTION = 60.0  # seconds a connection is kept unused: less than gateways keep it
_STALE = 2.0  # seconds within which a connection that the server had closed shows it; later, work was lost
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)  # select() takes no file above 1023
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4))


class _Reader(io.RawIOBase):
    """The bytes of a socket until its connection's deadline, which no timeout of a socket can be.

    A socket's timeout starts anew with each byte, and OpenRouter pads a waiting reply with spaces.
    """

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def makefile(self, mode: str) -> io.BufferedReader:  # all that HTTPResponse asks of a socket
        return io.BufferedReader(self, 16384)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.limit()
        count = self._connection.sock.recv_into(buffer)
        self._connection.received += count
        if self._connection.received > _LONGEST_REPLY:
            raise _TooLong(f"a reply above {_LONGEST_REPLY >> 20} MiB")
        return count


class _Reply(http.client.HTTPResponse):
    """A reply that knows its connection."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__(_Reader(connection))  # type: ignore[arg-type]
        self.connection = connection

    def begin(self) -> None:
        """Read the status line and the headers, as the base class does, but into a dict of small names.

        Its parser, made for mail, takes as long as all the rest of a request and its reply.
        """
        self.code = self.status = 100
        while self.status < 200:
            version, self.status, reason = self._read_status()  # type: ignore[attr-defined]
            headers: dict[str, str] = {}
            while True:
                line = self.fp.readline(65537)
                if len(line) > 65536 or len(headers) > 256:
                    raise http.client.LineTooLong("header line")
                if line in (b"\r\n", b"\n", b""):
                    break
                name, _, value = line.decode("iso-8859-1").partition(":")
                headers[name.strip().lower()] = value.strip()
        self.code, self.reason, self.headers = self.status, reason.strip(), headers  # type: ignore[assignment]
        self.chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        size = headers.get("content-length", "")
        self.length = int(size) if size.isdecimal() and len(size) < 20 and not self.chunked else None
        if self.status in (204, 304):
            self.length = 0
        asked = headers.get("connection", "").lower()
        self.will_close = "close" in asked or (version == "HTTP/1.0" and "keep-alive" not in asked) or (
            self.length is None and not self.chunked)

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives. IncompleteRead where it ends early."""
        if (self.length or 0) > _LONGEST_REPLY:
            raise _TooLong(f"a reply above {_LONGEST_REPLY >> 20} MiB")
        piece = b"more"
        while piece and not self.isclosed():
            # read1 does not count down a Content-Length before Python 3.12; read waits for all it is asked.
            piece = self.read1(65536) if self.length is None else self.read(min(self.length, 65536))
            yield piece
        if self.length:
            raise http.client.IncompleteRead(b"", self.length)


class _Connection(http.client.HTTPConnection):
    """A connection on which nothing outlasts the deadline of the request under way."""

    deadline = 0.0  # by time.monotonic()
    received = 0  # bytes, since the request
    idle_since = 0.0
    key: tuple[Optional[str], ...] = ()

    def remaining(self) -> float:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline is over")
        return remaining

    def limit(self) -> None:
        """Let the socket wait until the deadline; a twentieth of a second is not worth the system call."""
        remaining = self.remaining()
        if abs((self.sock.gettimeout() or -1) - remaining) > 0.05:
            self.sock.settimeout(remaining)

    def response_class(self, *_: Any, **__: Any) -> _Reply:  # type: ignore[override]
        return _Reply(self)  # a proxy's, to CONNECT

    def connect(self) -> None:
        self.timeout = min(self.remaining(), _CONNECT_TIMEOUT)
        try:
            super().connect()
        except (TimeoutError, socket.timeout):
            self.remaining()  # raises where it is the deadline that is over
            raise ConnectionError(f"no connection within {self.timeout:g} s") from None
        with contextlib.suppress(OSError):  # a sandbox may not let us
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE:
                if hasattr(socket, name):
                    self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def post(self, selector: str, body: Any, headers: Mapping[str, str]) -> _Reply:
        """Send a request in one piece, where http.client sends its head first, and read its reply's head."""
        if self.sock is None:
            self.connect()
        self.limit()
        lines = (f"POST {selector} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "\r\n")
        # Where the other end closes, its reply may have come before all was sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            self.sock.sendall("\r\n".join(lines).encode("latin-1") + body)
        reply = _Reply(self)
        reply.begin()
        return reply

    def is_alive(self) -> bool:
        """Whether the server has neither closed this idle connection nor sent anything on it."""
        if time.monotonic() - self.idle_since > _IDLE_CONNECTION:
            return False
        with _Selector() as selector:
            selector.register(self.sock, selectors.EVENT_READ)
            return not selector.select(0)


class _TLSConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Transport(urllib.request.AbstractHTTPHandler):
    """POST through urllib.request, on the connections that earlier requests left, where it can."""

    def __init__(self) -> None:
        super().__init__()
        self._opener = urllib.request.OpenerDirector()  # no redirects, no cookies, no passwords
        self._opener.addheaders = [("User-Agent", f"rollouts/{__version__}"), ("Accept-Encoding", "identity")]
        self._opener.add_handler(urllib.request.ProxyHandler())
        self._opener.add_handler(self)
        self._lock = threading.Lock()  # protects _idle and _context
        self._idle: dict[tuple[Optional[str], ...], list[_Connection]] = {}
        self._context: Optional[ssl.SSLContext] = None
        self._closed = False

    def post(
        self, url: str, headers: dict[str, str], body: bytes, timeout: float,
        read: Callable[[int, Mapping[str, str], Iterator[bytes]], Response],
    ) -> Response:
        """What *read* makes of the reply's status, headers and pieces, within *timeout* seconds in all."""
        reply = self._opener.open(urllib.request.Request(url, body, headers), timeout=timeout)
        assert isinstance(reply, _Reply)
        connection, pieces = reply.connection, reply.pieces()
        try:
            result = read(reply.status, reply.headers, pieces)  # type: ignore[arg-type]
            # A stream is read up to its [DONE]: what ends the body has mostly come along with it.
            connection.deadline = min(connection.deadline, time.monotonic() + 0.5)
            with contextlib.suppress(OSError, http.client.HTTPException):
                deque(pieces, maxlen=0)
            return result
        finally:
            connection.idle_since = time.monotonic()
            with self._lock:
                keep = reply.isclosed() and not reply.will_close and not self._closed
                if keep:
                    self._idle.setdefault(connection.key, []).append(connection)
            if not keep:
                reply.close()
                connection.close()

    def close(self) -> None:
        """Close the connections that are idle."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for connection in itertools.chain.from_iterable(idle.values()):
            connection.close()

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        deadline = time.monotonic() + (request.timeout or 0)
        headers = {name.title(): value for name, value in request.header_items()}
        tunnel = getattr(request, "_tunnel_host", None)  # how ProxyHandler says that the host is a proxy
        for_proxy = {}
        if tunnel and "Proxy-Authorization" in headers:
            for_proxy["Proxy-Authorization"] = headers.pop("Proxy-Authorization")
        while True:
            connection = self._connection(request, tunnel, for_proxy)
            kept = connection.sock is not None
            connection.deadline, connection.received = deadline, 0
            begun = time.monotonic()
            try:
                return connection.post(request.selector, request.data, headers)
            except BaseException as error:
                connection.close()
                closed = isinstance(error, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError))
                # Only a kept connection may have been closed before it saw the request, and that shows
                # within a round trip. All else is a failed attempt: the retry policy has the say.
                late = time.monotonic() - begun > _STALE
                if late or not (kept and closed and connection.received == 0):
                    raise

    https_open = http_open

    def _connection(
        self, request: urllib.request.Request, tunnel: Optional[str], for_proxy: dict[str, str]
    ) -> _Connection:
        """A connection for *request*: a kept one, or one that is still to be made."""
        key = (request.type, request.host, tunnel)
        while True:
            with self._lock:
                idle = self._idle.get(key)
                connection = idle.pop() if idle else None
                stale = idle and time.monotonic() - idle[0].idle_since > _IDLE_CONNECTION
                oldest = idle.pop(0) if idle and stale else None  # what a burst left over goes one by one
            if oldest is not None:
                oldest.close()
            if connection is None:
                break
            if connection.is_alive():
                return connection
            connection.close()
        if request.type == "https":
            with self._lock:
                if self._context is None:  # costs 20 ms, so one for all
                    self._context = ssl.create_default_context()
                    self._context.set_alpn_protocols(["http/1.1"])
            connection = _TLSConnection(request.host, context=self._context)
        else:
            connection = _Connection(request.host)
        if tunnel:
            connection.set_tunnel(tunnel, headers=for_proxy)
        connection.key = key
        return connection


# == Pacing ========================================================================================
#
# When a request may start. Time comes in through _clock, which a test replaces.


class _Clock:
    """Where the waits of this module read the time, spend it, and draw their random numbers."""

    now = staticmethod(time.monotonic)
    chance = staticmethod(random.random)

    @staticmethod
    def sleep(seconds: float, stop: threading.Event) -> None:
        stop.wait(seconds)


_clock = _Clock()


class _Bucket:
    """The token bucket of one limit: in no minute more starts than *per_minute*, the first included.

    It holds one second's worth of tokens, and refills so slowly that a minute that begins with all of
    them still keeps the promise; a hundredth slower still, since threads wake late.
    """

    def __init__(self, per_minute: float) -> None:
        whole = math.floor(per_minute) if per_minute > 1 else per_minute
        self.burst = max(1, int(whole / 60))
        self.gap = 60.6 / (whole - self.burst + 1)  # seconds for one token
        self.next = -math.inf  # when a bucket of one token would have it
        self.turn = threading.Lock()  # held by the one thread that waits for the next token; the others queue


class _Pacer:
    """When a request to one API may start: not within a hold, and as the bucket of its limit says."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _hold
        self._hold = -math.inf
        self._buckets: dict[float, _Bucket] = {}

    def wait(self, per_minute: Optional[float], stop: threading.Event) -> None:
        """Wait until a request may start, or until *stop* is set."""
        limit = per_minute or 1e12  # as good as none
        bucket = self._buckets.get(limit) or self._buckets.setdefault(limit, _Bucket(limit))
        with bucket.turn if per_minute else contextlib.nullcontext():
            while not stop.is_set():
                now = _clock.now()
                start = max(self._hold, bucket.next - (bucket.burst - 1) * bucket.gap)
                if start <= now:
                    bucket.next = max(bucket.next, now) + bucket.gap
                    return
                _clock.sleep(start - now, stop)

    def hold(self, seconds: float) -> None:
        """Let nothing start for *seconds*."""
        with self._lock:
            self._hold = max(self._hold, _clock.now() + seconds)


# == Progress ======================================================================================
#
# One line for all that a process generates at once. Workers only count; a thread of its own draws,
# for as long as there is something to show.

_REDRAW = 0.2  # seconds, on a terminal or in a notebook
_LOG_LINE = 30.0  # seconds, into anything else

_Tally = Counter[str]  # total, done, cached, retrying, failed; and cost, in US dollars


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def _format_progress(tally: _Tally, elapsed: float, width: int, reason: str = "") -> str:
    """The line for *tally* after *elapsed* seconds, in less than *width* columns: what matters most first.

    *reason* is why something is retried, and is said where nothing has been drawn yet.
    """
    done, total, cost = tally["done"], tally["total"], tally["cost"]
    rate = (done - tally["cached"]) / elapsed if elapsed > 0 else 0.0
    counts = [f"{done}/{total}"]
    if rate:
        counts += [f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min", f"{_duration((total - done) / rate)} left"]
    counts += [f"{tally[name]} {name}" for name in ("failed", "retrying", "cached") if tally[name]]
    if cost:
        counts.append(f"${cost:.4f}" if cost < 1 else f"${cost:.2f}")
    line = counts[0]
    for count in counts[1:]:
        if len(line) + len(count) + 2 < width:
            line += ", " + count
    if reason and tally["retrying"] and done == tally["cached"]:
        line += ": " + re.sub("[^ -~]", "?", reason)  # a column for each character, and none that moves the cursor
    room = min(width - len(line) - 4, 30)
    if room >= 5 and total:
        filled = room * done // total
        line = f"[{'#' * filled}{'.' * (room - filled)}] {line}"
    return line[: width - 1]


def _redraws(stream: Any) -> bool:
    """Whether *stream* shows a line that is written over: a terminal, or a notebook's cell."""
    try:
        return stream is not None and (stream.isatty() or type(stream).__module__.startswith("ipykernel"))
    except (AttributeError, ValueError):
        return False


def _columns(stream: Any) -> int:
    """The width of *stream*, and not of stdout, which may be elsewhere."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):  # a notebook
        return 80


class _Progress:
    """The line on stderr, and the lines of `verbose` above it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects all the rest but the counts, and the order of what is written
        self._counting = threading.Lock()  # protects the counts: a terminal that is stopped must not stop workers
        self._tally = _Tally()
        self._active = 0
        self._since = 0.0
        self._shown = ""
        self._logged = False
        self._ended = threading.Event()
        self._ended.set()
        self.reason = ""  # why the latest attempt failed

    def begin(self, total: int, cached: int) -> _Tally:
        """Count *total* samples as under way, *cached* of them as done; the tally takes what follows."""
        with self._lock:
            if not self._active:
                self._tally, self._since, self._logged = _Tally(), time.monotonic(), False
            self._active += 1
            self.count(self._tally, total=total, done=cached, cached=cached)
            self._show()
            return self._tally

    def show(self) -> None:
        """Bring up the line where there is something to say."""
        with self._lock:
            self._show()

    def _show(self) -> None:
        # A single sample gets no line, unless it is retried; a second one, of this call or another, brings it up.
        if self._active and self._ended.is_set() and (self._tally["total"] > 1 or self._tally["retrying"]):
            ended = threading.Event()
            with contextlib.suppress(RuntimeError):  # no thread is to be had: no line
                threading.Thread(target=self._draw, args=(ended,), name="rollouts-progress", daemon=True).start()
                self._ended = ended

    def count(self, tally: _Tally, **more: Any) -> None:
        """Add to the counts of *tally*."""
        with self._counting:
            tally.update(more)

    def end(self, unfinished: int) -> None:
        """Take back the *unfinished* samples of a call that is over; with the last call the line goes."""
        with self._lock:
            self._active -= 1
            self.count(self._tally, total=-unfinished)
            if not self._active:
                self._ended.set()
                if self._logged:
                    self._write(self._line(200) + "\n")
                self._erase()

    def say(self, text: str) -> None:
        """Write a line of its own."""
        with self._lock:
            self._erase()
            self._write(text + "\n")

    def _draw(self, ended: threading.Event) -> None:
        redraws = _redraws(sys.stderr)
        while not ended.wait(_REDRAW if redraws else _LOG_LINE):
            with self._lock:
                if ended.is_set():
                    return
                if redraws:
                    line = self._line(_columns(sys.stderr) - 2)  # room for the ^C that a terminal echoes
                    self._write("\r" + line + " " * (len(self._shown) - len(line)))
                    self._shown = line
                else:
                    self._write(self._line(200) + "\n")
                    self._logged = True

    def _line(self, width: int) -> str:
        return _format_progress(self._tally, time.monotonic() - self._since, width, self.reason)

    def _erase(self) -> None:
        if self._shown:
            self._write("\r" + " " * (len(self._shown) + 2) + "\r")  # with a ^C behind it
            self._shown = ""

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None under pythonw
            sys.stderr.write(text)
            sys.stderr.flush()


_progress = _Progress()


# == Caches ========================================================================================
#
# Two stores, the same three methods: get, which adds a line to a list of the caller's for each entry
# that it cannot use; put, which raises OSError; and close. A store knows nothing of what is under way.


def _dumped(response: Response) -> str:
    """*response* as a cache holds it."""
    data = response.to_dict()
    del data["cached"]
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a token that was cut
        text = json.dumps(data)
    return text


def _loaded(text: bytes, seed: int) -> Response:
    """The response that a cache holds for *seed*. ValueError for anything else."""
    data = _dict(json.loads(text))
    if data.get("seed") != seed or data.get("finish_reason") == "error":
        raise ValueError(f"no response of seed {seed}")
    return Response.from_dict({**data, "cached": True})


class _JsonCache:
    """A file a response: cache_dir/model/parameters/abc/abc…/seed_00000.json, and request.json beside."""

    def __init__(self, cache_dir: str) -> None:
        self._directory = cache_dir

    def _place(self, key: tuple[str, str, str]) -> str:
        model, parameters, messages = key
        return f"{self._directory}/{model}/{parameters}/{messages[:3]}/{messages}"

    def get(self, request: _Request, seeds: Sequence[int], unusable: list[str]) -> dict[int, Response]:
        """The stored responses of *seeds*."""
        found: dict[int, Response] = {}
        place = self._place(request.key)
        if len(seeds) > 1 and not os.path.isdir(place):
            return found  # one look for a prompt that is new, not one a seed
        for seed in seeds:
            path = f"{place}/seed_{seed:05d}.json"
            try:
                with open(path, "rb", buffering=0) as file:
                    found[seed] = _loaded(file.read(), seed)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except (OSError, ValueError, RecursionError) as error:
                unusable.append(f"{path}: {error}")
        return found

    def put(self, request: _Request, response: Response) -> None:
        """Store *response* so that it is there whole, or not at all."""
        place, name, text = self._place(request.key), f"seed_{response.seed:05d}.json", _dumped(response)
        try:
            self._write(place, name, text)
        except FileNotFoundError:  # the prompt's first: its directory comes to be with its request in it
            draft = f"{os.path.dirname(place)}/.{os.urandom(8).hex()}.tmp"
            os.makedirs(draft)
            self._write(draft, "request.json", json.dumps(json.loads(request.stored), indent=1, sort_keys=True))
            try:
                os.rename(draft, place)
            except OSError:  # another thread or process was first
                os.remove(f"{draft}/request.json")
                os.rmdir(draft)
            self._write(place, name, text)

    @staticmethod
    def _write(place: str, name: str, text: str) -> None:
        # The draft's name is new on every machine that shares the directory. No fsync: this is proof
        # against a killed process, not against a power cut, after which a damaged entry is a miss.
        draft = f"{place}/.{os.urandom(8).hex()}.tmp"
        try:
            with open(draft, "xb", buffering=0) as file:
                data = text.encode()
                if file.write(data) < len(data):  # a full disk takes a part, and says nothing
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.replace(draft, f"{place}/{name}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(draft)
            raise

    def close(self) -> None:
        """Nothing is held open."""


class _SqlCache:
    """cache_dir/rollouts.sqlite3: the same, in two tables."""

    _TABLES = """
        CREATE TABLE IF NOT EXISTS requests (id TEXT PRIMARY KEY, request TEXT NOT NULL) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS responses (
            request TEXT NOT NULL, seed INTEGER NOT NULL, response TEXT NOT NULL, PRIMARY KEY (request, seed)
        ) WITHOUT ROWID;"""

    def __init__(self, cache_dir: str) -> None:
        self._path = os.path.join(cache_dir, "rollouts.sqlite3")
        self._lock = threading.Lock()  # protects all the rest: the connection serves one thread at a time
        self._connection: Optional[sqlite3.Connection] = None
        self._file: Optional[tuple[int, int]] = None
        self._closed = False

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """The connection to the file that is there now: whoever clears the cache deletes it. OSError."""
        import sqlite3

        with self._lock:
            try:
                if self._connection is None or self._file != self._identity():
                    self._disconnect()
                    self._connection = self._connect()
                    self._file = self._identity()
                yield self._connection
            except sqlite3.Error as error:
                raise OSError(f"{self._path}: {error}") from error
            finally:
                if self._closed:  # a response that was in flight then
                    self._disconnect()

    def _identity(self) -> Optional[tuple[int, int]]:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _connect(self) -> sqlite3.Connection:
        import sqlite3

        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        name, tables = self._path, self._TABLES
        if os.path.exists(name) and not os.access(os.path.dirname(name), os.W_OK):  # WAL would need a file beside it
            name, tables = f"file:{urllib.parse.quote(name)}?immutable=1", ""
        connection = sqlite3.connect(
            name, timeout=60, isolation_level=None, check_same_thread=False, uri=not tables)
        try:
            for patience in range(100, -1, -1):
                try:
                    connection.execute("PRAGMA journal_mode=WAL")
                    break
                except sqlite3.OperationalError as error:  # the switch does not wait for another process that is at it
                    if not patience or "locked" not in str(error):
                        raise
                    time.sleep(0.05)
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(tables)
            connection.text_factory = bytes  # so that one damaged text does not fail a whole query
        except BaseException:
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def get(self, request: _Request, seeds: Sequence[int], unusable: list[str]) -> dict[int, Response]:
        """The stored responses of *seeds*, which follow each other."""
        found: dict[int, Response] = {}
        if not os.path.exists(self._path):
            return found
        try:
            with self._connected() as connection:
                rows = connection.execute(
                    "SELECT seed, response FROM responses WHERE request = ? AND seed BETWEEN ? AND ?",
                    ("/".join(request.key), seeds[0], seeds[-1])).fetchall()
        except OSError as error:
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
            connection.execute("INSERT OR IGNORE INTO requests VALUES (?, ?)", (key, request.stored))
            connection.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?)", (key, response.seed, text))

    def close(self) -> None:
        """Close the connection. What still comes is stored over one of its own."""
        with self._lock:
            self._closed = True
            self._disconnect()


# == Pool ==========================================================================================
#
# The threads that wait for replies. Not concurrent.futures' executor: its threads cannot be daemons,
# so that a reply that is ten minutes away would hold an interrupted interpreter for as long, and it
# cannot widen for one call.

_IDLE_THREAD = 10.0  # seconds a thread without work stays


class _Pool:
    """Daemon threads for tasks: functions that do one unit of work, and return whether there is more."""

    def __init__(self, width: int) -> None:
        self.width = width  # most threads, all tasks together
        self.is_awaited = True  # at exit
        self._ready = threading.Condition()  # protects all the rest
        self._tasks: deque[Callable[[], bool]] = deque()
        self._threads = 0
        self._waiting = 0

    def submit(self, task: Callable[[], bool]) -> None:
        """Run *task* until it has nothing more to do."""
        with self._ready:
            self._tasks.append(task)
            if len(self._tasks) <= self._waiting:
                self._ready.notify()
            elif self._threads < self.width:
                try:
                    threading.Thread(target=self._work, name="rollouts", daemon=True).start()
                    self._threads += 1
                except RuntimeError:  # the system has no more: those that there are will do
                    if not self._threads:
                        self._tasks.pop()
                        raise

    def _work(self) -> None:
        task: Optional[Callable[[], bool]] = None
        while True:
            with self._ready:
                if task is not None:
                    self._tasks.append(task)  # behind the others: each call gets its turn
                self._waiting += 1
                while not self._tasks and self._threads <= self.width and self._ready.wait(_IDLE_THREAD):
                    pass
                self._waiting -= 1
                if not self._tasks or self._threads > self.width:
                    self._threads -= 1
                    self._ready.notify()  # what woke this one may be for another
                    return
                task = self._tasks.popleft()
            if not task():
                task = None

    @property
    def is_busy(self) -> bool:
        with self._ready:
            return bool(self._tasks) or self._threads > self._waiting


# == Client ========================================================================================
#
# The only room that knows all the others. A call is prepared (pure), looked up in the cache, and
# launched: its turns go to the pool, and each turn makes one sample, in _sample and nowhere else.

# What is wrong with one prompt may be right with the next: too long, or refused for what it says.
_OF_THE_PROMPT = (400, 403, 413, 422)
_ENOUGH_REFUSED = 20  # prompts, with not one sample drawn: so it is not the prompts
_PROBE: Prompt = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "<think>\nBefore I come to that, a quick sum to warm up: 2 x 4 ="},
)

_Outcome = Union[Response, APIError]
_Cache = Union[_JsonCache, _SqlCache]


class _Call:
    """One call: the samples that are still to be sent, and what came of the others."""

    def __init__(self, config: Config, api: _Api, cache: Optional[_Cache], requests: list[_Request], n: int) -> None:
        self.config, self.api, self.cache, self.requests = config, api, cache, requests
        self.seeds = range(config.seed, config.seed + n)
        self.over = threading.Event()  # nothing more is sent, and the results stand
        self.when_over: list[Callable[[], Any]] = []
        self.failure: Optional[BaseException] = None
        self.unusable: list[str] = []
        self.unwritten: list[str] = []
        self.outcomes: list[dict[int, _Outcome]] = [{} for _ in requests]
        self._lock = threading.Lock()  # protects all the rest, and outcomes
        self._left = len(requests) * n
        self._jobs = ((index, seed) for index in range(len(requests)) for seed in self.seeds)
        self._again: list[tuple[int, int]] = []
        self._refused: dict[int, APIError] = {}
        self._succeeded = False
        self._tally: Optional[_Tally] = None

    def begin(self) -> int:
        """Show what is under way, and return how many samples are still to be drawn."""
        cached = sum(map(len, self.outcomes))
        total, self._left = self._left, self._left - cached
        if self._left and self.config.progress_bar:
            self._tally = _progress.begin(total, cached)
        return self._left

    def next(self) -> Optional[tuple[int, int]]:
        """The next sample to draw: the index of its request and its seed."""
        while True:
            with self._lock:
                job = self._again.pop() if self._again else next(self._jobs, None)
                if job is None or self.over.is_set():
                    return None
                index, seed = job
                if seed in self.outcomes[index]:
                    continue
                refused = self._refused.get(index)
            if refused is None:
                return job
            self.record(index, seed, refused._of(seed))

    def put_back(self, index: int, seed: int) -> None:
        """Draw this sample after all."""
        with self._lock:
            self._again.append((index, seed))

    def record(self, index: int, seed: int, outcome: _Outcome) -> None:
        """Note what came of a sample, and whether the call is over with it."""
        with self._lock:
            if self.over.is_set():
                return
            if isinstance(outcome, Response):
                self._succeeded = True
                self.count(done=1, cached=int(outcome.cached), cost=0.0 if outcome.cached else outcome.usage.cost)
            else:
                self.count(done=1, failed=1)
            self.outcomes[index][seed] = outcome
            self._left -= 1
            over = not self._left
            if isinstance(outcome, APIError) and not outcome.retryable:
                self._refused[index] = outcome
                own = len(self.requests) > 1 and outcome.status in _OF_THE_PROMPT
                if not own or (len(self._refused) >= _ENOUGH_REFUSED and not self._succeeded):
                    self.failure, over = outcome, True
        if over:
            self.finish()

    def count(self, **more: float) -> None:
        if self._tally is not None:
            _progress.count(self._tally, **more)

    def say(self, index: int, seed: int, text: str) -> None:
        sample = f"prompt {index}, seed {seed}" if len(self.requests) > 1 else f"seed {seed}"
        if "logging" in sys.modules:  # else nobody listens, and importing it costs a quarter of importing us
            sys.modules["logging"].getLogger(__name__).debug("%s: %s", sample, text)
        if self.config.verbose:
            _progress.say(f"rollouts: {sample}: {text}")

    def finish(self, failure: Optional[BaseException] = None) -> None:
        """End the call: nothing more is sent, and what still arrives is only cached."""
        with self._lock:
            if self.over.is_set():
                return
            self.failure = self.failure or failure
            if self._tally is not None:  # before whoever waits can write a line of its own
                _progress.end(self._left)
            self.over.set()
        for tell in self.when_over:
            tell()

    def results(self) -> list[Rollouts]:
        """What the call returns, raises and warns of."""
        config, total = self.config, len(self.seeds) * len(self.requests)
        errors = [each for outcomes in self.outcomes for each in outcomes.values() if isinstance(each, APIError)]
        if self.failure is None and errors and len(errors) == total:
            self.failure = min(errors, key=lambda error: error.seed or 0)
        notes = [
            f"{len(reasons)} {what}: {Counter(reasons).most_common(1)[0][0]}" for what, reasons in (
                (f"of {total} samples failed, mostly with", [] if self.failure else [str(error) for error in errors]),
                ("cache entries could not be used and were asked for again, such as", self.unusable),
                ("responses could not be written to the cache", self.unwritten)) if reasons]
        # Where warnings are errors, this one must not hide what failed.
        with contextlib.suppress(UserWarning) if self.failure else contextlib.nullcontext():
            if notes:
                _warn("; ".join(notes))
        if self.failure is not None:
            raise self.failure
        rollouts = []
        for request, outcomes in zip(self.requests, self.outcomes):
            ordered = [outcomes[seed] for seed in self.seeds]
            rollouts.append(Rollouts(
                request.prompt, [each for each in ordered if isinstance(each, Response)],
                [each for each in ordered if isinstance(each, APIError)], len(self.seeds), config.model,
                config.temperature, config.top_p, config.max_tokens, config.cache_dir if self.cache else None))
        return rollouts


def _is_interrupt(error: BaseException) -> bool:
    """Whether *error* came of Ctrl-C, which asyncio turns into the cancelling of a task like any other."""
    import signal

    runner = getattr(getattr(signal.getsignal(signal.SIGINT), "func", None), "__self__", None)  # from Python 3.11
    return (
        isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
        or bool(getattr(runner, "_interrupt_count", 0)))


_clients: weakref.WeakSet[RolloutsClient] = weakref.WeakSet()
_of_the_parent: list[Any] = []


def _release(transport: _Transport, caches: dict[tuple[type[_Cache], str], _Cache]) -> None:
    transport.close()
    for cache in list(caches.values()):
        cache.close()


class RolloutsClient:
    """Draws samples of prompts from one model.

    Keywords are the settings of `Config`, and any further field of the API's request body (`min_p`,
    `stop`, `response_format`, …), which is sent as it is. All of them are defaults that a call may
    override; there None takes a field out of the request. A client serves any number of threads and
    event loops at once, and pickles without its key. ValueError names a bad argument, the value it
    got and what it takes.
    """

    @_Asked
    def __signature__(cls) -> Any:
        from inspect import Parameter, Signature

        model, *settings, extra = Config.__signature__.parameters.values()
        return Signature([
            model, *(setting.replace(kind=Parameter.KEYWORD_ONLY) for setting in settings),
            extra.replace(kind=Parameter.VAR_KEYWORD, annotation="Any", default=Parameter.empty)])

    def __init__(self, model: str, **settings: Any) -> None:
        self._config = Config(model)._override(settings)
        self._start()

    def _start(self) -> None:
        """Begin with nothing under way: when new, when unpickled, and in a forked child."""
        self._lock = threading.Lock()  # protects _flights and _calls; of the dicts below, setdefault alone is used
        # Samples under way by what makes them the same, with the calls that wait for each.
        self._flights: dict[Hashable, list[tuple[_Call, int]]] = {}
        self._caches: dict[tuple[type[_Cache], str], _Cache] = {}
        self._pacers: dict[str, _Pacer] = {}
        self._calls: set[_Call] = set()
        self._pool = _Pool(self._config.max_concurrency)
        self._transport = _Transport()
        self._closed = False
        self._release = weakref.finalize(self, _release, self._transport, self._caches)
        _clients.add(self)

    def __getattr__(self, name: str) -> Any:
        if name in _SETTINGS:
            return getattr(self._config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_SETTINGS]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            raise AttributeError(f"{name} is fixed: pass {name}=… to a call, or make another client")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        settings = (
            f", {name}={value!r}" for name, value in vars(self._config).items()
            if name != "model" and value != _SETTINGS[name].default)
        return f"{type(self).__name__}({self.model!r}{''.join(settings)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_config": self._config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __enter__(self) -> RolloutsClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Send nothing more, and close what is idle. What is in flight still finishes and is kept."""
        self._closed = True
        for call in list(self._calls):
            call.finish(RolloutsError("the client was closed"))
        self._release()

    def generate(
        self, prompt: Prompt, n_samples: int = 1, *, seed: Optional[int] = None, **overrides: Any
    ) -> Rollouts:
        """Return *n_samples* samples of *prompt*, from the cache or from the API.

        *prompt* is a str or a list of chat messages. Where a str contains "<think>", what comes before
        it is the question, and the model continues what begins there; so it does with a list that
        ends in an assistant message. The samples have the seeds *seed*, *seed* + 1, … and come in
        that order. *overrides* are settings for this call.

        APIError is raised for what every sample would meet alike, or where none succeeded. What fails
        after all retries otherwise stands in ``rollouts.errors``, and one warning counts it.
        ValueError: an argument is wrong, or the model cannot continue an assistant message.
        """
        return self._run([prompt], n_samples, seed, overrides)[0]

    async def agenerate(
        self, prompt: Prompt, n_samples: int = 1, *, seed: Optional[int] = None, **overrides: Any
    ) -> Rollouts:
        """Do as generate() does, in an event loop; any number of them may be under way at once.

        Cancelled, it drops what was not sent; what is in flight finishes and is kept in the cache.
        """
        import asyncio

        call = self._prepare([prompt], n_samples, seed, overrides)
        if call.cache is not None:
            await asyncio.to_thread(self._look_up, call)
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(over.set)

        call.when_over.append(tell)
        with self._under_way(call):
            await over.wait()
        return call.results()[0]

    def generate_many(
        self, prompts: Iterable[Prompt], n_samples: int = 1, *, seed: Optional[int] = None, **overrides: Any
    ) -> list[Rollouts]:
        """Return *n_samples* samples of each of *prompts*, all through one queue.

        A prompt that the API refuses (400, 403, 413, 422) fails alone: its samples stand in its
        ``errors``. What would meet every prompt alike is raised, as from generate().
        """
        if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
            raise ValueError("prompts takes a list of prompts; for one prompt there is generate()")
        return self._run(list(prompts), n_samples, seed, overrides)

    def resample(
        self, prompt: Prompt, reasoning: Union[str, Response], n_samples: int, *, at: Optional[Iterable[int]] = None,
        suffix: str = "", **overrides: Any,
    ) -> list[Rollouts]:
        """Return, for each i, *n_samples* continuations of the first i sentences of *reasoning*.

        i runs from 0 to the number of sentences, both included, or over *at*. The sentences are those
        of split_sentences(); *reasoning* is a thought without its tags, or the Response that has it.
        Continuations of prefix i are "without" sentence i, those of prefix i + 1 "with" it. *suffix*
        is added to each prefix: ``"\\n</think>\\n\\nTherefore, the final answer is \\\\boxed{"`` forces
        the answer. Where *prompt* ends in an open thought already, *reasoning* goes on from there.
        """
        text = reasoning.reasoning if isinstance(reasoning, Response) else reasoning
        if not isinstance(text, str) or "</think>" in text or text.lstrip().startswith("<think>"):
            raise ValueError(
                f"reasoning takes a thought's text without its tags, or a Response that has one, not {text!r:.200}")
        sentences = split_sentences(text.rstrip())
        if not isinstance(suffix, str):
            raise ValueError(f"suffix takes a str, not {suffix!r:.200}")
        if at is not None and not isinstance(at, Iterable):
            raise ValueError(f"at takes a list of integers, not {at!r:.200}")
        indices = range(len(sentences) + 1) if at is None else list(at)
        for index in indices:
            _integer(0, len(sentences)).check("at", index)
        messages = _messages_of(prompt)
        begun = _injection_of(messages)
        if begun is None:
            begun = "<think>\n"
        elif not _leaves_open(begun):
            raise ValueError("prompt takes a question, or one that ends in a thought that is still open")
        else:
            messages = messages[:-1]
        prefixes = ["".join((begun, *sentences[:index], suffix)) for index in indices]
        return self.generate_many(
            [[*messages, {"role": "assistant", "content": prefix}] for prefix in prefixes], n_samples, **overrides)

    def check_injection(self, **overrides: Any) -> bool:
        """Find out, with one request for a few tokens, whether the model continues an injected thought.

        It is asked for a capital, and given the beginning of a thought on something else: only a
        model that goes on from "2 x 4 =" begins with 8. Many hosts start afresh without saying so,
        and that changes: check a model at a provider before paying for thousands of samples.
        APIError: as from generate().
        """
        settings = {"max_tokens": 16, "temperature": 0, "use_cache": False, **overrides}
        try:
            response = self.generate(_PROBE, **settings)[0]
        except _CannotContinue:
            return False
        except APIError as error:
            refused = r"prefill|prefix|continue_final|(last|final) (message|role)|end with a user"
            if error.status in (400, 422) and re.search(refused, error.message):
                return False
            raise
        return bool(re.match(r"\W*8\b(?![.,]\d)", response.reasoning or ""))

    def _run(
        self, prompts: list[Prompt], n_samples: int, seed: Optional[int], overrides: dict[str, Any]
    ) -> list[Rollouts]:
        """The blocking twin of agenerate()."""
        call = self._prepare(prompts, n_samples, seed, overrides)
        self._look_up(call)
        with self._under_way(call):
            while not call.over.wait(0.5):  # not one long wait, which Ctrl-C cannot break on Windows
                _progress.show()
        return call.results()

    @contextlib.contextmanager
    def _under_way(self, call: _Call) -> Iterator[None]:
        """Launch *call*; it ends with the block, however that ends."""
        try:
            self._launch(call)
            yield
        except BaseException as error:
            self._pool.is_awaited &= not _is_interrupt(error)
            raise
        finally:
            call.finish()

    def _prepare(self, prompts: list[Prompt], n_samples: int, seed: Optional[int], overrides: dict[str, Any]) -> _Call:
        """Check the arguments and make the requests: no I/O."""
        if self._closed:
            raise RolloutsError("the client is closed")
        n_samples = _integer(1, 10**9).check("n_samples", n_samples)
        if overrides.get("api_key", "") is None:
            del overrides["api_key"]
        if seed is not None:
            overrides["seed"] = seed
        ours, config = self._config, self._config._override(overrides)
        if isinstance(config.provider, str) and config.provider != ours.provider and "base_url" not in overrides:
            config.base_url = None  # the client's address is not that of another provider
        if "api_key" not in overrides and _api_of(config).base_url != _api_of(ours).base_url:
            config.api_key = None  # the client's key is for the client's address
        _integer(0).check("seed + n_samples - 1", config.seed + n_samples - 1)
        api = _api_of(config)
        cache = None
        if config.use_cache:
            store: type[_Cache] = _SqlCache if config.use_cache == "sql" else _JsonCache
            where = os.path.abspath(config.cache_dir)
            cache = self._caches.setdefault((store, where), store(where))
        return _Call(config, api, cache, [_request_of(prompt, config, api) for prompt in prompts], n_samples)

    def _look_up(self, call: _Call) -> None:
        """Take from the cache what is there."""
        if call.cache is None:
            return
        for index, (request, outcomes) in enumerate(zip(call.requests, call.outcomes)):
            outcomes.update(call.cache.get(request, call.seeds, call.unusable))
            for seed in outcomes if call.config.verbose else ():
                call.say(index, seed, "from the cache")

    def _launch(self, call: _Call) -> None:
        """Put to the pool what is still to be drawn."""
        api = call.api
        if call.api.row.needs_key and not api.key and not api.is_local and any(
                len(outcomes) < len(call.seeds) for outcomes in call.outcomes):
            raise _failure(api, "no API key", None, False, advice=_advice_of(api, 401).replace("the right key", "one"))
        self._pool.is_awaited = True  # whatever an earlier Ctrl-C ended
        left = call.begin()
        if not left:
            call.finish()
            return
        with self._lock:
            self._calls.add(call)
            self._set_width()
        call.when_over.append(functools.partial(self._forget, call))
        if self._closed:  # while it was looked up
            call.finish(RolloutsError("the client was closed"))
        for _ in range(min(left, call.config.max_concurrency)):
            self._pool.submit(functools.partial(self._turn, call))

    def _forget(self, call: _Call) -> None:
        with self._lock:
            self._calls.discard(call)
            self._set_width()

    def _set_width(self) -> None:
        """Let the pool be as wide as the client, or as the widest call under way."""
        configs = (self._config, *(call.config for call in self._calls))
        self._pool.width = max(config.max_concurrency for config in configs)

    def _turn(self, call: _Call) -> bool:
        """Make one sample of *call*. False: it has no more."""
        job = call.next()
        if job is None:
            return False
        index, seed = job
        request = call.requests[index]
        flight = (id(call.cache), call.api.key, call.api.base_url, request.key, seed)
        with self._lock:
            if flight in self._flights:
                self._flights[flight].append((call, index))
                return True
            self._flights[flight] = []
        outcome: Union[_Outcome, BaseException, None]
        try:
            # Another call may have finished this very sample since ours looked it up.
            stored = call.cache.get(request, range(seed, seed + 1), []) if call.cache else {}
            if seed in stored:
                call.say(index, seed, "from the cache")
            outcome = stored.get(seed) or self._sample(call, index, seed)
        except BaseException as error:  # a defect: it must not vanish with its thread
            outcome = error
        with self._lock:
            waiting = self._flights.pop(flight)
        shared = outcome._replace(cached=True) if waiting and isinstance(outcome, Response) else outcome
        for its_call, its_index, its in [(call, index, outcome), *((*other, shared) for other in waiting)]:
            # One with more retries than ours does not give up with it, nor where ours was cancelled in between.
            more = its_call.config.max_retries > call.config.max_retries
            if its is None or (more and isinstance(its, APIError) and its.retryable):
                if its_call is not call:
                    its_call.put_back(its_index, seed)
                    self._pool.submit(functools.partial(self._turn, its_call))
            elif isinstance(its, (Response, APIError)):
                if its is not outcome:
                    its_call.say(its_index, seed, "from the same sample of another call")
                its_call.record(its_index, seed, its)
            else:
                its_call.finish(its)
        return True

    def _sample(self, call: _Call, index: int, seed: int) -> Optional[_Outcome]:
        """One sample, drawn and kept, after as many attempts as it takes; None where the call is over."""
        config, api, request = call.config, call.api, call.requests[index]
        pacer = self._pacers.setdefault(api.base_url, _Pacer())
        url = f"{api.base_url}/chat/completions"
        headers = {"Content-Type": "application/json", **dict(api.row.headers)}
        if api.key:
            headers["Authorization"] = f"Bearer {api.key}"
        body = request.payload(api.row, seed, _is_streamed(config, api.row))
        attempt = 0
        while True:
            pacer.wait(config.requests_per_minute, call.over)
            if call.over.is_set():
                return None
            begun = time.monotonic()
            try:
                response = self._transport.post(
                    url, headers, body, config.timeout, functools.partial(_read_reply, api, request, seed))
            except APIError as error:
                failure = error
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                failure = _no_reply(api, error, config.timeout)
            else:
                if call.cache is not None:
                    try:
                        call.cache.put(request, response)
                    except OSError as error:
                        call.unwritten.append(str(error))
                tokens, took = response.usage.completion_tokens, time.monotonic() - begun
                call.say(index, seed, f"{tokens} tokens in {took:.1f} s, {response.finish_reason}")
                return response
            if failure.retryable and failure.retry_after:
                pacer.hold(failure.retry_after)
            if not failure.retryable or attempt >= config.max_retries:
                call.say(index, seed, f"failed: {failure}")
                return failure._of(seed)
            wait = _next_wait(failure, attempt, _clock.chance())
            attempt += 1
            call.say(index, seed, f"attempt {attempt} failed, the next one in {wait:.1f} s: {failure}")
            _progress.reason = f"HTTP {failure.status}: {failure.message}" if failure.status else failure.message
            call.count(retrying=1)
            _clock.sleep(wait, call.over)
            call.count(retrying=-1)


def create_client(model: str, preset: str = "balanced", **settings: Any) -> RolloutsClient:
    """Return a client with the temperature of *preset*, and *settings*, which win over it.

    Presets: deterministic (temperature 0), focused (0.3), balanced (0.7), creative (1.2).
    """
    temperature = _PRESETS[_choice(*_PRESETS).check("preset", preset)]
    return RolloutsClient(model, **{"temperature": temperature, **settings})


def _after_fork() -> None:
    """In a forked child: leave the parent's connections, locks and threads alone, and start afresh."""
    _progress.__init__()  # type: ignore[misc]
    for client in list(_clients):
        _of_the_parent.append((client._transport, client._caches))
        client._release.detach()
        client._start()


@atexit.register
def _at_exit() -> None:
    """Wait for what is in flight, since it is paid for; but not when Ctrl-C ended the program."""
    clients = list(_clients)
    for client in clients:
        for call in list(client._calls):
            call.finish(RolloutsError("the interpreter exits"))
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    while not interrupted and any(client._pool.is_busy and client._pool.is_awaited for client in clients):
        time.sleep(0.02)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# == Command =======================================================================================
#
# For shell scripts: a JSON line a response.


def _main() -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m rollouts", description="Print samples of a prompt, a JSON line each.",
        epilog="The key comes from the environment: <PROVIDER>_API_KEY.")
    parser.add_argument("prompt", help="the prompt, or - for standard input")
    parser.add_argument("-n", "--n-samples", type=int, default=1, help="how many samples (default 1)")
    parser.add_argument("--model", required=True, help=_SETTINGS["model"].help)
    for name, kind in (("seed", int), ("temperature", float), ("top_p", float), ("max_tokens", int), ("provider", str),
                       ("base_url", str), ("cache_dir", str), ("requests_per_minute", float), ("timeout", float)):
        default = _SETTINGS[name].default
        words = _SETTINGS[name].help.partition(", or")[0] + (f" (default {default})" if default is not None else "")
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=words)
    for flag, dest, value, words in (("--no-cache", "use_cache", False, "neither read the cache nor write to it"),
                                     ("--verbose", "verbose", True, _SETTINGS["verbose"].help)):
        parser.add_argument(flag, dest=dest, action="store_const", const=value, help=words)
    settings = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    prompt, n_samples = settings.pop("prompt"), settings.pop("n_samples")
    try:
        with RolloutsClient(**settings) as client:
            rollouts = client.generate(sys.stdin.read() if prompt == "-" else prompt, n_samples)
        for response in rollouts:
            print(json.dumps({**response.to_dict(), "full": response.full}))
        sys.stdout.flush()
    except ValueError as error:
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
