"""Every feature of `rollouts`, each in a small function of its own.

    python example.py

With OPENROUTER_API_KEY set it asks OpenRouter for about 300 short replies, of at most 200 tokens each. Without,
it starts a stand-in server on this machine and says so. Its caches live in a temporary directory.
"""

from __future__ import annotations

import _thread
import asyncio
import hashlib
import html
import json
import math
import os
import random
import re
import tempfile
import textwrap
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rollouts import APIError, Config, Response, Rollouts, RolloutsClient, RolloutsError, create_client, split_sentences

MODEL = "qwen/qwen3-30b-a3b"
BRIEF: dict[str, Any] = {"max_tokens": 200, "timeout": 8, "max_retries": 1}  # so that a slow API cannot hold it up
TIME_LIMIT = 20  # seconds


# == Many samples ==================================================================================


def many_samples() -> None:
    """One prompt, five seeds, in the order of the seeds."""
    client = RolloutsClient(MODEL, temperature=0.7, **BRIEF)
    rollouts = client.generate("What is the meaning of life?", n_samples=5)
    for response in rollouts:
        print(f"seed {response.seed}: {shown(response.full)}")
    print(rollouts, rollouts.get_finish_reasons(), f"{rollouts.get_total_tokens()} tokens")


def many_prompts() -> None:
    """Several prompts through one queue."""
    client = RolloutsClient(MODEL, **BRIEF)
    for rollouts in client.generate_many(["Name a colour.", "Name a river."], n_samples=3):
        print(f"{rollouts.prompt}: {[shown(text, 30) for text in rollouts.get_contents()]}")


def async_samples() -> None:
    """Several calls under way at once in an event loop; in a notebook: `await client.agenerate(...)`."""
    async def gather() -> list[Rollouts]:
        client = RolloutsClient(MODEL, **BRIEF)
        return list(await asyncio.gather(
            client.agenerate("Explain quantum computing", n_samples=3),
            client.agenerate("Write a haiku", n_samples=5, temperature=1.2)))

    for rollouts in asyncio.run(gather()):
        print(f"{len(rollouts)} responses to {rollouts.prompt!r} at temperature {rollouts.temperature}")


# == Settings ======================================================================================


def presets() -> None:
    """A preset is a temperature with a name."""
    for preset in ("deterministic", "creative"):
        rollouts = create_client(MODEL, preset, **BRIEF).generate("Write a one-line story", n_samples=3)
        print(f"{preset}: temperature {rollouts.temperature}, {len(set(rollouts.get_texts()))} different texts of 3")


def overrides() -> None:
    """Any setting for one call; None takes a field out of the request; what is no setting goes to the API."""
    client = RolloutsClient(MODEL, temperature=0.7, **BRIEF)
    rollouts = client.generate("Be creative!", n_samples=2, temperature=1.5, top_p=None, min_p=0.05, stop=["\n\n"])
    print(f"temperature {rollouts.temperature}, top_p {rollouts.top_p}; the client's own is still {client.temperature}")


def config() -> None:
    """Settings as an object, to keep beside the results; a key given to it is in to_dict()."""
    settings = Config(model=MODEL, temperature=0.8, presence_penalty=0.1, **BRIEF)
    client = RolloutsClient(**settings.to_dict())
    print(client)


def keys() -> None:
    """Three ways to give a key: the environment, the client, the call. It is shown nowhere."""
    key = os.environ["OPENROUTER_API_KEY"]
    client = RolloutsClient(MODEL, api_key=key, **BRIEF)
    print(client.generate("Say hello.", api_key=key))
    print(f"is the key in the client's repr? {'yes' if key in repr(client) else 'no'}")


# == Reasoning =====================================================================================


def thinking_injection() -> None:
    """The model continues a thought that you began. No space at its end."""
    client = RolloutsClient(MODEL, **BRIEF)
    response = client.generate("Calculate 10*5\n<think>\nLet me calculate: 10*5=")[0]
    print(f"it went on with {shown(response.reasoning or '', 40)!r} and answered {shown(response.content, 40)!r}")
    try:
        RolloutsClient("openai/gpt-oss-20b").generate("Calculate 10*5\n<think>\nLet me")
    except ValueError as error:
        print(f"not every model can: {shown(str(error), 90)}")


def check_injection() -> None:
    """Whether the model at its API really continues, found out with one cheap question."""
    client = RolloutsClient(MODEL, **BRIEF)
    print(f"{MODEL} continues an injected thought: {client.check_injection()}")


