"""Makes modules that have moved importable under their former names."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FORMER_NAMES = {
    "adapter_upgrade": "expert_lora.peft_0_18",
    "attention_interception": "modality_weights.interception",
    "baseline": "evaluation.baseline",
    "collator": "data.collator",
    "emoji": "demo.emoji",
    "expert_banks": "expert_modules",
    "expert_selection": "expert_lora.selection",
    "expert_slots": "paging.slots",
    "expert_sources": "paging.sources",
    "explanation": "modality_weights.explanation",
    "factored_layer": "expert_lora.adapted_layer",
    "factored_weight": "expert_lora.factored_weight",
    "first_process": "training.processes",
    "isolation": "training.isolation",
    "lora_recipes": "expert_lora.recipes",
    "model_card": "hub.model_card",
    "model_structure": "expert_modules",
    "parallel_lora": "expert_lora.processes",
    "placement_load": "placement.load",
    "placement_packing": "placement.packing",
    "recipes": "training.recipes",
    "report": "demo.drawings",
    "router_bias": "routing.router_bias",
    "routing_counts": "routing.counts",
    "routing_monitor": "routing.monitor",
    "routing_statistics": "routing.statistics",
    "scenes": "demo.scenes",
    "sharded_lora": "expert_lora.shards",
    "step_memory": "expert_lora.decode_cache",
    "token_rows": "expert_lora.batch_rows",
    "tokenizer": "demo.tokenizer",
}


class _FormerNames(MetaPathFinder, Loader):
    """Finds a module by its former name. The result is the same module object, not a copy."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        package, _, last = name.rpartition(".")
        return ModuleSpec(name, self) if package == __package__ and last in FORMER_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__package__}.{FORMER_NAMES[spec.name.rpartition('.')[2]]}")
        spec.loader_state = module.__spec__  # the import system replaces it next
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_FormerNames())
