"""The metrics: hand-computed values, edge cases, and the mean over rows."""

import math
import re

import evaluate
import pytest

from modeling_sparse_moe_vlm.toolbox.evaluation import exact_match, references_of, score_answers, score_rows
from modeling_sparse_moe_vlm.toolbox.evaluation.metrics.anls.anls import edit_distance, similarity
from modeling_sparse_moe_vlm.toolbox.evaluation.metrics.relaxed_accuracy.relaxed_accuracy import is_close
from modeling_sparse_moe_vlm.toolbox.evaluation.metrics.rouge_l.rouge_l import longest_common_subsequence
from modeling_sparse_moe_vlm.toolbox.evaluation.metrics.vqa_accuracy.vqa_accuracy import accuracy, normalise
from modeling_sparse_moe_vlm.toolbox.evaluation.scores import LARGEST, METRICS

ALL = ["exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", "cider", "bleu", "rouge_l"]


def score(metric: str, prediction: str, *references: str, **options) -> float:
    value = score_answers([metric], [prediction], [list(references)], **options)[metric]
    if metric != "bleu":
        assert score_rows([metric], [prediction], [list(references)], **options) == [{metric: pytest.approx(value)}]
    return value


# ------------------------------------------------------------------------------------------------------------ general


def test_all_metrics():
    assert list(LARGEST) == ALL
    predictions = ["a red dog runs fast", "the cat sat on a mat"]
    references = [["a red dog runs fast", "no"], ["the cat sat on a mat", "x"]]
    expected = dict.fromkeys(ALL, 100.0) | {
        # Two references each, of which the first is the prediction and the second has nothing in common with it.
        "cider": 5.0,
        # One of two answers is right: the one annotator that is left out leaves the other.
        "vqa_accuracy": 50.0,
    }
    assert score_answers(ALL, predictions, references) == pytest.approx(expected)
    assert list(score_answers(["bleu", "anls"], predictions, references)) == ["bleu", "anls"]
    rows = score_rows(ALL, predictions, references)
    assert [list(row) for row in rows] == [[name for name in ALL if name != "bleu"]] * 2
    assert score_answers(["anls"], ["a", "b", "c", "d"], [["a"], ["x"], ["y"], ["z"]]) == {"anls": 25.0}


@pytest.mark.parametrize(
    ("metrics", "predictions", "references", "message"),
    [
        (["accuracy"], ["a"], [["a"]], "there is no metric 'accuracy': use one of exact_match, vqa_accuracy, anls, "),
        ([], ["a"], [["a"]], "`metrics` must be a list with at least one of exact_match, .*, but got []."),
        ("anls", ["a"], [["a"]], "`metrics` must be a list with at least one of .*rouge_l, but got 'anls'."),
        (["anls"], [], [], "got 0 predictions for 0 references: give one for each, and at least one."),
        (["anls"], ["a"], [["a"], ["b"]], "got 1 predictions for 2 references"),
        (["anls"], ["a", "b"], [["a"]], "got 2 predictions for 1 references"),
        (["anls"], ["a", "b"], [["a"], []], "references[1] is empty: give at least one right answer for each row."),
        (["anls"], ["a", "b"], [["a"], "b"], "references[1] must be a list of strings, but got 'b'."),
        (["anls"], ["a", "b"], [["a"], None], "references[1] must be a list of strings, but got None."),
        (["anls"], ["a", "b"], [["a"], ["b", 5]], "references[1] must contain only strings, but got 5."),
        (["anls"], ["a", None], [["a"], ["b"]], "predictions[1] must be a string, but got None."),
    ],
)
@pytest.mark.parametrize("function", [score_answers, score_rows])
def test_errors(function, metrics, predictions, references, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        function(metrics, predictions, references)


@pytest.mark.parametrize("name", ALL)
def test_modules_load_from_their_folders_without_the_hub(name, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True, raising=False)
    module = evaluate.load(str(METRICS / name))
    assert module.name == name
    predictions, references = ["a red dog runs", "two cats sit here"], ["a red dog runs", "two cats sit here"]
    expected = {name: pytest.approx(LARGEST[name])}
    assert module.compute(predictions=predictions, references=references) == expected
    assert module.compute(predictions=predictions, references=[[text] for text in references]) == expected
    with pytest.raises(ValueError, match="row 1 has no references: give at least one"):
        module.compute(predictions=["a", "b"], references=[["a"], []])
    assert "references (`list[list[str]]`" in module.inputs_description
    assert ("tokenized" in module.inputs_description) == (name in ("cider", "bleu", "rouge_l"))
    assert module.info.description.strip()


def test_references_of_rows():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "first"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "next"},
    ]
    assert references_of({"messages": messages, "references": ["x", "x", "y"]}) == ["x", "x", "y"]
    for references in (None, []):
        assert references_of({"messages": messages, "references": references}) == ["ab"]
    assert references_of({"messages": messages[:2]}) == ["first"]
    image = {"type": "image", "text": None}
    assert references_of({"messages": [{"role": "assistant", "content": [image, {"type": "text", "text": "c"}]}]}) == [
        "c"
    ]
    with pytest.raises(ValueError, match=r"the row has no references and no assistant turn: its fields are \['mess"):
        references_of({"messages": messages[:1]})


