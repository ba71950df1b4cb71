"""Run the notebooks from a terminal, without a browser (first lines of what `make run` calls).

Conventions the notebooks keep, so that one file runs unchanged in Jupyter, on Kaggle and here:

- `NN_name.py` (percent format) and `NN_name.ipynb` are one notebook. Edit either, then `make sync`; the pair holds no
  outputs.
- The cell tagged `bootstrap` finds the package. It is the same in every notebook.
- The cell tagged `parameters` holds only lines `name: type = value  # meaning, unit`, with type str, int, float or bool.
  Values given on the command line are set in a cell *after* it, so nothing may be computed inside it.
- `data`, `run_dir`, `demo_scale` and `seed` exist in all three. This runner sets `data` and `run_dir`.
- A notebook writes only below `run_dir/<its name>/`: `result.json` last, pictures as `figures/*.png`. The runner puts
  the executed copy beside it as `run_dir/<its name>.ipynb`. The demo corpus is kept in `run_dir/../demo`.
- `result.json` has `notebook`, `corpus` (name, kind, fingerprint), `metrics` (the names of `deepfake_utils.evaluation`:
  `eer`, `eer_ci`, `min_tdcf`, ...; fractions, not percent), `config` and `machine`.
- Notebook 03 reads the weights and scores that notebook 02 left in `run_dir/02_train/`.
- Cells stay within about 15 lines, define no class and contain no epoch loop.
"""
