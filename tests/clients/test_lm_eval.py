"""lm-eval's `hf-multimodal` gives the answers of `generate` on the task in `configuration/lm_eval`."""

import json

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support.processes import ROOT
from tests.support.processors import make_image, user

lm_eval = pytest.importorskip("lm_eval")

QUESTIONS = ["What?", "What is the image of?", "The cat?"]


def write_questions(folder, answers: list[str]) -> None:
    """Writes images with questions as the task expects them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        make_image(number).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "question": question, "answer": answer})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def answers_of(folder) -> list[str]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    answers = []
    for number, question in enumerate(QUESTIONS):
        inputs = processor.apply_chat_template([user(make_image(number), question)], **options)
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_answers_and_scores(kind, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = answers_of(checkpoints[kind])
    assert len(set(expected)) == len(QUESTIONS)
    write_questions(tmp_path / "outputs/image_questions/test", [expected[0], expected[1].upper(), "nothing"])
    results = lm_eval.simple_evaluate(
        model="hf-multimodal",
        model_args=f"pretrained={checkpoints[kind]},trust_remote_code=True,dtype=float32",
        tasks=["image_questions"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(ROOT / "configuration/lm_eval")),
        apply_chat_template=True,
        batch_size=2,
        device="cpu",
        log_samples=True,
    )
    samples = sorted(results["samples"]["image_questions"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == expected
    assert [sample["exact_match"] for sample in samples] == [1.0, 1.0, 0.0]
    assert results["results"]["image_questions"]["exact_match,none"] == pytest.approx(2 / 3)
