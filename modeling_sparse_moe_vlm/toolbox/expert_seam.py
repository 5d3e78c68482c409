"""
The one place where an experts module runs with other weights than its own: with adapters, or with some of its experts.

A caller asks for them around a call. What asks is the calling thread, and only there the module's attributes look
different: nothing of the module is changed, so other threads and other calls see it as it is. The request is read
when the forward takes the weights, after hooks have brought them in (Accelerate's, FSDP2's, those of paging), whatever
wraps the forward.

    prepare(experts)                                        # once
    run_with_adapters(experts, {"down_proj": adapt}, …)     # adapters: `adapt(stack, held)` is what stands in
    with use_stacks(experts, {"down_proj": slots}, held):   # paging: other stacks, and which expert each row is
        …
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from functools import cache
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

# Makes what stands in for a stack, from the stack, and from the expert that each of its rows is (`None` for all).
Adapt = Callable[[torch.Tensor, torch.Tensor | None], Any]

# Where a request lies while a call is traced by `torch.compile`, which knows no context variables. Traced code has no
# effects, so nothing is changed there, either.
TRACED = "_adapters_while_traced"
OWNER = "_owner_of_stacks"


class _Request:
    """What a thread has asked for, for one module."""

    __slots__ = ("_made", "adapters", "held", "stacks")

    def __init__(self, adapters: Mapping[str, Adapt], stacks: Mapping[str, torch.Tensor], held: torch.Tensor | None):
        self.adapters = adapters
        self.stacks = stacks
        self.held = held
        self._made: dict[str, tuple[torch.Tensor, Any]] = {}

    def stack(self, experts: Any, name: str) -> Any:
        stack = self.stacks.get(name)
        if stack is None:
            stack = _own(experts, name)
        adapt = self.adapters.get(name)
        if adapt is None:
            return stack
        made = self._made.get(name)
        if made is None or made[0] is not stack:  # a hook may have brought in another one meanwhile
            made = self._made[name] = stack, adapt(stack, self.held)
        return made[1]


_NOTHING = _Request({}, {}, None)
# The requests of all threads: experts that were compiled by themselves are compiled again where there are some.
_IN_USE: dict[_Request, None] = {}
_requests: ContextVar[Mapping[nn.Module, _Request]] = ContextVar("requests", default=MappingProxyType({}))


def run_with_adapters(experts: nn.Module, adapters: Mapping[str, Adapt], *args: Any, **kwargs: Any) -> torch.Tensor:
    """
    Calls an experts module with adapted stacks.

    Args:
        experts (`nn.Module`): The module, which was prepared.
        adapters (`Mapping[str, Callable]`):
            By name of a stack, what makes its stand-in from the stack `(E, ...)` and from the numbers of the experts
            that its rows are, `(E,)`, or `None` where they are all.
        *args, **kwargs: Those of its forward.
    """
    _check_prepared(experts)
    if torch.compiler.is_compiling():
        experts.__dict__[TRACED] = adapters
        try:
            return experts(*args, **kwargs)
        finally:
            del experts.__dict__[TRACED]
    return _run_with_adapters(experts, adapters, args, kwargs)


@torch.compiler.disable  # where the caller runs as it is, parts of the experts might be compiled, and see no request
def _run_with_adapters(experts: nn.Module, adapters: Mapping[str, Adapt], args: Any, kwargs: Any) -> torch.Tensor:
    outer = _requests.get()
    around = outer.get(experts, _NOTHING)
    request = _Request(adapters, around.stacks, around.held)
    token = _requests.set({**outer, experts: request})
    _IN_USE[request] = None
    try:
        return experts(*args, **kwargs)
    finally:
        del _IN_USE[request]
        _requests.reset(token)


class use_stacks:
    """
    Context in which an experts module has other stacks, of some of its experts.

    Args:
        experts (`nn.Module`): The module, which was prepared.
        stacks (`Mapping[str, torch.Tensor]`): By name of a parameter, what takes its place, `(rows, ...)`.
        held (`torch.Tensor` of shape `(rows,)`): The expert in each row.
    """

    def __init__(self, experts: nn.Module, stacks: Mapping[str, torch.Tensor], held: torch.Tensor):
        _check_prepared(experts)
        self._experts, self._stacks, self._held = experts, stacks, held
        self._token: Token | None = None

    def __enter__(self) -> None:
        outer = _requests.get()
        # Adapters were asked for further out; a traced caller has left them with the module.
        adapters = outer.get(self._experts, _NOTHING).adapters or self._experts.__dict__.get(TRACED, {})
        self._request = _Request(adapters, self._stacks, self._held)
        self._token = _requests.set({**outer, self._experts: self._request})
        _IN_USE[self._request] = None

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        del _IN_USE[self._request]
        _requests.reset(self._token)


class StackOwner(Protocol):
    """Who keeps copies of a module's stacks, and must hear of changes."""

    is_read_only: bool  # whether the stacks cannot be changed, as they are in files

    def read_again(self, experts: nn.Module) -> None:
        """The stacks were changed in place."""


