"""From one config to a grid of checked runs: models x variants x sweep x seeds x folds."""

import itertools
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from errors import UserError, choose
from experiment.checks import check_compare, check_config, check_search, check_taught, teachers_of
from experiment.fields import (
    GRID_FIELDS,
    Text,
    assign,
    flatten,
    get,
    parse,
    phase_names,
    split_values,
    stored_config,
    unflatten,
)
from experiment.files import read_json
from models import MODELS, fields_of

# Fields that some versions did not store, and the value under which a run is the same without.
AS_BEFORE = {
    "keep_optimizer": False,
    "select": "loss",
    "data.layout": "auto",
    "data.store_size": 0,
    "data.max_pixels": 100_000_000,
    "data.train_fraction": 1.0,
    "data.folds": 0,
    "data.fold": 0,
    "try_learning_rates": [],
    "try_weight_decays": [],
    "predict_test": True,
    "distill.teacher": "",
    "distill.temperature": 4.0,
    "distill.weight": 0.9,
}
# Fields that cannot change a result, beside all of `runtime`; the data are known by what they are.
FREE = ("eval_batch_size", "data.source", "data.path", "data.tfds_dir")


@dataclass(frozen=True)
class Run:
    """One model trained once: `name` is its folder in the workdir, `config` all it depends on."""

    name: str
    config: ConfigDict


def expand(
    config: ConfigDict,
    overrides: dict[str, Any] | None = None,
    chosen: dict[str, dict[str, Any]] | None = None,
) -> list[Run]:
    """Returns the runs of models x variants x sweep x seeds x folds, each with its checked config.

    Args:
      config: an experiment as `configs/base.py` describes it.
      overrides: what the command line set, by dotted path, values or `Text`; it wins over the
        file's `per_model`.
      chosen: what a search chose, fields by dotted path, by `label_of`; it wins over all of these.

    Raises:
      UserError: an unknown model or field, or a value out of range.
    """
    runs = []
    for model, variant in pairs(config):
        found = (chosen or {}).get(label_of(model, variant.name), {})
        settings = run_config(config, model, variant, overrides or {}, found)
        check_config(settings)
        _check_filled(settings)
        suffix = suffix_of(settings.variant)
        for seed, fold in itertools.product(config.seeds, range(max(1, settings.data.folds))):
            name = f"fold{fold}_" * bool(settings.data.folds) + f"seed{seed}"
            runs.append(Run(f"{model}/{name}{suffix}", with_seed(settings, seed, fold)))
    if len({run.config.data.folds for run in runs}) > 1:
        raise UserError(
            "config.data.folds differs between runs, which would be tested on other images: give "
            "all models and variants the same"
        )
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"config.sweep: two points share a name: {config.sweep!r}")
    for path in overrides or {}:
        _check_use(path, config, runs, "command line")
    for path in axes_of(config.sweep):
        _check_use(path, config, runs, "sweep")
    return runs


def pairs(config: ConfigDict) -> list[tuple[str, "Variant"]]:
    """Returns every model with each of its variants at each point of the sweep."""
    models = [name.strip() for item in config.models for name in item.split(",")]
    _check_grid(config, models)
    return [(model, variant) for model in models for variant in _variants(config, model)]


def suffix_of(variant: str) -> str:
    """Returns what a variant adds to the name of a folder, "" for none."""
    return "_" * bool(variant) + re.sub(r"[^\w.=+-]+", "_", variant)


def label_of(model: str, variant: str) -> str:
    """Returns the folder of what a model and variant's search tried: `cnn`, `cnn_<variant>`."""
    return model + suffix_of(variant)


def _check_filled(settings: ConfigDict) -> None:
    """Refuses a value of the fields that only the grid and a search fill in."""
    if settings.data.fold:
        raise UserError(
            f"config.data.fold={settings.data.fold}: the grid makes a run of every fold: "
            "say how many with config.data.folds alone"
        )
    if not settings.predict_test:
        raise UserError("config.predict_test=False is of a search's trials, which do not count")


