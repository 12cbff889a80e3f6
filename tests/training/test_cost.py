import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import MODELS
from models.lowering import plain_lowering
from tests.models.filled import unfilled
from training.cost import CompileTime, model_cost, multiply_adds, step_memory, working_time

PUBLISHED = {  # 10^9 multiply-adds with 1,000 classes, as the papers, torchvision or timm say
    "vgg16": (15.5, 224),
    "vgg16_bn": (15.5, 224),
    "vgg19": (19.6, 224),
    "resnet18": (1.81, 224),
    "resnet34": (3.66, 224),
    "resnet50": (4.09, 224),
    "resnet101": (7.80, 224),
    "resnet152": (11.51, 224),
    "efficientnet_b0": (0.39, 224),
    "efficientnet_b1": (0.69, 240),
    "efficientnet_b2": (1.0, 260),
    "efficientnet_b3": (1.83, 300),
    "mobilenet_v2": (0.30, 224),
    "vit_s16": (4.6, 224),
    "vit_b16": (17.56, 224),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_are_the_published_ones(name):
    published, size = PUBLISHED[name]
    counted = multiply_adds(unfilled(name, 1000, size), size)
    assert counted == pytest.approx(published * 1e9, rel=0.015)


def test_multiply_adds_by_hand():
    assert multiply_adds(unfilled("linear", 10, 8), 8) == 192 * 10
    mlp = unfilled("mlp", 10, 8, hidden=(50, 20))
    assert multiply_adds(mlp, 8) == 192 * 50 + 50 * 20 + 20 * 10
    cnn = 32 * 32 * 27 * 32 + 16 * 16 * 288 * 64 + 8 * 8 * 64 * 128 + 128 * 6
    assert multiply_adds(unfilled("cnn", 6, 32), 32) == cnn
    side, deep = 32, 256 * 256 + 256 * 6
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
        deep += side * side * 9 * (inputs * outputs + outputs * outputs)
        side //= 2
    assert multiply_adds(unfilled("cnn_deep", 6, 32), 32) == deep


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_do_not_depend_on_the_device(monkeypatch, name):
    """On a CPU, convolutions and products have lowerings of their own.

    Of networks with many equal blocks there are fewer here: whole ones are above.
    """
    model, counted, lowered = unfilled(name, 6, 64, shallow=True), [], []
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda b=backend: b)
        counted.append(multiply_adds(model, 64))
        if model.trained_by_gradient:
            program = str(jax.make_jaxpr(lambda m, x: m(m.preprocess(x)))(model, image))
            lowered.append("custom_vjp" in program)
    assert counted[0] == counted[1]
    if model.trained_by_gradient:  # both lowerings were there to be told apart
        assert lowered == [True, False]


def test_the_plain_lowering_ends_with_its_block():
    model, image = unfilled("mobilenet_v2", 3, 32), jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")

    def convolutions():
        return str(jax.make_jaxpr(lambda m, x: m(x))(model, image)).count("conv_general_dilated[")

    before = convolutions()
    with plain_lowering():
        assert convolutions() == 52  # as many as the paper's table has
    assert convolutions() == before < 52


def test_groups_and_loops_are_counted():
    class Grouped(MODELS["linear"]):
        def features(self, images):
            conv = nnx.Conv(3, 3, (3, 3), feature_group_count=3, rngs=nnx.Rngs(0))
            once = conv(images)  # 4 * 4 places, 3 channels, 9 taps each
            return jax.lax.map(lambda row: row @ jnp.ones((3, 3)), once)[..., :3]

    model = Grouped(2, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert multiply_adds(model, 4) == 4 * 4 * 3 * 9 + 4 * 4 * 3 * 3 + 48 * 2


def test_cost_names_the_device():
    cost = model_cost(unfilled("cnn", 6, 8), 8)
    assert cost["device"] == "1 x cpu" and cost["parameters"] > 0


def test_the_memory_of_a_step_counts_donated_arrays_once():
    x, y = jnp.ones((100, 100)), jnp.ones((100, 100))
    plain = step_memory(jax.jit(lambda x, y: x + y), x, y)
    assert plain == 3 * 40_000
    assert step_memory(jax.jit(lambda x, y: x + y, donate_argnums=0), x, y) == 2 * 40_000


def test_a_step_whose_memory_is_unknown_has_none():
    class Step:
        def lower(self, *_):
            return self

        compile = lower

        def memory_analysis(self):
            return None

    assert step_memory(Step(), 1) is None


def test_time_of_compiling_counts_overlaps_once(monkeypatch):
    now = iter([3.0, 5.0, 10.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    compiling, event = CompileTime(), "/jax/core/compile/jaxpr_trace_duration"
    compiling(event, 1.0)  # 2 to 3
    compiling(event, 4.5)  # 0.5 to 5, around it
    assert compiling.seconds == pytest.approx(4.5)
    compiling(event, 2.0)  # 8 to 10
    compiling("/jax/other", 100.0)
    compiling(event, 3.0)  # 9 to 12
    assert compiling.seconds == pytest.approx(4.5 + 4)


def test_the_clock_stands_still_while_a_program_is_compiled():
    def slow(x):  # many different shapes: seconds of compiling, milliseconds of work
        return sum(
            jnp.fft.fft(jnp.tile(x, n)).real.sum() * jnp.sin(n * x).sum() for n in range(1, 40)
        )

    x, real, working = jnp.ones(7), time.monotonic(), working_time()
    jax.jit(slow)(x).block_until_ready()
    real, working = time.monotonic() - real, working_time() - working
    assert real > 0.3 and 0 <= working < 0.3 * real
