"""Which sentence of a thought decides the answer? The method of Thought Anchors, from end to end.

    python example.py [folder]

A model thinks about a problem, and its thought is cut into sentences. After each of them the model
thinks on many times: where do the answers go if the sentence stands there, and where if the model
writes another one in its place? (Bogdan, Macar, Nanda and Conmy, arXiv 2506.19143.)

With OPENROUTER_API_KEY set it asks OpenRouter, for a few cents; without, a stand-in on this machine
answers. The picture and the cache go into the folder, by default one for temporary files.
"""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import string
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Optional

from rollouts import Response, RolloutsClient, split_sentences

QUESTION = (
    "When the base-16 number 66666 is written in base 2, how many digits does it have? "
    "Put the number into \\boxed{}.")
CORRECT = "19"
FORCE = "\n</think>\n\nTherefore, the final answer is \\boxed{"

MODEL = "qwen/qwen3-30b-a3b"
# Hosts that were seen to continue a thought. Of any other, ask client.check_injection() first.
PROVIDER = {"only": ["deepinfra", "novita", "nebius", "siliconflow"]}
TRACE_SEED = 120  # the stand-in goes astray there, and finds back
MOST_PARTS = 12  # a longer thought is cut into so many groups of sentences, which keeps it cheap
FEWEST = 5  # from fewer samples no divergence is computed
FOLDER = Path(tempfile.gettempdir(), "thought-anchors-" + os.environ.get("USER", "user"))

Answers = Counter[Optional[str]]  # how often each answer came; None: none was given


def main() -> None:
    n_samples = 8  # the paper draws 100, after each single sentence
    if not os.environ.get("OPENROUTER_API_KEY", "").strip():
        print("OPENROUTER_API_KEY is not set: a stand-in server on this machine answers, no model.")
        start_stand_in()
        n_samples = 100
    most = 1 + 2 * (MOST_PARTS + 1) * n_samples  # half of them for a few tokens
    print(f"At most {most} requests are sent, less what is in the cache already.")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    client = RolloutsClient(
        MODEL, provider=PROVIDER, temperature=0.6, max_tokens=4000, max_concurrency=20,
        cache_dir=str(folder / "cache"))

    # A trace, and its sentences.
    trace = client.generate(QUESTION, seed=TRACE_SEED)
    parts = cut(trace[0].reasoning or "")

    # continued[i] goes on after the first i parts; forced[i] must answer there at once.
    continued = client.resample(QUESTION, parts, n_samples)
    forced = client.resample(QUESTION, parts, n_samples, suffix=FORCE, max_tokens=16)

    # So continued[i] is without part i, and continued[i + 1] is with it.
    steps = []
    for i, part in enumerate(parts):
        others = [response for response in continued[i] if differs(response.full, part)]
        steps.append(Step(
            part,
            kept=continued[i + 1].counts(answer),
            resampled=continued[i].counts(answer),
            different=Counter(map(answer, others)),
            forced=forced[i + 1].counts(forced_answer),
            forced_before=forced[i].counts(forced_answer)))

    print(as_text(steps))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "thought_anchors.html"
    picture.write_text(as_html(steps, trace[0].model), encoding="utf-8")
    calls = [trace, *continued, *forced]
    drawn = sum(not response.cached for rollouts in calls for response in rollouts)
    cost = sum(rollouts.spent.cost for rollouts in calls)
    print(f"{drawn} of {sum(map(len, calls))} samples were drawn now, for ${cost:.3f}. All are in "
          f"the cache:\nrun it again, and nothing is sent or paid.\nThe picture: {picture}")


# == The analysis ==================================================================================


class Step(NamedTuple):
    """A sentence of the trace, and how often each answer came in the samples around it."""

    text: str
    kept: Answers  # the model thinks on after the sentence
    resampled: Answers  # it thinks on before it, and writes a sentence of its own there
    different: Answers  # those of the resampled whose own sentence says something else
    forced: Answers  # it must answer at once after the sentence
    forced_before: Answers  # and before it

    @property
    def change(self) -> float:
        """What the sentence adds to the share of right answers."""
        return accuracy(self.kept) - accuracy(self.resampled)

    @property
    def base_importance(self) -> float:
        return kl_divergence(self.resampled, self.kept)

    @property
    def importance(self) -> float:
        """The counterfactual one; 0 where the model hardly ever writes anything else there."""
        if sum(self.different.values()) < FEWEST:
            return 0.0
        return kl_divergence(self.different, self.kept)


def cut(thought: str) -> list[str]:
    """The sentences of *thought*, in groups where there are more than MOST_PARTS of them."""
    sentences = split_sentences(thought)
    if not sentences:
        raise SystemExit("The model showed no thought: choose one that does.")
    size = math.ceil(len(sentences) / MOST_PARTS)
    return ["".join(sentences[i:i + size]) for i in range(0, len(sentences), size)]


def first_words(text: str) -> set[str]:
    """The words of the first sentence."""
    return set(re.findall(r"\w+", "".join(split_sentences(text)[:1]).lower()))


