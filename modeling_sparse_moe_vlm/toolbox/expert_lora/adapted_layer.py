"""PEFT's LoRA layer for the parameters of an experts module, run factored.

What is used of PEFT's internals is here: `ParamWrapper`, its name and the layout of its weights,
and `LoraConfig._register_custom_module`. Wrappers nest, one per adapted parameter: `down(gate_up(experts))`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .decode_cache import StepMemory
from .factored_weight import FactoredWeight, LowRankUpdate
from .processes import check_is_alike, is_spread, share_of

# `grouped_mm` wants rows of a multiple of so many bytes.
ROW_BYTES = 16


class FactoredExpertsLayer(ParamWrapper):
    """
    `ParamWrapper` that multiplies with W + scaling·B·A expert by expert, without adding it up: x·W + (x·A)·B. What is
    saved, loaded and merged is PEFT's. Besides what PEFT can, it takes dropout, DoRA and rows with an adapter each.

    The layout of the adapter of a stack of E experts: `lora_A.weight (E·r, in)`, the expert slowest; `lora_B.weight
    (out, r·E)`, the expert fastest; with DoRA also magnitudes `(E, out)`.

    Args:
        base_layer (`nn.Module`): The experts module, or the layer of another of its stacks.
        adapter_name (`str`): Name of the first adapter.
        parameter_name (`str`): Name of the stack.
        config (`LoraConfig`): The adapter's configuration.
        **kwargs: As for `ParamWrapper`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=_plain(config), **kwargs)
        self.stack_name = kwargs.get("target_name", parameter_name)
        self._prepare()
        self._extend(adapter_name, config)

    @classmethod
    def take_over(cls, layer: ParamWrapper, stack_name: str) -> None:
        """Makes a layer that PEFT made one of these; `stack_name` is the stack's name in the model."""
        layer.__class__ = cls
        layer.stack_name = stack_name
        layer._prepare()

    def _prepare(self) -> None:
        # By adapter: which outputs it may change, where it may not change all.
        self.output_masks: dict[str, torch.Tensor] = {}
        # Set by a container of experts that hands its groups some of the tokens: their places, and the number of all.
        self.token_rows: tuple[torch.Tensor | None, int] | None = None
        self._memory = StepMemory()
        # Where other processes have parts of the stack, what this one has.
        self._share = share_of(self.get_param(), self._did_swap_in_out_features)
        self._merged_rescale: dict[str, torch.Tensor] = {}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=_plain(config), **kwargs)
        if hasattr(self, "_memory"):  # not while PEFT's constructor runs
            self._extend(adapter_name, config)

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        # Weights that are offloaded are on the meta device, where adapters would be lost.
        with align_module_device(self.get_base_layer()):
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)

    def _extend(self, adapter_name: str, config: LoraConfig) -> None:
        """Adds to an adapter what PEFT's layer refuses."""
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        if config.use_dora:
            self.use_dora[adapter_name] = True
            with align_module_device(self.get_base_layer()):
                norm = torch.linalg.vector_norm(self._out_first(self.get_param()).detach().float(), dim=-1)
            norm = norm.full_tensor() if is_spread(norm) else norm
            magnitude = _Magnitude(norm.to(self.lora_A[adapter_name].weight.dtype))
            self.lora_magnitude_vector[adapter_name] = magnitude
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        settle = getattr(config, "settle", None)
        if settle is not None:
            settle(self, adapter_name)

    def _out_first(self, stack: torch.Tensor) -> torch.Tensor:
        """A stack like the parameter, as `(E, out, in)`."""
        return stack if self._did_swap_in_out_features else stack.transpose(1, 2)

    def keep_zero_outputs(self, adapter_name: str) -> None:
        """Lets a loaded adapter that left a half of the outputs alone, as one of the gate does, go on to."""
        weight = self.lora_B[adapter_name].weight
        if weight.is_meta or self.parameter_name != "gate_up_proj" or adapter_name in self.output_masks:
            return
        used = weight.detach().any(dim=1)
        for projection in ("gate", "up"):
            mask = self.output_mask(projection)
            if used.any() and not (used & ~mask.to(used.device)).any():
                self.output_masks[adapter_name] = mask

    def output_mask(self, projection: str) -> torch.Tensor:
        """Which outputs of the stack of gates and ups are those of `"gate"` or `"up"`: `(out,)` of type bool."""
        size = self.lora_B[next(iter(self.lora_B))].weight.shape[0]
        index = torch.arange(size)
        is_gate = index < size // 2 if self.get_base_layer().is_concatenated else index % 2 == 0
        return is_gate if projection == "gate" else ~is_gate

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        An adapter's factors, in their own dtype.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: A `(E, r, in)` and Bᵀ `(E, r, out)`, views of the weights.
        """
        lora_a, lora_b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        b = lora_b.view(lora_b.shape[0], -1, self.num_experts).permute(2, 1, 0)
        if adapter_name in self.output_masks:
            b = b * self.output_masks[adapter_name].to(b)
        return lora_a.view(self.num_experts, -1, lora_a.shape[-1]), b

    def update(self, adapter_name: str) -> LowRankUpdate:
        """The adapter's update of the stack, in its orientation, ready to be multiplied with."""
        dtype = self.get_base_layer()._parameters[self.parameter_name].dtype
        a, b = self.factors(adapter_name)
        if a.is_meta:
            raise ValueError(
                f"the adapter {adapter_name!r} of {self.stack_name!r} has no values: PEFT puts adapters of offloaded "
                "weights on the meta device. Call `page_experts` before `get_peft_model`, or load a trained adapter by "
                "`load_expert_lora`."
            )
        if self._share is not None and not self._share.is_whole:
            check_is_alike(self.lora_A[adapter_name].weight, self.stack_name, adapter_name)
            a, b = self._share.of(a, b)
        if dtype.is_floating_point and dtype.itemsize > 1:
            a, b = a.to(dtype), b.to(dtype)
        b, scaling = b.contiguous(), self.scaling[adapter_name]
        if not torch.is_grad_enabled():
            b, scaling = b * scaling, 1.0  # once, instead of at every product
        padding = -a.shape[1] % (ROW_BYTES // a.element_size())
        if padding:
            a, b = (F.pad(factor, (0, 0, 0, padding)) for factor in (a, b))
        dropout = self.lora_dropout[adapter_name]
        update = LowRankUpdate(a, b, scaling, dropout if isinstance(dropout, nn.Dropout) else None)
        return update.transpose() if self._did_swap_in_out_features else update

    def rescale(self, adapter_name: str, base: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        """
        DoRA's factor of each output, m / ‖W + scaling·B·A‖, the norm a constant in backward (arXiv 2402.09353, section
        4.3). The norm comes from the products W·Aᵀ and A·Aᵀ.

        Args:
            adapter_name (`str`): The adapter.
            base (`torch.Tensor`): W, the stack as its parameter has it.
            experts (`torch.Tensor`, *optional*): Which experts the stack has, where not all.

        Returns:
            `torch.Tensor` of shape `(E, out)`.
        """
        if self._share is not None:
            experts = self._share.experts
        magnitude = self.lora_magnitude_vector[adapter_name].weight
        weights = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

        def norms() -> torch.Tensor:
            a, b = (factor.detach().float() for factor in self.factors(adapter_name))
            a, b = (a, b) if experts is None else (a[experts], b[experts])
            weight, b, scaling = self._out_first(base.detach()).float(), b.transpose(1, 2), self.scaling[adapter_name]
            cross = ((weight @ a.transpose(1, 2)) * b).sum(-1)
            own = ((b @ (a @ a.transpose(1, 2))) * b).sum(-1)
            return (weight.square().sum(-1) + 2 * scaling * cross + scaling**2 * own).clamp(min=0).sqrt()

        settings = self.scaling.values()
        norm = norms() if experts is not None else self._memory.get(adapter_name, (*weights, base), settings, norms)
        magnitude = magnitude if experts is None else magnitude[experts]
        return (magnitude / norm.to(magnitude.dtype)).to(base.dtype)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What merging adds to the stack, in its orientation."""
        delta = super().get_delta_weight(adapter_name, *args, **kwargs)
        if not self.use_dora.get(adapter_name):
            return delta
        param = self.get_param().detach()
        return self._as_columns(self.rescale(adapter_name, param)) * (param + delta) - param

    def _as_columns(self, rescale: torch.Tensor) -> torch.Tensor:
        return rescale[:, :, None] if self._did_swap_in_out_features else rescale[:, None, :]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        if self.get_param().is_meta or getattr(self._paging, "is_read_only", False):
            raise ValueError(
                f"{self.stack_name!r} is offloaded, so that nothing can be merged into it: load the model without "
                "offloading, and its adapter again, to merge."
            )
        if is_spread(self.get_param()):
            raise ValueError(
                f"several processes share {self.stack_name!r}, so that nothing can be merged into it: save the "
                "adapter, and merge it in one process."
            )
        self._check_dora(names)
        for name in names:
            if self.use_dora.get(name):
                self._merged_rescale[name] = self.rescale(name, self.get_param().detach())
        super().merge(safe_merge, adapter_names)
        self._tell_paging()

    def unmerge(self) -> None:
        for name in list(self.merged_adapters):
            if name in self._merged_rescale:
                param = self.get_param()
                self.merged_adapters.remove(name)
                param.data /= self._as_columns(self._merged_rescale.pop(name))
                param.data -= ParamWrapper.get_delta_weight(self, name)
        if self.merged:
            super().unmerge()
        self._tell_paging()

    @property
    def _paging(self) -> Any:
        """The hook by which experts are paged, or another one, or none."""
        return getattr(self.get_base_layer(), "_hf_hook", None)

    def _tell_paging(self) -> None:
        """Slots have the weights of before."""
        if hasattr(self._paging, "read_anew"):
            self._paging.read_anew(self.get_base_layer())

    def _check_dora(self, adapter_names: Sequence[str]) -> None:
        if not any(self.use_dora.get(name) for name in adapter_names):
            return
        if self._share is not None and self._share.cuts_matrices:
            raise ValueError(
                f"`tp_size` cuts the matrices of {self.stack_name!r}, and DoRA needs the norms of whole ones: pass "
                "`ep_size` as well, or train without `use_dora`."
            )
        if len(adapter_names) > 1:
            raise ValueError(
                f"{list(adapter_names)} are active at once, but DoRA rescales the weights that the others add to: "
                "activate an adapter with `use_dora` alone."
            )

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        if self.disable_adapters or (self.merged and adapter_names is None):
            return super().forward(x, *args, **kwargs)
        if adapter_names is not None:
            if self.merged:
                raise ValueError("`adapter_names` needs adapters that are not merged: call `unmerge_adapter` first.")
            if self._share is not None:
                raise ValueError(
                    f"several processes share {self.stack_name!r}, so that rows of a batch cannot have an adapter "
                    "each: leave out `adapter_names`, and switch by `set_adapter`, or run the model in one process."
                )
            return self._forward_by_row(x, args, adapter_names)
        return self._run(self.active_adapters, x, *args, **kwargs)

    def _run(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The experts with these adapters, at once for all layers around them."""
        layers: list[FactoredExpertsLayer] = []
        experts: Any = self
        while isinstance(experts, FactoredExpertsLayer):
            layers.append(experts)
            experts = experts._modules["base_layer"]
        # Found before the parameters, which stay where they are for hooks that bring the weights in.
        found_first, num_tokens = experts.__dict__, args[0].shape[0]
        try:
            for layer in layers:
                layer._memory.begin(num_tokens, layer.num_experts)
                has = layer._modules["lora_A"]._modules
                names = [name for name in adapter_names if name in has]
                if names:
                    found_first[layer.parameter_name] = layer._stack(experts, names)
            return experts(*args, **kwargs)
        finally:
            for layer in layers:
                layer._memory.end()
                found_first.pop(layer.parameter_name, None)

    def _stack(self, experts: Any, adapter_names: list[str]) -> _AdaptedStack:
        """What stands in for the stack; DoRA's also depends on weights that may have changed."""
        if any(self.use_dora.get(name) for name in adapter_names):
            return _AdaptedStack(self, experts, adapter_names)
        # Past `nn.Module.__getattr__`, which a step of generation would notice.
        factors = [self._modules[factor]._modules for factor in ("lora_A", "lora_B")]
        weights = [factor[name]._parameters["weight"] for name in adapter_names for factor in factors]
        settings = (*adapter_names, *self.scaling.values(), experts._parameters[self.parameter_name].dtype)
        return self._memory.get("stack", weights, settings, lambda: _AdaptedStack(self, experts, adapter_names))

    def _forward_by_row(self, x: torch.Tensor, args: Sequence[torch.Tensor], adapter_names: list[str]) -> torch.Tensor:
        """Each row of the batch with its adapter: the experts run once per adapter, on the tokens of its rows."""
        places, num_tokens = self.token_rows or (None, x.shape[0])
        if num_tokens % len(adapter_names):
            raise ValueError(
                f"`adapter_names` names {len(adapter_names)} rows, but the experts got {num_tokens} tokens, "
                "which is no multiple: give a name for each row of the batch."
            )
        rows = (torch.arange(num_tokens, device=x.device) if places is None else places) // (
            num_tokens // len(adapter_names)
        )
        output = torch.zeros_like(x)
        for name in dict.fromkeys(adapter_names):
            is_its = torch.tensor([other == name for other in adapter_names], device=x.device)
            tokens = is_its[rows].nonzero().squeeze(1)
            output[tokens] = self._run([name], x[tokens], *(arg[tokens] for arg in args)).to(output.dtype)
        return output


# PEFT knows its own layers, within which the next one of a module goes, by the name of their class.
FactoredExpertsLayer.__name__ = ParamWrapper.__name__


def run_factored(config: LoraConfig, experts: Iterable[nn.Module]) -> None:
    """Lets PEFT adapt experts modules of these classes with [`FactoredExpertsLayer`] instead of its own layer."""
    config._register_custom_module({type(module): FactoredExpertsLayer for module in experts})


class _Magnitude(nn.Module):
    """DoRA's magnitudes, where PEFT looks for them."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class _AdaptedStack(FactoredWeight):
    """The stack of a layer's experts with adapters, looked up when it is used: hooks bring weights in just before."""

    def __init__(self, layer: FactoredExpertsLayer, experts: Any, adapters: Sequence[str]):
        self._layer = layer
        self._rescale: torch.Tensor | None = None
        self._experts = experts
        self._adapters = adapters
        self._updates = [layer.update(name) for name in adapters]
        layer._check_dora(adapters)

    @property
    def base(self) -> torch.Tensor:  # type: ignore[override]
        return self._experts._parameters[self._layer.parameter_name]

    @property
    def _held(self) -> torch.Tensor | None:
        """Which experts the stack holds at the moment, where paging brought in some."""
        return self._experts.__dict__.get("_slot_experts")

    @property
    def updates(self) -> Sequence[LowRankUpdate]:  # type: ignore[override]
        held = self._held
        return self._updates if held is None else [update[held] for update in self._updates]

    @property
    def rescale(self) -> torch.Tensor | None:  # type: ignore[override]
        name, held = self._adapters[0], self._held
        if not self._layer.use_dora.get(name):
            return None
        if held is not None:
            return self._layer.rescale(name, self.base, held)
        if self._rescale is None:  # once, where experts are taken one by one
            self._rescale = self._layer.rescale(name, self.base)
        return self._rescale

    @property
    def requires_grad(self) -> bool:
        return self.base.requires_grad

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The parameter elsewhere: so Accelerate sends it away again."""
        return self.base.to(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return self._element(*index)
        held, rescale = self._held, self.rescale
        if held is None and _is_one(index):
            index = int(index)
            updates = [update.matrix(index) for update in self._updates]
        else:
            of = index if held is None else held[index]
            updates = [update[of] for update in self._updates]
        return FactoredWeight(self.base[index], updates, None if rescale is None else rescale[index])

    def _element(self, expert: int, *place: int) -> torch.Tensor:
        """A number within the weights, which keeps the adapters of experts without tokens in the graph."""
        matrix = self[expert]
        weight = matrix.base + sum(update.product() for update in matrix.updates)
        if matrix.rescale is not None:
            weight = self._layer._out_first(weight[None]) * matrix.rescale[None, :, None]
            weight = self._layer._out_first(weight)[0]
        return weight[place]


def _is_one(index: int | torch.Tensor) -> bool:
    """Whether an index is that of one expert, known here."""
    return not isinstance(index, torch.Tensor) or (index.dim() == 0 and not torch.compiler.is_compiling())


def _plain(config: LoraConfig) -> LoraConfig:
    """What PEFT's own layer takes of a configuration."""
    config = copy.copy(config)
    config.lora_dropout, config.use_dora = 0.0, False
    return config
