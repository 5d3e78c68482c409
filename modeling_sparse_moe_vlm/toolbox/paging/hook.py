"""Paging of experts: the execution device holds a budget of them, the others stay in host memory or on disk.

experts (all)                        slots (the budget)
host memory / files  ──► misses ──►  gate_up_proj (slots, ...), down_proj (slots, ...)  ──►  the experts' forward
                                     least recently used out first                           with ids of slots
"""

from __future__ import annotations

import heapq
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import convert_file_size_to_int
from torch import nn
from torch.nn.utils import parametrize

from ...experts_config import experts_config_of
from .. import expert_seam
from ..expert_modules import base_model_of, experts_modules, parameters_by_expert
from .saved_stacks import save_experts_for_backward
from .slots import ExpertSlots, MappedSlots
from .sources import ExpertSource, FileSource, MemorySource, find_sources


@dataclass
class PagingCounts:
    """
    What paging did.

    Args:
        hits (`int`): Experts that a call needed and found in slots. Each expert counts once per call of its module.
        misses (`int`): Experts that had to be read. In backward, those read again, stack by stack.
        bytes (`int`): Bytes read, as the experts lie.
    """

    hits: int = 0
    misses: int = 0
    bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among the needed experts; NaN where none was needed."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else float("nan")

    def __add__(self, other: PagingCounts) -> PagingCounts:
        return PagingCounts(self.hits + other.hits, self.misses + other.misses, self.bytes + other.bytes)


class PagedExperts:
    """
    A model's paged experts, as [`page_experts`] returns them. As a context manager, it undoes the paging at the end.
    """

    def __init__(self, model: nn.Module, hooks: dict[str, PagingHook]):
        self.model = model
        self.slots = {name: len(hook.slots) for name, hook in hooks.items()}
        self._hooks = hooks

    def __enter__(self) -> PagedExperts:
        return self

    def __exit__(self, *exception: object) -> None:
        unpage_experts(self.model)

    def statistics(self) -> dict[str, dict[str, PagingCounts]]:
        """
        What paging did so far.

        Returns:
            `dict[str, dict[str, PagingCounts]]`: by phase and by the name of the experts module, of which a model has
            one per layer, or per layer and group. Phases are `"prefill"` (the model was called with more than one token
            per row), `"decode"` (with one) and `"backward"`.
        """
        phases: dict[str, dict[str, PagingCounts]] = {}
        for name, hook in self._hooks.items():
            for phase, counts in hook.counts.items():
                phases.setdefault(phase, {})[name] = PagingCounts() + counts
        return phases

    def total(self, phase: str) -> PagingCounts:
        """The counts of a phase, summed over modules."""
        return sum(self.statistics().get(phase, {}).values(), PagingCounts())

    def reset(self) -> None:
        """Sets the statistics to zero and empties the slots."""
        for hook in self._hooks.values():
            with hook.in_use:
                hook.counts.clear()
                hook.slots.clear()


