"""Texts that show how to ask a trained model about an image."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any


def how_to_ask(model_dir: Path, question: str, image: Path | None, is_language_model: bool = False) -> str:
    """
    Writes a command and a program that ask a model a question.

    Args:
        model_dir (`Path`):
            Folder of the model.
        question (`str`):
            The question.
        image (`Path`, *optional*):
            The image that the question is about.
        is_language_model (`bool`, *optional*, defaults to `False`):
            Whether the model is a language model, which has a tokenizer.
    """
    model, processor = ("CausalLM", "Tokenizer") if is_language_model else ("ImageTextToText", "Processor")
    content: Any = [{"type": "image", "path": str(image)}] if image is not None else []
    content = question if is_language_model else [*content, {"type": "text", "text": question}]
    options = [
        "--model",
        str(model_dir),
        *(["--image", str(image)] if image is not None else []),
        "--question",
        question,
    ]
    return ASK.format(
        command=f"sparse-moe-vlm generate {shlex.join(options)}",
        model_class=f"AutoModelFor{model}",
        processor_class=f"Auto{processor}",
        processor=processor.lower(),
        model_dir=model_dir,
        content=repr(content),
    )


ASK = """\
    {command}

Or in Python, without this package:

    from transformers import {model_class}, {processor_class}

    model = {model_class}.from_pretrained("{model_dir}", trust_remote_code=True)
    {processor} = {processor_class}.from_pretrained("{model_dir}", trust_remote_code=True)
    content = {content}
    inputs = {processor}.apply_chat_template(
        [{{"role": "user", "content": content}}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=32)
    print({processor}.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
