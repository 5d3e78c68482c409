"""`push_to_hub` of Transformers uploads no paths of this machine, which a model remembers from upcycling."""

import json
from pathlib import Path

import pytest
from transformers import modeling_utils
from transformers.utils import hub
from transformers.utils.hub import PushToHubMixin

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from tests.support.models import TEXT_CONFIG, make_config
from tests.support.upcycled import make_few_experts

SNAPSHOT = "/root/.cache/huggingface/hub/models--team--vit.b/snapshots/0123/"


class Repository:
    repo_id = "user/model"

    def create_repo(self, *args, **kwargs):
        return self

    def save(self, path):
        """In place of the empty model card."""


@pytest.fixture
def uploaded(monkeypatch) -> list[dict]:
    """Collects the configurations that would be uploaded."""
    found: list[dict] = []

    def upload(self, folder, *args, **kwargs):
        found.append(json.loads((Path(folder) / "config.json").read_text()))

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    for module in (hub, modeling_utils):
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: Repository())
        monkeypatch.setattr(module, "hf_api", Repository)
    return found


@pytest.mark.parametrize(
    ("base", "published"),
    [
        ("/home/me/base", None),
        ("../base", None),
        ("outputs/runs/base", None),
        (r"C:\models\base", None),
        ("~/base", None),
        ("{here}", None),
        ("team/llava-1.5", "team/llava-1.5"),
        ("gpt2", "gpt2"),
        (SNAPSHOT, "team/vit.b"),
        (SNAPSHOT.replace("/", "\\"), "team/vit.b"),
    ],
)
def test_folders_are_left_out_and_names_on_the_hub_are_kept(base, published, uploaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    start = {"name": "copy", "seed": 3, "base_model": base.format(here="here"), "vision_encoder": "team/vit"}
    config = SparseMoeVlmTextConfig(**TEXT_CONFIG, start=start)
    config.push_to_hub("user/model")
    (found,) = uploaded
    expected = {"name": "copy", "seed": 3, "vision_encoder": "team/vit"}
    assert found["start"] == expected | ({} if published is None else {"base_model": published})
    assert config.start == start


def test_models_and_configurations_of_all_kinds(uploaded, tmp_path):
    start = {"name": "copy", "base_model": str(tmp_path), "vision_encoder": str(tmp_path)}
    model = make_few_experts("llama")
    model.config.experts_config.start = start
    ours = make_config()
    ours.text_config.start = start
    model.push_to_hub("user/model")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    for config in (model.config, ours):
        config.push_to_hub("user/model")
    assert type(ours) is SparseMoeVlmConfig
    assert [found.get("experts_config", found.get("text_config"))["start"] for found in uploaded] == [
        {"name": "copy"}
    ] * 4
    assert model.config.experts_config.start is start
    assert ours.text_config.start is start
    model.save_pretrained(tmp_path / "local")
    assert json.loads((tmp_path / "local/config.json").read_text())["experts_config"]["start"] == start