def page_experts(
    model: nn.Module,
    expert_cache: str | int = "2GiB",
    execution_device: str | int | torch.device | None = None,
) -> PagedExperts:
    """
    Pages the experts of any Transformers model whose experts use the library's experts interface. The experts stay
    where they are, in host memory or, by a device map, on disk; a budget of slots on the execution device holds those
    used last. Outputs and gradients are those of the resident model, whose experts must be frozen for training.

    Every experts module has slots of its own, the same share of its experts as the others: layers take turns, so none
    would find more of its experts in slots shared by all, and so the prefill of one layer leaves the others' alone.

    Where a device map left experts on `"cpu"` or `"disk"`, apart from the execution device, these are paged, and the
    others stay resident; otherwise all are. Adapters of experts must run factored (`toolbox.expert_lora`); add them
    after this, or PEFT puts them on the meta device with experts that are on disk.

    Args:
        model (`nn.Module`):
            The model, dispatched by Accelerate or simply loaded. In the latter case everything but the experts is moved
            to the execution device.
        expert_cache (`str` or `int`, defaults to `"2GiB"`):
            The budget: bytes of all slots together (`"2GiB"`, `"500MB"`), or a number of experts in each module.
        execution_device (`str`, `int` or `torch.device`, *optional*):
            Where the experts run. By default where they would without paging.

    Returns:
        [`PagedExperts`]: statistics, and a context manager that ends with [`unpage_experts`].

    Raises:
        ValueError: If the model has no such experts or has paged ones already, or if the budget cannot be read or does
            not hold the experts of a token.
        OSError: If a file with experts is gone or truncated, now or while the model runs.
    """
    base: Any = base_model_of(model)
    modules: dict[str, Any] = experts_modules(base)
    if not modules:
        raise ValueError(
            f"{type(base).__name__} has no experts to page: no module of it uses Transformers' experts interface "
            "(`use_experts_implementation`)."
        )
    if any(isinstance(getattr(module, "_hf_hook", None), PagingHook) for module in modules.values()):
        raise ValueError("the model's experts are paged already: call `unpage_experts` first.")
    device = None if execution_device is None else _full(execution_device)
    devices = {name: device or _device(module) for name, module in modules.items()}
    apart = {
        name
        for name, module in modules.items()
        if any(p.device != devices[name] for p in parameters_by_expert(module).values())
    }
    modules = {name: module for name, module in modules.items() if not apart or name in apart}
    num_slots = _share(expert_cache, modules, _experts_per_token(base))
    sources = {name: _sources(name, module, devices[name].type == "cuda") for name, module in modules.items()}
    if device is not None and not hasattr(base, "hf_device_map"):
        paged = set(modules.values())
        for module in base.modules():
            if module not in paged:
                module._apply(lambda tensor: tensor.to(device), recurse=False)
    phase = Phase(base)
    every = [source for of_module in sources.values() for source in of_module.values()]
    files = {source.path: source for source in every if isinstance(source, FileSource)}
    undo: list[Callable[[], object]] = [phase.remove]
    for name, module in base.named_modules():
        if name.count(".") < 2:  # the model, and what `generate` may call before it, as encoders of pictures
            undo.append(module.register_forward_pre_hook(partial(_check, files)).remove)
    for module in _idle(base):
        if module not in modules.values():
            undo.append(partial(add_hook_to_module, module, module._hf_hook))
            remove_hook_from_module(module)
    hooks = {name: PagingHook(name, sources[name], num_slots[name], devices[name], phase, undo) for name in modules}
    for name, module in modules.items():
        add_hook_to_module(module, hooks[name])
    return PagedExperts(base, hooks)


def unpage_experts(model: nn.Module) -> None:
    """
    Undoes [`page_experts`]: the slots are freed, and the experts run as before, with the hooks that Accelerate gave
    them. Other modules stay on the device to which paging may have moved them.
    """
    for module in list(model.modules()):
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, PagingHook):
            remove_hook_from_module(module)
            if hook.replaced is not None:
                add_hook_to_module(module, hook.replaced)
            while hook.undo:
                hook.undo.pop()()


class _OfThread(threading.local):
    """The phase that a thread is in. Copies are empty."""

    name: str | None = None

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return type(self), ()


