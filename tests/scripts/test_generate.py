"""generate.py prints the answer of the model."""

from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_sparse_moe_vlm.toolbox.evaluation import generate_answers
from tests.support.processors import make_image, user


def test_answers_about_images(trained, run_here, tmp_path):
    images = [tmp_path / "0.png", tmp_path / "1.png"]
    for seed, path in enumerate(images):
        make_image(seed).save(path)
    folder = trained[0] / "model"
    arguments = ["--model", folder, "--question", "Can you see the cat?", "--max-new-tokens", "5"]
    printed = run_here("generate.py", *arguments, "--image", images[0], "--image", images[1])

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    row = {"messages": [user(*map(make_image, range(2)), "Can you see the cat?")]}
    assert printed == generate_answers(model, processor, [row], max_new_tokens=5)[0] + "\n"


def test_answers_without_an_image(trained, run_here):
    folder = trained[0] / "model"
    assert run_here("generate.py", "--model", folder, "--question", "Why?", "--max-new-tokens", "5").endswith("\n")
