"""Shards of stacks of experts: chosen when loading, without an effect on outputs and checkpoints."""

import copy
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration, expert_shards
from modeling_sparse_moe_vlm.expert_shards import SparseMoeVlmExpertShards, shard_sizes
from modeling_sparse_moe_vlm.experts import SparseMoeVlmExperts
from modeling_sparse_moe_vlm.toolbox.placement import describe_placement, plan_expert_placement
from tests.support.models import make_config, make_inputs, make_model
from tests.support.oracles import MANY_GROUPS
from tests.test_loading import tensors_on_disk

pytestmark = pytest.mark.newest

KINDS = {
    "hybrid": {"num_experts": 6},
    "isolated": {"expert_groups": "isolated", "num_experts": 8},
    "groups": {"expert_groups": MANY_GROUPS, "num_experts": None},
    "pools": {"num_hidden_layers": 3, "expert_pool": [0, None, 0]},
    "pools of groups": {"num_hidden_layers": 3, "expert_pool": [0, None, 0], "expert_groups": "isolated"},
    "top_p": {"router": "top_p", "num_experts_per_tok": 3},
    "capacity": {"expert_capacity_factor": 0.5},
}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def load(folder, **kwargs):
    return SparseMoeVlmForConditionalGeneration.from_pretrained(folder, **kwargs)


def shards(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseMoeVlmExpertShards)]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("num_experts", "num_shards", "sizes"), [(8, 4, [2, 2, 2, 2]), (5, 4, [2, 1, 1, 1]), (2, 4, [1, 1]), (3, 1, [3])]
)
def test_sizes(num_experts, num_shards, sizes):
    assert shard_sizes(num_experts, num_shards) == sizes


@pytest.mark.parametrize("num_shards", [2, 4])
def test_the_same_function_and_the_same_files(kind, num_shards, tmp_path):
    model, inputs = make_model(**KINDS[kind]), make_inputs()
    model.save_pretrained(tmp_path / "model")
    load(tmp_path / "model").save_pretrained(tmp_path / "one")
    sharded = load(tmp_path / "one", num_expert_shards=num_shards)
    assert shards(sharded)
    assert sharded.config.num_expert_shards == num_shards
    with torch.no_grad():
        torch.testing.assert_close(sharded(**inputs).logits, model(**inputs).logits)
        silenced = copy.deepcopy(sharded)
        for name in shards(silenced):
            silenced.get_submodule(name).shards[-1].down_proj.zero_()
        assert (silenced(**inputs).logits - model(**inputs).logits).abs().max() > 1e-3, "the last shard matters"
    sharded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "one")
    assert "shard" not in (tmp_path / "again" / "config.json").read_text()
    # From one number of shards to another.
    other = load(tmp_path / "again", num_expert_shards=3)
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits)


def test_equal_gradients(kind, tmp_path):
    model, inputs = make_model(**KINDS[kind]), make_inputs()
    model.save_pretrained(tmp_path)
    sharded = load(tmp_path, num_expert_shards=3)
    gradients = []
    for each in (model, sharded):
        each.train()
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    expected, ours = gradients
    merged: dict[str, list[torch.Tensor]] = {}
    for name, gradient in ours.items():
        stack, is_shard, rest = name.partition(".shards.")
        merged.setdefault(f"{stack}.{rest.split('.')[1]}" if is_shard else name, []).append(gradient)
    assert merged.keys() == expected.keys()
    for name, parts in merged.items():
        if expected[name] is None:
            assert parts == [None]
        else:
            torch.testing.assert_close(torch.cat(parts), expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_experts_implementations(implementation, tmp_path):
    model, inputs = make_model(num_experts=5), make_inputs()
    model.save_pretrained(tmp_path)
    sharded = load(tmp_path, num_expert_shards=4, experts_implementation=implementation)
    torch.testing.assert_close(sharded(**inputs).logits, model(**inputs).logits)
    generated = sharded.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_models_that_were_not_loaded_are_saved_one_by_one(kind, tmp_path):
    """Also if other models have other shards. Their names on disk are the same."""
    config = make_config(**KINDS[kind])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, num_expert_shards=3).eval()
    assert config.num_expert_shards == 1, "the configuration given stays as it was"
    make_model(**KINDS[kind])
    config.num_expert_shards = 2
    other = SparseMoeVlmForConditionalGeneration(config)
    for number, each in enumerate((model, other)):
        each.save_pretrained(tmp_path / str(number))
        assert not [name for name in tensors_on_disk(tmp_path / str(number)) if "shards" in name or "gate_up" in name]
        loaded = load(tmp_path / str(number))
        assert not shards(loaded)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**make_inputs()).logits, each.eval()(**make_inputs()).logits)


