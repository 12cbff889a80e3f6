"""CIFAR-10, 32x32, from tensorflow-datasets or from a folder of images.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10
    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 \
        --config.data.source=folder --config.data.path=DATA

tensorflow-datasets needs TensorFlow once, to prepare this set as array_record, and never to read
it; DATA is a folder with train/<class> and test/<class>.

No accuracy has been measured with this config yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(models: str = "") -> ConfigDict:
    """Returns the experiment; `models` chooses among them: configs/cifar10.py:cnn,cnn_deep."""
    config = base.get_config(models)
    config.data.source = "tfds"
    config.data.path = "cifar10"
    config.data.split = (0.9, 0.1)  # of the 50,000 training images
    config.data.image_size = 32
    config.epochs = 30
    config.batch_size = 128
    config.schedule.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.02
    config.augment.flip_horizontal = True
    config.augment.shift = 0.125

    plain = {"flip_horizontal": False, "shift": 0.0}
    config.per_model.linear.optimizer = {"learning_rate": 1e-4}
    config.per_model.linear.augment = plain
    config.per_model.mlp.optimizer = {"learning_rate": 3e-4}
    config.per_model.mlp.augment = plain
    config.per_model.cnn.model.dropout = 0.5
    config.per_model.cnn_deep.optimizer = {"learning_rate": 3e-3}
    return config
