"""split_sentences: nothing is lost, no prefix ends in a space, a sentence is what a reader takes for one."""

import json
import os
import random
import subprocess
import sys
import unittest

from tests import rollouts
from tests.case import slow

split_sentences = rollouts.split_sentences

# One row a text, by its parts: what the parts give together is the text.
TABLE = {
    "punctuation ends a sentence": (
        ["One."],
        ["One.", " Two!", " Three?", " Four"],
        ["Really?!", " Yes!!", " Good."],
        ["So n² ≡ 1.", " Ähnlich.", " Ещё."],
        ["It is so.", "\nNext line.", "\n  And one more."],
    ),
    "short pieces are sentences of their own": (
        ["Wait.", " Hmm.", " No.", " Yes!", " OK.", " Why?", " It is 8."],
        ["I see.", " 8.5 it is."],
    ),
    "mere fragments belong to the sentence before them": (
        ["It is 8. !!", " Then on."],
        ["It is 8. ---"],
        ["It is 8.\n\n---", "\n\nThen on."],
        ["It is 8. \n"],
        ["…"],
        ["?!"],
    ),
    "what closes behind a stop belongs to it": (
        ['He said "It works."', " Then he left."],
        ["(A note.)", " And on."],
        ["**It is 8.**", " _Really._", " Good."],
        ["“Ja.”", " ‘No!’", " [So it is.]", " On."],
        ['"Why?" he asked.', " On."],
    ),
    "a paragraph break ends a sentence, whatever stands before it": (
        ["A title", "\n\nIts text.", "\n\n\nMore"],
        ["So we have:", "\n\nx = 2,", "\n\nwhich is even."],
        ["First", " \n \t\nsecond"],
        ["First.", " \n\nSecond."],
        ["**Final Answer**", "\n\n\\boxed{8}"],
    ),
    "a line break alone does not": (
        ["a line\nand the next one."],
        ["x = 3\ny = 4\nso x + y = 7."],
    ),
    "an item of a list begins one": (
        ["We need:", "\n- an apple", "\n- a pear"],
        ["We need:", "\n* an apple", "\n  + a pear", "\n• a plum"],
        ["Steps:", "\n1. Count them.", " It is simple.", "\n2. Add them."],
        ["Steps:", "\n1) Count them.", "\n12) Add them."],
    ),
    "an abbreviation does not": (
        ["Primes, e.g. Two, are odd, i.e. Mostly.", " Good."],
        ["See Fig. 3, Eq. (2) and Thm. 4.", " Good."],
        ["Dr. Who and Mrs. Jones vs. Mr. X et al. Found it.", " Good."],
        ["The U.S. Senate has 100 seats.", " Good."],
        ["It is approx. 5 m, cf. No. 7.", " Good."],
        ["the derivative w.r.t. X of it.", " Good."],
        ["some x s.t. A holds, i.i.d. N(0, 1).", " Good."],
        ["See Sec. 4 and Prop. 2.", " Good."],
    ),
    "a decimal, a version or a name does not": (
        ["Pi is 3.14159, not 3.15.", " Good."],
        ["Python 3.11.2 is at python.org/3.11?x=1.2 now.", " Good."],
        ["Call x.append(3.) or file.txt.", " Good."],
    ),
    "an ellipsis does not": (
        ["Hmm... let me think... Right.", " Good."],
        ["Hmm… Let me think.", " Good."],
        ["1, 2, ..., 9 and so on .. to 12.", " Good."],
    ),
    "the number of an enumeration does not": (
        ["1. Count them.", " Good."],
        ["Good.", "\n\n2. Add them.", " Good."],
        ["Step 1. Count them.", " Step 2. Add them."],
        ["**Step 1.** Count them.", " Good."],
        ["Case 2. It is odd.", " Good."],
        ["a) Count them.", " b) Add them."],
    ),
    "a number or a letter at the end of a sentence is no enumeration": (
        ["The sum is 12.", " Then we add."],
        ["The roots are 1, 2, 3.", " Then we add."],
        ["It goes on with 5, 11, 995.", " That is all."],
        ["The points are A, B, C.", " Then D."],
        ["The answer: 42.", " Good."],
        ["The answer is B.", " Good."],
        ["Let x be 3.", " y is 4."],
    ),
    "a formula or code does not, whatever is in it": (
        ["We have $x = 2. Y$ and $y = 1.5$.", " Good."],
        ["So $$a = b. C = d! E$$ holds.", " Good."],
        ["So \\(x = 2. Y\\) and \\[z = 3. W\n\\] hold.", " Good."],
        ["Call `print. Then()` on it.", " Good."],
        ["It costs $5.", " That is $10 more.", " Good."],
        ["Here:\n```python\nx = 1. \n\n# Why? Yes.\n```", "\nGood."],
        ["Here:\n```\nx = 1. Y"],
    ),
    "a factorial does not": (
        ["So 5! = 120 and 5! / 3! > 4! + 1.", " Good."],
        ["So 5! × 3! is 4! - 1.", " Good."],
        ["So 10!/(3! 7!) = 120.", " Good."],
        ["It is n! · k! here.", " Good."],
        ["It is 5!", " So it is 120."],
    ),
    "a small letter goes on with the sentence": (
        ["We know that k = 2. so k is even.", " Good."],
        ['He cried "Stop!" and ran.', " Good."],
    ),
    "a full-width stop needs no space": (
        ["你好。", "再见！", "真的吗？", "好"],
        ["「你好。」", "再见。"],
    ),
    "the line after a displayed formula begins a sentence": (
        ["So the area is\n\\[\nA = \\pi r^2\n\\]", "\nPlugging in r = 3 gives 9π.", " Good."],
        ["We get\n$$\nx^2 - 5x + 6 = 0\n$$", "\nFactor it: (x-2)(x-3) = 0."],
        ["\\begin{align}\nx &= 1\\\\\ny &= 2\n\\end{align}", "\nThus x + y = 3."],
        ["Then\n\\[ a = b, \\]\nwhere b is the base.", " OK."],
        ["\\[ x = 1 \\]\n\\[ y = 2 \\]", "\n\nSo done."],
    ),
    "a formula that ends with a stop ends a sentence": (
        ["Thus $x = 5.$", " Then we go on."],
        ["It follows that \\[ n = 12. \\]", " Now check n = 12."],
        ["Is \\(x = 5?\\)", " Yes."],
        ["We use $x = 5.$ as a start.", " OK."],
        ["We use $x = 5$ Then.", " OK."],
    ),
    "a small letter that begins an equation or a call begins a sentence": (
        ["Since i >=1.", " dp[1]=dp[0]+1.", " dp[2] = 3."],
        ["I must compute ln(8666).", " ln(8000)=8.987.", " Good."],
        ["Set k = 3.", " sum = 12.", " mean <= 4.", " a1 = 2.", " cos x = 0.", " foo.bar() is called."],
        ["What is n?", " n is 5."],
        ["Use r = a > b ? a : b here.", " OK."],
    ),
    "a line that begins with < begins a sentence": (
        ["The head is closed.", "\n<body> opens next.", " Fine."],
        ["Look at the table.", "\n| a | b |"],
        ["It is n. < 5 holds.", " OK."],
    ),
    "an ellipsis after digits ends one before a capital": (
        ["Pi is 3.14159...", " So it is about 28.27…", " Round it."],
        ["It is 0.333... or so.", " OK."],
    ),
    "one stray backtick or dollar swallows nothing": (
        ["The character ` is odd.", " Then we use `foo` here.", " And done."],
        ["Type `foo and stop.", " Then call `bar()` again.", " Done."],
        ["It costs $5.", " Then he pays 3x$ more."],
        ["Call ```f(x)``` first.", " Then stop."],
    ),
    "an initial or the number of a page does not": (
        ["It was proved by J. Smith in 1990.", " Then it was used."],
        ["Robert J. Opper wrote it.", " So did J. R. Tolk and A.J. Brown.", " Yes."],
        ["See p. 5, pp. 7-9 and no. 12.", " Right.", " No.", " Yes."],
        ["At point P.", " The answer is B.", " Hence D."],
        ["He lives in the U.S.", " Then he moved."],
        ["Buy milk, eggs, etc.", " Then go home at 3 p.m.", " Good."],
    ),
    "the lines of one equation belong together, the items of a list do not": (
        ["S = 100\n+ 20\n- 3\n= 117", "\n\nSo 117."],
        ["Total = 5 * 4\n= 20\n= 2 * 10.", "\nYes."],
        ["x = 1 + 2\n\n= 3", "\n\nSo x is 3."],
        ["The roots are:", "\n- x = 2", "\n- x = -2"],
        ["Values:", "\n- 5", "\n- 7", "\n+ 3"],
        ["x = 3", "\n- Then add it."],
        ["Options:", "\nA. 12", "\nB. 15", "\n(a) n even", "\n(b) n odd"],
    ),
    "paragraphs may be those of Windows": (
        ["First", "\r\n\r\nSecond", "\r\n\r\nThird.", "\r\nFourth."],
    ),
    "other scripts have stops of their own": (
        ["यह सही है।", " अब आगे।"],
        ["یہ ٹھیک ہے۔", " اب آگے۔"],
        ["هل هذا صحيح؟", " نعم."],
        ["ﾊｲ｡", "ｿｳ｡"],
    ),
}

