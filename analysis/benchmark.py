"""How much faster is a phase of frozen stages with stored features? Both ways in one process.

    python -m analysis.benchmark --config=configs/folder.py:resnet18 --config.data.path=DATA \
        --config.weights=WEIGHTS --config.phases=head

Trains the first run with and without stored features, after an epoch of each that compiles the
programs. Prints seconds, their ratio, and test accuracies, which should agree.
"""

import tempfile
from pathlib import Path

import jax
from ml_collections import ConfigDict, config_flags

from errors import UserError
from experiment.command import arguments, config_overrides, run_command
from experiment.grid import expand
from train import train_and_evaluate


def main(argv: list[str]) -> int:
    """Runs the benchmark of --config."""
    arguments(argv, "analysis.benchmark --config=configs/...", least=CONFIG.value is None, most=0)
    config = expand(CONFIG.value, config_overrides(CONFIG))[0].config
    config.preflight = "off"
    limit, measured = config.runtime.feature_cache_mb, {}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        for stored in (True, False):
            config.runtime.feature_cache_mb = limit if stored else 0.0
            name = "stored features" if stored else "every step through the network"
            short = ConfigDict(config.to_dict())
            for phase in short.phase.values():
                phase.epochs = 1
            for settings, part in ((short, "compiling"), (config, "timed")):
                summary = train_and_evaluate(settings, Path(folder) / f"{name}, {part}")
                if summary["status"] != "complete":
                    raise UserError(f"the run {summary['status']}: {summary['error']}")
            if stored and not any(phase["stored_features"] for phase in summary["phases"]):
                raise UserError("no phase of this run can store features: try --config.phases=head")
            measured[stored] = seconds = summary["cost"]["seconds"]
            accuracy = summary["metrics"]["test"]["accuracy"]
            text = (
                f"{name}: {seconds:.1f} s, {summary['steps']} steps, test accuracy {accuracy:.4f}"
            )
            print(text, flush=True)
    device = summary["cost"]["device"]
    print(f"{measured[False] / measured[True]:.1f} times faster with stored features ({device})")
    return 0


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: configs/<name>.py")
    run_command(main)
