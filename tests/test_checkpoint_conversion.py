"""Layouts of experts in checkpoints and in memory: the conversions of each model, and experts that do not fit."""

import inspect
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightRenaming, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.checkpoint_conversion import (
    ExpertStack,
    expert_stacks,
    loading_conversions,
    saving_conversions,
)
from tests.support.models import make_config, make_inputs, make_model

ARRANGEMENTS = {
    "joint": ({"expert_groups": "joint"}, 1),
    "isolated": ({"expert_groups": "isolated", "num_experts": 8}, 1),
    "pools": ({"num_hidden_layers": 3, "expert_pool": [0, None, 0]}, 1),
    "pools of groups in shards": ({"num_hidden_layers": 2, "expert_pool": [1, 1], "expert_groups": "isolated"}, 2),
    "shards": ({"num_experts": 5}, 3),
    "other shards": ({"num_experts": 5}, 2),
}
EXPERTS = "model.language_model.layers.1.mlp.experts"


def make(arrangement: str) -> SparseMoeVlmForConditionalGeneration:
    fields, num_shards = ARRANGEMENTS[arrangement]
    config = make_config(**fields)
    config.num_expert_shards = num_shards
    torch.manual_seed(0)
    return SparseMoeVlmForConditionalGeneration(config).eval()


def edit_checkpoint(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **kwargs):
    return SparseMoeVlmForConditionalGeneration.from_pretrained(folder, **kwargs)


# ------------------------------------------------------------------------------------------------ descriptions


def test_where_the_stacks_of_a_model_are():
    names = {
        name: [(stack.name.removeprefix("model.language_model."), stack.sizes) for stack in expert_stacks(make(name))]
        for name in ARRANGEMENTS
    }
    assert names == {
        "joint": [("layers.0.mlp.experts", (4,)), ("layers.1.mlp.experts", (4,))],
        "isolated": [
            ("layers.0.mlp.experts.text", (4,)),
            ("layers.0.mlp.experts.image", (4,)),
            ("layers.1.mlp.experts.text", (4,)),
            ("layers.1.mlp.experts.image", (4,)),
        ],
        "pools": [("expert_pools.0", (4,)), ("layers.1.mlp.experts", (4,))],
        "pools of groups in shards": [("expert_pools.1.text", (1, 1)), ("expert_pools.1.image", (1, 1))],
        "shards": [("layers.0.mlp.experts", (2, 2, 1)), ("layers.1.mlp.experts", (2, 2, 1))],
        "other shards": [("layers.0.mlp.experts", (3, 2)), ("layers.1.mlp.experts", (3, 2))],
    }


def test_layout_of_a_stack():
    whole, sharded = ExpertStack("layers.10.mlp.experts.a", (3,)), ExpertStack("model.expert_pools.2.b", (2, 1))
    assert (whole.place, sharded.place) == ("mlp.experts.a", "expert_pools.2.b")
    assert ExpertStack("expert_pools.2", (1,)).place == "expert_pools.2"
    assert whole.parts == {"layers.10.mlp.experts.a": range(3)}
    assert sharded.parts == {
        "model.expert_pools.2.b.shards.0": range(2),
        "model.expert_pools.2.b.shards.1": range(2, 3),
    }
    assert whole.names_on_disk("down_proj") == [f"layers.10.mlp.experts.a.{n}.down_proj.weight" for n in range(3)]
    assert sharded.names_on_disk("gate_up_proj")[3:] == [
        "model.expert_pools.2.b.1.up_proj.weight",
        "model.expert_pools.2.b.2.gate_proj.weight",
        "model.expert_pools.2.b.2.up_proj.weight",
    ]


