"""How blocks of pages are run: failures and outputs that differ are found."""

import pytest

from tests.support.pages import Block, blocks_of, run_page

pytestmark = pytest.mark.newest


def page(*blocks: str) -> str:
    return "\n\nText.\n\n".join(blocks)


def python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def shell(*lines: str) -> str:
    return "\n".join(["```bash", *lines, "```"])


def test_blocks_and_reasons():
    text = page(python("x = 1"), "<!-- not run: it takes hours -->\n" + shell("make"), "```text\nshown\n```")
    assert blocks_of(text) == [
        Block("python", "x = 1\n", None),
        Block("bash", "make\n", "it takes hours"),
        Block("text", "shown\n", None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        page(python("x = [1, 2]"), python("print(x)  # [1, 2]")),
        python("print(1)", "#> 1", "print(2)", "# > 2"),
        python("for x in (1, 2):", "    print(x)", "#> 1", "#> 2"),
        python("for x in (1, 2):", "    print(x)", "# > 1", "# > 2"),
        python("print(0.25)  # 0.…"),
        python("x = 1  # 2"),
        python("print(1)  # 2 is next"),
        python("print(1)  # (rows, columns)"),
        python("print((1, 2))  # (1, …)"),
        python("import torch", "print(torch.ones(1, 2).shape)  # torch.Size([1, 2])"),
        python("import torch", "print(torch.ones(1, 2).shape)  # (1, 2)"),
        python("print(1)  # one"),
        page(python("open('a.txt', 'w').write('a')"), shell("cat a.txt", "#> a")),
        shell("echo a b c  # a comment", "#> a … c"),
        shell("sparse-moe-vlm --version", "#> sparse-moe-vlm …"),
        shell("sparse-moe-vlm info tiny --json | grep -c total", "#> 1"),
        shell("python scripts/count_parameters.py tiny > size.txt; test -s size.txt"),
        shell("python -c 'print(1)'", "#> 1"),
        page(shell("exit 0"), "<!-- not run: it fails -->\n" + shell("exit 1")),
    ],
)
def test_blocks_that_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (python("x = 1", "y"), "NameError"),
        (python("print(1)  # 2"), "says '2', but got '1'"),
        (python("print(1)", "#> 1", "print(3)", "#> 2"), "says '2', but got '3'"),
        (python("print(1)", "# > 2"), "says '2', but got '1'"),
        (python("print((1, 2))  # (1, 3)"), "but got"),
        (python("import torch", "print(torch.ones(2))  # tensor([1.])"), "but got"),
        (python("import torch", "print(torch.ones(1, 2).shape)  # (2, 1)"), "but got"),
        (python("print(-1)  # -2"), "but got"),
        (python("print(0.25)  # 0.3…"), "but got"),
        (shell("exit 3"), "exit code 3"),
        (shell("false", "echo a"), "exit code 1"),
        (shell("false | true"), "exit code 1"),
        (shell("echo $unset"), "unbound variable"),
        (shell("echo a", "#> b"), "says 'b', but got 'a'"),
        (shell("echo a", "# > b"), "says 'b', but got 'a'"),
        (shell("sparse-moe-vlm nope"), "exit code 2"),
        (shell("python scripts/nowhere.py"), "exit code 1"),
        (page(shell("touch a"), python("raise SystemExit(0)")), "SystemExit"),
    ],
)
def test_blocks_that_fail(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=message.replace("$", r"\$")):
        run_page(text, tmp_path)
