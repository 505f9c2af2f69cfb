"""Dialects as text: rules and their reference, compel's own parser, round trips, chunks, tables, what is said."""

import json
from copy import copy

import pytest
import torch
from compel.prompt_parser import Blend, CrossAttentionControlSubstitute, PromptParser
from hypothesis import example, given
from hypothesis import settings as limited
from hypothesis import strategies as st
from prompt_rules import BREAK, at_step, by_chance, letters
from pyparsing import ParserElement
from safetensors.torch import save_file
from tiny_pairs import SCENES, scenes

import ldm
from ldm.cli import main
from ldm.errors import LDMError
from ldm.lab.trace import texts_at, words_of, words_told
from ldm.text.prompts import DIALECTS, a1111, check_dialect, compel, schedules
from ldm.text.prompts.chunks import by_sentences, in_chunks
from ldm.text.prompts.notices import notices
from ldm.text.prompts.phrases import MOST, Phrase
from ldm.text.prompts.table import tokens_of
from ldm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded model's, in which "red", "house" and the like are one token each."""
    if not (SCENES / "tokenizer").is_dir():
        pytest.skip(f"there is no tokenizer in {SCENES}")
    return Tokenizer.from_folder(SCENES / "tokenizer")


# ------------------------------------------------------------------------------------------ a1111: weights

