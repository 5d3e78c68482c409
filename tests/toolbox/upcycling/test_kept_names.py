"""Weight conversions of a base model leave the names of experts, routers and always-on experts as they are."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

from modeling_sparse_moe_vlm.checkpoint_conversion import convert_from_disk
from modeling_sparse_moe_vlm.kept_names import KeptNames, check_names_on_disk, keep_names
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from modeling_sparse_moe_vlm.toolbox.upcycling.dense_checkpoint import LoadedModel
from modeling_sparse_moe_vlm.toolbox.upcycling.streaming import write_sparse_weights
from tests.support.models import TINY_DECODER
from tests.support.tiny_models import tiny_model
from tests.toolbox.upcycling.test_streaming import plan

REQUEST = {
    "layers": [0],
    "num_experts": 3,
    "expert_groups": [
        {"name": "joint", "num_experts": 3},
        {"name": "shared", "num_experts": 1, "always_on": True, "intermediate_size": 16},
    ],
    "router": "sigmoid",
    "router_bias_update_rate": 0.1,
}
# Dense blocks of types whose conversions match names of experts or routers.
TYPES = {
    "exaone_moe": "model.layers.0.mlp.",
    "hy_v3": "model.layers.0.mlp.",
    "hy_v4": "model.layers.0.mlp.",
    "jamba": "model.layers.0.feed_forward.",
    "kimi_linear": "model.layers.0.mlp.",
    "laguna": "model.layers.0.mlp.",
    "lfm2_moe": "model.layers.0.feed_forward.",
    "step3p7": "model.language_model.layers.0.mlp.",
}
NAMES = {
    "gate.weight",
    "gate.e_score_correction_bias",
    *(f"experts.{expert}.{matrix}_proj.weight" for expert in range(3) for matrix in ("gate", "up", "down")),
    *(f"shared_experts.shared.{matrix}_proj.weight" for matrix in ("gate", "up", "down")),
}


def make_llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY_DECODER | fields))


def make_dense(model_type):
    return tiny_model(model_type, AutoModelForImageTextToText if model_type == "step3p7" else AutoModelForCausalLM)


def upcycled(dense, **request):
    sparse = upcycle(dense, **REQUEST | request)
    torch.manual_seed(1)
    for name, buffer in sparse.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    return sparse


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def assert_loads(folder, model, **options):
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return loaded


@pytest.mark.parametrize("model_type", TYPES)
def test_types_whose_conversions_match_names_of_experts(model_type, tmp_path):
    sparse = upcycled(make_dense(model_type))
    sparse.save_pretrained(tmp_path)
    start = TYPES[model_type]
    names = names_in(tmp_path)
    on_disk = start.replace("model.language_model.", "model.")  # Transformers still changes the start of the names
    assert {name.removeprefix(on_disk) for name in names if name.startswith(on_disk)} == NAMES
    loaded = assert_loads(tmp_path, sparse)
    loaded.save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == names
    assert_loads(tmp_path / "again", sparse)
    trained = copy.deepcopy(sparse)
    for parameter in trained.parameters():
        parameter.data.zero_()
    converted = convert_from_disk(trained, load_file(tmp_path / "model.safetensors"))  # as for `Trainer`
    of_block = {name: tensor for name, tensor in sparse.state_dict().items() if name.startswith(start)}
    assert len(of_block) == 7
    assert all(torch.equal(converted[name], tensor) for name, tensor in of_block.items())


@pytest.mark.parametrize("model_type", sorted({*TYPES} - {"step3p7"}))  # which merges tensors of its vision tower
def test_writing_block_by_block(model_type, tmp_path):
    """The names are those of `save_pretrained`."""
    dense = make_dense(model_type)
    found, start, sparse = plan(dense, **REQUEST)
    write_sparse_weights(LoadedModel(dense), sparse, found, start, tmp_path)
    model = upcycle(dense, **REQUEST)
    model.save_pretrained(tmp_path / "whole")
    assert names_in(tmp_path) == names_in(tmp_path / "whole")


def test_renamings_that_were_applied_to_experts_before_are_still_read(tmp_path):
    """Checkpoints from Transformers 5.24 without this fix."""
    sparse = upcycled(tiny_model("hy_v4", AutoModelForCausalLM))
    sparse.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    before = {name.replace(".gate_proj", ".linear_gate"): tensor for name, tensor in tensors.items()}
    assert before.keys() != tensors.keys()
    save_file(before, tmp_path / "model.safetensors", {"format": "pt"})
    assert_loads(tmp_path, sparse)


def test_renamings_of_the_user_apply_to_all_names(tmp_path):
    sparse = upcycled(make_llama())
    sparse.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace(".up_proj", ".expand"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = assert_loads(tmp_path, sparse, key_mapping={r"\.expand": ".up_proj"})
    assert type(loaded._weight_conversions[0]) is WeightRenaming


# ------------------------------------------------------------------------------------------------ single conversions

ENDS = {"model.layers.0.": frozenset({"mlp.gate.weight", "mlp.experts.0.up_proj.weight"}), "": frozenset({"pools.up"})}


def keep(*steps):
    return keep_names(steps, ENDS, "model")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("model.layers.0.mlp.gate.weight", ("model.layers.0.", "mlp.gate.weight")),
        ("pools.up", ("", "pools.up")),
        ("model.layers.0.mlp.gate.bias", None),
        ("model.layers.1.mlp.gate.weight", None),
        ("mlp.gate.weight", None),
        ("model.pools.up", None),
    ],
)
def test_which_names_are_kept(name, split):
    names = KeptNames(ENDS)
    assert names.split(name) == split
    assert copy.deepcopy(names) is names


def test_renamings_change_only_the_start():
    (step,) = keep(WeightRenaming("gate", "other"))
    assert step.rename_source_key("model.layers.0.mlp.gate.weight") == ("model.layers.0.mlp.gate.weight", None)
    assert not step.was_used()
    assert step.rename_source_key("model.layers.1.mlp.gate.weight")[0] == "model.layers.1.mlp.other.weight"
    assert step.was_used()
    (step,) = keep(WeightRenaming(r"^transformer\.h\.", "model.layers."))
    assert step.rename_source_key("transformer.h.0.mlp.gate.weight")[0] == "model.layers.0.mlp.gate.weight"
    back = step.reverse_transform()
    assert back.rename_source_key("model.layers.0.mlp.gate.weight")[0] == "transformer.h.0.mlp.gate.weight"
    assert back.reverse_transform().rename_source_key("transformer.h.0.a")[0] == "model.layers.0.a"


def test_all_renamings_of_a_prefix_keep_the_end():
    """The start of a name can have another form for every renaming."""
    chain = keep(WeightRenaming(r"^a\.", "b."), WeightRenaming(r"^b\.", "model."), WeightRenaming("up_proj", "down"))
    name = "a.layers.0.mlp.experts.0.up_proj.weight"
    for step in chain:
        name, _ = step.rename_source_key(name)
    assert name == "model.layers.0.mlp.experts.0.up_proj.weight"
    for step in reversed(chain):
        name, _ = step.reverse_transform().rename_source_key(name)
    assert name == "a.layers.0.mlp.experts.0.up_proj.weight"


def test_checkpoints_with_and_without_the_prefix():
    (step,) = keep(WeightRenaming("gate", "other"))
    for name in ("layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight", "model.pools.up"):
        assert step.rename_source_key(name) == (name, None)
    assert step.rename_source_key("other.layers.0.mlp.gate.weight")[0] == "other.layers.0.mlp.other.weight"


def test_prefix_changes():
    (step,) = keep(PrefixChange(prefix_to_remove="inner", model_prefix="model"))
    assert step.rename_source_key("model.inner.layers.0.mlp.gate.weight")[0] == "model.layers.0.mlp.gate.weight"
    back = step.reverse_transform()
    assert back.rename_source_key("model.layers.0.mlp.gate.weight")[0] == "model.inner.layers.0.mlp.gate.weight"


def test_converters_leave_tensors_out():
    converter = WeightConverter(r"mlp.gate.weight", "mlp.router", [MergeModulelist(dim=0)], force_cpu=True)
    converter.scope_prefix, converter.base_model_prefix = "layers", "model"
    (step,) = keep(converter)
    assert isinstance(step, WeightConverter)
    assert step.force_cpu
    assert step.operations == converter.operations
    assert step.rename_source_key("model.layers.0.mlp.gate.weight") == ("model.layers.0.mlp.gate.weight", None)
    assert step.rename_source_key("model.layers.1.mlp.gate.weight")[0] == "model.layers.1.mlp.router"
    assert step.rename_source_key("tower.1.mlp.gate.weight")[1] is None, "outside the scope"
    assert step.was_used()
    assert (
        step.reverse_transform().rename_source_key("model.layers.1.mlp.router")[0] == "model.layers.1.mlp.gate.weight"
    )
    assert step.reverse_transform().rename_source_key("tower.1.mlp.router")[1] is None


def test_conversions_can_be_pickled(tmp_path):
    sparse = upcycled(tiny_model("hy_v4", AutoModelForCausalLM))
    sparse.save_pretrained(tmp_path)
    loaded = pickle.loads(pickle.dumps(type(sparse).from_pretrained(tmp_path)))
    loaded.save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == names_in(tmp_path)


# ------------------------------------------------------------------------------------------------ names on disk


def test_two_tensors_under_one_name(tmp_path):
    sparse = upcycled(make_llama())
    sparse._weight_conversions = [WeightRenaming(r"x_proj\.", "q_proj."), WeightRenaming(r"x_proj\.", "k_proj.")]
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj.weight' and '.*0.self_attn.k_proj.weight'"):
        sparse.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    sparse.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names_in(tmp_path)


def test_two_converted_tensors_under_one_name():
    model = make_llama()
    model._weight_conversions = [WeightRenaming(r"x\.", r"layers.0."), WeightRenaming(r"x\.", r"layers.1.")]
    with pytest.raises(ValueError, match=r"would both be saved under the name 'model.x.mlp.up_proj.weight'"):
        check_names_on_disk(model, {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(1) for n in range(2)})
    check_names_on_disk(model, {"model.layers.1.mlp.up_proj.weight": torch.ones(1)})


def test_tied_weights_are_not_two_tensors(tmp_path):
    sparse = upcycled(make_llama(tie_word_embeddings=True))
    sparse._weight_conversions = [WeightRenaming("^lm_head", "model.embed_tokens")]
    sparse.save_pretrained(tmp_path)
    assert "lm_head.weight" in names_in(tmp_path)


# ------------------------------------------------------------------------------------------------ of Transformers


def test_transformers_overwrites_tensors_with_the_same_name():
    """If this fails, Transformers checks the names itself."""
    model = make_llama()
    model._weight_conversions = [WeightRenaming(r"x\.", r"layers.0."), WeightRenaming(r"x\.", r"layers.1.")]
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.full((1,), n) for n in range(2)}
    assert len(revert_weight_conversion(model, tensors)) == 1


def test_conversions_of_transformers_have_their_original_patterns():
    """These attributes are not documented."""
    steps = get_model_conversion_mapping(tiny_model("hy_v4", AutoModelForCausalLM))
    step = next(step for step in steps if ".gate_proj" in step.target_patterns)
    assert (step._original_source_patterns, step._original_target_patterns) == ([r"\.linear_gate"], [".gate_proj"])
    assert (step.scope_prefix, step.base_model_prefix) == (None, None)
    assert step.rename_source_key("a.linear_gate.weight") == ("a.gate_proj.weight", r"\.linear_gate")
    assert step.reverse_transform().rename_source_key("a.gate_proj.weight") == ("a.linear_gate.weight", ".gate_proj")