@torch.no_grad()
def test_fused_checkpoints(kind, tmp_path):
    model, inputs = make_model(**KINDS[kind]), make_inputs()
    model.save_pretrained(tmp_path / "one", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in tensors_on_disk(tmp_path / "one"))
    sharded = load(tmp_path / "one", num_expert_shards=3)
    torch.testing.assert_close(sharded(**inputs).logits, model(**inputs).logits)
    load(tmp_path / "one").save_pretrained(tmp_path / "unsharded")
    sharded.save_pretrained(tmp_path / "sharded")
    assert files(tmp_path / "sharded") == files(tmp_path / "unsharded")


def test_state_dicts_as_on_disk(kind, tmp_path):
    """`Trainer` loads them when it resumes."""
    model = make_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    sharded = load(tmp_path, num_expert_shards=3)
    expected = {name: tensor.clone() for name, tensor in sharded.state_dict().items()}
    for parameter in sharded.parameters():
        torch.nn.init.zeros_(parameter)
    sharded.load_state_dict(tensors_on_disk(tmp_path))
    for name, tensor in sharded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@torch.no_grad()
@pytest.mark.parametrize("name", ["hybrid", "isolated", "pools"])
def test_a_map_names_shards(name, tmp_path):
    model, inputs = make_model(**KINDS[name]), make_inputs()
    model.save_pretrained(tmp_path / "model")
    load(tmp_path / "model").save_pretrained(tmp_path / "one")
    config = copy.deepcopy(model.config)
    config.num_expert_shards = 2
    size = describe_placement(config, {"": 0})[0].bytes
    device_map = plan_expert_placement(config, {"cpu": int(0.9 * size), "disk": "1GB"})
    on_disk = [entry for entry, device in device_map.items() if device == "disk"]
    assert on_disk
    assert all(".shards." in entry for entry in on_disk)
    loaded = load(tmp_path / "one", num_expert_shards=2, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.get_parameter(f"{on_disk[0]}.down_proj").is_meta
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "one")


def test_plans_spread_shards_by_load():
    """The shards of a layer are spread over all devices, and its busiest shards are on different devices."""
    config = make_config(num_experts=8, num_hidden_layers=4, moe_intermediate_size=512)
    config.num_expert_shards = 8
    routing = torch.tensor([[8.0, 8, 8, 8, 1, 1, 1, 1]] * 4)
    for measured in (None, routing):
        device_map = plan_expert_placement(config, dict.fromkeys(range(4), "1GB"), measured)
        for layer in range(4):
            of_layer = [d for entry, d in device_map.items() if f"layers.{layer}.mlp.experts.shards." in entry]
            assert sorted(of_layer) == [0, 0, 1, 1, 2, 2, 3, 3]
        for share in describe_placement(config, device_map, measured):
            assert share.load["all"] == pytest.approx(0.25)


