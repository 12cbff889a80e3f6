"""Why did ResNet50 reach 70 %? The right recipe beside the usual mistakes, alone and together.

    python main.py --config=configs/ablation.py --workdir=runs/ablation --config.data.path=DATA

DATA as in configs/intel.py. The mistakes:

* pixels: divided by 255, and nothing else, where the weights expect their own mean and scale;
* batch_norm: BatchNorm normalises by the batch, and moves its statistics, in frozen stages as well;
* rate: a learning rate of 0.01, ten to a hundred times too high, for the stages that are tuned;
* all_three of them;
* frozen: no mistake, but all stages frozen, with a new classifier alone;
* frozen_pixels, frozen_twice: so again, with pixels divided by 255, and with pixels divided by 255
  before a network that divides them itself, as networks of Keras do.

Wrong pixels are caught before training: see the preflight warnings in the report.

Measured on 1,095 + 2,158 of the Intel photos, 3 seeds, 8 epochs of the head and 5 of the stages,
test accuracy: right 90.8 %, pixels 90.0, batch_norm 86.4, rate 88.5, all_three 88.8, frozen 88.5,
frozen_pixels 88.2, frozen_twice 33.1; intervals in the README.
"""

from ml_collections import ConfigDict

from configs import intel


def get_config(models: str = "efficientnet_lite0") -> ConfigDict:
    """Returns the experiment; `models` chooses others: configs/ablation.py:resnet50."""
    config = intel.get_config(models or "efficientnet_lite0")
    moving = {"batch_norm": "batch", "frozen_batch_norm": "batch"}
    high_rate = {"phase": {"tune": {"optimizer": {"learning_rate": 1e-2}}}}
    variants = {
        "right": {},
        "pixels": {"preprocessing": "unit"},
        "batch_norm": moving,
        "rate": high_rate,
        "all_three": {"preprocessing": "unit", **moving, **high_rate},
        "frozen": {"phases": "head"},
        "frozen_pixels": {"phases": "head", "preprocessing": "unit"},
        "frozen_twice": {"phases": "head", "preprocessing": "rescaled_twice"},
    }
    for name, changes in variants.items():
        config.variants[name] = ConfigDict(changes)
    return config
