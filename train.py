"""Train a captioner: `python train.py --config=configs/shapes.py --workdir=runs/shapes`.

Any setting can be changed on the command line: `--config.train.epochs=3`. The same command goes on after a stop.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from clipcap_jax import cluster, config, datasets
from clipcap_jax.checkpoints import store
from clipcap_jax.commands import cli
from clipcap_jax.errors import UserError
from clipcap_jax.training import loop

_DEFAULT = str(Path(__file__).parent / "configs" / "shapes.py")
_CONFIG = config_flags.DEFINE_config_file("config", _DEFAULT, "what to train, and how")
_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder [runs/<name of the config file>]")

cli.define_cluster_flags()


def main(_: list[str]) -> None:
    console = cli.start_processes(flags.FLAGS)
    try:
        values = _CONFIG.value.to_dict()
    except OSError as error:  # ml_collections raises it only now
        raise UserError(str(error)) from error
    settings = config.from_dict(values)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    if settings.data.name == "shapes":  # drawn rather than downloaded, so nobody needs to ask for it
        with cluster.in_turn():
            console.print(datasets.prepare_shapes(settings.data.data_dir))
    loop.train(settings, store.run_folder(_WORKDIR.value or f"runs/{name}"), console)


if __name__ == "__main__":
    cli.run_flags_script(main)
