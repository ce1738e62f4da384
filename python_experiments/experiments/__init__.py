"""One declaration per figure or table of the paper."""

from __future__ import annotations

from python_experiments.experiments import fig2, fig3, fig5, table1

#: In the paper's order.
EXPERIMENTS = (fig2.FIG2, fig3.FCN, fig3.CNN, fig5.FIG5, table1.TABLE1)
