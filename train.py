"""Train a captioner: `python train.py --config=configs/shapes.py --workdir=runs/shapes`.

Any setting can be changed on the command line: `--config.train.epochs=3`. The same command goes on after a stop.
"""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from clipcap_jax import cli, config, datasets, trainer

_CONFIG = config_flags.DEFINE_config_file("config", "configs/shapes.py", "what to train, and how")
_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder [runs/<name of the config file>]")


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save
    console = Console()
    settings = config.from_dict(_CONFIG.value.to_dict())
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    if settings.data.name == "shapes":  # drawn rather than downloaded, so nobody needs to ask for it
        console.print(datasets.prepare_shapes(settings.data.data_dir))
    trainer.train(settings, Path(_WORKDIR.value or f"runs/{name}"), console)


if __name__ == "__main__":
    cli.run_script(lambda: app.run(main))
