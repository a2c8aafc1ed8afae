"""describe: names the scheme that torch's own initializers used, calls trained weights trained, and finds what contradicts the text."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import nn
from torch.nn import init as torch_init

from initperf import init as initperf_init
from initperf.core.checks import InitPerfError
from initperf.init import Init, describe, describe_file, initialize
from initperf.init.identify.candidates import Candidate
from initperf.init.identify.choose_scheme import Case, Fit, most_probable
from initperf.init.identify.fit import distance

SCHEMES = {
    "kaiming_normal": torch_init.kaiming_normal_,
    "kaiming_normal, fan_out": partial(torch_init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "kaiming_uniform": torch_init.kaiming_uniform_,
    "xavier_normal": torch_init.xavier_normal_,
    "xavier_uniform": torch_init.xavier_uniform_,
    "torch default (kaiming_uniform, a=sqrt 5)": partial(torch_init.kaiming_uniform_, a=math.sqrt(5)),
    "normal(0.02)": partial(torch_init.normal_, std=0.02),
    "trunc_normal(0.02, cut at 2 std)": partial(torch_init.trunc_normal_, std=0.02, a=-0.04, b=0.04),
    "normal(1)": torch_init.normal_,
    "uniform(0, 1)": torch_init.uniform_,
    "orthogonal": torch_init.orthogonal_,
    "zeros": torch_init.zeros_,
    "ones": torch_init.ones_,
    "constant(0.5)": partial(torch_init.constant_, val=0.5),
}


def labels(described):
    return {f.name: f.scheme for f in described.findings}


@pytest.mark.parametrize("shape", [(60, 100), (300, 200), (48, 20, 3, 3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_of_torch_is_named_among_what_fits_and_first_where_the_size_tells(scheme, shape):
    torch.manual_seed(sum(shape))
    tensors = {f"layers.{i}.weight": SCHEMES[scheme](torch.empty(shape)) for i in range(2)}
    for finding in describe(tensors).findings:
        assert scheme in (finding.scheme, *finding.others), str(finding)
        if math.prod(shape) >= 60_000:
            assert finding.scheme == scheme


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "scheme", ["kaiming_normal", "torch default (kaiming_uniform, a=sqrt 5)", "normal(0.02)", "zeros"]
)
def test_rounding_to_another_dtype_hides_nothing(scheme, dtype):
    torch.manual_seed(3)
    tensor = SCHEMES[scheme](torch.empty(800, 600)).to(dtype)
    assert labels(describe({"w": tensor})) == {"w": scheme}


def test_true_schemes_pass_their_tests_with_the_promised_rarity_of_false_alarms():
    torch.manual_seed(7)
    tensors = {f"w{i}": torch_init.xavier_normal_(torch.empty(40, 60)) for i in range(80)}
    tensors |= {f"u{i}": torch_init.kaiming_uniform_(torch.empty(50, 30), a=math.sqrt(5)) for i in range(80)}
    described = describe(tensors).findings
    wrong = [
        f.name
        for f in described
        if not {"xavier_normal", "torch default (kaiming_uniform, a=sqrt 5)"} & {f.scheme, *f.others}
    ]
    assert wrong == []


def test_identities_are_named():
    tensors = {
        "eye": torch.eye(40),
        "dirac": torch_init.dirac_(torch.empty(16, 16, 3, 3)),
        "orthogonal": torch_init.orthogonal_(torch.empty(100, 60), gain=2.0),
    }
    assert labels(describe(tensors)) == {"eye": "eye", "dirac": "dirac", "orthogonal": "orthogonal (gain 2)"}


def test_biases_are_understood_by_their_weights():
    torch.manual_seed(0)
    described = describe(nn.Sequential(nn.Linear(50, 2000), nn.Conv2d(30, 1500, 3)))
    found = labels(described)
    assert found["0.bias"] == found["1.bias"] == "torch default (1/sqrt fan_in)"


def test_a_modules_own_class_is_a_hypothesis_too():
    torch.manual_seed(0)
    found = labels(describe(nn.Bilinear(30, 41, 20)))
    assert found["weight"].startswith(("torch default", "uniform(1/sqrt 30)"))


def test_padding_rows_and_masks_are_looked_through():
    torch.manual_seed(0)
    pruned = torch_init.kaiming_normal_(torch.empty(300, 200))
    pruned[torch.rand(300, 200) < 0.9] = 0
    described = describe({"embedding": nn.Embedding(500, 64, padding_idx=1).weight, "pruned.weight": pruned})
    assert labels(described)["embedding"] == "normal(1)"
    assert "1 rows are zero" in described.findings[0].evidence
    finding = described.findings[1]
    assert finding.scheme == "kaiming_normal"
    assert "pruned" in finding.evidence


@pytest.fixture(scope="module")
def trained():
    """A small network trained on a task that it can learn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    teacher = torch.randn(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        x = torch.randn(256, 64)
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1
    return model


def test_trained_weights_are_called_trained(trained):
    found = labels(describe(trained))
    assert {found["0.weight"], found["2.weight"]} == {"trained, unknown"}


def test_what_values_alone_do_not_show_gives_training_away():
    torch.manual_seed(0)
    w = torch_init.kaiming_normal_(torch.empty(400, 300))
    moved = w + 0.012 * torch.outer(torch.sign(torch.randn(400)), torch.sign(torch.randn(300)))
    rows = w + 0.006 * torch.randn(400, 1)
    found = labels(describe({"w": w, "moved": moved, "rows": rows}))
    assert found == {"w": "kaiming_normal", "moved": "trained, unknown", "rows": "trained, unknown"}


def test_a_scale_of_no_known_scheme_is_told_from_training():
    torch.manual_seed(0)
    found = labels(describe({"w": torch.randn(300, 200) * 0.0317, "few": torch.randn(12)}))
    assert found["w"].startswith("normal(0.031")
    assert found["w"].endswith("of no known scheme")
    assert found["few"] == "unknown"


def test_values_that_are_not_finite_are_reported():
    tensor = torch.randn(40, 40)
    tensor[3, 4] = math.nan
    finding = describe({"w": tensor}).findings[0]
    assert finding.scheme == "trained, unknown"
    assert "1 values are not finite" in finding.evidence


def test_planted_disagreements_are_found_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.LayerNorm(200), nn.Linear(200, 150), nn.Linear(150, 50))
    initialize(model, "kaiming_normal", seed=1, rules={"2.weight": "xavier_normal", "3.bias": 0.1, "1.weight": 0.5})
    described = describe(model, expect={"*": "kaiming_normal"})
    assert {f.name for f in described.disagreements} == {"2.weight", "3.bias", "1.weight"}
    finding = next(f for f in described.findings if f.name == "2.weight")
    assert "times" in finding.disagreement
    assert "DISAGREES: 2.weight" in str(described)
    assert describe(model, expect={"0.*": "kaiming_normal", "2.weight": "xavier_normal"}).disagreements == []
    tensors = dict(model.state_dict())
    tensors["1.weight"] = torch.ones(200)
    assert [f.name for f in describe(tensors, expect={"*": "kaiming_normal"}).disagreements] == ["2.weight", "3.bias"]
    assert describe(tensors, expect={"0.weight": Init("normal", (0.0, math.sqrt(2 / 100)))}).disagreements == []
    assert len(describe(tensors, expect={"0.weight": Init("normal", (0.0, 0.02))}).disagreements) == 1


