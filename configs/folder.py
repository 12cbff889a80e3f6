"""Any folder of images: root/<class>/..., or root/{train,val,test}/<class>/...

    python main.py --config=configs/folder.py --workdir=runs/mine --config.data.path=DATA

Parts that the folder has are kept; the missing ones are drawn from its training images. For a
first look at the data alone: python -m analysis.audit DATA

The result depends on DATA; linear, knn and mlp are there to be beaten.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(models: str = "") -> ConfigDict:
    """Returns the experiment; `models` chooses among them: configs/folder.py:linear,cnn."""
    config = base.get_config(models)
    config.data.split = (0.7, 0.15, 0.15)
    config.data.image_size = 64
    config.epochs = 30
    config.batch_size = 32
    config.early_stopping_patience = 8
    config.schedule.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.02

    augment = config.augment
    augment.flip_horizontal = True
    augment.rotation = 5.0
    augment.zoom = 0.15
    augment.shift = 0.1
    augment.brightness = 0.2
    augment.contrast = 0.2

    plain = {name: type(augment[name])() for name in augment if not name.startswith("crop")}
    config.per_model.linear.optimizer = {"learning_rate": 1e-4}
    config.per_model.linear.augment = plain
    config.per_model.mlp.optimizer = {"learning_rate": 3e-4}
    config.per_model.mlp.augment = plain
    config.per_model.cnn.model.dropout = 0.5
    config.per_model.cnn_deep.optimizer = {"learning_rate": 2e-3}
    return config
