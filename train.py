"""Train a captioner: `python train.py --config=configs/shapes.py --workdir=runs/shapes`.

Any setting can be changed on the command line: `--config.train.epochs=3`. The same command goes on after a stop.
`clipcap train` is the same.
"""

from clipcap_jax.__main__ import main

if __name__ == "__main__":
    main("train")
