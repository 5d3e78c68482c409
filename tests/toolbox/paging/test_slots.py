"""Slots without a model: replacement, reads and counts, failures, and tensors saved by autograd."""

import os
import threading
from contextlib import nullcontext

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.paging.assignment import SlotAssignment
from modeling_sparse_moe_vlm.toolbox.paging.saved_stacks import save_experts_for_backward
from modeling_sparse_moe_vlm.toolbox.paging.slots import ExpertSlots, MappedSlots
from modeling_sparse_moe_vlm.toolbox.paging.sources import FileSource, MemorySource

pytestmark = pytest.mark.newest

NUM_EXPERTS = 6
CPU = torch.device("cpu")


class Slots:
    """Slots for two stacks of different widths, with their contents and counts."""

    def __init__(self, num_slots: int, dtype: torch.dtype = torch.float32, folder=None, kind=ExpertSlots):
        generator = torch.Generator().manual_seed(0)
        self.whole = {
            "up": torch.randn(NUM_EXPERTS, 4, 3, generator=generator, dtype=dtype),
            "down": torch.randn(NUM_EXPERTS, 3, 2, generator=generator, dtype=dtype),
        }
        self.counts: list[tuple[int, int, int]] = []
        sources = {}
        for name, stack in self.whole.items():
            sources[name] = MemorySource(stack)
            if folder is not None:
                path = folder / name
                path.write_bytes(b"header.." + stack.flatten().view(torch.uint8).numpy().tobytes())
                sources[name] = FileSource(str(path), 8, tuple(stack.shape), dtype)
        dtypes = dict.fromkeys(self.whole, torch.float32)
        self.slots = kind(sources, dtypes, num_slots, CPU, lambda *counts: self.counts.append(counts))

    def place(self, *experts: int) -> dict[int, int]:
        """Reads experts into slots, as one pass would."""
        (placement,) = self.slots.plan(experts, fixed=False)
        self.slots.start(placement)
        self.slots.wait()
        return placement

    def check(self) -> None:
        """Checks that every slot that counts as filled contains the matrices of its expert."""
        for slot, expert in enumerate(self.slots.assignment.experts):
            for name, stack in self.whole.items():
                if expert is not None:
                    assert torch.equal(self.slots.stacks[name][slot], stack[expert].float())


@pytest.fixture(params=["memory", "file", "file of bfloat16"])
def make(request, tmp_path):
    def make_slots(num_slots: int) -> Slots:
        dtype = torch.bfloat16 if "bfloat16" in request.param else torch.float32
        return Slots(num_slots, dtype, None if request.param == "memory" else tmp_path)

    return make_slots


def test_slots_contain_the_requested_experts(make):
    given = make(3)
    expert_bytes = (4 * 3 + 3 * 2) * given.whole["up"].element_size()
    assert given.place(1, 4) == {1: 0, 4: 1}
    given.check()
    assert given.place(1, 4) == {1: 0, 4: 1}
    assert given.place(2, 4) == {4: 1, 2: 2}
    assert given.place(0) == {0: 0}, "in the place of 1, which was used least recently"
    given.check()
    assert given.counts == [(0, 2, 2 * expert_bytes), (2, 0, 0), (1, 1, expert_bytes), (0, 1, expert_bytes)]
    assert given.slots.assignment.experts == [0, 4, 2]
    slot_of, expert_in = given.slots.tables()
    assert slot_of.tolist() == [0, 3, 2, 3, 1, 3, 3]
    assert expert_in.tolist() == [0, 4, 2]


def test_everything_is_read_again_after_clear(make):
    given = make(3)
    given.place(1, 4)
    given.slots.clear()
    assert given.slots.assignment.experts == [None] * 3
    assert given.slots.tables()[0].tolist() == [3] * 7
    assert given.slots.tables()[1].tolist() == [0] * 3
    for stack in given.slots.stacks.values():
        stack.fill_(9.0)  # experts in slots are not counted
    given.place(1, 4)
    given.check()
    assert given.counts[1][:2] == (0, 2)


