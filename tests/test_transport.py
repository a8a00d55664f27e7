"""Bytes out, bytes in: connections that are kept, deadlines, sizes, proxies and certificates; over real sockets."""

import concurrent.futures
import contextlib
import gc
import json
import os
import queue
import socket
import ssl
import sys
import threading
import time
import unittest
import warnings
from dataclasses import replace
from unittest import mock

from tests import rollouts
from tests.case import Case, environment
from tests.server import CERTIFICATE, Reply, by_seed, chat, events

APIError, RolloutsClient = rollouts.APIError, rollouts.RolloutsClient
GOOD = json.dumps(chat().body).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def read_request(connection):
    """The head and the body of the request that comes on *connection*."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            while len(body) < int(line[15:]):
                body += connection.recv(65536)
    return head, body


class Raw:
    """A server that hands each of its connections to a function: for what http.server would never say.

    It counts the connections; *over* is set when the test is.
    """

    def __init__(self, serve):
        self.serve, self.connections, self.over, self.open = serve, 0, threading.Event(), []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.host = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.url = f"http://{self.host}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                self.open.append(connection)
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection):
        with connection, contextlib.suppress(OSError):
            self.serve(self, connection)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        for sock in (self.listener, *self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def says(*pieces, pause=0.0, then="hang up"):
    """Serve each request with *pieces*, *pause* seconds apart; *then* "hang up", "wait" or "keep" the connection."""

    def serve(server, connection):
        while True:
            read_request(connection)
            for piece in pieces:
                connection.sendall(piece)
                if pause and server.over.wait(pause):
                    return
            if then == "wait":
                server.over.wait(60)
            if then != "keep":
                return

    return serve


class Wired(Case):
    """What the tests over sockets share: no cache, and a clock that never really waits."""

    settings = {"use_cache": False}

    def setUp(self):
        super().setUp()
        self.use_clock()

    def raw(self, serve):
        return self.enter(Raw(serve))

    def fails(self, server, *arguments, prompt="q", **settings):
        """The APIError of a call that has but one attempt."""
        with self.assertRaises(APIError) as caught:
            self.client(server, **{"max_retries": 0, **settings}).generate(prompt, *arguments)
        return caught.exception


class Connections(Wired):
    def test_one_serves_sample_after_sample_and_call_after_call(self):
        server = self.serve()
        client = self.client(server, max_concurrency=1)
        client.generate("q", 20)
        client.generate("another", 5)
        client.generate_many(["a", "b"], 3)
        self.assertEqual((len(server.requests), server.connections), (31, 1))

    def test_64_at_once(self):
        together = threading.Barrier(64)

        def answer(request):
            together.wait(30)  # broken, were there fewer
            return by_seed(request)

        server = self.serve(answer)
        client = self.client(server, max_retries=0)
        for _ in range(2):
            self.assertEqual(client.generate("q", 64).get_contents(), [f"answer {seed}" for seed in range(64)])
        self.assertEqual((len(server.requests), server.connections), (128, 64))

    def test_no_more_than_max_concurrency(self):
        server = self.serve()
        self.client(server, max_concurrency=3).generate("q", 40)
        self.assertLessEqual(server.connections, 3)

    def test_failures_keep_the_connection_too(self):
        server = self.serve([Reply(503, {"error": {"message": "busy"}}), Reply(429), chat()])
        self.client(server).generate("q")
        self.assertEqual((len(server.requests), server.connections), (3, 1))

    def test_one_that_was_closed_while_idle_is_replaced_without_a_word(self):
        server = self.serve()
        client = self.client(server, max_concurrency=8, max_retries=0)
        client.generate("q", 8)
        server.drop_connections()
        client.generate("again", 8)
        self.assertEqual((len(server.requests), self.clock.slept), (16, []))

    def test_one_that_the_server_closes_after_each_reply_is_replaced_without_a_word(self):
        server = self.serve(lambda request: replace(by_seed(request), hang_up="after"))
        client = self.client(server, max_concurrency=1, max_retries=0)
        self.assertEqual(len(client.generate("q", 20)), 20)
        self.assertEqual((len(server.requests), server.connections), (20, 20))

    def test_one_that_says_it_closes_is_replaced(self):
        reply = replace(chat(), headers={"Connection": "close"}, hang_up="after")
        server = self.serve(reply)
        client = self.client(server, max_concurrency=1, max_retries=0)
        self.assertEqual(len(client.generate("q", 5)), 5)
        self.assertEqual((len(server.requests), server.connections), (5, 5))

    def test_a_kept_one_that_breaks_before_the_reply_gets_the_request_once_more(self):
        server = self.serve([chat(), Reply(hang_up="at once"), chat("again")])
        client = self.client(server, max_retries=0)
        client.generate("first")
        self.assertEqual(client.generate("second")[0].content, "again")
        self.assertEqual((len(server.requests), server.connections), (3, 2))

    def test_however_many_are_kept_the_request_goes_out_once_more_only(self):
        together = threading.Barrier(5)

        def answer(request):
            if request.body["messages"][0]["content"] != "first":
                return Reply(hang_up="at once")
            together.wait(30)  # five connections are kept
            return chat()

        server = self.serve(answer)
        client = self.client(server, max_retries=0)
        client.generate("first", 5)
        with self.assertRaises(APIError):
            client.generate("second")
        self.assertEqual(len(server.requests), 5 + 2)

    def test_a_kept_one_that_breaks_late_is_a_failed_attempt(self):
        """The server may have worked on the request by then."""
        server = self.serve([chat(), Reply(delay=0.3, hang_up="at once"), chat()])
        client = self.client(server, max_retries=0)
        client.generate("first")
        with mock.patch.object(rollouts, "_SOON", 0.1), self.assertRaises(APIError):
            client.generate("second")
        self.assertEqual(len(server.requests), 2)

    def test_a_kept_one_that_breaks_within_the_reply_is_a_failed_attempt(self):
        for breaks in (replace(chat(), hang_up="early"), Reply(pieces=[b'{"choices"'], hang_up="early")):
            server = self.serve([chat(), breaks, chat()])
            client = self.client(server, max_retries=0)
            client.generate("first")
            with self.assertRaises(APIError):
                client.generate("second")
            self.assertEqual(len(server.requests), 2)

    def test_a_kept_one_that_is_reset_within_the_status_is_a_failed_attempt(self):
        asked = []

        def serve(server, connection):
            read_request(connection)
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD))
            asked.append(read_request(connection))
            connection.sendall(b"HTTP/1.1 2")
            server.over.wait(0.3)  # until that was read: a reset would throw it away
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        server = self.raw(serve)
        client = self.client(server, max_retries=0)
        client.generate("first")
        with self.assertRaises(APIError):
            client.generate("second")
        self.assertEqual((len(asked), server.connections), (1, 1))

    def test_a_fresh_one_that_breaks_is_a_failed_attempt(self):
        server = self.serve(Reply(hang_up="at once"))
        for retries in (0, 1, 3):
            server.requests.clear()
            with self.assertRaises(APIError):
                self.client(server, max_retries=retries).generate("q")
            self.assertEqual(len(server.requests), retries + 1)

    def test_an_unread_stream_leaves_no_connection_that_is_out_of_step(self):
        words = {"choices": [{"index": 0, "delta": {"content": "42"}, "finish_reason": "stop"}]}
        server = self.serve(events(words, "data: [DONE]\n\n", "data: left over\n\n", done=False))
        client = self.client(server, stream=True, max_concurrency=1, max_retries=0)
        self.assertEqual(client.generate("q", 5).get_contents(), ["42"] * 5)
        self.assertEqual(server.connections, 1)

    def plain_and_tls(self, serve):
        """The addresses of two servers that answer as *serve* does."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)

        def over_tls(server, connection):
            with context.wrap_socket(connection, server_side=True) as wrapped:
                serve(server, wrapped)

        self.enter(mock.patch.dict(os.environ, SSL_CERT_FILE=CERTIFICATE))
        yield self.raw(serve).url
        yield self.raw(over_tls).url.replace("http://127.0.0.1", "https://localhost")

    def test_what_nobody_asked_for_answers_nothing(self):
        strays, seeds = queue.Queue(), queue.Queue()

        def serve(server, connection):
            while True:
                seed = json.loads(read_request(connection)[1])["seed"]
                answer = json.dumps(chat(f"answer {seed}").body).encode()
                connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(answer), answer))
                connection.sendall(strays.get(timeout=30))
                seeds.put(seed)

        for url in self.plain_and_tls(serve):
            client = self.client(url, max_retries=0)
            for stray in (
                HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD),
                b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                b"\r\n",
            ):
                for seed in range(3):
                    with self.subTest(url=url, stray=stray, seed=seed):
                        self.assertEqual(client.generate("q", seed=seed).get_contents(), [f"answer {seed}"])
                        strays.put(stray)
                        self.assertEqual(seeds.get(timeout=30), seed)

    def test_a_refusal_that_comes_before_all_was_sent(self):
        def serve(server, connection):
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 0\r\n\r\n")

        error = self.fails(self.raw(serve), prompt="q" * 10**7)  # over TLS, a reset may destroy the reply
        self.assertEqual((error.status, error.retryable), (413, False))

    def test_tcp_keepalive(self):
        sockets = []
        connect = rollouts._Connection.connect

        def watched(connection, *arguments):
            connect(connection, *arguments)
            sockets.append(connection.sock)

        with mock.patch.object(rollouts._Connection, "connect", watched):
            self.client(self.serve()).generate("q")
        self.assertEqual([sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for sock in sockets], [1])
        if hasattr(socket, "TCP_KEEPIDLE"):  # the system's own two hours would notice nothing in time
            self.assertLessEqual(sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 120)

    def test_closing_the_client_closes_its_connections(self):
        server = self.serve()
        gc.collect()  # what other tests left is not meant
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            client = RolloutsClient("m", base_url=server.url, use_cache=False, progress_bar=False)
            client.generate("q", 8)
            client.close()
            del client
            gc.collect()
        self.assertEqual([str(warning.message) for warning in caught], [])

    def test_a_reply_that_comes_after_close_leaves_no_connection_open(self):
        sockets = []
        connect = rollouts._Connection.connect

        def watched(connection, *arguments):
            connect(connection, *arguments)
            sockets.append(connection.sock)

        go, came = threading.Event(), threading.Event()

        def answer(request):
            came.set()
            return replace(by_seed(request), wait=go)

        client = self.client(self.serve(answer))
        thread = threading.Thread(target=lambda: self.assertRaises(rollouts.RolloutsError, client.generate, "q"))
        with mock.patch.object(rollouts._Connection, "connect", watched):
            thread.start()
            self.assertTrue(came.wait(10))
        client.close()
        go.set()
        thread.join(10)
        deadline = time.monotonic() + 5
        while sockets[0].fileno() != -1 and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertEqual(sockets[0].fileno(), -1)


