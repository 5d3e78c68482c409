"""Experts run with other weights for one call of one thread; the module itself never changes."""

import copy
import pickle
import threading

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrize

from modeling_sparse_moe_vlm.toolbox import expert_seam
from modeling_sparse_moe_vlm.toolbox.expert_seam import run_with_adapters, use_stacks
from tests.support.in_tree_moe import experts_of, make_model


@pytest.fixture
def experts():
    module = next(iter(experts_of(make_model("qwen3_moe").requires_grad_(False)).values()))
    expert_seam.prepare(module)
    return module


def call(num_experts: int = 8):
    """Returns the arguments of a call with one token for each expert."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(num_experts)[:, None]
    return torch.randn(num_experts, 32, generator=generator), index, torch.ones(num_experts, 1)


def doubled(stack, held):
    return stack * 2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_adapted_stacks_are_used_only_during_the_call(experts, implementation):
    experts.config._experts_implementation = implementation
    before, stack = experts(*call()), experts.down_proj
    assert isinstance(stack, nn.Parameter)
    torch.testing.assert_close(run_with_adapters(experts, {"down_proj": doubled}, *call()), before * 2)
    assert torch.equal(experts(*call()), before)
    assert experts.down_proj is stack
    assert set(experts.state_dict()) == {"gate_up_proj", "down_proj"}


def test_a_prepared_class_looks_as_before(experts):
    base = expert_seam.class_of(experts)
    assert base in type(experts).__mro__
    assert base is not type(experts)
    assert (type(experts).__name__, type(experts).__module__) == (base.__name__, base.__module__)
    again = type(experts)
    expert_seam.prepare(experts)
    assert type(experts) is again
    assert type(next(iter(experts_of(make_model("qwen3_moe")).values()))) is base
    assert not hasattr(experts, "gate_up_proj_bias")
    assert not hasattr(experts, "up_proj")
    with pytest.raises(AttributeError, match="no_such_stack"):
        _ = experts.no_such_stack


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_are_separate_modules(experts, copied):
    other = copied(experts)
    assert type(other) is type(experts)
    with torch.no_grad():
        other.down_proj.zero_()
    assert experts.down_proj.any()
    expected = experts(*call()) * 2
    torch.testing.assert_close(run_with_adapters(experts, {"down_proj": doubled}, *call()), expected)
    assert not run_with_adapters(other, {"down_proj": doubled}, *call()).any()


def test_another_thread_sees_the_unchanged_module(experts):
    """The other thread runs in the middle of this thread's call with other stacks."""
    before, seen = experts(*call()), []

    def meanwhile(stack, held):
        if not seen:
            thread = threading.Thread(target=lambda: seen.append(experts(*call())))
            thread.start()
            thread.join()
        return stack * 2

    adapted = run_with_adapters(experts, {"down_proj": meanwhile}, *call())
    assert torch.equal(seen[0], before)
    torch.testing.assert_close(adapted, before * 2)


def test_another_module_is_not_affected(experts):
    other = copy.deepcopy(experts)
    before, seen = other(*call()), []

    def meanwhile(stack, held):
        seen.append(other(*call()))
        return stack * 2

    run_with_adapters(experts, {"down_proj": meanwhile}, *call())
    assert torch.equal(seen[0], before)


def test_everything_is_restored_after_an_error(experts):
    before = experts(*call())

    def fail(stack, held):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run_with_adapters(experts, {"down_proj": fail}, *call())
    with pytest.raises(ArithmeticError), use_stacks(experts, {}, torch.arange(2)):
        raise ArithmeticError
    assert torch.equal(experts(*call()), before)
    assert experts.num_experts == 8


def test_some_of_the_experts(experts):
    """Stacks of some experts, with the adapters of the outer call. Adapters receive the numbers of the experts."""
    held = torch.tensor([5, 2, 7])
    stacks = {name: getattr(experts, name)[held] for name in ("gate_up_proj", "down_proj")}
    hidden_states, _, weights = call(3)
    expected = experts(hidden_states, held[:, None], weights)
    told = []

    def adapt(stack, held):
        told.append((stack, held))
        return stack * held[:, None, None]

    inner = experts.forward

    def forward(*args):
        with use_stacks(experts, stacks, held):
            assert experts.num_experts == 3
            assert torch.equal(experts.down_proj, stacks["down_proj"] * held[:, None, None])
            assert experts.gate_up_proj is stacks["gate_up_proj"]
            output = inner(hidden_states, torch.arange(3)[:, None], weights)
        assert experts.num_experts == 8
        return output

    experts.forward = forward
    got = run_with_adapters(experts, {"down_proj": adapt}, hidden_states, held[:, None], weights)
    torch.testing.assert_close(got, expected * held[:, None])
    assert len(told) == 1, "made once while the stack is the same"
    assert told[0][0] is stacks["down_proj"]
    assert told[0][1] is held


