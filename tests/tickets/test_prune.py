"""Masks: exact counts, the right weights, ties by index, the three implementations of the selection."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forks import assert_same_in_a_forked_child, needs_fork
from initperf import ops, prune
from initperf.core.checks import InitPerfError
from initperf.kernels.reference.masks import select as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def values_of(dtype, sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.int32:
        return [torch.randint(-(2**31), 2**31 - 1, (n,), generator=g, dtype=torch.int32) for n in sizes]
    return [(torch.randn(n, generator=g) * 0.1).to(dtype) for n in sizes]


def alive_of(sizes, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=g) < 0.6 for n in sizes]


def ranks(survivors):
    return sorted({0, min(1, survivors), survivors // 5, survivors // 2, survivors})


def check_equal_to_reference(module, values, alive):
    survivors = sum(v.numel() for v in values) if alive is None else sum(int(a.sum()) for a in alive)
    for k in ranks(survivors):
        expected = reference.kth_smallest(values, alive, k)
        found = module.kth_smallest(values, alive, k)
        assert found.tolist() == expected.tolist(), f"k={k}"
        masks = module.cut(values, alive, found)
        for mask, right in zip(masks, reference.cut(values, alive, expected), strict=True):
            assert torch.equal(mask, right)
        assert sum(int(m.sum()) for m in masks) == survivors - k


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32], ids=str)
@pytest.mark.parametrize("sizes", [(0,), (1,), (1023, 0, 1025), (700, 150_001, 150_000)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_numba_selection_equals_the_reference(dtype, sizes, masked, monkeypatch):
    from initperf.kernels.cpu.masks import select

    monkeypatch.setattr(select, "SERIAL", 100_000)  # so that the largest case runs on threads, with long digits
    check_equal_to_reference(select, values_of(dtype, sizes), alive_of(sizes) if masked else None)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_triton_selection_equals_the_reference(dtype, masked, gpu_device):
    from initperf.kernels.gpu.masks import select

    sizes = (3, 0, 4097)
    values = [v.to(gpu_device) for v in values_of(dtype, sizes)]
    check_equal_to_reference(select, values, [a.to(gpu_device) for a in alive_of(sizes)] if masked else None)


def test_threads_do_not_change_the_masks(monkeypatch):
    from initperf.kernels.cpu.masks import select

    monkeypatch.setattr(select, "SERIAL", 1000)
    sizes = (200_000, 300_000, 7)
    values = values_of(torch.bfloat16, sizes)  # many ties, split between the threads
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(prune.magnitude(dict(zip("abc", values, strict=True)), 0.3, scope="global"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(m[n], found[0][n]) for m in found for n in "abc")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(1, 5),
    st.sampled_from(DTYPES),
    st.sampled_from(["layerwise", "global"]),
    st.integers(0, 3),
)
def test_pruning_counts_are_exact_and_only_the_smallest_go(sizes, fraction, distinct, dtype, scope, seed):
    g = torch.Generator().manual_seed(seed)
    weights = {
        f"w{i}": torch.randint(-distinct, distinct + 1, (n,), generator=g).to(dtype) for i, n in enumerate(sizes)
    }
    masks = {f"w{i}": torch.rand(n, generator=g) < 0.7 for i, n in enumerate(sizes)}
    pruned = prune.magnitude(weights, fraction, masks=masks, scope=scope)
    pools = [[n] for n in weights] if scope == "layerwise" else [list(weights)]
    for pool in pools:
        old, new = (torch.cat([m[n] for n in pool]) for m in (masks, pruned))
        size = torch.cat([weights[n] for n in pool]).abs()
        survivors = int(old.sum())
        assert int(new.sum()) == survivors - round(fraction * survivors)
        assert not (new & ~old).any(), "what was pruned came back"
        gone = old & ~new
        if gone.any() and new.any():
            worst, best = size[gone].max(), size[new].min()
            assert worst <= best
            tied = torch.nonzero(old & (size == worst)).flatten()
            went = gone[tied]
            assert not (went[1:] & ~went[:-1]).any(), "ties must go by flat index"


def test_fractions_are_given_by_glob_and_the_last_match_counts():
    weights = {"fc1.weight": torch.randn(30, 10), "fc3.weight": torch.randn(10, 10), "fc3.bias": torch.randn(10)}
    masks = prune.magnitude(weights, {"*.weight": 0.2, "fc3.weight": 0.1})
    assert [int((~m).sum()) for m in masks.values()] == [60, 10, 0]
    assert list(masks) == list(weights)


def test_global_scope_pools_the_tensors_of_one_glob():
    weights = {
        "a.weight": torch.full((10,), 1.0),
        "b.weight": torch.full((10,), 2.0),
        "out.weight": torch.full((10,), 0.1),
    }
    masks = prune.magnitude(weights, {"*.weight": 0.25, "out.weight": 0.5}, scope="global")
    assert [int(m.sum()) for m in masks.values()] == [5, 10, 5]
    assert masks["a.weight"].tolist() == [False] * 5 + [True] * 5


def test_global_scope_compares_different_dtypes_exactly():
    weights = {"a": torch.tensor([1.0, 3.0]).bfloat16(), "b": torch.tensor([1.0 - 2**-20, 4.0])}
    masks = prune.magnitude(weights, 0.25, scope="global")
    assert masks["b"].tolist() == [False, True]
    assert masks["a"].all()


def test_magnitude_ignores_signs_and_sees_subnormals_and_infinities():
    weight = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, -1.0, float("-inf"), float("inf")])
    for k in range(8):
        mask = prune.magnitude({"w": weight}, k / 7)["w"]
        assert mask.tolist() == [False] * k + [True] * (7 - k)


def test_views_are_pruned_by_their_own_row_major_order():
    base = torch.randn(20, 30)
    assert torch.equal(
        prune.magnitude({"w": base.t()}, 0.4)["w"], prune.magnitude({"w": base.t().contiguous()}, 0.4)["w"]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_survivor_raises_and_changes_nothing(dtype):
    weight = torch.randn(1000).to(dtype)
    weight[17] = float("nan")
    mask = torch.ones(1000, dtype=torch.bool)
    before = mask.clone()
    with pytest.raises(InitPerfError, match="NaN in 1 surviving weights"):
        prune.magnitude({"w": weight}, 0.1, masks={"w": mask})
    assert torch.equal(mask, before)
    mask[17] = False
    assert int(prune.magnitude({"w": weight}, 0.1, masks={"w": mask})["w"].sum()) == 899


def test_random_masks_follow_the_word_order_of_the_contract():
    from initperf import rng
    from initperf.kernels.reference.sampling.sample import sample_

    words = sample_(torch.empty(500, dtype=torch.int32), rng.BITS, (), 9, rng.stream_of("fc.weight#select"))
    order = torch.sort(words.long() & 0xFFFFFFFF, stable=True).indices
    expected = torch.ones(500, dtype=torch.bool)
    expected[order[:100]] = False
    mask = prune.random({"fc.weight": torch.zeros(20, 25)}, 0.2, seed=9)["fc.weight"]
    assert torch.equal(mask.flatten(), expected)


def test_random_pruning_of_survivors_keeps_counts_and_depends_on_seed_and_name():
    weights = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    first = prune.random(weights, 0.5, seed=1)
    second = prune.random(weights, 0.2, seed=1, masks=first)
    assert [int(m.sum()) for m in second.values()] == [400, 400]
    assert not any((second[n] & ~first[n]).any() for n in weights)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], prune.random(weights, 0.5, seed=2)["a"])


def test_shuffled_masks_keep_every_layers_count_and_move():
    masks = {"a": torch.rand(40, 50) < 0.2, "b": torch.rand(7) < 2, "c": torch.zeros(3, dtype=torch.bool)}
    shuffled = prune.shuffle(masks, 3)
    assert [int(m.sum()) for m in shuffled.values()] == [int(m.sum()) for m in masks.values()]
    assert not torch.equal(shuffled["a"], masks["a"])
    assert all(torch.equal(prune.shuffle(masks, 3)[n], shuffled[n]) for n in masks)


def test_scores_are_ordered_with_their_sign():
    scores = torch.tensor([0.5, -2.0, 3.0, -0.5, 0.0])
    assert prune.by_score({"w": scores}, 0.4)["w"].tolist() == [True, False, True, False, True]
    near = torch.tensor([1 + 2**-23, 1.0, -1.0, -1 - 2**-23])
    for k in range(5):
        expected = torch.ones(4, dtype=torch.bool).index_fill(0, near.argsort()[:k], False)
        assert torch.equal(prune.by_score({"w": near}, k / 4)["w"], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: prune.magnitude(w, 1.5), "at most 1"),
        (lambda w: prune.magnitude(w, float("nan")), "at least 0"),
        (lambda w: prune.magnitude(w, {"fc9*": 0.5}), "to match one of w"),
        (lambda w: prune.magnitude(w, 0.5, scope="all"), "scope"),
        (lambda w: prune.magnitude(w, 0.5, masks={"w": torch.ones(3, dtype=torch.bool)}), r"shape \(4, 5\)"),
        (lambda w: prune.magnitude(w, 0.5, masks={"w": torch.ones(4, 5)}), "dtype bool"),
        (lambda w: prune.magnitude(w, 0.5, masks={"v": torch.ones(4, 5) > 0}), "masks of v too"),
        (lambda w: prune.magnitude({"w": torch.ones(3, dtype=torch.int64)}, 0.5), "float32, bfloat16"),
        (lambda w: prune.magnitude([w["w"]], 0.5), "a dict"),
        (lambda w: prune.magnitude({}, 0.5), "at least one"),
        (lambda w: prune.random(w, 0.5, seed=-1), "seed"),
        (lambda w: prune.shuffle({"w": torch.ones(3)}, 1), "dtype bool"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(InitPerfError, match=message):
        call({"w": torch.randn(4, 5)})


@needs_fork
def test_pruning_works_in_a_forked_child():
    weights = {"w": torch.randn(600, 600)}
    assert_same_in_a_forked_child(lambda: prune.magnitude(weights, 0.3).values())


def test_selection_runs_on_the_compiled_kernel():
    before = ops.CALLS["kth_smallest", "numba"]
    prune.magnitude({"w": torch.randn(10)}, 0.5)
    assert ops.CALLS["kth_smallest", "numba"] == before + 1
