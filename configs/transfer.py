"""Are pretrained weights worth it on my images? The same networks with them and from scratch.

    python main.py --config=configs/transfer.py:resnet18,efficientnet_b0 --workdir=runs/transfer \
        --config.data.path=DATA

DATA is a folder of images, as in configs/folder.py. Each network begins from the first weights that
are published for it; others are given by --config.per_model.resnet18.weights=...

Measured on 960 + 480 of the Intel photos at 64x64 pixels (--config.data.image_size=64), weights
trained on CIFAR-10 at 32x32 (run:...; 80.6 and 59.3 % there), 3 seeds, mean and 95 % interval over
seeds: resnet18 77.2 % (74.6 to 79.8) against 74.2 (70.5 to 78.0) from scratch, its last phase at
learning_rate 2e-4 and layer_decay 0.8; efficientnet_b0 70.8 % (68.8 to 72.7) against 59.7 (55.4 to
63.9).
"""

from ml_collections import ConfigDict

from configs import folder
from models.weights.published import PUBLISHED


def get_config(models: str = "resnet18") -> ConfigDict:
    """Returns the experiment; `models` chooses: configs/transfer.py:resnet18,efficientnet_b0."""
    config = folder.get_config(models or "resnet18")
    for name in config.models:
        published = [weights for weights, entry in PUBLISHED.items() if entry.model == name]
        config.per_model[name].weights = published[0] if published else "none"
    config.variants.pretrained = ConfigDict({"phases": "head,full"})
    config.variants.scratch = ConfigDict({"weights": "none", "phases": "all"})
    # The rate of training from scratch, so that only the initialisation differs.
    full = {"optimizer": {"learning_rate": 1e-3}, "layer_decay": 1.0, "early_stopping_patience": 5}
    config.phase.full.update(full)
    config.phase.full.epochs = 15
    return config
