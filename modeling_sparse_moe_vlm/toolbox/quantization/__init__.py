"""Prepares models for quantisers, which only convert linear layers."""

from .unfusing import unfuse_experts

__all__ = ["unfuse_experts"]
