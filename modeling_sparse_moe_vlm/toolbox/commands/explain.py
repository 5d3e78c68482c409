"""
Draws where a model looked when it answered a question about an image: α and β word by word, attention over the
image, and the experts of its tokens.

    sparse-moe-vlm explain --model outputs/demo/model --output explanation.png
    sparse-moe-vlm explain --model outputs/demo/model --image scene.png --question "Where is the cat?"
"""

from __future__ import annotations

import argparse
import json

from .mistakes import mistakes_in_one_line
from .options import add_json_option, add_model_option, trained_model

CELL_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument("--image", help="file; by default a held-out scene")
    parser.add_argument("--question", help="question about it; by default that of the scene")
    parser.add_argument("--scene", type=int, default=4, help="number of the held-out scene")
    parser.add_argument("--output", default="explanation.png", help="where to write the PNG")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from ..demo import scenes
    from ..modality_weights.explanation import draw_explanation, explain
    from ..training.models import from_our_checkpoint

    with mistakes_in_one_line():
        if (arguments.image is None) != (arguments.question is None):
            raise ValueError("--image and --question go together.")
        if arguments.scene < 0:
            raise ValueError(f"--scene must be at least 0, got {arguments.scene}.")
        model, processor = from_our_checkpoint(trained_model(arguments.model))
        if arguments.image is None:
            row = scenes("test", arguments.scene + 1, cell_size=CELL_SIZE)[arguments.scene]
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
        print(f"{question} {answer}\nalpha by word: {alpha}\n{arguments.output}")
