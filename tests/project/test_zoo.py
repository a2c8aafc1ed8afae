"""torchvision's and timm's models: describe, fast_init and sparsify on them. In the second environment only (make test-zoo)."""

import importlib
import math

import pytest
import torch

from initperf import densify, describe, fast_init, initialize, sparsify
from initperf.layers.convert import FAMILIES
from recorded import judge, recording

pytestmark = pytest.mark.zoo

TORCHVISION = [
    "resnet18",
    "vit_b_16",
    "mobilenet_v2",
    "efficientnet_b0",
    "convnext_tiny",
    "densenet121",
    "swin_t",
    "vgg11_bn",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
]
TIMM = [
    "resnet18",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "convnext_atto",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "swin_tiny_patch4_window7_224",
    "mixer_s16_224",
    "regnety_004",
    "repvgg_a0",
    # seen only when describe was written
    "xcit_nano_12_p16_224",
    "levit_128s",
    "coat_lite_tiny",
    "poolformer_s12",
    "ghostnet_100",
    "maxvit_rmlp_pico_rw_256",
]
MODELS = [("torchvision", name) for name in TORCHVISION] + [("timm", name) for name in TIMM]


def fill(name, parameter, module):
    """Heads start at zero in some of these models, which would hide every mistake."""
    return "kaiming_normal" if parameter.dim() > 1 else None


def make(library, name):
    module = pytest.importorskip(library, reason=f"{library} is not installed here: make test-zoo installs it")
    if library == "timm":
        return module.create_model(name)
    return getattr(importlib.import_module("torchvision.models"), name)(weights=None)


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_fresh_models_are_explained(library, name):
    pytest.importorskip(library, reason=f"{library} is not installed here: make test-zoo installs it")
    if library == "timm":
        importlib.import_module("timm.layers.weight_init")
    torch.manual_seed(0)
    with recording() as truth:
        model = make(library, name)
    right, wrong = judge(model, truth, describe(model))
    print(f"{library} {name}: {len(right)} of {len(right) + len(wrong)}")
    assert len(right) >= 10
    assert len(right) >= 0.95 * (len(right) + len(wrong)), [(f.name, f.scheme, t) for f, t in wrong]


@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", "resnet18"), ("torchvision", "vit_b_16"), ("timm", "resnet18"), ("timm", "vit_tiny_patch16_224")],
)
def test_constructors_inside_fast_init_are_reproducible_and_distributed_as_before(library, name):
    torch.manual_seed(0)
    plain = make(library, name)
    models = []
    for _ in range(2):
        with fast_init(seed=1):
            models.append(make(library, name))
    for (key, p), q, again in zip(plain.named_parameters(), *(m.parameters() for m in models), strict=True):
        assert torch.equal(q, again), key
        if p.numel() >= 1000 and p.std() > 0:
            assert not torch.equal(p, q), key
            # five standard errors of the ratio of two normal samples' spreads; torch's trunc_normal_ may clamp a value to -2
            assert abs(q.std() / p.clamp(-1, 1).std() - 1) < 5 / math.sqrt(p.numel()), key


@pytest.mark.parametrize(
    ("library", "name"), [("torchvision", "resnet18"), ("timm", "resnet18"), ("timm", "vit_tiny_patch16_224")]
)
def test_a_sparsified_model_computes_what_its_zeros_compute_and_becomes_dense_again(library, name):
    model = make(library, name).eval()
    initialize(
        model,
        fill,
        seed=1,
        rules={n: "keep" for n, p in model.named_parameters() if not n.endswith(("weight", "bias"))},
    )
    layers = {f"{path}.weight": m for path, m in model.named_modules() if type(m) in FAMILIES}
    masks = {}
    for i, (key, layer) in enumerate(layers.items()):
        masks[key] = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(i)) < 0.3
        layer.weight.data.mul_(masks[key])
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        sparse = sparsify(model, masks)
        found = sparse(x)
        dense = densify(sparse)(x)
    assert expected.std() > 0
    for got in (found, dense):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("library", "name"), [("torchvision", "resnet18"), ("timm", "vit_tiny_patch16_224")])
def test_initialize_in_timms_way_is_what_describe_finds(library, name):
    model = make(library, name)
    rules = {key: "keep" for key, p in model.named_parameters() if p.dim() > 1 and not key.endswith("weight")}
    initialize(model, "timm", seed=1, rules=rules)
    found = describe(model, expect={"*.weight": "timm"})
    assert found.disagreements == []
