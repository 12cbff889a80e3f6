"""The machinery of a search, with a stand-in for training; and one search as a user meets it."""

import json
import sys
import threading
import time

import numpy as np
import pytest

from configs import digits
from errors import Interrupted, Pruned, UserError
from experiment import search as searching
from experiment.checks import TRIAL_SEED
from experiment.files import read_json, write_json
from experiment.grid import expand
from experiment.runner import Signals
from experiment.search import Search, search_cure
from experiment.study import mend
from tests.test_main import QUICK_REPORT, run

SPACE = "optimizer.learning_rate=log:1e-4..1e-1; optimizer.weight_decay=log:1e-5..1e-1"


class Killed(BaseException):
    """The process dies: nothing after it is done."""


class Never(Signals):
    requested = False

    def __init__(self):
        """Leaves the signals of the tests alone."""


def experiment(models="cnn", epochs=9, **options):
    config = digits.get_config(models)
    config.seeds, config.epochs = (0, 1), epochs
    config.search.update(options)
    return config


def loss_at(config):
    """The lower, the nearer the learning rate is to 0.01; seen with all digits."""
    return abs(float(np.log(config.optimizer.learning_rate / 0.01))) + config.optimizer.weight_decay


class Train:
    """Stands in for training: writes what a run directory holds; `fate` may decide otherwise."""

    def __init__(self, fate=lambda number: None, epochs=1):
        self.fate, self.epochs, self.seen = fate, epochs, []

    def __call__(self, config, run_dir, should_stop, watch):
        self.seen.append(run_dir.relative_to(run_dir.parents[2]).as_posix())
        assert not config.predict_test and config.seed == TRIAL_SEED + 0
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", json.loads(config.to_json()))
        fate = self.fate(int(run_dir.name.removeprefix("trial")))
        if isinstance(fate, BaseException):
            raise fate
        loss, lines = loss_at(config), []
        summary = {"status": fate or "complete", "cost": {"seconds": 2.0, "compile_seconds": 1.0}}
        try:
            for epoch in range(1, self.epochs + 1):
                scores = {"loss": loss + 1 / epoch, "accuracy": 1 / (2 + loss)}
                lines.append({"split": "validation", "epoch": float(epoch)} | scores)
                if watch:
                    watch(float(epoch), scores["loss"])
        except Pruned as error:
            summary |= {"status": "pruned", "error": str(error)}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run_dir / "metrics.jsonl").write_text(text)
        if summary["status"] == "complete":
            scores = {"loss": loss, "accuracy": 1 / (2 + loss), "count": 9}
            summary["metrics"] = {"validation": scores}
        elif summary["status"] == "diverged":
            summary["error"] = "not finite"
        write_json(run_dir / "summary.json", summary)
        return summary


def search(workdir, trials=6, models="cnn", train=None, overrides=None, **options):
    """Runs a search and returns the winners and search.json."""
    config = experiment(models, **options)
    found = Search(config, overrides or {}, workdir, trials)
    found.check()
    chosen = found.run(train or Train(), Never())
    return chosen, read_json(workdir / "search" / "search.json")


def parameters(content, label="cnn"):
    return [trial["parameters"] for trial in content["labels"][label]["trials"]]


@pytest.fixture
def optuna(monkeypatch):
    monkeypatch.setattr(searching, "WAIT", 0.01)
    return pytest.importorskip("optuna")


def test_without_optuna_the_command_that_installs_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[search\]'"):
        Search(experiment(), {}, tmp_path, 4)


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_every_model_gets_the_same_budget_and_its_winner_is_trained(optuna, tmp_path, method):
    train = Train()
    chosen, content = search(tmp_path, 7, "cnn,linear,knn", train, method=method)
    assert sorted(train.seen) == sorted(
        [f"search/{m}/trial{k}" for m in ("cnn", "linear") for k in range(7)] + ["search/knn/trial0"]
    )  # fmt: skip
    for label in ("cnn", "linear"):
        of = content["labels"][label]
        losses = [trial["loss"] for trial in of["trials"]]
        assert of["winner"] == np.argmin(losses) and of["budget"] == 7
        assert chosen[label] == of["trials"][of["winner"]]["parameters"]
        rates = [trial["parameters"]["optimizer.learning_rate"] for trial in of["trials"]]
        assert len(set(rates)) == 7 and all(1e-4 <= rate <= 1e-1 for rate in rates)
        assert of["trials"][0]["seconds"] == 3.0 and of["trials"][0]["epochs"] == 1.0
    assert chosen["knn"] == {} and content["method"] == method
    runs = {run.name: run.config for run in expand(experiment("cnn,linear,knn"), {}, chosen)}
    best = chosen["cnn"]["optimizer.learning_rate"]
    assert [runs[f"cnn/seed{k}"].optimizer.learning_rate for k in (0, 1)] == [best, best]
    assert runs["linear/seed1"].optimizer.learning_rate != best
    assert all(config.predict_test and config.seed in (0, 1) for config in runs.values())
    again = Train()
    assert search(tmp_path, 7, "cnn,linear,knn", again, method=method)[0] == chosen
    assert again.seen == []


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_killed_search_ends_as_one_that_was_not(optuna, tmp_path, method):
    """Exactly N trials count, and the one that died is tried again with the same fields."""
    _, whole = search(tmp_path / "whole", 9, method=method)
    for deaths in (0, 3, 7):
        train = Train(lambda number, last=deaths: Killed() if number == last else None)
        with pytest.raises(Killed):
            search(tmp_path / "killed", 9, train=train, method=method)
        assert train.seen[-1] == f"search/cnn/trial{deaths}"
    with open(tmp_path / "killed/search/journal.log", "ab") as journal:
        journal.write(b'{"op_code":4,"half')  # killed while it wrote
    train = Train()
    _, content = search(tmp_path / "killed", 9, train=train, method=method)
    assert train.seen == ["search/cnn/trial7", "search/cnn/trial8"]
    assert content == whole


