"""Score a trained captioner: `python evaluate.py --workdir=runs/shapes --split=test`.

Works beside a training run: `--follow` scores each new checkpoint as it comes. `clipcap evaluate` is the same.
"""

from clipcap_jax.__main__ import main

if __name__ == "__main__":
    main("evaluate")