class Framing(Wired):
    def test_a_reply_in_any_frame(self):
        half = len(GOOD) // 2
        length = b"Content-Length: %d\r\n\r\n" % len(GOOD)
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (GOOD[:half], GOOD[half:])) + b"0\r\n"
        rows = {
            "length": (HEAD, length, GOOD),
            "byte by byte": [bytes([byte]) for byte in HEAD + length + GOOD],
            "chunks": (HEAD, b"Transfer-Encoding: chunked\r\n\r\n", chunks, b"\r\n"),
            "chunks, with a trailer": (HEAD, b"Transfer-Encoding: chunked\r\n\r\n", chunks, b"X-Cost: 1\r\n\r\n"),
            "until the end": (HEAD, b"\r\n", GOOD),
            "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\n", GOOD),
            "after 100": (b"HTTP/1.1 100 Continue\r\n\r\n", HEAD, length, GOOD),
            "padded with white space": (HEAD, b"\r\n", b" \n" * 1000, GOOD, b"\n" * 1000),
        }
        for name, pieces in rows.items():
            with self.subTest(name):
                server = self.raw(says(*pieces))
                self.assertEqual(self.client(server, max_retries=0).generate("q")[0].content, "fine")

    def test_chunked_replies_keep_the_connection(self):
        pieces = [GOOD[at:at + 7] for at in range(0, len(GOOD), 7)]
        server = self.serve(Reply(pieces=pieces))
        self.assertEqual(len(self.client(server, max_concurrency=1).generate("q", 10)), 10)
        self.assertEqual(server.connections, 1)

    def test_a_large_reply_comes_whole(self):
        text = "Ærøskøbing 🎲 " * 100_000
        for reply in (chat(text), Reply(pieces=[json.dumps(chat(text).body).encode()])):
            server = self.serve(reply)
            self.assertEqual(self.client(server).generate("q")[0].content, text)

    def test_what_is_sent(self):
        server = self.serve()
        self.client(server, api_key="k").generate("q")
        request = server.requests[0]
        self.assertEqual(request.path, "/v1/chat/completions")
        self.assertEqual(request.headers["content-type"], "application/json")
        self.assertEqual(request.headers["authorization"], "Bearer k")
        self.assertIn("rollouts", request.headers["user-agent"])
        self.assertNotEqual(request.headers.get("connection", "").lower(), "close")
        self.assertEqual(request.headers["host"], server.url.split("/")[2])


