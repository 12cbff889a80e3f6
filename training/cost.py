"""What a model costs, counted or measured on the device at hand, never guessed."""

import contextlib
import math
import time

import jax
import jax.numpy as jnp
from clu import parameter_overview

from models import Classifier
from models.classifier import split_model
from models.lowering import plain_lowering


def model_cost(model: Classifier, image_size: int) -> dict:
    """Returns parameters, multiply-adds of one image's forward pass, and the device."""
    return {
        "parameters": int(parameter_overview.count_parameters(split_model(model)[1])),
        "multiply_adds_per_image": multiply_adds(model, image_size),
        "device": devices_in_use(),
    }


def devices_in_use() -> str:
    """Returns how many devices there are, and of which kind."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def multiply_adds(model: Classifier, image_size: int) -> int:
    """Returns the multiply-adds of one image's forward pass, as published tables count them.

    Counted are matrix products and convolutions as the architecture states them, whatever is fast
    on this device. A model that compares images says its own.
    """
    if not model.trained_by_gradient:
        return int(model.multiply_adds())
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
    with plain_lowering():
        return _count(jax.make_jaxpr(lambda m, x: m(m.preprocess(x)))(model, image).jaxpr)


def _count(jaxpr) -> int:
    """Sums over the equations of a program, those of its parts and of repeated parts included."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        outputs = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            features = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
            total += outputs * math.prod(shapes[1]) // features
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # of a closed one
            if hasattr(inner, "eqns"):
                total += repeats * _count(inner)
    return total


def step_memory(step, *arguments, countable: bool = False) -> int | None:
    """Returns the bytes on each device that a jitted step takes; None where nothing says so.

    It compiles the step, which its first call then finds compiled. Donated arguments count once.
    On a CPU, XLA does not count what its library YNNPACK takes within the parts that it fuses, in
    predictions nearly everything: if `countable`, the step is compiled apart, without that library.
    """
    lowered, compiled = step.lower(*arguments), None
    if countable and jax.default_backend() == "cpu":
        with contextlib.suppress(ValueError, RuntimeError):  # a version without such an option
            compiled = lowered.compile({"xla_cpu_experimental_ynn_fusion_type": ""})
    compiled = compiled or lowered.compile()
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(held - memory.alias_size_in_bytes)


class CompileTime:
    """Seconds in which this process traced, lowered or compiled; what overlaps counts once."""

    def __init__(self):
        self.spans: list[tuple[float, float]] = []  # disjoint, ascending
        self.seconds = 0.0

    def __call__(self, event: str, duration: float, **_) -> None:
        """Listens to JAX, which reports a duration when it ends."""
        if not event.startswith("/jax/core/compile/"):
            return
        end = time.monotonic()
        begin = end - duration
        while self.spans and self.spans[-1][1] > begin:  # a program traced within this one
            first, last = self.spans.pop()
            self.seconds -= last - first
            begin, end = min(begin, first), max(end, last)
        self.spans.append((begin, end))
        self.seconds += end - begin


COMPILING = CompileTime()
jax.monitoring.register_event_duration_secs_listener(COMPILING)


def working_time() -> float:
    """Returns the seconds of a clock that stands still while anything is compiled."""
    return time.monotonic() - COMPILING.seconds
