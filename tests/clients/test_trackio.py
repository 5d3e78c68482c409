"""trackio receives all figures of a training, offline."""

import pytest

from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor
from tests.support.models import make_model
from tests.support.upcycled import make_rows, make_upcycled
from tests.toolbox.routing.test_monitor_figures import COEFFICIENTS, Recorder, train


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))  # read when the package is imported
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield pytest.importorskip("trackio")


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_figures_of_a_training(kind, trackio, tmp_path):
    recorder = Recorder()
    model = make_model(**COEFFICIENTS) if kind == "ours" else make_upcycled(output_router_logits=True)
    rows = None if kind == "ours" else make_rows()
    train(
        model,
        tmp_path,
        [RoutingMonitor(), recorder],
        rows=rows,
        report_to="trackio",
        project=kind,
        run_name="first",
        eval_strategy="no",
    )
    (run,) = trackio.Api().runs(kind)
    assert run.name == "first"
    assert run.config["model_type"] == model.config.model_type
    first = trackio.sqlite_storage.SQLiteStorage.get_logs(kind, "first")[0]
    assert {"loss", "aux_loss", "tokens_per_second_image"} < recorder.logs[0].keys()
    assert any("layer_1" in name for name in recorder.logs[0])
    for name, value in recorder.logs[0].items():
        assert first[f"train/{name}"] == pytest.approx(value), name