def test_a_moved_expert_is_read_once_and_leaves_its_slot(make):
    given = make(3)
    given.place(1, 4)
    given.slots.start({1: 2})
    given.slots.wait()
    assert given.slots.assignment.experts == [None, 4, 1]
    assert given.slots.tables()[0].tolist() == [3, 2, 3, 3, 1, 3, 3]
    given.check()


@pytest.mark.parametrize("when", ["start", "wait"])
def test_a_failed_read_is_not_a_hit_later(when, monkeypatch):
    given = Slots(3)
    given.place(5)
    source = given.slots.sources["down"]

    def fail(expert, slot):
        raise OSError("gone")

    monkeypatch.setattr(source, "read", fail)
    monkeypatch.setattr(source, "blocks", when == "wait", raising=False)
    with pytest.raises(OSError, match="gone"):
        given.place(1, 4)
    assert given.slots.assignment.experts == [5, None, None]
    assert given.slots.tables()[0].tolist() == [3, 3, 3, 3, 3, 0, 3]
    monkeypatch.undo()
    given.place(1, 4)
    given.check()
    assert given.counts[-1][:2] == (0, 2)


def test_short_reads_resume_where_they_stopped(tmp_path, monkeypatch):
    """The system may return fewer bytes than requested."""
    given = Slots(3, folder=tmp_path)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][:5]], at))
    given.place(1, 4, 5)
    given.check()


def test_a_file_that_ends_early(tmp_path):
    given = Slots(3, folder=tmp_path)
    path = tmp_path / "down"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(OSError, match=rf"down is truncated: .* up to byte {len(whole)}, but it has {len(whole) - 1} b"):
        given.place(0)
    assert given.slots.assignment.experts == [None] * 3
    with pytest.raises(OSError, match="is truncated"):
        FileSource(str(path), 8, (NUM_EXPERTS, 3, 2), torch.float32)
    path.write_bytes(whole)
    FileSource(str(path), 8, (NUM_EXPERTS, 3, 2), torch.float32)


# ------------------------------------------------------------------------------------------------ plans


def plans(num_slots: int, held=(), *, asked, fixed: bool = False, overlaps: bool = False) -> list[dict[int, int]]:
    assignment = SlotAssignment(num_slots, NUM_EXPERTS)
    for slot, expert in enumerate(held):
        assignment.place(expert, slot)
    made = []
    for placement in assignment.plan(asked, fixed=fixed, overlaps=overlaps):
        for expert, slot in placement.items():
            if assignment.experts[slot] != expert:
                assignment.place(expert, slot)
        made.append(placement)
    return made


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_slots": 3, "asked": []}, [{}]),
        ({"num_slots": 3, "asked": [1, 2, 5]}, [{1: 0, 2: 1, 5: 2}]),
        ({"num_slots": 3, "held": [4, 2], "asked": [1, 2]}, [{2: 1, 1: 2}]),
        ({"num_slots": 2, "held": [4, 2], "asked": [1, 2]}, [{2: 1, 1: 0}]),
        ({"num_slots": 2, "held": [4, 2], "asked": [1, 2, 3]}, [{2: 1}, {1: 0}, {3: 1}]),
        ({"num_slots": 3, "held": [4, 2], "asked": [1, 2], "overlaps": True}, [{2: 1}, {1: 2}]),
        ({"num_slots": 3, "held": [1, 2], "asked": [1, 2], "overlaps": True}, [{1: 0, 2: 1}]),
        ({"num_slots": 4, "asked": [0, 1, 2, 3, 4, 5]}, [{0: 0, 1: 1}, {2: 2, 3: 3}, {4: 0, 5: 1}]),
        ({"num_slots": 4, "asked": [0, 3, 5], "fixed": True}, [{0: 0}, {3: 3}, {5: 1}]),
        ({"num_slots": 6, "asked": [0, 3, 5], "fixed": True}, [{0: 0, 3: 3, 5: 5}]),
        ({"num_slots": 1, "asked": [0, 3], "fixed": True}, [{0: 0}, {3: 0}]),
        ({"num_slots": 3, "asked": [], "fixed": True}, [{}]),
    ],
)
def test_plans(arguments, expected):
    assert plans(**arguments) == expected


