"""What a model costs, counted or measured on the device at hand, never guessed."""

import math
import resource
import sys

import jax
import jax.numpy as jnp
from clu import parameter_overview

from models import Classifier
from models.classifier import split_model


def model_cost(model: Classifier, image_size: int) -> dict:
    """Returns parameters, FLOPs of one image's forward pass, and the device."""
    devices = jax.devices()
    return {
        "parameters": int(parameter_overview.count_parameters(split_model(model)[1])),
        "flops_per_image": flops_per_image(model, image_size),
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }


def flops_per_image(model: Classifier, image_size: int) -> float:
    """Returns the floating-point operations of one image's forward pass.

    Counted are matrix products and convolutions, a multiply-add as two, as published tables do; so
    the number is the same on every device. A model that compares images says its own.
    """
    if not model.trained_by_gradient:
        return float(model.flops_per_image())
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
    return float(_count(jax.make_jaxpr(lambda m, x: m(m.preprocess(x)))(model, image).jaxpr))


def _count(jaxpr) -> int:
    """Sums over the equations of a program, those of its parts and of repeated parts included."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        outputs = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            features = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * outputs * math.prod(shapes[1]) // features
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # of a closed one
            if hasattr(inner, "eqns"):
                total += repeats * _count(inner)
    return total


def peak_memory() -> dict:
    """Returns the most memory in use so far: of the first device, or of the process on a CPU."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host *= 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return {"peak_memory_bytes": peak or host, "peak_memory_of": "device" if peak else "process"}
