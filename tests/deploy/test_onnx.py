"""The ONNX converter: families of networks, single operations, and the shape of the graph."""

import functools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import nnx
from jax import lax

from deploy import onnx_graph, onnx_ops
from deploy.load import _read_onnx
from deploy.onnx_convert import to_onnx
from errors import UserError
from models.classifier import Classifier
from models.cnn import Cnn
from models.cnn_deep import CnnDeep
from models.efficientnet import EfficientNetB0, EfficientNetLite0
from models.knn import Knn
from models.layers import PooledLinear, conv
from models.linear import Linear
from models.mlp import Mlp
from models.resnet import ResNet50
from models.vgg import Vgg16Bn
from models.vit import VitS16
from tests.deploy.parity import FACTS, compare, photos, random_model

# One member of each family with all that its family has, but few layers.
PLAN = {"plan": ((1, 8, 1, 1, 3), (6, 8, 2, 2, 5))}
SHORT = {
    "resnet": (ResNet50, {"blocks": (1, 1)}, {"form": "keras"}),
    "efficientnet": (EfficientNetB0, PLAN | {"width": 0.3}, {"form": "tf"}),
    "efficientnet_lite": (EfficientNetLite0, PLAN, {}),
    "vgg": (Vgg16Bn, {"blocks": (1, 1, 1, 1, 1)}, {"hidden": 8}),
    "vit": (VitS16, {"depth": 1, "width": 32, "heads": 2}, {}),
    "cnn": (Cnn, {}, {}),
    "cnn_deep": (CnnDeep, {}, {}),
    "linear": (Linear, {}, {}),
    "mlp": (Mlp, {}, {"hidden": (5, 4)}),
    "knn_l1": (Knn, {}, {"metric": "l1"}),
    "knn_l2": (Knn, {}, {"metric": "l2"}),
}
SIZES = {
    "cnn": 13,
    "cnn_deep": 18,
    "linear": 5,
    "mlp": 5,
    "knn_l1": 4,
    "knn_l2": 6,
    "mobilenet": 32,
}


def short(name: str) -> tuple[Classifier, int]:
    """A network of a family, and the size of its images."""
    architecture, fields, options = SHORT[name]
    size = SIZES.get(name, 48)
    return random_model(type("Short", (architecture,), fields), size, **options), size


def ops_of(content: bytes) -> Counter:
    return Counter(node.op_type for node in onnx.load_from_string(content).graph.node)


@pytest.mark.parametrize("name", SHORT)
def test_programs_of_every_family_answer_as_the_network_does(tmp_path, monkeypatch, name):
    model, size = short(name)
    monkeypatch.setenv("ARCHCOMPARE_LOWERING", "plain")  # patches else take seconds to compile
    forms = ("onnx", "stablehlo") if name in ("vit", "knn_l2") else ("onnx",)
    count = 9 if len(forms) == 1 else 7  # of one batch size, where each takes seconds to compile
    found = compare(model, size, photos(count, size), tmp_path, forms)
    for form, proof in found.items():
        assert proof["relative_difference"] < 1e-4, form
        assert proof["changed_predictions"] == 0
        assert proof["batch_sizes"] == sorted({1, 7, count})


def converted(model: Classifier, size: int) -> bytes:
    from analysis.answers import answers

    return to_onnx(lambda images: answers(model, images), size)


def test_a_convolutional_network_becomes_what_one_would_write_by_hand():
    content = converted(*short("cnn_deep"))
    nodes = onnx.load_from_string(content).graph.node
    head = "Transpose Cast Add" + 2 * " Conv Relu"
    assert [n.op_type for n in nodes][:7] == head.split()
    found = ops_of(content)
    assert found["Conv"] == 8 and found["Relu"] == 9 and found["MaxPool"] == 4
    assert found["Gemm"] == 3  # two of the head, and the projection of the features
    assert not found.keys() & {"Mul", "Div", "Sub", "BatchNormalization", "ReduceMean"}
    assert found["Transpose"] == 1 and found["GlobalAveragePool"] == 1