def test_a_fixed_plan_does_not_depend_on_the_slots():
    asked = [0, 2, 3, 5]
    assert plans(3, asked=asked, fixed=True) == plans(3, held=[5, 0, 3], asked=asked, fixed=True)


def test_least_recently_used_is_least_recently_planned():
    assignment = SlotAssignment(3, NUM_EXPERTS)
    for slot, expert in enumerate((3, 4, 5)):
        assert assignment.place(expert, slot) == []
    assert list(assignment.plan([3], fixed=False, overlaps=False)) == [{3: 0}]
    assert list(assignment.plan([1], fixed=False, overlaps=False)) == [{1: 1}]
    assert assignment.place(1, 1) == [4]
    assert assignment.clear() == [5, 3, 1]
    assert (len(assignment), assignment.slot_of(3)) == (3, None)


# ------------------------------------------------------------------------------------------------ backward


class Watched(torch.autograd.Function):
    """The sum of a stack times a number. Its backward records the saved tensor, before and after another event."""

    meanwhile, seen = staticmethod(lambda: None), []

    @staticmethod
    def forward(ctx, number, stack):
        ctx.save_for_backward(stack)
        return number * stack.sum()

    @staticmethod
    def backward(ctx, gradient):
        (stack,) = ctx.saved_tensors
        Watched.seen.append(stack.clone())
        Watched.meanwhile()
        Watched.seen.append(stack.clone())
        return gradient * stack.sum(), None


@pytest.mark.parametrize("part", ["all", "one", "turned"])
@pytest.mark.parametrize("form", ["memory", "file", "mapped"])
def test_backward_gets_the_experts_of_the_forward(form, part, tmp_path):
    """Also if another thread fills the slots with other experts after backward has its tensors."""
    kind = MappedSlots if form == "mapped" else ExpertSlots
    given = Slots(2, folder=None if form == "memory" else tmp_path, kind=kind)
    placement = {1: 1, 4: 0}
    given.slots.start(placement)
    given.slots.wait()
    first, second = (1, 4) if form == "mapped" else (1, 0)  # the rows of experts 1 and 4
    number, lock = torch.ones((), requires_grad=True), threading.Lock()
    with save_experts_for_backward(given.slots, placement, lock):
        stack = given.slots.stacks["down"]
        taken = {"all": stack, "one": stack[first], "turned": stack.transpose(1, 2)}[part]
        expected = taken.clone()
        output = Watched.apply(number, taken)

    def meanwhile():
        thread = threading.Thread(target=lambda: [given.place(2, 3), given.place(0, 5)])
        thread.start()
        thread.join()

    given.place(2, 3)
    given.counts.clear()
    Watched.seen, Watched.meanwhile = [], staticmethod(meanwhile)
    output.backward()
    rows = [first] if part == "one" else [first, second]
    for seen in Watched.seen:
        if part == "one":
            assert torch.equal(seen, expected)
        else:
            assert torch.equal(seen[rows], expected[rows])
    assert len(Watched.seen) == 2
    assert given.counts[0][:2] == (0, len(rows))
    assert not lock.locked()


def test_backward_counts_and_copies_experts_still_in_slots():
    given = Slots(2)
    placement = given.place(1, 4)
    number = torch.ones((), requires_grad=True)
    with save_experts_for_backward(given.slots, placement, nullcontext()):
        output = Watched.apply(number, given.slots.stacks["up"])
        unrelated = (number * torch.ones(3)).sum()
    given.counts.clear()
    given.place(1, 2)  # 4 loses its slot
    Watched.seen, Watched.meanwhile = [], staticmethod(lambda: None)
    (output + unrelated).backward()
    assert torch.equal(Watched.seen[0], given.whole["up"][[1, 4]])
    assert given.counts[1:] == [(1, 1, 4 * 3 * 4)]
    assert given.slots.assignment.experts == [1, 2], "backward takes nobody's slot"
