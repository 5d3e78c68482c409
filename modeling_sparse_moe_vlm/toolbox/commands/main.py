"""The entry point of `sparse-moe-vlm VERB`. Libraries that take seconds to import are only imported by `run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ... import __version__
from . import app, evaluate, explain, generate, info, lora, place, push, routing_report, train, upcycle

COMMAND = "sparse-moe-vlm"
EXIT_CODE_OF_INTERRUPTS = 130  # 128 + the number of SIGINT
# Each verb is a module with `add_arguments`, `run` and a docstring, which is the help text and shows an example.
VERBS: dict[str, ModuleType] = {
    "upcycle": upcycle,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "explain": explain,
    "app": app,
    "lora": lora,
    "place": place,
    "routing-report": routing_report,
    "push": push,
    "info": info,
}

# Verbs that take models and data only as options.
NAMED_BY_OPTIONS = {
    "train": "the model with `--model` and the data with `--data`",
    "lora": "the model with `--model` and the data with `--data`",
    "generate": "the model with `--model` and images with `--image`",
    "explain": "the model with `--model` and an image with `--image`",
}

# Options whose values are texts, not paths.
TEXTS = ("question", "message", "set")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Runs the command `sparse-moe-vlm`. Without a verb, prints the help text.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Arguments after the name of the command. By default, those of the process (`sys.argv[1:]`).

    Raises:
        SystemExit: With exit code 2 for wrong usage and for mistakes in the input, 130 if the user interrupts the
            command (Ctrl-C), and 0 after `--help` and `--version`.
    """
    parser = build_parser()
    parsed, others = parser.parse_known_args(arguments)
    if others:
        parser.error(_not_recognised(parsed.verb, others))
    if parsed.verb is None:
        parser.print_help()
    else:
        _run(parsed.verb, parsed)


def run_script(verb: str) -> None:
    """Runs a verb as a separate script, with the arguments of the process."""
    parser = argparse.ArgumentParser(**_texts(VERBS[verb]))
    VERBS[verb].add_arguments(parser)
    parsed, others = parser.parse_known_args()
    if others:
        parser.error(_not_recognised(verb, others))
    _run(verb, parsed)


def _not_recognised(verb: str | None, others: Sequence[str]) -> str:
    """Returns the error for arguments that a verb does not have. A path is probably a model or data."""
    named = NAMED_BY_OPTIONS.get(verb or "") if not others[0].startswith("-") else None
    hint = f". Name {named}." if named else ""
    return f"unrecognized arguments: {' '.join(others)}{hint}"


def _run(verb: str, arguments: argparse.Namespace) -> None:
    """Runs a verb. If the user interrupts it (Ctrl-C), says so in one line and exits as shells expect."""
    _expand_home(arguments)
    try:
        # Makes our classes known to the auto classes, which importing the package does not do.
        from ... import registered  # noqa: F401

        VERBS[verb].run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_CODE_OF_INTERRUPTS) from None


def _expand_home(arguments: argparse.Namespace) -> None:
    """Replaces `~` at the beginning of paths, which shells leave in `--output=~/model`."""
    for name, value in vars(arguments).items():
        if name in TEXTS:
            continue
        if isinstance(value, str):
            setattr(arguments, name, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(arguments, name, [os.path.expanduser(one) if isinstance(one, str) else one for one in value])


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command, with a subparser for each verb."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Sparse mixture-of-experts vision-language models: train, use and inspect them."
    )
    parser.add_argument("--version", action="version", version=f"{COMMAND} {__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="verb", title="verbs", description=f"Run `{COMMAND} VERB --help` for examples and options."
    )
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").strip().partition("\n\n")[0]
        verb.add_arguments(verbs.add_parser(name, help=summary, **_texts(verb)))
    return parser


def _texts(verb: ModuleType) -> dict:
    return {"description": verb.__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
