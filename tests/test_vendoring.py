"""The file alone, in a package, on the command line, and before a type checker."""

import ast
import contextlib
import importlib.util
import inspect
import io
import json
import os
import pydoc
import re
import shutil
import subprocess
import sys
import textwrap
import unittest
from pathlib import Path
from unittest import mock

from tests import rollouts
from tests.case import Case
from tests.server import Reply, Request, by_seed, chat

FILE = Path(rollouts.__file__).resolve()
PUBLIC = [  # what the contract lists, and nothing else
    "RolloutsClient", "create_client", "Config", "Rollouts", "Response", "Usage", "split_sentences",
    "RolloutsError", "APIError"]
SETTINGS = list(rollouts.Config("m").to_dict())

USER_SCRIPT = """
import asyncio
from typing import Any, Dict, List, Optional

from {module} import APIError, Config, Response, Rollouts, RolloutsClient, Usage, create_client, split_sentences


def answer(response: Response) -> Optional[str]:
    return response.reasoning


async def main(client: RolloutsClient) -> List[Rollouts]:
    return list(await asyncio.gather(client.agenerate("a", 2), client.agenerate("b", temperature=1.0)))


client = RolloutsClient("m", temperature=0.5, provider={{"only": ["x"]}}, min_p=0.1)
other: RolloutsClient = create_client("m", "creative", use_cache="sql")
settings: Dict[str, Any] = Config("m", top_k=5).to_dict()
with RolloutsClient(**settings) as third:
    rollouts: Rollouts = third.generate([{{"role": "user", "content": "Hello"}}], n_samples=3, seed=1, stop=["x"])
first: Response = rollouts[0]
some: List[Response] = rollouts[:2]
usage: Usage = rollouts.usage + rollouts.spent
cost: float = usage.cost
texts: List[str] = rollouts.get_texts() + split_sentences(first.full)
errors: List[APIError] = rollouts.errors
prefixes: List[Rollouts] = client.resample("question", first, 10, at=[0, 1], suffix="x")
for drawn in prefixes + client.generate_many(["a", "b"], 2) + asyncio.run(main(client)):
    for found, count in drawn.counts(answer).most_common():
        print(found, count + 1)
continues: bool = client.check_injection()
status: Optional[int] = errors[0].status
"""


def run(*arguments, cwd, code=None, stdin="", flags=("-I", "-B", "-W", "error"), environment=None):
    """Run Python on *code*, or on *arguments*, in *cwd*."""
    command = [sys.executable, *flags, *(["-c", textwrap.dedent(code)] if code else []), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, input=stdin, env=environment, timeout=60, capture_output=True, text=True, encoding="utf-8")


class Folder(Case):
    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(self.directory)

    def assert_runs(self, done):
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout


