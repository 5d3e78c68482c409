"""count_parameters.py prints only a table."""

import pytest

from modeling_sparse_moe_vlm import SparseMoeVlmConfig

TINY = "configuration/models/tiny.json"


def test_counts_those_of_the_configuration(run_here):
    total = SparseMoeVlmConfig.from_pretrained(TINY).num_parameters()
    header, _, *rows = run_here("count_parameters.py", TINY, TINY).splitlines()
    assert header.startswith("| model | parameters |")
    assert len(rows) == 2
    assert rows[0].startswith(f"| tiny | {total / 1e6:.1f} M | ")
    assert rows[0].endswith(f" | {2 * total / 1e6:.1f} MB |")


def test_help_is_not_a_table(run_here, capsys):
    with pytest.raises(SystemExit):
        run_here("count_parameters.py", "--help")
    printed = capsys.readouterr().out
    assert printed.startswith("usage:")
    assert "| model |" not in printed
