"""Pages experts: the execution device has slots for some of them, the others stay in host memory or on disk.

```
all experts                          slots (the budget)
host memory / files  ──► misses ──►  gate_up_proj (slots, ...), down_proj (slots, ...)  ──►  forward of the experts
                                     the least recently used expert is replaced              with slot numbers as ids
```
"""

from __future__ import annotations

import heapq
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from ..expert_modules import base_model_of, experts_modules, parameters_by_expert, unfused_hint
from .saved_stacks import save_experts_for_backward
from .slots import ExpertSlots, MappedSlots
from .sources import ExpertSource, FileSource, MemorySource, find_sources


@dataclass
class PagingCounts:
    """
    Counts of the experts that were used and read.

    Args:
        hits (`int`, *optional*, defaults to 0):
            Number of experts that a call needed and that were in slots. Each counts once per call of its module.
        misses (`int`, *optional*, defaults to 0):
            Number of experts that had to be read. In the backward pass, every stack of an expert counts separately.
        bytes (`int`, *optional*, defaults to 0):
            Number of bytes read, in the data type in which the experts are stored.
    """

    hits: int = 0
    misses: int = 0
    bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of hits among the needed experts, from 0 to 1; NaN if no expert was needed."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else float("nan")

    def __add__(self, other: PagingCounts) -> PagingCounts:
        return PagingCounts(self.hits + other.hits, self.misses + other.misses, self.bytes + other.bytes)


class PagedExperts:
    """
    The paged experts of a model, which [`page_experts`] returns. It is also a context manager that calls
    [`unpage_experts`] on exit.

    Args:
        model (`nn.Module`):
            The model, without adapters.
        hooks (`dict[str, PagingHook]`):
            Paging hooks of its experts modules, by name of the module.

    Attributes:
        slots (`dict[str, int]`): Number of slots of each experts module, by name of the module.
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
        Returns the counts since the start, or since the last [`~PagedExperts.reset`].

        Returns:
            `dict[str, dict[str, PagingCounts]]`: Counts by phase and by name of the experts module. A model has one
            experts module per layer, or per layer and group. The phases are `"prefill"` (calls of the model with more
            than one token per row), `"decode"` (calls with one token per row) and `"backward"`.
        """
        phases: dict[str, dict[str, PagingCounts]] = {}
        for name, hook in self._hooks.items():
            for phase, counts in hook.counts.items():
                phases.setdefault(phase, {})[name] = PagingCounts() + counts
        return phases

    def total(self, phase: str) -> PagingCounts:
        """
        Returns the counts of a phase, summed over modules.

        Args:
            phase (`str`):
                `"prefill"`, `"decode"` or `"backward"`.

        Returns:
            [`PagingCounts`]: The sum; zeros if the phase has not occurred.
        """
        return sum(self.statistics().get(phase, {}).values(), PagingCounts())

    def reset(self) -> None:
        """Sets the counts to zero and empties the slots."""
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
    Pages the experts of any Transformers model that uses the library's experts interface. The experts stay in host
    memory or, with a device map, on disk. Slots on the execution device contain the most recently used experts. Outputs
    and gradients are those of the model without paging. In training, the experts must be frozen.

    A slot is a buffer on the execution device that contains the weights of one expert. Experts that run on the CPU and
    are stored in files are memory-mapped instead; the number of slots then limits how many experts are in memory. Every
    experts module has its own slots, for the same share of its experts. Slots shared by all layers would not have more
    hits, because the layers run one after the other, and the prefill of one layer would replace the experts of the
    others.

    If a device map has put some experts on `"cpu"` or `"disk"`, away from their execution device, only these are paged
    and the others stay resident. Otherwise, all experts are paged. Adapters of experts must run factored
    (`toolbox.expert_lora`). Add them after this call; otherwise, PEFT puts an adapter on the meta device if its
    experts are on disk.

    Args:
        model (`nn.Module`):
            The model, dispatched by Accelerate or loaded without a device map. In the latter case, `execution_device`
            also moves everything except the experts to that device.
        expert_cache (`str` or `int`, *optional*, defaults to `"2GiB"`):
            The budget: the number of bytes of all slots together, such as `"2GiB"` or `"500MB"`, or (as an `int`) the
            number of slots of each experts module.
        execution_device (`str`, `int` or `torch.device`, *optional*):
            Device on which the experts run. By default, the device on which they would run without paging.

    Returns:
        [`PagedExperts`]: The counts of hits and misses, and a context manager that calls [`unpage_experts`] on exit.

    Raises:
        ValueError: If the model has no such experts, if they are paged already, or if the budget is not readable or too
            small for the experts of one token.
        OSError: If a file with experts is missing or truncated, now or while the model runs.
    """
    base: Any = base_model_of(model)
    modules: dict[str, Any] = experts_modules(base)
    if not modules:
        raise ValueError(
            f"{type(base).__name__} has no experts to page: no module of it uses Transformers' experts interface "
            f"(`use_experts_implementation`).{unfused_hint(base)}"
        )
    if any(isinstance(getattr(module, "_hf_hook", None), PagingHook) for module in modules.values()):
        raise ValueError("the experts of the model are paged already: call `unpage_experts` first.")
    device = None if execution_device is None else _full(execution_device)
    devices = {name: device or _device(module) for name, module in modules.items()}
    apart = {
        name
        for name, module in modules.items()
        if any(p.device != devices[name] for p in parameters_by_expert(module).values())
    }
    modules = {name: module for name, module in modules.items() if not apart or name in apart}
    num_slots = _share(expert_cache, modules, _experts_per_token(base))
    on_gpu = [
        (stack, stack.device)
        for module in modules.values()
        for stack in parameters_by_expert(module).values()
        if stack.device.type == "cuda"
    ]
    sources = {name: _sources(name, module, devices[name].type == "cuda") for name, module in modules.items()}
    if device is not None and not hasattr(base, "hf_device_map"):
        paged = set(modules.values())
        for module in base.modules():
            if module not in paged:
                module._apply(lambda tensor: tensor.to(device), recurse=False)
    phase = Phase(base)
    every = [source for of_module in sources.values() for source in of_module.values()]
    files = {source.path: source for source in every if isinstance(source, FileSource)}
    undo: list[Callable[[], object]] = [phase.remove, partial(_move_back, on_gpu)]
    for name, module in base.named_modules():
        if name.count(".") < 2:  # the model, and what `generate` may call before it, such as image encoders
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
    Undoes [`page_experts`]: frees the slots, restores the hooks that Accelerate added to the experts, and moves experts
    that were on a GPU back there. Other modules stay on the device to which [`page_experts`] has moved them.

    Args:
        model (`nn.Module`):
            The model. Nothing happens if its experts are not paged.
    """
    undo: list[Callable[[], object]] = []
    for module in list(model.modules()):
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, PagingHook):
            undo = hook.undo
            remove_hook_from_module(module)
            if hook.replaced is not None:
                add_hook_to_module(module, hook.replaced)
        del hook  # and with it the slots, whose memory the experts may need
    while undo:
        undo.pop()()