# -------------------------------------------------------------------------------------------------------- exact match


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [("Cat.", ["dog", "cat"], 100), ("cat", ["dog", "cats"], 0), ("", ["cat"], 0), ("", ["cat", ""], 100)],
)
def test_exact_match(prediction, references, expected):
    assert score("exact_match", prediction, *references) == expected
    assert exact_match([prediction], [references[-1]]) == expected


# ------------------------------------------------------------------------------------------------------- VQA accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", ""),
        (" Yes\n", "yes"),
        ("No.", "no"),
        # Articles and number words
        ("The cat", "cat"),
        ("a", ""),
        ("an apple and a pear", "apple and pear"),
        ("another theory", "another theory"),
        ("none", "0"),
        ("Zero one two three four five", "0 1 2 3 4 5"),
        ("six seven eight nine ten eleven", "6 7 8 9 10 eleven"),
        # Periods are removed unless a digit follows, commas in numbers are removed.
        ("3.14", "3.14"),
        (".5", ".5"),
        ("5.", "5"),
        ("u.s.a.", "usa"),
        ("a.5", "a.5"),
        ("1,000", "1000"),
        ("1,000,000.5", "1000000.5"),
        # Other punctuation becomes a space, or nothing next to a space or if the text has a number with a comma.
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("red , blue,green", "red bluegreen"),
        ("t-shirt", "t shirt"),
        ("t-shirt - blue", "tshirt blue"),
        ("t-shirt 1,000", "tshirt 1000"),
        ("black/white", "black white"),
        ("(left)", "left"),
        ("what?!", "what"),
        ('a;b/c[d]e"f{g}h(i)j=k+l\\m_n-o>p<q@r`s,t?u!v', "b c d e f g h i j k l m n o p q r s t u v"),
        ("10:30", "10:30"),
        ("50%", "50%"),
        ("$5", "$5"),
        ("red\nblue\tgreen", "red blue green"),
        ("red\n,blue", "red blue"),
        ("t-shirt\t-blue", "tshirt blue"),
        ("t-shirt\n-blue", "tshirt blue"),
        (" t-shirt- ", "t shirt"),
        # Missing apostrophes
        ("dont", "don't"),
        ("don't", "don't"),
        ("Isnt it", "isn't it"),
        ("shouldnt've", "shouldn't've"),
        ("shouldn'tve", "shouldn't've"),
        ("shouldntve", "shouldntve"),
        ("yall'd've", "y'all'd've"),
        ("y'alld've", "y'all'd've"),
        ("y'all'dve", "y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("maam", "ma'am"),
        ("'ow'sat", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),
        ("lets", "lets"),
        ("wed", "wed"),
        # Unicode
        ("ÉCOLE.", "école"),
        ("三、四", "三、四"),
    ],
)
def test_normal_form_of_vqa(answer, expected):
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("prediction", "matching", "expected"),
    [
        # Of ten answers, n match. Without one of these, n - 1 remain; without one of the others, n.
        ("yes", 0, 0.0),
        ("yes", 1, (1 * 0 + 9 * 1 / 3) / 10),
        ("yes", 2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("yes", 3, (3 * 2 / 3 + 7) / 10),
        ("yes", 4, 1.0),
        ("Yes.", 10, 1.0),
        ("no", 10, 0.0),
        ("", 5, 0.0),
    ],
)
def test_vqa_accuracy_of_ten_answers(prediction, matching, expected):
    references = ["yes"] * matching + [f"other {number}" for number in range(10 - matching)]
    assert score("vqa_accuracy", prediction, *references) == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["yes"], 1.0),
        (["no"], 0.0),
        (["yes", "yes"], 1.0),
        (["yes", "no"], 0.5),
        (["yes", "yes", "yes"], 1.0),
        (["yes", "yes", "no"], (1 / 2 + 1 / 2 + 1) / 3),
        (["yes", "no", "no"], (0 + 1 / 2 + 1 / 2) / 3),
        (["yes"] * 4, 1.0),
        (["yes"] * 3 + ["no"], (3 * 2 / 3 + 1) / 4),
        (["yes", "no", "no", "no"], (3 * 1 / 3) / 4),
        (["yes"] * 2 + ["no"] * 3, (2 * 1 / 3 + 3 * 2 / 3) / 5),
        (["The yes.", "YES", "no"], 2 / 3),
    ],
)
def test_vqa_accuracy_of_fewer_answers(references, expected):
    assert accuracy("yes", references) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------------- ANLS


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("sitting", "kitten", 3),
        ("abc", "abc", 0),
        ("abc", "acb", 2),
        ("abcd", "bcd", 1),
        ("abc", "abcx", 1),
        ("ab", "xaby", 2),
        ("größe", "grosse", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
    ],
)
def test_edit_distance(first, second, expected):
    assert edit_distance(first, second) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("abcd", "abxy", 0.5),  # at the threshold
        ("abc", "axy", 0.0),  # 1/3
        ("abcde", "abxyz", 0.0),  # 2/5
        ("ab", "abcde", 0.0),  # 2/5: the longer text counts
        ("abc", "abcd", 0.75),
        ("  New   YORK\n", "new york", 1.0),
        ("newyork", "new york", 1 - 1 / 8),
        ("", "", 1.0),
        (" ", "", 1.0),
        ("", "a", 0.0),
        ("STRASSE", "straße", 1 - 2 / 7),
    ],
)
def test_similarity(answer, reference, expected):
    assert similarity(answer, reference) == pytest.approx(expected)
    assert similarity(reference, answer) == pytest.approx(expected)


