"""Tokens of captions, and the agreement of the metrics of captions with pycocoevalcap on tokenized captions."""

import random

import pytest

from modeling_sparse_moe_vlm.toolbox.evaluation import score_answers, score_rows
from modeling_sparse_moe_vlm.toolbox.evaluation.caption_tokens import caption_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", ""),
        (" A red Dog. ", "a red dog"),
        ("dogs, cats; birds: two (or more)!", "dogs cats birds two or more"),
        ("the dog's ball", "the dog 's ball"),
        ("the dogs' ball", "the dogs ball"),
        ("I don't, can't, they're, we'll, I'm, he'd, I've", "i do n't ca n't they 're we 'll i 'm he 'd i 've"),
        ("don’t", "do n't"),
        ("five o'clock", "five o'clock"),
        ("a t-shirt - or not -- at all", "a t-shirt or not at all"),
        ("1,000 or 3.5 at 10:30.", "1,000 or 3.5 at 10:30"),
        ("50% of $5 & more", "50 % of $ 5 & more"),
        ("\"quoted\" 'single' “curly” `tick` [x] {y} … – —", "quoted single curly tick x y"),
        ("größe CAFE\u0301", "größe café"),
        ("一只狗。", "一只狗"),
        ("a_b _ #1 @home 2 + 2 = 4", "a_b # 1 @ home 2 + 2 = 4"),
    ],
)
def test_tokens(text, tokens):
    assert caption_tokens(text) == tokens.split()


def test_equal_to_pycocoevalcap():
    """On random captions in lower case without punctuation, which are the same with every tokenizer."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    rng = random.Random(0)
    words = ["a", "red", "dog", "on", "the", "mat", "cat", "runs", "fast", "blue", "under", "table"]

    def caption() -> str:
        return " ".join(rng.choices(words, k=rng.randint(4, 14)))

    for number in range(50):
        references = [[caption() for _ in range(rng.randint(1, 5))] for _ in range(number % 10 + 1)]
        predictions = [
            " ".join(word for word in rng.choice(given).split() if rng.random() < 0.9) or "dog" for given in references
        ]
        given, answers = dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}
        expected, of_rows = cider.compute_score(given, answers)
        values = score_answers(["cider", "bleu", "rouge_l"], predictions, references)
        rows = score_rows(["cider", "rouge_l"], predictions, references)
        assert values["cider"] == pytest.approx(expected, abs=1e-9)
        assert [row["cider"] for row in rows] == pytest.approx(of_rows, abs=1e-9)
        expected, of_rows = rouge.compute_score(given, answers)
        assert values["rouge_l"] == pytest.approx(100 * expected)
        assert [row["rouge_l"] for row in rows] == pytest.approx(100 * of_rows)
        expected = bleu.compute_score(given, answers, verbose=0)[0][3]
        if expected > 1e-3:  # otherwise, sacreBLEU smooths
            assert values["bleu"] == pytest.approx(100 * expected, abs=1e-4)
