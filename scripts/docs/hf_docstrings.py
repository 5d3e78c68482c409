"""
A Griffe extension that reads docstrings in the form of the Transformers documentation.

Griffe parses docstrings in Google's form. Transformers' form differs in three ways, which this extension translates:

- arguments: ``name (`int`, *optional*, defaults to 8):`` becomes the type `int` and the default value `8`;
- return values: `` `torch.Tensor`: logits … `` becomes the type `torch.Tensor`;
- cross references: ``[`Name`]``, ``[`~package.Name`]`` (shown as `Name`) and ``[`.module.name`]`` become links to the
  object. A name is looked up in the class and the module of the docstring and in the packages around it. If it is not
  there, the package must have exactly one object of that name. Other names become links to themselves, which MkDocs
  reports as broken links.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import griffe

ARGUMENT = re.compile(r"^(?P<indent> *)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*) \((?P<spec>\[?`.*)\):(?P<rest> .*)?$")
RESULT = re.compile(r"^( *)((?:\[?`[^`]+`\]?(?:, |,? or | of shape )?)+?)(, \*optional\*)?:(?= )")
REFERENCE = re.compile(r"\[`(?P<name>~?[\w.]+)`\](?![\[(])")
# Pages of the Transformers documentation that docstrings refer to.
TRANSFORMERS = "https://huggingface.co/docs/transformers/"
TRANSFORMERS_PAGES = {
    "transformers.ContinuousMixin": "main/continuous_batching",
    "transformers.GenerationMixin": "main_classes/text_generation",
    "transformers.PreTrainedConfig": "main_classes/configuration",
    "transformers.PreTrainedModel": "main_classes/model",
    "transformers.ProcessorMixin": "main_classes/processors",
    "transformers.TrainingArguments": "main_classes/trainer",
    "transformers.modeling_outputs": "main_classes/output",
}


@dataclass(frozen=True)
class Argument:
    """What a line such as ``name (`int` or `str`, *optional*, defaults to 8):``, parsed."""

    type: str
    default: str | None
    condition: str | None  # "returned with the router logits"

    @classmethod
    def of(cls, spec: str) -> Argument:
        types, others, default = [], [], None
        for item in re.split(r", (?=(?:[^`]*`[^`]*`)*[^`]*$)", spec):  # commas within backticks do not separate
            if item == "*optional*":
                default = default or "None"
            elif item.startswith("defaults to "):
                default = item.removeprefix("defaults to ").strip("`")
            elif item.startswith(("`", "[`")):
                types.append(item)
            else:
                others.append(item)
        return cls(_type(", ".join(types)), default, ", ".join(others) or None)


def _type(text: str) -> str:
    """Returns the type in a docstring: `A | B` of `` `A`, `B` or `C` ``, and other texts unchanged."""
    text = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\]", r"`\1`", text)
    parts = re.split(r"(?:, or |, | or )(?=`)", text)
    if all(re.fullmatch(r"`[^`]+`", part) for part in parts):
        return " | ".join(part.strip("`").replace(" or ", " | ") for part in parts)
    return text.replace("`", "")


def to_google(text: str) -> tuple[str, dict[str, str]]:
    """Converts a docstring to Google's form, and returns it with the default values in it, by argument."""
    lines, defaults, in_code = [], {}, False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and (found := ARGUMENT.match(line)):
            argument = Argument.of(found["spec"])
            if argument.default is not None:
                defaults[found["names"]] = argument.default
            line = f"{found['indent']}{found['names']} ({argument.type}):{found['rest'] or ''}"
            if argument.condition:
                line += f" {argument.condition[0].upper()}{argument.condition[1:]}."
        elif not in_code and (found := RESULT.match(line)):
            line = f"{found[1]}{_type(found[2])}{' | None' if found[3] else ''}:{line[found.end() :]}"
        lines.append(line)
    return re.sub(r"```python\n( *)>>> ", r"```pycon\n\1>>> ", "\n".join(lines)), defaults


def link_references(text: str, resolve: Callable[[str], str]) -> str:
    """Turns cross references into links, except in blocks of code."""

    def link(found: re.Match) -> str:
        name = found["name"]
        shown = name.rpartition(".")[2] if name.startswith(("~", ".")) else name
        target = resolve(name.lstrip("~"))
        return f"[`{shown}`]({target})" if target.startswith("https://") else f"[`{shown}`][{target}]"

    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else REFERENCE.sub(link, part) for number, part in enumerate(parts))


class HuggingFaceDocstrings(griffe.Extension):
    """Translates every docstring of a package once the package is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        objects = list(_objects(pkg))
        paths: dict[str, set[str]] = {}
        for known in objects:
            paths.setdefault(known.name, set()).add(known.path)
        for documented in objects:
            if documented.docstring is not None:
                _translate(documented, pkg, paths)


def _translate(documented: griffe.Object, package: griffe.Module, paths: dict[str, set[str]]) -> None:
    docstring = documented.docstring
    text, defaults = to_google(docstring.value)
    docstring.value = link_references(text, lambda name: find(name, documented, package, paths))
    for section in docstring.parsed:  # cached by Griffe, so the changes are kept
        if section.kind is griffe.DocstringSectionKind.parameters:
            for parameter in section.value:
                parameter.value = defaults.get(parameter.name, parameter.value)


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from _objects(member)


def find(name: str, documented: griffe.Object, package: griffe.Module, paths: dict[str, set[str]]) -> str:
    """Returns the path of the object that a docstring calls `name`, or the URL of an object of Transformers."""
    for prefix, page in TRANSFORMERS_PAGES.items():
        if name == prefix or name.startswith(f"{prefix}."):
            return f"{TRANSFORMERS}{page}#{name}"
    if name.startswith("."):
        return f"{package.path}{name}"
    scope: griffe.Object | None = documented
    while scope is not None:
        target = _member(scope, name)
        if target is not None:
            return target
        scope = scope.parent
    first, _, rest = name.partition(".")
    candidates = paths.get(first, set())
    return ".".join([*candidates, *rest.split(".")]).strip(".") if len(candidates) == 1 else name


def _member(scope: griffe.Object, name: str) -> str | None:
    """Returns the path of the object that has this name in a scope, also if it is imported there."""
    try:
        found = scope[name]
        # With `from .upcycle import upcycle`, the name means the function, not the module of the same name.
        if found.is_module and found.name in found.members:
            found = found.members[found.name]
        return found.canonical_path
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None