def test_anls_takes_the_most_similar_reference():
    assert score("anls", "abcd", "abxy", "abcx", "zzzz") == 75
    assert score_answers(["anls"], ["abcd", ""], [["abcd"], ["x"]]) == {"anls": 50}


# --------------------------------------------------------------------------------------------------- relaxed accuracy


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("100", "100", True),
        ("105", "100", True),
        ("95", "100", True),
        ("105.01", "100", False),
        ("94.99", "100", False),
        ("1.05", "1", True),  # exactly 5 percent, which floating-point numbers miss
        ("1.0501", "1", False),
        ("100", "105.2", True),  # 5 percent of the reference
        ("105.2", "100", False),
        ("-105", "-100", True),
        ("100", "-100", False),
        ("+7", "7.0", True),
        ("7.", ".7e1", True),
        ("2E3", "2000", True),
        ("1e10", "10000000000", True),
        ("1e-100", "1.04e-100", True),
        (" 7 ", "7\n", True),
        ("0", "0.0", True),
        ("0.001", "0", False),
        ("5%", "0.05", True),
        ("5 %", "5.2%", True),
        ("5%", "5", False),
        ("5%", "5.3%", False),
        ("%", "%", True),
        ("1,000", "1000", False),
        ("1,000", "1,000", True),
        ("12 dogs", "12", False),
        ("Red", "red", True),
        ("red", "blue", False),
        ("red", "7", False),
        ("7", "red", False),
        ("nan", "NaN", True),
        ("inf", "5", False),
        ("", "", True),
        ("", "0", False),
        ("1e9999999999", "1e9999999999", True),
        ("Größe", "größe", True),
    ],
)
def test_relaxed_accuracy(answer, reference, expected):
    assert is_close(answer, reference) is expected
    assert score("relaxed_accuracy", answer, reference) == 100.0 * expected


