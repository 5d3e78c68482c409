"""
Asks a model a question about one or more images, or about none. Language models are asked without images.

    sparse-moe-vlm generate --model outputs/demo/model --image outputs/demo/scene.png --question "Where is the pig?"

The model and the image of the example are written by `sparse-moe-vlm train`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .mistakes import mistakes_in_one_line
from .options import trained_model

PLAIN_TEMPLATE = "{{ bos_token or '' }}{{ messages[0]['content'] }}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="trained model: folder or name on the Hub")
    parser.add_argument("--image", action="append", default=[], help="image file or URL; may be given several times")
    parser.add_argument("--question", required=True, help="question to ask")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens (default: 64)")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow running code from the model's folder")


def run(arguments: argparse.Namespace) -> None:
    from transformers import AutoConfig, PreTrainedTokenizerBase

    from ..evaluation import generate_answers
    from ..installed_code import use_installed_code
    from ..training.models import from_checkpoint, is_language_model

    content = [{"type": "image"} for _ in arguments.image] + [{"type": "text", "text": arguments.question}]
    row = {"messages": [{"role": "user", "content": content}], "images": arguments.image}
    with mistakes_in_one_line():
        path = trained_model(arguments.model)
        # Mistakes are found before the weights are loaded, which may take minutes.
        use_installed_code(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=arguments.trust_remote_code)
        if arguments.image and is_language_model(config):
            raise ValueError(f"{arguments.model} is a language model, which reads no images: leave --image out.")
        for image in arguments.image:
            if "://" not in image and not image.startswith("data:") and not Path(image).is_file():
                raise ValueError(f"--image: there is no file {image}.")
        if arguments.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, but got {arguments.max_new_tokens}.")
        model, processor = from_checkpoint(path, trust_remote_code=arguments.trust_remote_code, language_models=True)
        if isinstance(processor, PreTrainedTokenizerBase):
            # A model that was not trained on conversations continues the question.
            processor.chat_template = processor.chat_template or PLAIN_TEMPLATE
        print(generate_answers(model, processor, [row], max_new_tokens=arguments.max_new_tokens)[0])