TRACE = (
    "Okay, so I need to find how many positive integers n < 1000 satisfy n^2 ≡ 1 (mod 24).", " Hmm, let me think.",
    " First, recall that 24 = 8 × 3.", " So by the CRT, I need n² ≡ 1 mod 8 and n² ≡ 1 mod 3.",
    "\n\nLet me start with mod 8.", " If n is odd, then n² ≡ 1 mod 8, i.e. every odd square is 1 mod 8.",
    " That's well known... wait, let me check: 1^2 = 1, 3^2 = 9 ≡ 1, 5^2 = 25 ≡ 1, 7^2 = 49 ≡ 1.", " Yes.",
    " OK, good.",
    "\n\nNow mod 3.", " n is not divisible by 3, so n ≡ 1 or 2 (mod 3).", " In both cases n² ≡ 1.", " Great!",
    "\n\nSo the condition is gcd(n, 6) = 1.", " How many such n are there below 1000?",
    " The density is φ(6)/6 = 2/6 = 1/3.", " So it's approx. 333.3, but we need to be exact.",
    "\n\nLet's count the numbers coprime to 6:", "\n1. n ≡ 1 (mod 6): that's 1, 7, ..., 997.",
    " So (997 - 1)/6 + 1 = 167.",
    "\n2. n ≡ 5 (mod 6): that's 5, 11, ..., 995.", " So (995 - 5)/6 + 1 = 166.",
    "\n\nThe total is 167 + 166 = 333.", "\n\nWait, is 1000 included?", ' No, "less than 1000" means n ≤ 999.',
    " Hmm, but 999 is divisible by 3.", " And 998 is even.", " So 997 is the last one.", " Wait, though.",
    " 995 = 5 · 199.",
    " Is it coprime to 6?", " Yes!", " 995 is odd, and 9+9+5 = 23, not divisible by 3.",
    "\n\nOr, by inclusion and exclusion: ⌊999/1⌋ - ⌊999/2⌋ - ⌊999/3⌋ + ⌊999/6⌋ = 999 - 499 - 333 + 166 = 333.",
    " Same answer.", "\n\nLet me verify it with a snippet in my head:",
    "\n\n```python\ncount = sum(1 for n in range(1, 1000) if n % 2 and n % 3)\nprint(count)  # 333? Yes.\n```",
    "\n\nThat gives \\(333\\).", " Therefore, $N = 333$.", " I'm confident.", "\n\n**Final Answer**",
    "\n\n\\boxed{333}")