def test_plans_are_even_in_bytes_and_in_the_load_of_every_modality():
    """The loads of experts differ by a factor of 32, and differently for text and images. There are twice as many
    shards as devices, and assigning them in order would be uneven."""
    config = make_config(num_experts=32, num_hidden_layers=24, moe_intermediate_size=512)
    config.num_expert_shards = 16
    generator = torch.Generator().manual_seed(0)
    routing = {
        modality: torch.stack([(1 / torch.arange(1, 33))[torch.randperm(32, generator=generator)] for _ in range(24)])
        for modality in ("text", "image")
    }
    device_map = plan_expert_placement(config, dict.fromkeys(range(8), "1GB"), routing)
    shares = describe_placement(config, device_map, routing)
    for values in (
        [s.bytes for s in shares],
        [s.load["text"] for s in shares],
        [s.load["image"] for s in shares],
    ):
        assert max(values) * 8 / sum(values) < 1.05
    in_turn = {entry: int(entry.rpartition(".")[2]) // 2 if ".shards." in entry else 0 for entry in device_map}
    unaware = describe_placement(config, in_turn, routing)
    assert max(share.load["text"] for share in unaware) * 8 > 1.05


@torch.no_grad()
def test_the_decoder_by_itself(tmp_path):
    model = make_model(num_experts=5)
    model.save_pretrained(tmp_path / "whole")
    text = SparseMoeVlmForCausalLM.from_pretrained(tmp_path / "whole", num_expert_shards=2)
    assert shards(text)
    input_ids = make_inputs(images_per_row=0)["input_ids"]
    torch.testing.assert_close(text(input_ids).logits, model(input_ids).logits)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", num_expert_shards=2)
    assert shards(auto)
    text.save_pretrained(tmp_path / "text")
    again = SparseMoeVlmForCausalLM.from_pretrained(tmp_path / "text", num_expert_shards=3)
    torch.testing.assert_close(again(input_ids).logits, model(input_ids).logits)


def test_remote_code(tmp_path):
    """The code of the checkpoint, in a process in which the package is not installed."""
    model, inputs = make_model(num_experts=5), make_inputs()
    model.save_pretrained(tmp_path / "one")
    torch.save(inputs, tmp_path / "inputs.pt")
    program = f"""
        import sys, torch
        sys.modules["modeling_sparse_moe_vlm"] = None
        from transformers import AutoModelForImageTextToText
        load = AutoModelForImageTextToText.from_pretrained
        model = load({str(tmp_path / "one")!r}, trust_remote_code=True, num_expert_shards=3)
        assert any(".shards.2." in name for name, _ in model.named_parameters())
        with torch.no_grad():
            torch.save(model(**torch.load({str(tmp_path / "inputs.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
        model.save_pretrained({str(tmp_path / "again")!r})
    """
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment, check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(**inputs).logits)
    ours, theirs = (tensors_on_disk(tmp_path / name) for name in ("one", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_single_shard_is_the_unsharded_stack():
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    assert not shards(model)
    one = SparseMoeVlmForConditionalGeneration._from_config(model.config, num_expert_shards=1)
    assert [name for name, _ in one.named_parameters()] == names
    assert isinstance(one.model.language_model.layers[0].mlp.experts, SparseMoeVlmExperts)
    assert "shard" not in json.dumps(one.config.to_dict())


def test_experts_are_run_without_waiting():
    """No value is read between the launches of the shards, so it runs on the meta device, which has no values."""
    config = make_config(num_experts=6, num_experts_per_tok=2).text_config
    config.num_expert_shards = 3
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model = SparseMoeVlmForCausalLM(config).bfloat16()
        experts = model.model.layers[0].mlp.experts
        hidden = torch.randn(5, config.hidden_size, dtype=torch.bfloat16)
        output = experts(hidden, torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2, dtype=torch.bfloat16))
    assert output.shape == hidden.shape


def test_all_inputs_are_sent_before_the_first_experts_run(monkeypatch):
    """A copy to another device waits for all earlier work of its source device."""
    config = make_config(num_experts=6).text_config
    config.num_expert_shards = 3
    experts = SparseMoeVlmForCausalLM(config).model.layers[0].mlp.experts
    events = []
    monkeypatch.setattr(expert_shards, "send", lambda tensor, device: events.append("send") or tensor)
    for shard in experts.shards:
        shard.register_forward_pre_hook(lambda *_: events.append("run"))
    experts(torch.randn(5, config.hidden_size), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2))
    assert events == ["send"] * 9 + ["run"] * 3 + ["send"] * 3


@pytest.mark.parametrize("wrong", [0, 1.5, "4"])
def test_wrong_numbers(wrong, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_expert_shards"):
        load(tmp_path, num_expert_shards=wrong)


def test_shards_and_expert_parallelism_are_exclusive():
    config = make_config()
    config.num_expert_shards = 2
    model = SparseMoeVlmForConditionalGeneration(config)
    with pytest.raises(ValueError, match="one process"):
        model.maybe_distribute_model(model, SimpleNamespace(tp_size=1, ep_size=2), object())