# == Cache, limits, cost ===========================================================================


def caching() -> None:
    """What has arrived is never paid for again: as JSON files, or in a SQLite database."""
    for kind in ("json", "sql"):
        client = RolloutsClient(MODEL, use_cache=kind, cache_dir=f"cache_{kind}", **BRIEF)
        client.generate("What is 2+2?", n_samples=2)
        again = client.generate("What is 2+2?", n_samples=3)
        files = [str(path) for path in sorted(Path(f"cache_{kind}").rglob("*")) if path.is_file()]
        print(f"{kind}: asked for 3 after 2, {sum(response.cached for response in again)} came from the cache")
        print(f"  {files[-1]}" if kind == "json" else f"  {files[0]}")


def progress_bar() -> None:
    """A line on stderr while several samples are under way, gone when they are done; it can be off."""
    client = RolloutsClient(MODEL, progress_bar=True, **BRIEF)
    client.generate("Write a story", n_samples=5)
    client.generate("Write a silent story", n_samples=2, progress_bar=False)
    client.generate("Write a story that is told step by step", n_samples=2, verbose=True)


def rate_limit() -> None:
    """No more than so many requests start in any minute, retries included."""
    client = RolloutsClient(MODEL, requests_per_minute=600, max_concurrency=50, **BRIEF)
    begun = time.monotonic()
    client.generate("Name a number.", n_samples=15)
    print(f"15 requests at 600 a minute took {time.monotonic() - begun:.1f} s")


def cost() -> None:
    """Tokens and US dollars: of all the responses, and of what this call really sent."""
    client = RolloutsClient(MODEL, **BRIEF)
    client.generate("What is 2+2?", n_samples=1)
    rollouts = client.generate("What is 2+2?", n_samples=3)
    for what, usage in (("all", rollouts.usage), ("spent", rollouts.spent)):
        print(f"{what}: {usage.prompt_tokens} + {usage.completion_tokens} tokens, ${usage.cost:.6f}")


# == Errors and other servers ======================================================================


def errors() -> None:
    """Wrong arguments are a ValueError before anything is sent; what the API refuses is an APIError."""
    try:
        RolloutsClient(MODEL, temperature=3)
    except ValueError as error:
        print(f"ValueError: {error}")
    try:
        RolloutsClient(MODEL, top_logprobs=5)
    except NotImplementedError as error:
        print(f"NotImplementedError: {shown(str(error), 80)}")
    try:
        RolloutsClient("nobody/no-such-model", **BRIEF).generate("Hello", n_samples=20)
    except APIError as error:
        print(f"APIError: {error}")


def other_servers() -> None:
    """Any OpenAI-compatible server by its address; other APIs by their name (provider="together")."""
    url = os.environ.get("OPENROUTER_BASE_URL", "https://openrouter.ai/api/v1")
    client = RolloutsClient(MODEL, base_url=url, api_key=os.environ["OPENROUTER_API_KEY"], **BRIEF)
    print(f"{client.base_url} says {shown(client.generate('Say hello.')[0].content, 40)!r}")
    routed = RolloutsClient(MODEL, provider={"sort": "price"}, **BRIEF)  # OpenRouter's own routing is a dict
    print(f"routed by {routed.provider}: answered by {routed.generate('Say hello.')[0].provider}")


# == Which sentence matters: the analysis of Thought Anchors (arXiv 2506.19143) =====================

QUESTION = "When the base-16 number 66666 is written in base 2, how many digits does it have?"
CORRECT = "19"
TRACE = (
    "I need the number of binary digits of 66666 in base 16. Each hexadecimal digit stands for exactly four bits. "
    "There are five of them, so that would be 5 x 4 = 20 bits. But the leading digit 6 is 0110 in binary, and its "
    "first zero does not count. Let me convert the number to be sure.\n\n66666 in base 16 is 419430 in decimal. "
    "2^18 = 262144 and 2^19 = 524288. The number lies between these two. So the answer is settled.")
FORCE = "\n</think>\n\nTherefore, the final answer is \\boxed{"


def answer_of(response: Response) -> str | None:
    found = re.search(r"\d+", response.content)
    return found[0] if found else None


def kl_divergence(p: Counter[str | None], q: Counter[str | None]) -> float:
    """KL(p || q) in nats. Half a count is added to each answer, so that none counts as impossible."""
    answers = p.keys() | q.keys()
    all_p, all_q = (sum(counts.values()) + 0.5 * len(answers) for counts in (p, q))
    return sum((p[a] + 0.5) / all_p * math.log((p[a] + 0.5) / all_p / ((q[a] + 0.5) / all_q)) for a in answers)