def test_the_conversions_of_a_model():
    """Fused stacks of the checkpoint need a conversion only if there are shards, and only when loading."""
    loading, saving = (
        [(step.target_patterns, [type(operation) for operation in step.operations]) for step in steps]
        for steps in (loading_conversions(make("joint"), []), saving_conversions(make("joint"))[-2:])
    )
    assert loading == saving
    assert loading == [
        (["mlp.experts.gate_up_proj"], [MergeModulelist, Concatenate]),
        (["mlp.experts.down_proj"], [MergeModulelist]),
    ]
    own = loading_conversions(make("other shards"), [])
    assert [step.target_patterns for step in own] == [
        ["mlp.experts.shards.0.gate_up_proj"],
        ["mlp.experts.shards.0.down_proj"],
        ["mlp.experts.shards.1.gate_up_proj"],
        ["mlp.experts.shards.1.down_proj"],
        ["mlp.experts.shards.0.gate_up_proj", "mlp.experts.shards.1.gate_up_proj"],
        ["mlp.experts.shards.0.down_proj", "mlp.experts.shards.1.down_proj"],
    ]
    assert [step.force_cpu for step in own] == [False] * 4 + [True] * 2
    assert [step.target_patterns for step in saving_conversions(make("other shards"))[-4:]] == [
        step.target_patterns for step in own[:4]
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{EXPERTS}.2.gate_proj.weight", f"{EXPERTS}.shards.0.gate_up_proj"),
        (f"{EXPERTS}.3.up_proj.weight", f"{EXPERTS}.shards.1.gate_up_proj"),
        (f"{EXPERTS}.4.down_proj.weight", f"{EXPERTS}.shards.1.down_proj"),
        (f"{EXPERTS}.5.down_proj.weight", None),
        (f"{EXPERTS}.23.down_proj.weight", None),
        (f"{EXPERTS}.image.3.down_proj.weight", None),
        ("model.language_model.layers.1.mlp.down_proj.weight", None),
        ("model.language_model.layers.1.mlp.shared_experts.text.down_proj.weight", None),
    ],
)
def test_names_of_an_expert(name, expected):
    renamed = [step.rename_source_key(name)[0] for step in loading_conversions(make("other shards"), [])]
    assert [each for each in renamed if each != name] == ([] if expected is None else [expected])


def test_groups_whose_names_begin_alike(tmp_path):
    groups = [{"name": name, "num_experts": 2} for name in ("a", "ab", "a_b", "b")]
    model = make_model(expert_groups=groups, num_experts=None)
    model.save_pretrained(tmp_path)
    for number in (1, 2):
        loaded = load(tmp_path, num_expert_shards=number)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**make_inputs()).logits, model(**make_inputs()).logits)


# -------------------------------------------------------------------------------------------- conversions of each model


def test_models_do_not_disturb_each_other(tmp_path):
    """Models are made, saved and loaded in any order. Conversions belong to the model, not to its type."""
    before = conversion_mapping.get_checkpoint_conversion_mapping("sparse_moe_vlm_text")
    models = {name: make(name) for name in ARRANGEMENTS}
    for name, model in reversed(models.items()):
        model.save_pretrained(tmp_path / name)
    for name, model in models.items():
        disk = load_file(tmp_path / name / "model.safetensors")
        stacks = expert_stacks(model)
        names = {
            each for stack in stacks for which in ("gate_up_proj", "down_proj") for each in stack.names_on_disk(which)
        }
        assert {each for each in disk if ".experts." in each or "expert_pools" in each} == names
        loaded = load(tmp_path / name, num_expert_shards=ARRANGEMENTS[name][1])
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key]), key
    after = conversion_mapping.get_checkpoint_conversion_mapping("sparse_moe_vlm_text")
    assert (before is None) == (after is None)


def test_models_in_threads(tmp_path):
    """Threads make, save and read models at the same time. (Loading itself patches Transformers for all threads.)"""
    names = [*ARRANGEMENTS] * 2
    loaded = {}
    for name in ARRANGEMENTS:
        make(name).save_pretrained(tmp_path / name)
        loaded[name] = load(tmp_path / name, num_expert_shards=ARRANGEMENTS[name][1])

    def save(number: int) -> bool:
        name = names[number]
        expected = load_file(tmp_path / name / "model.safetensors")
        model = SparseMoeVlmForConditionalGeneration(loaded[name].config)
        model.load_state_dict(expected)
        same = True
        for each in (model, loaded[name]):
            each.save_pretrained(tmp_path / str(number))
            actual = load_file(tmp_path / str(number) / "model.safetensors")
            same &= expected.keys() == actual.keys()
            same &= all(torch.equal(expected[key], actual[key]) for key in expected)
        return same

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(save, range(len(names)))) == [True] * len(names)


