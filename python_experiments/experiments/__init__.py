"""One declaration per figure or table of the paper."""

from __future__ import annotations

from python_experiments.experiments import (
    fig2,
    fig3,
    fig4,
    fig5,
    fig6,
    fig7,
    fig8,
    fig12,
    fig13,
    fig14,
    fig16,
    table1,
)

#: In the paper's order.
EXPERIMENTS = (
    fig2.FIG2,
    fig3.FCN,
    fig3.CNN,
    fig4.FCN,
    fig4.CNN,
    fig5.FIG5,
    fig6.FIG6,
    fig6.TABLE2_SHALLOW,
    fig6.TABLE2_FCN,
    fig6.TABLE2_CNN,
    *fig7.FIG7,
    fig8.FIG8,
    table1.TABLE1,
    fig12.SHALLOW,
    fig12.FCN,
    fig12.CNN,
    fig13.FCN,
    fig13.CNN,
    fig14.FCN_SVHN,
    fig14.CNN_SVHN,
    fig14.FCN_RANK2,
    fig14.WRN_CIFAR,
    fig16.FCN,
    fig16.CNN,
    fig4.FCN_PARTS,
    fig4.CNN_PARTS,
    fig4.FCN_SCRATCH,
    fig4.CNN_SCRATCH,
    *fig7.FIG21,
    *fig7.FIG22,
    fig7.FIG23,
    fig8.FIG26,
)

#: What `catapult reproduce` runs unless told otherwise: minutes on two cores.
MAIN = (fig2.FIG2, fig3.FCN, fig3.CNN, fig5.FIG5, table1.TABLE1, fig13.FCN, fig13.CNN)