class Deadline(Wired):
    """One attempt ends when its time is over, whatever the server does to keep it alive."""

    def test_it_holds(self):
        length, chunked = b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
        stream = HEAD.replace(b"application/json", b"text/event-stream")
        rows = {
            "silence": (),
            "silence after the status": (b"HTTP/1.1 200 OK\r\n",),
            "silence after the headers": (HEAD, length),
            "silence within the body": (HEAD, length, GOOD),
            "a trickled status": (b"HTTP/1.1 200 ", *[b"O"] * 500),
            "trickled headers": (HEAD, *[b"X: y\r\n"] * 90),
            "one trickled header": (HEAD, b"X-Padding: ", *[b"a"] * 500),
            "trickled white space": (HEAD, length, *[b" "] * 500),
            "trickled white space in chunks": (HEAD, chunked, *[b"1\r\n \r\n"] * 500),
            "trickled white space until the end": (HEAD, b"\r\n", *[b"\n"] * 500),
            "an error whose body trickles": (b"HTTP/1.1 500 Oh\r\n", chunked, *[b"1\r\n \r\n"] * 500),
            "a stream of comments": (stream, chunked, *[b"e\r\n: PROCESSING\n\n\r\n"] * 500),
            "trickled interim replies": (b"HTTP/1.1 100 Continue\r\n\r\n",) * 500,
        }

        def attempt(pieces):
            begun = time.monotonic()
            error = self.fails(self.raw(says(*pieces, pause=0.02, then="wait")), timeout=0.4)
            return time.monotonic() - begun, error

        with concurrent.futures.ThreadPoolExecutor(len(rows)) as threads:
            attempts = {name: threads.submit(attempt, pieces) for name, pieces in rows.items()}
        for name, made in attempts.items():
            with self.subTest(name):
                took, error = made.result()
                self.assertLess(took, 8)
                self.assertIsNone(error.status)
                self.assertTrue(error.retryable)
                self.assertIn("0.4 s", error.message)
                self.assertIn("timeout", error.advice)

    def test_each_attempt_has_the_whole_of_it(self):
        server = self.serve([Reply(delay=1.5), Reply(delay=1.5), chat()])
        self.assertEqual(len(self.client(server, timeout=0.3).generate("q")), 1)
        self.assertEqual(len(server.requests), 3)

    def test_a_kept_connection_has_it_anew(self):
        server = self.serve(replace(chat(), delay=0.25))
        self.assertEqual(len(self.client(server, timeout=0.6, max_concurrency=1, max_retries=0).generate("q", 4)), 4)
        self.assertEqual(server.connections, 1)

    def test_a_kept_connection_ends_with_it(self):
        server = self.serve([chat(), Reply(delay=3)])
        client = self.client(server, max_retries=0)
        client.generate("q")
        with self.assertRaises(APIError) as caught:
            client.generate("again", timeout=0.2)
        self.assertIn("0.2 s", caught.exception.message)
        self.assertEqual(len(server.requests), 2)

    def test_what_comes_late_is_not_taken_for_the_next_reply(self):
        late = threading.Event()
        server = self.serve([replace(chat("late"), wait=late), chat("in time")])
        client = self.client(server, timeout=0.2)
        self.assertEqual(client.generate("q")[0].content, "in time")
        late.set()
        self.assertEqual(client.generate("again", timeout=5)[0].content, "in time")

    def test_the_handshake_counts(self):
        server = self.raw(lambda server, connection: server.over.wait(60))
        begun = time.monotonic()
        error = self.fails(f"https://{server.host}/v1", timeout=0.3)
        self.assertLess(time.monotonic() - begun, 5)
        self.assertIn("0.3 s", error.message)

    def test_an_address_that_does_not_answer_is_not_called_slow_to_reply(self):
        # A private constant: nobody can wait out thirty seconds here.
        with mock.patch.object(rollouts, "_CONNECT_TIMEOUT", 0.2), mock.patch.object(
                socket, "create_connection", side_effect=socket.timeout("timed out")):
            error = self.fails("http://127.0.0.1:9/v1", timeout=500)
        self.assertNotIn("500 s", error.message)


