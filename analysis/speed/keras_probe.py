"""Linear probes in Keras the usual way: a frozen network with a new head, and `fit` for every seed.

python -m analysis.speed.keras_probe '{"data": DATA, "models": ["resnet50"], "image_size": 64, ...}'
"""

import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from keras import layers
from PIL import Image

from analysis.speed.keras_peer import APPLICATIONS


def main() -> None:
    """Trains every model with every seed; prints their accuracies."""
    options = json.loads(sys.argv[1])
    size = options["image_size"]
    files = sorted(path for path in Path(options["data"]).rglob("*") if path.is_file())
    names = sorted({path.parent.name for path in files})
    labels = np.array([names.index(path.parent.name) for path in files])
    images = np.stack([read(path, size) for path in files])
    order = np.random.default_rng(0).permutation(len(files))
    ends = [round(len(files) * fraction) for fraction in (0.7, 0.85)]
    train, validation, test = ((images[r], labels[r]) for r in np.split(order, ends))
    for name in options["models"]:
        application = getattr(keras.applications, APPLICATIONS[name])
        for seed in range(options["seeds"]):
            keras.utils.set_random_seed(seed)
            base = application(
                include_top=False, weights=None, pooling="avg", input_shape=(size, size, 3)
            )
            base.trainable = False
            scale = layers.Rescaling(1 / 127.5, offset=-1.0)
            head = layers.Dense(len(names))
            model = keras.Sequential([layers.Input((size, size, 3)), scale, base, head])
            model.compile(
                optimizer=keras.optimizers.AdamW(1e-3, weight_decay=1e-4),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
            sizes = {"batch_size": options["batch_size"], "verbose": 0}
            model.fit(*train, validation_data=validation, epochs=options["epochs"], **sizes)
            print(f"{name} seed {seed}: {model.evaluate(*test, **sizes)[1]:.4f}", flush=True)


def read(path: Path, size: int) -> np.ndarray:
    """Returns a photo as uint8 [S, S, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


if __name__ == "__main__":
    main()
