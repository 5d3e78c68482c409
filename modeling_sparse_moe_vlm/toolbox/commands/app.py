"""
Opens a web page to chat with a model: α by word, where attention fell, and the experts of each image token.

    sparse-moe-vlm app outputs/demo/model
    sparse-moe-vlm app Qwen/Qwen3-VL-2B-Instruct --adapter charts=adapters/charts --port 8000
    sparse-moe-vlm app my-name/my-model --space my-space
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from .mistakes import mistakes_in_one_line
from .options import trained_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or name on the Hub")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=PATH", help="LoRA adapter to choose; may be repeated"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all of this computer's")
    parser.add_argument("--port", type=int, default=0, help="port to listen at; by default a free one")
    parser.add_argument("--share", action="store_true", help="make the page public through gradio's servers")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings along")
    parser.add_argument("--space", metavar="DIR", help="write a folder for a Hugging Face Space, and start nothing")


def run(arguments: argparse.Namespace) -> None:
    with mistakes_in_one_line():
        if find_spec("gradio") is None:
            raise ValueError("the web page needs gradio: pip install 'sparse-moe-vlm[app]'.")
        from ..app.loading import parse_adapters
        from ..app.space import page_name, write_space

        adapters, model = parse_adapters(arguments.adapter), trained_model(arguments.model)
        if arguments.space is not None:
            print(write_space(arguments.space, model, adapters, arguments.trust_remote_code))
            return
        from ..app import ChatModel
        from ..app.page import serve

        chat = ChatModel.load(model, adapters, arguments.trust_remote_code)
        serve(chat, page_name(model), arguments.host, arguments.port, arguments.share)