def thought_anchors(n_samples: int = 20) -> None:
    """Draw the answer after every prefix of a trace, and see at which sentence the answers change."""
    client = RolloutsClient(MODEL, temperature=0.7, **{**BRIEF, "max_tokens": 20})
    sentences = split_sentences(TRACE)
    prefixes = client.resample(QUESTION, TRACE, n_samples, suffix=FORCE)
    answers = [rollouts.counts(answer_of) for rollouts in prefixes]  # after 0, 1, 2, … sentences
    accuracy = [counts[CORRECT] / sum(counts.values()) for counts in answers]
    rows = []
    for i, sentence in enumerate(sentences):
        importance = kl_divergence(answers[i], answers[i + 1])  # without the sentence, and with it
        rows.append((sentence, importance, accuracy[i + 1] - accuracy[i], answers[i + 1]))

    print(f"{len(sentences)} sentences, {n_samples} answers after each prefix; KL in nats, change of accuracy")
    longest = max(row[1] for row in rows) or 1.0
    for sentence, importance, change, _ in rows:
        bar = "#" * round(10 * importance / longest)
        lines = textwrap.wrap(sentence.strip(), 52)
        print(f"  {importance:5.2f} {change:+6.0%}  {bar:10}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':27}{line}")
    print(f"most important: {max(rows, key=lambda row: row[1])[0].strip()}")
    path = Path(tempfile.mkdtemp(prefix="thought-anchors-")) / "thought-anchors.html"
    path.write_text(as_html(rows), encoding="utf-8")
    print(f"the same as a page for the browser: {path}")


def as_html(rows: list[tuple[str, float, float, Counter[str | None]]]) -> str:
    """A page without scripts: the trace, each sentence shaded by its importance, and the numbers below."""
    longest = max(row[1] for row in rows) or 1.0
    marks, lines = [], []
    for number, (sentence, importance, change, counts) in enumerate(rows, 1):
        share = importance / longest
        style = f'style="--share: {share:.3f}"'
        text = html.escape(sentence.lstrip())
        space = sentence[: len(sentence) - len(sentence.lstrip())]
        given = ", ".join(f"{html.escape(str(answer))} ({count})" for answer, count in counts.most_common())
        title = f"KL {importance:.2f}, accuracy {change:+.0%}"
        marks.append(f'{space}<mark {style} title="{title}">{text}</mark><sup>{number}</sup>')
        lines.append(
            f'<tr><td>{number}<td class="bar"><span {style}></span><td>{importance:.2f}<td>{change:+.0%}'
            f"<td>{given}<td>{text}")
    return PAGE.format(
        question=html.escape(QUESTION), correct=CORRECT, trace="".join(marks), rows="\n".join(lines), model=MODEL)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Thought anchors</title>
<style>
:root {{ color-scheme: light dark;
  --ground: #fdfdfb; --ink: #1d1d1b; --faint: #6a6a66; --rule: #deded8; --hue: 234 88 12; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ground: #17181a; --ink: #e8e8e4; --faint: #9c9c96; --rule: #34363a; --hue: 251 146 60; }}
}}
body {{ margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 46rem; background: var(--ground); color: var(--ink);
  font: 17px/1.7 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; line-height: 1.35; margin: 0 0 .3rem; }}
p {{ margin: 0 0 1.5rem; }}
.trace {{ white-space: pre-line; }}
.faint, sup, th {{ color: var(--faint); }}
.faint {{ font-size: .9rem; line-height: 1.5; }}
sup {{ font-size: .65em; line-height: 0; margin-left: .15em; }}
mark {{ background: rgb(var(--hue) / calc(var(--share) * .6)); color: inherit; padding: .12em .2em; border-radius: .2em;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .85rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .45rem .9rem .45rem 0;
  border-bottom: 1px solid var(--rule); }}
th {{ font-weight: normal; white-space: nowrap; }}
td {{ white-space: nowrap; }}
td:last-child {{ white-space: normal; min-width: 15rem; padding-right: 0; }}
.bar {{ width: 5rem; min-width: 5rem; }}
@media (max-width: 40rem) {{
  th:last-child, td:last-child {{ display: none; }}
  .bar {{ width: 4rem; min-width: 4rem; }}
}}
.bar span {{ display: block; height: .7rem; margin-top: .3rem; min-width: 1px; width: calc(var(--share) * 100%);
  background: rgb(var(--hue)); border-radius: .15rem; }}