def differs(text: str, other: str) -> bool:
    """Whether two first sentences share less than half of the shorter one's words.

    The paper asks an embedding model whether they differ in meaning; this only stands for it.
    """
    words, other_words = first_words(text), first_words(other)
    return len(words & other_words) < min(len(words), len(other_words)) / 2


def boxed(text: str) -> str | None:
    """The number in the last \\boxed{…} of *text*."""
    found = re.findall(r"\\boxed\{[^\d}]*(\d+)", text)
    return found[-1] if found else None


def answer(response: Response) -> str | None:
    return boxed(response.content)


def forced_answer(response: Response) -> str | None:
    return boxed(FORCE + response.content)


def accuracy(answers: Answers) -> float:
    return answers[CORRECT] / max(1, sum(answers.values()))


def kl_divergence(p: Answers, q: Answers) -> float:
    """KL(p || q) in nats. Half a count is added to each answer, so that none is impossible."""
    keys = p.keys() | q.keys()

    def share(answers: Answers, key: str | None) -> float:
        return (answers[key] + 0.5) / (sum(answers.values()) + 0.5 * len(keys))

    return sum(share(p, key) * math.log(share(p, key) / share(q, key)) for key in keys)


def as_text(steps: list[Step]) -> str:
    """A line for each sentence; importance is given as base and counterfactual KL divergence."""
    lines = ["", "     right  change  forced  KL: base  counterfactual"]
    for number, step in enumerate(steps, 1):
        shares = f"{accuracy(step.kept):5.0%} {step.change:+7.0%} {accuracy(step.forced):7.0%}"
        text = textwrap.shorten(step.text, 48, placeholder=" …")
        lines.append(
            f"{number:3}  {shares} {step.base_importance:9.2f} {step.importance:6.2f}  {text}")
    return "\n".join([*lines, ""])


# == The picture ===================================================================================


def as_html(steps: list[Step], model: str) -> str:
    """A page that loads nothing: the shaded trace, and the right answers along it."""
    top = max(steps, key=lambda step: step.importance)
    start = look(steps[0].resampled, steps[0].forced_before)
    trace, bars = [], [f"<a {start}><i></i><b></b>start</a>"]
    for number, step in enumerate(steps, 1):
        shade = step.importance / (top.importance or 1.0)
        style = look(step.kept, step.forced, shade, "up" if step.change > 0 else "down")
        text = step.text.lstrip()
        space = step.text[:-len(text)]
        trace.append(
            f'{space}<mark id="s{number}" tabindex="0" {style}>{html.escape(text)}'
            f"<sup>{number}</sup>{card(number, step)}</mark>")
        bars.append(f'<a {style} href="#s{number}"><i></i><b></b>{number}</a>')
    verdict = "No sentence stands out."
    if top.importance:
        verdict = (
            f"Sentence {1 + steps.index(top)} matters most: where it stands, "
            f"{accuracy(top.kept):.0%} of the answers are right; where the model writes something "
            f"else in its place, {accuracy(top.different):.0%}.")
    return PAGE.substitute(
        question=html.escape(QUESTION), model=html.escape(model), correct=html.escape(CORRECT),
        verdict=verdict, trace="".join(trace), bars="".join(bars))


def look(kept: Answers, forced: Answers, shade: float = 0.0, direction: str = "up") -> str:
    """The attributes from which the page's style makes colours, heights and labels."""
    return (
        f'class="{direction}" data-right="{100 * accuracy(kept):.0f}" style="--shade: {shade:.2f}; '
        f'--right: {accuracy(kept):.2f}; --forced: {accuracy(forced):.2f}"')


def card(number: int, step: Step) -> str:
    """What a sentence shows when it is pointed at: the answers with it and without."""
    numbers = f"importance {step.importance:.2f}, base {step.base_importance:.2f}"
    lines = [f"<b>Sentence {number}: {numbers}</b>"]
    for label, answers in (
        ("with it", step.kept), ("without it", step.resampled),
        ("something else there", step.different),
        ("forced after it", step.forced), ("forced before it", step.forced_before),
    ):
        counts = ", ".join(f"{key or 'none'}\u00a0×{count}" for key, count in answers.most_common())
        lines.append(
            f'{label}<i style="--right: {accuracy(answers):.2f}"></i>'
            f"<span>{html.escape(counts) or '–'}</span>")
    return f'<span class="card">{"".join(lines)}</span>'


PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Thought anchors</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --grey: rgb(128 128 128 / .35); }
.up { --hue: 29 111 216; }
.down { --hue: 226 98 10; }
body { margin: 0 auto; padding: 1rem 1rem 14rem; max-width: 46rem; background: Canvas;
  color: CanvasText; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.3; }
h2 { font-size: 1rem; margin-top: 2.5rem; }
.faint { color: color-mix(in srgb, CanvasText 70%, Canvas); font-size: .9rem; }
.trace { font: 1.1rem/1.8 Georgia, serif; white-space: pre-line; }
mark { color: CanvasText; background: rgb(var(--hue) / calc(var(--shade) * .65));
  padding: .15em .1em; border-radius: .25em; -webkit-box-decoration-break: clone; }
