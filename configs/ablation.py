"""Why did ResNet50 reach 70 %? Its right recipe beside three mistakes, one at a time and together.

    python main.py --config=configs/ablation.py --workdir=runs/ablation --config.data.path=DATA

DATA as in configs/intel.py. The mistakes: pixels divided by 255 where the weights expect the
ImageNet mean and standard deviation; BatchNorm normalising by the batch, and moving its statistics,
in stages that are frozen; a learning rate a hundred times too high for stages that are not. The
first is caught before training: see the preflight warnings in the report.

Any network with weights will do, for example one that was trained here:
--config.models=resnet18 --config.weights=run:runs/cifar10/resnet18/seed0
"""

from ml_collections import ConfigDict

from configs import intel


def get_config(models: str = "resnet50") -> ConfigDict:
    """Returns the experiment; `models` chooses others: configs/ablation.py:efficientnet_b0."""
    config = intel.get_config(models or "resnet50")
    moving = {"batch_norm": "batch", "frozen_batch_norm": "batch"}
    high_rate = {"phase": {"tune": {"optimizer": {"learning_rate": 1e-2}}}}
    config.variants.right = ConfigDict()
    config.variants.pixels = ConfigDict({"preprocessing": "unit"})
    config.variants.batch_norm = ConfigDict(moving)
    config.variants.rate = ConfigDict(high_rate)
    config.variants.all_three = ConfigDict({"preprocessing": "unit", **moving, **high_rate})
    return config
