"""Reads the autograd graph that a forward pass left: every use of every parameter, certified."""

from __future__ import annotations

from catapult_ext.graph.certify import RowMap
from catapult_ext.graph.plan import Plan, Site, Use, build_plan
from catapult_ext.graph.precision import refuse_lower_precision
from catapult_ext.graph.walk import Walk, walk

__all__ = ["Plan", "RowMap", "Site", "Use", "Walk", "build_plan", "refuse_lower_precision", "walk"]