class _OfThread(threading.local):
    """The current phase of each thread. Copies and pickles are empty."""

    name: str | None = None

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return type(self), ()


class Phase:
    """Distinguishes prefill from decoding, per thread, by the number of tokens per row in a call of the model."""

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
        """Returns the phase of this thread. Outside of a call of the model, it depends on the number of tokens."""
        return self._of_thread.name or ("decode" if num_tokens == 1 else "prefill")

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class PagingHook(ModelHook):
    """
    The hook of an experts module. It runs the module's forward with the slots instead of the parameters, in as many
    passes as the number of slots requires. Experts that are in slots run first, while the missing ones are read.
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
        self.undo = undo  # functions to call once when paging ends; the hooks of a model share the list
        self.counts: dict[str, PagingCounts] = defaultdict(PagingCounts)
        self.current = "backward"  # the phase to which reads are counted
        self.in_use = threading.Lock()  # lock of the slots, which serve one call at a time

    def init_hook(self, module: Any) -> nn.Module:
        self.replaced: ModelHook | None = getattr(module, "_hf_hook", None)
        # Transformers reads parameters on the meta device from this attribute when it saves a model.
        self.weights_map = getattr(self.replaced, "weights_map", None)
        dtypes = {name: getattr(module, name).dtype for name in self.sources}
        kind = MappedSlots if MappedSlots.serve(self.sources, dtypes, self.device) else ExpertSlots
        self.slots = kind(self.sources, dtypes, self.num_slots, self.device, self._count)
        self.parameters = {name: nn.Parameter(stack, requires_grad=False) for name, stack in self.slots.stacks.items()}
        self.kept = {name: module._parameters[name] for name in self.sources}
        if kind is MappedSlots:
            # Move them off the meta device, because new adapters use the device of the parameters.
            for name, stack in self.slots.stacks.items():
                module._parameters[name] = nn.Parameter(stack, requires_grad=self.kept[name].requires_grad)
        self._forward = module._old_forward
        module._old_forward = partial(self.forward, module)
        expert_seam.prepare(module)
        expert_seam.set_owner(module, self)
        return module

    @property
    def is_read_only(self) -> bool:
        """Whether the experts cannot be changed because they are read from files."""
        return any(isinstance(source, FileSource) for source in self.sources.values())

    def read_again(self, module: Any) -> None:
        """Empties the slots, because the experts in memory were changed."""
        with self.in_use:
            self.sources.update(_sources(self.name, module, self.device.type == "cuda"))
            self.slots.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagingHook:
        raise ValueError(
            f"{self.name} is paged, and its slots serve one model: call `unpage_experts` before a copy is made."
        )

    def detach_hook(self, module: Any) -> nn.Module:
        module._old_forward = self._forward
        module._parameters.update(self.kept)
        expert_seam.set_owner(module, None)
        return module

    def _count(self, hits: int, misses: int, number_of_bytes: int) -> None:
        self.counts[self.current] += PagingCounts(hits, misses, number_of_bytes)

    @torch.compiler.disable  # which experts are read depends on values of tensors
    def forward(self, module: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"an adapter merges its weights into the parameters of {self.name}, but only some of these experts are "
                "in memory because they are paged. Run the adapter factored (`toolbox.expert_lora`), or call "
                "`unpage_experts` first."
            )
        # Models use different names for the arguments, but the same order.
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
        """Runs the passes one after the other. Meanwhile, the experts of the next pass are read if slots are free."""
        hidden_states, top_k_index, top_k_weights = inputs
        slots, order, outputs = self.slots, [], []
        needed = [expert for expert in top_k_index.unique().tolist() if expert < slots.num_experts]

        def run(placement: dict[int, int]) -> None:
            # Pairs of a token and an expert. Each pair belongs to one pass, so nothing is computed twice.
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
            try:
                if current:
                    run(current)
            finally:  # also after an error: the reads must not go on while the slots serve the next call
                slots.wait()
            current = following
        if not outputs:
            return self._run(module, current, *inputs)
        run(current)
        output = torch.cat(outputs)
        output = output.new_zeros(top_k_index.numel(), output.shape[-1]).index_copy(0, torch.cat(order), output)
        return output.view(*top_k_index.shape, -1).sum(dim=1)

    def _run(self, module: Any, placement: dict[int, int], *inputs: torch.Tensor) -> torch.Tensor:
        """Runs the forward for inputs whose experts are all in slots."""
        hidden_states, top_k_index, top_k_weights = inputs
        slot_of, held = self.slots.tables()
        saved = (
            save_experts_for_backward(self.slots, placement, self.in_use) if torch.is_grad_enabled() else nullcontext()
        )
        with self.slots.computing(), expert_seam.use_stacks(module, self.parameters, held), saved:
            return self._forward(hidden_states, slot_of[top_k_index], top_k_weights)


class _Frozen(torch.autograd.Function):
    """The identity. Its backward raises an error, because paged experts cannot have gradients."""

    @staticmethod
    def forward(ctx, output: torch.Tensor, name: str, *experts: torch.Tensor) -> torch.Tensor:
        ctx.name = name
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *_):
        raise ValueError(
            f"{ctx.name} requires gradients, but paged experts cannot be trained: freeze them "
            "(`requires_grad_(False)`) and train an adapter, or call `unpage_experts` first."
        )


@torch.compiler.disable
def _check(files: Mapping[str, FileSource], *_: object) -> None:
    """Checks the files before a model runs. Transformers maps weights of other modules from the same files."""
    for file in files.values():
        file.check()


def _device(module: Any) -> torch.device:
    """Returns the device on which a module runs: Accelerate's execution device, or the device of its weights."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "execution_device", None) is not None:
            return _full(part.execution_device)
    return next(module.parameters(recurse=False)).device


def _idle(model: nn.Module) -> list[Any]:
    """
    Returns the modules with a hook of Accelerate that has no effect: it moves inputs to the device of the module, but
    all modules run on the same device. On a CPU, these hooks took 6 % of the time per token.
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
    """Returns a device with its index."""
    return torch.empty(0, device=device).device


def _sources(name: str, module: Any, pin: bool) -> dict[str, ExpertSource]:
    """Returns the sources of the experts, by parameter name. Moves experts that are on a GPU to pinned host memory."""
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


def _move_back(stacks: Sequence[tuple[torch.Tensor, torch.device]]) -> None:
    """Moves experts from host memory back to the devices where they were."""
    for stack, device in stacks:
        stack.data = stack.data.to(device)


def _experts_per_token(model: Any) -> int:
    config = getattr(model, "config", None)
    number = getattr(experts_config_of(config), "num_experts_per_tok", 1) if config is not None else 1
    return number if isinstance(number, int) else 1


def _share(expert_cache: str | int, modules: dict[str, Any], experts_per_token: int) -> dict[str, int]:
    """Returns the number of slots of each module."""
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
    # The module with the smallest share of its experts in slots gets the next slot.
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
