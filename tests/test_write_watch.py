"""Memory that is watched for writes: each way to write shows, and nothing else does."""

import ctypes
import mmap
import os
import threading

import pytest
import torch

from initperf import write_watch
from initperf.write_watch import WriteWatch, watch, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"nothing can be watched here: {why_not()}")
PAGE = mmap.PAGESIZE
SIZE = 40 * PAGE


def block(before: int = 0, size: int = SIZE) -> torch.Tensor:
    """`size` bytes that begin `before` bytes before a page, within memory that is larger."""
    whole = torch.zeros(size + 4 * PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE + PAGE - before
    return whole[start : start + size]


def watched(memory: torch.Tensor) -> WriteWatch:
    made = watch(memory.data_ptr(), memory.numel())
    assert made is not None
    made.generation()
    return made


def by_counted_op(memory, at):
    memory[at] = 1


def by_data(memory, at):
    memory.data[at] = 1


def by_numpy(memory, at):
    memory.numpy()[at] = 1


def by_address(memory, at):
    ctypes.memset(memory.data_ptr() + at, 1, 1)


def by_the_system(memory, at):
    with open("/dev/urandom", "rb", buffering=0) as random:
        random.readinto(memory.numpy()[at : at + 1].data)
    memory.data[at] |= 1  # a random byte may be the 0 that was there, at the ends, where contents are compared


def by_another_thread(memory, at):
    thread = threading.Thread(target=by_numpy, args=(memory, at))
    thread.start()
    thread.join()


WRITES = [by_counted_op, by_data, by_numpy, by_address, by_the_system, by_another_thread]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("before", [0, 64, PAGE - 1])
@pytest.mark.parametrize("at", [0, 100, PAGE, SIZE // 2, SIZE - PAGE, SIZE - 1])
def test_a_write_shows_once(write, before, at):
    memory = block(before)
    made = watched(memory)
    first = made.generation()
    assert made.generation() == first
    write(memory, at)
    second = made.generation()
    assert second > first
    assert made.generation() == second
    memory[at] = 7
    assert made.generation() > second


def test_reads_and_neighbours_do_not_show():
    whole = torch.zeros(SIZE + 4 * PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE + PAGE - 64
    memory = whole[start : start + SIZE + 128]
    made = watched(memory)
    first = made.generation()
    whole[start - 1] = 1
    whole[start + SIZE + 128] = 1
    assert int(memory.sum()) == 0
    assert made.generation() == first


def test_all_who_ask_share_one_watch():
    memory = block()
    one, two = watched(memory), watched(memory)
    assert one is two
    memory[5] = 1
    seen = one.generation()
    memory[6] = 1
    assert two.generation() > seen


def test_memory_that_overlaps_is_not_watched_twice():
    memory = block()
    made = watched(memory)
    assert watch(memory.data_ptr() + PAGE, SIZE - PAGE) is None
    del made
    assert watch(memory.data_ptr() + PAGE, SIZE - PAGE) is not None


def test_less_than_a_page():
    memory = block(size=PAGE - 8)
    assert watch(memory.data_ptr(), memory.numel()) is None


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_memory_that_others_may_write_is_not_watched(flags, tmp_path):
    if flags & mmap.MAP_ANONYMOUS:
        made = mmap.mmap(-1, SIZE, flags)
    else:
        path = tmp_path / "file"
        path.write_bytes(bytes(SIZE))
        with path.open("r+b") as file:
            made = mmap.mmap(file.fileno(), SIZE, flags)
    address = ctypes.addressof(ctypes.c_char.from_buffer(made))
    assert watch(address, SIZE) is None


def test_memory_that_is_given_back():
    made = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(made)
    found = watch(ctypes.addressof(view), SIZE)
    assert found is not None
    assert found.generation() >= 0
    address = ctypes.addressof(view)
    del view
    made.close()
    again = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    other = ctypes.c_char.from_buffer(again)
    if ctypes.addressof(other) == address:  # as the system likes
        assert found.generation() == -1
        assert watch(address, SIZE) is not found


def test_after_close_nothing_is_told():
    made = watched(block())
    made.close()
    assert made.generation() == -1


def test_a_forked_child_asks_anew():
    memory = block()
    made = watched(memory)
    first = made.generation()
    pid = os.fork()
    if not pid:  # the child: its writes are its own
        code = 1
        try:
            assert made.generation() == -1
            own = watch(memory.data_ptr(), SIZE)
            assert own is not None
            assert own is not made
            before = own.generation()
            memory[9] = 1
            assert own.generation() > before
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert made.generation() == first
    memory[9] = 2
    assert made.generation() > first


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("INITPERF_WATCH", "0")
    write_watch._kernel.cache_clear()
    try:
        assert "INITPERF_WATCH=0" in why_not()
        memory = block()
        assert watch(memory.data_ptr(), SIZE) is None
    finally:
        write_watch._kernel.cache_clear()
