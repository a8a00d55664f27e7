"""`python example.py`, as a stranger runs it: without a key, from a fresh copy; and its analysis by itself."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List
from unittest import mock

from tests import rollouts
from tests.case import PATIENCE, Case
from tests.server import Reply

EXAMPLE = Path(__file__).resolve().parent.parent / "example.py"
ASTRAY = "There are five of them, so 5 x 4 = 20 bits."
BACK = "But wait, zeros at the front do not count."

# Refuses what is not this machine, even where a name would have to be resolved for it.
ONLY_LOOPBACK = """
import sys
def watch(event, arguments):
    address = arguments[1] if event == "socket.connect" else arguments[:1] if event == "socket.getaddrinfo" else None
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", "", None):
        print("not on this machine:", event, address, file=sys.stderr, flush=True)
        raise OSError("not on this machine")
sys.addaudithook(watch)
"""


def load() -> Any:
    """example.py as a module, with the `rollouts` of these tests."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"rollouts": rollouts}):
        spec.loader.exec_module(module)
    return module


class Copy:
    """A fresh copy of example.py in a folder that cannot be written, and a folder for temporary files."""

    def __init__(self, directory: str) -> None:
        self.place, self.temporary, hook = (Path(directory, name) for name in ("place", "temporary", "hook"))
        for folder in (self.place, self.temporary, hook):
            folder.mkdir()
        shutil.copy(EXAMPLE, self.place)
        self.place.chmod(0o555)
        (hook / "sitecustomize.py").write_text(ONLY_LOOPBACK, encoding="utf-8")
        module = Path(rollouts.__file__).resolve().parent
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_BASE_URL"))},
            "PYTHONPATH": os.pathsep.join(map(str, (hook, module))), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1",
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.temporary))}

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-W", "error", "example.py", *arguments], cwd=self.place,
            env={**self.environment, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, encoding="utf-8")

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, **environment)
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@unittest.skipUnless(EXAMPLE.exists(), "there is no example.py beside these tests")
class ExampleTest(Case):
    """Without a key, with a proxy that does not exist."""

    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.copy = Copy(directory.name)
        cls.done = cls.copy.run(HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
        named = re.search(r"^The picture: (.*\.html)$", cls.done.stdout, re.MULTILINE)
        cls.path = Path(named[1]) if named else None
        cls.page = cls.path.read_text(encoding="utf-8") if cls.path else ""

    def test_it_runs_to_its_end_and_complains_of_nothing(self) -> None:
        self.assertEqual((self.done.returncode, self.done.stderr), (0, ""))

    def test_it_says_who_answers_and_how_many_requests_it_takes_before_it_sends_any(self) -> None:
        first, second, *_ = self.done.stdout.splitlines()
        self.assertIn("stand-in", first)
        most = re.findall(r"At most (\d+) requests", second)
        drawn = re.findall(r"^(\d+) of (\d+) samples were drawn now", self.done.stdout, re.MULTILINE)
        self.assertEqual((len(most), len(drawn)), (1, 1))
        self.assertEqual(*drawn[0])
        self.assertLessEqual(int(drawn[0][0]), int(most[0]))

    def test_the_planted_sentences_come_out_on_top(self) -> None:
        number = r" +([+-]?\d+)%"
        rows = re.findall(rf"^ *\d+ {number}{number}{number} +([\d.]+) +([\d.]+)  (.*)$", self.done.stdout, re.M)
        self.assertGreaterEqual(len(rows), 8)
        self.assertLessEqual(len(rows), 12)
        back, astray, *others = sorted(rows, key=lambda row: -float(row[4]))
        self.assertEqual((back[5], astray[5]), (BACK, ASTRAY))
        self.assertGreater(int(back[1]), 50)
        self.assertLess(int(astray[1]), -25)
        self.assertGreater(float(back[4]), 2 * float(astray[4]))
        for row in others:
            self.assertLess(float(row[4]), float(astray[4]) / 2)

    def test_the_picture_shades_the_planted_sentences(self) -> None:
        marks = re.findall(r'<mark id="s(\d+)" tabindex="0" class="(up|down)" [^>]*--shade: ([\d.]+);[^>]*>([^<]*)<',
                           self.page)
        self.assertEqual([int(number) for number, *_ in marks], list(range(1, len(marks) + 1)))
        back, astray, *others = sorted(marks, key=lambda mark: -float(mark[2]))
        self.assertEqual(back[1:], ("up", "1.00", BACK))
        self.assertEqual((astray[1], astray[3]), ("down", ASTRAY))
        for *_, shade, _ in others:
            self.assertLess(float(shade), float(astray[2]) / 2)
        self.assertIn(f"Sentence {back[0]} matters most", self.page)

    def test_the_picture_has_the_answers_of_each_sentence(self) -> None:
        cards = re.findall(r'<span class="card"><b>Sentence (\d+): importance [\d.]+, base [\d.]+</b>(.*?)</mark>',
                           self.page)
        self.assertEqual(len(cards), self.page.count('tabindex="0"'))
        for number, card in cards:
            with self.subTest(sentence=number):
                labels = re.findall(r"([\w ]+)<i style=\"--right: [\d.]+\"></i>", card)
                self.assertEqual(labels, ["with it", "without it", "something else there", "forced after it",
                                          "forced before it"])
                kept, resampled = re.findall(r"<span>([^<]*)</span>", card)[:2]
                for counts in (kept, resampled):
                    self.assertEqual(sum(map(int, re.findall(r"×(\d+)", counts))), 100)

    def test_the_picture_loads_nothing_and_is_dark_where_that_is_preferred(self) -> None:
        self.assertNotRegex(self.page, r"<script|<link|src=|https?:|@import|url\(")
        self.assertIn("color-scheme: light dark", self.page)
        self.assertIn('name="viewport"', self.page)

    def test_nothing_is_left_but_the_picture_and_the_cache(self) -> None:
        self.assertEqual([path.name for path in self.copy.place.iterdir()], ["example.py"])
        assert self.path is not None
        self.assertEqual(list(self.copy.temporary.iterdir()), [self.path.parent])
        self.assertEqual(sorted(path.name for path in self.path.parent.iterdir()), ["cache", "thought_anchors.html"])


@unittest.skipUnless(EXAMPLE.exists(), "there is no example.py beside these tests")
class WithAKey(Case):
    def setUp(self) -> None:
        super().setUp()
        self.copy = Copy(self.directory)

    def test_it_asks_what_the_key_is_for_and_the_second_run_pays_nothing(self) -> None:
        example = load()
        server = self.serve(lambda request: Reply(body=example.reply(request.body)))
        folder = Path(self.directory, "results")
        settings: Dict[str, str] = {"OPENROUTER_API_KEY": "a-key", "OPENROUTER_BASE_URL": server.url}
        first = self.copy.run(str(folder), **settings)
        self.assertEqual((first.returncode, first.stderr), (0, ""))
        self.assertNotIn("stand-in server", first.stdout)
        total = len(server.requests)
        self.assertIn(f"\n{total} of {total} samples were drawn now", first.stdout)
        self.assertLessEqual(total, int(re.findall(r"At most (\d+) requests", first.stdout)[0]))
        self.assertLess(total, 300)
        for request in server.requests:
            self.assertEqual(request.headers["authorization"], "Bearer a-key")
            self.assertEqual(request.body["model"], example.MODEL)
            self.assertLessEqual(request.body["max_tokens"], 4000)
        forced = [each for each in server.requests if each.body["messages"][-1]["content"].endswith("\\boxed{")]
        self.assertEqual(len(forced), (total - 1) // 2)
        page = folder / "thought_anchors.html"
        self.assertTrue(first.stdout.endswith(f"\nThe picture: {page}\n"))
        drawn = page.read_text(encoding="utf-8")

        second = self.copy.run(str(folder), **settings)
        self.assertEqual((second.returncode, second.stderr), (0, ""))
        self.assertIn(f"\n0 of {total} samples were drawn now, for $0.000.", second.stdout)
        self.assertEqual(len(server.requests), total)
        self.assertEqual(page.read_text(encoding="utf-8"), drawn)
        self.assertEqual(list(self.copy.temporary.iterdir()), [])

    def test_it_asks_openrouter(self) -> None:
        process = self.copy.start(OPENROUTER_API_KEY="a-key")
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)  # it would try again and again
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        self.addCleanup(timer.cancel)
        assert process.stderr is not None
        refused = process.stderr.readline()
        self.assertIn("not on this machine: socket.getaddrinfo ('openrouter.ai',", refused)


@unittest.skipUnless(EXAMPLE.exists(), "there is no example.py beside these tests")
class Analysis(Case):
    def setUp(self) -> None:
        super().setUp()
        self.example = load()

    def step(self, text: str = "a", **answers: Dict[Any, int]) -> Any:
        names = ("kept", "resampled", "different", "forced", "forced_before")
        return self.example.Step(text, *(Counter(answers.get(name, {"19": 8})) for name in names))

    def test_the_answer_is_the_whole_number_of_the_last_box(self) -> None:
        for text, answer in (
            ("It is \\boxed{19}.", "19"), ("\\boxed{119}", "119"), ("\\boxed{20}, no: \\boxed{19}", "19"),
            ("\\boxed{\\text{19}}", "19"), ("\\boxed{19\\text{ digits}}", "19"), ("\\boxed{ 19 }", "19"),
            ("It is 19.", None), ("\\boxed{} of 19", None), ("\\boxed{none} of 19", None), ("", None),
        ):
            with self.subTest(text=text):
                self.assertEqual(self.example.answer(rollouts.Response(text)), answer)
        for text, answer in (("19}.", "19"), ("119}", "119"), ("19", "19"), ("}", None), ("", None)):
            with self.subTest(forced=text):
                self.assertEqual(self.example.forced_answer(rollouts.Response(text)), answer)

    def test_what_differs(self) -> None:
        sentence = " Each hexadecimal digit is four bits."
        for text, differs in (
            (sentence, False), ("Each digit is four bits. And now for something else.", False),
            (" Or look at the value in decimal.", True), ("\n\nWait, zeros do not count.", True),
            ("</think>It is 19.", True),
        ):
            with self.subTest(text=text):
                self.assertEqual(self.example.differs(text, sentence), differs)
        self.assertFalse(self.example.differs("", sentence))  # nothing came: nothing else was said

    def test_the_divergence(self) -> None:
        kl = self.example.kl_divergence
        even, right, wrong = Counter({"19": 4, "20": 4}), Counter({"19": 8}), Counter({"20": 8})
        self.assertEqual(kl(even, even), 0)
        self.assertAlmostEqual(kl(right, wrong), 8 / 9 * 2.833213, 5)  # (8.5 - 0.5) / 9 · ln(8.5 / 0.5)
        self.assertLess(kl(even, right), kl(wrong, right))
        self.assertGreater(kl(Counter({None: 8}), right), 1)  # no answer is an answer too
        self.assertEqual(kl(Counter(), Counter()), 0)

    def test_few_that_differ_make_no_importance(self) -> None:
        wrong: List[float] = [self.step(different={"20": n}).importance for n in (0, 4, 5, 8)]
        self.assertEqual(wrong[:2], [0, 0])
        self.assertGreater(wrong[2], 1)
        self.assertGreater(wrong[3], wrong[2])

    def test_a_long_thought_is_cut_into_few_parts_and_loses_nothing(self) -> None:
        for n in (1, 11, 12, 13, 25, 150):
            with self.subTest(sentences=n):
                thought = " ".join(f"This is sentence {i}." for i in range(n))
                parts = self.example.cut(thought)
                self.assertEqual("".join(parts), thought)
                self.assertLessEqual(len(parts), 12)
                self.assertEqual(len(parts) == n, n <= 12)
        with self.assertRaisesRegex(SystemExit, "no thought"):
            self.example.cut("")

    def test_the_picture_escapes_all_text(self) -> None:
        evil = "<script>alert('&amp;')</script>"
        steps = [self.step(f"{space}{evil} $x", kept={evil: 3, None: 1}) for space in ("", " ", "\n\n")]
        with mock.patch.multiple(self.example, QUESTION=evil, CORRECT=evil):
            page = self.example.as_html(steps, evil)
        self.assertNotIn("<script", page)
        escaped = "&lt;script&gt;alert(&#x27;&amp;amp;&#x27;)&lt;/script&gt;"
        self.assertEqual(page.count(f"{escaped} $x"), 3)
        self.assertEqual(page.count(escaped), 3 + 3 + 3)  # texts, counts, and the head of the page
        self.assertIn("none\u00a0×1", page)
        self.assertIn("\n\n<mark", page)

    def test_where_nothing_was_measured_nothing_is_said_to_matter(self) -> None:
        page = self.example.as_html([self.step(different={})], "m")
        self.assertIn("No sentence stands out.", page)


if __name__ == "__main__":
    unittest.main()
