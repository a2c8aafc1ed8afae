"""Pruned weights stay dead through training, whatever the optimizer."""

import pytest
import torch
from torch import nn

from initperf.layers.convert import check_masks, densify, sparsify
from initperf.layers.optimizers import mask_optimizer_
from tolerance import bits

pytest.importorskip("numba")

OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD with Nesterov and decay": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


def network(density=0.1):
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10)), density=density)


def train(model, optimizer, steps=100):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 200, generator=generator)
        loss = nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_weight_is_revived_in_100_steps_and_the_loss_falls(name):
    model = network()
    start = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    losses = train(model, OPTIMIZERS[name](model.parameters()))
    for layer, before in zip((model[0], model[2]), start, strict=True):
        assert not (layer.weight[~layer.weight_mask] != 0).any()
        # A hidden unit whose outgoing weights are all pruned gets no gradient.
        used = model[2].weight_mask.any(0)[:, None] if layer is model[0] else torch.ones((), dtype=torch.bool)
        assert (layer.weight != before)[layer.weight_mask & used].float().mean() > 0.95
    check_masks(model)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_training_equals_that_of_a_dense_network_whose_gradients_are_masked():
    model, twin = network(), densify(network())
    masks = [model[0].weight_mask, model[2].weight_mask]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
    for layer, mask in zip((twin[0], twin[2]), masks, strict=True):
        layer.weight.register_hook(lambda g, mask=mask: g.masked_fill(~mask, 0))
    train(model, optimizers[0], 20)
    train(twin, optimizers[1], 20)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


class Mixing(torch.optim.Optimizer):
    """As Muon does: the update is an orthogonal factor of the momentum, so every element of a matrix moves every other."""

    def __init__(self, parameters, lr=0.01):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                if p.dim() == 2:
                    u, _, v = torch.linalg.svd(state["momentum"], full_matrices=False)
                    p.sub_(group["lr"] * (u @ v + 1e-3))
                else:
                    p.sub_(group["lr"] * p.grad)


def test_an_optimizer_that_mixes_elements_revives_weights_unless_it_is_masked():
    model = network()
    train(model, Mixing(model.parameters()), 3)
    with pytest.raises(RuntimeError, match="mask_optimizer_"):
        check_masks(model)
    model = network()
    optimizer = mask_optimizer_(Mixing(model.parameters()))
    for _ in range(3):
        train(model, optimizer, 1)
        check_masks(model)
    for layer in (model[0], model[2]):
        assert not optimizer.state[layer.weight]["momentum"][~layer.weight_mask].any()


def test_momentum_older_than_the_mask_is_dropped_by_mask_optimizer():
    model = network(0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, 5)
    sparsify(model, density=0.1)
    mask_optimizer_(optimizer)
    for state in (optimizer.state[model[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg_sq"]):
        assert not bits(state)[~model[0].weight_mask].any()
    assert optimizer.state[model[0].weight]["step"] == 5
    train(model, optimizer, 5)
    check_masks(model)


def test_masking_an_optimizer_twice_registers_one_hook():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert mask_optimizer_(mask_optimizer_(optimizer)) is optimizer
    assert len(optimizer._optimizer_step_post_hooks) == 1
