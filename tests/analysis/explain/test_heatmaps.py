import jax.numpy as jnp
import numpy as np

from analysis.explain.heatmaps import View, draw_views, overlay
from analysis.explain.methods import explainer
from models import create_model
from tests.analysis.conftest import SIZE, corner_images


def test_a_map_of_zeros_is_shown_as_one():
    images, targets = corner_images(6, seed=1)
    model = create_model("cnn", 3, image_size=SIZE)
    head = model.stages[-1].layers[4].kernel
    head.set_value(jnp.zeros_like(head[...]))
    heat = explainer(model, SIZE)(images, targets)
    assert not heat.any()
    shown = overlay(images[0], heat[0])
    assert np.isfinite(shown).all() and np.ptp(shown, axis=-1).max() < 1e-6  # grey
    figure = draw_views([[View("a $ sign", images[0], heat[0]), None]], ["name"])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["map is zero: no\npositive evidence"]
    assert figure.axes[0].get_title() == r"a \$ sign"
