"""What every test sets up: a server, a client with a cache of its own, a fake clock, an environment without keys."""

import asyncio
import concurrent.futures
import contextlib
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import warnings
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, TypeVar
from unittest import mock

from tests import rollouts
from tests.server import Gate, Server, by_seed

T = TypeVar("T")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IS_SLOW = bool(os.environ.get("ROLLOUTS_SLOW"))
slow = unittest.skipUnless(IS_SLOW, "slow: with ROLLOUTS_SLOW=1 it runs too")
PATIENCE = 30.0  # seconds to wait for what must come; only a test that fails waits so long


class Clock:
    """A clock that only sleeping moves: a sleep takes no time, it adds its seconds to *time*.

    *luck* is the random number of every backoff, and *slept* has the seconds of each sleep.
    """

    def __init__(self, luck: float = 0.0) -> None:
        self.time = 1000.0
        self.luck = luck
        self.slept: List[float] = []
        self.lock = threading.Lock()  # two threads may sleep at once

    def now(self) -> float:
        return self.time

    def random(self) -> float:
        return self.luck

    def sleep(self, seconds: float, is_cancelled: Callable[[], bool]) -> None:
        with self.lock:
            self.slept.append(seconds)
            self.time += seconds


class LongSleeps(Clock):
    """A clock whose sleeps end only when they are cancelled; *asleep* is set when one has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep = threading.Event()

    def sleep(self, seconds: float, is_cancelled: Callable[[], bool]) -> None:
        self.asleep.set()
        until_cancelled(seconds, is_cancelled)


def until_cancelled(seconds: float, is_cancelled: Callable[[], bool]) -> None:
    """A sleep of a clock that only its cancelling ends, however long it was to be."""
    assert eventually(is_cancelled), "it was not cancelled"


def eventually(condition: Callable[[], Any], seconds: float = PATIENCE) -> bool:
    """Wait for a condition that no event announces; False where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def environment(**variables: str) -> ContextManager[Any]:
    """The environment with *variables*; keys, addresses and proxies of this machine are not in it (`__init__`)."""
    return mock.patch.dict(os.environ, variables)


class Case(unittest.TestCase):
    """The base of all tests. What a test opens here is closed at its end, the latest first."""

    maxDiff = None  # what a machine elsewhere saw is to be seen whole
    settings: Dict[str, Any] = {}  # what a class's clients have, where a test does not say otherwise
    directory: str  # of this test alone
    clock: Clock
    _executor: Optional[concurrent.futures.ThreadPoolExecutor] = None

    def setUp(self) -> None:
        super().setUp()
        self.directory = self.enter(tempfile.TemporaryDirectory())
        self.cache_dir = os.path.join(self.directory, "cache")
        self.enter(environment())

    def enter(self, context: ContextManager[T]) -> T:
        """Enter *context* until the end of the test (enterContext of Python 3.11)."""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def serve(self, script: Any = by_seed, **options: Any) -> Server:
        server = self.enter(Server(script, **options))
        if isinstance(script, Gate):
            self.addCleanup(script.open)  # whatever happens, nothing is held for ever
        return server

    def client(self, server: Any = None, model: str = "m", **settings: Any) -> Any:
        """A client that asks *server* (or whatever has a *url*, or is one), with the cache of this test."""
        if server is not None:
            settings = {"base_url": getattr(server, "url", server), **settings}
        settings = {"cache_dir": self.cache_dir, "progress_bar": False, **self.settings, **settings}
        client = rollouts.RolloutsClient(model, **settings)
        self.addCleanup(client.close)
        return client

    def use_clock(self, clock: Optional[Clock] = None) -> Clock:
        """Let *clock* be the module's until the test ends."""
        self.clock = Clock() if clock is None else clock
        self.enter(mock.patch.object(rollouts, "_clock", self.clock))
        return self.clock

    @contextlib.contextmanager
    def warned(self) -> Iterator[List[str]]:
        """The texts of all warnings that come, also of equal ones; the list is filled as they come."""
        texts: List[str] = []

        def show(message: Any, *_: Any, **__: Any) -> None:
            texts.append(str(message))

        with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", show):
            warnings.simplefilter("always")
            yield texts

    @property
    def executor(self) -> concurrent.futures.ThreadPoolExecutor:
        """Threads for this test."""
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(40, thread_name_prefix="test")
            self.addCleanup(self._executor.shutdown)
        return self._executor

    def start(self, function: Callable[..., T], *arguments: Any, **settings: Any) -> "concurrent.futures.Future[T]":
        """Call *function* in another thread, which the test's end waits for."""
        return self.executor.submit(function, *arguments, **settings)

    def start_python(
        self, source: str, *arguments: str, env: Optional[Dict[str, str]] = None, **options: Any
    ) -> "subprocess.Popen[str]":
        """Start an interpreter on *source*, in this test's directory; killed at the end of the test.

        It imports the same `rollouts` and `tests` as this one. *env* adds to the environment.
        """
        roots = dict.fromkeys([os.path.dirname(os.path.abspath(rollouts.__file__)), ROOT])
        options = {
            "cwd": self.directory, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "text": True, "encoding": "utf-8", **options}
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(source), *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(roots), **(env or {})}, **options)
        self.addCleanup(_end, process)
        return process

    def run_python(
        self, source: str, *arguments: str, env: Optional[Dict[str, str]] = None, timeout: float = 60,
        input: Optional[str] = None, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run *source* as `start_python` does, to its end."""
        process = self.start_python(source, *arguments, env=env, **options)
        output, errors = process.communicate(input, timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


class AsyncCase(Case, unittest.IsolatedAsyncioTestCase):
    """The same, for tests that are coroutines."""

    async def thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """What *function* returns, called in another thread while the loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *arguments)


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()
