"""The notebooks run from top to bottom, and their saved outputs are those of a run."""

import json
import os
import re
import sys

import pytest

from tests.support.processes import ROOT

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

pytestmark = pytest.mark.newest
QUICKSTART = ROOT / "notebooks/quickstart.ipynb"


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []) if output.get("name") == "stdout")


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKSTART_STEPS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("JUPYTER_PATH", f"{sys.prefix}/share/jupyter")
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(printed(cell) for cell in notebook.cells)
    assert "million of them active per image token" in text
    assert re.search(r"after training: \d+ % of the answers are right", text)
    for name in ("expert_load.png", "explanation.png", "my-model/model.safetensors"):
        assert (tmp_path / name).exists(), name


def test_saved_outputs():
    notebook = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    text = "".join("".join(output.get("text", "")) for output in outputs)
    before, after = (int(re.search(rf"{when} training: (\d+) %", text)[1]) for when in ("before", "after"))
    assert before < 10 < 60 < after
    assert all(output.get("name") != "stderr" for output in outputs)  # progress bars, and warnings with paths
    for path in ("/home/", "/tmp/", "site-packages"):
        assert path not in QUICKSTART.read_text(encoding="utf-8"), path
