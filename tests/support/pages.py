"""
Runs the blocks of a page of the documentation, in order and in one folder.

Python blocks share one namespace. Shell blocks run in bash with `set -eu`. In them, the command `sparse-moe-vlm` and
the scripts of the repository run in the process of the tests, which saves the time of importing torch for each; all
other programs run as they are. Verbs that take a recipe get a small one.

Expected output is compared. In Python it is the comment behind a `print(…)`, if that is a value, or lines with `#>`
(`# >` once ruff has formatted the page) below a statement; in the shell it is all lines with `#>` of the block. An
ellipsis (`…`) stands for any text.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import runpy
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modeling_sparse_moe_vlm.toolbox.commands.main import main
from tests.support.processes import ROOT
from tests.support.small_run import SMALL_RUN

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUN = ("python", "bash")
WITH_RECIPE = ("train", "evaluate", "lora")
DEFAULT = {"train": "demo", "lora": "experts"}  # recipes
# Sends its arguments to the process of the tests, and prints what comes back.
CLIENT = """#!{python} -SE
import json, os, socket, sys
arguments = [{name!r}, *sys.argv[1:]]
if {name!r} == "python" and not "".join(sys.argv[1:2]).startswith("scripts/"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    connection.sendall(json.dumps([arguments, os.getcwd()]).encode())
    connection.shutdown(socket.SHUT_WR)
    code, output, errors = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(code)
"""


@dataclass(frozen=True)
class Block:
    """A block of code on a page. `reason` says why it is not run."""

    language: str
    code: str
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    """Returns all fenced blocks of a page."""
    return [Block(found["language"], found["code"], found["reason"]) for found in FENCE.finditer(text)]


def run_page(text: str, folder: Path) -> None:
    """
    Runs the blocks of a page in `folder`, which is the working directory.

    Raises:
        AssertionError: If a block fails, or its output is not what the page says.
    """
    names: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks_of(text)):
        if block.reason is None and block.language in RUN:
            try:
                run_python(block.code, names) if block.language == "python" else run_shell(block.code, folder)
            except (Exception, SystemExit) as error:
                message = f"block {number} ({block.language}): {error!r}\n{block.code}\n{traceback.format_exc()}"
                raise AssertionError(message) from error


def run_python(code: str, names: dict) -> None:
    """Runs the statements one by one and compares what each prints."""
    lines = code.split("\n")
    statements = ast.parse(code).body
    ends = [statement.lineno - 1 for statement in statements[1:]] + [len(lines)]
    for statement, end in zip(statements, ends, strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module([statement], []), "<page>", "exec"), names)
        if (expected := expected_output(statement, lines[statement.end_lineno - 1 : end])) is not None:
            compare(printed.getvalue(), expected)


def expected_output(statement: ast.stmt, lines: list[str]) -> str | None:
    """Returns what a statement prints according to the comment behind it, or to the lines below it."""
    if (below := shown_output(lines[1:])) is not None:
        return below
    is_print = isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("print(")
    comment = lines[0].encode()[statement.end_col_offset :].decode().partition("#")[2].strip()
    return comment if is_print and is_value(comment) else None


def shown_output(lines: list[str]) -> str | None:
    """Returns the output that lines such as `# > 1` show. Ruff writes a space behind the `#`."""
    shown = [found[1] for line in lines if (found := re.match(r"# ?> ?(.*)", line))]
    return "\n".join(shown) if shown else None


def is_value(comment: str) -> bool:
    """Whether a comment is a value and not a text: a literal, or a tensor or its size."""
    try:
        ast.literal_eval(re.sub(r"^(?:torch\.Size|tensor)(?=\()", "", comment.replace("…", "0")))
    except (SyntaxError, ValueError):
        return False
    return True


def run_shell(code: str, folder: Path) -> None:
    """Runs the lines in bash and compares what they print."""
    with tempfile.TemporaryDirectory() as programs, socket.socket(socket.AF_UNIX) as server:
        address = f"{programs}/socket"
        server.bind(address)
        server.listen()
        server.settimeout(0.1)
        for name in ("sparse-moe-vlm", "python"):
            client = Path(programs, name)
            client.write_text(CLIENT.format(python=sys.executable, name=name, address=address))
            client.chmod(client.stat().st_mode | stat.S_IEXEC)
        environment = os.environ | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        with open(f"{programs}/output", "w+") as output, open(f"{programs}/errors", "w+") as errors:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment, stdout=output, stderr=errors
            )
            while process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    _serve(server.accept()[0])
            output.seek(0)
            errors.seek(0)
            assert process.returncode == 0, f"exit code {process.returncode}\n{output.read()}\n{errors.read()}"
            if (expected := shown_output(code.split("\n"))) is not None:
                compare(output.read(), expected)


def _serve(connection: socket.socket) -> None:
    with connection:
        (name, *arguments), folder = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
        output, errors, code = io.StringIO(), io.StringIO(), 0
        with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                if name == "python":
                    _run_script(*arguments)
                else:
                    main(with_small_recipe(arguments))
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            except Exception:
                traceback.print_exc()
                code = 1
        connection.sendall(json.dumps([code, output.getvalue(), errors.getvalue()]).encode())


def _run_script(path: str, *arguments: str) -> None:
    with _arguments([path, *with_small_recipe([_verb(path), *arguments])[1:]]):
        runpy.run_path(str(ROOT / path), run_name="__main__")


def _verb(path: str) -> str:
    return {"finetune_lora": "lora"}.get(Path(path).stem, Path(path).stem)


@contextlib.contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


def with_small_recipe(arguments: list[str]) -> list[str]:
    """
    The arguments of a verb. If it takes a recipe: with changes that make it small, and with an output folder below the
    working directory, where a clone's own `outputs` would be overwritten.
    """
    if arguments[:1] and arguments[0] in WITH_RECIPE and not {"--help", "--check"} & set(arguments):
        changes = SMALL_RUN
        if arguments[0] == "evaluate":  # without positional arguments, it evaluates on the scenes of a recipe
            of_data = {key: value for key, value in changes.items() if key.startswith("data.")}
            changes = of_data if arguments[1:2] and arguments[1].startswith("--") else {}
        elif "--data" in arguments:  # own data
            changes = {key: value for key, value in changes.items() if not key.startswith("data.")}
        arguments = [*arguments, *(f"--set={key}={value}" for key, value in changes.items())]
        if arguments[0] != "evaluate" and not any(argument.startswith("--output-dir") for argument in arguments):
            recipe = arguments[arguments.index("--recipe") + 1] if "--recipe" in arguments else DEFAULT[arguments[0]]
            folder = "outputs" if arguments[0] == "train" else "outputs/lora"
            arguments.append(f"--output-dir={folder}/{Path(recipe).stem}")
    return arguments


def compare(printed: str, expected: str) -> None:
    """
    Compares printed text with what a page says. `torch.Size([1, 2])` may be written as `(1, 2)`.

    Raises:
        AssertionError: If they differ.
    """
    printed, expected = (re.sub(r"torch\.Size\(\[(.*?)\]\)", r"(\1)", text).strip() for text in (printed, expected))
    pattern = r"[\s\S]*".join(re.escape(part.strip(" ")) for part in expected.split("…"))
    found = "\n".join(line.rstrip() for line in printed.split("\n"))
    assert re.fullmatch(pattern, found), f"The page says {expected!r}, but got {found!r}."
