"""describe on freshly made models, judged by the calls that drew their values; its limits come from torch.nn's classes and from theory.

Three sets, none of which shares a model with another:
- FIT: torch.nn's own classes. The limits (initperf/init/identify/fit.py) are what a true scheme fails once in 10,000 tensors, and hold here.
- SEEN: families of transformers after which candidates were added and the choice among fitting schemes was made; no limit was
  changed for them.
- UNSEEN: families that were run for the first time after that (tests/support/families.py says what was changed later).
"""

import math

import pytest
import torch
from torch import nn

from families import SEEN, UNSEEN, build
from initperf.init import describe
from initperf.init.identify import fit
from recorded import judge, recording

FIT = {
    "linear": lambda: nn.Sequential(nn.Linear(200, 300), nn.Linear(64, 64), nn.Linear(48, 4000)),
    "convolutions": lambda: nn.Sequential(nn.Conv1d(40, 60, 9), nn.Conv2d(16, 32, 3), nn.ConvTranspose2d(20, 30, 5)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(64, 64, 5, groups=64), nn.Conv2d(64, 128, 3, groups=4)),
    "embeddings": lambda: nn.Sequential(nn.Embedding(300, 40), nn.EmbeddingBag(200, 30)),
    "lstm": lambda: nn.LSTM(50, 60, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(80, 70),
    "rnn": lambda: nn.RNN(90, 100),
    "attention": lambda: nn.MultiheadAttention(80, 4),
    "attention, other keys": lambda: nn.MultiheadAttention(80, 4, kdim=60, vdim=70),
    "transformer": lambda: nn.Transformer(64, 4, 1, 1, 100, batch_first=True),
    "bilinear": lambda: nn.Bilinear(30, 41, 20),
    "norms": lambda: nn.Sequential(nn.LayerNorm(2000), nn.BatchNorm1d(1500)),
}
SHARE = 0.95


def test_on_the_classes_that_the_limits_were_fixed_on_every_tensor_is_right():
    right, wrong = [], []
    for seed in range(4):
        for make in FIT.values():
            torch.manual_seed(seed)
            with recording() as truth:
                model = make()
            for total, found in zip((right, wrong), judge(model, truth, describe(model)), strict=True):
                total += found
    assert len(right) > 100
    assert wrong == []


def test_tighter_limits_would_reject_true_schemes(monkeypatch):
    """So the limits do something: the same tensors, each test's limit at its 10% point or so."""
    torch.manual_seed(0)
    with recording() as truth:
        model = nn.Sequential(*(nn.Linear(100, 80) for _ in range(40)))
    assert judge(model, truth, describe(model))[1] == []
    for limit, tight in (("STANDARD_ERRORS", 1.6), ("KS_LIMIT", 1.2), ("CHI_LIMIT", 1.6), ("EDGE_LIMIT", -2.0)):
        with monkeypatch.context() as patch:
            patch.setattr(fit, limit, tight)
            assert judge(model, truth, describe(model))[1], limit


@pytest.mark.parametrize("families", [SEEN, UNSEEN], ids=["seen", "unseen"])
def test_fresh_transformers_models_are_explained(families):
    pytest.importorskip("transformers", reason="transformers is not installed")
    counts, wrong = {}, []
    for family in families:
        torch.manual_seed(0)
        with recording() as truth:
            model = build(family)
        right, mistaken = judge(model, truth, describe(model))
        counts[family] = len(right), len(right) + len(mistaken)
        wrong += [f"{family}: {f.name} {f.shape}: {f.scheme}, in truth {t}" for f, t in mistaken]
    print(counts, *wrong, sep="\n")
    assert len(families) >= 15
    assert all(total >= 5 for _, total in counts.values()), counts
    assert all(right >= 0.8 * total for right, total in counts.values()), (counts, wrong)
    right, total = (sum(column) for column in zip(*counts.values(), strict=True))
    assert right >= SHARE * total, (counts, wrong)


def test_the_judge_finds_planted_mistakes():
    torch.manual_seed(0)
    with recording() as truth:
        model = nn.Linear(100, 80)
        described = describe(model)
        with torch.no_grad():
            nn.init.normal_(model.weight, std=0.02)
    assert [f.name for f, _ in judge(model, truth, described)[1]] == ["weight"]


def test_a_trained_transformers_model_is_called_trained():
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = build("GPT2").train()
    fresh = describe(model)
    assert not [f for f in fresh.findings if f.scheme == "trained, unknown"]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(150):
        tokens = (torch.randint(0, 700, (16, 1)) + 7 * torch.arange(24)) % 700
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2  # of log(700) = 6.6: it has learned
    large = [f for f in describe(model).findings if math.prod(f.shape) >= 1000]
    trained = [f for f in large if f.scheme == "trained, unknown"]
    assert len(trained) >= 0.9 * len(large), [(f.name, f.scheme) for f in large]


def test_expect_finds_what_was_planted_in_a_transformers_model_and_nothing_else():
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = build("Bert")
    expect = {"*.weight": "gpt2", "*LayerNorm.weight": "ones", "*.bias": "zeros"}
    residual = {f.name for f in describe(model, expect).disagreements}
    assert residual == set()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.mul_(1.1)
        model.encoder.layer[0].output.dense.bias[3] = 1e-3
        nn.init.uniform_(model.encoder.layer[0].attention.self.key.weight, -0.0346, 0.0346)  # the same variance
    assert {f.name for f in describe(model, expect).disagreements} == {
        "encoder.layer.1.output.dense.weight",
        "encoder.layer.0.output.dense.bias",
        "encoder.layer.0.attention.self.key.weight",
    }