def _check_use(path: str, config: ConfigDict, runs: list[Run], where: str) -> None:
    """Raises a UserError if a model or a phase that a path names is in no run.

    A phase that the file has may be unused, as with other weights than it is for: a line says so.
    """
    model, phase = re.match(r"(?:per_model\.(\w+)(?:\.|$))?(?:phase\.(\w+))?", path).groups()
    if model:
        choose(f"{where}: {path}", model, dict.fromkeys(run.config.model.name for run in runs))
        if path == f"per_model.{model}":
            raise UserError(f"{where}: {path} is a section: name one field of it")
    suited = [run.config for run in runs if model in (None, run.config.model.name)]
    known = dict.fromkeys(name for settings in suited for name in phase_names(settings))
    if phase and phase not in known:
        text = f"{where}: {path}: no run has a phase {phase!r}"
        if phase not in config.phase or where == "sweep":
            raise UserError(f"{text}: name it in config.phases, which is {','.join(known)} here")
        print(f"note: {text}; it changes nothing", file=sys.stderr)


def _check_grid(config: ConfigDict, models: list[str]) -> None:
    for what, values in (("models", models), ("seeds", list(config.seeds))):
        if not values:
            raise UserError(f"config.{what} is empty: name at least one")
        if len(set(values)) < len(values):
            raise UserError(f"config.{what} names something twice: {values}")
    for name in (*models, *config.per_model):
        choose("model", name, MODELS)
    for seed in config.seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
            raise UserError(f"config.seeds: {seed!r} is not a whole number from 0 to 2**31 - 1")
    check_compare(config.compare, models)
    check_search(config.search, config.seeds)


@dataclass(frozen=True)
class Variant:
    """A named set of changes: one of `config.variants` at one point of the sweep."""

    name: str
    changes: dict[str, Any]  # by dotted path
    swept: dict[str, Text]  # likewise


def axes_of(text: str, where: str = "config.sweep") -> dict[str, list[str]]:
    """Returns the values of each field of a text "a.b=1,2; c=(1,2),(3,4); d='x,y',z"."""
    axes = {}
    for part in split_values(text, ";"):
        path, equals, listed = part.partition("=")
        path, values = path.strip(), split_values(listed, ",")
        if not equals or not values:
            raise UserError(f"{where}: {part!r} is not of the form field=value,value")
        if path in axes:
            raise UserError(f"{where} names {path} twice: {text!r}")
        axes[path] = values
    return axes


def _variants(config: ConfigDict, model: str) -> list[Variant]:
    """Returns every named variant at every point of the sweep, as far as it is of a model."""
    axes = []
    for path, values in axes_of(config.sweep).items():
        if path.startswith("per_model."):
            _, name, path = f"{path}..".split(".", 2)
            choose("sweep: per_model", name, MODELS)
            if name != model:
                continue
            path = path.rstrip(".")
        names = _teacher_names(values) if path == "distill.teacher" else values
        axes.append([(path, Text(value), name) for value, name in zip(values, names, strict=True)])
    variants = []
    for name, changes in (config.variants.to_dict() or {"": {}}).items():
        for point in itertools.product(*axes):
            texts = [f"{path.split('.')[-1]}={shown}" for path, _, shown in point]
            name_of_point = ", ".join(filter(None, [name, *texts]))
            swept = {path: value for path, value, _ in point}
            variants.append(Variant(name_of_point, flatten(changes), swept))
    return variants


def _teacher_names(values: list[str]) -> list[str]:
    """Returns short names of values of `distill.teacher`, the last two parts of each path.

    A name depends on its value alone: it is that of a run, which a longer sweep must find again.
    """
    groups = [teachers_of(str(parse(value, "", "distill.teacher", "sweep"))) for value in values]
    names = ["+".join("/".join(path.parts[-2:]) for path in group) for group in groups]
    names = [re.sub(r"\{(seed|fold)\}", "*", name) or "none" for name in names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"config.sweep: two values of distill.teacher would be called {twice[0]!r}: use "
            "another --workdir for one of them, or name them in config.variants of a config's file"
        )
    return names


