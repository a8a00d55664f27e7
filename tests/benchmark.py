"""What a sample costs: `python -m tests.benchmark`.

A TLS server on loopback, in a process of its own, answers at once or after a second. Each contestant
runs in a fresh interpreter, in rounds that interleave them, and the table shows the median of each
figure and its ratio to that of the bare loop of kept `http.client` connections. Titles name the limits.

    --rounds N          how often each contestant runs (default 5)
    --peer NAME=PYTHON  run peer NAME (openai, litellm, aiohttp, rollouts-0.1.11) with that interpreter
    --only WORD         only the sections whose title contains WORD
"""

import argparse
import asyncio
import json
import os
import resource
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CERTIFICATE = os.path.join(HERE, "localhost.pem")
PROMPT = "How many primes are there below one hundred? Think step by step. " * 8
REPLY = json.dumps({
    "id": "gen-1763730000-abcdefghijklmnop", "provider": "Stand-in", "model": "qwen/qwen3-30b-a3b",
    "object": "chat.completion", "created": 1763730000,
    "choices": [{"index": 0, "logprobs": None, "finish_reason": "stop", "native_finish_reason": "stop", "message": {
        "role": "assistant", "content": "There are 25 primes below one hundred. " * 5, "refusal": None,
        "reasoning": "Let me count them: 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37. " * 15}}],
    "usage": {"prompt_tokens": 120, "completion_tokens": 400, "total_tokens": 520, "cost": 0.0001,
              "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 350}},
}).encode()
HEADERS = (
    b"HTTP/1.1 200 OK\r\nDate: Fri, 21 Nov 2025 12:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"Connection: keep-alive\r\nCF-RAY: 9a1b2c3d4e5f6a7b-FRA\r\nAccess-Control-Allow-Origin: *\r\n"
    b"Server: stand-in\r\nVary: Accept-Encoding\r\nX-Content-Type-Options: nosniff\r\n"
    b"Referrer-Policy: no-referrer, strict-origin-when-cross-origin\r\nX-Generation-Id: gen-1763730000\r\n"
    b"Permissions-Policy: payment=(self)\r\nContent-Length: %d\r\n\r\n" % len(REPLY))


# == The server ====================================================================================


async def _answer(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            await reader.readexactly(int(next(line[15:] for line in lines if line.startswith(b"content-length:"))))
            if lines[0].startswith(b"post /slow/"):
                await asyncio.sleep(1)
            writer.write(HEADERS + REPLY)
    except (asyncio.IncompleteReadError, OSError):
        writer.close()


async def _serve():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    server = await asyncio.start_server(_answer, "127.0.0.1", 0, ssl=context, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until our parent is gone


# == The contestants ===============================================================================
#
# Each draws n samples, `width` at once, from https://localhost:port/path.


def _body(seed):
    return json.dumps({
        "model": "m", "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0.7, "top_p": 0.95, "max_tokens": 4096, "seed": seed}).encode()


def _in_threads(n, width, work):
    seeds = iter(range(n))
    threads = [threading.Thread(target=work, args=(seeds,)) for _ in range(width)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bare(port, path, n, width):
    import http.client

    context = ssl.create_default_context()
    results = []

    def work(seeds):
        connection = http.client.HTTPSConnection("localhost", port, context=context)
        for seed in seeds:
            connection.request("POST", path + "/chat/completions", _body(seed), {"Content-Type": "application/json"})
            results.append(json.loads(connection.getresponse().read())["choices"][0]["message"]["content"])
        connection.close()

    _in_threads(n, width, work)
    return len(results)


def urlopen(port, path, n, width):
    import urllib.request

    results = []

    def work(seeds):
        for seed in seeds:
            request = urllib.request.Request(
                f"https://localhost:{port}{path}/chat/completions", _body(seed), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as reply:
                results.append(json.loads(reply.read())["choices"][0]["message"]["content"])

    _in_threads(n, width, work)
    return len(results)


def _ours(port, path, width, **settings):
    sys.path.insert(0, os.path.dirname(HERE))
    from rollouts import RolloutsClient

    return RolloutsClient(
        "m", base_url=f"https://localhost:{port}{path}", api_key="key", max_concurrency=width,
        **{"use_cache": False, **settings})


def rollouts(port, path, n, width):
    with _ours(port, path, width) as client:
        return len(client.generate(PROMPT, n))


def rollouts_async(port, path, n, width):
    async def main():
        return await asyncio.gather(*(client.agenerate(PROMPT, seed=seed) for seed in range(n)))

    with _ours(port, path, width) as client:
        return sum(map(len, asyncio.run(main())))


def rollouts_json(port, path, n, width):
    with tempfile.TemporaryDirectory() as cache, _ours(port, path, width, use_cache="json", cache_dir=cache) as client:
        return len(client.generate(PROMPT, n))


def rollouts_sql(port, path, n, width):
    with tempfile.TemporaryDirectory() as cache, _ours(port, path, width, use_cache="sql", cache_dir=cache) as client:
        return len(client.generate(PROMPT, n))


def rollouts_many(port, path, n, width):
    with tempfile.TemporaryDirectory() as cache, _ours(port, path, width, use_cache="json", cache_dir=cache) as client:
        return sum(map(len, client.generate_many([f"{PROMPT} {i}" for i in range(n // 100)], 100)))


def _at_most(width, draw, n):
    async def main():
        gate = asyncio.Semaphore(width)

        async def one(seed):
            async with gate:
                return await draw(seed)

        return await asyncio.gather(*map(one, range(n)))

    return main()


def aiohttp(port, path, n, width):
    import aiohttp

    async def main():
        context = ssl.create_default_context()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=width, ssl=context)) as session:
            async def draw(seed):
                async with session.post(
                        f"https://localhost:{port}{path}/chat/completions", data=_body(seed),
                        headers={"Content-Type": "application/json"}) as reply:
                    return (await reply.json())["choices"][0]["message"]["content"]

            return await _at_most(width, draw, n)

    return len(asyncio.run(main()))


def openai(port, path, n, width):
    import openai

    async def main():
        async with openai.AsyncOpenAI(base_url=f"https://localhost:{port}{path}", api_key="key") as client:
            async def draw(seed):
                return await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": PROMPT}], temperature=0.7, top_p=0.95,
                    max_tokens=4096, seed=seed)

            return await _at_most(width, draw, n)

    return len(asyncio.run(main()))


def litellm(port, path, n, width):
    import litellm

    async def main():
        async def draw(seed):
            return await litellm.acompletion(
                "openai/m", messages=[{"role": "user", "content": PROMPT}], temperature=0.7, top_p=0.95,
                max_tokens=4096, seed=seed, api_base=f"https://localhost:{port}{path}", api_key="key")

        return await _at_most(width, draw, n)

    return len(asyncio.run(main()))


def rollouts_0_1_11(port, path, n, width):
    import rollouts

    client = rollouts.RolloutsClient(model="m", api_key="key", use_cache=False, progress_bar=False)
    client.provider.api_url = f"https://localhost:{port}{path}/chat/completions"
    done = 0
    while done < n:  # it sends all the samples of a call at once
        rollouts_of_call = client.generate(PROMPT, n_samples=min(width, n - done))
        done += sum(response.finish_reason == "stop" for response in rollouts_of_call)
    return done


def _measure(name, port, path, n, width):
    # The imports and what a contestant sets up once are not what a sample costs: two runs, the first of few.
    contestant = globals()[name]
    contestant(int(port), path, 2, 2)
    wall, cpu = time.perf_counter(), time.process_time()
    drawn = contestant(int(port), path, int(n), int(width))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert drawn == int(n), f"{name} drew {drawn} of {n}"
    print(json.dumps({"cpu": cpu, "wall": wall, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


# == The rounds ====================================================================================


def _round(rounds, contestants, path, n, width, port, peers):
    """The median figures of each of *contestants*, which take turns."""
    figures = {name: [] for name in contestants}
    environment = {**os.environ, "SSL_CERT_FILE": CERTIFICATE}
    for _ in range(rounds):
        for name in contestants:
            command = [peers.get(name, sys.executable), os.path.abspath(__file__), "measure", name]
            done = subprocess.run(
                [*command, str(port), path, str(n), str(width)], capture_output=True, env=environment, text=True)
            if done.returncode:
                sys.exit(f"{name}:\n{done.stderr}")
            figures[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(one[key] for one in ours) for key in ours[0]} for name, ours in figures.items()}


def _table(title, figures, columns):
    """Print *figures*: columns are (heading, key, factor, format)."""
    first = next(iter(figures.values()))
    print(f"\n**{title}**\n")
    print("| | " + " | ".join(f"{heading} | ratio" for heading, *_ in columns) + " |")
    print("|---|" + "---:|---:|" * len(columns))
    for name, ours in figures.items():
        cells = " | ".join(
            f"{ours[key] * factor:{form}} | {ours[key] / first[key]:.2f}" for _, key, factor, form in columns)
        print(f"| {name} | {cells} |", flush=True)


def _timed(rounds, work, n):
    """The median seconds of one of the *n* things that *work* does."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        times.append((time.perf_counter() - begun) / n)
    return statistics.median(times)


def _cached(kind, size, rounds, asked=100):
    """Print what it costs to read and to add a sample, with *size* of them in a cache of *kind*."""
    sys.path.insert(0, os.path.dirname(HERE))
    import glob
    import sqlite3
    from dataclasses import replace

    import rollouts

    with tempfile.TemporaryDirectory() as directory, rollouts.RolloutsClient(
            "m", base_url="http://127.0.0.1:9", use_cache=kind, cache_dir=directory) as client:
        # The only way to a hundred thousand samples in half a minute is past the network: through the store.
        call = client._prepare([f"{PROMPT} {number}" for number in range(size // asked + 1)], 1, {})
        *requests, new = call.requests
        message = json.loads(REPLY)["choices"][0]["message"]
        reply = rollouts.Response(message["content"], message["reasoning"], finish_reason="stop")

        def add(request):
            for seed in range(asked):
                call.cache.put(request, replace(reply, seed=seed))

        for request in requests:
            add(request)
        files = glob.glob(os.path.join(directory, "*", "*", "*", request.key[2], "seed_*.json"))

        def parse_files():
            for name in files:
                with open(name, "rb") as file:
                    json.load(file)

        def fetch_rows():
            for seed in range(asked):
                database.execute(query, (key, seed)).fetchone()

        query = "SELECT response FROM responses WHERE request = ? AND seed = ?"
        key, database = "/".join(request.key), sqlite3.connect(os.path.join(directory, "rollouts.sqlite3"))
        threads = threading.active_count()
        bare = _timed(rounds * 5, parse_files if kind == "json" else fetch_rows, asked)
        ours = _timed(rounds * 5, lambda: client.generate(request.prompt, asked), asked)
        assert threading.active_count() == threads, "a cached sample needs no thread"
        added = _timed(rounds * 5, lambda: add(new), asked)
        database.close()
    what = "open and parse the file" if kind == "json" else "fetch the row"
    figures = f"{bare * 1e6:.0f} ({what}) | {ours * 1e6:.0f} | {ours / bare:.2f} | {added * 1e6:.0f}"
    print(f"| {kind}, {size:,} stored | {figures} |", flush=True)


def _imports(rounds):
    times = {"pass": [], "import urllib.request": [], "import rollouts": []}
    with tempfile.TemporaryDirectory() as compiled:  # as installed: compiled once, by the round that does not count
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(HERE), "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for counts in [False] + [True] * rounds * 6:
            for code, ours in times.items():
                begun = time.perf_counter()
                subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment)
                if counts:
                    ours.append(time.perf_counter() - begun)
    empty = statistics.median(times.pop("pass"))
    _table("Importing, above an empty interpreter (rollouts: at most 2.2)", {
        code: {"time": statistics.median(ours) - empty} for code, ours in times.items()}, [("ms", "time", 1e3, ".1f")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    named = (peer.split("=", 1) for peer in options.peer)
    peers = {name.replace("-", "_").replace(".", "_"): python for name, python in named}
    server = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    port = int(server.stdout.readline())
    cpu = ("CPU ms a sample", "cpu", 1.0, ".2f")
    wall, memory = ("seconds", "wall", 1.0, ".2f"), ("MB", "memory", 1.0, ".0f")

    def section(title, names, path, n, width, columns):
        if options.only.lower() in title.lower():
            figures = _round(options.rounds, names, path, n, width, port, peers)
            for ours in figures.values():
                ours["cpu"] *= 1000 / n
            _table(title, figures, columns)

    try:
        section("CPU: 2,000 samples, 64 at once, no latency, TLS (rollouts: at most 1.5)",
                ["bare", "rollouts", "rollouts_json", "rollouts_sql", "urlopen", *peers], "/v1", 2000, 64, [cpu, wall])
        figures = [wall, cpu, memory]
        section("Wide: 500 samples at once, a second each (rollouts: at most 1.1)",
                ["bare", "rollouts"], "/slow/v1", 500, 500, figures)
        section("Wide: 200 agenerate at once, a second each", ["bare", "rollouts_async"], "/slow/v1", 200, 200, figures)
        section("Many: 20,000 samples in one generate_many, cached (at most 100 MB)",
                ["rollouts_many"], "/v1", 20_000, 64, figures)
        if options.only.lower() in "cached":
            print("\n**A cached sample, in microseconds**\n")
            print("| | bare | rollouts | ratio | to add one |\n|---|---:|---:|---:|---:|")
            for kind in ("json", "sql"):
                for size in (100, 100_000):
                    _cached(kind, size, options.rounds)
        if options.only.lower() in "imports":
            _imports(options.rounds)
    finally:
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(_serve())
    elif sys.argv[1:2] == ["measure"]:
        _measure(*sys.argv[2:])
    else:
        main()
