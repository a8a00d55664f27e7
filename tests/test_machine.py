"""The machine: no descriptor left, directories that cannot be renamed, proxies, forks, randomness."""

import errno
import gzip
import json
import os
import socket
import threading
import unittest
import zlib
from dataclasses import replace

from tests import rollouts
from tests.case import Case, Clock, environment, slow
from tests.server import Reply, by_seed, chat, delta, events

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

APIError = rollouts.APIError


def slowly(request):
    """An answer after a moment, so that as many requests as may be are in flight at once."""
    return replace(by_seed(request), delay=0.02)


class Rows(Case):
    def make(self, name):
        """A directory for one row of a table."""
        path = os.path.join(self.directory, name)
        os.mkdir(path)
        return path


@unittest.skipIf(resource is None, "a system without limits on descriptors")
class Descriptors(Rows):
    """The server is in this process, the client in another, which alone is short of descriptors."""

    def setUp(self):
        super().setUp()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 2048:
            self.skipTest("the server itself needs more descriptors than there may be")
        if soft < 2048:
            resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))

    LIMITED = """
        import json, resource, sys
        limit, samples, width, kind, url = (json.loads(word) for word in sys.argv[1:])
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        from rollouts import RolloutsClient
        with RolloutsClient("m", base_url=url, use_cache=kind, max_concurrency=width, progress_bar=False,
                            cache_dir="cache") as client:
            result = client.generate("q", samples)
        print(json.dumps([len(result), [str(error) for error in result.errors]]))
    """

    def limited(self, server, limit, samples, width, kind, directory):
        """What a call in a process with few descriptors returns: (responses, errors)."""
        words = [json.dumps(word) for word in (limit, samples, width, kind, server.url)]
        done = self.run_python(self.LIMITED, *words, timeout=300, cwd=directory)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr, "")  # nothing is taken for damage, nothing is warned about
        return json.loads(done.stdout)

    def test_all_are_returned_and_kept_and_none_is_paid_twice(self):
        for limit, samples, width in ((64, 300, 100), (256, 1000, 200)):
            for kind in ("json", "sql"):
                with self.subTest(limit=limit, kind=kind):
                    server = self.serve(slowly)
                    directory = self.make(f"{limit}{kind}")
                    self.assertEqual(
                        self.limited(server, limit, samples, width, kind, directory), [samples, []])
                    self.assertEqual(server.seeds(), list(range(samples)))
                    client = self.client(server, use_cache=kind, cache_dir=os.path.join(directory, "cache"))
                    kept = client.generate("q", samples, offline=True)
                    self.assertEqual([response.content for response in kept],
                                     [f"answer {seed}" for seed in range(samples)])
                    # What is there is read with as few; what is not is drawn beside it.
                    more = samples + 50
                    self.assertEqual(self.limited(server, limit, more, width, kind, directory), [more, []])
                    self.assertEqual(server.seeds(), list(range(more)))

    SCARCE = """
        import json, os, resource, sys, threading, time
        url, kind, free = sys.argv[1], sys.argv[2], int(sys.argv[3])
        from rollouts import RolloutsClient
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        client = RolloutsClient(
            "m", base_url=url, use_cache=kind, progress_bar=False, max_retries=0, cache_dir="cache")
        held = []
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for _ in range(free):
            os.close(held.pop())
        def give_back():
            time.sleep(0.5)
            for one in held:
                os.close(one)
        if free < 6:
            threading.Thread(target=give_back, daemon=True).start()
        result = client.generate("q", 6)
        again = client.generate("q", 6)
        if free >= 6:
            for one in held:
                os.close(one)
        print(json.dumps([[one.content for one in result], [one.cached for one in again]]))
    """

    def test_a_program_that_has_them_all_open(self):
        """For a while, or but for a few. Nothing may be imported then, nor any codec looked up."""
        replies = [
            events(delta(content="\ud83d"), delta(content="\ude00"), delta("stop")), chat("8", headers=None),
            chat("é"), chat("\ud83d alone"), chat("数"), chat("end")]
        for kind in ("json", "sql"):
            for free in (0, 1, 2, 8):
                with self.subTest(kind, free=free):
                    server = self.serve(lambda request: replies[request.seed])
                    done = self.run_python(
                        self.SCARCE, server.url, kind, str(free), timeout=120, cwd=self.make(f"{kind}{free}"))
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
                    contents, cached = json.loads(done.stdout)
                    self.assertEqual(contents[0], "😀")
                    self.assertEqual(cached, [True] * 6)
                    self.assertEqual(server.seeds(), list(range(6)))


