"""What everything is compared with: see `python_experiments.coverage.brute_force`."""

from python_experiments.coverage.brute_force import flat_rows, jacobian, kernel_of, relative

__all__ = ["flat_rows", "jacobian", "kernel_of", "relative"]