class Phase:
    """Tells prefill from decoding by the number of tokens per row that the model is called with, in each thread."""

    def __init__(self, model: nn.Module):
        self._of_thread = _OfThread()
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if isinstance(tokens, torch.Tensor) and tokens.dim() > 1:
            self._set("decode" if tokens.shape[1] == 1 else "prefill")

    def _end(self, *_: object) -> None:
        self._set(None)

    @torch.compiler.disable
    def _set(self, name: str | None) -> None:
        self._of_thread.name = name

    def of(self, num_tokens: int) -> str:
        return self._of_thread.name or ("decode" if num_tokens == 1 else "prefill")

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class PagingHook(ModelHook):
    """
    The hook on an experts module. It runs the module's forward with slots in the place of the parameters, in as many
    passes as the slots ask for: the experts that are there first, while the missing ones are read.
    """

    def __init__(
        self,
        name: str,
        sources: dict[str, ExpertSource],
        num_slots: int,
        device: torch.device,
        phase: Phase,
        undo: list[Callable[[], object]],
    ):
        self.name = name
        self.sources = sources
        self.num_slots = num_slots
        self.device = device
        self.phase = phase
        self.undo = undo  # what is to be done once when paging ends; shared by the hooks of a model
        self.counts: dict[str, PagingCounts] = defaultdict(PagingCounts)
        self.current = "backward"  # the phase that reads are counted for
        self.in_use = threading.Lock()  # of the slots, which serve one call at a time

    def init_hook(self, module: Any) -> nn.Module:
        self.replaced: ModelHook | None = getattr(module, "_hf_hook", None)
        # Transformers asks the hook for parameters on the meta device when it saves a model.
        self.weights_map = getattr(self.replaced, "weights_map", None)
        dtypes = {name: getattr(module, name).dtype for name in self.sources}
        kind = MappedSlots if MappedSlots.serve(self.sources, dtypes, self.device) else ExpertSlots
        self.slots = kind(self.sources, dtypes, self.num_slots, self.device, self._count)
        self.parameters = {name: nn.Parameter(stack, requires_grad=False) for name, stack in self.slots.stacks.items()}
        self.kept = {name: module._parameters[name] for name in self.sources}
        if kind is MappedSlots:
            # No longer on the meta device, where adapters would follow them.
            for name, stack in self.slots.stacks.items():
                module._parameters[name] = nn.Parameter(stack, requires_grad=self.kept[name].requires_grad)
        self._forward = module._old_forward
        module._old_forward = partial(self.forward, module)
        expert_seam.prepare(module)
        expert_seam.set_owner(module, self)
        return module

    @property
    def is_read_only(self) -> bool:
        """Whether the experts cannot be changed, as they are in files."""
        return any(isinstance(source, FileSource) for source in self.sources.values())

    def read_again(self, module: Any) -> None:
        """Lets go of what the slots hold, since the experts in memory were changed."""
        with self.in_use:
            self.sources.update(_sources(self.name, module, self.device.type == "cuda"))
            self.slots.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagingHook:
        raise ValueError(f"{self.name} is paged, and its slots serve one model: call `unpage_experts` before a copy.")

    def detach_hook(self, module: Any) -> nn.Module:
        module._old_forward = self._forward
        module._parameters.update(self.kept)
        expert_seam.set_owner(module, None)
        return module

    def _count(self, hits: int, misses: int, number_of_bytes: int) -> None:
        self.counts[self.current] += PagingCounts(hits, misses, number_of_bytes)

    @torch.compiler.disable  # what is read depends on values
    def forward(self, module: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"an adapter folds itself into the parameters of {self.name}, of which only some are at hand as they "
                "are paged. Run the adapter factored (`toolbox.expert_lora`), or call `unpage_experts` first."
            )
        # Models name the arguments differently, and agree on their order.
        inputs = (*args, *kwargs.values())
        hidden_states, top_k_index, top_k_weights = (tensor.to(self.device) for tensor in inputs)
        with self.in_use:
            self.current = self.phase.of(hidden_states.shape[0])
            try:
                output = self._run_in_passes(module, hidden_states, top_k_index, top_k_weights)
            finally:
                self.current = "backward"
        trained = [parameter for name in self.sources if (parameter := module._parameters[name]).requires_grad]
        if trained and torch.is_grad_enabled():
            output = _Frozen.apply(output, self.name, *trained)
        return output.to(inputs[0].device)

    def _run_in_passes(self, module: Any, *inputs: torch.Tensor) -> torch.Tensor:
        """Runs one pass after the other, each while the experts of the next one are read, where slots are to spare."""
        hidden_states, top_k_index, top_k_weights = inputs
        slots, order, outputs = self.slots, [], []
        needed = [expert for expert in top_k_index.unique().tolist() if expert < slots.num_experts]

        def run(placement: dict[int, int]) -> None:
            # Pairs of a token and an expert: each is in one pass, so that nothing is computed in vain.
            is_here = torch.zeros(slots.num_experts + 1, dtype=torch.bool, device=self.device)
            is_here[list(placement)] = True
            pairs = is_here[top_k_index].flatten().nonzero().squeeze(1)
            tokens = hidden_states[pairs // top_k_index.shape[1]]
            index, weights = top_k_index.reshape(-1, 1)[pairs], top_k_weights.reshape(-1, 1)[pairs]
            order.append(pairs)
            outputs.append(self._run(module, placement, tokens, index, weights))

        current: dict[int, int] = {}
        for following in slots.plan(needed, fixed=torch.is_grad_enabled()):
            if current and set(following.values()) & set(current.values()):
                run(current)
                current = {}
            slots.start(following)
            if current:
                run(current)
            slots.wait()
            current = following
        if not outputs:
            return self._run(module, current, *inputs)
        run(current)
        output = torch.cat(outputs)
        output = output.new_zeros(top_k_index.numel(), output.shape[-1]).index_copy(0, torch.cat(order), output)
        return output.view(*top_k_index.shape, -1).sum(dim=1)

    def _run(self, module: Any, placement: dict[int, int], *inputs: torch.Tensor) -> torch.Tensor:
        """Runs the forward for inputs all of whose experts are in slots."""
        hidden_states, top_k_index, top_k_weights = inputs
        slot_of, held = self.slots.tables()
        saved = (
            save_experts_for_backward(self.slots, placement, self.in_use) if torch.is_grad_enabled() else nullcontext()
        )
        with expert_seam.use_stacks(module, self.parameters, held), saved:
            return self._forward(hidden_states, slot_of[top_k_index], top_k_weights)


class _Frozen(torch.autograd.Function):
    """The identity, for experts that require gradients, which they cannot have."""

    @staticmethod
    def forward(ctx, output: torch.Tensor, name: str, *experts: torch.Tensor) -> torch.Tensor:
        ctx.name = name
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *_):
        raise ValueError(
            f"{ctx.name} wants gradients, but paged experts cannot be trained: freeze them (`requires_grad_(False)`), "
            "and train an adapter, or call `unpage_experts` first."
        )