class LateImports(Case):
    """Whatever a reply is like, what is needed for it was imported with the module."""

    SOURCE = """
        import asyncio, json, sys, warnings
        from rollouts import APIError, RolloutsClient
        url, kind = sys.argv[1:]
        client = RolloutsClient(
            "m", base_url=url, use_cache=kind, cache_dir="cache", progress_bar=False, max_retries=0)
        warnings.showwarning = lambda *_, **__: None
        warnings.simplefilter("always")
        asyncio.new_event_loop().close()
        before = set(sys.modules)
        prompts = "good gzip deflate stream surrogates lone date html json 404 deep"
        for prompt in prompts.split():
            for call in (lambda: client.generate(prompt, 2), lambda: client.generate_many([prompt, "b"], 2)):
                try:
                    call()
                except APIError:
                    pass
        print(json.dumps(sorted(set(sys.modules) - before)))
    """

    def test_none(self):
        body = json.dumps(chat().body).encode()
        replies = {
            "gzip": Reply(200, gzip.compress(body), {"Content-Encoding": "gzip"}),
            "deflate": Reply(200, zlib.compress(body), {"Content-Encoding": "deflate"}),
            "stream": events(delta(content="fine"), delta("stop")),
            "surrogates": events(delta(content="\ud83d"), delta(content="\ude00"), delta("stop")),
            "lone": chat("\ud83d"),
            "date": Reply(
                429, b"", {
                    "Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}),
            "html": Reply(502, b"<html><title>&eacute;</title></html>"),
            "json": Reply(200, b"{"), "404": Reply(404), "deep": Reply(200, b"[" * 10_000)}
        server = self.serve(lambda request: replies.get(request.body["messages"][0]["content"], chat()))
        for kind in ("json", "sql"):
            with self.subTest(kind):
                done = self.run_python(self.SOURCE, server.url, kind)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(json.loads(done.stdout), [])


class Directories(Rows):
    """Object stores that are mounted as directories: a directory of theirs cannot be renamed."""

    SOURCE = """
        import errno, os, sys, warnings
        url, what, code = sys.argv[1], sys.argv[2], getattr(errno, sys.argv[3])
        def refusing(function):
            def rename(source, *arguments, **options):
                if what == "all" or os.path.isdir(source):
                    raise OSError(code, os.strerror(code), source)
                return function(source, *arguments, **options)
            return rename
        os.rename, os.replace, os.renames = map(refusing, (os.rename, os.replace, os.renames))
        from rollouts import RolloutsClient
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: print(message)
        with RolloutsClient("m", base_url=url, cache_dir="cache/of/mine", progress_bar=False) as client:
            print(len(client.generate("q", 5)), [len(each) for each in client.generate_many(["a", "b"], 2)])
    """

    def test_what_can_be_kept_is_kept(self):
        for code in ("ENOSYS", "EPERM", "EOPNOTSUPP", "EXDEV", "EINVAL", "EACCES", "ENOTEMPTY"):
            with self.subTest(code):
                directory = self.directory
                server = self.serve()
                done = self.run_python(self.SOURCE, server.url, "directories", code, cwd=self.make(code))
                self.assertEqual((done.stdout, done.stderr), ("5 [2, 2]\n", ""))
                client = self.client(server, cache_dir=f"{directory}/{code}/cache/of/mine")
                self.assertEqual(len(client.generate("q", 5, offline=True)), 5)
                self.assertEqual(
                    [len(each) for each in client.generate_many(["a", "b"], 2, offline=True)], [2, 2])

    def test_where_nothing_can_be_renamed_the_warning_says_why(self):
        for code in ("ENOSYS", "EPERM"):
            with self.subTest(code):
                server = self.serve()
                done = self.run_python(self.SOURCE, server.url, "all", code, cwd=self.make(code))
                self.assertEqual(done.stderr, "")
                self.assertIn("5 [2, 2]\n", done.stdout)
                if done.stdout != "5 [2, 2]\n":  # it need not fail; but if it does, it says with what
                    self.assertIn(os.strerror(getattr(errno, code)), done.stdout)

    def test_no_home(self):
        source = """
            import os, pwd, sys
            def nobody(_):
                raise KeyError
            pwd.getpwuid = pwd.getpwnam = nobody
            os.environ.pop("HOME", None)
            from rollouts import Config, RolloutsClient
            refused = 0
            for path in ("~", "~/cache", "~nobody-of-that-name/cache"):
                for make in (RolloutsClient, Config):
                    try:
                        make("m", cache_dir=path)
                    except ValueError as error:
                        refused += "cache_dir" in str(error)
            os.environ["HOME"] = os.path.abspath("home")
            client = RolloutsClient("m", cache_dir="~/cache")
            is_below = os.path.abspath(client.cache_dir) == os.path.abspath("home/cache")
            print(refused, is_below, os.listdir("."))
        """
        done = self.run_python(source)
        self.assertEqual((done.stdout, done.stderr), ("6 True []\n", ""))

    def test_a_tilde_elsewhere_is_a_letter(self):
        client = self.client(self.serve(), cache_dir=f"{self.directory}/a~b/~")
        client.generate("q")
        self.assertEqual(os.listdir(f"{self.directory}/a~b"), ["~"])


class Listener:
    """Something that listens, says *words* to whoever connects, and counts them."""

    def __init__(self, words=b""):
        self.words, self.connections = words, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.settimeout(10)
                try:
                    connection.recv(65536)
                    connection.sendall(self.words)
                except OSError:
                    pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(10)


class Roads(Case):
    settings = {"use_cache": False}

    def refused(self, words, url, **settings):
        """Prove that a call fails at once, with advice."""
        clock = self.use_clock(Clock())
        with self.assertRaises(APIError) as caught:
            self.client(url, **settings).generate("q", 20, max_concurrency=4)
        self.assertFalse(caught.exception.retryable)
        self.assertEqual(clock.slept, [])
        self.assertRegex(str(caught.exception), words)
        self.assertTrue(caught.exception.advice)

    def test_socks_proxies_are_refused_at_once(self):
        for scheme in ("socks5", "socks5h", "socks4", "socks4a", "socks", "SOCKS5"):
            for variable in ("HTTP_PROXY", "http_proxy"):
                with self.subTest(scheme, variable=variable), Listener() as proxy:
                    server = self.serve()
                    with environment(**{variable: f"{scheme}://{proxy.host}"}):
                        self.refused("(?i)socks", server)
                    self.assertEqual((proxy.connections, server.connections), (0, 0))
            for variable in ("HTTPS_PROXY", "https_proxy"):
                with self.subTest(scheme, variable=variable), Listener() as proxy:
                    with environment(**{variable: f"{scheme}://user:word@{proxy.host}"}):
                        self.refused("(?i)socks", "https://127.0.0.1:9/v1")
                    self.assertEqual(proxy.connections, 0)

    def test_socks_proxies_that_are_not_used(self):
        for variables in (
            {"ALL_PROXY": "socks5://127.0.0.1:9"}, {"all_proxy": "socks5h://127.0.0.1:9"},
            {"HTTPS_PROXY": "socks5://127.0.0.1:9"},
            {"HTTP_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": "127.0.0.1"},
            {"HTTP_PROXY": "socks5://127.0.0.1:9", "no_proxy": "*"}, {"FTP_PROXY": "socks5://127.0.0.1:9"},
        ):
            with self.subTest(variables), environment(**variables):
                self.assertEqual(len(self.client(self.serve()).generate("q", 3)), 3)

    def test_the_password_of_a_proxy_is_not_shown(self):
        with environment(HTTP_PROXY="socks5://me:secret-word@127.0.0.1:9"), self.assertRaises(
                APIError) as caught:
            self.client(self.serve()).generate("q")
        self.assertNotIn("secret-word", f"{caught.exception} {caught.exception!r}")

    def test_https_to_a_plain_port(self):
        for words in (
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.0 400 Bad request\r\n\r\n",
                      b"SSH-2.0-OpenSSH_9.6\r\n", b"220 mail.example.org ESMTP\r\n",
                      b"-ERR unknown command\r\n"):
            with self.subTest(words), Listener(words) as listener:
                self.refused("http://", f"https://{listener.host}/v1")
                self.assertLessEqual(listener.connections, 4)
        server = self.serve()
        self.refused("http://", server.url.replace("http:", "https:"))
        self.assertEqual(server.requests, [])


@slow
class Randomness(Case):
    def test_retries_leave_the_programs_own_alone(self):
        source = """
            import random, sys
            from rollouts import APIError, RolloutsClient
            def draws():
                return [random.random() for _ in range(5)]
            random.seed(7)
            state, expected = random.getstate(), draws()
            random.setstate(state)
            client = RolloutsClient(
                "m", base_url=sys.argv[1], progress_bar=False, use_cache=sys.argv[2], max_retries=1)
            assert random.getstate() == state
            client.generate("q", 4)
            assert random.getstate() == state
            assert draws() == expected
            random.seed(7)
            client.generate("another", 4)
            assert random.getstate() == state
            print("fine")
        """
        for kind in ("json", "sql"):
            with self.subTest(kind):
                failed = set()

                def script(request, failed=failed):
                    key = json.dumps(request.body["messages"]), request.seed
                    if key in failed:
                        return by_seed(request)
                    failed.add(key)
                    return Reply(503)

                server = self.serve(script)
                done = self.run_python(source, server.url, kind)
                self.assertEqual((done.stdout, done.stderr), ("fine\n", ""))
                self.assertEqual(len(server.requests), 16)

    def test_nor_does_a_seed_decide_them(self):
        """Two programs that are seeded alike do not come back at the same moment."""
        source = """
            import random, sys
            random.seed(7)
            import rollouts
            random.seed(7)
            print([rollouts._clock.random() for _ in range(4)])
        """
        first, second = (self.run_python(source).stdout for _ in range(2))
        self.assertNotEqual(first, second)
        self.assertTrue(first)


class Shortfalls(Case):
    def test_each_of_five_equal_ones_in_a_loop_is_told(self):
        source = """
            import sys, warnings
            warnings.resetwarnings()
            warnings.simplefilter(sys.argv[2], UserWarning)
            from rollouts import RolloutsClient
            client = RolloutsClient("m", base_url=sys.argv[1], progress_bar=False, max_retries=0)
            raised = 0
            for _ in range(5):
                try:
                    client.generate("q", 3)
                except UserWarning:
                    raised += 1
            print(raised)
        """
        server = self.serve(lambda request: Reply(503) if request.seed == 1 else by_seed(request))
        for action, told, raised in (
                ("default", 5, 0), ("always", 5, 0), ("module", 5, 0), ("ignore", 0, 0), ("error", 0, 5)):
            with self.subTest(action):
                done = self.run_python(source, server.url, action)
                self.assertEqual((done.stderr.count("of 3 samples"), done.stdout), (told, f"{raised}\n"))


@slow
class Deep(Case):
    """A body that is nested deeper than anything reads costs its sample, and nothing else."""

    def bodies(self):
        for depth in (380, 1000, 10_000, 100_000):
            nested = "[" * depth + "]" * depth
            objects = '{"a":' * depth + "1" + "}" * depth
            good = '{"choices":[{"message":{"content":%s},"finish_reason":"stop"}],"x":%s}'
            parts = '[{"type":"text","text":' * depth + '"8"' + "}]" * depth
            thoughts = '[{"type":"thinking","thinking":' * depth + '"8"' + "}]" * depth
            rows = {
                "lists": nested, "objects": objects, "opened": "[" * depth, "more behind it": nested + "x",
                "content": good % (nested, 0), "content of objects": good % (f"[{objects}]", 0),
                "parts": good % (parts, 0), "thoughts": good % (thoughts, 0),
                "beside": good % ('"8"', nested),
                "details": f'{{"choices":[{{"message":{{"content":"8","reasoning_details":{parts}}}}}]}}',
                "errors": '{"error":' * depth + '"m"' + "}" * depth,
                "message": f'{{"error":{{"message":{nested}}}}}',
                "detail": f'{{"detail":{objects}}}', "errors of lists": f'{{"errors":{nested}}}',
                "metadata": f'{{"error":{{"message":"m","metadata":{{"raw":{objects}}}}}}}',
            }
            for name, text in rows.items():
                for status in (200, 500):
                    yield f"{name}, {depth}, {status}", Reply(status, text.encode())
                yield f"{name}, {depth}, an event", Reply(200, f"data: {text}\n\ndata: [DONE]\n\n".encode())

    def test_one_sample(self):
        self.use_clock(Clock())
        for name, reply in self.bodies():
            with self.subTest(name):
                server = self.serve(
                    lambda request, reply=reply: reply if request.seed == 3 else by_seed(request))
                client = self.client(
                    server, cache_dir=f"{self.directory}/{name}", max_retries=0, max_concurrency=4)
                with self.warned():
                    result = client.generate("q", 8)
                self.assertEqual(len(result) + len(result.errors), 8)
                self.assertLessEqual({error.seed for error in result.errors}, {3})
                for error in result.errors:
                    self.assertIsInstance(error, APIError)
                    self.assertLess(len(str(error)), 3000)


@unittest.skipUnless(hasattr(os, "fork"), "a system without fork")
class Forks(Rows):
    SOURCE = """
        import os, sys, warnings
        import urllib.request
        asked = []
        for name in ("getproxies", "proxy_bypass", "getproxies_environment"):
            def spy(*arguments, name=name, real=getattr(urllib.request, name), **options):
                asked.append(name)
                return real(*arguments, **options)
            setattr(urllib.request, name, spy)
        import rollouts
        kind = sys.argv[2]
        settings = {"base_url": sys.argv[1], "use_cache": kind, "progress_bar": False}
        clients = [rollouts.RolloutsClient("m", **settings) for _ in range(3)]
        for client in clients:
            client.generate("q", 4)
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        called, own = [], rollouts.__file__
        def watch(frame, event, argument):
            if event == "call" and frame.f_code.co_filename != own:
                caller = frame.f_back
                if caller is not None and caller.f_code.co_filename == own:
                    called.append(frame.f_code.co_filename + " " + frame.f_code.co_name)
            elif event == "c_call" and frame.f_code.co_filename == own:
                called.append(repr(argument))
        del asked[:]
        sys.setprofile(watch)
        pid = os.fork()
        sys.setprofile(None)
        if pid == 0:
            code = 1
            try:
                inside = [name for name in called if "fork" not in name]
                first = list(asked)
                fresh = clients[0].generate("another", 4)
                cached = clients[1].generate("q", 4)
                new = rollouts.RolloutsClient("m", **settings)
                new.generate("third", 2)
                print("in the hook:", inside, first, flush=True)
                print("then:", len(fresh), [one.cached for one in cached], flush=True)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print("ended", status, len(clients[2].generate("fourth", 3)))
    """

    def test_nothing_but_flags_in_the_hook_and_a_client_that_works(self):
        for kind in ("json", "sql"):
            with self.subTest(kind):
                done = self.run_python(self.SOURCE, self.serve().url, kind, cwd=self.make(kind))
                self.assertEqual(done.stderr, "")
                self.assertEqual(done.stdout.splitlines(), [
                    "in the hook: [] []", "then: 4 [True, True, True, True]", "ended 0 3"])


if __name__ == "__main__":
    unittest.main()
