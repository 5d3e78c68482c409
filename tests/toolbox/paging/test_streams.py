"""
The order of what a GPU does while experts are paged: a copy into a slot never overtakes a computation that still needs
what is overwritten, and a computation never overtakes the copy that it needs. The streams are stand-ins that note what
is launched on them and what waits for what, so the order is also checked on the CPU.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.paging import slots as slots_module
from modeling_sparse_moe_vlm.toolbox.paging.slots import ExpertSlots

NUM_EXPERTS, NUM_SLOTS = 6, 2
CPU = torch.device("cpu")


class Stream:
    """Numbers of what was launched, in order, and for each the latest number that it waits for on every stream."""

    def __init__(self):
        self.launched = 0
        self.known: dict[Stream, int] = {}  # what is done, by stream, before anything that is launched from now on

    def wait_stream(self, other):
        for stream, number in {**other.known, other: other.launched}.items():
            self.known[stream] = max(self.known.get(stream, 0), number)

    def launch(self) -> dict["Stream", int]:
        """Launches something, and returns what is surely done before it."""
        before = {**self.known, self: self.launched}
        self.launched += 1
        return before


class Device:
    """Streams of a GPU, the current one in each thread, and what was launched with the slots."""

    def __init__(self):
        self.default, self.of_thread = Stream(), threading.local()
        self.writes: dict[int, tuple[Stream, int]] = {}  # by slot, the last one
        self.uses: dict[int, list[tuple[Stream, int]]] = {slot: [] for slot in range(NUM_SLOTS)}
        self.recorded: list[Stream] = []

    def current(self, device=None) -> Stream:
        return getattr(self.of_thread, "stream", self.default)

    @contextmanager
    def stream(self, stream):
        outer = self.current()
        self.of_thread.stream = stream
        yield
        self.of_thread.stream = outer

    def write(self, slot: int) -> None:
        stream = self.current()
        before = stream.launch()
        for user, number in self.uses[slot]:
            assert before.get(user, 0) >= number, f"slot {slot} is overwritten while a computation may need it"
        self.uses[slot] = []
        self.writes[slot] = stream, stream.launched

    def use(self, *slots: int) -> None:
        stream = self.current()
        before = stream.launch()
        for slot in slots:
            writer, number = self.writes[slot]
            assert before.get(writer, 0) >= number, f"slot {slot} is used before it is filled"
            self.uses[slot].append((stream, stream.launched))


class Source:
    """Experts of one number each, whose copies are noted."""

    shape, dtype = (NUM_EXPERTS, 1), torch.float32

    def __init__(self, device: Device, blocks: bool):
        self.device, self.blocks = device, blocks
        self.before_read = lambda expert: None

    def read(self, expert: int, slot: torch.Tensor) -> None:
        self.before_read(expert)
        if slot.untyped_storage().data_ptr() == self.slots.stacks["up"].untyped_storage().data_ptr():
            self.device.write(slot.storage_offset())
        slot.fill_(expert)


@pytest.fixture(params=[False, True], ids=["memory", "file"])
def paging(request, monkeypatch):
    """Slots as on a GPU, and the device."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", device.current)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: device.recorded.append(stream))
    source = Source(device, blocks=request.param)
    source.slots = slots = ExpertSlots({"up": source}, {"up": torch.float32}, NUM_SLOTS, CPU, lambda *_: None)
    # As for a device of type cuda.
    slots._stream, slots.overlaps = Stream(), True
    return slots, device


def _bring(slots, *experts):
    for placement in slots.plan(experts, fixed=False):
        slots.start(placement)
        slots.wait()
    return placement


