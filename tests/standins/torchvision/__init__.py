"""Stands in for a package of compiled code, see `standin`."""

from standin import stand_in

__version__ = "0.0"
stand_in(__name__)
