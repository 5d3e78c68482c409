"""
Draws where a model looked in an image while it answered a question about it.

    sparse-moe-vlm explain --model outputs/demo/model --output explanation.png
    sparse-moe-vlm explain --model outputs/demo/model --image outputs/demo/scene.png --question "Where is the pig?"

The model and the image of the examples are written by `sparse-moe-vlm train`. For each word of the answer, the drawing
shows α, the share of the attention that goes to the image, and β, the share that goes to the text. It also shows how
the attention is spread over the image, and which expert of each layer each image token is routed to.
"""

from __future__ import annotations

import argparse
import json

from .mistakes import mistakes_in_one_line
from .options import add_json_option, add_model_option, check_unused, trained_model

CELL_SIZE = 16
SCENE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument("--image", help="image file; without it, a held-out scene of the demo is used")
    parser.add_argument("--question", help="question about the image file")
    parser.add_argument("--scene", type=int, help=f"number of the held-out scene, from 0 (default: {SCENE})")
    parser.add_argument("--output", default="explanation.png", help="PNG file to write (default: explanation.png)")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from ..demo import scenes
    from ..extras import check_installed

    with mistakes_in_one_line():
        check_installed("matplotlib", "report", "`explain`")
    from ..modality_weights.explanation import draw_explanation, explain
    from ..training.models import from_our_checkpoint

    with mistakes_in_one_line():
        if (arguments.image is None) != (arguments.question is None):
            raise ValueError("--image and --question must be given together: pass both or neither.")
        if arguments.image is not None:
            check_unused(arguments, ("scene",), "the held-out scenes: leave out `--image` and `--question`")
        scene = SCENE if arguments.scene is None else arguments.scene
        if scene < 0:
            raise ValueError(f"--scene must be at least 0, got {scene}.")
        model, processor = from_our_checkpoint(trained_model(arguments.model))
        if arguments.image is None:
            row = scenes("test", scene + 1, cell_size=CELL_SIZE)[scene]
            image, question = row["image"], row["question"]
        else:
            image, question = Image.open(arguments.image).convert("RGB"), arguments.question
    explanation = explain(model, processor, image, question)
    with mistakes_in_one_line():
        draw_explanation(explanation, image, question, arguments.output)
    answer, alpha = "".join(explanation.words), explanation.alpha.tolist()
    if arguments.json:
        figures = {
            "words": explanation.words,
            "alpha": alpha,
            "count_free_alpha": explanation.count_free_alpha.tolist(),
        }
        print(json.dumps({"question": question, "answer": answer, **figures, "output": arguments.output}))
    else:
        by_word = ", ".join(f"{word.strip()} {share:.2f}" for word, share in zip(explanation.words, alpha, strict=True))
        print(f"{question} {answer}\nalpha by word: {by_word}\n{arguments.output}")