def test_experts_of_other_groups_are_not_used(tmp_path):
    """In one stack of all experts they would be in the wrong order."""
    make("isolated").save_pretrained(tmp_path)
    config = make_config(expert_groups="joint", num_experts=8)
    _, info = load(tmp_path, config=config, output_loading_info=True)
    assert f"{EXPERTS}.gate_up_proj" in info["missing_keys"]
    assert f"{EXPERTS}.image.0.gate_proj.weight" in info["unexpected_keys"]


# ------------------------------------------------------------------------------------------------ wrong experts


def renumber(tensors):
    """Renames the experts 0, 1, 2, 3 to 0, 1, 3, 4."""
    for old, new in ((3, 4), (2, 3)):
        for matrix in ("gate", "up", "down"):
            tensors[f"{EXPERTS}.{new}.{matrix}_proj.weight"] = tensors.pop(f"{EXPERTS}.{old}.{matrix}_proj.weight")


def drop(name):
    return lambda tensors: tensors.pop(f"{EXPERTS}.{name}.weight")


def copy_to(name):
    return lambda tensors: tensors.update({f"{EXPERTS}.{name}.weight": tensors[f"{EXPERTS}.0.up_proj.weight"].clone()})


def shorten(name):
    name = f"{EXPERTS}.{name}.weight"
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


FAULTS = {
    "renumbered": (renumber, [f"lacks {EXPERTS}.2.gate_proj.weight", f"no place for {EXPERTS}.4.down_proj.weight"]),
    "missing": (drop("1.up_proj"), [f"lacks {EXPERTS}.1.up_proj.weight. "]),
    "one too many": (copy_to("4.up_proj"), [f"no place for {EXPERTS}.4.up_proj.weight. "]),
    "other number": (copy_to("01.up_proj"), [f"no place for {EXPERTS}.01.up_proj.weight. "]),
    "wrong shape": (shorten("2.gate_proj"), [f"{EXPERTS}.2.gate_proj.weight of shape (23, 32) instead of (24, 32). "]),
}


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("file", ["one", "several", "state"])
@pytest.mark.parametrize("fault", FAULTS)
def test_experts_that_do_not_fit(fault, file, num_shards, tmp_path):
    """Loading them without an error would put experts in the wrong places, or leave some at random values."""
    edit, messages = FAULTS[fault]
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    (tmp_path / "model.safetensors").unlink()
    arguments = {}
    if file == "state":
        arguments = {"state_dict": tensors, "config": model.config}
    else:
        files = {name: f"{number % (2 if file == 'several' else 1)}.safetensors" for number, name in enumerate(tensors)}
        for path in set(files.values()):
            of_file = {name: tensors[name].contiguous() for name in tensors if files[name] == path}
            save_file(of_file, tmp_path / path, metadata={"format": "pt"})
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with pytest.raises(ValueError, match="the checkpoint's experts are not those of the model") as error:
        load(None if file == "state" else tmp_path, num_expert_shards=num_shards, **arguments)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_experts_that_do_not_fit_a_base_model_or_the_decoder(fault, tmp_path):
    edit, _ = FAULTS[fault]
    make_model().save_pretrained(tmp_path)
    edit_checkpoint(tmp_path, edit)
    for model_class in (SparseMoeVlmForCausalLM, type(make_model().model), type(make_model().model.language_model)):
        with pytest.raises(
            ValueError, match=re.escape(EXPERTS) if fault in ("other number", "one too many") else "mlp"
        ):
            model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("fault", ["renumbered", "one too many", "other number", "wrong shape"])
