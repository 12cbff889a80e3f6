"""Launchers, with stand-ins for the runs: what they start, start again, and say."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from errors import UserError
from experiment import jobs, launch, on_devices, on_ray, slurm
from experiment.grid import Run
from experiment.machine import LAUNCHER, check_locks, locked
from experiment.on_devices import DevicePool, devices
from experiment.runner import STOPPED
from tests.conftest import ROOT

# A run: what it does is in a file of its folder, and each try leaves a line in another.
STAND_IN = """
cd "$0/$1" || exit 2
echo try >>tries
[ -z "$CUDA_VISIBLE_DEVICES" ] || echo "$CUDA_VISIBLE_DEVICES" >>devices
. ./does
echo '{"status": "complete", "metrics": {"test": {"accuracy": 0.5}}}' >summary.json
"""
TWICE = '[ "$(wc -l <tries)" -gt 2 ] || '  # before the third try
CPU = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir with a space and a quote in its name, whose jobs are stand-ins."""
    folder = tmp_path / "it's a workdir"
    folder.mkdir()

    def command(name):
        return ["sh", "-c", "echo the report"] if name == jobs.REPORT else [
            "sh", "-c", STAND_IN, str(folder), name
        ]  # fmt: skip

    monkeypatch.setattr(launch, "command", command)
    return folder


def give(workdir, **scripts):
    """Makes the folders of runs, with what they do; returns their names."""
    for name, script in scripts.items():
        (workdir / name).mkdir()
        (workdir / name / "does").write_text(script + "\n")
    return list(scripts)


def tries(workdir, name):
    path = workdir / name / "tries"
    return len(path.read_text().splitlines()) if path.exists() else 0


class Asked:
    requested = False


def watch(workdir, stages, workers=3, stop=None):
    return launch.watch(
        stages, DevicePool(launch.command, workdir, workers, CPU), workdir, stop or Asked()
    )


def test_jobs_are_started_again_when_killed_or_stopped_and_no_failure_stops_the_others(
    workdir, capfd
):
    names = give(
        workdir,
        plain="",
        killed=TWICE + "kill -9 $$",
        stopped=TWICE + "exit 75",
        mistaken="echo 'error: the disk is full' >&2; exit 2",
        diverged="""echo '{"status": "diverged", "error": "at step 3"}' >summary.json; exit 1""",
        hopeless="exit 75",
        done="exit 1",
    )
    (workdir / "done/summary.json").write_text('{"status": "complete"}')
    assert watch(workdir, [names]) == 1
    assert [tries(workdir, name) for name in names] == [1, 3, 3, 1, 1, launch.TRIES, 0]
    out = capfd.readouterr().out
    for line in (
        "plain: complete 50.0 % test",
        "killed: waiting (killed by signal 9, try 2 of 4)",
        "killed: complete 50.0 % test",
        "mistaken: failed: exit code 2",
        "mistaken/log.txt ends with:\n    error: the disk is full\n",
        "diverged: diverged: at step 3",
        "hopeless: failed: exit code 75",
        "done: complete (1 of 7)",
        "the report",
    ):
        assert line in out
    for name in ("mistaken", "hopeless"):
        (workdir / name / "does").write_text("")
    assert watch(workdir, [[name for name in names if name != "diverged"]]) == 0
    assert tries(workdir, "plain") == 1 and tries(workdir, "mistaken") == 2


def test_a_stage_begins_when_the_one_before_has_ended(workdir):
    first = give(workdir, a="sleep 0.3", b="")
    second = give(workdir, c="ls ../a/summary.json || exit 1")
    assert watch(workdir, [first, second]) == 0


def test_a_signal_is_passed_on_and_what_waits_is_not_started(workdir, capfd):
    saves = "trap 'echo saved; exit 75' TERM; touch began; while :; do sleep 0.05; done"
    names = give(workdir, a=saves, b=saves, c=saves)
    begun = [workdir / name / "began" for name in "ab"]
    stop = type("", (), {"requested": property(lambda _: all(path.exists() for path in begun))})()
    assert watch(workdir, [names, ["never"]], workers=2, stop=stop) == STOPPED
    assert [tries(workdir, name) for name in names] == [1, 1, 0]
    assert all("saved" in jobs.log_file(workdir, name).read_text() for name in "ab")
    assert "the report" not in capfd.readouterr().out