</style></head><body>
<h1>{question}</h1>
<p class="faint">Each sentence of the thought is shaded by its importance: how far the answers without it are from
the answers with it. Model: {model}. Correct answer: {correct}.</p>
<p class="trace">{trace}</p>
<div class="wide"><table>
<tr><th>no.<th>importance<th>KL (nats)<th>accuracy<th>answers after it<th>sentence
{rows}
</table></div>
</body></html>
"""


# == The stand-in ==================================================================================
#
# Knows how to look like a model that thinks. After "the leading digit 6 is 0110" its answers change.

PLANTED = "the leading digit 6 is 0110"
WORDS = ("blue", "the Danube", "42", "a lighthouse", "rain on a tin roof", "seven", "to look closely", "moss")


class StandIn(BaseHTTPRequestHandler):
    """A chat-completions server whose answers depend on the seed and the temperature alone."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seed = asked["seed"] if asked.get("temperature") else 0
        messages = asked.get("messages") or [{"role": "assistant", "content": asked["prompt"]}]
        text = json.dumps([messages, seed, asked.get("temperature")])
        dice = random.Random(hashlib.sha256(text.encode()).digest())
        time.sleep(dice.uniform(0.02, 0.1))
        if "no-such-model" in asked["model"]:
            return self.reply(400, {"error": {"code": 400, "message": f"{asked['model']} is not a valid model ID"}})
        reasoning, content = self.think(messages, dice)
        tokens = 3 + len((reasoning + content).split())
        said: dict[str, Any] = {"message": {"role": "assistant", "content": content, "reasoning": reasoning or None}}
        if "prompt" in asked:  # a raw completion
            said = {"text": f"{reasoning}</think>{content}" if reasoning else content}
        return self.reply(200, {
            "id": f"stand-in-{seed}", "model": asked["model"], "provider": "stand-in", "created": int(time.time()),
            "choices": [{"index": 0, "finish_reason": "stop", **said}],
            "usage": {
                "prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": 20 + tokens, "cost": 1e-6 * tokens}})

    def think(self, messages: list[dict[str, str]], dice: random.Random) -> tuple[str, str]:
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        if begun.endswith("\\boxed{"):
            known = 0.95 if PLANTED in begun else 0.15 if "20 bits" in begun else 0.25
            return "", f"{CORRECT if dice.random() < known else dice.choice(['20', '20', '20', '17'])}}}$."
        if begun.endswith("10*5="):
            return "50. That is all there is to it.", "10*5 is 50."
        if begun.endswith("2 x 4 ="):
            return " 8. Now to the capital.", "Paris."
        if begun.endswith("6, 7,"):
            return "", " 8, 9, 10."
        word = dice.choice(WORDS)
        return f"I think of {word}.", f"{dice.choice(['Perhaps', 'Surely', 'I would say'])} {word}."

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class StandInServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def start_stand_in() -> None:
    server = StandInServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["OPENROUTER_BASE_URL"] = f"http://127.0.0.1:{server.server_address[1]}/api/v1"
    os.environ["OPENROUTER_API_KEY"] = "the-key-of-a-stand-in"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"


# == All of them ===================================================================================

EXAMPLES = (
    many_samples, many_prompts, async_samples, presets, overrides, config, keys, thinking_injection, check_injection,
    caching, progress_bar, rate_limit, cost, errors, other_servers, thought_anchors)


def shown(text: str, width: int = 70) -> str:
    return textwrap.shorten(text, width, placeholder=" …")


def main() -> int:
    if not os.environ.get("OPENROUTER_API_KEY", "").strip():
        start_stand_in()
        print("OPENROUTER_API_KEY is not set: a stand-in server on this machine answers, not a model.")
    watchdog = threading.Timer(TIME_LIMIT, _thread.interrupt_main)
    watchdog.daemon = True
    watchdog.start()
    failed = 0
    home = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="rollouts-example-") as directory:
        os.chdir(directory)  # where the caches go
        try:
            for example in EXAMPLES:
                print(f"\n-- {example.__name__}: {example.__doc__}")
                try:
                    example()
                except RolloutsError as error:
                    failed += 1
                    print(f"failed: {error}")
        except KeyboardInterrupt:
            failed += 1
            print(f"\nended early: interrupted, or {TIME_LIMIT} seconds were over")
        finally:
            watchdog.cancel()
            os.chdir(home)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