def run_config(
    config: ConfigDict,
    model: str,
    variant: Variant,
    overrides: dict[str, Any],
    chosen: dict[str, Any],
) -> ConfigDict:
    """Returns the config of one model and variant, without a seed; see configs/base.py."""
    settings = ConfigDict({k: v for k, v in config.to_dict().items() if k not in GRID_FIELDS})
    settings.model = ConfigDict({k: v for k, v in fields_of(model).items() if k != "form"})
    settings.model.name, settings.variant = model, variant.name
    phases = {name: flatten(section) for name, section in settings.phase.items()}

    def apply(changes: dict[str, Any], where: str, over_phases: bool = True) -> None:
        """Sets fields; a field for the whole run wins over phases unless a change names one."""
        for path, value in sorted(changes.items(), key=lambda item: item[0].startswith("phase.")):
            in_phase = re.fullmatch(r"phase\.(\w+)\.(.+)", path)
            field = in_phase[2] if in_phase else path
            if isinstance(value, Text):
                value = parse(value, get(settings, field, where), path, where)
            if in_phase:
                phases.setdefault(in_phase[1], {})[field] = value
                continue
            assign(settings, path, value, where)
            for phase in phases.values() if over_phases else ():
                phase.pop(path, None)

    prefix = f"per_model.{model}."
    # An element, as in `data.split[0]`, has been set in the config already.
    overrides = {p: v for p, v in overrides.items() if "[" not in p or isinstance(v, Text)}
    for_all = {p: value for p, value in overrides.items() if p.split(".")[0] not in GRID_FIELDS}
    for_model = {p[len(prefix) :]: value for p, value in overrides.items() if p.startswith(prefix)}
    apply(flatten(config.per_model.get(model, {})), f"per_model.{model}", over_phases=False)
    apply(for_all, "command line")
    apply(for_model, "command line")
    apply(variant.changes, f"variants.{variant.name}")
    apply(variant.swept, "sweep")
    apply(chosen, "config.search.space")

    if settings.phases == "auto":
        settings.phases = "all" if settings.weights == "none" else "head,tune"
    names = phase_names(settings)
    if not names or len(set(names)) < len(names):
        raise UserError(f"config.phases={settings.phases!r}: name each phase once, at least one")
    for name in names:
        choose("config.phases", name, phases)
    settings.phase = ConfigDict({name: unflatten(phases[name]) for name in names})
    return settings


def with_seed(settings: ConfigDict, seed: int, fold: int = 0) -> ConfigDict:
    """Returns the config of a run of that seed and fold."""
    config = ConfigDict(settings.to_dict())
    config.seed, config.data.fold = seed, fold
    for name, number in (("{seed}", seed), ("{fold}", fold)):
        config.distill.teacher = config.distill.teacher.replace(name, str(number))
    if config.data.train_fraction < 1:  # whose images depend on the seed
        config.data.train_seed = seed
    return config


def check_folds(workdir: Path, folds: int) -> None:
    """Raises a UserError if a workdir holds runs with folds where these have none, or without."""
    for path in workdir.glob("*/*seed*/config.json"):
        if (whole := path.parent.name.startswith("seed")) == bool(folds):
            raise UserError(
                f"{path.parent} is {'not ' * whole}a run of cross-validation, but config.data."
                f"folds={folds}: use another --workdir, or delete that run"
            )


def check_run_dir(run: Run, workdir: Path, cure: str = "", free: Iterable[str] = ()) -> None:
    """Refuses a run directory that belongs to another config.

    `runtime` may differ: it changes how a run is carried out, never its result. So may the fields
    that are `free`. `cure` takes the place of what is said to do.

    Raises:
      UserError: shows every field that differs.
    """
    path = workdir / run.name / "config.json"
    if not path.exists():
        return
    check_taught(path.parent)
    stored = AS_BEFORE | flatten(read_json(path))
    asked = AS_BEFORE | flatten(stored_config(run.config))
    lines = [
        f"  {key}: stored {stored.get(key, 'nothing')!r}, now {asked.get(key, 'nothing')!r}"
        for key in sorted(stored.keys() | asked.keys())
        if not key.startswith("runtime.")
        and key not in (*FREE, *free)
        and stored.get(key, "nothing") != asked.get(key, "nothing")
    ]
    if lines:
        cure = cure or (
            "Use another --workdir, delete that directory, or undo the change. To train on from "
            f"its weights, once complete: another --workdir, --config.weights=run:{path.parent}"
        )
        differs = "\n".join([f"{path.parent} holds a run of another config:", *lines])
        raise UserError(f"{differs}\n{cure}")


def family(name: str) -> tuple[str, str]:
    """Returns the model, and what follows seed and fold in the name of a run: its variant."""
    model, _, folder = name.partition("/")
    return model, re.sub(r"^(fold\d+_)?seed\d+_?", "", folder)


def shard(runs: list[Run], text: str) -> list[Run]:
    """Returns every n-th run for "i/n", i counted from 0; all of them for ""."""
    if not text:
        return runs
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard={text}: expected i/n with 0 <= i < n, such as 0/4")
    return runs[int(match[1]) :: int(match[2])]