def test_relaxed_accuracy_with_several_references():
    assert score("relaxed_accuracy", "104", "7", "100") == 100
    assert score("relaxed_accuracy", "104", "7", "90") == 0


# -------------------------------------------------------------------------------------------------------------- CIDEr


def test_cider_of_equal_and_of_different_captions():
    predictions = ["a b c d", "e f g h"]
    assert score_answers(["cider"], predictions, [["a b c d"], ["e f g h"]])["cider"] == pytest.approx(10)
    assert score_answers(["cider"], predictions, [["e f g h"], ["a b c d"]])["cider"] == 0
    assert score_answers(["cider"], ["a b c", "e f"], [["a b c"], ["e f"]])["cider"] == pytest.approx((7.5 + 5) / 2)
    assert score_answers(["cider"], ["", "e"], [["a b c"], [""]])["cider"] == 0
    assert score("cider", "a b c d", "a b c d") == 0  # in a single row, no n-gram is rarer than others


def test_cider_by_hand():
    """
    Two rows: n-grams of the reference of one row weigh log 2, those of both (`x`) weigh 0, and unknown ones log 2.

    First row, words: the prediction has b twice, c once and x; the reference has b, c and d.
    """
    predictions, references = ["b b c x", "x y"], [["b c d x"], ["x y"]]
    weight = math.log(2)
    # Words: min(2, 1) · 1 + 1 · 1 of b and c, over the lengths √(2² + 1²) and √3 (x has no weight).
    words = 2 * weight**2 / (math.sqrt(5) * weight * math.sqrt(3) * weight)
    # Pairs: "b c" of three each. Triples and quadruples have nothing in common.
    pairs = 1 / 3
    first = 10 * (words + pairs) / 4
    second = 10 * (1 + 1) / 4
    assert score_rows(["cider"], predictions, references) == [
        {"cider": pytest.approx(first)},
        {"cider": pytest.approx(second)},
    ]
    assert score_answers(["cider"], predictions, references)["cider"] == pytest.approx((first + second) / 2)


def test_length_and_number_of_references_in_cider():
    """A prediction that is three words longer, and a second reference without common words."""
    predictions, references = ["a u v w", "z"], [["a"], ["z", "q"]]
    first = 10 * (1 / math.sqrt(4)) / 4 * math.exp(-9 / 72)
    second = 10 * (1 + 0) / 2 / 4
    rows = score_rows(["cider"], predictions, references)
    assert [row["cider"] for row in rows] == pytest.approx([first, second])


def test_an_ngram_counts_once_per_row_in_cider():
    """`a` is in two references of the first row, and is still in one row only."""
    predictions, references = ["a b", "c", "d"], [["a b", "a a"], ["c"], ["d a"]]
    of_a, of_b = math.log(3) - math.log(2), math.log(3)
    first = (1 + of_a / math.hypot(of_a, of_b)) + 1
    rows = score_rows(["cider"], predictions, references)
    assert rows[0]["cider"] == pytest.approx(10 * first / 4 / 2)


# --------------------------------------------------------------------------------------------------------------- BLEU


