"""Compares paged experts with resident ones, in models of Transformers and in ours."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from modeling_sparse_moe_vlm.toolbox.expert_seam import run_with_adapters
from modeling_sparse_moe_vlm.toolbox.paging import PagingCounts, hook, page_experts, unpage_experts
from modeling_sparse_moe_vlm.toolbox.paging.slots import MappedSlots
from modeling_sparse_moe_vlm.toolbox.paging.sources import FileSource, MemorySource
from tests.support.in_tree_models import make_qwen3_vl, make_qwen3_vl_moe
from tests.support.in_tree_moe import device_map_of, experts_of, make_gpt_oss, make_mixtral, make_qwen3_moe
from tests.support.models import make_inputs, make_model

pytestmark = pytest.mark.newest

MANY = 12

MODELS = {
    "qwen3_moe": partial(make_qwen3_moe, MANY),
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "mixtral": partial(make_mixtral, MANY),
    "gpt_oss": partial(make_gpt_oss, MANY),
    "joint": lambda: make_model(expert_groups="joint", num_experts=8),
    "isolated": lambda: make_model(expert_groups="isolated", num_experts=8),
    "pool": lambda: make_model(expert_pool=[0, 0], num_experts=8),
}


def build(name: str, device="cpu"):
    torch.manual_seed(0)
    return MODELS[name]().to(device).eval().requires_grad_(False)


def inputs_of(model) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.randint(7, 99, (2, 9), generator=torch.Generator().manual_seed(1))}
    if model.config.model_type == "sparse_moe_vlm":
        inputs = make_inputs()
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def from_disk(model, folder: Path, place: str = "disk"):
    """The model with its experts on disk, or in another place, and everything else where it is."""
    model.save_pretrained(folder)
    places = {"disk": place, "cpu": str(model.device)}
    device_map = {name: places[where] for name, where in device_map_of(model, "disk").items()}
    loaded = type(model).from_pretrained(folder, device_map=device_map, offload_folder=folder / "offload")
    return loaded.requires_grad_(False)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_paged_experts_equal_resident_ones(name, implementation, device, tmp_path):
    """In memory and from disk, with as few slots as possible (several passes for a prompt): logits and tokens."""
    model = build(name, device)
    inputs = inputs_of(model)
    model.set_experts_implementation(implementation)
    expected = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    silenced = copy.deepcopy(model)
    for experts in experts_of(silenced).values():
        experts.down_proj.zero_()
    assert (silenced(**inputs).logits - expected).abs().max() > 1e-2, "experts matter"
    models = [copy.deepcopy(model), from_disk(model, tmp_path)]
    if device.type != "cpu":
        models.append(from_disk(model, tmp_path, "cpu"))
    for paged in models:
        paged.set_experts_implementation(implementation)
        for slots in (2, 3):
            with page_experts(paged, slots) as pager:
                torch.testing.assert_close(paged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
                assert torch.equal(paged.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
            assert set(pager.slots.values()) == {slots}
            assert pager.total("prefill").misses > slots
            assert pager.total("decode").misses > 0
        torch.testing.assert_close(paged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_results_are_bit_identical_with_enough_slots():
    model = build("qwen3_moe")
    paged = copy.deepcopy(model)
    page_experts(paged, MANY)
    for length in (1, 7, 1):
        tokens = torch.randint(7, 99, (2, length))
        assert torch.equal(paged(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated", "pool"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_gradients_equal_those_of_the_resident_model(name, implementation, checkpointing, device):
    """Gradients of everything except the frozen experts, with two calls before backward and frequent replacement."""
    resident, gradients = build(name, device), []
    inputs = inputs_of(resident)
    paged = copy.deepcopy(resident)
    pager = page_experts(paged, 2)
    for model in (resident, paged):
        model.set_experts_implementation(implementation)
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        trained = {
            name: parameter.requires_grad_()
            for name, parameter in model.named_parameters()
            if "expert" not in name and "gate_up" not in name
        }
        loss = model(**inputs).logits.square().mean()
        loss = loss + model(**inputs | {"input_ids": inputs["input_ids"].flip(0)}).logits.sin().mean()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
    expected, ours = gradients
    routers = [name for name in expected if "gate.weight" in name or "router.weight" in name]
    assert routers
    assert all(expected[name].abs().max() > 1e-6 for name in routers)
    for name, gradient in expected.items():
        if gradient is None:
            assert ours[name] is None
        else:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    if implementation != "batched_mm" and checkpointing is None:
        assert pager.total("backward").misses > 0


def lora(model, targets):
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def test_lora_with_paged_experts_trains_as_with_resident_ones(tmp_path):
    """Adapters are on attention. PEFT freezes the experts, which are on disk."""
    model = build("qwen3_moe")
    inputs, losses = inputs_of(model), []
    for base in (copy.deepcopy(model), from_disk(model, tmp_path)):
        torch.manual_seed(0)
        adapted = lora(base, ["q_proj", "v_proj"]).train()
        if losses:
            page_experts(adapted, 3)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        losses.append([])
        for _ in range(3):
            loss = adapted(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] > 1e-2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_adapter_that_merges_itself_into_paged_experts_is_refused():
    model = build("qwen3_moe")
    targets = [f"{name}.down_proj" for name in experts_of(model)]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    page_experts(adapted, 4)
    with pytest.raises(ValueError, match="Run the adapter factored"):
        adapted(torch.tensor([[7, 8]]))
    unpage_experts(adapted)
    adapted(torch.tensor([[7, 8]]))


@torch.no_grad()
@pytest.mark.parametrize("source", ["memory", "disk"])
def test_an_adapter_receives_the_expert_of_each_slot(source, tmp_path):
    """The rows of the parameters match the model while the experts run, in the thread that runs them."""
    model = build("qwen3_moe")
    paged = copy.deepcopy(model) if source == "memory" else from_disk(model, tmp_path)
    name, experts = next(iter(experts_of(paged).items()))
    whole = dict(model.named_parameters())[f"{name}.down_proj"]
    seen, told = [], []

    def adapt(stack, held):
        told.append(held)
        return stack

    def forward(hidden_states, top_k_index, top_k_weights):
        stack = experts.down_proj
        for row in top_k_index.unique().tolist():
            assert torch.equal(stack[row], whole[told[-1][row]])
            seen.append(int(told[-1][row]))
        assert len(told[-1]) == experts.num_experts == len(stack)
        return type(experts).forward(experts, hidden_states, top_k_index, top_k_weights)

    experts.forward = forward
    if source == "disk":  # with an existing hook
        experts._old_forward = forward
    with page_experts(paged, 3):
        run_with_adapters(experts, {"down_proj": adapt}, torch.randn(9, 32), torch.arange(9)[:, None], torch.ones(9, 1))
        assert experts.num_experts == MANY
    assert sorted(seen) == list(range(9))
    assert experts.down_proj.is_meta if source == "disk" else torch.equal(experts.down_proj, whole)


@torch.no_grad()
@pytest.mark.parametrize("source", ["memory", "disk"])
def test_only_the_chosen_experts_are_read(source, tmp_path, monkeypatch):
    """Checked by the counts of each phase and module, and by the reads from memory or from the file."""
    model, moved = build("qwen3_moe"), set()
    kind, name = {"memory": (MemorySource, "read"), "disk": (FileSource, "load")}[source]
    move = getattr(kind, name)

    def spy(self, expert, *slot):
        moved.add((next(name for name in chosen if self in sources[name]), expert))
        move(self, expert, *slot)

    monkeypatch.setattr(kind, name, spy)
    chosen = {name: set() for name in experts_of(model)}
    for name, module in experts_of(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: chosen[name].update(args[1].flatten().tolist()))
    prompt, one = torch.randint(7, 99, (1, 2)), torch.tensor([[8]])
    model(prompt)
    expert_bytes = 3 * 32 * 24 * 4
    paged = copy.deepcopy(model) if source == "memory" else from_disk(model, tmp_path)
    for module in experts_of(paged).values():
        module._forward_pre_hooks.clear()
    pager = page_experts(paged, 6)
    sources = {name: list(module._hf_hook.sources.values()) for name, module in experts_of(paged).items()}
    paged(prompt)
    assert moved == {(name, expert) for name, experts in chosen.items() for expert in experts}
    counts = pager.statistics()["prefill"]
    for name, experts in chosen.items():
        assert counts[name] == PagingCounts(0, len(experts), len(experts) * expert_bytes)
    paged(prompt)  # all are in slots now
    assert pager.total("prefill").bytes == sum(map(len, chosen.values())) * expert_bytes
    for experts in chosen.values():
        experts.clear()
    pager.reset()
    model(one)
    paged(one)
    needed = sum(map(len, chosen.values()))
    assert pager.total("decode") == PagingCounts(0, needed, needed * expert_bytes)
    assert needed == 2 * 2


@torch.no_grad()
def test_least_recently_used_experts_are_replaced_first():
    model = build("qwen3_moe")
    pager = page_experts(model, 3)
    name, experts = next(iter(experts_of(model).items()))

    def call(*ids):
        before = pager.statistics().get("decode", {}).get(name, PagingCounts())
        experts(torch.randn(1, 32), torch.tensor([ids]), torch.ones(1, len(ids)))
        after = pager.statistics()["decode"][name]
        return after.hits - before.hits, after.misses - before.misses

    assert call(0, 1) == (0, 2)
    assert call(2, 0) == (1, 1)
    assert call(3) == (0, 1)  # replaces 1
    assert call(0, 2) == (2, 0)
    assert call(1) == (0, 1)
    assert call(3) == (0, 1)
    assert call(MANY, MANY) == (0, 0)  # sentinels, as in expert parallelism


def test_experts_of_a_gpu_go_back_when_the_slots_are_gone(monkeypatch):
    model, log = build("qwen3_moe"), []
    monkeypatch.setattr(hook, "_move_back", lambda stacks: log.append(len(_hooked(model))))
    page_experts(model, 4)
    assert log == []
    assert len(_hooked(model)) == 2
    unpage_experts(model)
    assert log == [0], "once, when no hook is left"
    monkeypatch.undo()
    stack = SimpleNamespace(data=torch.ones(2))
    hook._move_back([(stack, torch.device("meta"))])
    assert stack.data.device.type == "meta"


def _hooked(model):
    return [module for module in model.modules() if isinstance(getattr(module, "_hf_hook", None), hook.PagingHook)]


def test_after_an_error_in_the_experts(monkeypatch):
    """The experts run inside `computing`, and no read that was started goes on afterwards."""
    model = build("qwen3_moe")
    page_experts(model, 4)
    experts = next(iter(experts_of(model).values()))
    slots, log = experts._hf_hook.slots, []
    for name in ("start", "wait"):
        method = getattr(slots, name)
        monkeypatch.setattr(slots, name, lambda *args, m=method, name=name: (log.append(name), m(*args))[1])

    @contextmanager
    def computing():
        log.append("begin")
        try:
            yield
        finally:
            log.append("end")

    monkeypatch.setattr(slots, "computing", computing)
    inputs = torch.randn(1, 32), torch.tensor([[0, 5]]), torch.ones(1, 2)  # two passes where gradients are recorded
    expected = experts(*inputs)
    assert log == ["start", "wait", "start", "begin", "end", "wait", "begin", "end"]
    log.clear()
    slots.clear()

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(experts._hf_hook, "_forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            experts(*inputs)
    assert log == ["start", "wait", "start", "begin", "end", "wait"]
    torch.testing.assert_close(experts(*inputs), expected)


@torch.no_grad()
def test_hits_run_first_if_reading_overlaps():
    """This is the case on a GPU."""
    model = build("qwen3_moe")
    paged = copy.deepcopy(model)
    page_experts(paged, 6)
    for module in experts_of(paged).values():
        module._hf_hook.slots.overlaps = True
    inputs = inputs_of(model)
    assert torch.equal(paged.generate(**inputs, max_new_tokens=9), model.generate(**inputs, max_new_tokens=9))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated"])
def test_a_paged_model_saves_all_experts(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "expected")
    for source in ("memory", "disk"):
        paged = copy.deepcopy(model) if source == "memory" else from_disk(model, tmp_path / "loaded")
        keys = list(paged.state_dict())
        page_experts(paged, 3)
        paged(**inputs_of(model))
        assert list(paged.state_dict()) == keys
        paged.save_pretrained(tmp_path / source)
        expected = load_file(tmp_path / "expected/model.safetensors")
        saved = load_file(tmp_path / source / "model.safetensors")
        assert expected.keys() == saved.keys()
        assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())


@torch.no_grad()
def test_unpaging_restores_the_model(tmp_path):
    paged = from_disk(build("qwen3_moe"), tmp_path)
    hooks = {name: getattr(module, "_hf_hook", None) for name, module in paged.named_modules()}
    inputs = inputs_of(paged)
    expected = paged(**inputs).logits
    page_experts(paged, 3)
    assert not hasattr(paged.model.norm, "_hf_hook")  # it had no effect except its cost
    unpage_experts(paged)
    assert {name: getattr(module, "_hf_hook", None) for name, module in paged.named_modules()} == hooks
    assert all(isinstance(module._hf_hook, AlignDevicesHook) for module in experts_of(paged).values())
    assert torch.equal(paged(**inputs).logits, expected)
    page_experts(paged, 4)
    torch.testing.assert_close(paged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stacks_are_read_from_the_checkpoint(tmp_path):
    """The checkpoint contains stacks. They are not copied, or are converted one by one if their dtype differs."""
    model = build("qwen3_moe").bfloat16()
    model.save_pretrained(tmp_path, save_original_format=False)
    before = set(tmp_path.iterdir())
    for dtype in (torch.bfloat16, torch.float32):
        loaded = type(model).from_pretrained(tmp_path, device_map=device_map_of(model, "disk"), dtype=dtype)
        page_experts(loaded, 3)
        sources = next(iter(experts_of(loaded).values()))._hf_hook.sources
        assert {source.path for source in sources.values()} == {str(tmp_path / "model.safetensors")}
        expected = copy.deepcopy(model).to(dtype)(**inputs_of(model)).logits
        torch.testing.assert_close(loaded(**inputs_of(model)).logits, expected, rtol=2e-2, atol=2e-2)
    assert set(tmp_path.iterdir()) == before


@torch.no_grad()
def test_the_offload_folder_of_accelerate(tmp_path):
    """`.dat` files, as `dispatch_model` writes them."""
    model = build("mixtral")
    expected = model(**inputs_of(model)).logits
    dispatch_model(model, device_map_of(model, "disk"), offload_dir=tmp_path)
    page_experts(model, 3)
    torch.testing.assert_close(model(**inputs_of(model)).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_budget_in_bytes_is_shared(tmp_path):
    model = make_model(
        expert_groups=[{"name": "a", "num_experts": 8}, {"name": "b", "num_experts": 4}], num_experts=None
    )
    expert = 3 * 32 * 24 * 4  # 12 experts in 111 KB
    with page_experts(model, "111KB") as pager:
        assert sum(pager.slots.values()) == 12
        assert {name.rsplit(".", 1)[1]: slots for name, slots in pager.slots.items()} == {"a": 4, "b": 2}
    with page_experts(model, "1GB") as pager:
        assert sorted(set(pager.slots.values())) == [4, 8]
    with page_experts(model, 6) as pager:
        assert sorted(set(pager.slots.values())) == [4, 6]
    with pytest.raises(ValueError, match=f"the experts of one token take {4 * 2 * expert} bytes in 4 modules"):
        page_experts(model, "20KB")
    with pytest.raises(ValueError, match="`expert_cache` is 1 experts, but a token uses 2 at once"):
        page_experts(model, 1)
    for wrong in ("many", "2 slots", True, 1.5, None):
        with pytest.raises(ValueError, match="must be a number of experts or bytes"):
            page_experts(model, wrong)
    page_experts(model, 2)
    with pytest.raises(ValueError, match="paged already: call `unpage_experts` first"):
        page_experts(model, 2)


def test_a_budget_that_fits_exactly(monkeypatch):
    """To the byte: enough for the experts of one token, and for one more expert."""
    # Accelerate reads only whole thousands of bytes.
    monkeypatch.setattr("modeling_sparse_moe_vlm.toolbox.paging.hook.convert_file_size_to_int", int)
    model, expert = build("qwen3_moe"), 3 * 32 * 24 * 4
    for budget, slots in ((4 * expert, [2, 2]), (5 * expert - 1, [2, 2]), (5 * expert, [2, 3]), (9**9, [12, 12])):
        with page_experts(model, str(budget)) as pager:
            assert sorted(pager.slots.values()) == slots
    with pytest.raises(ValueError, match=f"but the experts of one token take {4 * expert} bytes in 2 modules"):
        page_experts(model, str(4 * expert - 1))


def test_models_that_cannot_be_paged_are_refused():
    with pytest.raises(ValueError, match="Qwen3VLForConditionalGeneration has no experts to page"):
        page_experts(make_qwen3_vl())
    with pytest.raises(ValueError, match="has no weights: it is on the meta device"):
        page_experts(make_qwen3_moe(MANY).to("meta"), 2, "cpu")


def test_trained_experts_are_an_error_in_backward():
    model = make_qwen3_moe(MANY)
    page_experts(model, 4)
    loss = model(torch.tensor([[7, 8]])).logits.sum()  # not an error yet
    with pytest.raises(ValueError, match="paged experts cannot be trained: freeze them"):
        loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("form", ["mapped", "read"])
def test_truncated_and_vanished_files(form, tmp_path, monkeypatch):
    """Detected when paging begins and in every later call, whether or not experts are in slots. Never a bus error."""
    if form == "read":  # as on a GPU
        monkeypatch.setattr(MappedSlots, "serve", lambda *_: False)
    model = build("qwen3_moe")
    loaded = from_disk(model, tmp_path)
    path = next((tmp_path / "offload").glob("*layers.1*down_proj.safetensors"))
    whole = path.read_bytes()
    page_experts(loaded, 2)
    inputs = inputs_of(model)
    loaded(**inputs)
    os.truncate(path, 12_000)
    with pytest.raises(OSError, match=r"down_proj.safetensors is truncated: it must contain weights up to byte \d+"):
        loaded(**inputs)
    path.write_bytes(whole)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    unpage_experts(loaded)
    os.truncate(path, 12_000)
    with pytest.raises(OSError, match="is truncated"):
        page_experts(loaded, 2)
    os.truncate(path, 60)
    with pytest.raises(OSError, match="is not a complete safetensors file"):
        page_experts(loaded, 2)
    path.unlink()
    with pytest.raises(OSError, match=r"cannot read experts from .*down_proj.safetensors: No such file"):
        page_experts(loaded, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "isolated"])
def test_files_that_also_contain_other_weights(name, tmp_path):
    """Transformers maps them as well. Attention or the vision tower would access a missing part before the experts."""
    model, inputs = build(name), inputs_of(build(name))
    model.save_pretrained(tmp_path, save_original_format=False)
    loaded = type(model).from_pretrained(
        tmp_path, device_map=device_map_of(model, "disk"), offload_folder=tmp_path / "offload"
    )
    with page_experts(loaded, 3):
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
        os.truncate(tmp_path / "model.safetensors", 20_000)
        for run in (loaded, loaded.generate):
            with pytest.raises(OSError, match=r"model\.safetensors is truncated"):
                run(**inputs)


@torch.no_grad()
def test_compiled_model():
    model = build("qwen3_moe")
    inputs = inputs_of(model)
    expected = model(**inputs).logits
    page_experts(model, 4)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_copies_are_refused():
    model = build("qwen3_moe")
    with page_experts(model, 4), pytest.raises(ValueError, match="call `unpage_experts` before a copy"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_calls_from_several_threads():
    model = build("qwen3_moe")
    inputs = inputs_of(model)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **greedy)
    page_experts(model, 3)
    with ThreadPoolExecutor(3) as pool:
        for generated in pool.map(lambda _: model.generate(**inputs, **greedy), range(6)):
            assert torch.equal(generated, expected)