PIECES = (
    "Wait", "x", "8", "3.14", "e.g.", "Dr.", "U.S.", "1.", "Step 2.", "n!", "a", "A", "def f():", "你好", "🦊",
    ".", "!", "?", "...", "…", "。", "！", "？", "?!", '"', "'", "”", "’", ")", "(", "]", "[", "*", "**", "_",
    "`", "```", "$", "$$",
    "\\(", "\\)", "\\[", "\\]", "\\boxed{", "}", "-", "- ", "* ", "•", "#", ">", "=", ":", ";", ",", "|", "\\",
    " ", " ", " ", "  ", "\n", "\n\n", "\n- ", "\n1. ", "\t", "\r\n", "\u00a0", "\u2028", "\u3000", "\x0b", "\x1c",
    "\u200b", "\x00", "\ud83d",
    "\n= ", "\n+ 3", "\n- 4", " x = 5", "\n\n= ", "`a", "f(x)", "J.", "Smith", "p.", " 5", " The", " foo.",
    "≤", "\n<", "$x = 5.$", "\n(a) ", "\\end{a}", "```\n", "```py\n", "।", "؟", "｡",
)

# What a model caught in a loop may write. A quadratic implementation takes minutes for 100,000 characters.
ENDLESS = [*"!.?$`\"'([{\\-=*#<\n 。…aA1"] + [
    "`a", "\\[ ", "\\( ", "$ ", "( ", ".\n", "a. ", "1. ", "\n- 3", "=\n- 3", "x = 1\n- 3", "a.\n\n-\n\n",
    "```\n", "$$ x", "$a. B", "\"! ", "。*", "``a ", "\\frac", "\\end{", "and so on, etc. and then ", "5! = 120, ",
    "x = 2. so ", ":   ",
]


