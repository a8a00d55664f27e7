"""The examples of the README, and those of the two documents that the interface comes from, really run."""

import ast
import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import unittest
from unittest import mock

from tests import rollouts
from tests.case import Case, Clock
from tests.server import Reply, Request, chat

README = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md")
MODEL = "qwen/qwen3-30b-a3b"
THOUGHT = "First, 2 x 2 is 4. Then I add nothing.\n\nSo it stays at 4."


def think(request: Request) -> Reply:
    """A reply with a thought; after an injected one, its continuation."""
    if "prompt" in request.body:  # a raw completion
        return Reply(body={"choices": [{"text": "50.</think>It is 50.", "finish_reason": "stop"}], "usage": {}})
    last = request.body["messages"][-1]
    if last["role"] == "user":
        return chat(f"It is 4 ({request.body.get('seed')}).", message={"reasoning": THOUGHT})
    if last["content"].endswith("6, 7,"):  # check_injection's forced answer
        return chat(" 8, 9")
    if last["content"].endswith("2 x 4 ="):
        return chat("Paris.", message={"reasoning": " 8."})
    if last["content"].endswith("10*5="):
        return chat("It is 50.", message={"reasoning": "50"})
    if last["content"].endswith("\\boxed{"):
        return chat("19}.")
    return chat("It is \\boxed{19}." if last["content"].endswith("at 4.") else "It is \\boxed{20}.")


class Example(Case):
    """A scripted server that the environment names, an empty directory, and quiet output."""

    def setUp(self) -> None:
        super().setUp()
        self.server = self.serve(think)
        self.environment = {
            **os.environ, "OPENROUTER_BASE_URL": self.server.url, "OPENROUTER_API_KEY": "a-key",
            "TOGETHER_API_KEY": "another-key",
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONUTF8": "1"}
        self.enter(mock.patch.dict(os.environ, self.environment, clear=True))
        self.enter(mock.patch.dict(sys.modules, {"rollouts": rollouts}))
        self.output = self.enter(contextlib.redirect_stdout(io.StringIO()))
        self.errors = self.enter(contextlib.redirect_stderr(io.StringIO()))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)

    def sent(self, function, *arguments, **keywords):
        """The number of requests that a call sends, and what it returns."""
        before = len(self.server.requests)
        result = function(*arguments, **keywords)
        return len(self.server.requests) - before, result