def test_bleu_by_hand():
    # 1-grams 5/6, 2-grams 3/5, 3-grams 2/4, 4-grams 1/3; as long as the reference.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert score("bleu", "the cat sat on the mat", "the cat sat on a mat") == pytest.approx(100 * (1 / 12) ** (1 / 4))
    assert score("bleu", "the cat sat on the mat", "the cat sat on a mat") == pytest.approx(expected)
    # A prediction of five words for a reference of eight.
    assert score("bleu", "a b c d e", "a b c d e f g h") == pytest.approx(100 * math.exp(1 - 8 / 5))
    # The closest length counts, and n-grams of all references.
    assert score("bleu", "a b c d e", "a b c x e", "a b c d e f g h") == pytest.approx(100)
    assert score("bleu", "", "a b c d") == 0


def test_bleu_of_several_rows_and_numbers_of_references():
    """Counts are summed over the rows: not the mean of their values."""
    predictions = ["a b c d e", "v w x y"]
    references = [["a b c d z"], ["v w x y", "v w"]]
    expected = 100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** (1 / 4)
    assert score_answers(["bleu"], predictions, references)["bleu"] == pytest.approx(expected)
    assert score_answers(["bleu"], predictions[::-1], references[::-1])["bleu"] == pytest.approx(expected)
    assert score_rows(["bleu"], predictions, references) == [{}, {}]


def test_tokens_of_bleu():
    assert score("bleu", "a red dog runs.", "a red dog runs .") == pytest.approx(100)
    assert score("bleu", "a red dog runs .", "a red dog runs .", tokenized=True) == pytest.approx(100)
    assert score("bleu", "a red dog runs.", "a red dog runs .", tokenized=True) < 80
    for tokenized in (False, True):  # case matters
        assert score("bleu", "A RED DOG RUNS", "a red dog runs", tokenized=tokenized) == 0


def test_smoothing_of_bleu():
    """Without a common 3-gram or 4-gram, these count as 1/2 and 1/4 of a match."""
    expected = 100 * (3 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4)
    assert score("bleu", "a b c d", "a b x d") == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ ROUGE-L


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("abcbdab", "bdcaba", 4), ("abc", "abc", 3), ("abc", "cba", 1), ("", "abc", 0), ("aab", "ab", 2), ("ab", "xy", 0)],
)
def test_longest_common_subsequence(first, second, expected):
    assert longest_common_subsequence(first, second) == expected
    assert longest_common_subsequence(second, first) == expected


def f_measure(precision: float, recall: float) -> float:
    return 100 * (1 + 1.44) * precision * recall / (recall + 1.44 * precision)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("a b c d", ["a b c d"], 100.0),
        ("a x c", ["a b c d"], f_measure(2 / 3, 2 / 4)),
        ("c a", ["a b c d"], f_measure(1 / 2, 1 / 4)),
        # Precision of the first reference, and recall of the second.
        ("a b c", ["a b x x x x", "a"], f_measure(2 / 3, 1)),
        ("", ["a"], 0.0),
        ("a", [""], 0.0),
        ("a", ["", "a b"], f_measure(1, 1 / 2)),
        ("x", ["a b"], 0.0),
        ("The Dog's RED.", ["the dog 's red"], 100.0),
    ],
)
def test_rouge_l(prediction, references, expected):
    assert score("rouge_l", prediction, *references) == pytest.approx(expected)


def test_tokenized_captions_are_only_split_at_white_space():
    assert score("rouge_l", "a Dog.", "a dog") == 100
    assert score("rouge_l", "a Dog.", "a dog", tokenized=True) == pytest.approx(50)
    predictions, references = ["A", "b."], [["a"], ["b"]]
    assert score_answers(["cider"], predictions, references)["cider"] == pytest.approx(2.5)
    assert score_answers(["cider"], predictions, references, tokenized=True)["cider"] == 0
    assert score_rows(["cider"], predictions, references, tokenized=True) == [{"cider": 0}, {"cider": 0}]