def test_expect_means_the_same_of_tensors_without_their_modules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 24, 3), nn.BatchNorm2d(24), nn.Linear(90, 70), nn.LSTM(40, 30))
    own = dict(model.state_dict())  # with BatchNorm's running statistics, of which no scheme says anything
    assert describe(own, expect={"*": "torch"}).disagreements == []
    assert describe(own, expect={"*": "keep"}).disagreements == []
    named = initialize(model, "kaiming_normal", seed=1) and dict(model.state_dict())
    assert describe(named, expect={"*": "kaiming_normal"}).disagreements == []
    wrong = {f.name for f in describe(named, expect={"*": "torch"}).disagreements}
    assert wrong == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert describe({"weight": torch.tensor(3.0)}, expect={"*": "kaiming_normal"}).disagreements == []
    assert describe({"weight": torch.tensor(3.0)}, expect={"*": "zeros"}).disagreements


def test_models_of_our_own_initialize_agree_with_what_was_asked():
    for scheme in ("kaiming_uniform", "xavier_normal", "trunc_normal", "gpt2", "timm", "orthogonal", "torch"):
        model = nn.Sequential(nn.Conv2d(8, 24, 3), nn.BatchNorm2d(24), nn.Linear(90, 70), nn.Embedding(200, 30))
        initialize(model, scheme, seed=4)
        assert describe(model, expect={"*": scheme}).disagreements == [], scheme