def set_owner(experts: nn.Module, owner: StackOwner | None) -> None:
    """Tells who keeps copies of a module's stacks; nobody any more with `None`."""
    experts.__dict__.pop(OWNER, None)
    if owner is not None:
        experts.__dict__[OWNER] = owner


def is_read_only(experts: nn.Module) -> bool:
    """Whether the stacks of a module cannot be changed."""
    owner = experts.__dict__.get(OWNER)
    return owner is not None and owner.is_read_only


def stacks_have_changed(experts: nn.Module) -> None:
    """To be called after a module's stacks were changed in place."""
    owner = experts.__dict__.get(OWNER)
    if owner is not None:
        owner.read_again(experts)


def prepare(experts: nn.Module) -> None:
    """
    Lets a thread ask for other stacks of a module. Its class becomes a subclass of what it was, of the same name, that
    looks for requests when a stack or the number of experts is read.
    """
    if not isinstance(experts, _Prepared):
        base: Any = type(experts)
        experts.__class__ = _prepared_class(base, tuple(experts._parameters))


def class_of(experts: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was prepared, as other models have it."""
    ancestors = type(experts).__mro__
    return ancestors[ancestors.index(_Prepared) + 1] if _Prepared in ancestors else type(experts)


class _Prepared:
    """Marks the classes below, and stands before the class that they are made of."""


@cache
def _prepared_class(base: Any, names: tuple[str, ...]) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        """Copies and pickles are made again from the class that can be imported."""
        if type(self) is not prepared:  # something else, such as FSDP2, has made a subclass of it
            return super(prepared, self).__reduce_ex__(protocol)
        return _restore, (base, names), self.__dict__

    members: dict[str, Any] = {name: property(_reader(name), _writer(name)) for name in names}
    members |= {"num_experts": property(_read_num_experts, _writer("num_experts")), "__reduce_ex__": reduce}
    members |= {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    prepared: Any = type(base.__name__, (_Prepared, base), members)
    return prepared


def _restore(base: Any, names: tuple[str, ...]) -> nn.Module:
    prepared = _prepared_class(base, names)
    return prepared.__new__(prepared)


def _check_prepared(experts: nn.Module) -> None:
    if not isinstance(experts, _Prepared):
        raise RuntimeError(
            f"the class of the experts was changed to {type(experts).__name__}, which would run them without their "
            "adapters: call `factor_expert_lora(model)` again."
        )


def _reader(name: str) -> Callable[[Any], Any]:
    def read(experts: Any) -> Any:
        traced = experts.__dict__.get(TRACED)
        if torch.compiler.is_compiling():
            if traced is None and _IN_USE:
                return read_untraced(experts)
            stack = _own(experts, name)
            return stack if traced is None or name not in traced else traced[name](stack, None)
        request = _requests.get().get(experts)
        if request is None:
            if traced is None:
                return _own(experts, name)
            request = _Request(traced, {}, None)
        return request.stack(experts, name)

    read_untraced = torch.compiler.disable(read)
    return read


def _own(experts: Any, name: str) -> Any:
    """What the module has itself; replicas of `DataParallel` have stacks as plain attributes."""
    for place in (experts.__dict__["_parameters"], experts.__dict__):
        if name in place:
            return place[name]
    raise AttributeError(f"{type(experts).__name__!r} object has no attribute {name!r}")


def _read_num_experts(experts: Any) -> int:
    if torch.compiler.is_compiling():
        return _read_num_experts_untraced(experts) if _IN_USE else _own(experts, "num_experts")
    request = _requests.get().get(experts)
    return len(request.held) if request is not None and request.held is not None else _own(experts, "num_experts")


_read_num_experts_untraced = torch.compiler.disable(_read_num_experts)


def _writer(name: str) -> Callable[[Any, Any], None]:
    def write(experts: Any, value: Any) -> None:
        experts.__dict__[name] = value

    return write
