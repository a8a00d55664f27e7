"""Whole processes: killed, forked, pickled, and several on one cache (Ctrl-C: test_interrupt.py)."""

import concurrent.futures
import copy
import glob
import json
import multiprocessing
import os
import pickle
import shutil
import time
import unittest
import warnings

from tests import rollouts
from tests.case import Case, environment
from tests.server import Gate, Reply, by_seed, chat

RolloutsClient = rollouts.RolloutsClient

# What every script begins with: its first argument is the client's settings.
HEAD = """
import asyncio, json, os, sys, threading, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "This process")  # Python 3.12 warns of a fork where there are threads
from tests import rollouts
settings = json.loads(sys.argv[1])
client = rollouts.RolloutsClient("m", progress_bar=False, **settings)
"""
POSIX = unittest.skipUnless(os.name == "posix", "needs POSIX signals and processes")


class Processes(Case):
    """A server here, and scripts in processes of their own."""

    def start_script(self, server, script, **settings):
        """Start a process that runs *script* with a client for *server*."""
        settings = {"base_url": server.url, "cache_dir": self.cache_dir, **settings}
        return self.start_python(HEAD + script, json.dumps(settings), text=False, encoding=None)

    def run_script(self, server, script, **settings):
        """What *script* prints."""
        process = self.start_script(server, script, **settings)
        output, errors = process.communicate(timeout=30)
        self.assertEqual((process.returncode, errors.decode()), (0, ""))
        return output.decode()

    def sent_by_the_next_run(self, server, n_samples, **settings):
        """The seeds that a run from now on asks for. It is checked that it gets them all."""
        server.script = by_seed
        before = len(server.requests)
        result = self.client(server, **settings).generate("q", n_samples)
        self.assertEqual(result.get_contents(), [f"answer {seed}" for seed in range(n_samples)])
        return sorted(request.seed for request in server.requests[before:])


@POSIX
class Killed(Processes):
    def test_the_next_run_asks_only_for_what_never_arrived(self):
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache):
                gate = Gate(holds=lambda request: request.seed >= 37)
                server = self.serve(gate)
                process = self.start_script(server, 'client.generate("q", 100)', use_cache=use_cache, max_concurrency=8)
                # Who asks for the next has stored the last, so the 37 are on disk when 8 more are asked for.
                self.assertTrue(gate.reached(37 + 8))
                process.kill()
                process.wait(10)
                gate.open()
                self.assertEqual(
                    self.sent_by_the_next_run(server, 100, use_cache=use_cache), list(range(37, 100)))
                self.assertEqual(glob.glob(os.path.join(self.cache_dir, "**", ".*.tmp"), recursive=True), [])

    def test_again_and_again(self):
        """Killed at any moment, no entry is damaged, and the runs together ask for hardly more than there is."""
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache):
                # Delays that differ, so that a kill meets threads at different work.
                server = self.serve(
                    lambda request: Reply(**{**vars(by_seed(request)), "delay": request.seed % 7 / 500}))
                for kills in range(4):
                    came = len(server.requests)
                    process = self.start_script(
                        server, 'client.generate("q", 200)', use_cache=use_cache, max_concurrency=4)
                    while len(server.requests) < came + 30 + kills and process.poll() is None:
                        time.sleep(0.001)
                    process.kill()
                    process.wait(10)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # as a damaged entry would cost
                    self.sent_by_the_next_run(server, 200, use_cache=use_cache)
                self.assertLessEqual(len(server.requests), 200 + 4 * 4)
                self.assertEqual(set(server.seeds()), set(range(200)))


@unittest.skipUnless(hasattr(os, "fork"), "needs fork")
class Forked(Processes):
    def test_a_client_that_is_in_use(self):
        """The child draws with the parent's client while the parent's own calls are under way, and go on."""
        script = """
client.generate("before", 5)
thread = threading.Thread(target=client.generate, args=("parent", 8))
thread.start()
sys.stdin.readline()
child = os.fork()
if not child:
    code = 1
    try:
        answers = [*client.generate("before", 5), *client.generate("child", 5), *client.generate("before", 8)]
        answers += asyncio.run(client.agenerate("child", 6))
        code = 0 if len(answers) == 24 else 2
    finally:
        os._exit(code)
print(os.waitpid(child, 0)[1], flush=True)
thread.join()
print(len(client.generate("parent", 8)), len(client.generate("child", 6)), len(client.generate("after", 3)))
"""
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache):
                gate = Gate(holds=lambda request: request.body["messages"][0]["content"] == "parent")
                server = self.serve(gate)
                process = self.start_script(server, script, use_cache=use_cache, max_concurrency=4)
                self.assertTrue(gate.reached(5 + 4))
                process.stdin.write(b"\n")
                process.stdin.flush()
                self.assertEqual(process.stdout.readline(), b"0\n")  # while the parent's requests are still held
                gate.open()
                output, errors = process.communicate(timeout=8)
                self.assertEqual((process.returncode, output, errors), (0, b"8 6 3\n", b""))
                counts = {}
                for request in server.requests:
                    question = request.body["messages"][0]["content"]
                    counts[question] = counts.get(question, 0) + 1
                self.assertEqual(counts, {"before": 8, "parent": 8, "child": 6, "after": 3})
                shutil.rmtree(self.cache_dir)

    def test_the_child_ends_as_a_process_does(self):
        script = """
client.generate("q", 5)
child = os.fork()
client.generate("q", 10 if child else 7)
if child:
    print(os.waitpid(child, 0)[1])
"""
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache):
                server = self.serve()
                self.assertEqual(self.run_script(server, script, use_cache=use_cache), "0\n")
                self.assertEqual(set(server.seeds()), set(range(10)))
                self.assertEqual(self.sent_by_the_next_run(server, 10, use_cache=use_cache), [])
                shutil.rmtree(self.cache_dir)


