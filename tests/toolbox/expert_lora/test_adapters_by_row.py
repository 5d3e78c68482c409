"""`adapter_names`: one adapter for each row of the batch, in experts of all kinds and in attention."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config, factor_expert_lora, load_expert_lora
from modeling_sparse_moe_vlm.toolbox.expert_lora.batch_rows import rows_of_tokens
from tests.support import in_tree_moe, models
from tests.support.in_tree_moe import assert_equal, randomise
from tests.support.models import make_inputs

pytestmark = pytest.mark.newest

NAMES = ["b", "__base__", "a", "b"]
# Always-on experts, attention and routed experts, in groups, pools and shards.
MODELS = {
    "hybrid": {},
    "joint": {"expert_groups": "joint"},
    "isolated": {"expert_groups": "isolated"},
    "pool": {"expert_pool": [0, 0]},
    "shards": {"num_expert_shards": 2},
    "groups": {
        "expert_groups": [
            {"name": "text", "num_experts": 2, "modalities": ["text"]},
            {"name": "both", "num_experts": 3},
            {"name": "seen", "num_experts": 1, "modalities": ["image"], "always_on": True},
            {"name": "all", "num_experts": 1, "always_on": True},
        ],
        "num_experts": None,
    },
}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def two_adapters(name: str):
    model = models.make_model(**MODELS[name])
    config = expert_lora_config(model, r=3, attention=True)
    adapted = get_peft_model(model, config, adapter_name="a")
    adapted.add_adapter("b", config)
    for seed, adapter in enumerate("ab"):
        randomise(adapted, seed, adapter)
    return factor_expert_lora(adapted).eval()


def alone(adapted, run) -> dict[str, torch.Tensor]:
    """Returns the result of `run` with each adapter active for all rows."""
    results = {}
    for adapter in "ab":
        adapted.set_adapter(adapter)
        results[adapter] = run()
    with adapted.disable_adapter():
        results["__base__"] = run()
    return results


@pytest.mark.parametrize("kind", ["images", "text", "uneven", "one token"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_row_has_its_adapter(name, kind):
    adapted = two_adapters(name)
    inputs = make_inputs(batch_size=4, images_per_row=0 if kind in ("text", "one token") else 1)
    if kind == "uneven":  # images in only two rows, at different positions
        inputs["input_ids"][[1, 2], 2:6] = 50
        inputs["mm_token_type_ids"][[1, 2]] = 0
        inputs["pixel_values"] = inputs["pixel_values"][:2]
    elif kind == "one token":
        inputs = {key: value[:, :1] for key, value in inputs.items()}
    expected = alone(adapted, lambda: adapted(**inputs).logits)
    mixed = adapted(**inputs, adapter_names=NAMES).logits
    for row, adapter in enumerate(NAMES):
        assert_equal(mixed[row], expected[adapter][row], 2e-5)
    assert (expected["a"] - expected["b"]).abs().max() > 0.1
    assert_equal(adapted(**inputs, adapter_names=["a"] * 4).logits, expected["a"], 2e-5)
    # The next call is not affected.
    adapted.set_adapter("b")
    assert torch.equal(adapted(**inputs).logits, expected["b"])


@pytest.mark.parametrize("name", ["hybrid", "isolated", "shards"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generation(name, search):
    adapted = two_adapters(name)
    inputs = make_inputs(batch_size=4)
    expected = alone(adapted, lambda: adapted.generate(**inputs, **GREEDY, **search))
    mixed = adapted.generate(**inputs, **GREEDY, **search, adapter_names=NAMES)
    assert torch.equal(mixed, torch.stack([expected[name][row] for row, name in enumerate(NAMES)]))
    assert not torch.equal(expected["a"], expected["b"])


@torch.no_grad()
def test_several_answers_for_each_row():
    adapted = two_adapters("hybrid")
    inputs, several = make_inputs(batch_size=2), {"num_beams": 2, "num_return_sequences": 2}
    expected = alone(adapted, lambda: adapted.generate(**inputs, **GREEDY, **several))
    mixed = adapted.generate(**inputs, **GREEDY, **several, adapter_names=["b", "a"])
    assert torch.equal(mixed, torch.cat([expected["b"][:2], expected["a"][2:]]))
    sampled = adapted.generate(
        **inputs, max_new_tokens=2, do_sample=True, num_return_sequences=3, adapter_names=["b", "a"]
    )
    assert sampled.shape == (6, 16)


@pytest.mark.parametrize("name", ["hybrid", "joint", "isolated"])
@pytest.mark.parametrize("number", [1, 2, 5, 8])
@torch.no_grad()
def test_another_number_of_names_is_refused(name, number):
    """Also if the number of tokens is a multiple of it."""
    adapted = two_adapters(name)
    inputs = make_inputs(batch_size=4, length=10)
    message = f"`adapter_names` has {number} names, but the batch has 4 rows: give one for each row"
    for run in (adapted, adapted.generate):
        with pytest.raises(ValueError, match=message):
            run(**inputs, adapter_names=["a"] * number)
    with pytest.raises(ValueError, match=message):
        adapted(inputs["input_ids"], adapter_names=["a"] * number)


@torch.no_grad()
def test_a_wrong_number_is_refused_before_the_layers_are_made_known():
    """Without `factor_expert_lora`, PEFT passes the names to the layers."""
    model = models.make_model(expert_groups="joint")
    adapted = get_peft_model(model, expert_lora_config(model), adapter_name="a").eval()
    inputs = make_inputs(batch_size=4, length=10)
    adapted(**inputs, adapter_names=["a"] * 4)
    with pytest.raises(ValueError, match="has 2 names, but the batch has 4 rows"):
        adapted(**inputs, adapter_names=["a"] * 2)


@torch.no_grad()
def test_names_that_cannot_be():
    adapted = two_adapters("hybrid")
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): c, d"):
        adapted(**inputs, adapter_names=["d", "c"])
    with pytest.raises(ValueError, match="must be a list of names, got 'ab'"):
        adapted(**inputs, adapter_names="ab")
    with pytest.raises(ValueError, match="in training mode"):
        adapted.train()(**inputs, adapter_names=["a", "b"])
    adapted.eval().merge_adapter(["a"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        adapted(**inputs, adapter_names=["a", "b"])


@torch.no_grad()
def test_layers_whose_rows_are_unknown_are_refused():
    """For example, patches of any number of images in the vision tower, which are not arranged in rows."""
    adapted = two_adapters("hybrid")
    adapted.get_base_model().lm_head.register_forward_pre_hook(lambda *_: rows_of_tokens(torch.nn.Identity(), 3, 2))
    with pytest.raises(
        ValueError, match="type Identity got 3 of 28 tokens, and it is unknown which rows they belong to"
    ):
        adapted(**make_inputs())
    assert rows_of_tokens(torch.nn.Identity(), 6, 3).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["qwen2_moe", "ernie4_5_vl_moe"])
@torch.no_grad()
def test_always_on_experts_of_other_models(name):
    """These are dense networks that get tokens which are not arranged in rows."""
    if name == "qwen2_moe":
        from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

        sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 4}
        torch.manual_seed(0)
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**models.TINY_DECODER, **sizes, num_experts_per_tok=2)).eval()
        targets = [".*shared_expert.up_proj", "q_proj"]
    else:
        model, targets = in_tree_moe.make_model(name), [".*shared_experts.up_proj", "q_proj"]
    config = LoraConfig(
        r=2, target_modules="|".join(f"(.*{target})" for target in targets), target_parameters=["down_proj"]
    )
    adapted = get_peft_model(model, config, adapter_name="a")
    adapted.add_adapter("b", config)
    for seed, adapter in enumerate("ab"):
        randomise(adapted, seed, adapter)
    factor_expert_lora(adapted).eval()
    inputs = in_tree_moe.make_inputs(model, batch_size=4)
    expected = alone(adapted, lambda: adapted(**inputs).logits)
    mixed = adapted(**inputs, adapter_names=NAMES).logits
    for row, adapter in enumerate(NAMES):
        assert_equal(mixed[row], expected[adapter][row], 2e-5)


def meanwhile(function):
    """Runs a function in another thread. Returns a list with its result or its exception."""
    result = []

    def run():
        try:
            with torch.no_grad():
                result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return result


@torch.no_grad()
def test_threads_choose_adapters_of_their_own():
    """Calls with names run in the middle of calls with other names and of calls without names."""
    adapted = two_adapters("hybrid")
    inputs = make_inputs(batch_size=4)
    expected = alone(adapted, lambda: adapted(**inputs).logits)
    adapted.set_adapter("a")
    seen, this_thread = [], threading.get_ident()

    def interrupt(*_):
        if threading.get_ident() == this_thread and len(seen) < 2:
            seen.extend(meanwhile(lambda: adapted(**inputs, adapter_names=["a", "b", "b", "a"]).logits))
            seen.extend(meanwhile(lambda: adapted(**inputs).logits))

    adapted.get_base_model().get_decoder().layers[1].register_forward_pre_hook(interrupt)
    for mixed, names in ((adapted(**inputs, adapter_names=NAMES).logits, NAMES), (seen[0], ["a", "b", "b", "a"])):
        for row, adapter in enumerate(names):
            assert_equal(mixed[row], expected[adapter][row], 2e-5)
    assert_equal(seen[1], expected["a"])


@pytest.mark.parametrize("change", ["set_adapter", "disable_adapter", "merge", "generate"])
@torch.no_grad()
def test_an_answer_of_several_adapters_is_refused(change):
    adapted = two_adapters("hybrid")
    adapted.set_adapter("a")
    inputs, done = make_inputs(), []

    def switch():
        if change == "disable_adapter":
            with adapted.disable_adapter():
                pass
        elif change == "merge":
            adapted.merge_adapter(["a"])
        else:
            adapted.set_adapter("b")
            adapted.set_adapter("a")

    def interrupt(*_):
        if not done:
            done.append(meanwhile(switch))

    adapted(**inputs)
    hook = adapted.get_base_model().get_decoder().layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(RuntimeError, match="another thread has switched, disabled or merged adapters"):
        adapted.generate(**inputs, **GREEDY) if change == "generate" else adapted(**inputs)
    assert done == [[None]]
    adapted(**inputs)  # the next call uses one adapter again
    # Switching within a call is allowed in the thread of the call.
    hook.remove()
    adapted.get_base_model().get_decoder().layers[1].register_forward_pre_hook(lambda *_: switch())
    adapted(**inputs)


@torch.no_grad()
def test_loading_another_adapter_meanwhile_is_fine(tmp_path):
    adapted = two_adapters("joint")
    adapted.save_pretrained(tmp_path, selected_adapters=["b"])
    adapted.set_adapter("a")
    inputs, done = make_inputs(), []
    expected = adapted(**inputs).logits

    def interrupt(*_):
        if not done:
            done.append(meanwhile(lambda: load_expert_lora(adapted, tmp_path / "b", "c")))

    adapted.get_base_model().get_decoder().layers[1].register_forward_pre_hook(interrupt)
    assert_equal(adapted(**inputs).logits, expected)
    assert done == [[adapted]]
    assert_equal(adapted(**inputs, adapter_names=["c", "a"]).logits[1:], expected[1:], 2e-5)
