"""The Intel scenes (buildings, forest, glacier, mountain, sea, street), from baselines up.

    python main.py --config=configs/intel.py --workdir=runs/intel --config.data.path=DATA

DATA is the folder that Kaggle's "Intel Image Classification" unpacks to, with seg_train/seg_train
and seg_test/seg_test, or any folder with train/<class> and test/<class>.

Measured at 64x64 pixels on 8,741 + 2,158 of the photos, 2 CPU cores (jax 0.10.2), 1 seed: test
accuracy cnn_deep 90.0 %, cnn 80.8, mlp 61.1, linear 49.6, knn 43.5. Baselines take a minute, cnn 6,
cnn_deep about 30. At the photos' own size: --config.data.image_size=150, with an accelerator.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(models: str = "") -> ConfigDict:
    """Returns the experiment; `models` chooses among them: configs/intel.py:cnn,cnn_deep."""
    config = base.get_config(models)
    config.data.split = (0.9, 0.1)  # of the training folder; the test folder is kept
    config.data.image_size = 64
    config.data.exclude_leaks = True  # some photos are in both folders, some under two names
    config.epochs = 12
    config.batch_size = 32
    config.schedule.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.02
    config.loss.label_smoothing = 0.05
    config.early_stopping_patience = 8

    augment = config.augment
    augment.flip_horizontal = True
    augment.rotation = 5.0
    augment.zoom = 0.15
    augment.shift = 0.1

    plain = {"flip_horizontal": False, "rotation": 0.0, "zoom": 0.0, "shift": 0.0}
    config.per_model.linear.optimizer = {"learning_rate": 1e-4}
    config.per_model.linear.augment = plain
    config.per_model.mlp.optimizer = {"learning_rate": 3e-4}
    config.per_model.mlp.model.dropout = 0.3
    config.per_model.mlp.augment = plain
    config.per_model.cnn.model.dropout = 0.5
    config.per_model.cnn_deep.optimizer = {"learning_rate": 3e-3}
    config.per_model.cnn_deep.epochs = 22
    return config
