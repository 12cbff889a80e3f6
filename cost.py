"""What a model costs, counted or measured on the device at hand, never guessed."""

import resource
import sys

import jax
import jax.numpy as jnp
from clu import parameter_overview

from models import Classifier
from models.classifier import merge_model, split_model


def model_cost(model: Classifier, image_size: int) -> dict:
    """Returns parameters, FLOPs of one image's forward pass (None if unknown), and the device."""
    devices = jax.devices()
    return {
        "parameters": int(parameter_overview.count_parameters(split_model(model)[1])),
        "flops_per_image": flops_per_image(model, image_size),
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }


def flops_per_image(model: Classifier, image_size: int) -> float | None:
    """Returns the floating-point operations of one forward pass, as XLA counts them.

    XLA counts the body of a loop once, so a model that loops says the number itself.
    """
    if not model.trained_by_gradient:
        return float(model.flops_per_image())
    _, params, stats = split_model(model)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)

    def forward(params: dict, stats: dict, images: jax.Array) -> jax.Array:
        merged = merge_model(model, params, stats)
        return merged(merged.preprocess(images))

    return (jax.jit(forward).lower(params, stats, image).cost_analysis() or {}).get("flops")


def peak_memory() -> dict:
    """Returns the most memory in use so far: of the first device, or of the process on a CPU."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host *= 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return {"peak_memory_bytes": peak or host, "peak_memory_of": "device" if peak else "process"}
