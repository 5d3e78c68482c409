"""Paging of experts: a budget of them on the execution device, the others in host memory or on disk."""

from .hook import PagedExperts, PagingCounts, page_experts, unpage_experts

__all__ = [
    "PagedExperts",
    "PagingCounts",
    "page_experts",
    "unpage_experts",
]