def test_a_run_of_another_process_is_left_to_it_and_taken_over_when_that_ends(workdir, capfd):
    names = give(workdir, a="", b="")
    held = (workdir / "a/.lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    (workdir / "b/does").write_text("sleep 0.5")
    pool = DevicePool(launch.command, workdir, 2, CPU)
    poll = pool.poll

    def poll_and_release(handle):
        assert tries(workdir, "a") == 0 or held.closed
        if (code := poll(handle)) is not None:
            held.close()  # when b has ended
        return code

    pool.poll = poll_and_release
    assert launch.watch([names], pool, workdir, Asked()) == 0
    assert "a: another process trains it" in capfd.readouterr().out
    assert tries(workdir, "a") == tries(workdir, "b") == 1


def test_each_place_is_a_device_and_shares_its_memory(workdir, monkeypatch, tmp_path):
    def spec(name):
        return name == "jax_cuda12_plugin" or None

    monkeypatch.setattr(on_devices.importlib.util, "find_spec", spec)
    pool = DevicePool(launch.command, workdir, 5, {"CUDA_VISIBLE_DEVICES": "3,GPU-ab"})
    assert pool.places == ["gpu 3", "gpu GPU-ab", "gpu 3", "gpu GPU-ab", "gpu 3"]
    assert pool.environment(1) == {
        "CUDA_VISIBLE_DEVICES": "GPU-ab",
        "XLA_CLIENT_MEM_FRACTION": "0.300",
    }
    own = {"CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}
    assert DevicePool(launch.command, workdir, 4, own).environment(3) == own
    alone = DevicePool(launch.command, workdir, 0, {"CUDA_VISIBLE_DEVICES": "3,4"})
    assert alone.environment(1) == {"CUDA_VISIBLE_DEVICES": "4"}
    assert devices({"CUDA_VISIBLE_DEVICES": ""}) == [("cpu", "")]
    assert devices({"CUDA_VISIBLE_DEVICES": "0,-1,1"}) == [("gpu 0", "0")]
    assert devices({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}) == [("cpu", "")]
    listed = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22)
  MIG 3g.20gb     Device  0: (UUID: MIG-aa)
  MIG 3g.20gb     Device  1: (UUID: MIG-bb)
"""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf {shlex.quote(listed)}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = [("gpu 0", "GPU-11"), ("gpu 1.0", "MIG-aa"), ("gpu 1.1", "MIG-bb")]
    assert devices({}) == found
    give(workdir, a="")
    pool = DevicePool(launch.command, workdir, 0, {**CPU, "JAX_PLATFORMS": ""})
    assert pool.start("a", 2).wait() == 0
    assert (workdir / "a/devices").read_text() == "MIG-bb\n"


def test_a_tpu_takes_one_process(workdir, monkeypatch):
    monkeypatch.setattr(on_devices, "devices", lambda environ: [("tpu", "")])
    assert DevicePool(launch.command, workdir, 0, {}).places == ["tpu"]
    with pytest.raises(UserError, match="leave --workers out"):
        DevicePool(launch.command, workdir, 2, {})


def test_the_table_on_a_terminal(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("LINES", "5")
    trial = workdir / "search/cnn/trial3"
    trial.mkdir(parents=True)
    lines = [{"split": "validation", "epoch": 2.0, "accuracy": 0.25}, {"split": "train"}]
    text = "x" * 9000 + "\n" + "".join(json.dumps(line) + "\n" for line in lines) + '{"spl'
    (trial / "metrics.jsonl").write_text(text)
    table = jobs.Table(["search/cnn", "b", "c"], workdir)
    table.set("search/cnn", "running on gpu 0", begins=True)
    table.set("b", "running on gpu 1", begins=True)
    table.set("b", "failed: " + "long " * 20, ends=True)
    table.draw()
    table.say("said")
    out = capsys.readouterr().out
    first, second = out.split("\x1b[3F\x1b[J")
    assert second.startswith("said\n") and second.removeprefix("said\n") == first
    rows = first.splitlines()
    state = "running on gpu 0: trial3, epoch 2, validation 25.0 %"
    assert rows[0] == f"search/cnn  0:00:00  {state}"[:69]
    assert rows[1:] == ["c                    waiting", "1 of 3 ended"]  # what has ended makes room
    assert all(len(row) < 70 for row in rows)


def test_a_job_ends_with_the_process_that_launched_it():
    """Killed, the launcher can pass nothing on: the kernel does."""
    job = "from experiment.machine import end_with_launcher; end_with_launcher(); print(1, flush=True); import time; time.sleep(60)"
    code = f"""
import os, subprocess, sys
job = subprocess.Popen([sys.executable, "-c", {job!r}], env={{**os.environ, {LAUNCHER!r}: str(os.getpid())}}, stdout=subprocess.PIPE)
job.stdout.readline()
print(job.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    status, limit = Path(f"/proc/{done.stdout.strip()}/stat"), time.monotonic() + 30
    while status.exists() and ") Z " not in status.read_text():  # Z: gone, but nobody has asked
        assert time.monotonic() < limit
        time.sleep(0.02)
    orphan = {**os.environ, LAUNCHER: "1" if os.getpid() != 1 else "2"}
    done = subprocess.run([sys.executable, "-c", job], cwd=ROOT, capture_output=True, env=orphan)
    assert done.returncode == -signal.SIGTERM and done.stdout == b""


# --- what is asked for --------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch):
    """Returns a function: the options of a command line, whose words are then sys.argv."""

    def give(*words, shard=""):
        values = launch.flags.FlagValues()
        for name in ("launch", "only", "slurm", "ray_address"):
            launch.flags.DEFINE_string(name, "", "", flag_values=values)
        launch.flags.DEFINE_integer("workers", 0, "", flag_values=values)
        launch.flags.DEFINE_boolean("dry_run", False, "", flag_values=values)
        values([sys.argv[0], *(word for word in words if not word.startswith("--config"))])
        monkeypatch.setattr(launch.flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", ["main.py", *words])
        return launch.options(shard)

    return give


def test_a_job_is_the_same_command_line_for_one_run(given, tmp_path):
    (tmp_path / "flags").write_text("--launch=local\n--workers=3\n")
    given(
        f"--flagfile={tmp_path / 'flags'}",
        "--config=a b.py",
        "-workers",
        "2",
        "--config.only=1",
        "--nodry_run",
    )
    words = [sys.executable, str(ROOT / "main.py"), "--config=a b.py", "--config.only=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert launch.command("cnn/seed0") == [*words, "--only=cnn/seed0"]
        shown = launch.shown([["search/cnn"], ["cnn/seed0"]]).splitlines()
    assert shown[0] == f"stage 1: {shlex.join([*words, '--only=search/cnn'])}"
    assert [line[:8] for line in shown[1:]] == ["stage 2:", "stage 3:"]
    assert shown[2].endswith("--only=report")


@pytest.mark.parametrize(
    ("words", "shard", "message"),
    [
        (["--only=cnn/seed0"], "0/2", "give one of them"),
        (["--launch=local"], "0/2", "give one of them"),
        (["--launch=slum"], "", "Did you mean 'slurm'"),
        (["--workers=2"], "", "--workers is for --launch"),
        (["--launch=local", "--slurm=time=1"], "", "--slurm is for --launch=slurm"),
        (["--launch=slurm", "--slurm=Time: 1"], "", "'Time:' is not of the form name=value"),
        (["--launch=local", "--ray_address=auto"], "", "--ray_address is for --launch=ray"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given, words, shard, message):
    with pytest.raises(UserError, match=message):
        given(*words, shard=shard)


def test_one_run_is_chosen_by_its_name(tmp_path):
    of_seeds = [ConfigDict({"seed": seed, "data": {"folds": 0}}) for seed in range(3)]
    runs = [Run(f"cnn/seed{config.seed}", config) for config in of_seeds]
    assert launch.chosen(runs, "") == runs
    assert launch.chosen(runs, "report") == []
    assert launch.chosen(runs, "search/cnn", ["search/cnn"]) == []
    assert launch.chosen(runs, "cnn/seed1") == [runs[1]]
    with pytest.raises(UserError, match="The nearest: cnn/seed2"):
        launch.chosen(runs, "cn/seed2")
    assert launch.result(runs[1:2], tmp_path) is None
    (tmp_path / "cnn/seed1").mkdir(parents=True)
    for status, code in (("complete", 0), ("diverged", 1), ("failed", None)):
        (tmp_path / "cnn/seed1/summary.json").write_text(json.dumps({"status": status}))
        assert launch.result(runs[1:2], tmp_path) == code


# --- locks --------------------------------------------------------------------------------------


def no_locks(file, how):
    raise OSError(37, "No locks available")


@pytest.mark.parametrize("flock", [no_locks, lambda file, how: None])
def test_a_workdir_without_locks_is_refused(given, tmp_path, monkeypatch, flock):
    check_locks(tmp_path)
    with locked(tmp_path / ".lock-test"):  # another launcher shows it at this moment
        check_locks(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"lies on \w+ \(/.*with no locks.*another file system"):
        launch.prepare(given("--launch=local"), tmp_path)
    launch.prepare(given("--only=cnn/seed0"), tmp_path)  # one process needs none


def test_locks_of_one_host_alone_are_refused_to_several(tmp_path, monkeypatch):
    mount = ("nfs4", "/data", {"rw", "local_lock=all"})
    monkeypatch.setattr("experiment.machine._mount", lambda folder: mount)
    check_locks(tmp_path)
    with pytest.raises(UserError, match=r"nfs4 \(/data\) with locks that hold on one host alone"):
        check_locks(tmp_path, hosts=True)


# --- SLURM --------------------------------------------------------------------------------------

SBATCH = r"""#!/bin/bash
# Runs the tasks of an array one after the other; a task that asks for it once more.
for word in "$@"; do case $word in --array=*) range=${word#--array=}; range=${range%%%*};; esac; done
set -- "${@: -2}"
bash -n "$1" || exit 1
id=$(($(cat "$FAKE/jobs" 2>/dev/null || echo 100) + 1)); echo $id >"$FAKE/jobs"
echo "$id $ARGUMENTS" >>"$FAKE/submitted"
for task in $(seq "${range%-*}" "${range#*-}"); do
  export SLURM_RESTART_COUNT=0 SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$id$task
  while rm -f "$FAKE/requeue"; bash "$1" "$2" >>"$FAKE/slurm.log" 2>&1; [ -e "$FAKE/requeue" ]; do
    [ "$(cat "$FAKE/requeue")" = "requeue ${id}_$task" ] || exit 1
    SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
  done
done
echo "$id;cluster"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder on the PATH with sbatch and scontrol that run an array here and now."""
    folder = tmp_path / "fake"
    folder.mkdir()
    sbatch = SBATCH.replace("$ARGUMENTS", "$saved").replace("for word", 'saved="$*"\nfor word', 1)
    for name, script in (
        ("sbatch", sbatch),
        ("scontrol", '#!/bin/sh\necho "$*" >"$FAKE/requeue"\n'),
    ):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


OPTIONS = SimpleNamespace(workers=2, slurm="partition=gpu,nodelist=a,b exclusive comment='a b'")


def command_of(workdir):
    """A command line with what a shell might stumble over; its name is cut off and appended."""

    def command(name):
        script = STAND_IN.replace("$1", "${1#--only=}") + 'echo "100%: $(pwd)" {}\n'
        script = "[ $1 = --only=report ] && exit\n" + script
        return ["sh", "-c", script, str(workdir), f"--only={name}"]

    return command


def test_an_array_is_submitted_and_requeues_what_stopped(workdir, cluster, monkeypatch, capfd):
    monkeypatch.setattr(launch, "command", command_of(workdir))
    names = give(workdir, a="", b=TWICE + "exit 75", c="exit 1", d="", done="exit 1")
    (workdir / "done/summary.json").write_text('{"status": "complete"}')
    assert launch.by_slurm([["a", "b", "c", "done"], ["d"]], OPTIONS, workdir) == 0
    assert [tries(workdir, name) for name in names] == [1, 3, 1, 1, 0]
    log = jobs.log_file(workdir, "b").read_text()
    assert log.count("--- job 1011 on") == 3 and f"100%: {workdir}/b {{}}" in log
    assert jobs.log_file(workdir, "report").exists()
    out = capfd.readouterr().out
    assert "stage 1, 3 jobs: SLURM job 101" in out and "stage 3, 1 jobs: SLURM job 103" in out
    assert (cluster / "submitted").read_text().splitlines() == [
        "101 --parsable --output=%A_%a.log --array=0-2%2 array.sh 1",
        "102 --parsable --output=%A_%a.log --array=0-0%2 --dependency=afterany:101 array.sh 2",
        "103 --parsable --output=%A_%a.log --array=0-0%2 --dependency=afterany:102 array.sh 3",
    ]
    head = (workdir / "launch/array.sh").read_text().splitlines()[:9]
    for line in ("--requeue", "--signal=B:TERM@120", "--open-mode=append", "--partition=gpu"):
        assert f"#SBATCH {line}" in head
    assert head[6:] == ["#SBATCH --nodelist=a,b", "#SBATCH --exclusive", '#SBATCH --comment="a b"']


def test_the_signal_before_the_end_reaches_the_job(workdir, cluster, monkeypatch):
    monkeypatch.setattr(launch, "command", command_of(workdir))
    saves = "trap 'echo saved; exit 75' TERM; touch began; while :; do sleep 0.05; done"
    give(workdir, a=saves)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    launch.by_slurm([["a"]], OPTIONS, workdir)
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"}
    batch = subprocess.Popen(["bash", workdir / "launch/array.sh", "1"], env=task)
    limit = time.monotonic() + 30
    while not (workdir / "a/began").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    batch.terminate()
    assert batch.wait(30) == STOPPED and "saved" in jobs.log_file(workdir, "a").read_text()
    assert (cluster / "requeue").read_text() == "requeue 7_0\n"
    (cluster / "requeue").unlink()
    (workdir / "a/does").write_text("exit 75")
    task["SLURM_RESTART_COUNT"] = str(slurm.REQUEUES)
    assert subprocess.run(["bash", workdir / "launch/array.sh"], env=task).returncode == STOPPED
    assert not (cluster / "requeue").exists()


def test_without_sbatch_the_script_is_printed_and_its_refusal_is_told(
    workdir, cluster, monkeypatch, capsys
):
    monkeypatch.setattr(launch, "command", command_of(workdir))
    (cluster / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    with pytest.raises(UserError, match="(?s)invalid partition.*Mend --slurm.*submit.sh"):
        launch.by_slurm([["a"]], OPTIONS, workdir)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    launch.by_slurm([["a"]], OPTIONS, workdir)
    out = capsys.readouterr().out
    assert "#SBATCH --requeue" in out
    assert shlex.split(out.splitlines()[-1]) == ["bash", str(workdir / "launch/submit.sh")]
    for text in ("Partition=gpu", "comment='a", 'a="b"'):
        with pytest.raises(UserError, match="--slurm"):
            slurm.sbatch_options(text + "\n=")


# --- Ray ----------------------------------------------------------------------------------------


def test_ray_that_is_not_installed_is_named_first(given, monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[ray\]'"):
        given("--launch=ray")


def test_a_node_that_does_not_share_the_workdir_is_known(tmp_path):
    assert on_ray.sees(str(tmp_path), "{}") == "does not see the workdir"
    (tmp_path / "experiment.json").write_text("{}")
    assert "sees no locks" in on_ray.sees(str(tmp_path), "{}")
    with locked(tmp_path / ".lock-test"):
        assert on_ray.sees(str(tmp_path), "{}") == ""
        assert on_ray.sees(str(tmp_path), "{other}") == "does not see the workdir"


def test_tasks_of_ray(workdir, monkeypatch, capfd):
    """A killed job is started again, and so is one whose worker was killed."""
    pytest.importorskip("ray")
    missing = on_ray.pool(launch.command, workdir, 2, "127.0.0.1:1", 2)
    with pytest.raises(UserError, match="--ray_address=127.0.0.1:1: no cluster"), missing:
        pass
    (workdir / "experiment.json").write_text("{}")
    names = give(
        workdir, a=TWICE + "kill -9 $$", b='[ -e tried ] || { touch tried; kill -9 "$PPID"; }'
    )
    options = SimpleNamespace(workers=2, ray_address="")
    assert launch.ray([names], options, workdir) == 0
    assert [tries(workdir, name) for name in names] == [3, 2]
    assert "a: complete 50.0 % test" in capfd.readouterr().out
