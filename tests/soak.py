"""A night's work in a minute: python -m tests.soak [samples]

Two processes draw the same samples through one cache, from a server that answers with a seeded mixture of
every failure that may pass; one of them is killed and started again, several times. Done for both caches. It
prints the figures, and its exit code is 1 where a sample is missing, wrong, or was asked for without need.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter

from tests import rollouts
from tests.server import Reply, Server, chat, delta, events

PROMPTS = 15
WIDTH = 24  # requests that a process has under way
KILLS = 5
TIMEOUT = 5.0  # seconds for an attempt
GRACE = 5.0  # seconds within which a process surely has stored what it was sent


class FastClock:
    """The workers' clock: their backoffs and rate limits pass a hundred times as fast."""

    random = staticmethod(random.random)

    @staticmethod
    def now():
        return time.monotonic() * 100

    @staticmethod
    def sleep(seconds, is_cancelled):
        end = time.monotonic() + seconds / 100
        while time.monotonic() < end and not is_cancelled():
            time.sleep(0.001)


def draw(worker, url, cache_dir, use_cache, seeds):
    """Draw everything; return how many samples are missing or wrong."""
    prompts = [f"question {number}" for number in range(PROMPTS)]
    with rollouts.RolloutsClient(
            "soak", base_url=url, api_key=worker, cache_dir=cache_dir, use_cache=use_cache, max_concurrency=WIDTH,
            max_retries=200, timeout=TIMEOUT, progress_bar=False) as client:
        results = client.generate_many(prompts[::-1] if worker == "steady" else prompts, seeds)
    return sum(
        (response.seed, response.content) != (seed, f"{result.prompt}, sample {seed}")
        for result in results for seed, response in enumerate(result)) + sum(seeds - len(result) for result in results)


# What the server answers: how often, and what.
GOOD = {
    "good": (40, lambda text: chat(text)),
    "good, streamed": (10, lambda text: events(
        delta(content=text[:5]), ": wait\n\n", delta(content=text[5:]), delta("stop"))),
    "good, trickled": (3, lambda text: Reply(
        pieces=[b" "] * 5 + [json.dumps(chat(text).body).encode()], pause=0.02)),
}
BAD = {
    **{f"status {status}": (2, lambda _, status=status: Reply(status, {"error": {"message": "not now"}}))
       for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)},
    "Retry-After": (1, lambda _: Reply(429, b"slow down", {"Retry-After": "2"})),
    "retry-after-ms": (1, lambda _: Reply(503, b"", {"retry-after-ms": "700"})),
    "an error in a 200": (2, lambda _: Reply(body={"error": {"code": 503, "message": "overloaded"}})),
    "finish_reason error": (2, lambda text: chat(text, "error")),
    "no choices": (2, lambda _: Reply(body={"choices": []})),
    "an empty body": (2, lambda _: Reply()),
    "broken JSON": (2, lambda _: Reply(body=b'{"choices": [{"mess')),
    "an HTML page": (2, lambda _: Reply(body=b"<html>Bad gateway</html>")),
    "hung up at once": (2, lambda _: Reply(hang_up="at once")),
    "hung up early": (2, lambda text: Reply(**{**vars(chat(text)), "hang_up": "early"})),
    "a stream that breaks off": (2, lambda text: events(delta(content=text[:9]), done=False, hang_up="early")),
    "a stream without its end": (2, lambda text: events(delta(content=text[:9]), done=False)),
    "a stream with an error": (2, lambda text: events(
        delta(content=text[:9]), {"error": {"code": 502, "message": "lost"}})),
    "silence": (0.3, lambda text: Reply(**{**vars(chat(text)), "delay": TIMEOUT + 1})),
}
KINDS = {**GOOD, **BAD}


class Ledger:
    """The server's script. It knows who asked for which sample when, and who was sent it."""

    def __init__(self):
        self.lock = threading.Lock()  # protects all the rest
        self.chance = random.Random(2506)
        self.counts = Counter()
        self.asked = {}  # (worker, sample) -> when first
        self.sent = {}  # sample -> [(worker, when)]
        self.killed = {}  # worker -> when
        self.needless = []
        self.lost = {}  # worker -> the samples asked for again that it was sent, and killed with

    def __call__(self, request):
        worker = request.headers["authorization"].split()[-1]
        text = f"{request.body['messages'][0]['content']}, sample {request.seed}"
        with self.lock:
            kind = self.chance.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
            self.counts[kind] += 1
            first = self.asked.setdefault((worker, text), request.at)
            sent = self.sent.setdefault(text, [])
            for other, when in sent:
                end = self.killed.get(other, float("inf"))
                if other == worker or (first > when + GRACE and end > when + GRACE):
                    self.needless.append(f"{text}: {worker} asked for what {other} was sent")
                elif first == request.at > end:
                    self.lost.setdefault(other, set()).add(text)
            if kind in GOOD:
                sent.append((worker, request.at))
        return KINDS[kind][1](text)


def soak(use_cache, seeds):
    """Run it on one kind of cache: print the figures, and return what is wrong."""
    ledger, begun, samples = Ledger(), time.monotonic(), PROMPTS * seeds

    def start(worker):
        return subprocess.Popen(
            [sys.executable, "-m", "tests.soak", worker, server.url, cache_dir, use_cache, str(seeds)])

    with tempfile.TemporaryDirectory() as cache_dir, Server(ledger) as server:
        steady, victim = start("steady"), start("victim-0")
        for number in range(KILLS):
            while len(server.requests) < samples * (number + 1) / KILLS and victim.poll() is None:
                time.sleep(0.01)
            victim.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
            victim.wait()
            with ledger.lock:
                ledger.killed[f"victim-{number}"] = time.monotonic()
            victim = start(f"victim-{number + 1}")
        codes = steady.wait(), victim.wait()
        came = len(server.requests)
        wrong = draw("reader", server.url, cache_dir, use_cache, seeds)
        again = len(server.requests) - came
    answers = sum(map(len, ledger.sent.values()))
    lost = {worker: len(texts) for worker, texts in ledger.lost.items()}
    print(f"{use_cache}: {samples} samples in {time.monotonic() - begun:.1f} s; {came} requests, {answers} answered")
    for kind, count in sorted(ledger.counts.items()):
        print(f"    {count:6d}  {kind}")
    for count, what in (
            (sum(lost.values()), f"asked for again, as they were in flight at one of {KILLS} kills"),
            (answers - samples - sum(lost.values()), "drawn by both processes at the same time"),
            (len(ledger.needless), "asked for again without need"), (wrong, "missing or wrong"),
            (again, "not in the cache")):
        print(f"    {count:6d}  {what}")
    return [
        *ledger.needless[:3],
        *(f"{worker} lost {count} samples at its kill" for worker, count in lost.items() if count > WIDTH),
        *([f"{wrong} samples are missing or wrong"] if wrong else []),
        *([f"{again} requests for what should be in the cache"] if again else []),
        *([f"the processes ended with {codes}"] if any(codes) else []),
    ]


def main(arguments):
    if len(arguments) == 5:
        rollouts._clock = FastClock()
        return int(draw(*arguments[:4], int(arguments[4])) > 0)
    seeds = (int(arguments[0]) if arguments else 3000) // PROMPTS // 2
    violations = [f"{use_cache}: {what}" for use_cache in ("json", "sql") for what in soak(use_cache, seeds)]
    print("\n".join(violations) or "nothing lost, nothing wrong, nothing asked for without need")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