mark:hover, mark:focus { outline: 2px solid; }
sup { font: .65rem/0 system-ui, sans-serif; margin-left: .15em; }
.card { display: none; position: fixed; inset: auto 1rem 1rem; max-width: 44rem; margin: auto;
  padding: .8rem 1rem; grid-template-columns: auto minmax(3rem, 1fr) auto; gap: .3rem .8rem;
  align-items: center; background: Canvas; border: 1px solid gray; border-radius: .5rem;
  box-shadow: 0 4px 24px #0006; font: .85rem/1.3 system-ui, sans-serif; }
mark:hover .card, mark:focus .card { display: grid; }
mark:hover .card { z-index: 1; }
.card b { grid-column: 1 / -1; }
.card i { height: .7rem; border-radius: .2rem; background:
  linear-gradient(90deg, rgb(29 111 216) calc(var(--right) * 100%), var(--grey) 0); }
.bars { display: flex; gap: .25rem; overflow-x: auto; padding-top: 1.5rem; }
.bars a { flex: 1 0 1.6rem; position: relative; padding-top: 9rem; color: inherit;
  text-align: center; text-decoration: none; font-size: .75rem; }
.bars i, .bars b, .bars a::after { position: absolute; left: 0; right: 0; bottom: 1.5em; }
.bars i { height: calc(var(--right) * 9rem); border-radius: .2rem .2rem 0 0;
  background: linear-gradient(rgb(var(--hue) / var(--shade)) 0 0), var(--grey); }
.bars b { margin-bottom: calc(var(--forced) * 9rem); border-top: 2px solid; }
.bars a::after { content: attr(data-right);
  margin-bottom: calc(max(var(--right), var(--forced)) * 9rem); }
</style></head><body>
<h1>$question</h1>
<p class="faint">A thought of $model. The right answer is $correct.</p>
<p>$verdict</p>
<p class="trace">$trace</p>
<p class="faint">The stronger the shade, the more a sentence moves the answers (counterfactual KL
divergence), to <mark class="up" style="--shade: 1">more right ones</mark> or to
<mark class="down" style="--shade: 1">fewer</mark>. Point at a sentence to see its answers.</p>
<h2>Right answers after each sentence, in %</h2>
<p class="faint">Bars: the model thinks on. Lines: it must answer at once.</p>
<div class="bars">$bars</div>
</body></html>
""")


# == The stand-in ==================================================================================
#
# A small model of a model. What it writes next, and what it answers, is a word of a row by chance.

STORY = {  # name: (the answers that it has in mind there, what may follow, the sentence)
    "start": ("19 20 20 17", "task task goal", "<think>"),
    "task": ("19 20 20 17", "four four four sure", "I want the binary digits of 66666 in base 16."),
    "goal": ("19 20 20 17", "four four four sure", "66666 in base 16 is to be written in binary."),
    "four": ("19 20 20", "twenty twenty twenty lead sure", " Each hexadecimal digit is four bits."),
    "twenty": ("20", "easy easy easy end end end", " There are five of them, so 5 x 4 = 20 bits."),
    "easy": ("20", "wait sure end end end end end", " That was quick."),
    "wait": ("20 20 19", "lead lead lead sure", "\n\nBut wait, zeros at the front do not count."),
    "lead": ("19 19 20", "minus minus sure", " The leading 6 is 0110, so one zero falls away."),
    "minus": ("19", "check check end", " That leaves 20 - 1 = 19 bits."),
    "check": ("19", "powers", "\n\nLet me check that in decimal."),
    "sure": ("19 19 20 17", "powers", "\n\nOr look at the value in decimal."),
    "powers": ("19", "end", " 66666 in base 16 is 419430, and that lies between 2^18 and 2^19."),
}


def reply(body: dict[str, Any]) -> dict[str, Any]:
    """What a chat-completions API replies: it goes on after the last sentence that it knows."""
    thought = body["messages"][-1]["content"]
    name = max(STORY, key=lambda each: thought.rfind(STORY[each][2].strip()))
    dice = random.Random(f"{body['seed']} {thought}")
    if thought.endswith(FORCE):
        message = {"content": dice.choice(STORY[name][0].split()) + "}."}
    else:
        text = ""
        while (following := dice.choice(STORY[name][1].split())) != "end":
            name = following
            text += STORY[name][2]
        number = dice.choice(STORY[name][0].split())
        text += f" So it has {number} digits."
        message = {"reasoning": text, "content": f"\\boxed{{{number}}}"}
    return {"model": "a stand-in", "choices": [{"message": message, "finish_reason": "stop"}]}


class StandIn(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    wbufsize = -1  # sends headers and body together

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        data = json.dumps(reply(body)).encode()
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def start_stand_in() -> None:
    """Its address is part of the cache's key: the same port each time, if nobody else has it."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", 8619), StandIn)
    except OSError:
        server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["OPENROUTER_BASE_URL"] = f"http://127.0.0.1:{server.server_port}/api/v1"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"


if __name__ == "__main__":
    main()
