"""Ctrl-C and the end of a process: how soon it ends, what is kept, and that nothing is sent twice.

Real processes, each with the client below. The server holds its replies for a minute, so whatever ends
within three seconds (the contract says one; machines of tests are busy) did not wait for a reply.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import socket
import subprocess
import threading
import time
import unittest

from tests.case import Case, eventually, slow
from tests.server import Gate, Reply, by_seed, chat, delta, events

try:
    import pty
except ImportError:
    pty = None

SOON = 3.0  # seconds within which a call ends after Ctrl-C
KILLED = (-signal.SIGINT, 130)  # how a process ends that leaves KeyboardInterrupt uncaught
HEAD = """
import asyncio, os, signal, sys, threading, time
from tests import rollouts
os.environ.update({environ!r})  # which `tests` has cleared of proxies
client = rollouts.RolloutsClient("m", progress_bar=False, **{settings!r})

def interrupts(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except KeyboardInterrupt:
        print("caught", flush=True)
"""
GENERATE = {"generate": 'client.generate("q", 20)', "generate_many": 'client.generate_many(["q"], 20)'}
AGENERATE = {"agenerate": 'asyncio.run(client.agenerate("q", 20))'}
GATHERED = {"agenerate, gathered": """
async def main():
    await asyncio.gather(*(client.agenerate("q", 4, seed=seed) for seed in range(0, 20, 4)))
asyncio.run(main())"""}
CALLS = {**GENERATE, **AGENERATE}


def question(request):
    return request.body["messages"][0]["content"]


def holding(passing=5):
    """A gate that the first few requests pass. Which ones is in its list *passed*."""
    def holds(request):
        if gate.came <= passing:
            gate.passed.append((question(request), request.seed))
        return gate.came > passing

    gate = Gate(holds=holds)
    gate.passed = []
    return gate


@unittest.skipUnless(os.name == "posix", "needs POSIX signals and processes")
class Processes(Case):
    def begin(self, url, script, *, env=None, pipes=None, **settings):
        """Start a process with a client for *url* that runs *script*."""
        settings = {"max_concurrency": 4, "cache_dir": self.cache_dir, "base_url": url, **settings}
        pipes = pipes or dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return self.start_python(HEAD.format(settings=settings, environ=env or {}) + script, env=env, **pipes)

    def say(self, process, text="\n"):
        process.stdin.write(text)
        process.stdin.flush()

    def ended(self, process, seconds=SOON):
        """How a process ends that has to do so by now: its exit status, its output, its errors."""
        begun = time.monotonic()
        try:
            output, errors = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.fail("the process goes on")
        self.assertLess(time.monotonic() - begun, seconds)
        return process.returncode, output, errors

    def interrupted(self, process):
        process.send_signal(signal.SIGINT)
        return self.ended(process)

    def assert_uncaught(self, end):
        code, _, errors = end
        self.assertIn(code, KILLED)
        self.assertEqual(errors.rstrip().splitlines()[-1], "KeyboardInterrupt", errors)
        self.assertNotIn("Exception ignored", errors)

    def sent_by_the_next_run(self, server, n_samples=20, **settings):
        """The seeds that a run from now on asks for. It is checked that it gets them all."""
        server.script = by_seed
        before = len(server.requests)
        result = self.client(server, **settings).generate("q", n_samples)
        self.assertEqual(result.get_contents(), [f"answer {seed}" for seed in range(n_samples)])
        return sorted(request.seed for request in server.requests[before:])


class Script(Processes):
    """Ctrl-C in a script, while five of twenty samples have arrived and four are in flight."""

    def interrupt(self, script, **settings):
        """How the script ends. It is checked that what had arrived is not asked for again."""
        shutil.rmtree(self.cache_dir, ignore_errors=True)
        gate = holding()
        server = self.serve(gate)
        process = self.begin(server.url, script, **settings)
        self.assertTrue(gate.reached(5 + 4), process.poll())
        end = self.interrupted(process)
        gate.open()
        self.assert_kept(gate, server, **settings)
        return end

    def assert_kept(self, gate, server, **settings):
        kept = {seed for prompt, seed in gate.passed if prompt == "q"}
        self.assertEqual(set(self.sent_by_the_next_run(server, **settings)), set(range(20)) - kept)

    def test_uncaught(self):
        for use_cache in ("json", "sql"):
            for name, call in {**CALLS, **GATHERED}.items():
                with self.subTest(name, use_cache=use_cache):
                    self.assert_uncaught(self.interrupt(call, use_cache=use_cache))

    @slow
    def test_caught(self):
        for ending in ("", "    sys.exit(3)"):
            for name, call in {**CALLS, **GATHERED}.items():
                with self.subTest(name, ending=ending):
                    call = call.replace("\n", "\n    ")
                    script = f"try:\n    {call}\nexcept KeyboardInterrupt:\n    print('caught')\n{ending}"
                    self.assertEqual(self.interrupt(script), (3 if ending else 0, "caught\n", ""))

    @slow
    def test_a_reply_that_trickles_in(self):
        """It never pauses for half a second, so that no wait on the socket ever ends without a byte."""
        stream = [delta(content="so ")] * 1200
        for name, reply in {
            "plain": Reply(pieces=[b" "] * 1200, pause=0.05),
            "streamed": events(*stream, pause=0.05),
        }.items():
            for call in (GENERATE["generate"], AGENERATE["agenerate"]):
                with self.subTest(name, call=call):
                    shutil.rmtree(self.cache_dir, ignore_errors=True)
                    server = self.serve(
                        lambda request, reply=reply: by_seed(request) if request.seed < 5 else reply)
                    process = self.begin(server.url, call, stream=name == "streamed")
                    self.assertTrue(eventually(lambda server=server: len(server.requests) == 5 + 4))
                    self.assert_uncaught(self.interrupted(process))
                    self.assertEqual(
                        self.sent_by_the_next_run(server, stream=name == "streamed"), list(range(5, 20)))

    @slow
    def test_a_long_backoff(self):
        server = self.serve(lambda request: by_seed(request) if request.seed < 5 else Reply(503))
        script = """
class Unlucky(type(rollouts._clock)):
    def random(self):
        return 60.0  # the first backoff is that many times a second

    def sleep(self, *arguments):
        os.write(1, b"asleep\\n")  # in one piece, as print does not
        super().sleep(*arguments)

rollouts._clock = Unlucky()
"""
        for name, call in CALLS.items():
            with self.subTest(name):
                shutil.rmtree(self.cache_dir, ignore_errors=True)
                server.requests.clear()
                process = self.begin(server.url, script + call)
                for _ in range(4):
                    self.assertEqual(process.stdout.readline(), "asleep\n")
                self.assert_uncaught(self.interrupted(process))
                self.assertEqual(server.seeds(), list(range(5 + 4)))
        self.assertEqual(self.sent_by_the_next_run(server), list(range(5, 20)))

    @slow
    def test_a_hold_that_the_api_asked_for(self):
        limited = Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "300"})
        for name, call in CALLS.items():
            with self.subTest(name):
                shutil.rmtree(self.cache_dir, ignore_errors=True)
                server = self.serve(lambda request: by_seed(request) if request.seed < 5 else limited)
                process = self.begin(server.url, call, max_concurrency=1)
                self.assertTrue(eventually(lambda server=server: len(server.requests) == 6))
                self.assert_uncaught(self.interrupted(process))
                self.assertEqual(server.seeds(), list(range(6)))
                self.assertEqual(self.sent_by_the_next_run(server), list(range(5, 20)))

    @slow
    def test_the_token_bucket(self):
        server = self.serve()
        for name, call in CALLS.items():
            with self.subTest(name):
                shutil.rmtree(self.cache_dir, ignore_errors=True)
                server.requests.clear()
                process = self.begin(server.url, call, requests_per_minute=1)
                self.assertTrue(eventually(lambda: server.requests))
                self.assertEqual(len(server.requests), 1)
                self.assertTrue(eventually(self.entries))
                self.assert_uncaught(self.interrupted(process))
                self.assertEqual(len(server.requests), 1)
        (drawn,) = server.seeds()  # whichever thread came first
        rest = [seed for seed in range(20) if seed != drawn]
        self.assertEqual(self.sent_by_the_next_run(server), rest)

    def entries(self):
        return [name for _, _, names in os.walk(self.cache_dir) for name in names if name.startswith("seed_")]

    @slow
    def test_the_client_can_be_used_again(self):
        """Another prompt, and the same one, whose samples in flight were given up a moment ago."""
        for name, call in {**CALLS, **GATHERED}.items():
            for again in ("r", "q"):
                with self.subTest(name, again=again):
                    shutil.rmtree(self.cache_dir, ignore_errors=True)
                    gate = Gate()
                    server = self.serve(gate)
                    call_in_try = call.replace("\n", "\n    ")
                    process = self.begin(server.url, (
                        f"try:\n    {call_in_try}\nexcept KeyboardInterrupt:\n"
                        "    print('caught', flush=True)\n"
                        f'print(*client.generate("{again}", 20).get_contents(), sep=", ")\n'
                        f'print(*asyncio.run(client.agenerate("{again}", 21)).get_contents()[20:])'))
                    self.assertTrue(gate.reached(4))
                    process.send_signal(signal.SIGINT)
                    self.assertEqual(process.stdout.readline(), "caught\n")
                    gate.open()
                    answers = ", ".join(f"answer {seed}" for seed in range(20)) + "\nanswer 20\n"
                    status, said, told = self.ended(process, 15)
                    self.assertEqual((status, said), (0, answers))
                    # Before Python 3.11 asyncio may report a task that the signal broke off, and nothing else.
                    may_report = sys.version_info < (3, 11)
                    if not (may_report and told.startswith("Task exception was never retrieved")):
                        self.assertEqual(told, "")
                    seeds = [request.seed for request in server.requests if question(request) == again]
                    if again == "r":
                        self.assertEqual(sorted(seeds), list(range(21)))
                        self.assertEqual(len(server.requests), 4 + 21)  # what was not sent is dropped
                    else:
                        self.assertEqual(set(seeds), set(range(21)))
                        self.assertLessEqual(len(seeds), 4 + 21)

    @slow
    def test_what_another_call_waits_for_goes_on(self):
        """The main thread's call is interrupted; another thread's goes on, also with what they share."""
        for prompt in ("q", "r"):
            with self.subTest(prompt):
                shutil.rmtree(self.cache_dir, ignore_errors=True)
                gate = Gate()
                server = self.serve(gate)
                process = self.begin(server.url, f"""
other = threading.Thread(target=lambda: print(*client.generate("q", 6).get_contents(), sep=", "))
other.start()
sys.stdin.readline()
interrupts(client.generate, "{prompt}", 6)
other.join()
""", max_concurrency=8)
                self.assertTrue(gate.reached(6))
                self.say(process)
                if prompt == "r":
                    self.assertTrue(gate.reached(8))
                else:
                    time.sleep(0.5)  # nothing shows from outside that a call has joined what is in flight
                process.send_signal(signal.SIGINT)
                self.assertEqual(process.stdout.readline(), "caught\n")
                time.sleep(1.2)  # two looks of a thread whether its sample was given up
                gate.open()
                answers = ", ".join(f"answer {seed}" for seed in range(6)) + "\n"
                self.assertEqual(self.ended(process, 10), (0, answers, ""))
                asked = sorted(request.seed for request in server.requests if question(request) == "q")
                self.assertEqual(asked, list(range(6)))
                self.assertEqual(self.sent_by_the_next_run(server, 6), [])

    @slow
    def test_two_calls_at_once(self):
        """Uncaught, it ends the calls of other threads too, whether the main thread draws itself or not."""
        script = """
threads = [
    threading.Thread(target=client.generate, args=(prompt, 20), daemon={daemon}) for prompt in {prompts}]
for thread in threads:
    thread.start()
{main}
"""
        for daemon in (False, True):
            for prompts, main in (("qr", "threads[0].join()"), ("r", 'client.generate("q", 20)')):
                with self.subTest(main, daemon=daemon):
                    shutil.rmtree(self.cache_dir, ignore_errors=True)
                    gate = holding(10)
                    server = self.serve(gate)
                    source = script.format(daemon=daemon, prompts=list(prompts), main=main)
                    process = self.begin(server.url, source, max_concurrency=8)
                    self.assertTrue(gate.reached(10 + 8), gate.came)
                    code, _, errors = self.interrupted(process)
                    self.assertIn(code, KILLED)
                    self.assertIn("KeyboardInterrupt\n", errors)
                    gate.open()
                    self.assertLess(len(server.requests), 10 + 8 + 4)  # what waited for its turn is dropped
                    self.assert_kept(gate, server)

    @slow
    def test_elsewhere_in_the_program(self):
        """Ctrl-C in the program's own code, while calls that it has left are in flight."""
        left = {
            "a cancelled agenerate": """
async def main():
    task = asyncio.ensure_future(client.agenerate("q", 20))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    task.cancel()
    await asyncio.wait([task])
asyncio.run(main())
""",
            "a cancelled agenerate whose loop lives on": """
async def main():
    global task
    task = asyncio.ensure_future(client.agenerate("q", 20))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    task.cancel()
    await asyncio.wait([task])
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
""",
            "a daemon thread": """
threading.Thread(target=client.generate, args=("q", 20), daemon=True).start()
sys.stdin.readline()
""",
        }
        for name, script in left.items():
            with self.subTest(name):
                shutil.rmtree(self.cache_dir, ignore_errors=True)
                gate = Gate(holds=lambda request: request.seed >= 5)
                server = self.serve(gate)
                process = self.begin(server.url, script + 'print("ready", flush=True)\nsys.stdin.readline()')
                self.assertTrue(gate.reached(5 + 4))
                self.say(process)
                self.assertEqual(process.stdout.readline(), "ready\n")
                code, _, errors = self.interrupted(process)
                self.assertIn(code, KILLED)
                self.assertIn("KeyboardInterrupt", errors)
                gate.open()
                self.assertEqual(self.sent_by_the_next_run(server), list(range(5, 20)))


@slow
class Connecting(Processes):
    """Ctrl-C while nothing can be sent yet, or not all of it."""

    def silent(self):
        """A listening socket that nobody accepts from but the test. Its connections are made all the same."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        return listener

    def first_bytes(self, listener, n):
        """What the first *n* connections begin with."""
        listener.settimeout(10)
        begun = []
        for _ in range(n):
            connection, _ = listener.accept()
            self.addCleanup(connection.close)
            connection.settimeout(10)
            begun.append(connection.recv(8))
        return begun

    def test_what_hangs(self):
        def address(listener, scheme="http"):
            return "{}://{}:{}/v1".format(scheme, *listener.getsockname())

        for call in (GENERATE["generate"], AGENERATE["agenerate"], "interrupts(client.generate, 'q', 20)"):
            for what, scheme, script, proxied, first in (
                    ("a handshake", "https", "", False, b"\x16\x03\x01"),
                    ("a proxy", "https", "", True, b"CONNECT "),
                    ("a request that nobody reads", "http", "", False, b"POST /v1"),
            ):
                with self.subTest(what, call=call):
                    listener = self.silent()
                    env = {"HTTPS_PROXY": address(listener)} if proxied else {}
                    url = "https://api.invalid/v1" if proxied else address(listener, scheme)
                    if "nobody reads" in what:  # more than the buffers of both ends hold
                        call_now = call.replace('"q"', '"q" * 30_000_000').replace("'q'", "'q' * 30_000_000")
                    else:
                        call_now = call
                    process = self.begin(url, script + call_now, env=env, api_key="k")
                    for begun in self.first_bytes(listener, 4):
                        self.assertTrue(begun.startswith(first), begun)
                    end = self.interrupted(process)
                    if "interrupts" in call:
                        self.assertEqual(end, (0, "caught\n", ""))
                    else:
                        self.assert_uncaught(end)

    @unittest.skipUnless(os.path.exists("/proc/net/tcp"), "needs to see which connections are being made")
    def test_a_connect_that_hangs(self):
        """The backlog of a listening socket is full, so the kernel answers no further SYN."""
        for use_cache in ("json", "sql"):
            for name, call in CALLS.items():
                with self.subTest(name, use_cache=use_cache):
                    shutil.rmtree(self.cache_dir, ignore_errors=True)
                    server = self.serve(lambda request: Reply(**{
                        **vars(by_seed(request)), "headers": {"Connection": "close"}, "hang_up": "after"}))
                    process = self.begin(server.url, (
                        f'client.generate("q", 5)\nprint("ready", flush=True)\nsys.stdin.readline()\n{call}'),
                        use_cache=use_cache)
                    self.assertEqual(process.stdout.readline(), "ready\n")
                    with self.full_backlog(server) as connecting:
                        before = connecting()
                        self.say(process)
                        self.assertTrue(eventually(lambda: connecting() >= before + 4), connecting())
                        self.assert_uncaught(self.interrupted(process))
                    self.assertEqual(
                        self.sent_by_the_next_run(server, use_cache=use_cache), list(range(5, 20)))
                    self.assertEqual(server.seeds(), list(range(20)))

    @contextlib.contextmanager
    def full_backlog(self, server):
        """Let nobody connect to *server*. Gives a function that counts the connections being made."""
        server.shutdown()  # accepts no more, but goes on listening
        server.socket.listen(0)
        address = server.socket.getsockname()
        fillers = []
        for _ in range(20):
            filler = socket.socket()
            fillers.append(filler)
            filler.setblocking(False)
            filler.connect_ex(address)
            if not select.select([], [filler], [], 0.3)[1]:
                break
        else:
            self.skipTest("a full backlog hinders nobody here")

        def connecting():  # state 02 is SYN_SENT
            with open("/proc/net/tcp", encoding="ascii") as table:
                rows = [row.split() for row in table.readlines()[1:]]
            return sum(row[3] == "02" and row[2].endswith(f":{address[1]:04X}") for row in rows)

        try:
            yield connecting
        finally:
            for filler in fillers:
                filler.close()
            server.socket.listen(1024)
            threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()


@unittest.skipUnless(pty, "needs terminals")
@slow
class Interactive(Processes):
    """`python -i` on a terminal: what is in flight finishes and is kept."""

    def start_session(self, url, **settings):
        shutil.rmtree(self.cache_dir, ignore_errors=True)
        self.shown = b""
        self.master, slave = pty.openpty()
        self.addCleanup(os.close, self.master)
        process = self.begin(
            url, "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)",  # so that Ctrl-C reaches it
            env={"PYTHONINSPECT": "1", "PYTHON_BASIC_REPL": "1", "TERM": "dumb"},
            pipes={"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}, **settings)
        os.close(slave)
        self.until_prompt(20)
        return process

    def until_prompt(self, seconds=SOON):
        """Wait for the prompt; what was shown before it."""
        end = time.monotonic() + seconds
        while not self.shown.endswith(b">>> "):
            ready = select.select([self.master], [], [], max(0, end - time.monotonic()))[0]
            self.assertTrue(ready, f"no prompt: {self.shown}")
            self.shown += os.read(self.master, 4096)
        shown, self.shown = self.shown.decode(), b""
        return shown

    def type(self, line):
        os.write(self.master, line.encode() + b"\n")

    def test_what_is_in_flight_finishes(self):
        for name in ("generate", "generate_many", "agenerate"):
            for use_cache in ("json", "sql"):
                with self.subTest(name, use_cache=use_cache):
                    gate = Gate(holds=lambda request: request.seed >= 5)
                    server = self.serve(gate)
                    process = self.start_session(server.url, use_cache=use_cache)
                    self.type(CALLS[name])
                    self.assertTrue(gate.reached(5 + 4))
                    os.write(self.master, b"\x03")
                    self.assertIn("KeyboardInterrupt", self.until_prompt())
                    time.sleep(1.2)  # two looks of a thread whether its sample was given up
                    gate.open()
                    self.type('client.generate("q", 9).get_contents()[-1]')
                    self.assertIn("'answer 8'", self.until_prompt(10))
                    self.assertEqual(server.seeds(), list(range(9)))
                    self.type("exit()")
                    self.assertEqual(process.wait(10), 0)
                    asked = self.sent_by_the_next_run(server, use_cache=use_cache)
                    self.assertEqual(asked, list(range(9, 20)))

    def test_the_exit_waits_for_it(self):
        for name in ("generate", "agenerate"):
            with self.subTest(name):
                gate = Gate(holds=lambda request: request.seed >= 5)
                server = self.serve(gate)
                process = self.start_session(server.url)
                self.type(CALLS[name])
                self.assertTrue(gate.reached(5 + 4))
                os.write(self.master, b"\x03")
                self.until_prompt()
                self.type("exit()")
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(1.5)
                gate.open()
                self.assertEqual(process.wait(10), 0)
                self.assertEqual(self.sent_by_the_next_run(server), list(range(9, 20)))


@slow
class Notebook(Processes):
    """A cell is interrupted; the kernel, which has sys.ps1 as IPython sets it, goes on."""

    CELLS = {
        "generate": 'interrupts(client.generate, "q", 20)',
        # ipykernel's SIGINT handler cancels the task with call_soon, which does not wake a sleeping loop.
        "await agenerate": """
task = loop.create_task(client.agenerate("q", 20))
before = signal.signal(signal.SIGINT, lambda *_: task.cancel())
try:
    loop.run_until_complete(task)
except asyncio.CancelledError:
    print("caught", flush=True)
signal.signal(signal.SIGINT, before)
""",
    }
    CELLS["await gather"] = CELLS["await agenerate"].replace(
        'client.agenerate("q", 20)', 'main()').replace("\ntask", """
async def main():
    return await asyncio.gather(*(client.agenerate("q", 10, seed=seed) for seed in (0, 10)))
task""", 1)
    NEXT = {
        "generate": 'result = client.generate("q", 9)',
        "await agenerate": 'result = loop.run_until_complete(client.agenerate("q", 9))',
    }

    def test_interrupted(self):
        for name, cell in self.CELLS.items():
            for then, next_cell in self.NEXT.items():
                with self.subTest(name, then=then):
                    shutil.rmtree(self.cache_dir, ignore_errors=True)
                    gate = holding()
                    server = self.serve(gate)
                    process = self.begin(server.url, f"""
sys.ps1 = "In : "
loop = asyncio.new_event_loop()
{cell}
sys.stdin.readline()
{next_cell}
print(*result.get_contents(), sep=", ")
loop.close()
""")
                    self.assertTrue(gate.reached(5 + 4))
                    begun = time.monotonic()
                    process.send_signal(signal.SIGINT)
                    self.assertEqual(process.stdout.readline(), "caught\n")
                    self.assertLess(time.monotonic() - begun, SOON)
                    self.assertEqual(len(server.requests), 9)
                    time.sleep(1.2)  # two looks of a thread whether its sample was given up
                    gate.open()
                    self.say(process)
                    answers = ", ".join(f"answer {seed}" for seed in range(9)) + "\n"
                    self.assertEqual(self.ended(process, 10), (0, answers, ""))
                    asked = server.seeds()
                    self.assertEqual(sorted(set(asked)), asked, "sent twice")
                    self.assertEqual(set(range(9)) - set(asked), set())
                    self.assertEqual(len(self.sent_by_the_next_run(server)), 20 - len(asked))

    def test_an_interrupt_of_long_ago_is_forgotten(self):
        """What a later cell draws is waited for again; so is, at the exit, what the first had in flight."""
        gate = Gate()
        server = self.serve(lambda request: by_seed(request) if request.seed >= 100 else gate(request))
        process = self.begin(server.url, """
sys.ps1 = "In : "
interrupts(client.generate, "q", 2)
print(len(client.generate("q", 2, seed=100)), flush=True)
threading.Thread(target=client.generate, args=("q", 2), kwargs={"seed": 2}, daemon=True).start()
sys.stdin.readline()
""")
        self.assertTrue(gate.reached(2))
        process.send_signal(signal.SIGINT)
        self.assertEqual([process.stdout.readline() for _ in range(2)], ["caught\n", "2\n"])
        self.assertTrue(gate.reached(4))
        self.say(process)
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(1.5)
        gate.open()
        self.assertEqual(self.ended(process, 10)[:2], (0, ""))
        self.assertEqual(self.sent_by_the_next_run(server, 4), [])


# A call that is cancelled when a line comes in, and a loop that is closed after it.
CANCELLED = """
async def main():
    task = asyncio.ensure_future(client.agenerate("q", 20))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    task.cancel()
    await asyncio.wait([task])
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
"""


@slow
class Ended(Processes):
    """A process that ends by itself, with calls that it has left."""

    def test_the_exit_waits_for_a_cancelled_call(self):
        """Its event loop lives on, as a notebook's or a server's does. What was not sent is dropped."""
        script = """
async def main():
    task = asyncio.ensure_future(client.agenerate("q", 20))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    task.cancel()
    await asyncio.wait([task])
    print(task.cancelled(), flush=True)
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
"""
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache):
                shutil.rmtree(self.cache_dir, ignore_errors=True)
                gate = Gate()
                server = self.serve(gate)
                process = self.begin(server.url, script, use_cache=use_cache)
                self.assertTrue(gate.reached(4))
                self.say(process)
                self.assertEqual(process.stdout.readline(), "True\n")
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(1.5)
                gate.open()
                self.assertEqual(self.ended(process, 10)[:2], (0, ""))
                self.assertEqual(server.seeds(), list(range(4)))
                self.assertEqual(self.sent_by_the_next_run(server, use_cache=use_cache), list(range(4, 20)))

    def test_the_exit_waits_for_a_daemon_thread(self):
        """What it has in flight is kept; nothing further is sent once the exit has begun."""
        script = """
def draw():
    try:
        client.generate("q", 20)
    except BaseException:
        pass  # its call ends with the process
threading.Thread(target=draw, daemon=True).start()
sys.stdin.readline()
"""
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache):
                shutil.rmtree(self.cache_dir, ignore_errors=True)
                gate = Gate(holds=lambda request: request.seed >= 2)
                server = self.serve(gate)
                process = self.begin(server.url, script, use_cache=use_cache)
                self.assertTrue(gate.reached(2 + 4))
                self.say(process)
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(1.5)  # by now the exit has begun
                gate.open()
                self.assertEqual(self.ended(process, 10), (0, "", ""))
                self.assertEqual(server.seeds(), list(range(6)))
                self.assertEqual(self.sent_by_the_next_run(server, use_cache=use_cache), list(range(6, 20)))

    def test_what_nobody_would_keep_does_not_hold_the_exit(self):
        """With the cache off, a cancelled call's replies are of no use to anybody."""
        gate = Gate()
        server = self.serve(gate)
        process = self.begin(server.url, CANCELLED, use_cache=False)
        self.assertTrue(gate.reached(4))
        self.say(process)
        self.assertEqual(self.ended(process), (0, "", ""))

    def test_a_cancelled_backoff_does_not_hold_the_exit(self):
        """No reply is on its way: there is nothing to wait for."""
        server = self.serve(Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "300"}))
        process = self.begin(server.url, CANCELLED)
        self.assertTrue(eventually(lambda: server.requests))
        self.say(process)
        self.assertEqual(self.ended(process), (0, "", ""))
        self.assertLessEqual(len(server.requests), 4)

    def test_without_a_close_nothing_is_left(self):
        server = self.serve(lambda request: chat("fine"))
        for use_cache in ("json", "sql"):
            for call in ('client.generate("q", 5)', 'asyncio.run(client.agenerate("q", 5))'):
                with self.subTest(use_cache, call=call):
                    shutil.rmtree(self.cache_dir, ignore_errors=True)
                    process = self.begin(server.url, f"print(len({call}))", use_cache=use_cache)
                    self.assertEqual(self.ended(process, 20), (0, "5\n", ""))


if __name__ == "__main__":
    unittest.main()
