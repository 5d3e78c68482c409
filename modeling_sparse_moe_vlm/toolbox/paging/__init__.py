"""Pages experts: some are on the execution device, within a budget, and the others in host memory or on disk."""

from .hook import PagedExperts, PagingCounts, page_experts, unpage_experts

__all__ = [
    "PagedExperts",
    "PagingCounts",
    "page_experts",
    "unpage_experts",
]