WEIGHTS = {  # as the web UI's own page and its source's examples have them
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    "un)balanced": [("un)balanced", 1)],
    r"\(literal\]": [("(literal]", 1)],
    r"a \\ b\c": [("a \\ bc", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "((a)) [b] [[c]]": [("a", 1.21), (" ", 1), ("b", 1 / 1.1), (" ", 1), ("c", 1 / 1.21)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "(a (b:2) c:0.5)": [("a ", 0.5), ("b", 1), (" c", 0.5)],
    "(a: 1.5 ) (b:-1) (c:+.5)": [("a", 1.5), (" ", 1), ("b", -1), (" ", 1), ("c", 0.5)],
    "(a:1.2.3) (b:1e999) (c:9999)": [("a:1.2.3", 1.1), (" ", 1), ("b:1e999", 1.1), (" ", 1), ("c:9999", 1.1)],
    "(((a:900):900):900)": [("a", MOST)],
    "a:1.2) b": [("a:1.2) b", 1)],
    "[a:1.2)]": [("a:1.2)", 1 / 1.1)],
    "(a b": [("a b", 1.1)],
    "": [],
    "()": [],
}  # fmt: skip


@pytest.mark.parametrize("text", WEIGHTS)
def test_weights_are_those_of_the_rules(text):
    (section,) = a1111.parse(text)
    assert [phrase.text for phrase in section] == [text for text, _ in WEIGHTS[text]]
    assert [phrase.weight for phrase in section] == pytest.approx([weight for _, weight in WEIGHTS[text]], rel=1e-12)


def test_breaks_cut_and_brackets_go_on_behind_them():
    assert a1111.parse("a  BREAK b") == ((Phrase("a"),), (Phrase("b"),))
    assert a1111.parse("(a BREAK b:1.5) c") == ((Phrase("a", 1.5),), (Phrase("b", 1.5), Phrase(" c")))
    assert a1111.parse("BREAK,BREAKs") == ((), (Phrase(",BREAKs"),))


def test_weights_equal_a_reference_of_the_rules():
    seen = set()
    for text in by_chance(400, seed=1):
        ours = []
        for k, section in enumerate(a1111.parse(text)):
            ours += [(BREAK, 1.0)] * (k > 0)
            ours += [(letter, phrase.weight) for phrase in section for letter in phrase.text]
        expected = letters(text)
        assert [letter for letter, _ in ours] == [letter for letter, _ in expected], text
        for (letter, weight), (_, other) in zip(ours, expected, strict=True):
            assert letter == BREAK or weight == pytest.approx(other, rel=1e-9), text
        seen |= {round(weight, 3) for _, weight in ours}
    assert len(seen) > 25  # the prompts weigh


# ------------------------------------------------------------------------------------------ a1111: stages

STAGES = {  # of 10 steps: {the last step: the text}
    "test": {10: "test"},
    "a [b:3]": {3: "a ", 10: "a b"},
    "a [b: 3 ]": {3: "a ", 10: "a b"},
    "a [[[b]]:2]": {2: "a ", 10: "a [[b]]"},
    "[(a:2):3]": {3: "", 10: "(a:2)"},
    "a [b : c : 1] d": {1: "a b  d", 10: "a  c  d"},
    "a[b:[c:d:2]:1]e": {1: "abe", 2: "ace", 10: "ade"},
    "a [unbalanced": {10: "a [unbalanced"},
    "a [b:.5] c": {5: "a  c", 10: "a b c"},
    "a [b::0.35]": {3: "a b", 10: "a "},
    "[a:b:1.0]": {10: "a"},
    "[a:b:1]": {1: "a", 10: "b"},
    "[a:b:0]": {10: "b"},
    "[a:b:-3] [c:d:1e2]": {10: "b c"},
    "((a][:b:c [d:3]": {3: "((a][:b:c ", 10: "((a][:b:c d"},
    "[a:b:c:3] [d:e:x]": {10: "[a:b:c:3] [d:e:x]"},
    r"[a\:b:c\]:4]": {4: r"a\:b", 10: r"c\]"},
    "a | [b:3]": {10: "a | [b:3]"},
    "[b:3] \\": {10: "[b:3] \\"},
    "(a [b:3]:1.2)": {3: "(a :1.2)", 10: "(a b:1.2)"},
}


@pytest.mark.parametrize("prompt", STAGES)
def test_stages_are_those_of_the_rules(prompt):
    found = schedules.stages(prompt, 10)
    assert {stage.last: stage.text for stage in found} == STAGES[prompt]
    assert [stage.first for stage in found] == [1, *(stage.last + 1 for stage in found[:-1])]


def test_alternatives_take_turns():
    assert [stage.text for stage in schedules.stages("[fe|]male", 5)] == ["female", "male"] * 2 + ["female"]
    assert [stage.text for stage in schedules.stages("[a|(b:1.1)|c]", 4)] == ["a", "(b:1.1)", "c", "a"]
    inner = schedules.stages("[[a|b]:c:3]", 5)
    assert [(stage.last, stage.text) for stage in inner] == [(1, "a"), (2, "b"), (3, "a"), (5, "c")]


def test_stages_equal_a_reference_of_the_rules():
    changing = 0
    for prompt in by_chance(400, seed=2):
        nodes = schedules.parse(prompt)
        texts = [schedules.text_at(nodes, step, 7) for step in (1, 2, 3, 4, 7)]
        assert texts == [at_step(prompt, step, 7) for step in (1, 2, 3, 4, 7)], prompt
        changing += len(set(texts)) > 1
    assert changing > 60


# ------------------------------------------------------------------------------------------ compel

COMPEL = [  # beside those by chance
    "a red++ house-- on snow", "(a (red)+ house)0.7, at night.", '"a fish"1.3 (b, c)- well-known -3 a+b',
    "a\\+ (b\\(c\\))++ \\\"d\\\"", "(a).attend(1.4) b.attend(---) (c) + d++e f+,g", "(a=b)+ (a\\=b)+ (c.d)+ (e",
    '("a cat", "a (dog)+").blend(0.7, 0.3)', '("a cat", "a dog", c+).blend(1, 2, -1, no_normalize)',
    '("a cat, b=c", "a (dog)+").and(1, 0.5) and more', '("a", "b").add()', "a cat.swap(a (dog)+ x, s_start=0.1) b",
    "(a (b.swap(c)) d)0.5", "withLora(x, 0.5) a useLora(y) cat", "((a)+ b)+)", "a,b,,c (d,e)-", "", "  ", "é+ 猫--",
    '(a "b c"+ d)1.2', "(a)1.2b (c).5 (d)-1 (e)+1",
    '("a", "b").blend(1)', '("a", "b").blend(1, -1)', '"', "()", "()0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def library():
    """compel's parser; with a memory, for without one each bracket within a bracket takes it five times as long."""
    ParserElement.enable_packrat(cache_size_limit=None)
    yield PromptParser()
    ParserElement.disable_memoization()


def compel_says(parser, prompt):
    """What the library makes of a prompt: [(the phrases of each text, their weights, its own weight)], or None."""

    def phrases(flat):
        found = []
        for each in flat.children:
            found += each.original if isinstance(each, CrossAttentionControlSubstitute) else [each]
        return tuple((each.text, each.weight) for each in found)

    try:
        parsed = parser.parse_conjunction(prompt)
    except Exception:
        return None
    found = []
    for each, weight in zip(parsed.prompts, parsed.weights, strict=True):
        texts, shares = ((each,), (1.0,)) if not isinstance(each, Blend) else (each.prompts, each.weights)
        if isinstance(each, Blend) and each.normalize_weights:
            if not sum(shares):
                return None
            shares = [share / sum(shares) for share in shares]
        found.append((tuple(map(phrases, texts)), tuple(shares), weight))
    return found or [(((("", 1.0),),), (1.0,), 1.0)]


def compel_prompts(count, seed):
    from random import Random

    chance = Random(seed)
    bits = 'a|cat|red|b-c|1|.5|1.3|-|--|+|++|(|)|"|,|.| | |\\(|\\)|\\"|\\+|=|.attend(|.swap(|é|)1.2|)+|)-|withLora(x)'
    whole = 'a (b)+ c|x|"q r"++|(big cat)1.3|(a, b.)0.5|dog+|c.swap(d)|(n (m)+)0.8|("a", "b+").blend(1,3)'
    made = []
    while len(made) < count:
        words = (bits if chance.random() < 0.7 else whole).split("|")
        prompt = chance.choice(["", " "]).join(chance.choice(words) for _ in range(chance.randint(1, 11)))
        made += [prompt] * (prompt.count("(") < 5)
    return made


def test_compel_is_parsed_as_its_library_does(library):
    refused = 0
    for prompt in COMPEL + compel_prompts(230, seed=3):
        parsed = compel.parse(prompt)
        expected = compel_says(library, prompt)
        if expected is None:
            refused += 1
            assert any("is read as words" in line for line in parsed.notices), prompt
            continue
        ours = [
            (tuple(tuple((p.text, p.weight) for p in text) for text in mix.texts), mix.weights, weight)
            for mix, weight in zip(parsed.mixes, parsed.weights, strict=True)
        ]
        assert ours == expected, prompt
    assert 3 < refused < 60


# ------------------------------------------------------------------------------------------ any string

SIGNS = st.sampled_from(
    ["(", ")", "[", "]", ":", "|", "\\", '"', "+", "-", ",", ".", "1.2", "BREAK", ".and(", "(a:", " "]
)
ANYTHING = st.lists(st.text(max_size=5) | SIGNS, max_size=25).map("".join)


@limited(max_examples=120, deadline=None)
@example('"\n"')
@given(ANYTHING)
def test_any_string_is_parsed_and_written_back(prompt):
    sections = a1111.parse(prompt)
    assert a1111.parse(a1111.write(sections)) == sections
    nodes = schedules.parse(prompt)
    assert schedules.write(nodes) == prompt and schedules.parse(schedules.write(nodes)) == nodes
    parsed = compel.parse(prompt)
    assert compel.parse(compel.write(parsed)).nodes == parsed.nodes
    weights = [p.weight for section in sections for p in section]
    weights += [p.weight for mix in parsed.mixes for text in mix.texts for p in text]
    assert all(-MOST <= weight <= MOST for weight in weights)


@pytest.mark.parametrize(
    "prompt", ["(" * 20000, "[" * 600 + "a" + ":b:3]" * 600, "a" + "+" * 5000, "(a" * 600, '"' * 999]
)
def test_no_prompt_is_too_deep(prompt):
    for parsed in (a1111.parse(prompt), schedules.stages(prompt, 3), compel.parse(prompt)):
        assert parsed


# ------------------------------------------------------------------------------------------ chunks


def counted(tokenizer, prompt):
    return [
        [token.piece.removesuffix("</w>") for token in chunk] for chunk in in_chunks(tokenizer, a1111.parse(prompt))
    ]


def test_chunks_are_full_and_a_comma_takes_what_is_behind_it_along(tokenizer):
    assert [len(chunk) for chunk in counted(tokenizer, "red " * 160)] == [75, 75, 10]
    assert [len(chunk) for chunk in counted(tokenizer, "red " * 75)] == [75]
    for behind, first in ((1, 75), (2, 74), (20, 56), (21, 75), (30, 75)):  # the comma, and what is behind it, up to 75
        before = "red " * (75 - behind) + ", " + "house " * 40
        chunks = counted(tokenizer, before)
        assert len(chunks[0]) == first and sum(map(len, chunks)) == 75 - behind + 41, behind
    # A comma as the 76th token begins the next chunk, and isn't remembered there.
    assert [len(chunk) for chunk in counted(tokenizer, "red " * 75 + ", " + "house " * 80)] == [75, 75, 6]


def test_breaks_end_chunks_and_weights_cross_their_borders(tokenizer):
    assert counted(tokenizer, "red BREAK house") == [["red"], ["house"]]
    assert counted(tokenizer, "BREAK red BREAK") == [[], ["red"]]
    assert counted(tokenizer, "red BREAK BREAK house") == [["red"], [], ["house"]]
    assert counted(tokenizer, "") == [[]]
    first, second = in_chunks(tokenizer, a1111.parse("red " * 70 + "(" + "house " * 10 + ":1.5) snow"))
    assert [token.weight for token in first] == [1.0] * 70 + [1.5] * 5
    assert [token.weight for token in second] == [1.5] * 5 + [1.0]


def test_a_learnt_word_is_not_torn(tokenizer):
    size = len(tokenizer)
    knows = tokenizer.with_words({"<toy>": range(size, size + 3)})
    first, second = in_chunks(knows, a1111.parse("red " * 73 + "<toy> house"))
    assert len(first) == 73 and [token.id for token in second[:3]] == [size, size + 1, size + 2]
    first, second = in_chunks(knows, a1111.parse("red " * 72 + "<toy> house"))
    assert len(first) == 75 and len(second) == 1
    # The comma of a chunk that a learnt word has ended early is none of the next one's.
    told = in_chunks(knows, a1111.parse("red " * 60 + ", " + "red " * 13 + "<toy> " + "house " * 80))
    assert [len(chunk) for chunk in told] == [74, 75, 8]
    (word,) = [each for each in words_of(knows, "a <toy> house") if "<toy>" in each.text]
    assert word.tokens == (2, 3, 4)


def test_compels_chunks_end_with_sentences(tokenizer):
    def sizes(text):
        return [len(chunk) for chunk in by_sentences(tokenizer, [Phrase(text)])]

    assert sizes("red " * 20 + ". " + "red " * 30 + ". " + "house " * 40) == [52, 40]
    assert sizes("red " * 20 + ". " + "red , " * 30 + "house ") == [
        21,
        61,
    ]  # a full stop counts more than a nearer comma
    assert sizes("red " * 20 + ", " + "house " * 70) == [21, 70] and sizes("red " * 80) == [75, 5] and sizes("") == [0]


# ------------------------------------------------------------------------------------------ what is shown and said


def test_a_table_tells_every_token(tokenizer):
    found = tokens_of(tokenizer, "a (red:1.3) house [on snow:at night:0.5]", "a1111", steps=4)
    assert [(stage.steps, stage.text) for stage in found.stages] == [
        ((1, 2), "a (red:1.3) house on snow"),
        ((3, 4), "a (red:1.3) house at night"),
    ]
    text = str(found)
    assert (
        "steps 1 to 2 of 4: a (red:1.3) house on snow" in text
        and f" 2 red</w>         {tokenizer.ids['red</w>']} 1.3" in text
    )
    told = json.loads(json.dumps(found.to_json()))["stages"][1]["encoders"][0]
    assert told["parts"][0]["chunks"][0][1] == {
        "position": 2, "piece": "red</w>", "id": tokenizer.ids["red</w>"], "weight": 1.3
    }  # fmt: skip
    turns = tokens_of(tokenizer, "[red|blue]", "a1111", steps=9)
    assert "steps 1, 3, 5, 7, 9 of 9: red" in str(turns) and len(turns.stages) == 2
    for width in (80, 200):
        assert max(map(len, tokens_of(tokenizer, "a red house, " * 60, "a1111").lines(width))) <= width
    blend = str(tokens_of(tokenizer, '("red", "house").blend(1, 3)', "compel"))
    assert "prompt 2 of .blend(), share 0.75" in blend and "chunk 2 of 2" in blend


def test_two_encoders_and_what_is_cut_are_told(tokenizer):
    other = copy(tokenizer)
    other.pad_id = 0
    text = str(tokens_of({"text_encoder": tokenizer, "text_encoder_2": other}, "red " * 80))
    assert "cut off, 5 tokens: red red red red red" in text
    assert "text_encoder_2: 75 tokens in 1 chunk, the same as text_encoder but for the padding, 0" in text


@scenes
def test_the_command_prints_the_tokens(capsys, tmp_path):
    assert main(["tokens", "a (red:1.3) [house|fish] AND", "--dialect", "a1111", "--steps", "3"]) == 0
    found = capsys.readouterr()
    assert "steps 1, 3 of 3: a (red:1.3) house AND" in found.out and found.err.startswith("AND is read as a word")
    assert main(["tokens", "a red house", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [token["piece"] for token in told["stages"][0]["encoders"][0]["parts"][0]["chunks"][0]][1] == "red</w>"
    save_file({"<toy>": torch.randn(3, 128)}, tmp_path / "toy.safetensors")
    assert main(["tokens", "a <toy> house", "--embedding", str(tmp_path / "toy.safetensors")]) == 0
    assert "3 <toy>_1 673 | 5 house</w>" in " ".join(capsys.readouterr().out.split())
    assert main(["tokens", "a", "--dialect", "webui"]) == 2
    assert "--dialect must be plain or a1111 or compel, not 'webui'" in capsys.readouterr().err


SAID = {
    ("a (red:1.3) house", "plain"): "'(red:1.3)' is read as it stands; dialect='a1111'",
    ("a red++ house", "plain"): "'red++' is read as it stands; dialect='compel'",
    ("a (red house)1.4", "plain"): "')1.4' is read as it stands; dialect='compel'",
    ("a house BREAK a fish", "plain"): "'BREAK' is read as it stands; dialect='a1111'",
    ("a [red:blue:0.5] house", "plain"): "'[red:blue:0.5]' is read as it stands; dialect='a1111'",
    ("red " * 76, "plain"): "Longer prompts are read in chunks with dialect='a1111'",
    ("a <lora:x:0.8> fish", "plain"): "'<lora:x:0.8>' is read as words: add a LoRA to the model",
    ("a <lora:x:0.8> fish", "a1111"): "'<lora:x:0.8>' is read as words: add a LoRA to the model",
    ("a cat AND a dog", "a1111"): "AND is read as a word",
    ("a [b:c:3] | d", "a1111"): "The prompt is the same at every step",
    ("a cat.swap(dog)", "compel"): "compel's .swap() is not done",
    ("withLora(x) a cat", "compel"): "A LoRA in the prompt is not read",
    ('("a", "b").and() tail', "compel"): "What stands behind .and() is not read: 'tail'",
    ('("a", "b").blend(1)', "compel"): "The prompt is read as words, without weights",
    ("((masterpiece)), a fish", "plain"): "'((masterpiece))' is read as it stands; dialect='a1111'",
    ("((a)+ b)1.2", "plain"): "')+' is read as it stands; dialect='compel'",
    ("[ugly] house", "plain"): "'[ugly]' is read as it stands; dialect='a1111'",
    ("red+ house", "plain"): "'red+' is read as it stands; dialect='compel'",
    ("red++ house", "a1111"): "'red++' is read as it stands; dialect='compel'",
    ("a (house)1.3", "a1111"): "')1.3' is read as it stands; dialect='compel'",
    ('("a", "b").blend(1, 1)', "a1111"): "').blend(' is read as it stands; dialect='compel'",
    ("a (red:1.3) house", "compel"): "'(red:1.3)' is read as it stands; dialect='a1111'",
    ("a [b:c:0.5] d", "compel"): "'[b:c:0.5]' is read as it stands; dialect='a1111'",
    ("a BREAK b", "compel"): "'BREAK' is read as it stands; dialect='a1111'",
    ("a <lora:x:0.8> fish", "compel"): "'<lora:x:0.8>' is read as words: add a LoRA to the model",
    ("a <toy>", "plain"): "'<toy>' is read letter by letter, for no learnt word",
    ("a (<toy>:1.3)", "a1111"): "'<toy>' is read letter by letter, for no learnt word",
    ("a <toy>++", "compel"): "'<toy>' is read letter by letter, for no learnt word",
}


@pytest.mark.parametrize(("prompt", "dialect"), SAID)
def test_what_a_dialect_does_not_read_is_said(prompt, dialect, tokenizer):
    (line,) = notices(prompt, dialect, tokenizer)
    assert line.startswith(SAID[prompt, dialect])


def test_of_ordinary_prompts_nothing_is_said(tokenizer):
    prompts = ("a large red house (old), 10:30", "e-mail, a | b", "well-known + nice", "red " * 75, "a house (red)")
    prompts += ("(old)-fashioned, 50+ trees, pre- and C+", 'I (a friend) say "no"-', "1 < 2 > 0 <3", "a <|endoftext|>")
    for prompt in prompts:
        for dialect in DIALECTS:
            assert notices(prompt, dialect, tokenizer) == (), (prompt, dialect)
    knows = tokenizer.with_words({"<toy>": [len(tokenizer)]})
    for dialect in DIALECTS:
        assert notices("a <toy> and a <TOY>", dialect, knows) == ()
        assert notices("a <toi>", dialect, knows)[0].endswith(" Did you mean '<toy>'?")
    for sign in ("[a" * 3000, "[" + "a" * 9000, "<" + "a" * 9000, "(" * 9000, "a" * 9000):  # and at once
        assert all(notices(sign, dialect, knows) is not None for dialect in ("plain", "a1111"))


def test_a_dialect_that_is_none_is_refused():
    assert [check_dialect(name) for name in DIALECTS] == list(DIALECTS)
    with pytest.raises(LDMError, match=r"^There is no dialect 'a111': plain, a1111, compel\. Did you mean 'a1111'\?$"):
        check_dialect("a111")


def test_words_are_told_where_they_stand(tokenizer):
    words, note = words_told(tokenizer, ["red " * 74 + "(lighthouse:1.2) BREAK fish"], "a1111")
    assert note == "" and words[73].tokens == (74,) and words[-1].text == "fish"
    assert words[74].text == "lighthouse" and len(words[74].tokens) > 1  # it goes on in the second chunk
    assert words[74].tokens[:2] == (75, 77 + 1) and words[75].tokens == (2 * 77 + 1,)
    for prompt, dialect, why in (("[a|b]", "a1111", "at other steps"), ('("a", "b").blend()', "compel", "blend")):
        words, note = words_told(tokenizer, texts_at(prompt, dialect, 5, range(1, 6)), dialect)
        assert words == () and why in note
    assert texts_at("[red:blue:0.6]", "a1111", 5, range(1, 6)) == ["red", "blue"]
    assert texts_at("[red:blue:0.6]", "a1111", 5, range(1, 4)) == ["red"]
    assert texts_at("[red:blue:0.6]", "plain", 5, range(1, 6)) == ["[red:blue:0.6]"]


def test_importing_the_dialects_reads_no_torch():
    import subprocess
    import sys

    code = "import sys, ldm.text.prompts, ldm.text.prompts.a1111, ldm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert ldm.__version__
