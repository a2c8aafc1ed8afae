"""Moments of many tensors in one parallel region: power sums of fixed chunks in float64, combined in a fixed order.

Each chunk becomes a record (records.py). Chunks, and so all results, are independent of the thread count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, int64, types, uintp

from ..core.jit import is_forked, jit, threads, with_address
from ..core.scalars import copy_bytes, pointer, prefetch
from ..core.shares import ALONE, ME, among, on_threads, part_of
from ..core.team import in_team, number, team
from .power_sums_ir import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LANES,
    MASKED,
    PLAIN,
    S1,
    S4,
    SCALE,
    SHIFT,
    SHIFTED,
    call_lane_sums,
    lane_sums,
)
from .records import (
    CARRIED,
    RECORD,
    SUMS,
    VALUES,
    clear,
    find_all,
    find_one,
    finish,
    fold,
    is_finite,
    place,
    recenter,
    store,
)

CHUNK = 131072  # values of a task that reads along memory; a task costs a fifth of a microsecond beside them
CHUNK_ROWS = 1024  # rows, at least, of a task that reads neighbouring columns
ACROSS_TASKS = 64  # such a task has more rows where these are left of one tensor
COLUMNS = 8 * LANES  # of such a task
ROWS_A_STEP = 64  # of such a task: they are copied first, since rows 2^n apart meet in few places of a cache
ROWS_AHEAD = 32  # are asked for this many rows before they are copied
STEP_NEAR = 8 * COLUMNS + 64  # bytes from one row of the copy to the next
AHEAD = 12288  # bytes to prefetch ahead; 2048 has 0.9 of its bandwidth, and 0.65 on one thread; 8192 to 65536 are alike
TASK_COST = 512  # what a task costs beside its values, in values
SERIAL_COST = 1 << 17  # in values; below this a parallel call costs more than it saves
SHARED_CHANNELS = 256  # more than these are combined in parallel
BLOCK = 64  # vectors of float64 that are summed before they are added to the rest
PROBE = 16  # vectors that tell where the values lie
PROBED = 1 << 16  # bytes of a chunk that are probed first; what is shorter is in the cache if it has to be read again
ATTEMPTS = (
    7  # the worst needs 5: as it comes, about its mean, without non-finite values, then scaled, then about its mean
)

Shape = tuple[int, int, int, int, int]  # A, C, I, step of A, step of C, in elements

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}
# A segment is the plan of one tensor, seen as (A, C, I): reduced, kept, reduced and contiguous. Steps are in bytes.
SEGMENT = 18
ADDRESS, KIND, SIZE, A, C, I, STEP_A, STEP_C, ACROSS = range(9)  # noqa: E741
PIECES, LENGTH, CUTS, CHUNKS, COST, FIRST_TASK, FIRST_COST, FIRST_RECORD, FIRST_CHANNEL = range(9, SEGMENT)
# What the threads of a team are given: integers, and addresses.
JOB = 11
MEMBER, TEAM, READ, ORDER, WORKERS, PLAN, TENSORS, RECORDS, CORRECTION, TABLE, COMBINES = range(JOB)


@jit(error_model="numpy")
def _plan(tensors):
    """Segments of `tensors` (rows: address, kind, size, A, C, I, step of A, step of C), and a last one with the totals."""
    plan = np.zeros((len(tensors) + 1, SEGMENT), np.int64)
    for t in range(len(tensors)):
        s, after = plan[t], plan[t + 1]
        for column in range(ACROSS):
            s[column] = tensors[t, column]
        s[STEP_A] *= s[SIZE]
        s[STEP_C] *= s[SIZE]
        s[ACROSS] = s[I] == 1 and s[STEP_C] == s[SIZE]
        if s[ACROSS]:
            blocks = -(-s[C] // COLUMNS)
            s[PIECES] = min(s[A], max(CHUNK_ROWS, -(-s[A] * blocks // ACROSS_TASKS)))
            s[CHUNKS] = -(-s[A] // max(s[PIECES], 1))
            tasks = s[CHUNKS] * blocks
            s[COST] = s[PIECES] * min(s[C], COLUMNS) + TASK_COST
        else:
            s[LENGTH] = min(s[I], CHUNK)
            s[CUTS] = -(-s[I] // max(s[LENGTH], 1))
            s[PIECES] = min(s[A], max(1, CHUNK // max(s[I], 1)))
            s[CHUNKS] = -(-s[A] // max(s[PIECES], 1)) * s[CUTS]
            tasks = s[CHUNKS] * s[C]
            s[COST] = s[PIECES] * s[LENGTH] + TASK_COST
        after[FIRST_TASK] = s[FIRST_TASK] + tasks
        after[FIRST_COST] = s[FIRST_COST] + tasks * s[COST]
        after[FIRST_RECORD] = s[FIRST_RECORD] + s[CHUNKS] * s[C]
        after[FIRST_CHANNEL] = s[FIRST_CHANNEL] + s[C]
    return plan


@jit(error_model="numpy")
def _call(read, kind, order, mode, address, runs, step_run, steps, stride, lanes, rest, ahead, sums):
    where, out = uintp(address), uintp(sums.ctypes.data)
    shape = uintp(runs), uintp(step_run), uintp(steps), uintp(stride), uintp(lanes), uintp(rest), uintp(ahead)
    call_lane_sums(uintp(read), (uintp(kind), uintp(order), uintp(mode), where, *shape, out))


@jit(error_model="numpy")
def _carry(sums):
    for i in range(S1 * LANES, (S4 + 1) * LANES):
        sums[i + (CARRIED - S1) * LANES] += sums[i]
        sums[i] = 0.0


@jit(error_model="numpy")
def _restore(sums):
    for i in range(S1 * LANES, (S4 + 1) * LANES):
        sums[i] += sums[i + (CARRIED - S1) * LANES]
        sums[i + (CARRIED - S1) * LANES] = 0.0


@jit(error_model="numpy")
def _read(s, read, order, mode, address, runs, length, sums):
    """Add `runs` runs of `length` values; float64 by blocks, so that a sum has tens of roundings and not thousands."""
    wide, steps, rest = LANES * s[SIZE], length // LANES, length % LANES
    order = int64(4) if mode == MASKED else order
    # what comes AHEAD bytes later is the same place of a later run
    ahead = int64(AHEAD) if runs == 1 else s[STEP_A] * -(-AHEAD // max(length * s[SIZE], 1))
    if s[KIND] != FLOAT64 or runs * (steps + 1) <= BLOCK:
        _call(read, s[KIND], order, mode, address, runs, s[STEP_A], steps, wide, LANES, rest, ahead, sums)
        return
    together = max(BLOCK // (steps + 1), 1)  # runs of a block
    for run in range(0, runs, together):
        here, start = address + run * s[STEP_A], int64(0)
        while start >= 0:
            count = min(int64(BLOCK), steps - start)
            last = start + count == steps
            _carry(sums)
            _call(read, s[KIND], order, mode, here + start * wide, min(together, runs - run), s[STEP_A], count, wide,
                  LANES, rest if last else int64(0), ahead, sums)  # fmt: skip
            start = int64(-1) if last else start + count
    _carry(sums)
    _restore(sums)


@jit(error_model="numpy")
def _along(s, read, order, task, sums, records):
    """The chunk `task`, of one channel."""
    channel, chunk = task // s[CHUNKS], task % s[CHUNKS]
    first, start = chunk // s[CUTS] * s[PIECES], chunk % s[CUTS] * s[LENGTH]
    length, runs = min(s[LENGTH], s[I] - start), min(s[PIECES], s[A] - first)
    address = s[ADDRESS] + first * s[STEP_A] + channel * s[STEP_C] + start * s[SIZE]
    tolerance = 1.0 if s[KIND] == FLOAT64 else 8.0  # |mean| in spreads; 8 costs 1e-12 of a fourth moment
    place(sums, 0.0, 1.0)
    mode = int64(PLAIN)
    if length * runs * s[SIZE] > PROBED:
        clear(sums)
        _read(s, read, int64(2), mode, address, int64(1), min(length, int64(PROBE * LANES)), sums)
        fold(sums)
        if not find_one(sums, int64(2), tolerance / 2):
            recenter(sums, int64(1), False)
            place(sums, sums[SHIFT * LANES], 1.0)
            mode = int64(SHIFTED)
    for attempt in range(ATTEMPTS):
        clear(sums)
        _read(s, read, order, mode, address, runs, length, sums)
        fold(sums)
        if find_one(sums, order, tolerance) or attempt + 1 == ATTEMPTS:
            break
        recenter(sums, int64(1), mode == MASKED)
        mode = int64(SHIFTED if mode == PLAIN and is_finite(sums) else MASKED)
        place(sums, sums[SHIFT * LANES], sums[SCALE * LANES])
    store(sums, int64(1), records, s[FIRST_RECORD] + chunk * s[C] + channel)


@jit(error_model="numpy")
def _down(s, read, order, mode, address, rows, step, columns, sums):
    """Add `rows` rows of at most LANES neighbouring columns."""
    order, mode = (order, mode) if columns == LANES else (int64(4), int64(MASKED))
    _call(read, s[KIND], order, mode, address, 1, 0, rows, step, columns, 0, 0, sums)


@jit(error_model="numpy")
def _across(s, read, order, task, sums, near, records):
    """The chunk `task`, of COLUMNS neighbouring channels; `sums` has a row for LANES of them."""
    tolerance = 1.0 if s[KIND] == FLOAT64 else 8.0
    blocks = -(-s[C] // COLUMNS)
    channel, chunk = task % blocks * COLUMNS, task // blocks
    first, wide = chunk * s[PIECES], LANES * s[SIZE]
    rows, columns = min(s[PIECES], s[A] - first), min(int64(COLUMNS), s[C] - channel)
    address = s[ADDRESS] + first * s[STEP_A] + channel * s[STEP_C]
    mode, groups = int64(PLAIN), -(-columns // LANES)
    for g in range(groups):
        place(sums[g], 0.0, 1.0)
        clear(sums[g])
    if rows > 4 * PROBE:
        for g in range(groups):
            lanes = min(int64(LANES), columns - g * LANES)
            _down(s, read, int64(2), mode, address + g * wide, int64(PROBE), s[STEP_A], lanes, sums[g])
            recenter(sums[g], lanes, False)
            clear(sums[g])
        mode = int64(SHIFTED)
    for row in range(0, rows, ROWS_A_STEP):
        here, some = address + row * s[STEP_A], min(int64(ROWS_A_STEP), rows - row)
        for r in range(some):
            copy_bytes(uintp(near + r * STEP_NEAR), uintp(here + r * s[STEP_A]), uintp(columns * s[SIZE]))
            for byte in range(0, columns * s[SIZE], 64):
                prefetch(uintp(here + (r + ROWS_AHEAD) * s[STEP_A] + byte))
        for g in range(groups):
            lanes = min(int64(LANES), columns - g * LANES)
            if s[KIND] == FLOAT64:
                _carry(sums[g])
            _down(s, read, order, mode, near + g * wide, some, int64(STEP_NEAR), lanes, sums[g])
    for g in range(groups):
        lanes = min(int64(LANES), columns - g * LANES)
        if s[KIND] == FLOAT64:
            _carry(sums[g])
            _restore(sums[g])
        for attempt in range(ATTEMPTS):
            if find_all(sums[g], lanes, order, tolerance) or attempt + 1 == ATTEMPTS:
                break
            recenter(sums[g], lanes, attempt > 0)
            clear(sums[g])
            _down(s, read, int64(4), int64(MASKED), address + g * wide, rows, s[STEP_A], lanes, sums[g])
        store(sums[g], lanes, records, s[FIRST_RECORD] + chunk * s[C] + channel + g * LANES)


@jit(error_model="numpy")
def _segment_of(plan, column, number):
    """The last segment whose `column` is at most `number`, empty ones passed over."""
    low, high = 0, len(plan) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if plan[middle, column] <= number:
            low = middle
        else:
            high = middle
    return low


@jit(error_model="numpy")
def _task_at(plan, cost):
    """The first task that begins at `cost` or later, where every task costs what its segment says."""
    s = plan[_segment_of(plan, int64(FIRST_COST), cost)]
    return s[FIRST_TASK] + -(-(cost - s[FIRST_COST]) // max(s[COST], 1))


@jit(error_model="numpy")
def _read_share(share, plan, read, order, records):
    if share[ME] < 0:
        on_threads(share)
        return
    worker, workers, _ = share
    total, sums = plan[-1, FIRST_COST], np.zeros((COLUMNS // LANES, SUMS))
    memory = np.empty((ROWS_A_STEP, STEP_NEAR), np.uint8)
    near = int64(memory.ctypes.data)
    end = plan[-1, FIRST_TASK] if worker + 1 == workers else _task_at(plan, total * (worker + 1) // workers)
    task = _task_at(plan, total * worker // workers)
    t = _segment_of(plan, int64(FIRST_TASK), task)
    while task < end:
        while task >= plan[t + 1, FIRST_TASK]:
            t += 1
        if plan[t, ACROSS]:
            _across(plan[t], read, order, task - plan[t, FIRST_TASK], sums, near, records)
        else:
            _along(plan[t], read, order, task - plan[t, FIRST_TASK], sums[0], records)
        task += 1


@jit(error_model="numpy")
def _combine_share(share, plan, order, correction, records, table):
    if share[ME] < 0:
        on_threads(share)
        return
    start, end = part_of(share, plan[-1, FIRST_CHANNEL])
    t = _segment_of(plan, int64(FIRST_CHANNEL), start)
    for channel in range(start, end):
        while channel >= plan[t + 1, FIRST_CHANNEL]:
            t += 1
        s = plan[t]
        first = s[FIRST_RECORD] + channel - s[FIRST_CHANNEL]
        finish(records, first, s[C], s[CHUNKS], s[A] * s[I], order, correction, table, channel)


@jit(error_model="numpy")
def _table(address, channels):
    """The result at an address, since an array argument takes longer to pass."""
    return carray(pointer(uintp(address), np.float64), (VALUES, channels))


@with_address(types.void(types.uintp))
def _share(data):
    """What one thread of a team does; `data` is the address of what `_together` lays out."""
    job = carray(pointer(data, np.int64), (JOB,))
    me, team = number(uintp(job[MEMBER])), number(uintp(job[TEAM]))
    plan = carray(pointer(uintp(job[PLAN]), np.int64), (job[TENSORS] + 1, SEGMENT))
    records = carray(pointer(uintp(job[RECORDS]), np.float64), (plan[-1, FIRST_RECORD], RECORD))
    correction = carray(pointer(uintp(job[CORRECTION]), np.float64), (1,))[0]
    workers, table = job[WORKERS], _table(job[TABLE], plan[-1, FIRST_CHANNEL])
    for worker in range(me, workers, team):  # fewer threads than asked for may have come
        share = (int64(worker), workers, int64(0))
        if job[COMBINES]:
            _combine_share(share, plan, job[ORDER], correction, records, table)
        else:
            _read_share(share, plan, job[READ], job[ORDER], records)


@jit(error_model="numpy")
def _moments(tensors, read, order, correction, share, workers, team, member, channels, table_at):
    """All of it: on the threads of the team, or where there is none on those of the share."""
    plan = _plan(tensors)
    records = np.empty((plan[-1, FIRST_RECORD], RECORD))
    table = _table(table_at, channels)
    alone = (int64(0), int64(1), int64(0))
    if workers > 1 and plan[-1, FIRST_COST] > SERIAL_COST and team[0]:
        job, corrections = np.zeros(JOB, np.int64), np.full(1, correction)
        job[MEMBER], job[TEAM], job[READ], job[ORDER], job[WORKERS] = team[1], team[2], read, order, workers
        job[PLAN], job[TENSORS], job[RECORDS] = plan.ctypes.data, len(tensors), records.ctypes.data
        job[CORRECTION], job[TABLE] = corrections.ctypes.data, table_at
        in_team(uintp(team[0]), uintp(member), uintp(job.ctypes.data), uintp(workers))
        if channels > SHARED_CHANNELS:
            job[COMBINES] = 1
            in_team(uintp(team[0]), uintp(member), uintp(job.ctypes.data), uintp(workers))
            return
    else:
        _read_share(share if plan[-1, FIRST_COST] > SERIAL_COST else alone, plan, read, order, records)
    _combine_share(share if channels > SHARED_CHANNELS else alone, plan, order, correction, records, table)


@jit(error_model="numpy")
def _moments_of_one(address, kind, size, a, c, i, step_a, step_c, *rest):
    tensors = np.empty((1, ACROSS), np.int64)
    for column, value in enumerate((address, kind, size, a, c, i, step_a, step_c)):
        tensors[0, column] = value
    _moments(tensors, *rest)


def moments(tensors: Sequence[torch.Tensor], shapes: Sequence[Shape], order: int, correction: float) -> torch.Tensor:
    """Moments of CPU tensors: see kernels/reference/moments/moments.py for the arguments and the result."""
    rows = [(x.data_ptr(), KINDS[x.dtype], x.element_size(), *shape) for x, shape in zip(tensors, shapes, strict=True)]
    channels = sum([shape[1] for shape in shapes])
    table = torch.empty((VALUES, channels), dtype=torch.float64)
    result = channels, table.data_ptr()
    read = lane_sums.address
    found, workers = team(), 1 if is_forked() else torch.get_num_threads()
    share = ALONE if found[0] else among(threads())
    common = read, order, correction, share, workers, found, _share.address, *result
    if len(rows) == 1:
        _moments_of_one(*rows[0], *common)
    else:
        _moments(np.array(rows, np.int64), *common)
    return table