@unittest.skipUnless(os.path.exists(README), "there is no README beside these tests")
class Readme(Example):
    def setUp(self) -> None:
        super().setUp()
        with open(README, encoding="utf-8") as file:
            self.text = file.read()

    def blocks(self, language):
        """(line, whether it is to be run, code) of each block of *language*."""
        for match in re.finditer(rf"(?ms)^(<!-- not run[^\n]*-->\n)?```{language}\n(.*?)^```$", self.text):
            yield self.text.count("\n", 0, match.start(2)) + 1, match[1] is None, match[2]

    def run_block(self, line, code, namespace):
        """Run *code* as a notebook's cell would, and return the number of requests that it sent."""
        compiled = compile("\n" * (line - 1) + code, README, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        before = len(self.server.requests)
        result = eval(compiled, namespace)
        if compiled.co_flags & inspect.CO_COROUTINE:
            asyncio.run(result)
        return len(self.server.requests) - before

    def test_python_blocks_run_in_order(self) -> None:
        namespace = {"__name__": "__main__"}
        sent = {}
        for line, is_run, code in self.blocks("python"):
            with self.subTest(line=line):
                if is_run:
                    sent[code.strip().splitlines()[0]] = self.run_block(line, code, namespace)
                else:
                    compile(code, README, "exec")
        self.assertGreaterEqual(len(sent), 15)
        for beginning, count in (
            ("from rollouts import RolloutsClient", 5),
            ('rollouts = client.generate("What is 2+2?", n_samples=3)', 3 + 7 + 10 + 5 + 2 * 3),
            ("import asyncio", 2 * 3),
            ('client = RolloutsClient("qwen/qwen3-30b-a3b", cache_dir="my_cache")', 3 + 0 + 3 + 3),
            ('question = "When the base-16 number', 1 + 4 * 10 + 0),
            ("from rollouts import split_sentences", 5 + 2 * 5 + 0 + 3 * 3),  # the rest is in the cache
            ("sentences = split_sentences(response.reasoning)", 4 * 10),
            ("import json, pathlib", 0),
        ):
            with self.subTest(block=beginning):
                self.assertEqual([sent[line] for line in sent if line.startswith(beginning)], [count])
        output = self.output.getvalue()
        self.assertIn("50\n", output)  # the continued thought
        self.assertIn("Counter({True: 10})", output)
        self.assertIn("seed_00002.json It is 4 (2). 15", output)
        self.assertNotIn("starts afresh", output)
        self.assertIn("360 requests to go", output)  # 4 prefixes, 90 samples more
        self.assertIn("+100%  So it stays at 4.", output)  # with the last sentence the answer is right
        self.assertIn("0 Counter({'19': 10})", output)  # forced answers
        self.assertIn("20 []", output)  # 20 responses, no errors
        self.check_answers(namespace["answer"])
        self.check_layout(namespace["prefixes"])

    def check_answers(self, answer) -> None:
        for text, expected in (
            ("It is \\boxed{19}.", "19"), ("\\boxed{ \\frac{1}{2} } of it", "\\frac{1}{2}"),
            ("\\boxed{1}, no, \\boxed{\\text{a {b}}}", "\\text{a {b}}"),
            ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"), ("\\boxed{}", ""),
            ("\\boxed{\\frac{1}{2", None), ("19", None), ("19}", None), ("", None),
        ):
            with self.subTest(text=text):
                self.assertEqual(answer(text), expected)

    def check_layout(self, prefixes) -> None:
        """The fields that the paper's scripts read."""
        for drawn in prefixes[:-1]:
            with open(f"problem_0/chunk_{drawn.at}/solutions.json", encoding="utf-8") as file:
                solutions = json.load(file)
            self.assertEqual(len(solutions), 10)
            for solution in solutions:
                self.assertEqual(
                    {**solution, "chunk_removed": solution["chunk_removed"].strip()}, {
                        "chunk_removed": re.split(r"(?<=\.)\s+", THOUGHT)[drawn.at],
                        "prefix_without_chunk": drawn.prefix, "rollout": "</think>It is \\boxed{20}.",
                        "chunk_resampled": "</think>It is \\boxed{20}.",
                        "full_cot": drawn.prefix + "</think>It is \\boxed{20}.", "answer": "20",
                        "is_correct": False})
        self.assertEqual(len(os.listdir("problem_0")), len(prefixes) - 1)

    def test_shell_commands_run(self) -> None:
        lines = [line for _, _, code in self.blocks("sh") for line in code.splitlines()]
        commands = [line for line in lines if "python -m rollouts" in line]
        self.assertGreater(len(commands), 1)
        for command in commands:
            with self.subTest(command=command):
                done = subprocess.run(
                    command.replace("python -m rollouts", f'"{sys.executable}" -m {rollouts.__name__}'), shell=True,
                    capture_output=True, text=True, encoding="utf-8", timeout=60, env=self.environment)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                written = done.stdout
                if ">" in command:
                    with open(command.split()[-1], encoding="utf-8") as file:
                        written = file.read()
                seeds = [json.loads(line)["seed"] for line in written.splitlines()]
                self.assertEqual(seeds, list(range(int(re.findall(r"-n (\d+)", command)[0]))))

    def test_the_interface_is_in_its_tables(self) -> None:
        tables = self.text[self.text.index("## The whole interface"):]
        for name in rollouts.__all__:
            with self.subTest(name=name):
                self.assertIn(name, tables)
        for name, default in rollouts.Config("m").to_dict().items():
            with self.subTest(setting=name):
                self.assertIn(name, tables)
                row = re.search(rf"^\| ([^|]*`{name}`[^|]*) \| ([^|]*) \|", tables, re.MULTILINE)
                if name != "model":  # which has no default
                    names, defaults = row[1].split(", "), row[2].split(", ")
                    is_constant = default is None or isinstance(default, (bool, dict))
                    self.assertEqual(
                        defaults[names.index(f"`{name}`") if len(defaults) > 1 else 0],
                        f"`{json.dumps(default)}`" if isinstance(default, str) else
                        f"`{default!r}`" if is_constant else f"{default:g}")
        for kind, call in (
            (rollouts.Rollouts, lambda: rollouts.Rollouts("", [], [], 0, "m")),
            (rollouts.Response, lambda: rollouts.Response("")),
            (rollouts.Usage, rollouts.Usage),
        ):
            for name in (name for name in dir(call()) if not name.startswith("_")):
                with self.subTest(name=f"{kind.__name__}.{name}"):
                    self.assertRegex(tables, rf"\b{name}\b")

    def test_every_provider_is_named(self) -> None:
        with self.assertRaisesRegex(ValueError, "known: ") as caught:
            rollouts.RolloutsClient("m", provider="nobody")
        for name in re.findall(r"\w+", str(caught.exception).split("known: ")[1]):
            with self.subTest(provider=name):
                self.assertIn(f"`{name}`", self.text)

    def test_links_within_lead_somewhere(self) -> None:
        headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", self.text))
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for target in re.findall(r"\]\(#([^)]*)\)", self.text):
            with self.subTest(target=target):
                self.assertIn(target, anchors)


class Documents(Example):
    """What the two founding documents show, in the order of their sections."""

    def test_synchronous_use(self) -> None:
        client = rollouts.RolloutsClient(model=MODEL, temperature=0.7, max_tokens=1000)
        drawn = client.generate("What is the meaning of life?", n_samples=5)
        self.assertEqual(self.server.seeds(), [0, 1, 2, 3, 4])
        self.assertEqual(drawn.num_responses, 5)
        for seed, response in enumerate(drawn):
            self.assertEqual((response.reasoning, response.content), (THOUGHT, f"It is 4 ({seed})."))
            self.assertEqual(response.full, f"{THOUGHT}</think>It is 4 ({seed}).")
            self.assertEqual((response.usage.total_tokens, response.finish_reason), (15, "stop"))
        self.assertEqual(drawn.get_reasonings(), [THOUGHT] * 5)
        self.assertEqual(drawn.get_contents(), [f"It is 4 ({seed})." for seed in range(5)])
        self.assertEqual(drawn.get_texts(), [response.full for response in drawn.responses])
        self.assertEqual(
            (drawn.prompt, drawn.model, drawn.temperature, drawn.top_p, drawn.max_tokens),
            ("What is the meaning of life?", MODEL, 0.7, 0.95, 1000))

    def test_asynchronous_use(self) -> None:
        async def main():
            client = rollouts.RolloutsClient(model=MODEL)
            return await asyncio.gather(
                client.agenerate("Explain quantum computing", n_samples=3),
                client.agenerate("Write a haiku", n_samples=5, temperature=1.2))

        self.assertEqual([len(drawn) for drawn in asyncio.run(main())], [3, 5])
        self.assertEqual(sorted(request.body["temperature"] for request in self.server.requests), [0.7] * 3 + [1.2] * 5)

    def test_presets(self) -> None:
        for preset, temperature in (("deterministic", 0), ("focused", 0.3), ("balanced", 0.7), ("creative", 1.2)):
            with self.subTest(preset=preset):
                client = rollouts.create_client(model=MODEL, preset=preset)
                self.assertEqual(client.temperature, temperature)
                self.assertEqual(len(client.generate("Write a story", n_samples=3)), 3)

    def test_thinking_injection(self) -> None:
        client = rollouts.RolloutsClient(MODEL)
        for prompt in (
            "Calculate 10*5 <think>Let me calculate: 10*5=",
            "Calculate 10*5\n<think>\nLet me calculate: 10*5=",
        ):
            with self.subTest(prompt=prompt):
                response = client.generate(prompt, n_samples=1)[0]
                self.assertEqual((response.reasoning, response.content), ("50", "It is 50."))
                question, thought = prompt.split("<think>")
                self.assertEqual(self.server.requests[-1].body["messages"], [
                    {"role": "user", "content": question.strip()},
                    {"role": "assistant", "content": "<think>" + thought}])

    def test_models_without_injection(self) -> None:
        for model in ("openai/gpt-oss-20b", "openai/gpt-oss-120b", "google/gemini-2.5-pro", "openai/o3"):
            with self.subTest(model=model), self.assertRaises(ValueError):
                rollouts.RolloutsClient(model).generate("Calculate 10*5\n<think>\nLet me")
        self.assertEqual(self.server.requests, [])

    def test_overrides(self) -> None:
        client = rollouts.RolloutsClient(model=MODEL, temperature=0.7)
        client.generate(
            "Be creative!", n_samples=5, temperature=1.5, max_tokens=2000, use_cache="sql", requests_per_minute=6000)
        body = self.server.requests[-1].body
        self.assertEqual((body["temperature"], body["max_tokens"]), (1.5, 2000))
        self.assertTrue(os.path.exists(os.path.join(".rollouts", "rollouts.sqlite3")))
        client.generate("Be creative!", top_p=0.99)
        body = self.server.requests[-1].body
        self.assertEqual((body["temperature"], body["top_p"]), (0.7, 0.99))
        self.assertFalse({"requests_per_minute", "use_cache", "n_samples"} & set(body))

    def test_configuration(self) -> None:
        config = rollouts.Config(
            model=MODEL, temperature=0.8, top_p=0.95, max_tokens=2000, presence_penalty=0.1, frequency_penalty=0.1)
        rollouts.RolloutsClient(**config.to_dict()).generate("Hello")
        body = self.server.requests[0].body
        self.assertEqual(body, {**body, "temperature": 0.8, "presence_penalty": 0.1, "frequency_penalty": 0.1})

    def test_progress_bar_settings(self) -> None:
        client = rollouts.RolloutsClient(MODEL, progress_bar=True)
        client.generate("Write a story", n_samples=5)
        client.generate("Quick answer", n_samples=1)
        client.generate("Silent generation", n_samples=10, progress_bar=False)
        self.assertEqual(self.errors.getvalue(), "")  # gone when it is done; no line in less than half a minute

    def test_verbose(self) -> None:
        rollouts.RolloutsClient(MODEL, verbose=True).generate("Hello")
        self.assertIn("seed 0", self.errors.getvalue())

    def test_caching(self) -> None:
        for kind in (True, "json", "sql"):
            with self.subTest(use_cache=kind):
                client = rollouts.RolloutsClient(model=MODEL, use_cache=kind, cache_dir=f"cache_{kind}")
                first, drawn = self.sent(client.generate, "What is 2+2?", n_samples=3)
                second, again = self.sent(client.generate, "What is 2+2?", n_samples=3)
                self.assertEqual((first, second), (3, 0))
                self.assertEqual(drawn.responses, again.responses)

    def test_layout_of_the_cache_and_entries_that_ended_in_an_error(self) -> None:
        client = rollouts.RolloutsClient(MODEL)
        client.generate("What is 2+2?", n_samples=2)
        found = {
            os.path.relpath(os.path.join(folder, name), ".rollouts").replace(os.sep, "/")
            for folder, _, names in os.walk(".rollouts") for name in names}
        self.assertEqual(
            {os.path.basename(path) for path in found}, {"request.json", "seed_00000.json", "seed_00001.json"})
        for path in found:
            self.assertRegex(path, r"^[^/]+/[^/]+/([0-9a-f]{3})/\1[0-9a-f]+/\w+\.json$")
        path = os.path.join(".rollouts", *next(path for path in found if path.endswith("seed_00001.json")).split("/"))
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        with open(path, "w", encoding="utf-8") as file:
            json.dump({**data, "finish_reason": "error"}, file)
        with self.assertWarns(UserWarning):
            sent, again = self.sent(client.generate, "What is 2+2?", n_samples=2)
        self.assertEqual((sent, again.get_finish_reasons()), (1, {"stop": 2}))

    def test_three_ways_to_give_a_key(self) -> None:
        rollouts.RolloutsClient(model=MODEL).generate("Environment")
        client = rollouts.RolloutsClient(model=MODEL, api_key="your-key-here")
        client.generate("Client")
        client.generate("Call", n_samples=1, api_key="different-key-here")
        self.assertEqual(
            [request.headers["authorization"] for request in self.server.requests],
            ["Bearer a-key", "Bearer your-key-here", "Bearer different-key-here"])
        for folder, _, names in os.walk("."):
            for name in names:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    self.assertNotIn("key-here", file.read())

    def test_logprobs_are_refused(self) -> None:
        with self.assertRaises(NotImplementedError):
            rollouts.RolloutsClient(model="openai/gpt-3.5-turbo", top_logprobs=5)
        for name, value in (("top_logprobs", 5), ("logprobs", True)):
            with self.subTest(name=name), self.assertRaises(NotImplementedError):
                rollouts.RolloutsClient(MODEL).generate("Hello", **{name: value})
        self.assertEqual(self.server.requests, [])

    def test_rate_limit(self) -> None:
        clock = Clock()
        with mock.patch.object(rollouts, "_clock", clock):
            client = rollouts.RolloutsClient(model=MODEL, requests_per_minute=60)
            client.generate("Hello", n_samples=61)
        self.assertEqual(len(self.server.requests), 61)
        self.assertGreaterEqual(sum(clock.slept), 60)


if __name__ == "__main__":
    unittest.main()