def test_clipping_attention_and_normalisation_are_single_nodes():
    assert ops_of(converted(*short("efficientnet_lite")))["Clip"] == 7
    found = ops_of(converted(*short("vit")))
    assert found["Softmax"] == found["Gelu"] == 1 and found["LayerNormalization"] == 3
    assert not found.keys() & {"Exp", "Erf", "Sqrt", "ReduceMax", "Einsum"}


# --- operations -----------------------------------------------------------------------------------


def body(total, row):
    return total + row.sum(), row * total


def quarters(x):
    """[B, 6, 4, C] as [B, 3, 2, 2, 2, C]."""
    return x.reshape(x.shape[0], 3, 2, 2, 2, x.shape[-1])


OPERATIONS = {
    "arithmetic": lambda x: (3.0 - x) / (x + 2.0) - 5.0 / (x + 1.0) + (-x) ** 3 + x**-1.5,
    "per_channel": lambda x: (x * jnp.array([1.0, 2, 3]) - jnp.array([3.0, 0, 1])) * 0.5 + 1,
    "per_row": lambda x: x * jnp.arange(6.0)[:, None, None] + jnp.arange(4.0)[:, None],
    "two_per_axis": lambda x: (x + jnp.array([1.0, 2, 3])) * jnp.arange(4.0)[:, None],
    "after_a_sum": lambda x: [
        jnp.sum(x, axis=2) * 0.25 + jnp.mean(x, axis=(1, 2))[:, None],
        (x.sum(3) * jnp.arange(6.0)[:, None])[..., None] + x,
    ],
    "sums": lambda x: [x.sum((1, 2)), x.mean((1, 2), keepdims=True), x.sum(3), x.prod(1), x.min(2)],
    "means": lambda x: [
        x.mean((1, 2, 3)),
        x.var(axis=(1, 2)),
        x.sum(axis=(1, 2)) / 3,
        x.max(axis=3),
    ],
    "smooth": lambda x: [jax.nn.gelu(x), jax.nn.gelu(x, approximate=False), jax.nn.silu(x)],
    "softmaxes": lambda x: [
        jax.nn.softmax(x, axis=1),
        jax.nn.log_softmax(x),
        jax.nn.logsumexp(x, 2),
        jnp.exp(x - x.max(1, keepdims=True)) / jnp.exp(x - x.min(1, keepdims=True)).sum(1)[:, None],
    ],
    "functions": lambda x: [
        f(x) for f in (jnp.log1p, jnp.expm1, jnp.exp2, lax.rsqrt, jnp.sin, jnp.ceil)
    ],
    "more_functions": lambda x: [
        lax.erfc(x),
        lax.erf(x),
        jnp.tanh(x),
        jnp.sign(x),
        jnp.floor(x),
        -x,
    ],
    "angles": lambda x: [f(x) for f in (jnp.cos, jnp.tan, jnp.arcsin, jnp.arccos, jnp.arctan)],
    "hyperbolic": lambda x: [
        jnp.sinh(x),
        jnp.cosh(x),
        x ** (x + 1),
        abs(x - 0.5),
        (x > 0.5) ^ (x < 0.6),
    ],
    "comparisons": lambda x: [
        jnp.where(x > 0.5, x, 2 * x),
        x != 0.5,
        (x < 0.3) & ~(x >= 0.2),
        x == x,
    ],
    "clipped": lambda x: [
        jnp.clip(x, 0.2, 0.7),
        jnp.minimum(nnx.relu(x), 0.4),
        nnx.relu6(9 * x),
        jnp.minimum(nnx.relu(x - 0.5) * 2, 0.5),
        jnp.minimum(nnx.relu(x - 0.5) + 1, 1.2),
    ],
    "normalised": lambda x: (
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)
    ),
    "parts": lambda x: [
        x[:, 1:5:2],
        x[:, :, ::-1],
        x[:, :, 1],
        x[..., ::-1],
        *jnp.split(x, 2, axis=2),
    ],
    "padded": lambda x: [
        jnp.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0)), constant_values=2.0),
        jnp.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0)), mode="edge"),
    ],
    "negative_pad": lambda x: lax.pad(x, 1.0, ((0, 0, 0), (-1, 2, 0), (0, -1, 0), (0, 0, 0))),
    "joined": lambda x: jnp.concatenate([x, jnp.ones((x.shape[0], 2, 4, 3)), x.swapaxes(1, 1)], 1),
    "turned": lambda x: [
        x.transpose(0, 2, 1, 3) + 1,
        x.reshape(x.shape[0], 12, 6),
        x.swapaxes(1, 3),
    ],
    "flat": lambda x: x.reshape(x.shape[0], -1) @ jnp.arange(144.0).reshape(72, 2) - 1,
    "flat_twice": lambda x: x.reshape(x.shape[0], -1) * 2 + jnp.arange(72.0),
    "broadcast": lambda x: jnp.broadcast_to(x[:, :1], x.shape) + jnp.zeros((x.shape[0], 1, 4, 3)),
    "products": lambda x: [
        jnp.einsum("bhwc,bhvc->bhwv", x, x),
        jnp.einsum("bhwc,bhvd->bwcvd", x, x),
    ],
    "by_rows": lambda x: jnp.einsum("ih,bhwc,jw->bijc", jnp.ones((2, 6)), x, jnp.ones((3, 4))),
    "from_the_left": lambda x: jnp.tensordot(jnp.arange(12.0).reshape(2, 6), x, axes=(1, 1)),
    "best": lambda x: [*lax.top_k(x, 2), x.argmax(2), x.argmin(axis=1), jnp.cumsum(x, axis=2)],
    "taken": lambda x: [
        jnp.arange(8.0)[(7 * x + 0.001).astype(int)],
        x.swapaxes(0, 1)[jnp.array([4, 0, -1])],
    ],
    "classes": lambda x: jax.nn.one_hot((3 * x + 0.001).astype(int), 4) * jnp.arange(4.0),
    "moving_part": lambda x: lax.dynamic_slice_in_dim(x, (x.max() * 9).astype(int), 2, axis=1),
    "loop": lambda x: lax.scan(body, 0.5 * x.max(), x.swapaxes(0, 1)),
    "pooled": lambda x: [
        nnx.max_pool(x, (3, 2), (2, 2), "SAME"),
        nnx.avg_pool(x, (2, 2), (1, 1), "SAME"),
    ],
    "checkpointed": lambda x: jax.checkpoint(lambda y: jnp.sin(y) * 2)(x),
    "random_and_unused": lambda x: (jax.random.split(jax.random.key(0)), x)[1],
    "quarters": lambda x: [
        quarters(x).sum(axis=(2, 4)),
        quarters(nnx.relu(x - 0.5)).max(axis=(2, 4)),
        (quarters(x) * -2 + 1).max(axis=(2, 4)),
        (quarters(x) * 2 + 1).sum(axis=(2, 4)),
    ],
    "patches": lambda x: [
        quarters(y).swapaxes(2, 3).reshape(x.shape[0], 6, 12)
        for y in (x * 2 - 1, (x - jnp.array([0.1, 0.2, 0.3])) / jnp.array([0.5, 0.6, 0.7]))
    ],
}