def test_trials_that_diverge_are_spent_and_tpe_stays_away_from_them(optuna, tmp_path):
    class Fragile(Train):
        def __call__(self, config, *rest):
            self.fate = lambda _: "diverged" if config.optimizer.learning_rate > 0.003 else None
            return super().__call__(config, *rest)

    diverged = {}
    for method in ("random", "tpe"):
        train = Fragile()
        chosen, content = search(tmp_path / method, 24, train=train, method=method)
        of = content["labels"]["cnn"]
        bad = [trial for trial in of["trials"] if trial["status"] == "diverged"]
        assert len(train.seen) == len(of["trials"]) == 24
        assert bad[0]["error"] == "not finite" and "loss" not in bad[0]
        assert chosen["cnn"]["optimizer.learning_rate"] <= 0.003
        diverged[method] = len(bad)
    assert diverged["tpe"] < diverged["random"]


def test_two_processes_share_the_trials_and_agree(optuna, tmp_path):
    class Slow(Train):
        def __call__(self, *arguments):
            time.sleep(0.02)
            return super().__call__(*arguments)

    trains, results = [Slow(), Slow()], {}

    def work(number):
        results[number] = search(tmp_path, 10, "cnn,mlp", trains[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = trains[0].seen + trains[1].seen
    expected = [f"search/{model}/trial{k}" for model in ("cnn", "mlp") for k in range(10)]
    assert sorted(seen) == sorted(expected)
    assert trains[0].seen and trains[1].seen and results[0] == results[1] != {}


def test_the_trial_of_a_process_that_dies_is_taken_over_by_one_that_waits(optuna, tmp_path):
    claimed, may_die = threading.Event(), threading.Event()

    def hang(number):
        claimed.set()
        may_die.wait(20)
        return Killed()

    def die():
        with pytest.raises(Killed):
            search(tmp_path, 3, train=Train(hang))

    thread = threading.Thread(target=die)
    thread.start()
    claimed.wait(20)
    train = Train(lambda number: may_die.set() if number == 2 else None)
    search(tmp_path, 3, train=train)
    thread.join()
    assert train.seen == [f"search/cnn/trial{k}" for k in (1, 2, 0)]


def test_a_stopped_search_goes_on(optuna, tmp_path):
    stop = Never()

    def fate(number):
        stop.requested = number == 1
        return Interrupted("stopped at step 3; the state is saved") if stop.requested else None

    config, train = experiment(), Train(fate)
    with pytest.raises(Interrupted, match="same command goes on"):
        Search(config, {}, tmp_path, 4).run(train, stop)
    assert train.seen == ["search/cnn/trial0", "search/cnn/trial1"]
    train = Train()
    search(tmp_path, 4, train=train)
    assert train.seen == [f"search/cnn/trial{k}" for k in (1, 2, 3)]


def test_a_trial_that_fails_is_tried_again_once_and_then_spent(optuna, tmp_path, capsys):
    fail = Train(lambda number: ValueError("out of memory") if number == 1 else None)
    chosen, content = search(tmp_path, 4, train=fail)
    assert chosen == {} and len(fail.seen) == 4
    assert content["labels"]["cnn"]["trials"][1]["status"] == "running"
    assert "trials 1 failed" in capsys.readouterr().err
    again = Train(lambda number: ValueError("out of memory"))
    chosen, content = search(tmp_path, 4, train=again)
    assert again.seen == ["search/cnn/trial1"] and chosen["cnn"]
    spent = content["labels"]["cnn"]["trials"][1]
    assert spent["status"] == "failed" and "out of memory" in spent["error"]


def test_after_some_failures_the_other_trials_are_left(optuna, tmp_path):
    train = Train(lambda number: OSError("the disk is full"))
    assert search(tmp_path, 9, "cnn,mlp", train=train)[0] == {}
    assert len(train.seen) == 2 * searching.FAILURES
    chosen, content = search(tmp_path, 9, "cnn,mlp")
    assert chosen.keys() == {"cnn", "mlp"}
    assert {t["status"] for t in content["labels"]["mlp"]["trials"]} == {"complete"}


def test_no_winner_where_every_trial_diverged(optuna, tmp_path, capsys):
    assert search(tmp_path, 3, train=Train(lambda number: "diverged"))[0] == {}
    assert "none of 3 trials is complete" in capsys.readouterr().err


@pytest.mark.parametrize("prune", ["median", "halving"])
def test_pruned_trials_count_and_the_decision_survives_a_kill(optuna, tmp_path, prune):
    _, whole = search(tmp_path / "whole", 10, train=Train(epochs=9), prune=prune)
    of = whole["labels"]["cnn"]
    pruned = [trial for trial in of["trials"] if trial["status"] == "pruned"]
    assert pruned and len(of["trials"]) == 10 and of["winner"] not in [t["number"] for t in pruned]
    assert all(trial["epochs"] < 9 and trial["loss"] and trial["accuracy"] for trial in pruned)
    assert of["trials"][of["winner"]]["loss"] == min(
        t["loss"] for t in of["trials"] if t["status"] == "complete"
    )

    class DiesWhenPruned(Train):
        def __call__(self, config, run_dir, should_stop, watch):
            def watch_and_die(epoch, loss):
                try:
                    watch(epoch, loss)
                except Pruned as error:
                    raise Killed from error

            return super().__call__(config, run_dir, should_stop, watch_and_die)

    with pytest.raises(Killed):
        search(tmp_path / "killed", 10, train=DiesWhenPruned(epochs=9), prune=prune)
    _, content = search(tmp_path / "killed", 10, train=Train(epochs=9), prune=prune)
    assert content == whole


def test_a_grid_tries_each_point_once_whatever_the_budget(optuna, tmp_path):
    space = "optimizer.learning_rate=0.1,0.01,0.001; per_model.cnn.model.dropout=0,0.5"
    found = Search(experiment("cnn,mlp", method="grid", space=space), {}, tmp_path, 2)
    assert "search/cnn: 6 trials" in found.describe() and "--tune=2" in found.describe()
    _, content = search(tmp_path, 2, "cnn,mlp", method="grid", space=space)
    tried = [tuple(p.values()) for p in parameters(content)]
    assert tried == [(rate, drop) for rate in (0.1, 0.01, 0.001) for drop in (0.0, 0.5)]
    assert len(parameters(content, "mlp")) == 3


def test_a_random_search_of_few_points_tries_none_twice(optuna, tmp_path):
    space = "optimizer.learning_rate=0.1,0.01,0.001,1; epochs=1,2"
    search(tmp_path, 7, space=space)
    _, content = search(tmp_path, 20, space=space)
    assert len({tuple(p.values()) for p in parameters(content)}) == len(parameters(content)) == 8


def test_more_trials_go_on_and_fewer_choose_among_the_first(optuna, tmp_path):
    first, few = search(tmp_path, 3)
    _, many = search(tmp_path, 8)
    assert parameters(many)[:3] == parameters(few) and len(parameters(many)) == 8
    assert search(tmp_path, 3)[0] == first
    assert search(tmp_path / "other", 8)[1]["labels"] == many["labels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "tpe"}, "method: stored 'random', now 'tpe'"),
        ({"seed": 1}, "seed: stored 0, now 1"),
        ({"prune": "median"}, "prune: stored 'none', now 'median'"),
        (
            {"space": SPACE.replace("1e-4", "1e-3")},
            "cnn: optimizer.learning_rate: stored log:0.0001..0.1, now log:0.001..0.1",
        ),
        ({"space": "optimizer.learning_rate=log:1e-4..1e-1"}, "optimizer.weight_decay: stored log:1e-05..0.1, now nothing"),
        ({"epochs": 3}, "epochs: stored 9, now 3"),
    ],
)  # fmt: skip
def test_another_search_in_the_same_workdir_is_refused(optuna, tmp_path, change, message):
    search(tmp_path, 2, space=SPACE)
    journal = (tmp_path / "search/journal.log").read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        search(tmp_path, 4, **{"space": SPACE} | change)
    assert "another --workdir" in str(caught.value)
    assert (tmp_path / "search/journal.log").read_bytes() == journal


def test_runs_of_the_workdir_that_are_others_are_refused_before_the_search(optuna, tmp_path):
    config = experiment()
    (name, of_run) = (expand(config)[0].name, expand(config)[0].config)
    (tmp_path / name).mkdir(parents=True)
    write_json(tmp_path / name / "config.json", json.loads(of_run.to_json()))
    with pytest.raises(UserError, match="a run that was not tuned"):
        search(tmp_path, 2)
    of_run.epochs = 77
    write_json(tmp_path / name / "config.json", json.loads(of_run.to_json()))
    with pytest.raises(UserError, match="epochs: stored 77, now 9"):
        search(tmp_path, 2)
    assert not (tmp_path / "search").exists()


def test_another_winner_says_which_runs_to_delete(optuna, tmp_path):
    search(tmp_path, 4)
    found = Search(experiment(), {}, tmp_path, 4)
    text = found.cure(expand(experiment())[0])
    assert f"Delete the cnn runs in {tmp_path}/cnn" in text and "--tune=N" in text
    assert search_cure(tmp_path).startswith("This workdir's runs were tuned: give --tune=4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "bayes"}, "config.search.method: 'bayes' is not known"),
        ({"prune": "all"}, "config.search.prune: 'all' is not known"),
        ({"space": "augment.mixup=-1..1"}, "augment.mixup=-1.0 is out of range"),
        ({"space": "optimizer.learning_rate=0.1,0"}, "optimizer.learning_rate=0.0 is out of range"),
        ({"space": "loss.name=cross_entropy,hinge; augment.mixup=0,1"}, "hinge needs hard labels"),
        ({"space": ""}, "names no field that matters to cnn"),
        ({"space": "per_model.mlp.epochs=1,2"}, "names no field that matters to cnn"),
        ({"method": "grid"}, "a range, of which a grid has no points"),
    ],
)
def test_mistakes_end_before_anything_is_trained(optuna, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        search(tmp_path, 2, train=None, **options)
    assert not (tmp_path / "search").exists()


def test_trials_learn_from_the_teacher_of_the_first_seed(optuna, tmp_path):
    config = experiment()
    config.seeds, config.distill.teacher = (3, 4), "run:W/mlp/seed{seed}"
    configs = Search(config, {}, tmp_path, 2).check()
    told = {c.distill.teacher for c in configs if c.seed >= TRIAL_SEED}
    assert told == {"run:W/mlp/seed3"}


def test_seeds_and_budgets_that_cannot_be(optuna, tmp_path):
    config = experiment()
    with pytest.raises(UserError, match="--tune=-3: give a number of trials"):
        Search(config, {}, tmp_path, -3)
    config.search.trials = -1
    with pytest.raises(UserError, match="config.search.trials=-1 is out of range"):
        expand(config)
    config.search.trials, config.seeds = 0, (TRIAL_SEED,)
    with pytest.raises(UserError, match="which is in config.seeds"):
        expand(config)
    with pytest.raises(UserError, match="predict_test=False"):
        expand(experiment(), {"predict_test": False})


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "journal.log"
    mend(path)
    for before, after in ((b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"ab", b""), (b"", b"")):
        path.write_bytes(before)
        mend(path)
        assert path.read_bytes() == after


def test_a_search_as_a_user_meets_it(optuna, tmp_path, cache_dir, few_digits):
    fields = [f"--config.{k.replace('__', '.')}={v}" for k, v in few_digits.items()]
    arguments = (
        "--config=configs/digits.py:linear", "--config.seeds=0", "--config.epochs=2", "--tune=2",
        "--config.runtime.tensorboard=False", "--config.compare.measure_speed=False",
        "--config.compare.average_weights=False", *fields, *QUICK_REPORT,
    )  # fmt: skip
    result = run(tmp_path, cache_dir, *arguments)
    assert result.returncode == 0, result.stderr
    content = read_json(tmp_path / "search/search.json")["labels"]["linear"]
    assert [trial["status"] for trial in content["trials"]] == ["complete"] * 2
    winner = content["trials"][content["winner"]]
    for number in range(2):
        trial = tmp_path / f"search/linear/trial{number}"
        assert (trial / "predictions_validation.npz").exists()
        assert not (trial / "predictions_test.npz").exists()
        assert list(read_json(trial / "summary.json")["metrics"]) == ["validation"]
    config = read_json(tmp_path / "linear/seed0/config.json")
    assert config["optimizer"]["learning_rate"] == winner["parameters"]["optimizer.learning_rate"]
    assert (tmp_path / "linear/seed0/predictions_test.npz").exists()
    assert "tuned: 2 trials" in result.stdout
