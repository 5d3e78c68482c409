"""
Runs an experts module with weights other than its own: with adapters, or with only some of its experts.

A caller requests other weights for one call. The request applies to the calling thread only: the module itself does not
change, so other threads and other calls see its own weights. The request is read when the forward reads the weights.
By then, hooks have loaded them (those of Accelerate, FSDP2 and paging), whatever wraps the forward.

```python
prepare(experts)  # once
run_with_adapters(experts, {"down_proj": adapt}, ...)  # adapters: `adapt(stack, held)` replaces the stack
with use_stacks(experts, {"down_proj": slots}, held):  # paging: other stacks, and the expert in each row
    ...
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from functools import cache
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

# Returns the replacement of a stack. The arguments are the stack and the number of the expert in each of its rows
# (`None` if the stack has all experts in order).
Adapt = Callable[[torch.Tensor, torch.Tensor | None], Any]

# Attribute that stores a request while `torch.compile`, which does not support context variables, traces a call. Traced
# code has no side effects, so this does not change the module either.
TRACED = "_adapters_while_traced"
OWNER = "_owner_of_stacks"


class _Request:
    """The weights that a thread has requested for one module."""

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
        if made is None or made[0] is not stack:  # a hook may have loaded another stack meanwhile
            made = self._made[name] = stack, adapt(stack, self.held)
        return made[1]


_NOTHING = _Request({}, {}, None)
# The active requests of all threads. Experts compiled by themselves are compiled again while there are any.
_IN_USE: dict[_Request, None] = {}
_requests: ContextVar[Mapping[nn.Module, _Request]] = ContextVar("requests", default=MappingProxyType({}))


def run_with_adapters(experts: nn.Module, adapters: Mapping[str, Adapt], *args: Any, **kwargs: Any) -> torch.Tensor:
    """
    Calls an experts module with adapted stacks.

    Args:
        experts (`nn.Module`): Module on which [`prepare`] was called.
        adapters (`Mapping[str, Callable]`):
            Functions that return the replacement of a stack, by name of the stack. Each is called with the stack
            `(E, ...)` and the numbers of the experts in its rows, `(E,)`, or `None` if the stack has all experts.
        *args: Positional arguments of the module's forward.
        **kwargs: Keyword arguments of the module's forward.

    Returns:
        `torch.Tensor`: Output of the module.

    Raises:
        RuntimeError: If something has replaced the class that [`prepare`] gave the module.
    """
    _check_prepared(experts)
    if torch.compiler.is_compiling():
        experts.__dict__[TRACED] = adapters
        try:
            return experts(*args, **kwargs)
        finally:
            del experts.__dict__[TRACED]
    return _run_with_adapters(experts, adapters, args, kwargs)


@torch.compiler.disable  # otherwise, parts of the experts might be compiled, which would not see the request
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
    A context in which an experts module runs with other stacks, which contain some of its experts.

    Args:
        experts (`nn.Module`): Module on which [`prepare`] was called.
        stacks (`Mapping[str, torch.Tensor]`): Replacements `(rows, ...)` of parameters, by name of the parameter.
        held (`torch.Tensor` of shape `(rows,)`): Number of the expert in each row.
    """

    def __init__(self, experts: nn.Module, stacks: Mapping[str, torch.Tensor], held: torch.Tensor):
        _check_prepared(experts)
        self._experts, self._stacks, self._held = experts, stacks, held
        self._token: Token | None = None

    def __enter__(self) -> None:
        outer = _requests.get()
        # An outer call may have requested adapters. A traced caller has stored them in the module.
        adapters = outer.get(self._experts, _NOTHING).adapters or self._experts.__dict__.get(TRACED, {})
        self._request = _Request(adapters, self._stacks, self._held)
        self._token = _requests.set({**outer, self._experts: self._request})
        _IN_USE[self._request] = None

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        del _IN_USE[self._request]
        _requests.reset(self._token)


class StackOwner(Protocol):
    """An object that keeps copies of a module's stacks and must be notified of changes."""

    is_read_only: bool  # whether the stacks cannot be changed because they are read from files

    def read_again(self, experts: nn.Module) -> None:
        """Called after the stacks were changed in place."""


def set_owner(experts: nn.Module, owner: StackOwner | None) -> None:
    """Sets the object that keeps copies of a module's stacks; `None` removes it."""
    experts.__dict__.pop(OWNER, None)
    if owner is not None:
        experts.__dict__[OWNER] = owner


def is_read_only(experts: nn.Module) -> bool:
    """Whether the stacks of a module cannot be changed."""
    owner = experts.__dict__.get(OWNER)
    return owner is not None and owner.is_read_only


def stacks_have_changed(experts: nn.Module) -> None:
    """Notifies the owner of a module's stacks, if any, that they were changed in place."""
    owner = experts.__dict__.get(OWNER)
    if owner is not None:
        owner.read_again(experts)


def prepare(experts: nn.Module) -> None:
    """
    Enables requests for other stacks of a module. The module's class is replaced by a subclass of the same name, which
    looks for requests when a stack or the number of experts is read.
    """
    if not isinstance(experts, _Prepared):
        base: Any = type(experts)
        experts.__class__ = _prepared_class(base, tuple(experts._parameters))


def class_of(experts: nn.Module) -> type[nn.Module]:
    """Returns the class that a module had before [`prepare`] replaced it."""
    ancestors = type(experts).__mro__
    return ancestors[ancestors.index(_Prepared) + 1] if _Prepared in ancestors else type(experts)


class _Prepared:
    """A marker that precedes the original class among the bases of the classes that [`prepare`] creates."""


@cache
def _prepared_class(base: Any, names: tuple[str, ...]) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        """Copies and pickles are rebuilt from the original class, which can be imported."""
        if type(self) is not prepared:  # something else, such as FSDP2, has subclassed it
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
    """Returns the module's own value. Replicas of `DataParallel` have stacks as plain attributes."""
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
