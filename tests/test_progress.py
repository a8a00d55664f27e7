"""The line on stderr, as people see it: on a terminal, in a notebook, in a log."""

import concurrent.futures
import contextlib
import importlib.util
import io
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any, Callable, Iterator, List, Optional
from unittest import mock

from tests import rollouts
from tests.case import PATIENCE, ROOT, Case, LongSleeps, eventually
from tests.server import Gate, Reply, Request, Server, by_seed, chat

try:
    import fcntl
    import pty
    import struct
    import termios
except ImportError:  # Windows
    pty = None  # type: ignore[assignment]


# The script of the process that is watched: its clock stands still until the file "go" is there.
SCRIPT = """
import os, sys
if sys.stdin.isatty():
    import fcntl, termios
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed there reaches us
from tests import rollouts

from tests.case import Clock, eventually

class Still(Clock):
    def sleep(self, seconds, is_cancelled):
        if seconds > 5:
            eventually(lambda: os.path.exists("go") or is_cancelled())
        super().sleep(seconds, is_cancelled)

rollouts._clock = Still(0.5)
rollouts._Terminal.interval = 0.05
os.chdir(sys.argv[2])
client = rollouts.RolloutsClient("m", base_url=sys.argv[1], cache_dir=sys.argv[2])
exec(sys.argv[3])
"""
TWENTY = """
client.generate("hi", 3, progress_bar=False)
answers = client.generate("hi", 20, max_retries=1)
print(len(answers), len(answers.errors))
"""

DOZEN = """
import asyncio
async def main():
    await asyncio.gather(*(client.agenerate("q%d" % i, {n}) for i in range(12)))
asyncio.run(main())
"""
THREADS = """
import threading
threads = [threading.Thread(target=client.generate, args=("q%d" % i, 2)) for i in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
MANY = """
client.generate_many(["q%d" % i for i in range(12)], 2)
"""
TWO_CLIENTS = """
import threading
other = rollouts.RolloutsClient(**client._config.to_dict())
thread = threading.Thread(target=other.generate_many, args=(["other%d" % i for i in range(12)], 2))
thread.start()
client.generate_many(["q%d" % i for i in range(12)], 2)
thread.join()
"""


class Twenty:
    """Samples 0 to 15 of twenty are answered, but 10 fails and 11 is told to wait; the rest comes later."""

    SHOWN = ("15/20", "1 failed", "1 retrying", "3 cached", "$0.1100")

    def __init__(self) -> None:
        self.go, self.eleventh = threading.Event(), threading.Event()
        self.lock, self.number = threading.Lock(), 0

    def __call__(self, request: Request) -> Reply:
        with self.lock:
            self.number += 1
            if self.number == 3 + 17 + 1:  # each one's first attempt, and the second of sample 10
                self.eleventh.set()
        if request.seed == 10:
            return Reply(503)
        if request.seed == 11 and not self.go.is_set():
            return Reply(503, headers={"Retry-After": "10"}, wait=self.eleventh)
        reply = chat(usage={"cost": 0.01})
        reply.wait = self.go if request.seed > 15 else None
        return reply


class Screen:
    """What a terminal shows of what is written to it."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: List[List[str]] = [[]]
        self.column = 0
        self.has_wrapped = False
        self.frames: List[str] = []  # the last row, each time that it was gone back to

    def feed(self, text: str) -> None:
        for character in text:
            if character == "\r":
                self.frames.append("".join(self.rows[-1]))
                self.column = 0
            elif character == "\n":
                self.rows.append([])
            else:
                if self.column == self.columns:
                    self.has_wrapped = True
                    self.rows.append([])
                    self.column = 0
                row = self.rows[-1]
                row.extend(" " * (self.column + 1 - len(row)))
                row[self.column] = character
                self.column += 1

    @property
    def lines(self) -> List[str]:
        return [line for line in ("".join(row).rstrip() for row in self.rows) if line]


