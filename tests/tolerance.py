"""How far a product or a sum may be from its float64 value: derived from the dtype, never tuned."""

import torch


def allowed_error(exact: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Elementwise bound for a result whose float64 value is `exact`, given the same-dtype dense torch result `dense`.

    Twice the largest error of the dense result, plus one rounding band of the result's dtype (half a unit in the last
    place, eps / 2 * |exact|, and half the smallest subnormal, since both sides round once on output).
    """
    info = torch.finfo(dense.dtype)
    exact = exact.double()
    worst = (dense.double() - exact).abs().max() if exact.numel() else torch.zeros((), dtype=torch.float64)
    return 2 * worst + info.eps / 2 * exact.abs() + info.smallest_normal * info.eps / 2


def assert_close_to_exact(
    got: torch.Tensor, exact: torch.Tensor, dense: torch.Tensor, terms: torch.Tensor | None = None
) -> None:
    """Assert `got` is within allowed_error of `exact`, naming the worst coordinates. NaN anywhere fails.

    terms: the sum of the absolute values of what is summed. A sum in another order than torch's may be off by a rounding of
    each term: half a unit in the last place of this.
    """
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == dense.dtype, f"dtype {got.dtype}, expected {dense.dtype}"
    if not got.numel():
        return
    error = (got.double() - exact.double()).abs()
    allowed = allowed_error(exact, dense)
    if terms is not None:
        allowed = allowed + torch.finfo(dense.dtype).eps / 2 * terms.detach().double()
    bad = ~(error <= allowed)
    if bad.any():
        i = int(error.nan_to_num(float("inf")).flatten().argmax())
        where = tuple(int(v) for v in torch.unravel_index(torch.tensor(i), got.shape))
        raise AssertionError(
            f"{int(bad.sum())} of {got.numel()} values beyond the bound; worst at {where}: "
            f"got {got[where].item()}, exact {exact[where].item()}, dense {dense[where].item()}"
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The integer view, for comparisons that must see -0.0 and NaN payloads."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
