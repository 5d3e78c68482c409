"""
Asks a model about pictures.

    python scripts/generate.py --model outputs/demo/model --image PICTURE.png --question "Can you see the cat?"
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_sparse_moe_vlm.toolbox.evaluation import generate_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name on the Hub")
    parser.add_argument(
        "--image", action="append", default=[], help="picture (file or URL); may be given several times"
    )
    parser.add_argument("--question", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings along")
    arguments = parser.parse_args()

    loading = {"trust_remote_code": arguments.trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, **loading)
    processor = AutoProcessor.from_pretrained(arguments.model, **loading)
    content = [{"type": "image"} for _ in arguments.image] + [{"type": "text", "text": arguments.question}]
    row = {"messages": [{"role": "user", "content": content}], "images": arguments.image}
    print(generate_answers(model, processor, [row], max_new_tokens=arguments.max_new_tokens)[0])


if __name__ == "__main__":
    main()