class Watched:
    """A process that runs *code* before our eyes: on a terminal of *columns*, or with stderr in a file."""

    def __init__(self, server: Server, directory: str, code: str, columns: Optional[int] = None) -> None:
        self.directory = directory
        self.output: queue.Queue[bytes] = queue.Queue()
        self.screen = Screen(columns or 10_000)
        self.text = ""
        if columns is None:
            self.terminal, end = os.pipe()
        else:
            self.terminal, end = pty.openpty()
            fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        # The output goes elsewhere, as with "python script.py > answers.txt": the width is that of stderr.
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, server.url, directory, code], cwd=ROOT, env=variables,
            stdin=subprocess.DEVNULL if columns is None else end, stdout=subprocess.PIPE, stderr=end,
            start_new_session=True)
        os.close(end)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        with contextlib.suppress(OSError):  # how a terminal's end reads on Linux
            while True:
                piece = os.read(self.terminal, 4096)
                if not piece:
                    break
                self.output.put(piece)
        self.output.put(b"")

    def until(self, *words: str) -> None:
        """Watch until the last row has all of *words*, or to the end of the process."""
        deadline = time.monotonic() + PATIENCE
        while not words or not all(word in (self.screen.lines or [""])[-1] for word in words):
            try:
                piece = self.output.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{words} never came: {self.text[-300:]!r}") from None
            if not piece:
                if words:
                    raise AssertionError(f"{words} never came: {self.text[-300:]!r}")
                return
            self.text += piece.decode()
            self.screen.feed(piece.decode())

    def type(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def go(self) -> None:
        with open(os.path.join(self.directory, "go"), "w"):
            pass

    def result(self) -> str:
        """What the process wrote to its output, when it is over."""
        self.until()
        output, _ = self.process.communicate(timeout=PATIENCE)
        return output.decode().strip()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.reader.join(PATIENCE)
        os.close(self.terminal)


class Watching(Case):
    @contextlib.contextmanager
    def watched(
        self, script: Callable[[Request], Reply], code: str, columns: Optional[int] = None
    ) -> Iterator[Watched]:
        with tempfile.TemporaryDirectory() as directory:
            watched = Watched(self.serve(script), directory, code, columns)
            try:
                yield watched
            finally:
                watched.close()

    def release(self, watched: Watched, twenty: Twenty) -> str:
        twenty.go.set()  # first, or retries that wait no longer are used up
        watched.go()
        return watched.result()


@unittest.skipIf(pty is None, "there are no pseudo-terminals here")
class Terminal(Watching):
    def test_one_line_that_is_gone_when_done(self) -> None:
        for columns, shown in (
            (80, Twenty.SHOWN),
            (60, Twenty.SHOWN[:2]),
            (40, Twenty.SHOWN[:2]),
            (20, Twenty.SHOWN[:1]),
        ):
            twenty = Twenty()
            with self.subTest(columns=columns), self.watched(twenty, TWENTY, columns) as watched:
                watched.until(*shown)
                self.assertEqual(len(watched.screen.lines), 1)
                if columns == 80:
                    self.assertRegex(watched.screen.lines[0], r"^\[#+\.+\] 15/20, [\d.]+/(s|min), \d+:\d\d left, ")
                self.assertEqual(self.release(watched, twenty), "19 1")
                self.assertEqual(watched.screen.lines, [])
                self.assertFalse(watched.screen.has_wrapped)
                self.assertNotIn("\n", watched.text)
                self.assertLess(max(map(len, watched.screen.frames)), columns)
                self.assertEqual(watched.screen.column, 0)  # where what is written next begins

    def test_ctrl_c_leaves_a_clean_line(self) -> None:
        code = f"try:\n    {TWENTY.strip().replace(chr(10), chr(10) + '    ')}\nexcept KeyboardInterrupt:\n    "
        code += "print('stopped', file=sys.stderr)"
        for columns in (80, 60, 40):  # a line that has to be shortened fills the row
            twenty = Twenty()
            with self.subTest(columns=columns), self.watched(twenty, code, columns) as watched:
                watched.until("15/20", "1 failed")
                watched.type(b"\x03")  # which the terminal echoes as ^C, behind the line
                watched.until("stopped")
                watched.result()
                self.assertEqual(watched.process.returncode, 0)
                self.assertIn("^C", watched.text)
                self.assertEqual(watched.screen.lines, ["stopped"])
                twenty.go.set()

    def test_an_error_finds_a_clean_line(self) -> None:
        refused = threading.Event()

        def script(request: Request) -> Reply:
            return Reply(404, wait=refused)

        code = "try:\n    client.generate('hi', 3)\nexcept rollouts.APIError:\n    print('refused', file=sys.stderr)"
        with self.watched(script, code, 80) as watched:
            watched.until("0/3")
            refused.set()
            watched.result()
            self.assertEqual(watched.screen.lines, ["refused"])

    def test_a_single_sample_that_is_retried(self) -> None:
        replies = [Reply(503, {"error": {"message": "busy"}}, headers={"Retry-After": "10"}), chat()]
        with self.watched(lambda request: replies.pop(0), "client.generate('hi')", 80) as watched:
            watched.until("0/1, 1 retrying: HTTP 503: busy")
            watched.go()
            watched.result()
            self.assertEqual(watched.screen.lines, [])

    def test_nothing_where_nothing_is_to_be_seen(self) -> None:
        """A single sample, a full cache, progress_bar=False at the client or at the call."""
        code = """
rollouts._Terminal.interval = 0.01
client.generate("a")
client.generate_many(["b"])
client.generate("c", 4, progress_bar=False)
client.generate("c", 4)
rollouts.RolloutsClient(**{**client._config.to_dict(), "progress_bar": False}).generate("d", 4)
print("done")
"""

        def script(request: Request) -> Reply:
            reply = chat()
            reply.delay = 0.1  # ten times as long as it takes a line to come
            return reply

        with self.watched(script, code, 80) as watched:
            self.assertEqual(watched.result(), "done")
            self.assertEqual(watched.text, "")

    def test_what_is_zero_is_not_shown(self) -> None:
        go = threading.Event()

        def script(request: Request) -> Reply:
            reply = chat()
            reply.wait = go if request.seed == 3 else None
            return reply

        with self.watched(script, "client.generate('hi', 4)", 80) as watched:
            watched.until("3/4", "left")
            go.set()
            watched.result()
            for word in ("cached", "retrying", "failed", "$"):
                self.assertNotIn(word, watched.text)

    def test_one_line_for_everything_at_once(self) -> None:
        for name, code, total in (
            ("a dozen agenerate", DOZEN.format(n=2), 24), ("of one sample each", DOZEN.format(n=1), 12),
            ("threads", THREADS, 24), ("generate_many", MANY, 24), ("two clients", TWO_CLIENTS, 48),
        ):
            # The first half is answered when all are under way, so that no call ends before another begins.
            all_came, go, lock, numbers = threading.Event(), threading.Event(), threading.Lock(), iter(range(1000))

            def script(
                request: Request, all_came: Any = all_came, go: Any = go, lock: Any = lock, numbers: Any = numbers,
                total: int = total,
            ) -> Reply:
                with lock:
                    number = next(numbers)
                if number == total - 1:
                    all_came.set()
                return replace(chat(), wait=all_came if number < total // 2 else go)

            with self.subTest(name), self.watched(script, code + "print('done')", 80) as watched:
                watched.until(f"{total // 2}/{total}")
                self.assertEqual(len(watched.screen.lines), 1)
                go.set()
                self.assertEqual(watched.result(), "done")
                self.assertEqual(watched.screen.lines, [])
                self.assertNotIn("\n", watched.text)

    def test_each_call_counts_anew(self) -> None:
        go = threading.Event()

        def script(request: Request) -> Reply:
            reply = chat()
            if request.body["messages"][0]["content"] == "second":
                reply.wait = go if request.seed == 2 else None
            return reply

        with self.watched(script, "client.generate('first', 50)\nclient.generate('second', 3)", 80) as watched:
            watched.until("2/3")
            go.set()
            watched.result()
            self.assertEqual(watched.screen.lines, [])

    def test_the_lines_of_verbose_stand_above_it(self) -> None:
        go = threading.Event()

        def script(request: Request) -> Reply:
            reply = chat()
            reply.wait = go if request.seed > 2 else None
            return reply

        with self.watched(script, "client.generate('hi', 6, verbose=True)", 80) as watched:
            watched.until("3/6")
            self.assertEqual(len(watched.screen.lines), 4)
            go.set()
            watched.result()
            self.assertEqual(len(watched.screen.lines), 6)
            for line in watched.screen.lines:
                self.assertRegex(line, r"^rollouts: .*seed \d.*\w$")
                self.assertNotIn("/6", line)


@unittest.skipUnless(pty, "needs a pseudo-terminal")
class Stopped(Case):
    def test_a_terminal_that_is_stopped_stops_no_request(self):
        """As after Ctrl-S: nobody reads what is drawn, and soon no more can be written."""
        came = threading.Event()

        def reply(request):
            if len(server.requests) == 400:
                came.set()
            return replace(by_seed(request), delay=0.004)

        code = (
            "import sys, rollouts\nrollouts._Terminal.interval = 0.0001\n"  # private: else it takes a minute to fill up
            "client = rollouts.RolloutsClient('m', base_url=sys.argv[1], use_cache=False, max_concurrency=4)\n"
            "client.generate('q', 400)")
        terminal, end = pty.openpty()
        self.addCleanup(os.close, terminal)
        with Server(reply) as server:
            process = subprocess.Popen([sys.executable, "-c", code, server.url], cwd=ROOT, stderr=end)
            os.close(end)
            try:
                self.assertTrue(came.wait(PATIENCE), len(server.requests))
            finally:
                process.kill()
                process.wait()


class Screenful(io.StringIO):
    """A stderr that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Held(Case):
    """Why nothing moves, while nothing does."""

    settings = {"use_cache": False, "progress_bar": True}

    def test_a_call_that_begins_during_a_hold_says_why(self) -> None:
        clock = self.use_clock(LongSleeps())
        words = {"error": {"message": "slow down"}}
        client = self.client(self.serve(Reply(429, words, {"Retry-After": "300"})))
        screen = Screenful()
        with mock.patch.object(sys, "stderr", screen), concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(client.generate, "a", progress_bar=False)
            self.assertTrue(clock.asleep.wait(PATIENCE))
            second = pool.submit(client.generate, "b", 2)
            self.assertTrue(eventually(lambda: "0/2, 2 waiting: HTTP 429: slow down" in screen.getvalue()))
            client.close()
            for call in first, second:
                with self.assertRaises(rollouts.RolloutsError):
                    call.result(PATIENCE)


@unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
class Forked(Case):
    SOURCE = """
        import os, sys, threading, warnings
        import rollouts
        client = rollouts.RolloutsClient("m", base_url=sys.argv[1], use_cache=False, verbose=True)
        is_held = threading.Event()
        def draw():
            with rollouts._progress._ended:
                is_held.set()
                threading.Event().wait()
        threading.Thread(target=draw, daemon=True).start()
        is_held.wait()
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        pid = os.fork()
        if pid == 0:
            for progress_bar in (False, True):
                client.generate("q", 2, progress_bar=progress_bar)
            os._exit(0)
        print(os.waitpid(pid, 0)[1], flush=True)
        os._exit(0)
    """

    def test_a_line_that_is_drawn_just_then_holds_up_no_child(self) -> None:
        done = self.run_python(self.SOURCE, self.serve().url)
        self.assertEqual(done.stdout, "0\n")
        self.assertEqual(len(done.stderr.splitlines()), 4, done.stderr)


class Log(Watching):
    def test_plain_lines(self) -> None:
        twenty = Twenty()
        with self.watched(twenty, "rollouts._Log.interval = 0.1\n" + TWENTY) as watched:
            watched.until(*Twenty.SHOWN)
            self.assertEqual(self.release(watched, twenty), "19 1")
        self.assertNotIn("\r", watched.text)
        self.assertTrue(watched.text.endswith("\n"))
        lines = watched.text.splitlines()
        for line in lines:
            self.assertRegex(line, r"^(\[[#.]+\] )?\d+/20\b[^\r\x1b]*$")
        self.assertIn("20/20", lines[-1])  # it ends with how it ended

    def test_a_quick_call_leaves_no_line(self) -> None:
        self.assertEqual(rollouts._Log.interval, 30)  # half a minute
        with self.watched(lambda request: chat(), "client.generate('hi', 20)\nprint('done')") as watched:
            self.assertEqual(watched.result(), "done")
            self.assertEqual(watched.text, "")

    def test_it_ends_with_what_was_asked_for(self) -> None:
        """Also where a call ends before its time: what never came is no part of what is done."""
        server = self.serve(Gate(holds=lambda request: request.seed > 0))
        client = self.client(server, progress_bar=True, use_cache=False)  # what is in flight is given up
        log = io.StringIO()
        with mock.patch.object(sys, "stderr", log), mock.patch.object(rollouts._Log, "interval", 0.01):
            call = self.start(client.generate, "hi", 3)
            self.assertTrue(eventually(lambda: "1/3" in log.getvalue()))
            client.close()
            with self.assertRaises(rollouts.RolloutsError):
                call.result(PATIENCE)
        self.assertRegex(log.getvalue().splitlines()[-1], r"\b1/3\b")

    def test_no_stderr_at_all(self) -> None:
        """As under pythonw, or when it was closed."""
        for lost in ("sys.stderr = None", "sys.stderr.close()", "os.close(2)"):
            code = f"rollouts._Log.interval = 0.01\n{lost}\nprint(len(client.generate('hi', 20, verbose=True)))"
            with self.subTest(lost), self.watched(lambda request: chat(), code) as watched:
                self.assertEqual(watched.result(), "20")


class Output(io.StringIO):
    """A stderr as it is in a notebook's kernel."""

    __module__ = "ipykernel.iostream"


class Display:
    """IPython's module of that name, as far as it is used: what it shows of each output, in turn."""

    def __init__(self) -> None:
        self.outputs: List[List[str]] = []

    def display(self, data: Any, *, raw: bool, display_id: bool) -> Any:
        output = [data["text/plain"]]
        self.outputs.append(output)
        return types.SimpleNamespace(update=lambda data, *, raw: output.append(data["text/plain"]))


class Notebook(Case):
    settings = {"progress_bar": True}

    def test_one_output_for_each_call_that_is_empty_at_the_end(self) -> None:
        stderr, display, gates = Output(), Display(), {}

        def script(request: Request) -> Reply:
            return gates[request.body["messages"][0]["content"]](request)

        client = self.client(self.serve(script), verbose=True)
        self.enter(mock.patch.dict(sys.modules, {"IPython.display": display}))  # type: ignore[dict-item]
        self.enter(mock.patch.object(rollouts._Notebook, "interval", 0.01))
        with mock.patch.object(sys, "stderr", stderr):
            for number, prompt in enumerate(("first", "second")):
                gates[prompt] = Gate(holds=lambda request: request.seed > 1)
                self.addCleanup(gates[prompt].open)
                call = self.start(client.generate, prompt, 4)
                self.assertTrue(eventually(
                    lambda number=number: any("2/4" in line for each in display.outputs[number:] for line in each)))
                gates[prompt].open()
                call.result(PATIENCE)
        self.assertEqual([output[-1] for output in display.outputs], ["", ""])
        self.assertEqual([line for output in display.outputs for line in output[:-1] if "/4" not in line], [])
        lines = stderr.getvalue().splitlines()  # those of verbose alone
        self.assertEqual(len(lines), 8)
        for line in lines:
            self.assertRegex(line, r"^rollouts: seed \d: 5 tokens in ")


@unittest.skipUnless(
    importlib.util.find_spec("ipykernel") and importlib.util.find_spec("jupyter_client"), "there is no Jupyter here")
class Kernel(Case):
    """The same in a real one, whose cells are also interrupted."""

    CALLS = (  # of different widths: each has threads of its own
        'client.generate("a", 20, max_concurrency=5)', 'await client.agenerate("b", 20, max_concurrency=6)')

    def setUp(self) -> None:
        super().setUp()
        self.enter(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # theirs
        from jupyter_client import KernelManager

        self.server = self.serve()
        variables = {
            **os.environ, "IPYTHONDIR": self.directory, "JUPYTER_RUNTIME_DIR": self.directory,
            "JUPYTER_CONFIG_DIR": self.directory, "PYTHONPATH": ROOT, "PYTHONWARNINGS": "ignore"}
        self.manager = KernelManager(connection_file=os.path.join(self.directory, "kernel.json"))
        self.manager.start_kernel(
            env=variables, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(self.manager.shutdown_kernel, now=True)
        self.kernel = self.manager.client()
        self.kernel.start_channels()
        self.addCleanup(self.kernel.stop_channels)
        self.kernel.wait_for_ready(timeout=2 * PATIENCE)
        self.run_cell(
            f"import rollouts\nrollouts._Notebook.interval = 0.05\nclient = rollouts.RolloutsClient("
            f"'m', base_url={self.server.url!r}, cache_dir={self.cache_dir!r})")

    def hold(self) -> Gate:
        """Let the server answer but four of the samples, and the others when the gate is opened."""
        self.server.script = gate = Gate(holds=lambda request: request.seed > 3)
        self.addCleanup(gate.open)
        return gate

    def run_cell(self, code: str, once_shown: Callable[[], None] = lambda: None) -> List[Any]:
        """(kind, text) of all that a cell puts out; *once_shown* is called when it shows a line."""
        asked = self.kernel.execute(code)
        outputs: List[Any] = []
        while True:
            message = self.kernel.get_iopub_msg(timeout=PATIENCE)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != asked:
                continue
            if kind == "status" and content["execution_state"] == "idle":
                return outputs
            if kind in ("display_data", "update_display_data", "execute_result"):
                outputs.append((kind, content["data"]["text/plain"]))
                if "4/20" in outputs[-1][1]:
                    once_shown()
            elif kind in ("stream", "error"):
                outputs.append((kind, content.get("text") or content["ename"]))

    def test_one_output_that_is_changed_in_place(self) -> None:
        for call in self.CALLS:
            with self.subTest(call):
                first, *updates, last, result = self.run_cell(call, self.hold().open)
                self.assertEqual(first[0], "display_data")
                self.assertEqual({kind for kind, _ in updates} | {last[0]}, {"update_display_data"})
                self.assertEqual(last[1], "")
                self.assertEqual(result, ("execute_result", "<Rollouts: 20 of 20 responses from m>"))

    def test_interrupted(self) -> None:
        for call, name in zip(self.CALLS, ("KeyboardInterrupt", "CancelledError")):
            with self.subTest(call):
                self.hold()
                times: List[float] = []

                def interrupt(times: List[float] = times) -> None:
                    if not times:
                        times.append(time.monotonic())
                        self.manager.interrupt_kernel()

                outputs = self.run_cell(call, interrupt)
                self.assertLess(time.monotonic() - times[0], 1)
                self.assertEqual(outputs[-2:], [("update_display_data", ""), ("error", name)])


class Formatted(Case):
    """The pure function behind the line; private, but there is no other way to see a slow run."""

    def line(self, elapsed: float = 10.0, width: int = 200, **counts: Any) -> str:
        return rollouts._format_progress(Counter(counts), elapsed, width)

    def test_what_it_says(self) -> None:
        for counts, elapsed, words in (
            ({"total": 100}, 0, "0/100"),
            ({"total": 100}, 5, "0/100"),
            ({"total": 100, "done": 10, "cached": 10}, 5, "10/100, 10 cached"),  # what was cached has no rate
            ({"total": 100, "done": 20}, 10, "20/100, 2.0/s, 0:40 left"),
            ({"total": 100, "done": 30, "cached": 10}, 10, "30/100, 2.0/s, 0:35 left, 10 cached"),
            ({"total": 100, "done": 1}, 10, "1/100, 6.0/min, 16:30 left"),
            ({"total": 1000, "done": 1}, 60, "1/1000, 1.0/min, 16:39:00 left"),
            ({"total": 100, "done": 100}, 10, "100/100, 10.0/s, 0:00 left"),
            ({"total": 9, "done": 3, "failed": 1, "retrying": 2, "cached": 1, "cost": 0.12345}, 1,
             "3/9, 2.0/s, 0:03 left, 1 failed, 2 retrying, 1 cached, $0.1235"),
            ({"total": 4, "done": 2, "cost": 12.345}, 1, "2/4, 2.0/s, 0:01 left, $12.35"),
        ):
            with self.subTest(words=words):
                bar, _, said = self.line(elapsed, **counts).rpartition("] ")
                self.assertEqual(said, words)
                self.assertRegex(bar, r"^\[[#.]+$")
                share = bar.count("#") / (len(bar) - 1)
                self.assertAlmostEqual(share, counts.get("done", 0) / counts["total"], delta=0.05)

    def test_why_something_is_retried(self) -> None:
        for done, reason, said in (
            (0, "no network", "0/9, 9 retrying: no network"),
            (0, "\x1b[2J忙", "0/9, 9 retrying: ?[2J?"),
            (1, "no network", "1/9, 6.0/min, 1:20 left, 9 retrying"),
        ):
            line = rollouts._format_progress(Counter(total=9, done=done, retrying=9), 10, 80, reason)
            self.assertTrue(line.endswith(said), line)
        self.assertEqual(len(rollouts._format_progress(Counter(total=9, retrying=9), 10, 60, "x" * 99)), 59)

    def test_it_is_shorter_than_the_width(self) -> None:
        counts = {"total": 100_000, "done": 54_321, "failed": 123, "retrying": 45, "cached": 6789, "cost": 123.45}
        for width in range(1, 120):
            line = self.line(width=width, **counts)
            self.assertLess(len(line), width)
            if width > 14:
                self.assertIn("54321/100000", line)  # what matters most stays longest
        self.assertIn("123 failed", self.line(width=50, **counts))
        self.assertEqual(re.sub(r"\[.*\] ", "", self.line(width=40, **counts)).count("\n"), 0)


if __name__ == "__main__":
    unittest.main()