def test_checkpoints_are_read_from_safetensors_and_from_torch_files(tmp_path, trained):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "b.pt")
    torch.save({"epoch": 3, "model": model.state_dict(), "optimizer": {"state": {}}}, tmp_path / "c.pt")
    expected = labels(describe(dict(model.state_dict())))
    for name in ("a.safetensors", "b.pt", "c.pt"):
        assert labels(describe_file(tmp_path / name)) == expected
    assert describe_file(tmp_path / "a.safetensors", expect={"0.weight": "xavier_uniform"}).disagreements


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 50)
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")  # a whole module: weights_only refuses it
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    for name in ("damaged.safetensors", "pickled.pt", "empty.pt", "missing.pt"):
        with pytest.raises(InitPerfError, match="Expected"):
            describe_file(tmp_path / name)


def test_bad_arguments_are_refused():
    with pytest.raises(InitPerfError, match="mapping"):
        describe([torch.ones(3)])
    with pytest.raises(InitPerfError, match="3.weight"):
        describe(nn.Sequential(nn.Linear(2, 2)), expect={"3.weight": "zeros"})
    with pytest.raises(InitPerfError, match="lecun"):
        describe({"w": torch.randn(3, 3)}, expect={"w": "lecun"})
    with pytest.raises(InitPerfError, match="meta"):
        describe(nn.Linear(2, 2, device="meta"))


def test_nothing_is_changed(trained):
    before = [p.detach().clone() for p in trained.parameters()]
    describe(trained, expect={"*": "kaiming_normal"})
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))


def test_values_that_torchs_trunc_normal_clamps_to_its_bound_are_looked_through():
    torch.manual_seed(0)
    w = torch_init.trunc_normal_(torch.empty(500, 400), std=0.02)
    w[3, 4] = -2.0  # what a uniform draw of -1 becomes
    outlier = w.clone()
    outlier[3, 4] = -1.9
    clamped, other = describe({"w": w, "outlier": outlier}).findings
    assert clamped.scheme == "normal(0.02)"
    assert "1 at -2" in clamped.evidence
    assert other.scheme == "trained, unknown"


def test_tables_of_sinusoids_and_repeated_rows_are_named():
    angle = torch.arange(100)[:, None] / 10000 ** (torch.arange(32) / 32)
    tensors = {
        "halves": torch.cat([angle.sin(), angle.cos()], 1),
        "interleaved": torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[None],
        "rows": torch.arange(1.0, 9.0).log().expand(40, 8).contiguous(),
        "noisy": torch.cat([angle.sin(), angle.cos()], 1) + 0.01 * torch.randn(100, 64),
    }
    found = labels(describe(tensors))
    assert found["halves"] == found["interleaved"] == "sinusoids"
    assert found["rows"] == "equal rows"
    assert found["noisy"] == "trained, unknown"


def test_the_nearer_of_two_schemes_that_fit_is_named_and_layers_of_a_stack_decide_together():
    torch.manual_seed(0)
    # 1 / sqrt(384) = 0.0510 is 2% from 0.05, so 2.7 standard errors of the 9216 values of a layer
    near = {f"stack.{i}.weight": torch.randn(24, 384) / math.sqrt(384) for i in range(6)}
    near |= {f"other.{i}.proj": torch.randn(300, 96) * 0.05 for i in range(9)}
    described = describe(near).findings
    assert "normal(0.05)" in described[0].others
    assert {f.scheme for f in described} == {"lecun_normal", "normal(0.05)"}
    assert all((f.scheme == "lecun_normal") == f.name.startswith("stack") for f in described)


def test_shards_are_read_by_their_index_and_never_from_elsewhere(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for i in (1, 2):
        save_file({f"w{i}": torch_init.xavier_normal_(torch.empty(200, 100))}, tmp_path / f"{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w1": "1.safetensors", "w2": "2.safetensors"}}')
    assert labels(describe_file(index)) == {"w1": "xavier_normal", "w2": "xavier_normal"}
    for wrong in ('{"weight_map": {"w1": "../1.safetensors"}}', '{"weight_map": 3}', "[]", "nonsense"):
        index.write_text(wrong)
        with pytest.raises(InitPerfError, match="Expected"):
            describe_file(index)


