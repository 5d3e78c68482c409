"""Import paths from before the toolbox had packages."""

import subprocess
import sys
from importlib import import_module

import pytest

from modeling_sparse_moe_vlm.toolbox.former_names import FORMER_NAMES

pytestmark = pytest.mark.newest

TOOLBOX = "modeling_sparse_moe_vlm.toolbox"
# Public names, by their former import path.
PUBLIC = {
    "collator": ["VisionLanguageCollator"],
    "evaluation": ["exact_match", "generate_answers"],
    "expert_lora": ["ExpertLoraConfig", "factor_expert_lora", "load_expert_lora", "num_adapter_parameters"],
    "expert_selection": ["busiest_experts", "expert_lora_config"],
    "isolation": ["freeze_text"],
    "modality_weights": ["ModalityWeights", "modality_weights"],
    "paging": ["PagedExperts", "PagingCounts", "page_experts", "unpage_experts"],
    "placement": ["DeviceShare", "describe_placement", "plan_expert_placement"],
    "routing_counts": ["RoutingCounts", "measure_routing"],
    "routing_statistics": ["RoutingStatistics", "expert_load", "routing_statistics"],
    "scenes": ["load_scenes", "scenes", "to_messages"],
    "sharded_lora": ["load_adapter", "lora_config_for_shards", "save_adapter"],
    "training": ["SparseMoeTrainer", "conversations", "from_checkpoint", "from_scratch"],
}


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_a_former_name_is_the_same_module(former):
    module = import_module(f"{TOOLBOX}.{former}")
    assert module is import_module(f"{TOOLBOX}.{FORMER_NAMES[former]}")
    assert module.__spec__.name == module.__name__ == f"{TOOLBOX}.{FORMER_NAMES[former]}"


@pytest.mark.parametrize("path", PUBLIC)
def test_public_names_have_not_moved(path):
    module = import_module(f"{TOOLBOX}.{path}")
    assert all(hasattr(module, name) for name in PUBLIC[path])


def test_a_former_name_can_be_imported_first():
    program = f"from {TOOLBOX}.scenes import scenes; from {TOOLBOX}.demo import scenes as same; assert scenes is same"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_module_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_module(f"{TOOLBOX}.no_such_module")
