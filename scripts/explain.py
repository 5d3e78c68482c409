"""
Draws where a model looked when it answered a question about a picture: α and β word by word, attention over the
picture, and the experts of its tokens.

    python scripts/explain.py --model outputs/demo/model --output explanation.png
    python scripts/explain.py --model outputs/demo/model --image scene.png --question "Where is the cat?"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.demo import scenes
from modeling_sparse_moe_vlm.toolbox.modality_weights.explanation import draw_explanation, explain

DEMO = "outputs/demo/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, help="checkpoint")
    parser.add_argument("--image", help="picture; by default a held-out scene")
    parser.add_argument("--question", help="question about it; by default that of the scene")
    parser.add_argument("--scene", type=int, default=4, help="number of the held-out scene")
    parser.add_argument("--output", default="explanation.png", help="where to write the PNG")
    arguments = parser.parse_args()
    if (arguments.image is None) != (arguments.question is None):
        parser.error("--image and --question go together")
    if arguments.model == DEMO and not Path(DEMO).exists():
        parser.error(f"there is no {DEMO} yet: run `make demo`, or name a checkpoint with --model")

    model = SparseMoeVlmForConditionalGeneration.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    if arguments.image is None:
        row = scenes("test", arguments.scene + 1, cell_size=16)[arguments.scene]
        picture, question = row["image"], row["question"]
    else:
        picture, question = Image.open(arguments.image).convert("RGB"), arguments.question
    explanation = explain(model, processor, picture, question)
    draw_explanation(explanation, picture, question, arguments.output)
    print(f"{question} {''.join(explanation.words)}\nalpha by word: {explanation.alpha.tolist()}\n{arguments.output}")


if __name__ == "__main__":
    main()
