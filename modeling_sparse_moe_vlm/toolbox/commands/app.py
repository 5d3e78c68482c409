"""
Opens a web page to chat with a model about images.

    sparse-moe-vlm app outputs/demo/model
    sparse-moe-vlm app outputs/demo/model --adapter style=outputs/lora/experts/adapter --port 8000
    sparse-moe-vlm app outputs/demo/model --space outputs/space

Beside each answer, the page shows α for each word (the share of the attention that goes to the images), where in the
images the attention fell, and the experts of each image token. The model of the examples is written by `sparse-moe-vlm
train`, and the adapter by `sparse-moe-vlm lora`. The page needs gradio: pip install 'sparse-moe-vlm[app]'.
"""

from __future__ import annotations

import argparse

from .mistakes import mistakes_in_one_line
from .options import check_unused, trained_model

HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="trained model: folder or name on the Hub")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="LoRA adapter to offer; may be given several times",
    )
    parser.add_argument("--host", help=f"address to listen on (default: {HOST}; 0.0.0.0: all)")
    parser.add_argument("--port", type=int, help="port to listen on (default: a free port)")
    parser.add_argument("--share", action="store_true", help="make the page public, through the servers of gradio")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow running code from the model's folder")
    parser.add_argument(
        "--space", metavar="DIR", help="write the folder of a Hugging Face Space instead of opening the page"
    )


def run(arguments: argparse.Namespace) -> None:
    with mistakes_in_one_line():
        if arguments.space is not None:
            check_unused(arguments, ("host", "port", "share"), "the web page: leave out `--space`")
        from ..extras import check_installed

        check_installed("gradio", "app", "the web page")
        from ..app.loading import parse_adapters
        from ..app.space import page_name, write_space
        from ..model_names import check_model_name

        adapters, model = parse_adapters(arguments.adapter), trained_model(arguments.model)
        for path in adapters.values():
            check_model_name(path, file="adapter_config.json", kind="adapter")
        if arguments.space is not None:
            print(write_space(arguments.space, model, adapters, arguments.trust_remote_code))
            return
        from ..app import ChatModel
        from ..app.page import serve

        chat = ChatModel.load(model, adapters, arguments.trust_remote_code)
        serve(chat, page_name(model), arguments.host or HOST, arguments.port or 0, arguments.share)
