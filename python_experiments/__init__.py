"""The paper's figures and tables as declarations, their claims, plots, report page and command line."""