class Sentences(unittest.TestCase):
    def test_table(self) -> None:
        for claim, rows in TABLE.items():
            for parts in rows:
                with self.subTest(claim, parts=parts):
                    self.assertEqual(split_sentences("".join(parts)), parts)

    def test_a_trace(self) -> None:
        """A thought as reasoning models write it."""
        self.assertEqual(split_sentences("".join(TRACE)), list(TRACE))

    def test_nothing_is_lost(self) -> None:
        """Of any text; and no prefix of sentences ends in white space, unless it is the whole."""
        for seed in range(3000):
            chance = random.Random(seed)
            text = "".join(chance.choices(PIECES, k=chance.randrange(1, 40)))
            parts = split_sentences(text)
            self.assertEqual("".join(parts), text, f"seed {seed}")
            self.assertTrue(all(parts), f"seed {seed}: an empty part in {parts!r}")
            for part in parts[:-1]:
                self.assertFalse(part[-1].isspace(), f"seed {seed}: {part!r} in {parts!r}")

    def test_nothing(self) -> None:
        self.assertEqual(split_sentences(""), [])
        for blank in (" ", "\n\n", " \n\t"):
            self.assertEqual(split_sentences(blank), [blank])

    def test_white_space_leads_what_follows(self) -> None:
        self.assertEqual(split_sentences("  One.  Two.\n\n  Three. "), ["  One.", "  Two.", "\n\n  Three. "])

    def test_a_prefix_is_cut_alike(self) -> None:
        """Of any text: its first parts together are cut into these parts again."""
        for seed in range(2000):
            chance = random.Random(seed)
            parts = split_sentences("".join(chance.choices(PIECES, k=chance.randrange(1, 40))))
            for i in range(1, len(parts)):
                self.assertEqual(split_sentences("".join(parts[:i])), parts[:i], f"seed {seed}")
        for i in range(len(TRACE)):
            self.assertEqual(split_sentences("".join(TRACE[:i])), list(TRACE[:i]))

    @slow
    def test_a_text_without_end(self) -> None:
        """In linear time: another process does it, and only a quadratic one meets the generous timeout."""
        source = (
            "import json, sys\n"
            "from tests import rollouts\n"
            "for piece in json.load(sys.stdin):\n"
            "    run = (piece * 100_000)[:100_000]\n"
            "    for text in (run, 'It is so. ' + run + ' Then on.'):\n"
            "        assert ''.join(rollouts.split_sentences(text)) == text, piece\n")
        # The modules are found from the directory above the tests.
        subprocess.run(
            [sys.executable, "-c", source], input=json.dumps(ENDLESS).encode(), timeout=300, check=True,
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


if __name__ == "__main__":
    unittest.main()
