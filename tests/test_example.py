"""`python example.py`, as a stranger runs it: without a key, from a fresh copy."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tests import rollouts
from tests.case import Case

EXAMPLE = Path(__file__).resolve().parent.parent / "example.py"
PLANTED = "But the leading digit 6 is 0110 in binary, and its first zero does not count."

# Refuses what is not this machine, even where a name would have to be resolved for it.
ONLY_LOOPBACK = """
import sys
def watch(event, arguments):
    address = arguments[1] if event == "socket.connect" else arguments[:1] if event == "socket.getaddrinfo" else None
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", "", None):
        print("not on this machine:", event, address, file=sys.stderr)
        raise OSError("not on this machine")
sys.addaudithook(watch)
"""


@unittest.skipUnless(EXAMPLE.exists(), "there is no example.py beside these tests")
class ExampleTest(Case):
    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.place, cls.temporary, hook = (Path(directory.name, name) for name in ("place", "temporary", "hook"))
        for folder in (cls.place, cls.temporary, hook):
            folder.mkdir()
        shutil.copy(EXAMPLE, cls.place)
        (hook / "sitecustomize.py").write_text(ONLY_LOOPBACK, encoding="utf-8")
        environment = {
            name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_BASE_URL"))}
        module = Path(rollouts.__file__).resolve().parent
        environment.update({
            "PYTHONPATH": os.pathsep.join(map(str, (hook, module))), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1",
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(cls.temporary)),
            "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"})
        cls.done = subprocess.run(
            [sys.executable, "-W", "error", "example.py"], cwd=cls.place, env=environment, timeout=60,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8")

    def test_every_function_runs(self) -> None:
        self.assertEqual(self.done.returncode, 0, self.done.stderr[-2000:])
        self.assertNotIn("failed:", self.done.stdout)
        for line in self.done.stderr.splitlines():  # nothing but what verbose says
            self.assertRegex(line, r"^rollouts: seed \d: ")
        shown = re.findall(r"^-- (\w+): .", self.done.stdout, re.MULTILINE)
        defined = re.findall(r"(?m)^def (\w+)\([^)]*\) -> None:\n    \"\"\"", EXAMPLE.read_text(encoding="utf-8"))
        self.assertEqual(shown, defined)
        self.assertGreater(len(shown), 12)

    def test_it_says_that_a_stand_in_answers(self) -> None:
        self.assertIn("stand-in", self.done.stdout.splitlines()[0])

    def test_the_planted_sentence_comes_out_on_top(self) -> None:
        self.assertIn(f"\nmost important: {PLANTED}\n", self.done.stdout)
        rows = re.findall(r"^ +(\d+\.\d\d) +([+-]\d+)%  (.{10})  (.*)$", self.done.stdout, re.MULTILINE)
        self.assertGreater(len(rows), 5)
        (_, change, bar, sentence), *others = sorted(rows, key=lambda row: -float(row[0]))
        self.assertTrue(PLANTED.startswith(sentence))
        self.assertEqual(bar, "#" * 10)
        self.assertGreater(int(change), 50)
        for _, _, bar, _ in others:
            self.assertLess(bar.count("#"), 5)

    def test_the_page_shades_the_planted_sentence_and_loads_nothing(self) -> None:
        named = re.findall(r"page for the browser: (.*\.html)$", self.done.stdout, re.MULTILINE)
        page = Path(named[0]).read_text(encoding="utf-8")
        shares = re.findall(r'<mark style="--share: ([\d.]+)"[^>]*>([^<]*)</mark>', page)
        self.assertEqual(max(shares, key=lambda mark: float(mark[0])), ("1.000", PLANTED))
        self.assertIn("prefers-color-scheme: dark", page)
        self.assertNotRegex(page, r"<script|<link|src=|https?:|@import")

    def test_nothing_is_left_but_the_page(self) -> None:
        self.assertEqual([path.name for path in self.place.iterdir()], ["example.py"])
        self.assertEqual([path.name for path in self.temporary.rglob("*") if path.is_file()], ["thought-anchors.html"])


if __name__ == "__main__":
    unittest.main()
