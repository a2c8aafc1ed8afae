"""Memory that is watched for writes: each way to write shows, and nothing else does."""

import ctypes
import gc
import mmap
import os
import threading

import pytest
import torch

from initperf.layers.inference import write_watch
from initperf.layers.inference.write_watch import WriteWatch, watch, why_not

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


def test_one_that_lost_its_memory_never_comes_back():
    """Though another watches at the same place; and its end does not end the other's."""
    memory = block()
    lost = watched(memory)
    write_watch._unregister(lost._kernel, lost._first, lost._last)  # as where memory is mapped anew
    own = watch(memory.data_ptr(), SIZE)
    assert own is not None
    assert own is not lost
    assert own.generation() >= 0
    assert lost.generation() == -1
    del lost
    gc.collect()
    before = own.generation()
    assert before >= 0
    memory[PAGE + 1] = 1
    assert own.generation() > before


@pytest.mark.parametrize("shift", [0, PAGE])
def test_lost_memory_may_be_watched_by_others(shift):
    memory = block()
    lost = watched(memory)
    write_watch._unregister(lost._kernel, lost._first, lost._last)
    assert watch(memory.data_ptr() + shift, SIZE - shift) is not None
    assert lost.generation() == -1


def test_other_watches_are_asked_without_reading_their_memory():
    """Which may be gone: only the kernel is asked."""
    made = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(made)
    address = ctypes.addressof(view) + 64
    gone = watch(address, SIZE - 128)
    assert gone is not None
    del view
    made.close()
    memory = block()
    assert watch(memory.data_ptr(), SIZE) is not None
    watch(address - 64, SIZE)  # overlaps; what it says depends on what is mapped there now
    assert gone.is_there() in (True, False)


def test_the_ends_alone():
    """A write to a page that is watched in part, with nothing in between."""
    memory = block(before=100, size=PAGE + 200)
    made = watched(memory)
    first = made.generation()
    memory.numpy()[PAGE + 150] = 1
    assert made.generation() > first


def test_one_that_begins_before_another():
    memory = block()
    part = watch(memory.data_ptr() + PAGE, 9 * PAGE)
    assert part is not None
    assert watch(memory.data_ptr(), SIZE) is None


def test_a_range_that_is_shared_in_part():
    whole = mmap.mmap(-1, 2 * SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    at = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    libc, fixed = ctypes.CDLL(None), 0x10
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | fixed
    both = mmap.PROT_READ | mmap.PROT_WRITE
    second = libc.mmap(ctypes.c_void_p(at + SIZE), ctypes.c_size_t(SIZE), both, flags, -1, ctypes.c_long(0))
    assert second == at + SIZE
    for first, size in ((at + SIZE // 2, SIZE), (at, SIZE + PAGE), (at + SIZE, SIZE)):
        assert watch(first, size) is None
    assert watch(at, SIZE) is not None


def test_memory_that_nobody_touched_yet():
    made = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(made))
    found = watch(address, SIZE)
    assert found is not None
    first = found.generation()
    assert found.generation() == first
    assert made[5 * PAGE] == 0
    assert found.generation() == first
    made[5 * PAGE] = 1
    assert found.generation() > first


def test_a_write_is_counted_before_its_page_is_protected_again(monkeypatch):
    memory = block()
    made = watched(memory)
    first, seen, protect = made.generation(), [], made._protect

    def noted():
        assert made._lock.locked()
        seen.append(made._generation)
        protect()

    monkeypatch.setattr(made, "_protect", noted)
    memory[5000] = 1
    assert made.generation() == first + 1
    assert seen == [first + 1]


def test_ends_are_read_before_pages_are_protected(monkeypatch):
    memory = block(64)
    made = watched(memory)
    ask = made._ask

    def late(*question):
        memory[0] += 1
        return ask(*question)

    monkeypatch.setattr(made, "_ask", late)
    memory[5000] = 1
    second = made.generation()
    monkeypatch.setattr(made, "_ask", ask)
    assert made.generation() > second


def test_two_threads_count_one_write_once(monkeypatch):
    memory = block()
    made = watched(memory)
    first, real, gate, met, seen = made.generation(), made._is_written, threading.Barrier(2), set(), []
    memory[5000] = 1

    def both():
        found = real()
        if (me := threading.get_ident()) not in met:
            met.add(me)
            gate.wait(10)
        return found

    monkeypatch.setattr(made, "_is_written", both)
    threads = [threading.Thread(target=lambda: seen.append(made.generation())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [first + 1] * 2


def test_a_child_that_closes_leaves_its_parents_watch():
    memory = block()
    made = watched(memory)
    first = made.generation()
    pid = os.fork()
    if not pid:
        try:
            write_watch._unregister(made._kernel, made._first, made._last)
            made.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert made.generation() == first
    memory[5000] = 1
    assert made.generation() == first + 1


def test_a_child_may_watch_what_overlaps_its_parents():
    memory = block()
    made = watched(memory)
    with write_watch._lock:  # as if another thread of the parent held it
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = int(watch(memory.data_ptr() + PAGE, SIZE - PAGE) is None)
            finally:
                os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert made.generation() >= 0


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


def test_another_setting_than_0_or_1_is_refused(monkeypatch):
    write_watch._kernel.cache_clear()
    monkeypatch.setenv("INITPERF_WATCH", "no")
    try:
        with pytest.raises(ValueError, match="INITPERF_WATCH to be 0 or 1"):
            write_watch._kernel()
    finally:
        monkeypatch.undo()
        write_watch._kernel.cache_clear()
