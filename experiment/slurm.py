"""The job array of SLURM: its script, and how it is submitted."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from errors import UserError

# Options that the script or submit.sh gives.
OURS = ("job-name", "requeue", "open-mode", "signal", "array", "output", "dependency", "parsable")
REQUEUES = 20  # of a task that saved and stopped, at the end of its time for example

# The names of all jobs stand in the script, of which SLURM keeps a copy: a later launch with other
# jobs does not reach an array that waits.
ARRAY = """\
#!/bin/bash
#SBATCH --job-name=archcompare
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
{options}
# Task k of stage n (the argument) runs job k of its list; submit.sh submits the stages in order.
{stages}
declare -n jobs="stage${{1:-1}}"
name=${{jobs[$SLURM_ARRAY_TASK_ID]}}
cd -- {cwd} || exit 2
folder={workdir}/$name
mkdir -p -- "$folder" || exit 2
echo "--- job $SLURM_JOB_ID on $(hostname), $(date)" >>"$folder/log.txt"

# SLURM signals this shell two minutes before the end of its time: Python saves and exits with 75.
trap 'again=1; [ -z "$!" ] || kill -TERM "$!" 2>/dev/null' TERM
{command} "--only=$name" >>"$folder/log.txt" 2>&1 &
child=$!
again=1
while [ -n "$again" ]; do  # a trap ends `wait` before the child has ended
  again=
  wait "$child"
  code=$?
done
if [ "$code" = 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


def launch(
    stages: list[list[str]],
    command: Callable[[str], list[str]],
    workdir: Path,
    workers: int,
    options: str,
) -> None:
    """Writes WORKDIR/launch/array.sh and submit.sh; submits them where there is sbatch.

    Args:
      stages: names of jobs; a stage starts when the one before has ended.
      command: returns the command line of a job.
      workdir: on a file system that all nodes see.
      workers: tasks at a time, 0 for as many as there are nodes.
      options: of sbatch, "partition=gpu,time=04:00:00".
    """
    folder = workdir.absolute() / "launch"
    folder.mkdir(exist_ok=True)
    (folder / "array.sh").write_text(array_script(stages, command(""), workdir, options))
    (folder / "submit.sh").write_text(submit_script(stages, folder, workers))
    submit = f"bash {shlex.quote(str(folder / 'submit.sh'))}"
    if not shutil.which("sbatch"):
        print((folder / "array.sh").read_text())
        print(f"There is no sbatch here. On a machine of the cluster, submit with\n{submit}")
        return
    done = subprocess.run(["bash", folder / "submit.sh"], capture_output=True, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise UserError(
            f"sbatch refused the array: {done.stderr.strip()}\nMend --slurm={options!r}, or "
            f"{folder / 'array.sh'}, and then: {submit}"
        )
    print("The same command, once all have ended, submits what is not complete.")


def array_script(stages: list[list[str]], command: list[str], workdir: Path, options: str) -> str:
    """Returns the script of every task; `command` is of a job, its name cut off."""
    lists = [
        "\n".join((f"stage{number}=(", *(f"  {shlex.quote(name)}" for name in stage), ")"))
        for number, stage in enumerate(stages, start=1)
    ]
    return ARRAY.format(
        options="".join(f"#SBATCH {option}\n" for option in sbatch_options(options)),
        stages="\n".join(lists),
        cwd=shlex.quote(os.getcwd()),
        workdir=shlex.quote(str(workdir.absolute())),
        command=shlex.join(command[:-1]),
        requeues=REQUEUES,
    )


def sbatch_options(text: str) -> list[str]:
    """Returns "partition=gpu,nodelist=a,b exclusive" as options: ["--partition=gpu", ...].

    They are separated by spaces, or by a comma before the next `name=`.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--slurm={text!r}: {error}") from error
    found = [part for word in words for part in re.split(r",(?=-{0,2}[a-z][a-z-]*=)", word)]
    options = []
    for part in filter(None, found):
        name, equals, value = part.lstrip("-").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or re.search(r'["\n]', value):
            raise UserError(f"--slurm: {part!r} is not of the form name=value, as sbatch has it")
        if name in OURS:
            raise UserError(f"--slurm: {name} is set by the launcher: leave it out")
        value = f'"{value}"' if re.search(r"\s", value) else value
        options.append(f"--{name}{equals}{value}")
    return options


def submit_script(stages: list[list[str]], folder: Path, workers: int) -> str:
    """Returns the script that submits each stage as an array, after the one before."""
    lines = ["#!/bin/bash", "set -e", f"cd -- {shlex.quote(str(folder))}"]
    for number, stage in enumerate(stages, start=1):
        array = f"--array=0-{len(stage) - 1}" + (f"%{workers}" if workers else "")
        after = f" --dependency=afterany:${{job{number - 1}%%;*}}" if number > 1 else ""
        lines += [
            f"job{number}=$(sbatch --parsable --output=%A_%a.log {array}{after} array.sh {number})",
            f'echo "stage {number}, {len(stage)} jobs: SLURM job ${{job{number}%%;*}}"',
        ]
    return "\n".join(lines) + "\n"