def test_a_pickled_object_is_refused_in_one_line_that_says_what_to_do(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(InitPerfError, match=r"state_dict.*torch\.nn\.modules\.linear\.Linear") as error:
        describe_file(tmp_path / "a.pt")
    assert len(str(error.value)) < 400


def test_the_command_line_compares_a_checkpoint_with_a_text(tmp_path, capsys, trained):
    from initperf.cli.main import main

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 150))
    initialize(model, "kaiming_normal", seed=1, rules={"1.weight": "xavier_normal"})
    path = tmp_path / "a.pt"
    torch.save(model.state_dict(), path)
    assert main(["inspect", str(path), "--expect", "*=kaiming_normal", "--expect", "1.weight=xavier_normal"]) == 0
    assert "As expected" in capsys.readouterr().out
    assert main(["inspect", str(path), "--expect", "*.weight=kaiming_normal"]) == 1
    out = capsys.readouterr().out
    assert "Not as expected: 1 parameter " in out
    assert "1.weight" in out.split("Not as expected")[1]
    assert main(["inspect", str(path), "--expect", "1.weight=normal(0, 0.0756)"]) == 0
    for wrong in ("kaiming_normal", "*=", "*=normal(0, x)", "*=lecun", "nothing=zeros", "*=normal(1)"):
        assert main(["inspect", str(path), "--expect", wrong]) == 1
        assert "Expected" in capsys.readouterr().err
    torch.save(trained.state_dict(), path)
    assert main(["inspect", str(path)]) == 0
    assert "trained, unknown" in capsys.readouterr().out


def test_the_distance_is_kolmogorovs_and_smirnovs():
    values = torch.from_numpy(np.sort(np.random.default_rng(0).normal(size=500)))
    for init, cdf in (
        (Init("normal", (0.0, 1.1)), scipy_stats.norm(0, 1.1).cdf),
        (Init("uniform", (-3.0, 3.0)), scipy_stats.uniform(-3, 6).cdf),
        (Init("trunc_normal", (0.0, 1.0, -2.0, 2.0)), scipy_stats.truncnorm(-2, 2).cdf),
    ):
        assert distance(init, values) == pytest.approx(scipy_stats.kstest(values, cdf).statistic * math.sqrt(500))


@pytest.mark.parametrize(
    ("scheme", "mode"),
    [(s, m) for s in ("lecun_normal", "kaiming_normal") for m in ("", ", fan_out")] + [("xavier_normal", "")],
)
def test_normals_cut_at_two_std_are_named_by_the_variance_that_they_keep(scheme, mode):
    """As JAX and Keras make them: their std is that of the scheme, once it is cut."""
    rows, columns = 400, 300
    fan = {"": columns, ", fan_out": rows}[mode]
    kept = {"lecun_normal": 1 / fan, "kaiming_normal": 2 / fan, "xavier_normal": 2 / (rows + columns)}[scheme]
    std = math.sqrt(kept) / 0.8796256610342398
    tensor = initperf_init.trunc_normal_(torch.empty(rows, columns), 0.0, std, -2 * std, 2 * std, seed=1)
    assert tensor.var().item() == pytest.approx(kept, rel=6 * math.sqrt(2 / tensor.numel()))
    assert labels(describe({"w": tensor})) == {"w": f"{scheme}{mode}, cut at 2 std"}


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, "4 gates"), (nn.GRU, "3 gates"), (nn.RNN, "no gates")])
def test_recurrent_weights_without_their_module_are_known_by_their_gates(kind, gates):
    torch.manual_seed(0)
    found = labels(describe(kind(70, 110).state_dict()))
    assert set(found.values()) == {f"torch default (1/sqrt hidden, {gates})"}


def test_a_scale_of_no_known_scheme_counts_as_training_where_most_of_the_model_is_trained():
    torch.manual_seed(0)
    odd = torch.randn(300, 200) * 0.0317
    signs = torch.outer(torch.sign(torch.randn(400)), torch.sign(torch.randn(300)))
    trained = {f"{i}": torch_init.kaiming_normal_(torch.empty(400, 300)) + 0.012 * signs for i in range(2)}
    untouched = {f"u{i}": torch_init.kaiming_normal_(torch.empty(400, 300)) for i in range(4)}
    few, most = describe({"odd": odd, **trained, **untouched}), describe({"odd": odd, **trained})
    assert few.findings[0].scheme.endswith("of no known scheme")
    assert (most.findings[0].scheme, most.findings[0].init) == ("trained, unknown", None)
    assert "most of the model is trained" in most.findings[0].evidence


def test_of_two_schemes_that_fit_equally_the_one_that_explains_the_rest_of_the_model_is_named():
    def case(name, *schemes):
        fits = [Fit(Candidate(scheme, Init("normal", (0.0, 1.0))), 0.0) for scheme in schemes]
        return Case(name, (10, 10), fits, -50.0)

    either = case("either", "rare", "common")
    assert most_probable([either], 0)[0] == ["rare", "common"]
    others = [case(name, "common") for name in "abcdefgh"]
    assert most_probable([either, *others], 0)[0] == ["common", "rare"]
