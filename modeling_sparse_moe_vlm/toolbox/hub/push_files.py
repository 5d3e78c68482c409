"""The files of a checkpoint that are uploaded: which ones, and with which content."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...checkpoint_integrity import check_weights, read_index
from ..shipped_files import PACKAGE, shipped_root
from .parents import README
from .push_errors import PushError
from .push_private import check_no_paths, check_no_tokens, check_weights_metadata, clean_json, shorten_paths
from .sections import RECIPE, figures_in, recipe_text, saved_recipe

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Shards that `save_pretrained` writes have up to 50 GB of tensors, and a header.
MAX_FILE_SIZE = 50 * 2**30
LICENCE, LICENCE_OF_CODE = "LICENSE", "LICENSE-CODE"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "entity_vocab.json",
    "dict.txt",
)
PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
PROCESSOR_FILES = (
    *PROCESSOR_CONFIGS,
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    *TOKENIZER_FILES,
)
TEMPLATES = "additional_chat_templates"
# Read by sentence-transformers.
EMBEDDING_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_LICENCES = re.compile(r"(LICEN[SC]E|COPYING|NOTICE)([.-].*)?", re.IGNORECASE)
# Images in Markdown or HTML by a path in the repository.
_IMAGES = re.compile(
    r"""(?:!\[[^\]]*\]\(<?|<img\s[^>]*?src=["'])(?:\./)?(?![a-z]+:|[/\\#])([^\s"'()<>]+\.(?:png|jpe?g|gif|svg|webp))""",
    re.IGNORECASE,
)
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class PushedFile:
    """
    A file to upload.

    Args:
        name (`str`):
            Its path in the repository.
        content (`Path` or `bytes`):
            The local file, or the content if it differs from the local file.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def text(self) -> str:
        """The content as text."""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return content.decode("utf-8")


@dataclass
class PushedFiles:
    """
    What is uploaded of a checkpoint.

    Args:
        files (`dict[str, PushedFile]`):
            The files, by their path in the repository.
        notes (`list[str]`):
            What was added, changed or is missing.
    """

    files: dict[str, PushedFile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, content: Path | bytes) -> None:
        self.files[name] = PushedFile(name, content)

    def text(self, name: str) -> str:
        return self.files[name].text

    def json(self, name: str) -> dict[str, Any]:
        """Returns the content of a JSON file, or an empty `dict` if it is not uploaded."""
        if name not in self.files:
            return {}
        try:
            content = json.loads(self.text(name))
        except ValueError as error:
            raise PushError(f"{name} is not valid JSON ({error}): save the checkpoint again.") from error
        if not isinstance(content, dict):
            raise PushError(f"{name} is not a JSON object: save the checkpoint again.")
        return content


def is_own_file(name: str) -> bool:
    """
    Returns whether a file of a repository is of a kind that an upload replaces as a whole: weights, code, and files of
    the processor. Those that are not uploaded again are deleted.
    """
    kinds = (CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS, LICENCE_OF_CODE)
    if name in (*kinds, *PROCESSOR_FILES, *EMBEDDING_FILES) or _WEIGHTS.fullmatch(name):
        return True
    folder, _, file = name.rpartition("/")
    return (folder == "" and file.endswith(".py")) or (folder == TEMPLATES and file.endswith(".jinja"))


def model_files(folder: Path) -> PushedFiles:
    """
    Collects the files of a model: configurations, weights, processor and code. The model card and licence are not
    among them.

    Args:
        folder (`Path`):
            Folder of the checkpoint.

    Returns:
        [`PushedFiles`]: The files.

    Raises:
        PushError: If something is missing.
        OSError: If the weights are damaged.
    """
    found = PushedFiles()
    for name in (CONFIG, GENERATION_CONFIG, *PROCESSOR_FILES, *EMBEDDING_FILES):
        if (folder / name).is_file():
            found.add(name, folder / name)
    for path in sorted((folder / TEMPLATES).glob("*.jinja")):
        found.add(f"{TEMPLATES}/{path.name}", path)
    for path in _weights(folder):
        found.add(path.name, path)
    _add_code(folder, found)
    _check_processor(folder, found)
    return found


def adapter_files(folder: Path) -> PushedFiles:
    """Collects the files of an adapter, as [`model_files`] does those of a model."""
    found = PushedFiles()
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise _no_weights(folder, ADAPTER_WEIGHTS)
    found.add(ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    found.add(ADAPTER_WEIGHTS, path)
    for name in PROCESSOR_FILES:  # saved with an adapter that adds tokens
        if (folder / name).is_file():
            found.add(name, folder / name)
    _add_code(folder, found)  # of the processor
    check_weights([path])
    return found


def add_licence(folder: Path, found: PushedFiles) -> None:
    """
    Adds the files of the licence: those of the checkpoint, or the licence of this package if the model card names it.
    Code of this package has its licence, whatever that of the weights.

    Raises:
        PushError: If the model card refers to a file that is missing.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and _LICENCES.fullmatch(path.name):
            found.add(path.name, path)
    card = _metadata(found.text(README))
    ours = (shipped_root() / LICENCE).read_bytes()
    has_code = any(name.endswith(".py") for name in found.files)
    if card.get("license") == "apache-2.0":
        if LICENCE not in found.files:
            found.add(LICENCE, ours)
            found.notes.append(f"{LICENCE}: added, since the model card names apache-2.0")
    elif has_code and LICENCE_OF_CODE not in found.files:
        found.add(LICENCE_OF_CODE, ours)
        found.notes.append(f"{LICENCE_OF_CODE}: added, the licence of the Python files")
    link = card.get("license_link")
    if isinstance(link, str) and "://" not in link and link not in found.files:
        raise PushError(f"{README} refers to the licence {link!r}, which is missing: add the file to {folder}.")
    if "license" not in card:
        found.notes.append(f"{README}: names no licence, so others may not use the model; add `license: …` at the top")


def add_card(found: PushedFiles, card: str, replacements: dict[str, str]) -> None:
    """Adds a model card without paths of this machine, and with the name that the model has on the Hub."""
    check_no_tokens(README, card)
    text, paths = shorten_paths(card, replacements)
    found.add(README, text.encode())
    if paths:
        found.notes.append(f"{README}: paths of this machine shortened ({', '.join(paths)})")


def add_images(folder: Path, found: PushedFiles) -> None:
    """Adds the images in the folder that the model card shows, such as those of the routing."""
    for name in dict.fromkeys(_IMAGES.findall(found.text(README))):
        path = folder / name
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            found.add(Path(name).as_posix(), path)
        else:
            found.notes.append(f"{README}: shows {name}, which is not in the folder")


@contextmanager
def staged(folder: Path, found: PushedFiles) -> Iterator[Path]:
    """
    Context manager with a temporary folder that contains what a model card is written from: the files to upload except
    the code, the recipe of the training, and empty files for the figures.
    """
    with tempfile.TemporaryDirectory() as stage:
        for name, file in found.files.items():
            if name.endswith((".json", ".jinja")) and "/" not in name:
                Path(stage, name).write_text(file.text, encoding="utf-8")
        if ADAPTER_WEIGHTS in found.files:
            shutil.copyfile(folder / ADAPTER_WEIGHTS, Path(stage, ADAPTER_WEIGHTS))
        recipe = saved_recipe(folder)
        if recipe is not None:
            Path(stage, RECIPE).write_text(recipe_text(recipe), encoding="utf-8")
        for name in figures_in(folder):
            Path(stage, name).touch()
        yield Path(stage)


def with_new_name(card: str, names: set[str], repo_id: str) -> str:
    """
    Returns a model card in which the model has its name on the Hub: in programs that load it, in the title and in the
    metadata.

    Args:
        card (`str`):
            The model card.
        names (`set[str]`):
            What the model was called before: its folder.
        repo_id (`str`):
            Name of the repository.
    """
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    card = re.sub(
        rf"(\b(?:from_pretrained|SentenceTransformer)\(\s*[\"'])(?:{known})([\"'])", rf"\g<1>{repo_id}\2", card
    )
    short = repo_id.partition("/")[2]
    return re.sub(rf"^(# |model_name: |- name: )(?:{known})$", rf"\g<1>{short}", card, flags=re.MULTILINE)


def _metadata(card: str) -> dict[str, Any]:
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise PushError(f"The metadata at the top of {README} cannot be read: {message}") from error


def _weights(folder: Path) -> list[Path]:
    """Returns the files that Transformers loads: a single file if there is one, otherwise those of the index."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        files = [folder / SAFE_WEIGHTS_NAME]
        check_weights(files)
        _check_sizes(files)
        return files
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise _no_weights(folder, SAFE_WEIGHTS_NAME)
    weight_map = read_index(index)
    names = sorted(set(weight_map.values()))
    if foreign := [name for name in names if not _WEIGHTS.fullmatch(name)]:
        raise PushError(f"{index} lists {foreign[0]!r}, which is not a file of weights: save the model again.")
    files = [folder / name for name in names]
    check_weights(files, weight_map)
    _check_sizes(files)
    return [index, *files]


def _check_sizes(files: list[Path]) -> None:
    for path in files:
        if path.stat().st_size > MAX_FILE_SIZE:
            raise PushError(
                f"{path} has {path.stat().st_size / 1e9:.1f} GB, but files on the Hub should have at most 50 GB: load "
                'the model and save it again, which splits the weights (`max_shard_size="50GB"` by default).'
            )


def _no_weights(folder: Path, name: str) -> PushError:
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        return PushError(
            f"{folder} has weights as a pickle ({pickles[0]}), which can contain code and is not uploaded: load the "
            f"model and save it again, which writes {name}."
        )
    inner = [
        path.parent.name for path in sorted(folder.glob(f"*/{CONFIG}")) + sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))
    ]
    hint = f": did you mean {folder / inner[0]}?" if inner else ": save the model there with `save_pretrained`."
    return PushError(f"{folder} has no weights ({name}){hint}")


def _add_code(folder: Path, found: PushedFiles) -> None:
    """Adds the Python files that `auto_map` names, and those that they import. Files of this package are completed."""
    entries = {
        module for name in (CONFIG, *PROCESSOR_CONFIGS, "tokenizer_config.json") for module in _modules(found, name)
    }
    if not entries:
        if found.json(CONFIG).get("model_type", "").startswith(("sparse_moe", "upcycled_")):
            raise PushError(f"{CONFIG} has no `auto_map`, which names the code of the model: save the model again.")
        return
    needed = {name for entry in entries for name in _with_imports(folder, f"{entry}.py")}
    missing = {name for name in needed if not (folder / name).is_file()}
    if missing:
        needed |= {name for entry in entries for name in _with_imports(PACKAGE, f"{entry}.py")}
        _check_completion(folder, needed, missing)
        added = sorted(name for name in needed if not (folder / name).is_file())
        found.notes.append(f"{', '.join(added)}: added from the installed package")
    for name in sorted(needed):
        found.add(name, (folder if (folder / name).is_file() else PACKAGE) / name)


def _check_completion(folder: Path, needed: set[str], missing: set[str]) -> None:
    """Raises `PushError` unless the code of a checkpoint is this package's, of the same version."""
    if unknown := sorted(name for name in needed if not (PACKAGE / name).is_file()):
        raise PushError(
            f"{folder} lacks {', '.join(sorted(missing))}, which cannot be completed, since {unknown[0]} is not a file "
            "of this package: save the model again."
        )
    differ = [
        name
        for name in sorted(needed)
        if (folder / name).is_file() and (folder / name).read_bytes() != (PACKAGE / name).read_bytes()
    ]
    if differ:
        raise PushError(
            f"{folder} lacks {', '.join(sorted(missing))}, and its other code is of another version of this package "
            f"({differ[0]} differs), so it cannot be completed: save the model again."
        )


def _modules(found: PushedFiles, name: str) -> Iterator[str]:
    """Yields the modules in this repository that a configuration refers to."""
    for value in found.json(name).get("auto_map", {}).values():
        for reference in value if isinstance(value, list) else [value]:
            if not isinstance(reference, str):
                continue
            if "--" in reference:
                raise PushError(
                    f"{name} takes its code from the repository {reference.partition('--')[0]}: save the model or "
                    "processor again, so that its code is in the folder."
                )
            yield reference.partition(".")[0]


def _with_imports(folder: Path, name: str) -> list[str]:
    """Returns a Python file and those that it imports. A file that is missing is only named."""
    if not (folder / name).is_file():
        return [name]
    found, waiting = [name], [name]
    while waiting:
        imported = _imports_of(folder / waiting.pop())
        new = [one for one in imported if one not in found]
        found += new
        waiting += [one for one in new if (folder / one).is_file()]
    return found


def _imports_of(path: Path) -> list[str]:
    return [f"{module}.py" for module in get_relative_imports(path)]


def _check_processor(folder: Path, found: PushedFiles) -> None:
    reads_images = "vision_config" in found.json(CONFIG)
    if not any(name in found.files for name in TOKENIZER_FILES):
        kind = "processor" if reads_images else "tokenizer"
        raise PushError(f"{folder} has no {kind}: save it there with `{kind}.save_pretrained({str(folder)!r})`.")
    if reads_images and not any(name in found.files for name in PROCESSOR_CONFIGS):
        raise PushError(
            f"{folder} has a tokenizer, but no processor for images: save it there with "
            f"`processor.save_pretrained({str(folder)!r})`."
        )
    has_template = any(name.startswith("chat_template") for name in found.files)
    if not has_template and "chat_template" not in found.json("tokenizer_config.json"):
        found.notes.append("no chat template: the model cannot be used for chat")


def check_and_clean(found: PushedFiles) -> None:
    """
    Removes paths of this machine from configurations, and checks that no file contains tokens or such paths.

    Raises:
        PushError: If a file must not be published.
    """
    for name, file in list(found.files.items()):
        if name.endswith(".safetensors") and isinstance(file.content, Path):
            check_weights_metadata(file.content, name)
        elif name.endswith(".json"):
            text, removed = clean_json(name, file.text)
            if removed:
                found.add(name, text.encode())
                found.notes.append(f"{name}: paths of this machine removed ({', '.join(removed)})")
        elif not name.endswith(".model"):  # a binary vocabulary
            check_no_tokens(name, file.text)
            if name.endswith((".py", ".jinja")):
                check_no_paths(name, file.text)
