"""How much faster is a phase of frozen stages with stored features? Both ways in one process.

    python -m analysis.benchmark --config=configs/transfer.py:resnet18 --config.data.path=DATA \
        --config.weights=WEIGHTS --config.phases=head

Trains the first run of the experiment twice, once with and once without stored features, and prints
seconds without compilation, their ratio, and the test accuracies, which should agree.
"""

import shutil
import tempfile
from pathlib import Path

from ml_collections import config_flags

from errors import UserError
from experiment import config_overrides, expand, run_command
from train import train_and_evaluate


def main(argv: list[str]) -> int:
    """Runs the benchmark of --config."""
    if len(argv) > 1 or CONFIG.value is None:
        raise UserError("--config=configs/... is needed, and nothing beside options")
    config = expand(CONFIG.value, config_overrides(CONFIG))[0].config
    config.preflight = "off"
    measured = {}
    for stored in (True, False):
        if not stored:
            config.runtime.feature_cache_mb = 0.0
        folder = Path(tempfile.mkdtemp())
        try:
            summary = train_and_evaluate(config, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if summary["status"] != "complete":
            raise UserError(f"the run {summary['status']}: {summary['error']}")
        if stored and not any(phase["stored_features"] for phase in summary["phases"]):
            raise UserError("no phase of this run can store features: try --config.phases=head")
        seconds = summary["cost"]["seconds"] - summary["cost"]["compile_seconds"]
        accuracy = summary["metrics"]["test"]["accuracy"]
        measured[stored] = seconds
        name = "stored features" if stored else "every step through the network"
        steps = summary["steps"]
        print(
            f"{name}: {seconds:.1f} s for {steps} steps, test accuracy {accuracy:.4f}", flush=True
        )
    device = summary["cost"]["device"]
    print(f"{measured[False] / measured[True]:.1f} times faster with stored features ({device})")
    return 0


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: configs/<name>.py")
    run_command(main)
