"""Write the images of any source as sharded files, to be read as data.source=array_record.

    python -m analysis.records DATA_DIR OUT
    python -m analysis.records --config=configs/intel.py --config.data.path=... OUT

Killed, the same command goes on. Of a whole OUT, every record is compared with the source. Exit
codes: 0 whole, 2 a mistake in the command, the source or the disk.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from configs import base
from data.sources import list_source
from data.writing import write_records
from errors import UserError
from experiment.command import arguments, config_overrides, run_command
from experiment.grid import expand


def main(argv: list[str]) -> int:
    """Writes a folder, or the data of a config; returns the exit code."""
    config, most = CONFIG.value, 1 if CONFIG.value is not None else 2
    usage = "analysis.records DATA_DIR OUT | --config=configs/... OUT"
    given = arguments(argv, usage, least=most, most=most)
    if config is not None:
        data = expand(config, config_overrides(CONFIG))[0].config.data
    else:
        data = base.get_config().data
        data.path = given[0]
    output = Path(given[-1]).expanduser()
    if data.source == "folder" and _inside(output, Path(data.path).expanduser()):
        raise UserError(f"{output} lies in {data.path}, whose folders are classes: choose another")
    listing = list_source(data)
    count = len(listing.ids)
    with tqdm(total=count, unit=" images", leave=False, disable=None) as bar:
        wrote = write_records(
            listing, data, output, NAME.value, IMAGES_PER_SHARD.value, progress=bar.update
        )
    print(
        f"{count:,} records {'written to' if wrote else 'compared with the source in'} {output}\n"
        f"read them with --config.data.source=array_record --config.data.path={output}"
    )
    return 0


def _inside(output: Path, folder: Path) -> bool:
    return output.resolve().is_relative_to(folder.resolve())


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Write the data of this experiment")
    NAME = flags.DEFINE_string("name", "images", "How the files' names begin")
    IMAGES_PER_SHARD = flags.DEFINE_integer(
        "images_per_shard", 0, "0: 8,192, or what makes 512 files", lower_bound=0
    )
    run_command(main)
