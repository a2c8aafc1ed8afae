"""A run folder with made-up but well-formed numbers, for tests of what reads one."""

import csv
import json
import math
import random
from pathlib import Path

ROWS = (
    "trial,level,kind,density,iterations,early_stop_iteration,early_stop_val_loss,early_stop_test_accuracy,"
    "final_test_accuracy,iterations_to_dense_best,seed,train_seconds"
)
CURVES = "trial,level,kind,iteration,train_loss,val_loss,val_accuracy,test_accuracy"
DENSITIES = (1.0, 0.411, 0.135, 0.042)
ACCURACY = {
    "ticket": (0.970, 0.973, 0.976, 0.974),
    "reinit": (0, 0.974, 0.970, 0.967),
    "shuffle": (0, 0.971, 0.96, 0.947),
}


def write_csv(path: Path, header: str, rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)


def write_run(
    folder: Path, *, accuracy=ACCURACY, densities=DENSITIES, trials=5, iterations=1000, seed=0, **config
) -> Path:
    """Networks of `accuracy[kind][level]`, 0.4 points of noise a trial; the worse a network, the later it stops."""
    noise = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows, curves = [], []
    for trial in range(trials):
        for level, density in enumerate(densities):
            for kind, values in accuracy.items():
                if level == 0 and kind != "ticket":
                    continue
                reached = values[level] + noise.uniform(-0.002, 0.002)
                stop = min(iterations, round(iterations * (40 * (1 - reached) - 0.4) / 100) * 100)
                best = stop if reached > 0.969 else ""
                for iteration in range(100, iterations + 1, 100):
                    loss = (
                        4 * (1 - reached)
                        + 2 * math.exp(-iteration / 120)
                        + 0.05 * max(0, iteration - stop) / iterations
                    )
                    curves.append((trial, level, kind, iteration, loss, loss, reached, reached))
                least = 4 * (1 - reached) + 2 * math.exp(-stop / 120)
                late = reached - 0.001
                rows.append((trial, level, kind, density, iterations, stop, least, reached, late, best, trial, 1.5))
    write_csv(folder / "results.csv", ROWS, rows)
    write_csv(folder / "curves.csv", CURVES, curves)
    dense = 0.9
    steps = [(level, d, 60, dense, dense * (0.45 + 0.8 * d)) for level, d in enumerate(densities)]
    write_csv(folder / "steps.csv", "level,density,batch,dense_ms,masked_ms", steps)
    summary = {
        "ops": {"sample_": {"numba": 31}, "masked_linear": {"numba": 123456}},
        "ticket_bytes": {str(level): 4300 for level in range(len(densities))},
        "dense_checkpoint_bytes": {str(level): 143_000 for level in range(len(densities))},
        "seconds": 41.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    base = {
        "recipe": "digits",
        "data": "digits",
        "rounds": len(densities) - 1,
        "controls": [kind for kind in accuracy if kind != "ticket"],
        "trials": trials,
        "seed": 0,
        "budget": "reduced budget",
        "attribution": "Optical Recognition of Handwritten Digits, UCI, CC BY 4.0",
        "versions": {"initperf": "0.1.0", "torch": "2.13.0"},
        "rng_version": 0,
        "threads": 2,
    }
    (folder / "config.json").write_text(json.dumps(base | config))
    return folder
