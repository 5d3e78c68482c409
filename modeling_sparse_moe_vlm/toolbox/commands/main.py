"""`sparse-moe-vlm <verb>`: finds the verb and runs it. Libraries that take seconds to import wait until it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType

from ... import __version__
from . import evaluate, explain, generate, info, lora, place, routing_report, train, upcycle

COMMAND = "sparse-moe-vlm"
# Each has a docstring with an example, `add_arguments` and `run`.
VERBS: dict[str, ModuleType] = {
    "upcycle": upcycle,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "explain": explain,
    "lora": lora,
    "place": place,
    "routing-report": routing_report,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Runs the command.

    Args:
        arguments (`Sequence[str]`, *optional*):
            What follows the name of the command; by default, as the process was started.

    Raises:
        SystemExit: With exit code 2 for wrong usage, and after `--help` and `--version`.
    """
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.verb is None:
        parser.print_help()
    else:
        from ... import registered  # noqa: F401  (which the package leaves to the command)

        VERBS[parsed.verb].run(parsed)


def run_script(verb: str) -> None:
    """Runs a verb as a script of its own, with the arguments that the process was started with."""
    parser = argparse.ArgumentParser(**_texts(VERBS[verb]))
    VERBS[verb].add_arguments(parser)
    VERBS[verb].run(parser.parse_args())


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Sparse mixture-of-experts vision-language models: train, use and inspect them."
    )
    parser.add_argument("--version", action="version", version=f"{COMMAND} {__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="verb", title="verbs", description=f"help: {COMMAND} VERB --help"
    )
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").strip().partition("\n\n")[0]
        verb.add_arguments(verbs.add_parser(name, help=summary, **_texts(verb)))
    return parser


def _texts(verb: ModuleType) -> dict:
    return {"description": verb.__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
