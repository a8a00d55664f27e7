"""Replies of real servers (captures/README.md), each read right: whole, in pieces, and from the cache."""

import base64
import glob
import json
import os
import unittest
from typing import Any, Dict, Iterable, Iterator, List, Tuple

from tests import rollouts
from tests.case import Case
from tests.raw import Raw

FIELDS = ("reasoning", "content", "completed_reasoning", "finish_reason")
CAPTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "captures")


def captures() -> Iterator[Tuple[str, Dict[str, Any]]]:
    for path in sorted(glob.glob(os.path.join(CAPTURES, "*.json"))):
        with open(path, encoding="utf-8") as file:
            yield os.path.basename(path), json.load(file)


def pieces_of(capture: Dict[str, Any], size: int = 0) -> Iterable[bytes]:
    """The reply as it was on the wire; with a *size*, its body chunked into pieces of so many bytes."""
    body = capture["body"]
    data = base64.b64decode(body) if capture.get("encoding") == "base64" else body.encode()
    head = [f"HTTP/1.1 {capture['status']} X"]
    head += [f"{name}: {value}" for name, value in capture["headers"].items()]
    if size:
        head.append("Transfer-Encoding: chunked")
    elif capture["headers"].get("Connection") != "close":  # else the end of the connection ends the body
        head.append(f"Content-Length: {len(data)}")
    yield "\r\n".join([*head, "", ""]).encode()
    if not size:
        yield data
        return
    for start in range(0, len(data), size):
        piece = data[start:start + size]
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def stripped(value: Any, ends: Any) -> Any:
    if not isinstance(value, str) or not ends:
        return value
    return value.strip() if ends is True else value.rstrip() if ends == "end" else value.lstrip()


def differences(capture: Dict[str, Any], found: Dict[str, Any]) -> List[str]:
    """What in *found* (the fields of a response, or those of an error) is not what the capture expects."""
    expected = capture["expected"]
    choices = expected.get("any_of", [expected])
    problems = [list(_differences(choice, capture.get("strip"), found)) for choice in choices]
    return min(problems, key=len)


def _differences(expected: Dict[str, Any], strip: Any, found: Dict[str, Any]) -> Iterator[str]:
    if "error" in expected:
        if "message" not in found:
            yield f"no error, but {found}"
            return
        error = expected["error"]
        for name in ("status", "retryable", "retry_after"):
            if name in error and found[name] not in _allowed(error[name]):
                yield f"{name}: {found[name]!r}, not {error[name]!r}"
        for word in error.get("contains", ()):
            if word not in found["text"]:
                yield f"{word!r} is not in {found['text']!r}"
        for word in error.get("advice", ()):
            if word.lower() not in (found["advice"] or "").lower():
                yield f"{word!r} is not in the advice {found['advice']!r}"
        return
    if "message" in found:
        yield f"an error: {found['text']}"
        return
    for name in FIELDS:
        ends = strip if strip is True or not strip else strip.get(name)
        ends = ends if name in ("reasoning", "content") else None
        value = stripped(found[name], ends)
        allowed = [stripped(choice, ends) for choice in _allowed(expected[name])]
        if value not in allowed:
            yield f"{name}: {value!r}, not {expected[name]!r}"


def _allowed(value: Any) -> List[Any]:
    return value["any_of"] if isinstance(value, dict) else [value]


class Captures(Case):

    settings = {"api_key": "k", "max_retries": 0}

    def ask(self, url: str, capture: Dict[str, Any], cache: str, **overrides: Any) -> Dict[str, Any]:
        """What `generate` makes of it, as plain fields."""
        settings = {**capture["settings"], **overrides}
        named = {"provider": settings.pop("provider")} if "provider" in settings else {}
        client = self.client(url, cache_dir=os.path.join(self.directory, cache), **named)
        try:
            with self.warned():  # a server that base_url alone names costs a warning
                response = client.generate(capture["prompt"], **settings)[0]
        except rollouts.APIError as error:
            return {"status": error.status, "retryable": error.retryable, "retry_after": error.retry_after,
                    "advice": error.advice, "message": error.message, "text": str(error)}
        finally:
            client.close()
        found = {name: getattr(response, name) for name in FIELDS}
        return {**found, "full": response.full, "cached": response.cached}

    def test_all_are_here(self) -> None:
        names = [name for name, _ in captures()]
        self.assertEqual(len(names), 45)
        servers = (
            "vllm", "llamacpp", "llamacpppython", "ollama", "mlx", "litellm", "portkey", "tserve", "gzip",
            "error")
        self.assertEqual({name.split("-")[0].split(".")[0] for name in names}, set(servers))

    def test_each_is_read_right(self) -> None:
        for name, capture in captures():
            with self.subTest(name, why=capture["why"]), Raw(lambda *_: pieces_of(capture)) as server:
                first = self.ask(server.url, capture, name)
                self.assertEqual(differences(capture, first), [])
                if "message" in first:
                    self.assertEqual(server.came, 1)
                    continue
                again = self.ask(server.url, capture, name)
                self.assertEqual(server.came, 1)
                self.assertEqual((again.pop("cached"), first.pop("cached")), (True, False))
                self.assertEqual(again, first)

    def test_bodies_in_single_bytes_are_read_alike(self) -> None:
        for name, capture in captures():
            if "Content-Encoding" in capture["headers"]:
                sizes: Tuple[int, ...] = (7,)
            elif capture["settings"].get("stream"):
                sizes = (1, 7)
            else:
                sizes = (1,)
            for size in sizes:
                with self.subTest(name, size=size), Raw(lambda *_: list(pieces_of(capture, size))) as server:
                    found = self.ask(server.url, capture, f"{name}-{size}")
                    self.assertEqual(differences(capture, found), [])

    def test_what_is_asked_does_not_decide_the_form_that_is_read(self) -> None:
        """A stream that was not asked for, and a whole reply in place of one, are read as they are."""
        for name, capture in captures():
            if capture["settings"].get("prefill"):
                continue  # whether llama-server repeats the text depends on what was asked
            stream = not capture["settings"].get("stream")
            with self.subTest(name, stream=stream), Raw(lambda *_: pieces_of(capture)) as server:
                found = self.ask(server.url, capture, name, stream=stream)
                self.assertEqual(differences(capture, found), [])


if __name__ == "__main__":
    unittest.main()
