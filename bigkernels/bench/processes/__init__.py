"""Language models measured in processes of their own: what other packages, or other checkouts, make of a model.

Each file is a script without a word of this package, so that it runs beside any version of it; `serve.py` says how
they talk. `Process` (`bench/process.py`) starts one and asks it.
"""