def test_states_that_do_not_fit(fault, num_shards, tmp_path):
    """`Trainer` passes the state dict on disk when it resumes. The model is not changed."""
    edit, messages = FAULTS[fault]
    make_model(seed=1).save_pretrained(tmp_path)
    edit_checkpoint(tmp_path, edit)
    config = make_config()
    config.num_expert_shards = num_shards
    model = SparseMoeVlmForConditionalGeneration(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ValueError, match="the checkpoint's experts are not those of the model") as error:
            model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=strict)
        assert messages[-1] in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_many_keys_are_counted(tmp_path):
    make_model(num_experts=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no place for (\S+, ){5}\S+ and 18 more\. "):
        load(tmp_path, config=make_config(num_experts=4))


def test_sizes_that_may_differ(tmp_path):
    """`ignore_mismatched_sizes` also allows another number of experts, but no gaps."""
    make_model(num_experts=8).save_pretrained(tmp_path)
    config = make_config(num_experts=4)
    _, info = load(tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True)
    assert (f"{EXPERTS}.gate_up_proj", torch.Size([8, 48, 32]), torch.Size([4, 48, 32])) in info["mismatched_keys"]
    edit_checkpoint(tmp_path, drop("2.gate_proj"))
    with pytest.raises(ValueError, match=re.escape(f"lacks {EXPERTS}.2.gate_proj.weight. ")):
        load(tmp_path, config=config, ignore_mismatched_sizes=True)


def test_whole_stacks_are_left_to_the_library(tmp_path):
    make_model().save_pretrained(tmp_path)

    def drop_stack(tensors):
        for name in [name for name in tensors if name.startswith(EXPERTS) and "down_proj" not in name]:
            del tensors[name]

    edit_checkpoint(tmp_path, drop_stack)
    _, info = load(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {f"{EXPERTS}.gate_up_proj"}


# -------------------------------------------------------------------------------------------- contracts of Transformers


def test_transformers_reverts_the_conversions_of_loading():
    """`_weight_conversions` is not documented. The conversions of a model are read from it."""
    model = make_model()
    names = revert_weight_conversion(model, model.state_dict()).keys()
    assert f"{EXPERTS}.3.gate_proj.weight" in names
    assert f"{EXPERTS}.gate_up_proj" not in names
    model._weight_conversions = [WeightRenaming("head", "lm_head")]
    assert "head.weight" in revert_weight_conversion(model, model.state_dict())
    assert f"{EXPERTS}.gate_up_proj" in revert_weight_conversion(model, model.state_dict())
    del model._weight_conversions
    assert revert_weight_conversion(model, model.state_dict()).keys() == names


def test_transformers_loads_with_the_given_conversions(monkeypatch, tmp_path):
    make_model().save_pretrained(tmp_path)
    given = []
    library = PreTrainedModel._load_pretrained_model

    def recorded(model, state_dict, files, load_config, *rest):
        given.append(load_config)
        return library(model, state_dict, files, load_config, *rest)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(recorded))
    model = load(tmp_path, key_mapping={"^lm_head": "lm_head"})
    (config,) = given
    assert isinstance(config, LoadStateDictConfig)
    assert config.weight_mapping[0].source_patterns == ["^lm_head"], "what the user asked for comes first"
    used = [step.target_patterns for step in model._weight_conversions]
    assert used[-2:] == [["mlp.experts.gate_up_proj"], ["mlp.experts.down_proj"]]


class Quantizer:
    """Changes conversions as the quantisers of Transformers do. Up to release 5.20, they do not get the model."""

    general = WeightRenaming("general", "general_")

    def get_weight_conversions(self):
        return [self.general]

    def update_weight_conversions(self, conversions):
        return [*conversions[:-1], WeightRenaming("scale", "scale_"), conversions[-1], *self.get_weight_conversions()]


class QuantizerWithModel(Quantizer):
    def update_weight_conversions(self, conversions, model):
        assert model is not None
        return super().update_weight_conversions(conversions)


@pytest.mark.parametrize("quantizer", [Quantizer(), QuantizerWithModel()])
def test_quantisers_see_the_conversions(quantizer):
    steps = loading_conversions(make_model(), [WeightRenaming("a", "b"), Quantizer.general], quantizer)
    assert [step.target_patterns[0] for step in steps] == [
        "b",
        "general_",
        "mlp.experts.gate_up_proj",
        "scale_",
        "mlp.experts.down_proj",
    ]


def test_quantisers_of_transformers_append_general_conversions():
    from transformers.quantizers.base import HfQuantizer

    source = inspect.getsource(HfQuantizer.update_weight_conversions)
    assert re.search(r"return \w+ \+ self\.get_weight_conversions\(\)", source)