def draw(client, prompt, n_samples):
    """What a worker of a process pool does."""
    return client.generate(prompt, n_samples, progress_bar=False)


class Passed(Processes):
    """A client passed on: pickled, copied, and to the workers of a pool."""

    def test_a_pickle_holds_the_settings_and_no_key(self):
        server = self.serve()
        client = self.client(server, api_key="sk-very-secret", temperature=0.3, max_concurrency=7, min_p=0.1)
        client.generate("q", 3)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with self.subTest(protocol=protocol):
                pickled = pickle.dumps(client, protocol)
                self.assertNotIn(b"very-secret", pickled)
                with pickle.loads(pickled) as other:
                    self.assertIsNone(other.api_key)
                    self.assertEqual((other.temperature, other.max_concurrency), (0.3, 7))
                    self.assertTrue(all(response.cached for response in other.generate("q", 3)))
                    other.generate("q", 1, seed=10 + protocol)
                self.assertNotIn("authorization", server.requests[-1].headers)
                self.assertEqual(server.requests[-1].body["min_p"], 0.1)
        self.assertNotIn(b"very-secret", pickle.dumps(client.generate("q", 3)))

    def test_its_key_comes_from_the_environment_there(self):
        server = self.serve()
        with environment(TOGETHER_BASE_URL=server.url, TOGETHER_API_KEY="sk-there"):
            again = self.enter(pickle.loads(pickle.dumps(self.client(provider="together", api_key="sk-here"))))
            again.generate("hi")
        self.assertEqual(server.requests[0].headers["authorization"], "Bearer sk-there")

    def test_a_configuration_too(self):
        config = rollouts.Config("m", api_key="sk-secret")
        self.assertNotIn(b"sk-secret", pickle.dumps(config))
        self.assertIsNone(pickle.loads(pickle.dumps(config)).api_key)
        self.assertNotIn(b"sk-secret", pickle.dumps(config.to_dict()))

    def test_copies_keep_the_key(self):
        server = self.serve()
        client = self.client(server, api_key="sk-very-secret", use_cache=False)
        for duplicate in (copy.copy(client), copy.deepcopy(client), copy.copy(copy.deepcopy(client))):
            with duplicate:
                duplicate.generate("q")
            self.assertEqual(server.requests[-1].headers["authorization"], "Bearer sk-very-secret")
        client.generate("q")  # it is not closed with them
        self.assertEqual(len(server.requests), 4)

    def test_process_pools(self):
        for method in ("spawn", "fork"):
            if method not in multiprocessing.get_all_start_methods():
                continue
            with self.subTest(method), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This process", DeprecationWarning)
                server = self.serve(lambda request: chat(f"{request.body['messages'][0]['content']} {request.seed}"))
                client = self.client(server, cache_dir=os.path.join(self.directory, method))
                client.generate("q0", 2)
                context = multiprocessing.get_context(method)
                with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
                    futures = [pool.submit(draw, client, f"q{number}", 5) for number in range(6)]
                    results = [future.result(30) for future in futures]
                for number, result in enumerate(results):
                    self.assertEqual(result.get_contents(), [f"q{number} {seed}" for seed in range(5)])
                self.assertEqual(len(server.requests), 30)
                self.assertTrue(all(response.cached for response in client.generate("q5", 5)))


class Shared(Processes):
    def test_four_processes_at_once_on_one_cache(self):
        script = """
sys.stdin.readline()
for result in client.generate_many([f"q{number}" for number in range(10)], 20):
    for response in result:
        assert response.content == f"{result.prompt} {response.seed}", response
    print(len(result))
"""
        for use_cache in ("json", "sql"):
            with self.subTest(use_cache):
                server = self.serve(lambda request: chat(f"{request.body['messages'][0]['content']} {request.seed}"))
                processes = [
                    self.start_script(server, script, use_cache=use_cache, max_concurrency=8, timeout=20)
                    for _ in range(4)]
                for process in processes:  # all of them find no cache yet
                    process.stdin.write(b"\n")
                    process.stdin.flush()
                for process in processes:
                    output, errors = process.communicate(timeout=30)
                    self.assertEqual((process.returncode, errors.decode()), (0, ""))
                    self.assertEqual(output.split(), [b"20"] * 10)
                came = len(server.requests)
                self.assertLessEqual(came, 4 * 200)
                for result in self.client(server, use_cache=use_cache).generate_many([f"q{n}" for n in range(10)], 20):
                    self.assertEqual(result.get_contents(), [f"{result.prompt} {seed}" for seed in range(20)])
                self.assertEqual(len(server.requests), came)

    @POSIX
    def test_a_full_disk_costs_a_warning_and_keeps_no_half_of_an_entry(self):
        """A limit on the size of files stands for the disk: a write beyond it is cut short before one fails."""
        script = """
import resource
client.generate("q", 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, MOST))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = client.generate("q", 4)
print(len(result), len(caught), *["could not be written" in str(warning.message) for warning in caught])
"""
        for use_cache, limit in (("json", 200), ("sql", 8192)):
            with self.subTest(use_cache):
                server = self.serve()
                settings = {"use_cache": use_cache, "cache_dir": os.path.join(self.cache_dir, use_cache)}
                output = self.run_script(server, script.replace("MOST", str(limit)), **settings)
                self.assertEqual(output, "4 1 True\n")
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    self.assertEqual(self.sent_by_the_next_run(server, 4, **settings), [2, 3])


if __name__ == "__main__":
    unittest.main()