def test_stacks_loaded_by_a_hook_are_adapted(experts):
    """Accelerate's hook is added before and after."""
    expected = experts(*call()) * 2
    weights = {name: value.clone() for name, value in experts.state_dict().items()}
    for _ in range(2):
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
        add_hook_to_module(experts, hook)
        assert experts.down_proj.is_meta
        adapters = {"down_proj": lambda stack, held: stack if stack.is_meta else stack * 2}
        torch.testing.assert_close(run_with_adapters(experts, adapters, *call()), expected)
        assert experts.down_proj.is_meta
        remove_hook_from_module(experts)
        assert not experts.down_proj.is_meta


def test_an_earlier_wrapper_of_the_forward(experts):
    """Expert parallelism keeps the bound forward that the module had when the model was loaded."""
    plain = next(iter(experts_of(make_model("qwen3_moe").requires_grad_(False)).values()))
    kept = plain.forward
    plain.forward = lambda *args: kept(*args) + 1
    expert_seam.prepare(plain)
    expected = kept(*call()) * 2 + 1
    torch.testing.assert_close(run_with_adapters(plain, {"down_proj": doubled}, *call()), expected)


def test_parametrisations_are_applied_first(experts):
    expected = experts(*call()) * 3

    class Tripled(nn.Module):
        def forward(self, stack):
            return stack * 3

    parametrize.register_parametrization(experts, "down_proj", Tripled())
    torch.testing.assert_close(experts(*call()), expected)
    parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)
    torch.testing.assert_close(experts(*call()) * 3, expected)
    torch.testing.assert_close(run_with_adapters(experts, {"down_proj": doubled}, *call()) * 1.5, expected)


def test_attributes_can_be_set(experts):
    experts.num_experts = 5
    experts.down_proj = nn.Parameter(torch.zeros(5, 32, 24))
    assert experts.num_experts == 5
    assert experts.down_proj is experts._parameters["down_proj"]


def test_a_replica_of_data_parallel(experts):
    """A replica has plain tensors instead of parameters."""
    expected = experts(*call()) * 2
    replica = experts._replicate_for_data_parallel()
    stacks = {name: value.clone() for name, value in experts._parameters.items()}
    replica._parameters = {}
    for name, stack in stacks.items():
        setattr(replica, name, stack)
    assert replica.down_proj is stacks["down_proj"]
    torch.testing.assert_close(run_with_adapters(replica, {"down_proj": doubled}, *call()), expected)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_a_compiled_call(experts, implementation):
    experts.config._experts_implementation = implementation

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts

        def forward(self, *args):
            return run_with_adapters(self.experts, {"down_proj": doubled}, *args)

    before = experts(*call())
    compiled = torch.compile(Adapted(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*call()), before * 2)
    assert expert_seam.TRACED not in experts.__dict__
    assert torch.equal(experts(*call()), before)


def test_a_class_that_was_replaced_is_refused(experts):
    experts.__class__ = expert_seam.class_of(experts)
    with pytest.raises(RuntimeError, match="call `factor_expert_lora"):
        run_with_adapters(experts, {}, *call())
    with pytest.raises(RuntimeError, match="would run them without their adapters"):
        use_stacks(experts, {}, torch.arange(2))


def test_an_owner_is_notified_of_changes(experts):
    class Owner:
        is_read_only = True
        heard = ()

        def read_again(self, experts):
            self.heard = (*self.heard, experts)

    owner = Owner()
    assert expert_seam.is_read_only(experts) is False
    expert_seam.stacks_have_changed(experts)
    expert_seam.set_owner(experts, owner)
    expert_seam.stacks_have_changed(experts)
    assert owner.heard == (experts,)
    assert expert_seam.is_read_only(experts) is True
    expert_seam.set_owner(experts, None)
    assert expert_seam.is_read_only(experts) is False