def test_zeros_are_written_before_any_expert(monkeypatch):
    """The slots are filled with zeros on the current stream, and their memory is not reused while copies write it."""
    device = Device()
    copies = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", device.current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: device.recorded.append(stream))
    cuda = type("Cuda", (), {"type": "cuda"})()
    monkeypatch.setattr(ExpertSlots, "_allocate", lambda *_: {"up": torch.zeros(1)})
    device.default.launch()
    slots = ExpertSlots({"up": Source(device, False)}, {}, NUM_SLOTS, cuda, lambda *_: None)
    assert slots.overlaps
    assert copies.launch()[device.default] == 1
    assert device.recorded == [copies]


def test_a_computation_sees_the_experts(paging):
    slots, device = paging
    placement = _bring(slots, 1, 4)
    with slots.computing():
        device.use(*placement.values())


def test_a_slot_is_overwritten_when_the_computation_is_done(paging):
    slots, device = paging
    for experts in ((1, 4), (2, 3), (1, 2)):
        placement = _bring(slots, *experts)
        with slots.computing():
            device.use(*placement.values())
        assert [slots.stacks["up"][slot].item() for slot in placement.values()] == list(placement)


def test_reads_do_not_wait_for_a_computation_that_runs_beside_them(paging):
    """Only for those before: otherwise nothing would overlap."""
    slots, device = paging
    _bring(slots, 1)
    slots.start({4: 1})
    with slots.computing():
        device.use(0)
    assert slots._stream.known[device.default] == 1, "the reads that come next do"
    slots.wait()
    device.use(1)


def test_calls_on_other_streams(paging):
    """Threads may launch on streams of their own."""
    slots, device = paging
    first, second = Stream(), Stream()
    for stream, experts in ((first, (1, 4)), (second, (1, 4)), (first, (2, 3)), (second, (1, 4))):
        with device.stream(stream):
            placement = _bring(slots, *experts)
            slots.tables()
            with slots.computing():
                device.use(*placement.values())
    assert {first, second} <= set(device.recorded)
    assert device.recorded.count(second) == 2 * 3, "one stack and two tables"


def test_after_an_error_in_a_computation(paging):
    slots, device = paging
    placement = _bring(slots, 1, 4)

    def fail():
        device.use(*placement.values())
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), slots.computing():
        fail()
    _bring(slots, 2, 3)


def test_backward_reads_slots_before_they_are_overwritten(paging, monkeypatch):
    slots, device = paging
    placement = _bring(slots, 1, 4)
    copy = torch.Tensor.copy_

    def copied(target, source, *args, **kwargs):
        if source.untyped_storage().data_ptr() == slots.stacks["up"].untyped_storage().data_ptr():
            device.use(source.storage_offset())
        return copy(target, source, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    rows = slots.rows("up", placement, 0, 1)
    assert rows.flatten().tolist() == [1, 4]
    assert sum(map(len, device.uses.values())) == 2
    _bring(slots, 2, 3)


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("fails_in", ["start", "wait"])
def test_no_read_goes_on_after_another_one_failed(fails_in, monkeypatch):
    """It would write into a slot that has been given to another expert by then."""
    device = Device()
    files, memory = Source(device, blocks=True), Source(device, blocks=fails_in == "wait")
    sources = {"up": files, "down": memory} if fails_in == "start" else {"down": memory, "up": files}
    slots = ExpertSlots(sources, dict.fromkeys(sources, torch.float32), 2, CPU, lambda *_: None)
    files.slots = memory.slots = slots
    may_read, reads = threading.Event(), []

    def wait_for_the_failure(expert):
        may_read.wait(10)
        reads.append(expert)

    def fail(expert):
        threading.Timer(0.1, may_read.set).start()
        raise OSError("gone")

    files.before_read, memory.before_read = wait_for_the_failure, fail
    monkeypatch.setattr(slots_module, "READERS", ThreadPoolExecutor(2))
    with pytest.raises(OSError, match="gone"):
        _bring(slots, 1)
    assert reads == [1], "the other read is done"
    assert slots.assignment.experts == [None, None]
    assert slots._reads == []
    files.before_read = memory.before_read = lambda expert: None
    _bring(slots, 2)
    assert slots.stacks["up"][0].item() == 2