CONVOLUTIONS = ["convolution", "valid", "no_scale", "grouped", "used_twice", "own_kernel"]


def pixels(images):
    """What operations are tested on: [B, 6, 4, 3] between 0 and 1, more than 0."""
    return (images.astype(jnp.float32) + 1) / 300


@pytest.fixture(scope="module")
def operations():
    """All operations in one graph, and the answers of JAX and of ONNX Runtime."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 3, 6)), jnp.float32)
    grouped = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 1, 6)), jnp.float32)
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = functools.partial(lax.conv_general_dilated, dimension_numbers=layout)
    scale = jnp.array([2.0, 0.0, -1.0])
    more = {
        "convolution": lambda x: convolve(x * 3 - 1, kernel, (2, 1), "SAME") * jnp.arange(6.0) - 2,
        "valid": lambda x: convolve(x * scale + 1, kernel, (1, 1), "VALID") + jnp.arange(6.0),
        "no_scale": lambda x: convolve(x * scale + 1, kernel, (1, 1), "SAME"),
        "grouped": lambda x: convolve(
            x * jnp.array([1.0, 2, 3]) - 1, grouped, (1, 1), "SAME", rhs_dilation=(2, 1),
            feature_group_count=3),
        "used_twice": lambda x: (lambda y: [y * 2 + 1, nnx.relu(y)])(convolve(x, kernel, (1, 1), "SAME")),
        "own_kernel": lambda x: convolve(x, x.max(0)[:2, :2, :, None], (1, 1), "VALID"),
    }  # fmt: skip
    assert list(more) == CONVOLUTIONS
    table = OPERATIONS | more

    def every(images):
        x = pixels(images[:, :, :4])
        return {
            f"{name}.{i}": leaf * 1
            for name, function in table.items()
            for i, leaf in enumerate(jax.tree.leaves(function(x)))
        }

    images = np.random.default_rng(2).integers(0, 256, (5, 6, 6, 3), np.uint8)
    content = to_onnx(every, 6)
    content = onnx_graph.with_metadata(content, {"archcompare": json.dumps(FACTS)})
    quick = {"xla_backend_optimization_level": 0}  # to compile, and exact
    return content, images, jax.jit(every, compiler_options=quick)(images)


@pytest.mark.parametrize("name", [*OPERATIONS, *CONVOLUTIONS])
def test_operations_give_what_jax_gives(operations, answered, name):
    wanted = {key: value for key, value in operations[2].items() if key.startswith(f"{name}.")}
    assert wanted
    for key, value in wanted.items():
        found = answered[key]
        assert found.dtype == value.dtype and found.shape == value.shape, key
        np.testing.assert_allclose(found, value, rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.fixture(scope="module")
def answered(operations, tmp_path_factory):
    content, images, _ = operations
    file = tmp_path_factory.mktemp("operations") / "model.onnx"
    file.write_bytes(content)
    return _read_onnx(file, 1).answer(images)


# --- what cannot be -------------------------------------------------------------------------------


class Sorting(Classifier):
    """A network with an operation that has no form in ONNX."""

    def __init__(self, num_classes, image_size, *, dtype, rngs):
        first = nnx.Sequential(conv(3, 4, 3, dtype=dtype, rngs=rngs), sort_rows)
        self.stages = nnx.List([first, PooledLinear(4, num_classes, 0.0, rngs)])


def sort_rows(x):
    return jnp.sort(x, axis=1)


def test_an_operation_that_onnx_lacks_is_named_with_its_place_and_the_cure():
    model = random_model(Sorting, 8)
    with pytest.raises(UserError, match=r"sort in sort_rows \(deploy/test_onnx.py:\d+\)") as caught:
        converted(model, 8)
    assert "--format=stablehlo or --format=safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: lax.fori_loop(0, 3, lambda i, y: y * 1.1 + i, x), "a loop along no array"),
        (lambda x: (x.astype(jnp.bfloat16) * 2).astype(jnp.float32), "bfloat16"),
        (lambda x: x + jax.random.normal(jax.random.key(0), (3,)), "random keys"),
        (lambda x: jnp.sin(x), r"sin in <lambda> .*KeyError\('a mistake of ours'\)"),
    ],
)
def test_what_cannot_be_written_is_a_mistake_and_no_traceback(monkeypatch, function, message):
    def mistaken(*_):
        raise KeyError("a mistake of ours")

    monkeypatch.setitem(onnx_ops.TABLE, "sin", mistaken)
    with pytest.raises(UserError, match=message) as caught:
        to_onnx(lambda images: {"y": function(pixels(images))}, 4)
    assert "--format=stablehlo" in str(caught.value)


def test_a_file_that_would_be_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(onnx_graph, "LIMIT", 2**24 + 100)
    with pytest.raises(UserError, match=r"a file of more than 2 GB \(0.0 GB of weights\)"):
        converted(*short("mlp"))


def test_every_handler_belongs_to_an_operation_of_jax():
    known = {p.name for p in vars(lax).values() if isinstance(p, jax.extend.core.Primitive)}
    made = {"softmax", "gelu", "layer_norm"}
    unknown = set(onnx_ops.TABLE) - made - known
    assert unknown <= {"add_any", "copy", "expand_dims", "optimization_barrier", "stop_gradient"}