class Vendored(Folder):
    def test_alone_in_an_empty_folder(self) -> None:
        shutil.copy(FILE, self.folder / "rollouts.py")
        output = self.assert_runs(run(self.folder, self.serve().url, cwd=self.folder, code="""
            import sys
            sys.path.insert(0, sys.argv[1])
            import rollouts
            with rollouts.RolloutsClient("m", base_url=sys.argv[2], cache_dir="cache", progress_bar=False) as client:
                print([client.generate("Hello", 3, use_cache=kind).get_contents() for kind in ("json", "sql")])
            print(rollouts.__file__)
            """))
        texts, path = output.splitlines()
        self.assertEqual(ast.literal_eval(texts), [["answer 0", "answer 1", "answer 2"]] * 2)
        self.assertEqual(Path(path).resolve(), (self.folder / "rollouts.py").resolve())
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["cache", "rollouts.py"])

    def test_importing_needs_the_standard_library_alone(self) -> None:
        shutil.copy(FILE, self.folder / "rollouts.py")
        flags = ("-I", "-S", "-B", "-OO", "-W", "error")
        output = self.assert_runs(run(self.folder, cwd=self.folder, flags=flags, code="""
            import sys
            sys.path.insert(0, sys.argv[1])
            import rollouts
            late = {"sqlite3", "asyncio", "argparse"} & set(sys.modules)
            print(*late)  # what few scripts use is imported where it is used (-OO drops an assert)
            """))
        self.assertEqual(output.strip(), "")

    def test_in_a_package_beside_another_copy(self) -> None:
        vendor = self.folder / "package" / "_vendor"
        vendor.mkdir(parents=True)
        for folder in (vendor.parent, vendor):
            (folder / "__init__.py").write_text("", encoding="utf-8")
        shutil.copy(FILE, vendor / "rollouts.py")
        shutil.copy(FILE, self.folder / "rollouts.py")
        server = self.serve()
        self.assert_runs(run(self.folder, server.url, cwd=self.folder, code="""
            import logging, sys, warnings
            sys.path.insert(0, sys.argv[1])
            import rollouts
            from package._vendor import rollouts as vendored
            assert rollouts is not vendored and rollouts.Response is not vendored.Response
            names = []
            logging.getLogger().addHandler(type("Names", (logging.Handler,), {
                "emit": lambda self, record: names.append(record.name)})())
            logging.getLogger().setLevel(logging.DEBUG)
            drawn = []
            for module in (rollouts, vendored):
                with module.RolloutsClient("m", base_url=sys.argv[2], cache_dir="cache", progress_bar=False) as client:
                    drawn.append(client.generate("Hello", 3))
                    client.generate("Hello", use_cache=False)
            assert [response.cached for response in drawn[1]] == [True] * 3  # one cache, two copies
            assert drawn[0].to_dict()["responses"][0]["content"] == drawn[1].to_dict()["responses"][0]["content"]
            assert vendored.Response.from_dict(drawn[0][0].to_dict()).content == "answer 0"
            assert {name for name in names if "rollouts" in name} == {"rollouts", "package._vendor.rollouts"}, names
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                vendored.RolloutsClient("m", temprature=1)
            assert caught[0].filename == "<string>", caught[0].filename  # the caller's line, not ours
            """))
        self.assertEqual(server.seeds(), [0, 0, 0, 1, 2])

    def test_version_and_licence_are_inside(self) -> None:
        source = FILE.read_text(encoding="utf-8")
        self.assertRegex(source, r'(?m)^__version__ = "\d+\.\d+\.\d+"$')
        self.assertRegex(rollouts.__version__, r"^\d+\.\d+\.\d+$")
        self.assertIn("MIT licence", ast.get_docstring(ast.parse(source)) or "")
        self.assertIn("Copyright", ast.get_docstring(ast.parse(source)) or "")
        self.assertNotIn("importlib.metadata", source)

    def test_every_import_is_of_the_standard_library(self) -> None:
        if not hasattr(sys, "stdlib_module_names"):
            self.skipTest("Python 3.9 has no list of its modules")
        for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                self.assertIn(name.split(".")[0], sys.stdlib_module_names)


class Interface(Case):
    def test_all_is_the_public_list(self) -> None:
        self.assertEqual(sorted(rollouts.__all__), sorted(PUBLIC))
        for name in PUBLIC:
            with self.subTest(name=name):
                self.assertTrue(inspect.getdoc(getattr(rollouts, name)))

    def test_what_is_public_has_a_docstring(self) -> None:
        for owner in (rollouts.RolloutsClient, rollouts.Rollouts, rollouts.Response, rollouts.Usage, rollouts.Config):
            for name, member in vars(owner).items():
                if not name.startswith("_") and (callable(member) or isinstance(member, (property, classmethod))):
                    with self.subTest(name=f"{owner.__name__}.{name}"):
                        self.assertTrue(inspect.getdoc(member))

    def test_the_client_shows_its_settings_in_its_signature(self) -> None:
        parameters = inspect.signature(rollouts.RolloutsClient).parameters
        defaults = rollouts.Config("m").to_dict()
        self.assertEqual(list(parameters), SETTINGS)
        for name, parameter in parameters.items():
            with self.subTest(name=name):
                if name == "extra":
                    self.assertIs(parameter.kind, parameter.VAR_KEYWORD)
                elif name == "model":
                    self.assertIs(parameter.default, parameter.empty)
                else:
                    self.assertEqual((parameter.default, parameter.kind), (defaults[name], parameter.KEYWORD_ONLY))

    def test_the_signatures_of_the_contract(self) -> None:
        for function, names, defaults in (
            (rollouts.create_client, "model preset settings", {"preset": "balanced"}),
            (rollouts.RolloutsClient.generate, "self prompt n_samples overrides", {"n_samples": 1}),
            (rollouts.RolloutsClient.agenerate, "self prompt n_samples overrides", {"n_samples": 1}),
            (rollouts.RolloutsClient.generate_many, "self prompts n_samples overrides", {"n_samples": 1}),
            (rollouts.RolloutsClient.resample, "self prompt reasoning n_samples at suffix overrides",
             {"at": None, "suffix": ""}),
            (rollouts.RolloutsClient.check_injection, "self overrides", {}),
            (rollouts.RolloutsClient.close, "self", {}),
            (rollouts.split_sentences, "text", {}),
        ):
            with self.subTest(function=function.__name__):
                parameters = inspect.signature(function).parameters
                self.assertEqual(list(parameters), names.split())
                self.assertEqual({name: parameters[name].default for name in defaults}, defaults)

    def test_help_names_every_setting_with_its_default(self) -> None:
        text = pydoc.render_doc(rollouts, renderer=pydoc.plaintext)
        for name, default in rollouts.Config("m").to_dict().items():
            with self.subTest(name=name):
                self.assertRegex(text, rf"\b{name}: [\w'\"]")
                if name not in ("model", "extra"):
                    self.assertRegex(text, rf"{name}: .*default {re.escape(repr(default))}\.")

    def test_settings_read_as_attributes_and_are_fixed(self) -> None:
        client = rollouts.RolloutsClient("m")
        for name, value in rollouts.Config("m").to_dict().items():
            with self.subTest(name=name):
                self.assertEqual(getattr(client, name), value)
                with self.assertRaises(AttributeError):
                    setattr(client, name, value)


