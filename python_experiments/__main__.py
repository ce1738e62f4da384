"""`python -m python_experiments` is `catapult`."""

from python_experiments.cli import app

if __name__ == "__main__":  # worker processes import this module again
    app(prog_name="catapult")
