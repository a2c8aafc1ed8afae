"""From which figures on a network is called ill, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

# Threshold: why. A growth is that of the least-squares line through the logarithms, over all layers.
THRESHOLDS: dict[str, tuple[float, str]] = {
    "variance a layer": (1.6, "He's rule gives 1.0; GELU under it falls by up to 2 only where its input is small"),
    "variance in all": (
        100.0,
        "a standard deviation ten times too large or small at the last layer; float16 holds 65504",
    ),
    "gradient in all": (1e4, "gradients 100 times smaller at one end: no one learning rate suits all layers"),
    "std ratio": (1.2, "outside it the weights are called too large or small: Xavier and He differ by 1.41"),
    "He for tanh": (1.04, "std / He's std and its inverse: torch's own gain for tanh, 5/3, is 1.18 of He's and meant"),
    "dead": (
        0.55,
        "half of a deep ReLU network's units are inactive for a whole batch at init, since inputs grow alike",
    ),
    "samples": (16, "of fewer inputs a healthy unit may see none that it likes"),
    "tanh": (2.0, "rms of pre-activations; there tanh's derivative is below 0.4 for three inputs of four"),
    "sigmoid": (
        5.0,
        "rms of pre-activations; there sigmoid's derivative is a tenth of its largest for half of the inputs",
    ),
    "input mean": (3.0, "|mean| / std of the inputs: images in [0, 1] have 0.4 to 2"),
    "input rms": (20.0, "rms of the inputs, or its inverse: standardized inputs have 1"),
    "output rms": (5.0, "cross-entropy then starts far above log(classes): a softmax of such logits is nearly one-hot"),
    "spectral radius": (1.3, "of recurrent weights: over 20 steps 1.3 makes 190; orthogonal has 1"),
    "update ratio": (0.2, "update / weight of the median layer: about 1e-3 is usual, Adam's first steps reach 0.1"),
}
_FEW = 4  # layers a growth needs


class Verdict(NamedTuple):
    """One fault: its name, where, what was seen, and what to do."""

    fault: str
    layer: str
    text: str
    remedy: str