class Command(Folder):
    """python -m rollouts"""

    def command(self, *arguments, stdin="", **environment):
        kept = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_BASE_URL"))}
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        return run(
            "-m", rollouts.__name__, *arguments, cwd=self.folder, stdin=stdin, flags=("-B", "-W", "error"),
            environment={**kept, "PYTHONPATH": path, "PYTHONUTF8": "1", "NO_PROXY": "127.0.0.1", **environment})

    def test_a_json_line_for_each_response(self) -> None:
        def script(request: Request) -> Reply:
            return chat(f"“{request.seed}”\nsecond line", message={"reasoning": "thought"})

        server = self.serve(script)
        output = self.assert_runs(self.command(
            "Hello", "-n", 3, "--model", "m", "-s", "temperature=1.5", "-s", "max_tokens=50", "-s", "seed=7",
            "-s", 'provider={"only": ["x"]}', "-s", "stop=END", OPENROUTER_BASE_URL=server.url, OPENROUTER_API_KEY="k"))
        lines = [json.loads(line) for line in output.splitlines()]
        self.assertEqual([line["seed"] for line in lines], [7, 8, 9])
        self.assertEqual(lines[0]["full"], "thought</think>“7”\nsecond line")
        self.assertEqual(rollouts.Response.from_dict(lines[0]).content, "“7”\nsecond line")
        body = server.requests[0].body
        self.assertEqual((body["model"], body["temperature"], body["max_tokens"]), ("m", 1.5, 50))
        self.assertEqual((body["provider"], body["stop"]), ({"only": ["x"]}, "END"))
        self.assertTrue((self.folder / ".rollouts").is_dir())

    def test_the_prompt_from_standard_input(self) -> None:
        server = self.serve()
        self.assert_runs(self.command(
            "-", "--model", "m", "-s", f"base_url={server.url}", "-s", "use_cache=false",
            stdin="Two lines,\nand “quotes”"))
        self.assertEqual(server.requests[0].body["messages"], [{"role": "user", "content": "Two lines,\nand “quotes”"}])
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_cached_response_needs_no_key(self) -> None:
        server = self.serve()
        for key in ({"OPENROUTER_API_KEY": "k"}, {}):
            self.assert_runs(self.command("Hello", "--model", "m", OPENROUTER_BASE_URL=server.url, **key))
        self.assertEqual(len(server.requests), 1)

    def test_what_ends_it_is_said_on_stderr_without_a_traceback(self) -> None:
        refusing = self.serve(Reply(401, {"error": {"message": "No such key"}}))
        for arguments, code, words in (
            (("Hello", "--model", "m"), 1, "OPENROUTER_API_KEY"),
            (("Hello", "--model", "m", "-s", "provider=together"), 1, "TOGETHER_API_KEY"),
            (("Hello", "--model", "m", "-s", f"base_url={refusing.url}", "-n", 4), 1, "No such key"),
            (("Hello", "--model", "m", "-s", "temperature=9"), 2, "temperature takes a number from 0 to 2"),
            (("Hello", "--model", "m", "-n", 0), 2, "n_samples"),
            (("", "--model", "m"), 2, "prompt"),
            (("Hello", "--model", "m", "-s", "provider=nobody"), 2, "openrouter"),
            (("Hello",), 2, "--model"),
            (("Hello", "--model", "m", "--temperature", 1), 2, "--temperature"),
            (("Hello", "--model", "m", "-s", "temperature"), 2, "temperature"),
            (("Hello", "--model", "m", "-s", "use_cache=sqlite"), 2, "use_cache takes"),
            (("Hello", "--model", "m", "-s", "logprobs=true"), 2, "logprobs"),
        ):
            with self.subTest(arguments=arguments):
                done = self.command(*arguments)
                self.assertEqual((done.returncode, done.stdout), (code, ""))
                self.assertIn(words, done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_text_where_a_setting_takes_nothing_else(self) -> None:
        server = self.serve(chat())
        self.assert_runs(self.command(
            "Hello", "--model", "5", "-s", f"base_url={server.url}", "-s", "api_key=123", "-s", "cache_dir=7",
            "-s", "seed=null"))
        body = server.requests[0].body
        self.assertEqual((body["model"], server.requests[0].headers["authorization"]), ("5", "Bearer 123"))
        self.assertNotIn("seed", body)
        self.assertTrue((self.folder / "7").is_dir())

    def test_s_sets_the_model_too(self) -> None:
        server = self.serve()
        self.assert_runs(self.command(
            "Hello", "--model", "m", "-s", "model=other", "-s", f"base_url={server.url}"))
        self.assertEqual(server.requests[0].body["model"], "other")

    def test_offline(self) -> None:
        server = self.serve()
        self.assert_runs(self.command("Hello", "--model", "m", OPENROUTER_BASE_URL=server.url))
        done = self.command(
            "Hello", "--model", "m", "-n", 3, "-s", "offline=true", OPENROUTER_BASE_URL=server.url)
        self.assertEqual((done.returncode, done.stderr, len(done.stdout.splitlines())), (1, "", 1))
        self.assertEqual(len(server.requests), 1)

    def test_some_samples_failed(self) -> None:
        """What came is printed, and the exit code says that it is not all."""
        self.use_clock()
        server = self.serve(lambda request: Reply(503) if request.seed == 1 else by_seed(request))
        arguments = ["rollouts", "Hello", "--model", "m", "-n", "3", "-s", f"base_url={server.url}"]
        # The command's own private function: in a process of its own the eleven attempts would really wait.
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        with mock.patch.object(sys, "argv", arguments), \
                contextlib.redirect_stdout(io.StringIO()) as output, self.assertWarns(UserWarning):
            code = rollouts._main()
        self.assertEqual(code, 1)
        self.assertEqual([json.loads(line)["seed"] for line in output.getvalue().splitlines()], [0, 2])

    def test_help(self) -> None:
        output = self.assert_runs(self.command("--help"))
        for option in ("--n-samples", "--model", "-s NAME=VALUE", "_API_KEY", *SETTINGS):
            with self.subTest(option=option):
                self.assertIn(option, output)


@unittest.skipUnless(importlib.util.find_spec("mypy"), "mypy is not installed")
class Types(Folder):
    def test_strict(self) -> None:
        vendor = self.folder / "package" / "_vendor"
        vendor.mkdir(parents=True)
        for folder in (vendor.parent, vendor):
            (folder / "__init__.py").write_text("", encoding="utf-8")
        shutil.copy(FILE, vendor / "rollouts.py")
        script = self.folder / "script.py"
        script.write_text(USER_SCRIPT.format(module="package._vendor.rollouts"), encoding="utf-8")
        wrong = self.folder / "wrong.py"
        wrong.write_text(
            "from package._vendor.rollouts import RolloutsClient\n\n"
            "client = RolloutsClient('m')\nnumber: int = client.generate('Hello')\n", encoding="utf-8")
        done = run(
            "-m", "mypy", "--strict", "--config-file=", "--cache-dir", self.folder / "cache", "script.py", "wrong.py",
            "package", cwd=self.folder, flags=("-B",))
        lines = done.stdout.splitlines()
        self.assertEqual([line for line in lines if "error:" in line and not line.startswith("wrong.py:4:")], [])
        self.assertEqual(len([line for line in lines if line.startswith("wrong.py:4:")]), 1, done.stdout + done.stderr)


if __name__ == "__main__":
    unittest.main()