class Size(Wired):
    """A reply is refused as it passes the limit, which is lowered here to what is quick."""

    def setUp(self):
        super().setUp()
        self.assertEqual(rollouts._LONGEST_REPLY, 64 * 2**20)
        self.enter(mock.patch.object(rollouts, "_LONGEST_REPLY", 2**20))

    def test_a_long_one_is_refused_by_its_length(self):
        server = self.raw(says(HEAD + b"Content-Length: %d\r\n\r\n" % (2**20 + 1), then="wait"))
        begun = time.monotonic()
        error = self.fails(server, timeout=60)
        self.assertLess(time.monotonic() - begun, 30)
        self.assertIn("1 MiB", error.message)

    def test_an_endless_one_is_refused_as_it_passes(self):
        block = b" " * 65536
        for name, head, piece in (
            ("chunked", b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n%s\r\n" % block),
            ("until the end", b"\r\n", block),
            ("one endless chunk", b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n", block),
            ("a stream", b"Transfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n",
             b"10000\r\n%s\r\n" % block),
        ):
            with self.subTest(name):
                sent = []

                def serve(server, connection, head=head, piece=piece, sent=sent):
                    read_request(connection)
                    connection.sendall((HEAD if b"event" not in head else b"HTTP/1.1 200 OK\r\n") + head)
                    while len(sent) < 1000:  # 64 MiB, by then
                        connection.sendall(piece)
                        sent.append(len(piece))

                error = self.fails(self.raw(serve), timeout=60)
                self.assertIn("1 MiB", error.message)
                self.assertLess(sum(sent), 32 * 2**20)  # the limit, and what the system holds on the way

    def test_endless_headers_are_refused(self):
        sent = []

        def serve(server, connection):
            read_request(connection)
            connection.sendall(HEAD)
            while len(sent) < 1000:
                connection.sendall(b"X: y\r\n" * 10_000)
                sent.append(60_000)

        self.fails(self.raw(serve), timeout=60)
        self.assertLess(sum(sent), 32 * 2**20)

    def test_an_endless_error_is_refused_as_well(self):
        block = b"%x\r\n%s\r\n" % (65536, b"x" * 65536)
        error = self.fails(self.serve(Reply(500, pieces=[block] * 40)), timeout=60)
        self.assertIn("1 MiB", error.message)

    def test_what_is_within_it_is_taken_every_time(self):
        server = self.serve(chat("x" * (2**20 - 2000)))  # the count is of one reply, not of the connection
        client = self.client(server, max_concurrency=1, max_retries=0)
        self.assertEqual([len(text) for text in client.generate("q", 3).get_texts()], [2**20 - 2000] * 3)
        self.assertEqual(server.connections, 1)


class Proxy:
    """A proxy for CONNECT: what it was asked, and the tunnels it made."""

    def __init__(self, port, answer=b"HTTP/1.1 200 Connection established\r\n\r\n"):
        self.port, self.answer, self.asked = port, answer, []

    def __call__(self, server, connection):
        head, _ = read_request(connection)
        self.asked.append(head.decode())
        connection.sendall(self.answer)
        if b" 200 " in self.answer:
            with socket.create_connection(("127.0.0.1", self.port)) as target:
                back = threading.Thread(target=self.pump, args=(target, connection), daemon=True)
                back.start()
                self.pump(connection, target)
                back.join(10)

    @staticmethod
    def pump(source, sink):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Proxies(Wired):
    def test_http_goes_through_it(self):
        proxy = self.serve()
        with environment(http_proxy=proxy.url[:-3]):
            client = self.client("http://api.invalid/v1", max_concurrency=1)
            self.assertEqual(len(client.generate("q", 3)), 3)
        self.assertEqual({request.path for request in proxy.requests}, {"http://api.invalid/v1/chat/completions"})
        self.assertEqual({request.headers["host"] for request in proxy.requests}, {"api.invalid"})
        self.assertEqual(proxy.connections, 1)

    def test_its_user_and_password(self):
        proxy = self.serve()
        with environment(http_proxy=proxy.url[:-3].replace("//", "//user:word@")):
            self.client("http://api.invalid/v1").generate("q")
        self.assertEqual(proxy.requests[0].headers["proxy-authorization"], "Basic dXNlcjp3b3Jk")

    def test_no_proxy(self):
        server = self.serve()
        with environment(http_proxy="http://127.0.0.1:9", no_proxy="example.org,127.0.0.1"):
            self.client(server, max_retries=0).generate("q")
        self.assertEqual(len(server.requests), 1)

    def test_https_goes_through_a_tunnel(self):
        server = self.serve(tls=True)
        proxy = Proxy(server.server_address[1])
        address = self.raw(proxy).host
        with environment(https_proxy=f"http://user:word@{address}", SSL_CERT_FILE=CERTIFICATE):
            client = self.client(server, max_concurrency=1, max_retries=0, api_key="sk-secret")
            self.assertEqual(len(client.generate("q", 5)), 5)
        self.assertEqual(len(proxy.asked), 1)  # the tunnel is kept
        self.assertTrue(proxy.asked[0].startswith(f"CONNECT localhost:{server.server_address[1]} "))
        self.assertIn("Basic dXNlcjp3b3Jk", proxy.asked[0])
        self.assertNotIn("sk-secret", proxy.asked[0])
        self.assertNotIn("proxy-authorization", server.requests[0].headers)
        self.assertEqual(server.requests[0].headers["authorization"], "Bearer sk-secret")

    def test_a_tunnel_to_an_address_of_ipv6(self):
        for base_url, asked in (("https://[::1]/v1", "[::1]:443"), ("https://[::1]:8443/v1", "[::1]:8443")):
            with self.subTest(base_url):
                proxy = Proxy(0, b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
                with environment(https_proxy=f"http://{self.raw(proxy).host}"):
                    self.fails(base_url)
                self.assertEqual(proxy.asked[0].split("\r\n")[:2], [f"CONNECT {asked} HTTP/1.1", f"Host: {asked}"])

    def test_a_tunnel_refused(self):
        for status, attempts, advice in ((407, 1, "user:password"), (403, 1, ""), (502, 3, ""), (503, 3, "")):
            with self.subTest(status=status):
                proxy = Proxy(0, b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status)
                with environment(https_proxy=f"http://{self.raw(proxy).host}"):
                    error = self.fails("https://api.invalid/v1", max_retries=2)
                self.assertEqual(len(proxy.asked), attempts)
                self.assertIn(str(status), error.message)
                self.assertIn(advice, error.advice)

    def test_a_tunnel_that_never_comes_ends_with_the_deadline(self):
        for pieces in ((), (b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 90)):
            proxy = self.raw(says(*pieces, pause=0.02, then="wait"))
            begun = time.monotonic()
            with environment(https_proxy=f"http://{proxy.host}"):
                error = self.fails("https://api.invalid/v1", timeout=0.3)
            self.assertLess(time.monotonic() - begun, 5)
            self.assertIn("0.3 s", error.message)

    def test_a_proxy_that_cannot_be_used_is_an_api_error(self):
        for address in ("socks5://127.0.0.1:9", "http://127.0.0.1:port", "http://a..b:80"):
            with self.subTest(address), environment(http_proxy=address):
                self.fails("http://api.invalid/v1", timeout=5)


class TLS(Wired):
    def test_certificates_of_the_environment_are_trusted(self):
        server = self.serve(tls=True)
        with environment(SSL_CERT_FILE=CERTIFICATE):
            client = self.client(server, max_concurrency=1, max_retries=0)
            self.assertEqual(len(client.generate("q", 5)), 5)
        self.assertEqual(server.connections, 1)

    @unittest.skipUnless(sys.version_info >= (3, 13), "earlier Pythons accept such certificates")
    def test_a_trusted_certificate_that_lacks_what_is_asked_for_now(self):
        """lenient.pem has no Authority Key Identifier, as those of many companies; authority.pem issued it."""
        folder = os.path.dirname(CERTIFICATE)
        server = self.serve(tls=True)
        server.context.load_cert_chain(os.path.join(folder, "lenient.pem"))
        with environment(SSL_CERT_FILE=os.path.join(folder, "authority.pem")):
            error = self.fails(server.url, max_retries=3)
        self.assertFalse(error.retryable)
        self.assertIn("Authority Key Identifier", error.message)
        self.assertIn("Python 3.13", error.advice)
        self.assertNotIn("SSL_CERT_FILE", error.advice)

    def test_a_kept_connection_that_was_closed_is_replaced(self):
        server = self.serve(tls=True)
        with environment(SSL_CERT_FILE=CERTIFICATE):
            client = self.client(server, max_retries=0)
            client.generate("q")
            server.drop_connections()
            client.generate("again")
        self.assertEqual((len(server.requests), server.connections), (2, 2))

    def test_a_name_that_the_certificate_does_not_have(self):
        server = self.serve(tls=True)
        look_up = socket.getaddrinfo
        with environment(SSL_CERT_FILE=CERTIFICATE), mock.patch.object(
                socket, "getaddrinfo", lambda host, *arguments: look_up("127.0.0.1", *arguments)):
            error = self.fails(server.url.replace("localhost", "api.invalid"), max_retries=3)
        self.assertFalse(error.retryable)
        self.assertIn("certificate", error.advice)
        self.assertEqual(server.requests, [])

    def test_a_server_that_speaks_no_tls(self):
        error = self.fails(self.serve().url.replace("http:", "https:"))
        self.assertIsNone(error.status)


if __name__ == "__main__":
    unittest.main()
