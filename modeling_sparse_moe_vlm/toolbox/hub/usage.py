"""The program in a model card that loads a model and its processor, and runs them."""

from __future__ import annotations

import json
from pathlib import Path

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_IMAGE_QUESTION = """\
content = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "Describe the image."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
"""
_TEXT_QUESTION = """\
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is a mixture of experts?"}],
"""
_END_OF_QUESTION = """\
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
"""
_PROMPT = """\
inputs = tokenizer("A mixture of experts is", return_tensors="pt")
"""
_ANSWER = """\
output = model.generate(**inputs, max_new_tokens=64)
print({loader}.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def usage(
    folder: Path, name: str, auto_class: str, *, reads_images: bool, generates: bool, needs_code: bool, is_ours: bool
) -> str:
    """
    Writes a program that loads a model and asks it a question, as a block of Markdown.

    Args:
        folder (`Path`):
            Folder of the model. Without files of a processor or tokenizer in it, the program only loads the model.
        name (`str`):
            What the program loads the model by.
        auto_class (`str`):
            Name of the class of Transformers that loads the model.
        reads_images (`bool`):
            Whether the model reads images, so that the question is about one.
        generates (`bool`):
            Whether the model generates text.
        needs_code (`bool`):
            Whether the model is loaded with the code in its repository.
        is_ours (`bool`):
            Whether the model is of this package's own architecture. Its processor then needs that code too; with images
            it is saved with every model, and always has a chat template.
    """
    has_processor = reads_images and (is_ours or _has(folder, *_PROCESSOR_FILES))
    has_tokenizer = _has(folder, *_TOKENIZER_FILES)
    loader = "processor" if has_processor else "tokenizer"
    loader_class = f"Auto{loader.title()}"
    code = ", trust_remote_code=True" if needs_code else ""
    classes, loads = [auto_class], [f'model = {auto_class}.from_pretrained("{name}"{code})']
    if has_processor or has_tokenizer:
        classes.append(loader_class)
        loads.append(f'{loader} = {loader_class}.from_pretrained("{name}"{code if is_ours and has_processor else ""})')
    program = f"from transformers import {', '.join(classes)}\n\n" + "\n".join(loads) + "\n"
    has_template = _has_chat_template(folder) or (is_ours and has_processor)
    if generates and has_processor and has_template:
        program += _IMAGE_QUESTION + _END_OF_QUESTION + _ANSWER.format(loader=loader)
    elif generates and not reads_images and has_tokenizer:
        question = _TEXT_QUESTION + _END_OF_QUESTION if has_template else _PROMPT
        program += question + _ANSWER.format(loader=loader)
    return f"```python\n{program.rstrip()}\n```"


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _has_chat_template(folder: Path) -> bool:
    configs = (folder / name for name in (*_PROCESSOR_FILES, *_TOKENIZER_FILES[:1]))
    return _has(folder, *_TEMPLATE_FILES) or any(
        "chat_template" in json.loads(path.read_text(encoding="utf-8")) for path in configs if path.is_file()
    )
