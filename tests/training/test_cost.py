import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import create_model
from training.cost import flops_per_image, model_cost, peak_memory


def test_flops_by_hand():
    linear = create_model("linear", 10, image_size=8)
    assert flops_per_image(linear, 8) == 2 * 192 * 10
    cnn = 2 * (32 * 32 * 27 * 32 + 16 * 16 * 288 * 64 + 8 * 8 * 64 * 128 + 128 * 6)
    assert flops_per_image(create_model("cnn", 6, image_size=32), 32) == cnn


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_flops_do_not_depend_on_the_lowering(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    model = create_model("cnn_deep", 6, image_size=32)
    side, expected = 32, 0
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
        expected += 2 * side * side * 9 * (inputs * outputs + outputs * outputs)
        side //= 2
    assert flops_per_image(model, 32) == expected + 2 * (256 * 256 + 256 * 6)


def test_groups_and_loops_are_counted():
    class Grouped(type(create_model("linear", 2, image_size=4))):
        def features(self, images):
            conv = nnx.Conv(3, 3, (3, 3), feature_group_count=3, rngs=nnx.Rngs(0))
            once = conv(images)  # 4 * 4 places, 3 channels, 9 taps each
            return jax.lax.map(lambda row: row @ jnp.ones((3, 3)), once)[..., :3]

    model = Grouped(2, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert flops_per_image(model, 4) == 2 * (4 * 4 * 3 * 9 + 4 * 4 * 3 * 3 + 48 * 2)


def test_cost_names_the_device():
    cost = model_cost(create_model("cnn", 6, image_size=8), 8) | peak_memory()
    assert cost["device"] == "1 x cpu" and cost["peak_memory_of"] == "process"
    assert cost["peak_memory_bytes"] > 50e6
