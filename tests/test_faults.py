"""Faults that users of such clients reported: what is no whole answer, frames, labels, tags, fields."""

import contextlib
import gzip
import json
import os
import random
import re
import socket
import sqlite3
import threading
import unittest
import zlib

from tests import rollouts
from tests.case import IS_SLOW, Case, Clock
from tests.server import Reply, chat, delta, events

APIError = rollouts.APIError
STREAM = "text/event-stream"
GOOD = {
    "id": "gen-1", "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "2 x 4 = 8"}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}


def body(choice=None, completion_tokens=5, **further):
    """A reply of status 200 with one choice."""
    usage = {"prompt_tokens": 10, "completion_tokens": completion_tokens, "total_tokens": 15}
    return Reply(200, {"choices": [choice] if choice else [], "usage": usage, **further})


def piece(content="", **choice):
    """A chunk of a stream without the key finish_reason, so that [DONE] alone says that all is there."""
    return {"choices": [{"index": 0, "delta": {"content": content} if content else {}, **choice}]}


def usage(**fields):
    return {"choices": [], "usage": {"prompt_tokens": 10, **fields}}


def raw(data, content_type=STREAM, status=200, **headers):
    """A reply of just these bytes."""
    data = data.encode() if isinstance(data, str) else data
    headers = {
        "Content-Type": content_type, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Reply(status, data, headers)


def sse(*chunks, done=True, end="\n"):
    """The text of a stream."""
    lines = [chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}{end}{end}" for chunk in chunks]
    return "".join(lines) + (f"data: [DONE]{end}{end}" if done else "")


class Raw:
    """A server that sends *answer* to each request just as it is, and keeps the bytes of what came."""

    def __init__(self, answer, reset=False):
        self.answer, self.reset, self.bodies = answer, reset, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(10)
                if not self.reset:
                    self.bodies.append(self.read(connection))
                    connection.sendall(self.answer)
                else:  # it answers at once, and closes with unread bytes: that is a reset
                    connection.recv(1000)
                    connection.sendall(self.answer)

    @staticmethod
    def read(connection):
        """The body of a request."""
        data = piece = connection.recv(65536)
        while piece:
            head, end, rest = data.partition(b"\r\n\r\n")
            if end and len(rest) == int(re.search(rb"(?i)content-length: (\d+)", head)[1]):
                return rest
            piece = connection.recv(65536)
            data += piece
        raise ConnectionError

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


class Faults(Case):
    def setUp(self):
        super().setUp()
        self.use_clock(Clock())
        self.calls = 0

    def fresh(self, server, **settings):
        """A client with a cache that nobody has used."""
        self.calls += 1
        return self.client(server, cache_dir=f"{self.directory}/{self.calls}", **settings)

    def is_retried(self, reply, status=..., words="", **settings):
        """Prove that *reply* is no answer: it is asked for again, and nothing of it is kept."""
        whole = chat("whole")
        for stream in (False, True):
            server = self.serve([reply, whole])
            client = self.fresh(server, stream=stream, **settings)
            self.assertEqual(client.generate("q")[0].content, "whole")
            self.assertEqual(client.generate("q")[0].content, "whole")
            self.assertEqual(len(server.requests), 2)
            with self.assertRaises(APIError) as caught:
                self.fresh(self.serve(reply), stream=stream, max_retries=0, **settings).generate("q")
            self.assertTrue(caught.exception.retryable)
            self.assertIn(words, str(caught.exception))
            if status is not ...:
                self.assertEqual(caught.exception.status, status)

    def read(self, reply, prompt="q", streams=(False, True), **settings):
        """The Response that *reply* is, live and from the cache, whether a stream was asked for or not."""
        responses = []
        for stream in streams:
            server = self.serve([reply, Reply(400)])
            client = self.fresh(server, stream=stream, **settings)
            responses += [client.generate(prompt)[0] for _ in range(2)]
            self.assertEqual(len(server.requests), 1)
        self.assertEqual([response.cached for response in responses], [False, True] * len(streams))
        for response in responses:
            others = {
                "cached": 0, "provider": "", "created": 0}  # the port, and the time where the reply has none
            self.assertEqual({**response.to_dict(), **others}, {**responses[0].to_dict(), **others})
        for live, cached in zip(responses[::2], responses[1::2]):
            self.assertEqual({**live.to_dict(), "cached": True}, cached.to_dict())
        return responses[0]


# -- 2. Half answers and empty ones ----------------------------------------------------------------

ENDINGS = ("error", "network_error", "insufficient_system_resource", "abort")


class NotWhole(Faults):
    def test_an_error_in_the_middle_of_a_stream(self):
        begun = piece("The answer is 4")
        for name, last in {
            "llama.cpp": 'error: {"code":500,"message":"m"}\n\n',
            "llama.cpp, indented no more": 'error:{"code":500,"message":"m","type":"server_error"}\n\n',
            "words on such a line": "error: m\n\n",
            "nested on such a line": 'error: {"error": {"message": "m"}}\n\n',
            "DashScope": 'event: error\ndata: {"message":"m"}\n\n',
            "DashScope, in full":
                'id:7\nevent:error\n:HTTP_STATUS/500\ndata:{"code":"InternalError","message":"m"}\n\n',
            "such an event of words": "event: error\ndata: m\n\n",
            "the data before its name": 'data: {"message":"m"}\nevent: error\n\n',
            "CRLF": 'event: error\r\ndata: {"message":"m"}\r\n\r\n',
            "OpenAI": 'data: {"error": {"message": "m", "type": "server_error"}}\n\n',
            "words": 'data: {"error": "m"}\n\n',
            "a list of them": 'data: {"errors": [{"message": "m"}]}\n\n',
            "bare": '{"error": {"message": "m", "code": 500}}\n\n',
            "bare, of words": '{"error": "m"}\n',
            "SGLang": 'data: {"object": "error", "message": "m", "code": 500}\n\n',
            "a code and a message": 'data: {"code": "InternalError", "message": "m", "request_id": "r"}\n\n',
            "a number and a message": 'data: {"code": 500, "message": "m"}\n\n',
            "a message alone": 'data: {"message": "m"}\n\n',
            "FastAPI": 'data: {"detail": "m"}\n\n',
            "a msg alone": 'data: {"msg": "m", "request_id": "r"}\n\n',
            "MiniMax": 'data: {"base_resp": {"status_code": 1000, "status_msg": "m"}}\n\n',
            "z.ai": 'data: {"code": "500", "msg": "m", "success": false}\n\n',
            "in the choice": sse(
                {"choices": [{"delta": {}, "finish_reason": "error", "error": {"message": "m"}}]},
                                 done=False),
        }.items():
            befores = (sse(begun, done=False), sse(begun, piece("", finish_reason="stop"), done=False),
                       sse(delta(content="The answer is 4"), done=False))
            for before in befores if IS_SLOW else befores[:1]:
                with self.subTest(name, before=before):
                    self.is_retried(raw(before + last + "data: [DONE]\n\n"), words="m")
                    self.is_retried(raw(before + last), words="m")

    def test_an_error_alone(self):
        for name, text in {
            "llama.cpp": 'error: {"code":500,"message":"m"}\n\n',
            "DashScope": 'event: error\ndata: {"message":"m"}\n\n',
            "bare": '{"error": {"message": "m"}}',
            "bare, over lines": '{\n  "error": {\n    "message": "m"\n  }\n}\n',
        }.items():
            with self.subTest(name):
                self.is_retried(raw(text), words="m")

    def test_its_status_is_the_one_that_it_names(self):
        for code in (500, 503, "502", 429):
            for text in (f'error: {json.dumps({"code": code, "message": "m"})}\n\n',
                         f'event: error\ndata: {json.dumps({"code": code, "message": "m"})}\n\n'):
                with self.subTest(text):
                    self.is_retried(raw(sse(piece("4"), text)), status=int(code), words="m")
        for text in ('error: {"message":"m"}\n\n', 'event: error\ndata: {"code": "X", "message":"m"}\n\n'):
            with self.subTest(text):
                self.is_retried(raw(sse(piece("4"), text)), status=502, words="m")

    def test_reasons_to_finish(self):
        for reason in ENDINGS:
            with self.subTest(reason):
                self.is_retried(body({"message": {"content": "The answer is"}, "finish_reason": reason}))
                self.is_retried(events(delta(content="The answer is"), delta(reason)))
                self.is_retried(events(piece("The answer is"), piece("", finish_reason=reason), usage()))
                self.is_retried(
                    body({"text": "The answer is", "finish_reason": reason}), endpoint="completions")
                self.is_retried(
                    body({"message": {"reasoning": "Hm", "content": ""}, "finish_reason": reason}))

    def test_other_reasons_are_kept(self):
        for reason in ("stop", "length", "content_filter", "eos", "end_turn", "tool_calls", "sensitive"):
            with self.subTest(reason):
                self.assertEqual(
                    self.read(body({"message": {"content": "fine"}, "finish_reason": reason})).finish_reason,
                    reason)
                self.assertEqual(self.read(events(delta(content="fine"), delta(reason))).content, "fine")

    def test_empty_answers_that_cost_nothing(self):
        for name, reply in {
            "Gemini": body({"message": {"content": ""}, "finish_reason": "stop"}, 0),
            "null": body({"message": {"content": None}, "finish_reason": "stop"}, 0),
            "no field": body({"message": {"role": "assistant"}, "finish_reason": "stop"}, 0),
            "no parts": body({"message": {"content": []}, "finish_reason": "stop"}, 0),
            "an empty part": body(
                {"message": {"content": [{"type": "text", "text": ""}]}, "finish_reason": "stop"}, 0),
            "an empty thought": body(
                {"message": {"content": "", "reasoning": ""}, "finish_reason": "stop"}, 0),
            "a number in words": body({"message": {"content": ""}, "finish_reason": "stop"}, "0"),
            "streamed": events(
                delta(role="assistant", content=""), delta("stop"), usage(completion_tokens=0)),
            "streamed, with the reason": events({**delta("stop"), "usage": {"completion_tokens": 0}}),
            "Moonshot": events(
                {"choices": [{"delta": {}, "finish_reason": "stop", "usage": {"completion_tokens": 0}}]}),
        }.items():
            with self.subTest(name):
                self.is_retried(reply)
        self.is_retried(body({"text": "", "finish_reason": "stop"}, 0), endpoint="completions")

    def test_empty_answers_that_cost_something(self):
        for name, reply in {
            "an answer": body({"message": {"content": ""}, "finish_reason": "stop"}, 5),
            "cut off": body({"message": {"content": ""}, "finish_reason": "length"}, 1),
            "streamed": events(delta(content=""), delta("stop"), usage(completion_tokens=1)),
        }.items():
            with self.subTest(name):
                self.assertEqual(self.read(reply).content, "")
        thought = body({"message": {"content": "", "reasoning": "Hm"}, "finish_reason": "stop"}, 0)
        self.assertEqual(self.read(thought).reasoning, "Hm")

    def test_streams_without_an_end(self):
        null = {"choices": [{"index": 0, "delta": {"content": "The answer"}, "finish_reason": None}]}
        for name, reply in {
            "nothing said, no end": events(piece("The answer"), done=False),
            "null, no end": events(null, done=False),
            "null, and an end": events(null, null),
            "null once, and an end": events(piece("The"), null, piece(" is")),
            "null and usage, and an end": events(null, usage(completion_tokens=3)),
            "breaks off": events(piece("The answer"), done=False, hang_up="early"),
            "nothing but the end": events(),
            "a thought and the end": events(
                {"choices": [{"delta": {"reasoning": "Hm"}, "finish_reason": None}]}),
        }.items():
            with self.subTest(name):
                self.is_retried(reply)
        for name, reply in {
            "no reason at all, and an end": events(piece("2 x 4 "), piece("= 8")),
            "the same with usage": events(piece("2 x 4 "), piece("= 8"), usage(completion_tokens=3)),
            "null, then a reason": events(delta(content="2 x 4 = 8"), delta("stop")),
            "null, then a reason, no end": events(delta(content="2 x 4 = 8"), delta("length"), done=False),
            "a reason, then null": events(piece("2 x 4 = 8", finish_reason="stop"), delta()),
        }.items():
            with self.subTest(name):
                self.assertEqual(self.read(reply).content, "2 x 4 = 8")

    def test_no_reason_in_a_body(self):
        self.assertEqual(self.read(body({"message": {"content": "fine"}})).content, "fine")
        self.assertEqual(self.read(body({"text": "fine"}), endpoint="completions").content, "fine")

    def test_what_stands_in_place_of_a_delta(self):
        for name, chunks in {
            "message": [{"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}],
            "message, piece by piece": [{"choices": [{"message": {"content": "fi"}}]},
                                        {
                                            "choices": [
                                                {"message": {"content": "ne"}, "finish_reason": "stop"}]}],
            "text": [{"choices": [{"text": "fine", "finish_reason": "stop"}]}],
            "text, piece by piece": [{"choices": [{"text": "fi"}]}, {"choices": [{"text": "ne"}]},
                                     {"choices": [{"text": "", "finish_reason": "stop"}]}],
            "message beside a null delta": [
                {"choices": [{"delta": None, "message": {"content": "fine"}, "finish_reason": "stop"}]}],
            "a whole completion as the one event": [
                {"object": "chat.completion",
                    "choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}],
        }.items():
            for done in (True, False):
                with self.subTest(name, done=done):
                    self.assertEqual(self.read(events(*chunks, done=done)).content, "fine")
        reply = events(
            {"choices": [{"message": {"reasoning": "Hm", "content": "fine"}, "finish_reason": "stop"}]})
        self.assertEqual(self.read(reply).reasoning, "Hm")

    def test_fields_of_good_replies_that_look_like_errors(self):
        for further in ({"base_resp": {"status_code": 0, "status_msg": ""}}, {"error": None}, {"errors": []},
                        {"code": 200, "msg": "success", "success": True}, {"message": "ok"}, {"error": {}},
                        {"code": 0, "message": ""}, {"detail": None}):
            with self.subTest(further):
                self.assertEqual(self.read(Reply(200, {**GOOD, **further})).content, "2 x 4 = 8")
                self.assertEqual(
                    self.read(events({**piece("fine", finish_reason="stop"), **further})).content, "fine")

    def test_entries_of_the_cache_are_judged_alike(self):
        """What an earlier version kept, or another program wrote."""
        for kind in ("json", "sql"):
            for old, new in [('"stop"', f'"{reason}"') for reason in ENDINGS] + [('"fine"', '""')]:
                with self.subTest(kind, new=new):
                    server = self.serve(
                        [chat("fine", usage={"prompt_tokens": 1, "completion_tokens": 0}), chat("whole")])
                    client = self.fresh(server, use_cache=kind)
                    client.generate("q")
                    self.assertTrue(self.edit(client.cache_dir, old, new))
                    for use in (kind, kind):
                        again = self.client(server, cache_dir=client.cache_dir, use_cache=use)
                        with self.warned():
                            self.assertEqual(again.generate("q")[0].content, "whole")
                    self.assertEqual(len(server.requests), 2)

    def edit(self, cache_dir, old, new):
        """Put *new* in place of *old* in all that is stored below *cache_dir*; say how often."""
        count = 0
        for folder, _, names in os.walk(cache_dir):
            for path in (os.path.join(folder, name) for name in names):
                if path.endswith(".json"):
                    with open(path, encoding="utf-8") as file:
                        text = file.read()
                    count += text.count(old)
                    with open(path, "w", encoding="utf-8") as file:
                        file.write(text.replace(old, new))
                elif path.endswith(".sqlite3"):
                    count += self.edit_rows(path, old, new)
        return count

    def edit_rows(self, path, old, new):
        count, database = 0, sqlite3.connect(path)
        with database:
            tables = [
                name for name, in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for table in tables:
                for _, column, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
                    kind, text = f"typeof({column})", f"CAST({column} AS TEXT)"
                    changed = database.execute(
                        f"UPDATE {table} SET {column} = CASE {kind} WHEN 'blob'"
                        f" THEN CAST(replace({text}, :old, :new) AS BLOB) ELSE replace({text}, :old, :new) END"
                        f" WHERE {kind} IN ('text', 'blob') AND instr({text}, :old)", {"old": old, "new": new})
                    count += changed.rowcount
        database.close()
        return count


# -- 5. Frames and labels --------------------------------------------------------------------------

CHUNKS = (
    piece("2 x 4 "), piece("= 8"), piece("", finish_reason="stop"), {"choices": [], "usage": GOOD["usage"]})


class Frames(Faults):
    def is_good(self, reply):
        response = self.read(reply)
        self.assertEqual((response.content, response.finish_reason, response.usage.total_tokens),
            ("2 x 4 = 8", "stop", 15))

    def test_heartbeats(self):
        for beat in (
            "data:\n\n", "data: \n\n", "data\n\n", "event: ping\ndata:\n\n", "event: ping\ndata: {}\n\n",
                     "event: ping\n\n", 'event: ping\ndata: {"type": "ping"}\n\n', ":\n\n",
                     ": OPENROUTER PROCESSING\n\n",
                     "\n", "id: 7\n\n", "retry: 1000\n\n", "data: null\n\n", "data:\ndata:\n\n",
                     "event: heartbeat\ndata: \n\n"):
            with self.subTest(beat):
                text = beat + beat.join(
                    sse(chunk, done=False) for chunk in CHUNKS) + beat + "data: [DONE]\n\n" + beat
                self.is_good(raw(text))
                self.is_good(raw(text.replace("\n", "\r\n")))

    def test_labels(self):
        for label in (
            STREAM, "Text/Event-Stream", "TEXT/EVENT-STREAM; charset=utf-8", "application/json", "text/plain",
                      "application/json; charset=utf-8", "application/octet-stream", "application/x-ndjson",
                      "", "x",
                      "text/html"):
            with self.subTest(label):
                self.is_good(raw(json.dumps(GOOD), label))
                self.is_good(raw(json.dumps(GOOD, indent=2), label))
                self.is_good(raw("\n   \n\n" + json.dumps(GOOD) + "\n", label))
                self.is_good(raw(sse(*CHUNKS), label))
                self.is_good(raw(": PROCESSING\n\n" + sse(*CHUNKS), label))

    def test_no_label_at_all(self):
        for text in (json.dumps(GOOD), sse(*CHUNKS)):
            with self.subTest(text[:20]), Raw(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + text.encode()) as server:
                self.assertEqual(self.fresh(server).generate("q")[0].content, "2 x 4 = 8")

    def test_any_good_status(self):
        for status in (200, 201, 202, 203, 206, 226, 299):
            with self.subTest(status=status):
                self.is_good(raw(json.dumps(GOOD), "application/json", status))
                self.is_good(raw(sse(*CHUNKS), STREAM, status))

    def test_packed(self):
        def deflated(data):
            packer = zlib.compressobj(wbits=-15)
            return packer.compress(data) + packer.flush()

        for text, label in ((json.dumps(GOOD), "application/json"), (sse(*CHUNKS), STREAM)):
            data = text.encode()
            for encoding, packed in (
                ("gzip", gzip.compress(data)), ("GZip", gzip.compress(data)), ("x-gzip", gzip.compress(data)),
                ("deflate", zlib.compress(data)), ("deflate", deflated(data)), ("identity", data), ("", data),
                ("gzip", data), ("deflate", data),  # in name only
                ("gzip", gzip.compress(data[:9]) + gzip.compress(data[9:])),  # two members
            ):
                with self.subTest(label, encoding=encoding, packed=packed[:9]):
                    self.is_good(raw(packed, label, Content_Encoding=encoding))
                    headers = {"Content-Type": label, "Content-Encoding": encoding}
                    self.is_good(Reply(200, headers=headers, pieces=[packed[:5], packed[5:40], packed[40:]]))

    def test_packed_and_broken(self):
        data = gzip.compress(json.dumps(GOOD).encode())
        for name, packed in {"cut off": data[:-20], "damaged": data[:30] + b"\0" * 10 + data[40:],
                             "nothing": gzip.compress(b"")}.items():
            with self.subTest(name):
                self.is_retried(raw(packed, "application/json", Content_Encoding="gzip"))

    def test_a_packed_reply_has_a_size_too(self):
        packer = gzip.compress(b" " * (65 << 20) + json.dumps(GOOD).encode(), 1)
        with self.assertRaises(APIError):
            self.fresh(self.serve(raw(packer, Content_Encoding="gzip")), max_retries=0).generate("q")

    def test_packed_errors_keep_their_words(self):
        packed = gzip.compress(b'{"error": {"message": "no such thing"}}')
        with self.assertRaisesRegex(APIError, "no such thing"):
            self.fresh(self.serve(raw(packed, "application/json", 400, Content_Encoding="gzip"))).generate(
                "q")

    def test_ends_of_lines(self):
        for name, end in {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}.items():
            with self.subTest(name):
                self.is_good(raw(sse(*CHUNKS, end=end)))
                self.is_good(raw("\ufeff" + sse(*CHUNKS, end=end)))
                self.is_good(raw(sse("event: message" + end, *CHUNKS, end=end)))
                cut = sse(*CHUNKS, end=end).encode()
                self.is_good(
                    Reply(200, headers={"Content-Type": STREAM},
                        pieces=[cut[i:i + 1] for i in range(len(cut))]))
        mixed = "".join(
            sse(chunk, done=False, end=end) for chunk, end in zip(CHUNKS, ("\r\n", "\n", "\r", "\n")))
        self.is_good(raw(mixed + "data: [DONE]\r\n\r\n"))
        self.is_good(raw(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "application/json"))

    def test_ends_of_streams(self):
        text = sse(*CHUNKS)
        for name, data in {
            "one newline": text[:-1], "none": text[:-2], "no space": text.replace("data: ", "data:"),
            "a space after it": text.replace("[DONE]", "[DONE] "),
            "no [DONE]": text.replace("data: [DONE]\n\n", ""),
            "words after it": text + "data: {oops\n\n",
        }.items():
            with self.subTest(name):
                self.is_good(raw(data))

    def test_the_usage_within_the_choice(self):
        for chunk in (piece("", finish_reason="stop", usage=GOOD["usage"]),
                      {"choices": [{"delta": {}, "finish_reason": "stop", "usage": GOOD["usage"]}],
                          "usage": None},
                      {"choices": [{"delta": {}, "finish_reason": "stop", "usage": GOOD["usage"]}],
                          "usage": {}}):
            with self.subTest(chunk):
                self.is_good(events(piece("2 x 4 = 8"), chunk))

    def test_errors_under_a_wrong_label(self):
        error = {"error": {"message": "no such thing", "code": 400}}
        for name, text in {
            "bare": json.dumps(error), "indented": json.dumps(error, indent=2), "an event": sse(error),
                           "an event alone": sse(error, done=False),
                           "after a BOM": "\ufeff" + json.dumps(error),
                           "an event of that name": f"event: error\ndata: {json.dumps(error['error'])}\n\n",
                           "after heartbeats": ": ping\n\ndata:\n\n" + sse(error)}.items():
            for label in (STREAM, "application/json", ""):
                for status in (200, 400):
                    with self.subTest(name, label=label, status=status), self.assertRaises(
                            APIError) as caught:
                        self.fresh(self.serve(raw(text, label, status))).generate("q")
                    error_ = caught.exception
                    self.assertEqual(
                        (error_.status, error_.message, error_.retryable), (400, "no such thing", False))

    def test_an_error_page_that_a_reset_cuts_off(self):
        head = "HTTP/1.1 {} No\r\nContent-Type: application/json\r\nRetry-After: 20\r\n\r\n"
        for status in (401, 407, 413, 429, 503):
            with self.subTest(status=status):
                answer = head.format(status) + '{"error": {"message": "no such thing"}}'
                with Raw(answer.encode(), reset=True) as server, self.assertRaises(APIError) as caught:
                    self.fresh(server, max_retries=0).generate("q" * 200_000)
                self.assertEqual(caught.exception.status, status)
                self.assertIn("no such thing", caught.exception.message)
                self.assertEqual(caught.exception.retry_after, 20)


# -- 6. Tags ---------------------------------------------------------------------------------------

class Tags(Faults):
    def rows(self):
        """(message, reasoning, content)"""
        for text in (
            "Use `re.sub(r'<think>.*?</think>', '', t)`",
            "It is closed by `</think>`, as in `text.split('</think>')[-1]`.",
            "The tag </think> closes a thought.",
            "Sure, <think>a</think> b",
            "Code:\n\n```\nt = '<think>x</think>'\n```",
            "First <think> opens, then </think> closes.",
            "| <think> | </think> |",
        ):
            yield text, {"content": text}, None, text
            yield "a field and " + text, {"content": text, "reasoning": "Twice four."}, "Twice four.", text
            yield "the old field and " + text, {
                "content": text, "reasoning_content": "Twice."}, "Twice.", text
        for name in ("reasoning", "reasoning_content"):
            yield name + ", a tag", {name: "Twice four.", "content": "</think>\n\n4"}, "Twice four.", "4"
            yield name + ", a tag after a space", {
                name: "Twice four.", "content": "\n</think>4"}, "Twice four.", "4"
            yield (
                name + ", a block", {name: "Twice four.", "content": "<think>\nTwice four.\n</think>\n\n4"},
                   "Twice four.", "4")
            yield (name + ", an empty block", {name: "Twice four.", "content": "<think>\n\n</think>\n\n4"},
                   "Twice four.", "4")
            yield (name + ", a block, then a word of tags",
                   {name: "Twice.", "content": "<think>Twice.</think>A tag: </think>, or <think>a</think>"},
                   "Twice.", "A tag: </think>, or <think>a</think>")
        yield "a block", {"content": "<think>\nTwice four.\n</think>\n\n4"}, "Twice four.", "4"
        yield "a block after space", {"content": " \n\n<think>Twice four.</think>4"}, "Twice four.", "4"
        yield ("a block, then words of tags", {"content": "<think>Twice.</think>Use '<think>.*?</think>'"},
               "Twice.", "Use '<think>.*?</think>'")
        yield "an orphan", {"content": "Twice four.\n</think>\n\n4"}, "Twice four.", "4"
        yield "a field of white space", {
            "reasoning_content": "\n", "reasoning": "Twice.", "content": "4"}, "Twice.", "4"
        yield "the other", {"reasoning_content": "Twice.", "reasoning": "\n\n", "content": "4"}, "Twice.", "4"
        yield "a field that is empty", {
            "reasoning_content": "", "reasoning": "Twice.", "content": "4"}, "Twice.", "4"
        yield "a null field", {
            "reasoning_content": None, "reasoning": "Twice.", "content": "4"}, "Twice.", "4"
        text = {"type": "text", "text": "4"}
        for part in (
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Twice."}]},
            {"type": "reasoning", "summary": "Twice."},
            {"type": "reasoning", "text": "Twice."},
            {"type": "reasoning", "summary": [], "text": "Twice."},
            {"type": "reasoning", "text": [{"type": "text", "text": "Twice."}]},
            {"type": "thinking", "thinking": "Twice."},
            {"type": "thinking", "thinking": [{"type": "text", "text": "Twice."}]},
        ):
            yield str(part), {"content": [part, text]}, "Twice.", "4"
        yield (
            "two of them", {
                "content": [{"type": "reasoning", "text": "Twice"}, {"type": "reasoning", "text": " four."},
                                           text]}, "Twice four.", "4")

    def test_questions(self):
        for name, message, reasoning, content in self.rows():
            with self.subTest(name):
                response = self.read(body({"message": message, "finish_reason": "stop"}))
                self.assertEqual((response.reasoning, response.content), (reasoning, content))
                response = self.read(events(delta(**message), delta("stop")))
                self.assertEqual((response.reasoning, response.content), (reasoning, content))

    def test_cut_into_letters(self):
        for name, message, reasoning, content in self.rows():
            if isinstance(message["content"], str):
                with self.subTest(name):
                    fields = [(key, letter) for key in sorted(message, reverse=True)
                        for letter in message[key] or ""]
                    response = self.read(
                        events(*(delta(**{key: letter}) for key, letter in fields), delta("stop")))
                    self.assertEqual((response.reasoning, response.content), (reasoning, content))

    def test_a_preamble(self):
        for preamble in ("Sure.\n", "Here is my thought:\n\n", "**Thinking**\r\n"):
            with self.subTest(preamble):
                reply = body({"message": {"content": preamble + "<think>\nTwice.\n</think>\n\n4"}})
                response = self.read(reply)
                self.assertEqual(response.reasoning, "Twice.")
                self.assertTrue(response.content.endswith("4"))
                self.assertNotIn("think>", response.content)

    def test_an_orphan_before_the_answer(self):
        for content in ("</think>\n\n4", "\n</think>\n\n4", "</think>4"):
            with self.subTest(content):
                response = self.read(body({"message": {"content": content}}))
                self.assertFalse((response.reasoning or "").strip())
                self.assertEqual(response.content, "4")

    def test_the_first_space_of_a_thought_that_an_untagged_text_began(self):
        """vLLM: the model closes a thought that the user's text began; the server splits it, or does not."""
        prompt = [{"role": "user", "content": "2 x 4?"},
            {"role": "assistant", "content": "The user wants 2 x 4. 2 x 4 ="}]
        for message in (
            {"reasoning": " 8.\n", "content": "\n\nIt is 8."},
            {"reasoning_content": " 8.", "content": "It is 8."},
            {"content": " 8.\n</think>\n\nIt is 8."},
            {"content": " 8.\n</think>\nIt is 8.", "reasoning": None},
            {"content": [{"type": "reasoning", "text": " 8."}, {"type": "text", "text": "It is 8."}]},
        ):
            with self.subTest(message):
                for reply in (body({"message": message}), events(delta(**message), delta("stop"))):
                    response = self.read(reply, prompt)
                    self.assertEqual((response.reasoning, response.content), (" 8.", "It is 8."))

    def test_the_first_space_of_a_continuation(self):
        question = {"role": "user", "content": "Count"}
        for injected in ("1, 2,", "The answer is", "Let us see:\nfirst"):
            prompt = [question, {"role": "assistant", "content": injected}]
            for content in (" 8.", "\n\n8.", "  8.", "8."):
                with self.subTest(injected, content=content):
                    for message in ({"content": content}, {"content": content, "reasoning": None},
                                    {"content": content, "reasoning": ""},
                                    {"content": [{"type": "text", "text": content}]}):
                        self.assertEqual(self.read(body({"message": message}), prompt).content, content)
                        self.assertEqual(
                            self.read(events(delta(**message), delta("stop")), prompt).content, content)
                    echo = body({"message": {"content": injected + content}})
                    self.assertEqual(self.read(echo, prompt, provider="llamacpp").content, content)


# -- 7. Fields that cannot be left out -------------------------------------------------------------

class Fields(Faults):
    def sent(self, prompt="q", model="m", **settings):
        """The body of a request as a list of its fields, so that one that stands there twice is seen."""
        answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + json.dumps(GOOD).encode()
        with Raw(answer) as server, self.client(server, model, use_cache=False, **settings) as client:
            client.generate(prompt)
            (data,) = server.bodies
        pairs = json.loads(data, object_pairs_hook=list)
        self.assertEqual(len({name for name, _ in pairs}), len(pairs), pairs)
        return dict(json.loads(data))

    def test_none_is_not_sent(self):
        for stream in (None, True, False):
            with self.subTest(stream=stream):
                fields = self.sent(
                    seed=None, stream_options=None, temperature=None, top_p=None, max_tokens=None, stop=None,
                    stream=stream)
                self.assertEqual(set(fields) - {"stream"}, {"model", "messages"})
        for provider in ("gemini", "mistral", "openrouter", "fireworks", "vllm", "deepseek"):
            with self.subTest(provider):
                fields = self.sent(
                    provider=provider, api_key="k", seed=None, stream_options=None, stream=True,
                                   model="some-model")
                self.assertFalse({"seed", "random_seed", "stream_options"} & set(fields))

    def test_a_call_may_say_so_too(self):
        server = self.serve(chat())
        client = self.client(server, stream=True)
        client.generate("q", seed=None, stream_options=None, temperature=None)
        client.generate("q", 2, seed=5, temperature=None)
        self.assertFalse({"seed", "stream_options", "temperature"} & set(server.requests[0].body))
        self.assertEqual(sorted(request.body["seed"] for request in server.requests[1:]), [5, 6])

    def test_samples_without_a_seed_are_numbered_all_the_same(self):
        for kind in ("json", "sql"):
            with self.subTest(kind):
                server = self.serve(chat())
                client = self.fresh(server, use_cache=kind, seed=None)
                self.assertEqual([response.seed for response in client.generate("q", 3)], [0, 1, 2])
                self.assertEqual(
                    [response.cached for response in client.generate("q", 5)], [True] * 3 + [False] * 2)
                self.assertEqual(len(server.requests), 5)
                self.assertFalse(any("seed" in request.body for request in server.requests))

    def test_a_field_of_the_users_stands_once(self):
        for options in ({"include_usage": False}, {"include_usage": True, "chunk_size": 9}, {}):
            for settings in ({"stream_options": options}, {"extra": {"stream_options": options}}):
                with self.subTest(settings):
                    self.assertEqual(self.sent(stream=True, **settings)["stream_options"], options)
        self.assertEqual(self.sent(
            provider="mistral", extra={"random_seed": 7}, api_key="k", seed=None).get("random_seed"), 7)
        self.assertEqual(self.sent(extra={"continue_final_message": False}, provider="vllm",
                                   prompt="q\n<think>\na").get("continue_final_message"), False)

    def test_a_stream_still_asks_for_its_usage(self):
        self.assertEqual(self.sent(stream=True)["stream_options"], {"include_usage": True})
        self.assertNotIn("stream_options", self.sent(stream=False))

    def test_claude_takes_one_of_two(self):
        for model in (
                "claude-opus-4-1", "claude-opus-4-1-20250805", "claude-sonnet-4-5",
                "claude-haiku-4-5-20251001"):
            with self.subTest(model):
                fields = self.sent(model=model, provider="anthropic", api_key="k")
                self.assertEqual(len({"temperature", "top_p"} & set(fields)), 1)
                fields = self.sent(
                    model=model, provider="anthropic", api_key="k", temperature=None, top_p=0.5)
                self.assertEqual((fields.get("top_p"), "temperature" in fields), (0.5, False))
                fields = self.sent(model=model, provider="anthropic", api_key="k", temperature=0.2)
                self.assertEqual((fields.get("temperature"), "top_p" in fields), (0.2, False))


# -- Any bytes at all ------------------------------------------------------------------------------

class AnyBytes(Faults):
    """Streams of any text, cut at any byte, broken anywhere: a Response or an APIError."""

    LETTERS = (
        "a", " ", "8", "é", "數", "😀", "\ud83d", "\ude00", "\u2028", "\x85", "\n", "\r", "\0", '"',
        "\\", "<think>",
               "</think>", "data:", "[DONE]", ": ", "\ufeff", "\u200d", "e\u0301")

    def stream(self, chance):
        """(bytes, the text that they say where nothing is broken)"""
        end = chance.choice(("\n", "\r\n", "\r"))
        parts = ["x"] + [chance.choice(self.LETTERS) for _ in range(chance.randint(0, 30))]
        text = "\ufeff" if chance.random() < 0.2 else ""
        for part in parts:
            if chance.random() < 0.3:
                text += chance.choice(
                    (f": c{end}{end}", f"data:{end}{end}", end, f"event: ping{end}{end}", f"id: 1{end}"))
            chunk = {"choices": [{"delta": {"content": part}, "finish_reason": None}]}
            plain = chance.random() < 0.5 and not any("\ud800" <= letter < "\ue000" for letter in part)
            written = json.dumps(chunk, ensure_ascii=not plain, indent=chance.choice((None, 1)))
            lines = written.split("\n")
            text += "".join(f"data:{chance.choice(('', ' '))}{line}{end}" for line in lines) + end
        text += f"data: {json.dumps(delta('stop'))}{end}{end}" + f"data: [DONE]{end}{end}" * chance.randint(
            0, 1)
        joined = "".join(parts).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return text.encode("utf-8"), joined

    def broken(self, chance, data):
        """*data*, damaged."""
        at = chance.randrange(len(data))
        return chance.choice((
            data[:at], data[:at] + data[at + chance.randint(1, 9):],
            data[:at] + bytes([chance.randrange(256)]) + data[at:],
            data[:at] + b"\n\n" + data[at:], data[:at] + b"error: m\n\n" + data[at:], data + data[:at],
            data[:at] + b'\n\ndata: {"error": {"message": "m", "code": 503}}\n\n' + data[at:],
            data[:at] + b"\n\ndata: " + b"[" * 5000 + b"\n\n" + data[at:],
            b"", data[at:], data.replace(b'"delta"', b'"delta": 5, "x"'),
            data.replace(b"choices", b"choises")))

    def test_it(self):
        chance = random.Random(2026)
        rows = {}
        for seed in range(400):
            data, text = self.stream(chance)
            if seed % 2:
                data, text = self.broken(chance, data), None
            cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 1, 5, 50))))
            pieces = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)])]
            rows[seed] = [piece for piece in pieces if piece], text
        label = chance.choice((STREAM, "application/json"))
        server = self.serve(lambda request: Reply(
            200, headers={"Content-Type": label}, pieces=rows[request.seed][0],
            hang_up="early" if request.seed % 10 == 1 else ""))
        for kind in ("json", "sql"):
            with self.subTest(kind):
                client = self.fresh(server, use_cache=kind, stream=True, max_retries=0, max_concurrency=8)
                with self.warned():
                    live = client.generate("q", 400)
                again = self.client(server, use_cache=kind, cache_dir=client.cache_dir, stream=True)
                with self.warned():
                    cached = again.generate("q", 400, offline=True)
                self.assertEqual([response.seed for response in cached], [response.seed for response in live])
                self.assertEqual([{**response.to_dict(), "cached": 0} for response in cached],
                                 [{**response.to_dict(), "cached": 0} for response in live])
                self.assertEqual(len(live) + len(live.errors), 400)
                for error in live.errors:
                    self.assertIsInstance(error, APIError)
                    self.assertTrue(error.message)
                found = {response.seed: response for response in live}
                for seed in range(0, 400, 2):  # nothing is broken there
                    with self.subTest(seed=seed):
                        self.assertIn(seed, found)
                        text = rows[seed][1]
                        if "think>" not in text:
                            self.assertEqual(found[seed].content, text)


if __name__ == "__main__":
    unittest.main()