@torch.compiler.disable
def _check(files: Mapping[str, FileSource], *_: object) -> None:
    """Looks after files before anything runs: weights of other modules, too, lie in them, mapped by Transformers."""
    for file in files.values():
        file.check()


def _device(module: Any) -> torch.device:
    """Where Accelerate, or whoever loaded the model, lets a module run."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "execution_device", None) is not None:
            return _full(part.execution_device)
    return next(module.parameters(recurse=False)).device


def _idle(model: nn.Module) -> list[Any]:
    """
    The modules inside a model before which Accelerate moves inputs to their device in vain, since all run on one. It
    took 6 % of the time per token where that was measured, on a CPU.
    """
    hooks = {module: module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")}
    if len({_device(module) for module in hooks}) > 1:
        return []
    return [
        module
        for module, hook in hooks.items()
        if module is not model and isinstance(hook, AlignDevicesHook) and not hook.offload
    ]


def _full(device: str | int | torch.device) -> torch.device:
    """A device with its index."""
    return torch.empty(0, device=device).device


def _sources(name: str, module: Any, pin: bool) -> dict[str, ExpertSource]:
    """Where the experts lie. Those on the execution device itself, where that is a GPU, go to host memory."""
    stacks = parameters_by_expert(module)
    if all(stack.is_meta for stack in stacks.values()):
        hook = getattr(module, "_hf_hook", None)
        weights = getattr(hook, "weights_map", None)
        if weights is None:
            raise ValueError(f"{name} has no weights: it is on the meta device, and no device map says where they are.")
        return find_sources(weights, stacks, pin)
    for stack in stacks.values():
        stack.data = stack.data.cpu().pin_memory() if pin else stack.data
    return {name: MemorySource(stack.data) for name, stack in stacks.items()}


def _experts_per_token(model: Any) -> int:
    config = getattr(model, "config", None)
    number = getattr(experts_config_of(config), "num_experts_per_tok", 1) if config is not None else 1
    return number if isinstance(number, int) else 1


def _share(expert_cache: str | int, modules: dict[str, Any], experts_per_token: int) -> dict[str, int]:
    """The number of slots of each module."""
    sizes: dict[str, int] = {name: module.num_experts for name, module in modules.items()}
    least = {name: min(experts_per_token, size) for name, size in sizes.items()}
    if isinstance(expert_cache, int) and not isinstance(expert_cache, bool):
        if expert_cache < max(least.values()):
            raise ValueError(
                f"`expert_cache` is {expert_cache} experts, but a token uses {max(least.values())} at once: raise it."
            )
        return {name: min(expert_cache, size) for name, size in sizes.items()}
    try:
        budget = convert_file_size_to_int(str(expert_cache))
    except ValueError as error:
        raise ValueError(
            f'`expert_cache` must be a number of experts or bytes such as "2GiB" or "500MB", got {expert_cache!r}.'
        ) from error
    expert_bytes = {
        name: sum(stack.dtype.itemsize * stack[0].numel() for stack in parameters_by_expert(module).values())
        for name, module in modules.items()
    }
    needed = sum(least[name] * expert_bytes[name] for name in modules)
    if budget < needed:
        raise ValueError(
            f"`expert_cache` is {expert_cache} ({budget} bytes), but the experts of one token take {needed} bytes in "
            f"{len(modules)} modules: raise it."
        )
    # Whoever has the smallest share of its experts is given the next slot.
    slots, budget = dict(least), budget - needed
    queue = [(slots[name] / sizes[name], name) for name in modules if slots[name] < sizes[name]]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if expert_bytes[name] <= budget:
            slots[name], budget = slots[name] + 1, budget - expert_bytes[name]
            if slots[name] < sizes[name]:
                heapq.heappush(queue, (slots[name] / sizes[name], name))
    return slots
